"""Health: each fact as it is judged, and the database really written to."""

import asyncio
import os
import shutil
import signal
import sqlite3
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import pytest

from fedcore.artifact_store import ArtifactStore
from fedcore.clock import ManualClock
from fedcore.database import open_database
from fedcore.pki import make_issuing_ca, make_root
from fedcore.process_state import handles_signal, process_state
from fedserver import health_facts
from fedserver.drain import Drain
from fedserver.health_facts import (
    HealthFacts,
    Watched,
    artifacts_fact,
    ca_fact,
    certificate_fact,
    compute_fact,
    database_fact,
    disk_fact,
    drain_fact,
    journal_fact,
    site_fact,
)
from fedserver.model_keeper import Usage
from fedserver.registry import Registry, enrol
from fedserver.roster import Roster
from fedserver.schema import MIGRATIONS

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)


class Process:
    """What `ComputeHost` says of a process that never was."""

    pid = exit_status = busy_with = None

    def silent_s(self) -> float:
        return 0.0


async def no_quota() -> Usage:
    return Usage(1 << 30, 1 << 29, None)


@pytest.fixture(scope="module")
def authority() -> Any:
    root = make_root("lab", NOW)
    issuing = make_issuing_ca(root, "lab", NOW)

    class Both:
        def __init__(self) -> None:
            self.root, self.issuing = root.certificate, issuing

    return Both()


def test_a_process_is_told_by_what_proc_says_of_it() -> None:
    assert compute_fact(None, "", None, 0).says.startswith("not started yet")
    assert compute_fact(None, "S", None, 0).healthy
    assert compute_fact(None, "R", "aggregate", 4).says == "busy with 'aggregate'"
    silent = compute_fact(None, "R", "aggregate", 31)
    assert not silent.healthy
    assert "silent for 31 s during 'aggregate'" in silent.says
    dead = compute_fact(-9, "", None, 0)
    assert (dead.healthy, dead.figures["alive"]) == (False, 0.0)
    assert "killed by signal 9" in dead.says
    assert not compute_fact(None, "T", None, 0).healthy


def test_a_stopped_and_an_ended_process_are_seen() -> None:
    child = subprocess.Popen(["sleep", "60"])
    try:
        assert process_state(child.pid) in "SRD"
        assert not handles_signal(child.pid, signal.SIGUSR1)
        os.kill(child.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, child.pid, os.WSTOPPED)
        assert process_state(child.pid) == "T"
    finally:
        child.kill()
        child.wait()
    assert process_state(child.pid) == ""
    assert not handles_signal(child.pid, signal.SIGUSR1)
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        assert handles_signal(os.getpid(), signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_certificates_are_unwell_before_they_end(authority: Any) -> None:
    issuing = authority.issuing.certificate
    end = issuing.not_valid_after_utc
    assert ca_fact("issuing-ca", issuing, end - timedelta(days=61)).healthy
    near = ca_fact("issuing-ca", issuing, end - timedelta(days=59))
    assert not near.healthy
    assert near.figures["days_left"] == pytest.approx(59)
    assert "fedctl cert ca rotate" in near.hint
    assert ca_fact("root-ca", authority.root, NOW).healthy
    # A year's certificate, should it be a member's: a quarter is left at 91 days.
    assert certificate_fact(issuing, end - timedelta(days=92)).healthy
    assert "overdue" in certificate_fact(issuing, end - timedelta(days=90)).hint
    assert "ended 1.0 days ago" in certificate_fact(issuing, end + timedelta(days=1)).says


def test_a_site_is_well_if_it_was_heard_of() -> None:
    def seen(seconds: float) -> str:
        return (NOW - timedelta(seconds=seconds)).isoformat()

    assert site_fact("a", seen(119), seen(9999), False, NOW).healthy
    gone = site_fact("a", seen(7200), seen(9999), False, NOW)
    assert (gone.healthy, gone.subject) == (False, "a")
    assert gone.says == "not connected, last heard of 2.0 h ago"
    half_open = site_fact("a", seen(121), seen(9999), True, NOW)
    assert not half_open.healthy, "a connection that says nothing is none"
    assert "never connected" in site_fact("a", "", seen(9999), False, NOW).says


def test_disk_journal_database_and_drain() -> None:
    usage = shutil.disk_usage("/")
    assert disk_fact(usage._replace(free=3 << 30)).healthy
    assert "disk-full" in disk_fact(usage._replace(free=1 << 30)).hint
    assert artifacts_fact(Usage(3 * 10**9, 3 * 10**9, None)).says == "3.0 GB, no quota"
    full = artifacts_fact(Usage(20 * 10**9, 17 * 10**9, 20 * 10**9))
    assert (full.healthy, full.says) == (True, "20.0 GB of a quota of 20.0 GB (100%); 85% can't be dropped")
    stuck = artifacts_fact(Usage(19 * 10**9, 18 * 10**9, 20 * 10**9))
    assert not stuck.healthy
    assert "disk-full" in stuck.hint
    assert journal_fact(0.0).healthy
    assert not journal_fact(2.5).healthy
    assert not database_fact(3.0).healthy
    assert database_fact(0.1, "disk full", "free space").hint == "free space"
    assert drain_fact(None).healthy
    drained = drain_fact(Drain("ann", "new disk", NOW))
    assert not drained.healthy
    assert drained.says == "draining since 2026-03-01T12:00:00+00:00, by ann (new disk): no round is opened"


def test_the_database_is_written_to_and_one_that_is_locked_is_told(
    tmp_path: Path, authority: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health_facts, "WRITE_TIMEOUT_S", 0.2)
    path = tmp_path / "fedserver.db"
    database = open_database(path, MIGRATIONS, create=True)
    database.write_now(lambda c: enrol(c, "a", NOW))
    clock = ManualClock()
    facts = HealthFacts(
        Watched(
            database, ArtifactStore(tmp_path / "artifacts"), cast(Any, Process()),
            lambda: cast(Any, authority.issuing), lambda: authority, Registry(database), Roster(clock, 9),
            lambda: {"fedcore.v1.Admin": True}, lambda: 0.0, lambda: None, no_quota,
        ),
        clock, lambda: NOW,
    )  # fmt: skip
    wal = tmp_path / "fedserver.db-wal"
    before = wal.stat().st_mtime_ns, wal.stat().st_size
    found = {fact.check: fact for fact in asyncio.run(facts.collect())}
    assert [check for check, fact in found.items() if not fact.healthy] == []
    assert (wal.stat().st_mtime_ns, wal.stat().st_size) != before, "a commit, not a promise"
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    try:
        locked = {fact.check: fact for fact in asyncio.run(facts.collect())}["database"]
    finally:
        other.execute("ROLLBACK")
        other.close()
        database.close()
    assert not locked.healthy
    assert locked.says == "can't be written: no commit within 0.2 s"
