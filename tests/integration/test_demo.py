"""The demo as a user starts it: real coordinator, real agents, mutual TLS. It leaves nothing running."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedcore.tensor_file import read_manifest
from fedctl.transfer import file_digest

pytestmark = pytest.mark.slow

MARK = "FEDIMPRES_TEST_MARK"
RECORD_KEYS = {
    "round", "expected", "registered", "started", "reported", "aggregated", "accuracy", "balanced_accuracy",
    "sites", "classes", "impressions", "phases_s", "seconds", "bytes_up", "bytes_down",
}  # fmt: skip


class Demo:
    """A demo in progress. All that it starts inherits a mark in its environment, by which it is found."""

    def __init__(self, out: Path, *args: str) -> None:
        self.out = out
        self.mark = uuid.uuid4().hex
        self.stdout_path = out.parent / "stdout"
        self.stderr_path = out.parent / "stderr"
        with self.stdout_path.open("wb") as stdout, self.stderr_path.open("wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "fedctl.app", "demo", "--out", str(out), *args, "-o", "json"],
                stdout=stdout,
                stderr=stderr,
                stdin=subprocess.DEVNULL,
                env={**os.environ, MARK: self.mark},
                start_new_session=True,
                # A shell in the background has SIGINT ignored, and its children inherit that.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
            )

    @property
    def stderr(self) -> str:
        return self.stderr_path.read_text()

    def marked(self) -> dict[int, str]:
        """Living processes of this demo: id -> command line."""
        found = {}
        needle = f"{MARK}={self.mark}".encode()
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            with contextlib.suppress(OSError):
                if needle in (entry / "environ").read_bytes().split(b"\0"):
                    state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                    if state != "Z":
                        found[int(entry.name)] = (
                            (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                        )
        return found

    def wait_for_training(self) -> None:
        """Until a round trains and every program has its compute process."""
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.stderr
            lines = self.marked().values()
            agents = sum("fedagent.compute" in line for line in lines)
            if (
                "training" in self.stderr
                and agents >= 2
                and any("fedserver.compute" in line for line in lines)
            ):
                return
            time.sleep(0.1)
        raise AssertionError(f"no training within 120 s: {self.stderr}")

    def assert_nothing_left(self, within_s: float = 60.0) -> None:
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline and self.marked():
            time.sleep(0.1)
        assert self.marked() == {}


@pytest.fixture
def start(tmp_path: Path) -> Iterator[type[Demo]]:
    """Starts a demo, and cleans up what a failing test leaves."""
    started: list[Demo] = []

    def begin(*args: str) -> Demo:
        started.append(Demo(tmp_path / "out", *args))
        return started[-1]

    yield begin
    for demo in started:
        for pid in demo.marked():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        demo.process.wait()


def test_demo_trains_and_leaves_results_but_no_process(start) -> None:
    demo = start("--sites", "2", "--rounds", "4", "--alpha", "0.5", "--seed", "1")
    assert demo.process.wait(150) == 0, demo.stderr
    demo.assert_nothing_left()

    document = json.loads(demo.stdout_path.read_text())
    assert set(document) == {"run", "dataset", "strategy", "rounds", "final", "report"}
    assert (document["dataset"], document["strategy"], document["rounds"]) == ("digits", "fedimpres", 4)
    final = document["final"]
    assert final["accuracy"] >= 0.75
    assert 0 < final["worst_site_accuracy"] <= final["accuracy"]
    assert 0 < final["balanced_accuracy"] <= 1

    records = [json.loads(line) for line in (demo.out / "rounds.jsonl").read_text().splitlines()]
    assert [record["round"] for record in records] == [1, 2, 3, 4]
    for record in records:
        assert set(record) >= RECORD_KEYS
        assert [record[k] for k in ("expected", "registered", "started", "reported", "aggregated")] == [2] * 5
    assert records[-1]["accuracy"] == final["accuracy"]
    assert records[-1]["impressions"]["made"] > 0
    assert all(used > 0 for used in records[-1]["impressions"]["used"].values())
    for record in records:
        scores = record["update_scores"]
        assert scores["note"] == ""
        assert set(scores["before"]) == {str(n) for n in range(10)}
        assert set(scores["after"]) == set(scores["forgetting"]) == {"site-1", "site-2"}
        for site, after in scores["after"].items():
            drops = [max(0, scores["before"][name] - recall) for name, recall in after.items()]
            assert scores["forgetting"][site] == pytest.approx(sum(drops) / 10)
        # The coordinator's images, validation images, are in no other figure.
        images = sum(site["num_examples"] for site in record["sites"].values())
        right = sum(site["num_examples"] * site["accuracy"] for site in record["sites"].values())
        assert record["accuracy"] == pytest.approx(right / images)
    assert sum(records[0]["update_scores"]["before"].values()) < 5, "an untrained model knows little"
    assert sum(records[-1]["update_scores"]["before"].values()) > 7

    card = json.loads((demo.out / "model.json").read_text())
    assert card["digest"] == file_digest(demo.out / "model.safetensors")
    assert card["class_names"] == [str(n) for n in range(10)]
    manifest, _ = read_manifest(demo.out / "impressions.safetensors")
    assert {spec.name for spec in manifest.tensors} >= {"images", "labels"}
    page = Path(document["report"]).read_text()
    assert page.count("data:image/png;base64,") >= 30, "the last bank, and one a class in two rounds"
    assert page.count('class="mark"') == 1, "forgetting, marked where impressions began"
    assert page.count("<h2>Recall of each class before and after local training") == 2
    assert "<h2>Impressions over rounds</h2>" in page
    assert "site-2" in page
    partition = json.loads((demo.out / "partition.json").read_text())
    assert set(partition["sites"]) == {"site-1", "site-2"}
    assert not list(demo.out.glob("work-*")), "keys and data are gone"
    assert (demo.out / "logs" / "coordinator.log").stat().st_size > 0


def test_kill_9_of_the_demo_leaves_no_process(start) -> None:
    demo = start("--sites", "2", "--rounds", "500", "--strategy", "fedavg")
    demo.wait_for_training()
    assert len(demo.marked()) >= 7, "demo, coordinator, two agents, and their three compute processes"
    demo.process.kill()
    demo.process.wait()
    demo.assert_nothing_left()


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.long)],
)
def test_signals_end_it_cleanly(number: signal.Signals, code: int, start) -> None:
    demo = start("--sites", "2", "--rounds", "500", "--strategy", "fedavg")
    demo.wait_for_training()
    demo.process.send_signal(number)
    assert demo.process.wait(60) == code, demo.stderr
    demo.assert_nothing_left()
    assert not list(demo.out.glob("work-*"))


def test_a_program_that_dies_ends_the_demo_at_once_with_its_name(start) -> None:
    demo = start("--sites", "2", "--rounds", "500", "--strategy", "fedavg")
    demo.wait_for_training()
    (agent,) = (
        pid for pid, line in demo.marked().items() if "fedagent.cli serve" in line and "/site-2 " in line
    )
    os.kill(agent, signal.SIGKILL)
    assert demo.process.wait(60) == 1, demo.stderr
    assert "error[compute_failed]: site-2: ended unexpectedly with SIGKILL" in demo.stderr
    assert demo.stdout_path.read_text() == ""
    demo.assert_nothing_left()


def test_missing_data_is_told_before_anything_starts(start) -> None:
    demo = start("--dataset", "bloodmnist")
    assert demo.process.wait(60) == 1
    assert "error[data_invalid]: bloodmnist: no data file given" in demo.stderr
    assert not (demo.out / "logs" / "coordinator.log").exists()


def test_two_demos_do_not_share_a_folder(start) -> None:
    first = start("--sites", "2", "--rounds", "500", "--strategy", "fedavg")
    deadline = time.monotonic() + 60
    while not (first.out / "logs").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    ended = subprocess.run(
        [sys.executable, "-m", "fedctl.app", "demo", "--out", str(first.out)],
        capture_output=True,
        text=True,
        timeout=270,
        check=False,
    )
    assert ended.returncode == 7
    assert "another demo uses this folder" in ended.stderr
    first.process.terminate()
    first.process.wait(60)
    first.assert_nothing_left()
