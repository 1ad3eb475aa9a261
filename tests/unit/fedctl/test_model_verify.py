"""A downloaded model is what its card says, or refused."""

import hashlib
import json
from pathlib import Path

import pytest

from fedcore.errors import DigestMismatchError, NotFoundError, StorageError
from fedcore.tensor_file import TensorSpec, write_tensor_file
from fedctl.model_commands import verified


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    digest = write_tensor_file(path, {"w": (TensorSpec("w", "F32", (2,)), bytes(8))})
    (tmp_path / "model.json").write_text(json.dumps({"digest": digest, "run": "blood-1", "round": 4}))
    return path


def test_a_whole_model_is_told(model: Path) -> None:
    found = verified(model)
    assert (found["run"], found["round"], found["tensors"], found["bytes"]) == ("blood-1", 4, 1, 8)


def test_a_flipped_bit_is_found(model: Path) -> None:
    data = bytearray(model.read_bytes())
    data[-1] ^= 1
    model.write_bytes(data)
    with pytest.raises(DigestMismatchError, match=r"its card says [0-9a-f]{64}"):
        verified(model)


def test_what_is_no_model_is_refused_even_if_the_digest_is_right(model: Path) -> None:
    model.write_bytes(b"no tensors")
    card = model.with_suffix(".json")
    card.write_text(json.dumps({"digest": hashlib.sha256(b"no tensors").hexdigest()}))
    with pytest.raises(StorageError, match="not a safetensors file"):
        verified(model)


@pytest.mark.parametrize("text", ["", "[]", '{"run": "a"}', "{"])
def test_a_card_that_is_none_is_told(model: Path, text: str) -> None:
    model.with_suffix(".json").write_text(text)
    with pytest.raises(StorageError, match="is no model's card"):
        verified(model)


def test_both_files_are_needed(model: Path) -> None:
    model.with_suffix(".json").unlink()
    with pytest.raises(NotFoundError, match=r"model\.json: no such file"):
        verified(model)
