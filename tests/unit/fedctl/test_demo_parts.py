import random
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fedcore.data.npz_reader import read_held_out
from fedcore.errors import ComputeError, ConflictError, UnreachableError
from fedcore.plan import parse_plan
from fedctl.demo_data import prepare_data
from fedctl.demo_plan import plan_document, recipe_of, to_toml
from fedctl.demo_processes import ProcessGroup, free_ports
from fedctl.demo_results import final_figures
from fedctl.demo_run import DemoOptions, _claimed

SLEEPER = "import time; print('ready', flush=True); time.sleep(60)"


@pytest.mark.parametrize("dataset", ["digits", "bloodmnist", "wbc_multisite", "other.npz"])
def test_every_recipe_is_a_valid_plan(dataset: str) -> None:
    document = plan_document(
        dataset=dataset, sites=["site-1", "site-2"], rounds=None, strategy="fedimpres", seed=3,
        class_names=['quoted "name"', "b\\c"], image_shape=(3, 28, 28),
    )  # fmt: skip
    plan = parse_plan(to_toml(document))
    assert plan.rounds == recipe_of(dataset).rounds
    assert plan.class_names == ('quoted "name"', "b\\c")
    assert plan.sites == ("site-1", "site-2")
    assert plan.synthesis.warmup_rounds <= 2, "impressions must be used from round 3 on"


def test_data_is_dealt_into_one_file_a_site(tmp_path: Path) -> None:
    data = prepare_data(
        "digits", None, sites=3, alpha=0.5, seed=1, folder=tmp_path / "data", record=tmp_path / "p.json"
    )
    assert [site.name for site in data.sites] == ["site-1", "site-2", "site-3"]
    assert all(site.data.stat().st_size > 0 for site in data.sites)
    assert data.image_shape == (1, 8, 8)
    assert sum(sum(counts.values()) for counts in data.holdings.values()) == pytest.approx(0.6 * 1797, abs=12)
    assert "alpha 0.5" in data.split


def test_the_coordinator_gets_validation_images_and_no_others(tmp_path: Path) -> None:
    data = prepare_data(
        "digits", None, sites=2, alpha=0.5, seed=1, folder=tmp_path / "data", record=tmp_path / "p.json"
    )
    assert data.coordinator is not None
    with np.load(data.coordinator) as own:
        assert sorted(own) == ["val_images", "val_labels"]
        coordinators = {image.tobytes() for image in own["val_images"]}
        count = len(own["val_labels"])
    held: dict[str, set[bytes]] = {"train": set(), "val": set(), "test": set()}
    sizes = dict.fromkeys(held, 0)
    for site in data.sites:
        with np.load(site.data) as file:
            for split, images in held.items():
                images |= {image.tobytes() for image in file[f"{split}_images"]}
                sizes[split] += len(file[f"{split}_labels"])
    assert (coordinators, count) == (held["val"], sizes["val"])
    assert count > 300
    assert not coordinators & held["test"]
    document = plan_document(
        dataset="digits", sites=["site-1", "site-2"], rounds=1, strategy="fedavg", seed=1,
        class_names=data.class_names, image_shape=data.image_shape, updates_data=data.coordinator,
    )  # fmt: skip
    plan = parse_plan(to_toml(document))
    assert plan.evaluation.updates_data == str(data.coordinator)
    assert plan.evaluation.data is None, "the figures stay the sites'"
    images = read_held_out(data.coordinator, plan)
    assert (images.images.shape, images.labels.dtype) == ((count, 8, 8, 1), np.int64)


def test_repeating_command_names_what_was_asked(tmp_path: Path) -> None:
    options = DemoOptions("digits", None, 3, 5, "fedavg", 0.25, 7, tmp_path)
    assert options.command() == (
        "fedctl demo --dataset digits --sites 3 --rounds 5 --strategy fedavg --alpha 0.25 --seed 7"
    )


def test_final_figures_take_the_worst_site() -> None:
    record = {
        "accuracy": 0.8,
        "balanced_accuracy": None,
        "sites": {"a": {"accuracy": 0.9}, "b": {"accuracy": 0.4}},
    }
    assert final_figures(record) == {"accuracy": 0.8, "balanced_accuracy": None, "worst_site_accuracy": 0.4}
    assert final_figures(None) == {"accuracy": None, "balanced_accuracy": None, "worst_site_accuracy": None}


def test_ports_are_free_and_differ() -> None:
    ports = free_ports(5)
    assert len(set(ports)) == 5
    for port in ports:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", port))


def test_ports_are_given_to_one_process_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody listens yet when another process looks, which is shown the same numbers."""
    code = """
import random
from fedctl.demo_processes import free_ports
random.SystemRandom = lambda: random.Random(4)
print(*free_ports(3), flush=True)
input()
"""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        theirs = set(map(int, other.stdout.readline().split()))
        assert len(theirs) == 3
        monkeypatch.setattr("fedctl.demo_processes.random.SystemRandom", lambda: random.Random(4))
        assert not theirs & set(free_ports(3))
        other.communicate("over\n")


def test_a_failing_program_is_told_with_its_last_words(tmp_path: Path) -> None:
    with ProcessGroup(tmp_path, {}) as group:
        with pytest.raises(ComputeError, match="ended with exit code 3") as caught:
            group.run("site-1", [sys.executable, "-c", "print('disk is full'); raise SystemExit(3)"])
        assert "disk is full" in caught.value.message
        assert "site-1.log" in caught.value.hint


def test_a_program_that_ends_early_is_noticed(tmp_path: Path) -> None:
    with ProcessGroup(tmp_path, {}) as group:
        group.start("a", [sys.executable, "-c", SLEEPER])
        group.check()
        group.start("b", [sys.executable, "-c", "raise SystemExit(5)"])
        with pytest.raises(ComputeError, match="b: ended unexpectedly with exit code 5"):
            group.wait_for_port("b", free_ports(1)[0])


def test_a_port_that_never_opens_is_told(tmp_path: Path) -> None:
    with ProcessGroup(tmp_path, {}) as group:
        group.start("a", [sys.executable, "-c", SLEEPER])
        with pytest.raises(UnreachableError, match="does not listen"):
            group.wait_for_port("a", free_ports(1)[0], timeout_s=0.3)


def test_a_program_that_ignores_sigterm_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedctl.demo_processes.STOP_GRACE_S", 0.3)
    deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + SLEEPER
    group = ProcessGroup(tmp_path, {})
    group.start("deaf", [sys.executable, "-c", deaf])
    deadline = time.monotonic() + 60
    while "ready" not in (tmp_path / "deaf.log").read_text() and time.monotonic() < deadline:
        time.sleep(0.02)
    (process,) = group._running.values()
    group.close()
    assert process.returncode == -9


def test_a_folder_is_claimed_once_and_emptied_of_old_results(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("old")
    (tmp_path / "mine.txt").write_text("kept")
    (tmp_path / "work-old").mkdir()
    with _claimed(tmp_path):
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "logs", "mine.txt"]
        with pytest.raises(ConflictError, match="another demo"), _claimed(tmp_path):
            pass
    with _claimed(tmp_path):
        pass
