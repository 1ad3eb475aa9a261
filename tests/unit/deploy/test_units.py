"""The systemd units: valid, as closed as the targets say, and PyTorch computes under their filter."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fedcore import compute_worker
from tests.systemd_analyze import MOST_EXPOSED, exposure, faults

ROOT = Path(__file__).parents[3]
UNITS = ROOT / "deploy" / "systemd"
UNDER = ROOT / "tests" / "under_unit.py"
NAMES = ("fedserver", "fedagent")

analyze = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze")


def installed(root: Path, name: str, *, gpu: bool) -> None:
    """A root folder with the unit as install puts it, and a program for its ExecStart."""
    target = root / "etc/systemd/system"
    target.mkdir(parents=True)
    shutil.copy(UNITS / f"{name}.service", target)
    if gpu:
        (target / f"{name}.service.d").mkdir()
        shutil.copy(UNITS / "drop-ins" / f"{name}-gpu.conf", target / f"{name}.service.d" / "gpu.conf")
    program = root / "opt/fedimpres/current/bin" / name
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)


@analyze
@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_the_unit_is_valid_and_as_closed_as_promised(name, gpu, tmp_path):
    installed(tmp_path, name, gpu=gpu)
    assert faults(tmp_path, name) == ""
    assert exposure(tmp_path, name) <= MOST_EXPOSED[name]


@pytest.mark.parametrize("name", NAMES)
def test_the_watchdog_waits_for_several_beats_and_a_bad_configuration_is_not_retried(name):
    settings = dict(
        line.split("=", 1) for line in (UNITS / f"{name}.service").read_text().splitlines() if "=" in line
    )
    assert settings["Type"] == "notify"
    assert float(settings["WatchdogSec"]) >= 4 * compute_worker.BEAT_S
    assert settings["RestartPreventExitStatus"] == "78"
    assert settings["OOMPolicy"] == "continue", "else one command out of memory ends the service"


@analyze
@pytest.mark.parametrize("drop_ins", [(), ("fedagent-gpu.conf",)])
def test_pytorch_trains_under_the_filter(drop_ins):
    script = (
        "import os, torch; torch.set_num_threads(2)\n"
        "try: os.chown('/tmp', 0, 0)\n"
        "except PermissionError: print('filtered')\n"
        "net = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())\n"
        "loss = net(torch.randn(64, 1, 28, 28)).square().mean(); loss.backward()\n"
        "print(bool(torch.isfinite(loss)), net[0].weight.grad.abs().sum().item() > 0)\n"
    )
    units = [UNITS / "fedagent.service", *(UNITS / "drop-ins" / name for name in drop_ins)]
    done = subprocess.run(
        [sys.executable, UNDER, *units, "--", sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=270,
        check=False,
    )
    assert (done.returncode, done.stdout.split()) == (0, ["filtered", "True", "True"]), done.stderr
