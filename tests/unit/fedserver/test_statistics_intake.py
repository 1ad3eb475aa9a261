"""BatchNorm statistics from the wire: what is taken, and why anything else is not."""

import asyncio
import struct
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from fedcore.artifact_store import ArtifactStore
from fedcore.errors import ConflictError, NonFiniteError, TensorMismatchError, TransferError
from fedcore.tensor_file import TensorManifest, TensorSpec, read_manifest
from fedcore.tensor_stream import manifest_to_proto
from fedcore.v1 import federation_pb2
from fedserver import round_events as ev
from fedserver.round_state import Round, RunState, Stage, Statistics
from fedserver.statistics_intake import StatisticsIntake, check_asked, checked_statistics
from tests.unit.fedserver.test_round_machine import make_plan

NAMES = (("bn.running_mean", "F32", (2,)), ("bn.running_var", "F32", (2,)))
CURRENT = Round(
    number=3, attempt=1, expected=("a", "b"), registered=("a", "b"), opened_at=0.0, accepted=("a", "b"),
    model="m3", released="m3", aggregated_at=1.0,
)  # fmt: skip
STATE = RunState(
    run="t", plan=make_plan(), stage=Stage.RECALIBRATING, statistic_tensors=NAMES, current=CURRENT
)


def report(*values: float, names: tuple[tuple[str, str, tuple[int, ...]], ...] = NAMES, **fields: object):
    manifest = TensorManifest.of(TensorSpec(*name) for name in names)
    said = {
        "run": "t", "round": 3, "model": "m3", "num_examples": 5, "manifest": manifest_to_proto(manifest, "0" * 64),
        "payload": struct.pack(f"<{len(values or (1, 2, 3, 4))}f", *(values or (1, 2, 3, 4))), **fields,
    }  # fmt: skip
    return federation_pb2.StatisticsReport(**said)


def test_what_is_asked_for_is_taken_as_it_is() -> None:
    check_asked(STATE, "a", report(), "a round 3")
    found = checked_statistics(STATE, report(), "a round 3")
    assert {name: bytes(data) for name, (_, data) in found.items()} == {
        "bn.running_mean": struct.pack("<2f", 1, 2), "bn.running_var": struct.pack("<2f", 3, 4),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("said", "error", "why"),
    [
        (report(num_examples=0), TransferError, "measured 0 images"),
        (report(1, 2, 3), TransferError, "12 bytes, their manifest says 16"),
        (report(payload=b""), TransferError, "0 bytes"),
        (report(1, 2, 3, -1e-9), TransferError, "negative variance"),
        (report(1, float("nan"), 3, 4), NonFiniteError, "'bn.running_mean' of its statistics holds NaN"),
        (report(1, 2, 3, float("inf")), NonFiniteError, "'bn.running_var' of its statistics holds NaN or Inf"),
        (report(1, 2, names=NAMES[:1]), TensorMismatchError, "'bn.running_var' is missing"),
        (
            report(names=(NAMES[0], ("bn.running_var", "F32", (1, 2)))), TensorMismatchError,
            r"has shape \[1, 2\], expected \[2\]",
        ),
        (report(names=(*NAMES, ("w", "F32", (0,)))), TensorMismatchError, "'w' is not expected"),
        (
            report(names=(NAMES[0], ("bn.running_var", "I32", (2,)))), TensorMismatchError,
            "dtype I32, expected F32",
        ),
    ],
)  # fmt: skip
def test_what_can_not_be_is_refused_with_the_reason(said, error, why) -> None:
    with pytest.raises(error, match=why) as raised:
        checked_statistics(STATE, said, "a round 3")
    assert str(raised.value).startswith("a round 3")


@pytest.mark.parametrize(
    ("state", "site", "said"),
    [
        (replace(STATE, stage=Stage.EVALUATING), "a", report()),
        (replace(STATE, current=None), "a", report()),
        (STATE, "z", report()),
        (STATE, "a", report(round=2)),
        (STATE, "a", report(model="m2")),
        (replace(STATE, current=replace(CURRENT, statistics={"a": Statistics("d", 5)})), "a", report()),
        (replace(STATE, current=replace(CURRENT, not_measured={"a": "lost"})), "a", report()),
    ],
)
def test_what_nobody_asked_for_comes_too_late(state, site, said) -> None:
    with pytest.raises(ConflictError, match=f"{site} round"):
        check_asked(state, site, said, f"{site} round {said.round}")


class Told:
    """The round driver's side that the intake needs."""

    def __init__(self) -> None:
        self.posted: list[ev.Event] = []
        self.discarded: list[str] = []
        self.late = False

    def view(self, run: str) -> Any:
        return SimpleNamespace(state=STATE)

    async def post(self, run: str, event: ev.Event) -> None:
        if self.late:
            raise ConflictError("the round went on")
        self.posted.append(event)

    def discard_unneeded(self, digest: str) -> None:
        self.discarded.append(digest)


def test_what_is_taken_is_a_file_before_it_is_a_fact(tmp_path: Path) -> None:
    store, told = ArtifactStore(tmp_path), Told()
    with ThreadPoolExecutor(1) as pool:
        intake = StatisticsIntake(cast(Any, told), store, pool)
        asyncio.run(intake.take("a", 1.0, report()))
        asyncio.run(intake.take("b", 1.0, report(1, 2, 3, -1)))
        told.late = True
        with pytest.raises(ConflictError):
            asyncio.run(intake.take("a", 1.0, report(5, 6, 7, 8)))
    taken, refused = told.posted
    assert isinstance(taken, ev.StatisticsStored)
    assert taken.num_examples == 5
    assert store.intact(taken.digest)
    assert read_manifest(store.find(taken.digest))[0].payload_bytes == 16
    assert isinstance(refused, ev.StatisticsLetGo)
    assert refused.reason.startswith(
        "b round 3: tensor 'bn.running_var' of its statistics holds a negative variance"
    )
    assert [digest for digest in told.discarded if digest != taken.digest] == told.discarded != []
    assert not list((tmp_path / "tmp").iterdir())
