"""What the chaos suite itself is made of: the world of a program, the matrix, its mutants."""

import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.chaos_federation import COMPILER, compile_world
from tests.faults.chaos_mutants import CELLS, drawn
from tests.faults.fault_plan import PHASES
from tests.faults.mutants import MUTANTS
from tests.faults.power_cut import Durable
from tests.faults.scenarios import FAULTS, cells, matrix, scenario, selection

WRITES = """
import os, pathlib, sys, time
home = pathlib.Path(sys.argv[1])
with (home / "kept").open("wb", buffering=0) as file:
    file.write(b"synced")
    os.fsync(file.fileno())
    file.write(b", and not")
(home / "lost").write_text("never synced")
with (home / "grown").open("ab", buffering=0) as file:
    file.write(b" and more")
print(time.time(), time.monotonic())
"""


@pytest.mark.skipif(COMPILER is None, reason="needs a C compiler")
def test_a_power_cut_takes_what_was_not_synced_and_the_wall_clock_alone_jumps(tmp_path: Path) -> None:
    home, clock, synced = tmp_path / "home", tmp_path / "clock", tmp_path / "synced"
    home.mkdir()
    (home / "grown").write_text("was there")
    clock.write_bytes(struct.pack("=q", 86_400))
    durable = Durable(home, synced)
    world = {
        "LD_PRELOAD": str(compile_world(tmp_path)),
        "WORLD_CLOCK": str(clock),
        "WORLD_SYNCED": str(synced),
    }
    command = [sys.executable, "-c", WRITES, str(home)]
    said = subprocess.run(command, env={**os.environ, **world}, capture_output=True, text=True, check=True)
    wall, monotonic = map(float, said.stdout.split())
    assert abs(wall - time.time() - 86_400) < 3600
    assert abs(monotonic - time.monotonic()) < 3600
    assert sorted(durable.cut_power()) == ["grown", "kept", "lost"]
    assert (home / "kept").read_text() == "synced"
    assert (home / "lost").read_text() == ""
    assert (home / "grown").read_text() == "was there"


def test_a_scenario_follows_from_its_seed_and_no_cell_is_left_out() -> None:
    assert [str(one) for one in matrix(7, 1)] == [str(one) for one in matrix(7, 1)]
    assert scenario(3, "cut", "uploading") == scenario(3, "cut", "uploading")
    if COMPILER is not None:
        assert {(one.fault, one.phase) for one in matrix(7, 3)} == set(cells())


def test_the_part_in_make_test_has_every_fault_and_every_phase() -> None:
    chosen = selection(PHASES)
    assert len(chosen) == 40
    assert {one.fault for one in chosen} == set(FAULTS)
    assert {one.phase for one in chosen} == set(PHASES)


def test_every_broken_guard_has_scenarios_that_should_see_it() -> None:
    assert CELLS.keys() == MUTANTS.keys()
    for mutant, seen_by in CELLS.items():
        assert [drawn(*cell) for cell in seen_by], mutant
