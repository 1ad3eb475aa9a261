"""`fedserver` and `fedagent` as programs: output, errors on stderr, exit codes."""

import subprocess
import sys
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent


def run(*arguments: object, **more) -> subprocess.CompletedProcess[str]:
    name, *rest = map(str, arguments)
    return subprocess.run(
        [sys.executable, "-m", f"{name}.cli", *rest],
        capture_output=True,
        text=True,
        timeout=270,
        check=False,
        **more,
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("coordinator") / "home"
    done = run("fedserver", "init", "--home", home, "--name", "lab", "--host", "localhost")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"fedserver serve --home {home}" in done.stdout
    assert "CA fingerprint" in done.stdout
    return home


def test_a_fresh_home_passes_its_check(home):
    done = run("fedserver", "check-config", "--home", home)
    assert (done.returncode, done.stderr) == (0, "")
    assert [line[:4] for line in done.stdout.splitlines()] == ["ok  "] * 4


def test_init_over_a_home_is_a_conflict(home):
    done = run("fedserver", "init", "--home", home, "--name", "lab", "--host", "localhost")
    assert (done.returncode, done.stdout) == (7, "")
    assert done.stderr.startswith(f"error[conflict]: {home} is not empty; nothing was changed\nhint: ")


def test_usage_and_configuration_errors_have_their_exit_codes(home, tmp_path):
    assert run("fedserver", "init", "--home", tmp_path / "x").returncode == 2
    assert run("fedserver", "no-such-command").returncode == 2
    done = run("fedserver", "check-config", "--home", tmp_path / "x")
    assert done.returncode == 78
    assert done.stderr.startswith("error[config_invalid]: ")
    terms = ["--coordinator", "localhost:8443", "--ca-fingerprint", "0" * 64]
    done = run("fedagent", "enroll", "--home", tmp_path / "a", "--token", "-", *terms, input="rubbish\n")
    assert done.returncode == 4
    assert done.stderr.startswith("error[token_refused]: ")
    done = run("fedagent", "check-config", "--home", tmp_path / "a")
    assert done.returncode == 78
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("name", ["fedserver", "fedagent"])
def test_version_and_help(name):
    done = run(name, "version")
    assert done.returncode == 0
    assert done.stdout.startswith(f"{name} 0.")
    done = run(name, "--help", env={"COLUMNS": "100", "PATH": str(BIN), "TERM": "dumb"})
    assert done.returncode == 0
    for command in ("serve", "check-config", "version"):
        assert command in done.stdout


def test_command_lines_start_without_torch_and_grpc():
    for module in ("fedserver.cli", "fedagent.cli"):
        script = (
            f"import sys, {module}; print(sorted({{'torch', 'grpc', 'cryptography'}} & set(sys.modules)))"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("module", ["fedserver.app", "fedagent.app"])
def test_control_processes_hold_no_torch(module):
    script = f"import sys, {module}; print('torch' in sys.modules, 'grpc' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
