"""Downloads and uploads over a real stream that is cut, corrupted or misses bytes."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save
from typer.testing import CliRunner

from fedcore.errors import (
    ConfigError,
    DigestMismatchError,
    FedimpresError,
    NotFoundError,
    StorageError,
    UnreachableError,
)
from fedcore.tensor_file import TensorSpec, read_manifest, write_tensor_file
from fedcore.v1 import admin_pb2
from fedctl.admin import open_credential
from fedctl.app import app
from fedctl.transfer import ATTEMPTS, download_artifact, file_digest, upload_model

PAYLOAD_BYTES = 4 * 250


@pytest.fixture
def artifact(lab: Any, tmp_path: Path) -> tuple[Path, str]:
    """A model of 1000 payload bytes at the coordinator."""
    path = tmp_path / "stored.safetensors"
    spec = TensorSpec("weight", "F32", (250,))
    digest = write_tensor_file(path, {"weight": (spec, os.urandom(PAYLOAD_BYTES))})
    lab.script.files[digest] = path
    return path, digest


def download(lab: Any, digest: str, out: Path) -> None:
    with open_credential(lab.operator) as admin:
        download_artifact(admin, digest, out, sleep=lambda seconds: None)


def test_download_is_the_file(lab: Any, artifact: tuple[Path, str], tmp_path: Path) -> None:
    stored, digest = artifact
    out = tmp_path / "model.safetensors"
    seen: list[tuple[int, int]] = []
    with open_credential(lab.operator) as admin:
        download_artifact(admin, digest, out, on_bytes=lambda done, total: seen.append((done, total)))
    assert out.read_bytes() == stored.read_bytes()
    assert hashlib.sha256(out.read_bytes()).hexdigest() == digest
    assert seen[-1] == (PAYLOAD_BYTES, PAYLOAD_BYTES)
    assert not out.with_name("model.safetensors.part").exists()


def test_cut_streams_are_resumed_from_what_is_there(
    lab: Any, artifact: tuple[Path, str], tmp_path: Path
) -> None:
    stored, digest = artifact
    lab.script.cuts = [3, 0, 5, None]
    download(lab, digest, tmp_path / "m.safetensors")
    assert (tmp_path / "m.safetensors").read_bytes() == stored.read_bytes()
    assert [request.offset for request in lab.script.of("Download")] == [0, 192, 192, 512]


def test_a_new_call_goes_on_where_an_older_one_gave_up(
    lab: Any, artifact: tuple[Path, str], tmp_path: Path
) -> None:
    stored, digest = artifact
    out = tmp_path / "m.safetensors"
    lab.script.cuts = [4, *[0] * ATTEMPTS]
    with pytest.raises(UnreachableError):
        download(lab, digest, out)
    assert not out.exists()
    lab.script.cuts = []
    lab.script.asked.clear()
    download(lab, digest, out)
    assert out.read_bytes() == stored.read_bytes()
    assert [request.offset for request in lab.script.of("Download")] == [0, 256]


def test_a_flipped_bit_is_found_and_nothing_kept(
    lab: Any, artifact: tuple[Path, str], tmp_path: Path
) -> None:
    _, digest = artifact
    out = tmp_path / "m.safetensors"
    lab.script.corrupt_at = 500
    with pytest.raises(DigestMismatchError, match="digest of the bytes"):
        download(lab, digest, out)
    assert list(tmp_path.glob("m.safetensors*")) == []


def test_an_old_part_of_another_file_is_not_trusted(
    lab: Any, artifact: tuple[Path, str], tmp_path: Path
) -> None:
    stored, digest = artifact
    out = tmp_path / "m.safetensors"
    header = len(stored.read_bytes()) - PAYLOAD_BYTES
    out.with_name("m.safetensors.part").write_bytes(stored.read_bytes()[:header] + b"\0" * 320)
    with pytest.raises(DigestMismatchError):
        download(lab, digest, out)
    download(lab, digest, out)
    assert out.read_bytes() == stored.read_bytes()


def test_upload_sends_manifest_and_every_byte(lab: Any, artifact: tuple[Path, str]) -> None:
    stored, digest = artifact
    with open_credential(lab.operator) as admin:
        assert upload_model(admin, stored) == digest == file_digest(stored)
    assert lab.script.uploaded == stored.read_bytes()[-PAYLOAD_BYTES:]


def test_upload_refuses_what_is_no_canonical_file(lab: Any, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"not a model")
    with open_credential(lab.operator) as admin, pytest.raises(StorageError, match="not a safetensors file"):
        upload_model(admin, tmp_path / "x.safetensors")
    assert lab.script.asked == []


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_upload_brings_other_writers_files_into_canonical_form(
    metadata: Any, lab: Any, tmp_path: Path
) -> None:
    arrays = {
        "z.weight": np.arange(12, dtype="<f4").reshape(3, 4),
        "a.bias": np.ones(5, "<f2"),
        "count": np.array(7, "<i8"),
        "empty": np.zeros((0, 2), "<f4"),
    }
    theirs, ours = tmp_path / "theirs.safetensors", tmp_path / "ours.safetensors"
    theirs.write_bytes(in_order_of_their_names(save(arrays, metadata)))
    names = {"f4": "F32", "f2": "F16", "i8": "I64"}
    digest = write_tensor_file(
        ours,
        {
            name: (TensorSpec(name, names[array.dtype.str[1:]], array.shape), array.tobytes())
            for name, array in arrays.items()
        },
    )
    assert theirs.read_bytes() != ours.read_bytes()
    with open_credential(lab.operator) as admin:
        assert upload_model(admin, theirs) == digest
    assert lab.script.uploaded == ours.read_bytes()[read_manifest(ours)[1] :]


def in_order_of_their_names(data: bytes) -> bytes:
    """The same tensors in an order that no writer must keep, so that sorting by dtype is not taken for granted."""
    size = int.from_bytes(data[:8], "little")
    header, payload, moved = json.loads(data[8 : 8 + size]), data[8 + size :], b""
    for name in sorted(header.keys() - {"__metadata__"}):
        start, end = header[name]["data_offsets"]
        header[name]["data_offsets"] = [len(moved), len(moved) + end - start]
        moved += payload[start:end]
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + moved


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"data_offsets": [4, 20]}, "starts at byte 4"),
        ({"data_offsets": [0, 8]}, "expected 16"),
        ({"shape": [5]}, "expected 20"),
        ({"shape": [-4]}, "not valid"),
        ({"dtype": "F8_E4M3"}, "unknown dtype"),
        ({"data_offsets": 3}, "not a safetensors file"),
        ({"shape": [3], "data_offsets": [0, 12]}, "16 bytes of tensors, expected 12"),
    ],
)
def test_upload_refuses_a_damaged_file_of_another_writer(
    change: Any, error: str, lab: Any, tmp_path: Path
) -> None:
    entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16], **change}
    text = json.dumps({"__metadata__": {"format": "pt"}, "w": entry}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    with open_credential(lab.operator) as admin, pytest.raises(FedimpresError, match=error) as caught:
        upload_model(admin, path)
    assert str(path) in caught.value.message
    assert lab.script.asked == []


def test_submit_uploads_the_initial_model_first(lab: Any, artifact: tuple[Path, str], tmp_path: Path) -> None:
    stored, digest = artifact
    plan = tmp_path / "plan.toml"
    plan.write_text(
        f'name = "b"\nrounds = 1\n[model]\nname = "cnn"\nclasses = 2\ninput = [1, 8, 8]\n'
        f'[training]\ninitial = "{stored.name}"\n'
    )
    result = CliRunner().invoke(app, ["run", "submit", str(plan), "-o", "json"], catch_exceptions=False)
    assert json.loads(result.stdout) == {"run": "blood-1a2b"}
    assert [name for name, _ in lab.script.asked] == ["UploadModel", "SubmitRun"]
    assert lab.script.of("SubmitRun")[0].initial_digest == digest


@pytest.fixture
def models(lab: Any, artifact: tuple[Path, str]) -> str:
    """Three rounds' models, the second the best; all the same bytes."""
    _, digest = artifact
    card = json.dumps({"model": {"name": "cnn"}, "class_names": ["a", "b"], "metrics": {"accuracy": 0.5}})
    lab.script.models = [
        admin_pb2.Model(
            run="blood-1a2b", round=n, digest=digest, payload_bytes=1000, best=n == 2, card_json=card
        )
        for n in (3, 1, 2)
    ]
    return digest


@pytest.mark.parametrize(("choice", "round_"), [([], 3), (["--round", "best"], 2), (["--round", "1"], 1)])
def test_model_download_writes_file_and_card(
    choice: list[str], round_: int, lab: Any, models: str, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "model.safetensors"
    args = ["model", "download", "blood", *choice, "--out", str(out), "-o", "json"]
    result = CliRunner().invoke(app, args, catch_exceptions=False)
    assert json.loads(result.stdout)["round"] == round_
    assert file_digest(out) == models
    card = json.loads((tmp_path / "new" / "model.json").read_text())
    assert card["class_names"] == ["a", "b"]
    assert (card["digest"], card["round"]) == (models, round_)


def test_model_list(lab: Any, models: str) -> None:
    result = CliRunner().invoke(app, ["model", "list", "blood", "-o", "json"], catch_exceptions=False)
    rows = json.loads(result.stdout)["models"]
    assert [(row["round"], row["best"]) for row in rows] == [(1, False), (2, True), (3, False)]
    text = CliRunner().invoke(app, ["model", "list", "blood"], catch_exceptions=False).stdout
    assert "50.0 %" in text
    assert f"{models[:12]}\n" in text


@pytest.mark.parametrize(
    ("choice", "error"), [("9", NotFoundError), ("first", ConfigError), ("-1", ConfigError)]
)
def test_a_round_that_is_not_there_is_told(choice: str, error: Any, lab: Any, models: str) -> None:
    result = CliRunner().invoke(app, ["model", "download", "blood", "--round", choice])
    assert isinstance(result.exception, error)
    assert lab.script.of("Download") == []
