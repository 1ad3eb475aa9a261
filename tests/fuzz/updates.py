"""Updates in fewer bytes, and banks of impressions."""

from pathlib import Path

import torch

from fedagent.held_impressions import HeldImpressions
from fedcore.errors import LearningError, StorageError, TensorMismatchError
from fedcore.models.state_file import save_state
from fedcore.plan import TransferSection
from fedcore.tensor_file import TensorManifest, TensorSpec
from fedcore.update_coding import coded_specs
from fedserver.bank_summary import summarise_bank
from fedserver.decoding import open_update
from fedserver.synthesis.bank import Bank
from fedserver.tensor_source import TensorFile
from tests.fuzz.target import BINARY_WORDS, TEXT_WORDS, Target, bounded, only, written

_MODEL = {"w": torch.arange(12.0).reshape(3, 4), "b": torch.zeros(3)}
_SPECS = [TensorSpec("w", "F32", (3, 4)), TensorSpec("b", "F32", (3,))]
_EXPECTED = TensorManifest.of(_SPECS)
_CODED = {
    "lossless": _MODEL,
    "bf16": {"w": torch.ones(3, 4, dtype=torch.bfloat16), "b": torch.zeros(3)},
    "int8": {"w": torch.ones(3, 4, dtype=torch.int8), "scale/w": torch.ones(3), "b": torch.zeros(3)},
    "top_k": {"w": torch.ones(6), "index/w": torch.arange(6, dtype=torch.int32), "b": torch.zeros(3)},
}


def _state(state: dict[str, torch.Tensor]) -> bytes:
    return written(lambda path: save_state(path, state))


def _update(coding: str) -> Target:
    transfer = TransferSection.model_validate({"updates": coding, "top_k_share": 0.5})
    # The file that a stream of the expected tensors leaves; so a stream can bring any payload, and only that.
    header = TensorManifest.of(coded_specs(_SPECS, transfer)).header()

    def check(data: bytes, folder: Path) -> None:
        save_state(folder / "model", _MODEL)
        for number, form in enumerate(
            (data, header + (data[len(header) :] + bytes(200))[: 400 - len(header)])
        ):
            path = folder / f"update{number}"
            path.write_bytes(form)
            model = TensorFile.open(folder / "model")
            with only(StorageError, TensorMismatchError, LearningError), bounded(8 << 20):
                update = open_update(path, _EXPECTED, model, transfer, "site-07 round 12")
                for spec in _EXPECTED.tensors:
                    assert len(update.whole(spec)) == len(_MODEL[spec.name].reshape(-1))

    return Target(f"update_{coding}", check, lambda: [_state(_CODED[coding])], BINARY_WORDS)


def check_bank(data: bytes, folder: Path) -> None:
    path = folder / "artifacts" / "00" / f"{'0' * 64}.safetensors"
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    with only(StorageError), bounded((4 << 20) + 200 * len(data)):
        bank = Bank.load(path)
        assert len(bank.images) == len(bank.soft_targets) == len(bank)
    with only(StorageError):
        summarise_bank(path)
    HeldImpressions(folder / "artifacts").banks()


def _bank() -> list[bytes]:
    images = torch.arange(2 * 9, dtype=torch.uint8).reshape(2, 1, 3, 3)
    born = torch.tensor([1, 2])
    bank = Bank.of(images, torch.tensor([0, 1]), born, torch.zeros(2, 2), torch.zeros(2, 4))
    return [
        _state(
            {name: getattr(bank, name) for name in ("images", "labels", "born", "soft_targets", "features")}
        )
    ]


_WORDS = (*TEXT_WORDS, *BINARY_WORDS, b'"shape":[]', b'"shape":[Infinity]', b'"shape":[-1]', b'"shape":5')
TARGETS = [*map(_update, _CODED), Target("impression_bank", check_bank, _bank, _WORDS)]
