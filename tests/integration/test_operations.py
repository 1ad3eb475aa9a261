"""Running a real federation: health, drain, dry runs, what happened to a run, the debug bundle."""

import base64
import json
import os
import signal
import subprocess
import tarfile
from pathlib import Path

import pytest

from fedserver.redaction import forms_of_key
from tests.federation_fixture import PROBE, SITES, Federation, digits_plan, wait_until

pytestmark = pytest.mark.slow
# A seed of its own: no agent has this first model from an earlier run.
IMPRESSING = digits_plan(
    seed=1711, rounds=3, strategy="fedimpres", strategy_options={"steps": 2, "gate": False}
)


def facts(federation: Federation, expect: int) -> dict[str, dict[str, object]]:
    """`server health` by part, as a fedctl of its own."""
    said = federation.ctl("server", "health", "-o", "json", expect=expect).json
    assert said["healthy"] is (expect == 0)
    return {f"{fact['check']} {fact['subject']}".strip(): fact for fact in said["facts"]}


def runs(federation: Federation) -> int:
    return len(federation.ctl("run", "list", "-o", "json").json["runs"])


def test_a_drain_lets_the_round_under_way_finish_and_health_tells_of_it(federation: Federation) -> None:
    held = federation.programs[SITES[0]]
    since = federation.log_size(SITES[1])
    held.send_signal(signal.SIGSTOP)  # the round can't end before it is looked at
    try:
        run = federation.submit(digits_plan(rounds=3))
        federation.wait_phase(run, "training")
        said = federation.ctl("server", "drain", "--reason", "new disk", "-o", "json").json
        assert (said["draining"], said["quiet"], said["by"]) == (True, False, "admin")
        assert run in said["under_way"]
        still = federation.ctl("server", "drain", "--wait", "--timeout", "1s", expect=5)
        assert "still under way" in still.err
    finally:
        held.send_signal(signal.SIGCONT)
    done = federation.ctl("server", "drain", "--wait", "--timeout", "60s", "-o", "json").json
    assert (done["quiet"], done["reason"]) == (True, "new disk")
    assert federation.journal(run).count("round_opened") == 1
    assert federation.journal(run)[-1] == "round_finished"
    wait_until(
        lambda: "the coordinator is about to stop" in federation.log(SITES[1], since), "agent was told"
    )
    drained = facts(federation, expect=8)
    assert "new disk" in str(drained["drain"]["says"])
    assert "new disk" in federation.run(run).reason
    assert [name for name, fact in drained.items() if not fact["healthy"] and name != "site probe"] == [
        "drain"
    ]
    assert {"database", "journal", "disk", "compute", "certificate", "issuing-ca", "root-ca"} <= set(drained)
    assert {"service fedcore.v1.Federation", "service fedcore.v1.Operations"} <= set(drained)
    federation.ctl("server", "drain", "--undo")
    assert federation.wait(run).state == "DONE"


def test_a_stopped_compute_process_is_told(federation: Federation) -> None:
    federation.wait(federation.submit(digits_plan(rounds=1)))
    pid = federation.compute_pid("coordinator")
    os.kill(pid, signal.SIGSTOP)
    try:
        found = facts(federation, expect=8)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert "SIGSTOP" in str(found["compute"]["says"])


def test_a_run_is_foretold_told_exported_and_repeated_from_its_export(federation: Federation) -> None:
    plan = federation.plan(IMPRESSING)
    dry = federation.ctl("run", "plan", str(plan), "-o", "json").json
    assert (dry["blocked"], [site["fits"] for site in dry["sites"]]) == ("", [True] * len(SITES))
    before = runs(federation)
    run = federation.ctl("run", "submit", str(plan), "--request-id", "night-7", "-o", "json").json["run"]
    assert federation.wait(run).state == "DONE"
    assert runs(federation) == before + 1, "the dry run left nothing behind"
    records = federation.rounds(run)
    for way in ("up", "down"):
        moved = sum(record[f"bytes_{way}"] for record in records)
        assert moved == sum(site[f"total_bytes_{way}"] for site in dry["sites"]), (
            f"bytes {way} are as foretold"
        )
    measured = federation.ctl("run", "plan", str(plan), "-o", "json").json
    assert (measured["not_measured"], measured["round_s"] > 0) == ([], True)
    crowd = federation.plan(digits_plan((*SITES, PROBE), min_sites=4))
    table = federation.ctl("run", "plan", str(crowd), expect=8)
    assert "not connected" in table.out
    assert federation.command("fedctl", "run", "plan", str(federation.plan(digits_plan([PROBE])))).code == 1
    again = federation.ctl("run", "submit", str(plan), "--request-id", "night-7", "-o", "json").json["run"]
    assert again == run, "a script that tries again gets the same run"
    other = federation.plan({**IMPRESSING, "rounds": 2})
    refused = federation.ctl("run", "submit", str(other), "--request-id", "night-7", expect=7)
    assert "has another plan" in refused.err

    lines = federation.ctl("run", "logs", run, "--follow").out.splitlines()
    assert len(lines) == 1 + len(federation.journal(run))
    assert "run: submitted by admin: 3 rounds of fedimpres" in lines[0]
    assert any("round 1 clinic-a: update is stored: " in line for line in lines)
    assert lines[-1].endswith("run: DONE: 3 rounds finished")
    later = federation.ctl("run", "logs", run, "--since", "1ms", "-o", "json").json["events"]
    assert [event["kind"] for event in later] == ["run_finished"], (
        "how it ended is told whatever was asked for"
    )

    out = federation.root / "export"
    made = federation.ctl("run", "export", run, "--out", str(out), "-o", "json").json
    assert made["complete"]
    names = set(made["files"])
    assert {"plan.toml", "run.json", "rounds.jsonl", "events.jsonl", "software.json", "report.html"} <= names
    for which in ("best_round", "last_round"):
        card = json.loads((out / f"model-round-{made[which]}.json").read_text())
        assert card["digest"] == made["files"][f"model-round-{made[which]}.safetensors"]
    assert subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=out, check=False).returncode == 0
    software = json.loads((out / "software.json").read_text())
    assert {"torch", "numpy"} <= set(software["coordinator"]["packages"])
    assert set(software["sites"]) >= set(SITES)

    model = out / f"model-round-{made['last_round']}.safetensors"
    whole, written = model.read_bytes(), model.stat().st_mtime_ns
    (out / "rounds.jsonl").unlink()
    federation.ctl("run", "export", run, "--out", str(out))
    assert (out / "rounds.jsonl").exists()
    assert model.stat().st_mtime_ns == written, "what is there is not fetched again"
    model.write_bytes(whole[:-1])
    federation.ctl("run", "export", run, "--out", str(out))
    assert model.read_bytes() == whole

    repeated = federation.ctl("run", "submit", str(out / "plan.toml"), "-o", "json").json["run"]
    assert federation.wait(repeated).state == "DONE"
    digests = [[record["model"] for record in federation.rounds(one)] for one in (run, repeated)]
    assert digests[0] == digests[1], "the same plan on the same threads gives the same bytes"


def test_a_debug_bundle_holds_no_key_no_token_and_no_image(federation: Federation) -> None:
    tokens = [said.json["token"] for what, said in federation.journey.items() if what.startswith("token")]
    tokens.append(federation.ctl("enroll", "token", "create", "--site", PROBE, "-o", "json").json["token"])
    keys = sorted(federation.root.rglob("*.key"))
    assert len(keys) >= 9
    assert len(tokens) >= 2
    # What should never happen: an operator pastes secrets where they are logged and journalled.
    ours = federation.server_home / "pki" / "issuing.key"
    pasted = f"{keys[0].read_text().splitlines()[1]} {ours.read_text().splitlines()[2]} {tokens[0]}"
    run = federation.submit(digits_plan([PROBE]))
    federation.ctl("run", "abort", run, "--yes", "--reason", pasted)
    out = federation.root / "bundle.tar.gz"
    federation.ctl("server", "debug-bundle", "--out", str(out))
    with tarfile.open(out) as archive:
        files = {Path(one.name).name: archive.extractfile(one).read() for one in archive.getmembers()}  # type: ignore[union-attr]
    assert set(files) == {
        "threads-control.txt", "threads-compute.txt", "versions.json", "config.json", "health.json", "database.json",
        "sites.json", "certificates.json", "runs.json", "events.jsonl", "log.jsonl", "fedctl.json",
    }  # fmt: skip
    assert b"[removed: a secret]" in files["events.jsonl"], "it was there, and is not any more"
    assert b"coordinator serves" in files["log.jsonl"]
    assert run.encode() in files["runs.json"]
    assert b"serve" in files["threads-control.txt"]
    everything = b"\n".join(files.values())
    for key in keys:
        for form in forms_of_key(key.read_bytes()):
            assert form not in everything, (
                f"{key}: {form[:8]!r}... in {[n for n, d in files.items() if form in d]}"
            )
    for token in tokens:
        secret = json.loads(base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)))["secret"]
        for form in (token, token[:80], secret, base64.b64encode(secret.encode()).decode().rstrip("=")):
            assert form.encode() not in everything
    refused = federation.command("fedctl", "server", "debug-bundle", "--out", str(out))
    assert refused.code == 7
