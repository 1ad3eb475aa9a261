"""Commands against a scripted coordinator over mutual TLS: what they ask, print and exit with."""

import json
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedcore.errors import ConfigError, ConflictError, NotFoundError, PermissionDeniedError, PlanError
from fedcore.status import exit_code_of
from fedcore.v1 import admin_pb2
from fedctl import following
from fedctl.app import app
from fedctl.render import Column, Output, minute, print_rows
from fedserver.strategies import BUILT_IN

PLAN = """
name = "blood"
rounds = 2
[model]
name = "cnn"
classes = 2
input = [1, 8, 8]
"""


def run_ok(*args: str) -> Any:
    """Run a command that must succeed; its JSON."""
    result = CliRunner().invoke(app, [*args, "-o", "json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def table(*args: str) -> str:
    result = CliRunner().invoke(app, list(args), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_whoami(lab) -> None:
    assert run_ok("auth", "whoami") == {
        "federation": "lab", "role": "operator", "roles": ["operator", "owner"], "id": "admin", "serial": "0a",
        "not_after": "2026-02-01T00:00:00+00:00",
    }  # fmt: skip
    assert "operator" in table("auth", "whoami")


def test_token_has_the_keys_of_the_journey_and_passes_the_ttl(lab) -> None:
    document = run_ok("enroll", "token", "create", "--site", "site-9", "--ttl", "1h30m")
    assert document["token"] == "secret-token"
    assert set(document) == {"token", "ca_fingerprint", "coordinator", "expires_at"}
    (request,) = lab.script.of("CreateToken")
    assert (request.site, request.ttl_s) == ("site-9", 5400.0)


def test_token_for_people_is_one_line_to_paste(lab) -> None:
    out = table("enroll", "token", "create", "--site", "site-9")
    assert out.splitlines() == [
        "fedagent enroll --home DIR --coordinator fed.example.org:8443 --token secret-token "
        f"--ca-fingerprint {'ab' * 32}"
    ]


def test_a_dropped_model_is_marked_and_its_download_says_when_why_and_what_is_there(lab, make_run) -> None:
    lost = {"dropped_at": "2026-02-01T08:09:10+00:00", "dropped_reason": "storage quota of 2 GiB"}
    lab.script.models = [
        admin_pb2.Model(run="blood-1", round=number, digest=f"{number}" * 64, payload_bytes=size, **more)
        for number, size, more in ((1, 9, {}), (2, 0, lost), (3, 9, {}), (4, 9, {}))
    ]
    rows = run_ok("model", "list", "blood-1")["models"]
    assert [(row["round"], row["bytes"], row["dropped_at"]) for row in rows][:2] == [
        (1, 9, None), (2, None, "2026-02-01T08:09:10+00:00"),
    ]  # fmt: skip
    assert lab.script.of("ListModels")[0].dropped
    text = table("model", "list", "blood-1")
    assert "2026-02-01 08:09Z" in text
    assert "storage quota of 2 GiB" in text
    with pytest.raises(NotFoundError, match="round 2 was dropped at 2026-02-01T08:09:10") as caught:
        run_ok("model", "download", "blood-1", "--round", "2", "--out", "never.safetensors")
    assert "storage quota of 2 GiB" in caught.value.message
    assert caught.value.hint == "rounds whose model is there: 1, 3-4"
    assert lab.script.of("Download") == []
    lab.script.runs["blood-1"] = make_run(models_dropped="2, 5-9")
    assert run_ok("run", "show", "blood-1")["models_dropped"] == "2, 5-9"
    assert "rounds 2, 5-9" in table("run", "show", "blood-1")


def test_bad_ttl_asks_nothing_of_the_coordinator(lab) -> None:
    with pytest.raises(ConfigError, match="not a duration"):
        run_ok("enroll", "token", "create", "--site", "site-9", "--ttl", "soon")
    assert lab.script.asked == []


def test_sites_as_json_jsonl_and_table(lab) -> None:
    document = run_ok("site", "list")
    assert [site["site"] for site in document["sites"]] == ["site-1", "site-2"]
    assert document["sites"][0]["connected"] is True
    lines = (
        CliRunner().invoke(app, ["site", "list", "-o", "jsonl"], catch_exceptions=False).stdout.splitlines()
    )
    assert [json.loads(line)["site"] for line in lines] == ["site-1", "site-2"]
    text = table("site", "list")
    assert "data [can't] be read" in text, "brackets are text, no markup"
    assert "\x1b" not in text, "no colours off a terminal"
    assert run_ok("site", "show", "site-1")["num_examples"] == 120
    with pytest.raises(NotFoundError, match="no site 'x'"):
        run_ok("site", "show", "x")


def test_status(lab, make_run) -> None:
    lab.script.runs["blood-1a2b"] = make_run()
    document = run_ok("status")
    assert document["federation"] == "lab"
    assert document["problems"] == ["site-2 is not connected"]
    assert document["active_runs"][0]["run"] == "blood-1a2b"
    text = table("status")
    assert "1 of 2 connected" in text
    assert "up 1h 01m" in text
    assert "site-2 is not connected" in text


def test_run_show_has_the_keys_that_programs_read(lab, make_run) -> None:
    lab.script.runs["blood-1a2b"] = make_run(reason="waits for site-2")
    document = run_ok("run", "show", "blood")
    assert document["run"] == "blood-1a2b"
    assert (document["state"], document["round"], document["rounds"]) == ("RUNNING", 1, 3)
    assert document["sites"] == ["site-1", "site-2"]
    assert document["missed"] == [{"round": 1, "sites": ["site-2"]}]
    assert document["progress"][0]["images_per_s"] == 900
    assert document["plan"] == {"name": "blood"}
    assert document["last_round"]["accuracy"] == 0.75
    text = table("run", "show", "blood")
    assert "waits for site-2" in text
    assert "75.0 %" in text
    assert "absent: no connection" in text


def test_run_list_and_rounds(lab, make_run, make_record) -> None:
    lab.script.runs["blood-1a2b"] = make_run()
    lab.script.records = [make_record(1), make_record(2, accuracy=None, balanced_accuracy=None)]
    assert [run["name"] for run in run_ok("run", "list")["runs"]] == ["blood"]
    assert "1/3" in table("run", "list")
    assert run_ok("run", "rounds", "blood") == {"rounds": lab.script.records}
    text = table("run", "rounds", "blood")
    assert "2/2/2/1/1" in text
    assert "round 1 missed site-2: no connection" in text
    assert "2.0 KiB" in text


def test_empty_lists_say_what_to_do_on_stderr(lab) -> None:
    result = CliRunner().invoke(app, ["run", "list"], catch_exceptions=False)
    assert result.stdout == ""
    assert "fedctl run submit" in result.stderr


def test_pause_resume_abort(lab, make_run) -> None:
    lab.script.runs["blood-1a2b"] = make_run()
    assert run_ok("run", "pause", "blood")["state"] == "PAUSED"
    assert run_ok("run", "resume", "blood")["state"] == "RUNNING"
    assert run_ok("run", "abort", "blood", "--yes", "--reason", "wrong plan")["state"] == "ABORTED"
    assert lab.script.of("AbortRun")[0].reason == "wrong plan"


@pytest.mark.parametrize("command", ["pause", "resume"])
def test_a_reason_that_nobody_would_keep_is_not_asked_for(command: str, lab, make_run) -> None:
    lab.script.runs["blood-1a2b"] = make_run()
    result = CliRunner().invoke(app, ["run", command, "blood", "--reason", "maintenance"])
    assert result.exit_code == 2
    assert lab.script.asked == []


def test_wait_keeps_only_the_newest_update(lab, make_run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of days sends millions of updates."""
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most = 0

    class Update:
        state = "RUNNING"

    def updates(*args: Any, **more: Any) -> Iterator[Any]:
        nonlocal most
        for _ in range(50):
            update = Update()
            alive.add(update)
            most = max(most, len(alive))
            yield update
            del update
        yield make_run(state="DONE")

    monkeypatch.setattr(following, "follow_run", updates)
    assert run_ok("run", "wait", "blood")["state"] == "DONE"
    assert most <= 2


def test_demo_names_every_built_in_strategy() -> None:
    text = CliRunner().invoke(app, ["demo", "--help"], env={"COLUMNS": "300"}).stdout
    assert [name for name in BUILT_IN if name not in text] == []


def test_abort_off_a_terminal_needs_yes(lab, make_run) -> None:
    lab.script.runs["blood-1a2b"] = make_run()
    with pytest.raises(ConfigError, match="confirmation") as caught:
        run_ok("run", "abort", "blood")
    assert caught.value.hint == "add --yes"
    assert lab.script.of("AbortRun") == []


def test_submit_sends_the_plan_once_with_a_request_id(lab, tmp_path: Path) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text(PLAN)
    assert run_ok("run", "submit", str(plan)) == {"run": "blood-1a2b"}
    assert table("run", "submit", str(plan)) == "blood-1a2b\n"
    first, second = lab.script.of("SubmitRun")
    assert first.plan_toml == PLAN
    assert first.request_id
    assert first.request_id != second.request_id


def test_a_wrong_plan_is_refused_before_anything_is_sent(lab, tmp_path: Path) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text("colour = 1\n" + PLAN)
    with pytest.raises(PlanError, match="unknown key 'colour'"):
        run_ok("run", "submit", str(plan))
    plan.write_text(PLAN + '[training]\ninitial = "missing.safetensors"\n')
    with pytest.raises(PlanError, match="no such file"):
        run_ok("run", "submit", str(plan))
    assert lab.script.asked == []


@pytest.mark.parametrize(("state", "code"), [("DONE", 0), ("DEGRADED", 8), ("FAILED", 1), ("ABORTED", 1)])
def test_wait_ends_with_the_code_of_the_state(state: str, code: int, lab, make_run) -> None:
    lab.script.watches = [[make_run(), make_run(state=state, reason="because")]]
    result = CliRunner().invoke(app, ["run", "wait", "blood", "-o", "json"], catch_exceptions=False)
    assert result.exit_code == code
    assert json.loads(result.stdout)["state"] == state


def test_watch_off_a_terminal_tells_each_change_once(lab, make_run) -> None:
    lab.script.watches = [
        [make_run(), make_run(), make_run(phase="aggregating"), make_run(state="DONE", round=3, phase="")]
    ]
    lines = table("run", "watch", "blood").splitlines()
    assert len(lines) == 3
    assert (
        "RUNNING | round 1/3 | training | 1 absent, 1 training | site-2 no connection | accuracy 75.0 %"
        in lines[0]
    )
    assert "DONE | round 3/3" in lines[2]


def test_watch_as_jsonl_is_an_object_for_each_message(lab, make_run) -> None:
    lab.script.watches = [[make_run(), make_run(state="DONE")]]
    result = CliRunner().invoke(app, ["run", "watch", "blood", "-o", "jsonl"], catch_exceptions=False)
    assert [json.loads(line)["state"] for line in result.stdout.splitlines()] == ["RUNNING", "DONE"]


@pytest.mark.parametrize(
    "error",
    [
        PermissionDeniedError("site/site-1 may not call WhoAmI", hint="use an operator's credential"),
        NotFoundError("no such thing"),
        ConflictError("already there"),
    ],
)
def test_the_coordinators_errors_arrive_as_they_are(error: Any, lab) -> None:
    lab.script.error = error
    with pytest.raises(type(error), match=error.message) as caught:
        run_ok("auth", "whoami")
    assert caught.value.hint == error.hint


def test_context_commands(lab, monkeypatch: pytest.MonkeyPatch) -> None:
    document = run_ok("context", "show")
    assert document["name"] == "lab"
    assert document["identity"] == "spiffe://lab/operator/admin"
    CliRunner().invoke(
        app, ["context", "add", "second", "--credential", str(lab.operator)], catch_exceptions=False
    )
    contexts = run_ok("context", "list")["contexts"]
    assert [(c["name"], c["current"]) for c in contexts] == [("lab", True), ("second", False)]
    CliRunner().invoke(app, ["context", "use", "second"], catch_exceptions=False)
    assert run_ok("context", "show")["name"] == "second"
    CliRunner().invoke(app, ["context", "remove", "second"], catch_exceptions=False)
    assert run_ok("context", "show")["name"] == "lab"
    result = CliRunner().invoke(app, ["--context", "nope", "auth", "whoami"])
    assert isinstance(result.exception, NotFoundError)
    monkeypatch.setenv("FEDIMPRES_CONTEXT", "nope")
    result = CliRunner().invoke(app, ["auth", "whoami"])
    assert isinstance(result.exception, NotFoundError)


def fedctl(lab: Any, *args: str) -> subprocess.CompletedProcess[str]:
    """The program as a user starts it."""
    return subprocess.run(
        [sys.executable, "-m", "fedctl.app", *args], capture_output=True, text=True, timeout=270, check=False
    )


def test_the_program_maps_errors_to_two_lines_and_the_exit_code(lab) -> None:
    lab.script.error = PermissionDeniedError("this is not for sites", hint="use an operator's credential")
    ended = fedctl(lab, "auth", "whoami")
    assert ended.returncode == exit_code_of(lab.script.error) == 4
    assert ended.stdout == ""
    assert ended.stderr.splitlines() == [
        "error[permission_denied]: this is not for sites",
        "hint: use an operator's credential",
    ]


def test_off_a_terminal_nothing_is_cut_or_wrapped(capsys: pytest.CaptureFixture[str]) -> None:
    columns = [Column("A", "a"), Column("B", "b", wraps=True)]
    print_rows(Output.TABLE, "rows", [{"a": "a" * 300, "b": "word " * 200 + "end"}], columns, empty="")
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "word" in line)
    assert line.split() == ["a" * 300, *["word"] * 200, "end"]


def test_moments_in_tables_are_short_and_say_that_they_are_utc() -> None:
    assert minute("2026-03-01T12:34:56.123456Z") == "2026-03-01 12:34Z"
    assert minute(None) == ""


def test_wrong_usage_is_2_bad_settings_are_78(lab) -> None:
    assert fedctl(lab, "run", "show").returncode == 2
    (lab.config_dir / "contexts.toml").write_text("[")
    assert fedctl(lab, "auth", "whoami").returncode == 78


def test_no_coordinator_is_3(lab) -> None:
    lab.server.stop(None).wait()
    ended = fedctl(lab, "auth", "whoami")
    assert ended.returncode == 3
    assert ended.stderr.startswith("error[unreachable]: coordinator 127.0.0.1:")


def test_version_needs_neither_grpc_nor_numpy() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from fedctl.app import app; "
        "r = CliRunner().invoke(app, ['version', '-o', 'json']); assert r.exit_code == 0; "
        "heavy = {'grpc', 'numpy', 'torch', 'sklearn', 'PIL', 'cryptography'} & set(sys.modules); "
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=270, check=False
    )
    assert ended.returncode == 0, ended.stderr
