"""What is swept at a start: only what no run needs, and only when it is old."""

import os
from dataclasses import replace
from pathlib import Path

from fedcore.artifact_store import ArtifactStore
from fedcore.plan import validate_plan
from fedserver.retention import sweep
from fedserver.round_events import Report
from fedserver.round_state import Round, RunState, Update, needed

PLAN = validate_plan({"name": "t", "rounds": 2, "model": {"name": "cnn", "classes": 2, "input": [1, 8, 8]}})


def digest(letter: str) -> str:
    return letter * 64


def put(store: ArtifactStore, letter: str, *, old: bool) -> None:
    path = store.new_path()
    path.write_bytes(b"x")
    adopted = store.adopt(path, digest(letter))
    if old:
        os.utime(adopted, (1, 1))


def test_old_artifacts_that_no_run_needs_go_and_all_others_stay(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    current = Round(
        number=1,
        attempt=1,
        expected=("a",),
        registered=("a",),
        opened_at=0.0,
        reported={"a": Update(digest("b"), 1, Report(num_examples=1))},
    )
    state = replace(RunState(run="t-1", plan=PLAN), model=digest("a"), current=current)
    for letter, old in (("a", True), ("b", True), ("c", True), ("d", False)):
        put(store, letter, old=old)
    assert needed(state) == {digest("a"), digest("b")}
    assert sweep(store, [state]) == 1
    assert set(store.digests()) == {digest("a"), digest("b"), digest("d")}
