"""Completion: candidates from the settings and from the coordinator, nothing at all when something is wrong."""

import subprocess

import pytest
from typer.testing import CliRunner

from fedctl.app import app


def candidates(*words: str) -> list[str]:
    """What bash is offered for the last of the words."""
    environment = {
        "_FEDCTL_COMPLETE": "complete_bash",
        "COMP_WORDS": " ".join(("fedctl", *words)),
        "COMP_CWORD": str(len(words)),
    }
    result = CliRunner().invoke(app, [], env=environment, prog_name="fedctl")
    assert (result.exit_code, result.stderr) == (0, "")
    return result.stdout.split()


def test_commands_sites_runs_and_contexts_are_offered(lab, make_run) -> None:
    lab.script.runs = {run: make_run(run) for run in ("blood-1a2b", "skin-3c4d")}
    assert {"list", "show"} <= set(candidates("site", ""))
    assert candidates("site", "show", "site-") == ["site-1", "site-2"]
    assert candidates("run", "show", "s") == ["skin-3c4d"]
    assert candidates("model", "list", "") == ["blood-1a2b", "skin-3c4d"]
    assert candidates("context", "use", "") == ["lab"]
    assert candidates("--context", "l") == ["lab"]
    assert candidates("--context", "lab", "run", "show", "b") == ["blood-1a2b"]


def test_nothing_is_offered_and_nothing_said_when_the_coordinator_can_not_be_asked(lab) -> None:
    assert candidates("--context", "other", "run", "show", "") == []
    lab.server.stop(None).wait()
    assert candidates("run", "show", "") == []
    (lab.config_dir / "contexts.toml").write_text("rubbish")
    assert candidates("run", "show", "") == []
    assert candidates("context", "use", "") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script_is_printed_for_each_shell(shell) -> None:
    result = CliRunner().invoke(app, ["completion", shell], prog_name="fedctl")
    assert result.exit_code == 0
    assert f"_FEDCTL_COMPLETE=complete_{shell}" in result.stdout
    if shell == "bash":
        checked = subprocess.run(
            ["bash", "-n"], input=result.stdout, capture_output=True, text=True, check=False
        )
        assert (checked.returncode, checked.stderr) == (0, "")


def test_an_unknown_shell_is_a_usage_error() -> None:
    assert CliRunner().invoke(app, ["completion", "csh"]).exit_code == 2
