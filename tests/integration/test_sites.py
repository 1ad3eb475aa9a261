"""Operators and one site, against a real coordinator with real agents: keep it out, drain it, remove it, ask its agent."""

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from typer.testing import CliRunner

from fedcore.errors import FedimpresError
from fedcore.status import exit_code_of
from fedctl.app import app
from tests.federation_fixture import PROBE, SHARING, SITES, Federation, digits_plan, wait_until

pytestmark = pytest.mark.slow
SITE = "clinic-b"


class Ctl:
    """`fedctl` within this process, for speed: exit code, JSON, and the error if there was one."""

    def __init__(self, federation: Federation) -> None:
        self._environment = federation.environment()

    def __call__(self, *words: str) -> Any:
        result = CliRunner().invoke(app, [*words, "-o", "json"], env=self._environment)
        assert result.exit_code == 0, (words, result.output, result.exception)
        return json.loads(result.stdout)

    def refused(self, code: int, *words: str) -> FedimpresError:
        result = CliRunner().invoke(app, list(words), env=self._environment)
        assert isinstance(result.exception, FedimpresError), (words, result.output, result.exception)
        assert exit_code_of(result.exception) == code, result.exception
        return result.exception


@pytest.fixture
def ctl(federation: Federation) -> Iterator[Ctl]:
    """Afterwards the site is let in and its agent runs freely."""
    made = Ctl(federation)
    yield made
    if made("site", "show", SITE)["standing"] != "enabled":
        made("site", "enable", SITE)
    federation.wait_connected(SITE)


@pytest.fixture
def held(federation: Federation) -> Iterator[int]:
    """The site's compute process, held still: what the site works at takes until it is let go on."""
    pid = federation.compute_pid(SITE)
    os.kill(pid, signal.SIGSTOP)
    yield pid
    go_on(pid)


def go_on(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # its work was withdrawn: the agent has ended it
        os.kill(pid, signal.SIGCONT)


def records(ctl: Ctl, action: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = ctl("audit", "list", "--action", action)["records"]
    return found


def test_a_disabled_site_is_let_go_named_refused_and_stays_out_over_a_restart(
    federation: Federation, ctl: Ctl, held: int
) -> None:
    run = federation.submit(digits_plan(rounds=2))
    federation.wait_phase(run, "training")
    since = federation.log_size(SITE)
    said = ctl("site", "disable", SITE, "--reason", "MRI upgrade")
    assert (said["standing"], said["standing_by"], said["standing_reason"]) == (
        "disabled",
        "admin",
        "MRI upgrade",
    )
    go_on(held)
    last = federation.wait(run)
    why = f"disabled by operator admin since {said['standing_since'][:19]}Z: MRI upgrade"
    assert (last.state, f"missing: {SITE} in rounds 1, 2" in last.reason) == ("DEGRADED", True)
    missing = [record["missing"][SITE] for record in federation.rounds(run)]
    assert missing == [why, f"not there when the round opened: {why}"]
    assert [record["aggregated"] for record in federation.rounds(run)] == [len(SITES) - 1] * 2

    wait_until(lambda: f"site {SITE} is {why}" in federation.log(SITE, since), "the agent reads why")
    assert "stop" in federation.log(SITE, since), "it was told to stop before its stream ended"
    federation.kill("coordinator")
    since = federation.log_size(SITE)
    federation.start_coordinator()
    wait_until(lambda: f"site {SITE} is {why}" in federation.log(SITE, since), "still refused")
    row = next(row for row in ctl("site", "list")["sites"] if row["site"] == SITE)
    assert (row["connected"], row["enabled"], row["standing"]) == (False, False, "disabled")
    assert why in str(ctl.refused(78, "run", "submit", str(federation.plan(digits_plan()))))
    everybody = digits_plan(rounds=1)
    del everybody["sites"]
    federation.wait_connected(*(site for site in SITES if site != SITE))
    run = federation.submit(everybody)
    last = federation.wait(run)
    assert SITE not in last.sites
    assert ctl("site", "enable", SITE)["enabled"] is True
    federation.wait_connected(SITE)
    assert [record["object"] for record in records(ctl, "site.disable")] == [f"site/{SITE}"]
    assert records(ctl, "site.enable")[-1]["actor"] == "operator/admin"


def test_a_draining_site_finishes_its_round_then_gets_no_work(
    federation: Federation, ctl: Ctl, held: int
) -> None:
    run = federation.submit(digits_plan(rounds=2))
    federation.wait_phase(run, "training")
    assert ctl("site", "drain", SITE)["standing"] == "draining"
    assert str(ctl.refused(5, "site", "drain", SITE, "--wait", "--timeout", "0.1s")).startswith(
        f"site {SITE} still has work"
    )
    go_on(held)
    assert ctl("site", "drain", SITE, "--wait", "--timeout", "60s")["standing"] == "drained"
    assert federation.wait(run).state == "DEGRADED"
    first, second = federation.rounds(run)
    assert (first["missing"], first["aggregated"]) == ({}, len(SITES))
    assert "round opened: draining by operator admin since" in second["missing"][SITE]
    row = ctl("site", "show", SITE)
    assert (row["connected"], row["standing"]) == (True, "drained"), "its agent stays"


def test_ping_tells_times_and_who_is_away(federation: Federation, ctl: Ctl) -> None:
    rows = ctl("site", "ping", SITE, "--count", "2")["pings"]
    assert [(row["site"], row["number"]) for row in rows] == [(SITE, 1), (SITE, 2)]
    assert all(0 < row["agent_s"] < row["total_s"] for row in rows)
    assert "is not connected, last seen: " in str(ctl.refused(3, "site", "ping", PROBE))
    ctl.refused(6, "site", "ping", "nobody")


def test_the_agents_log_is_read_only_where_the_site_shares_it(federation: Federation, ctl: Ctl) -> None:
    refused = ctl.refused(4, "site", "logs", SITE)
    assert refused.message == f"site {SITE} refuses: policy does not share the agent's log"
    assert "share_logs = true" in refused.hint
    run = federation.submit(digits_plan(rounds=1))
    assert federation.wait(run).state == "DONE"
    # The run may be over, and the site told to stop, before it has heard that its update arrived.
    lines = ctl("site", "logs", SHARING, "--lines", "1000")["lines"]
    begun = [
        line["fields"] for line in lines if line["event"] == "task begins" and line["fields"]["run"] == run
    ]
    assert begun[0]["round"] == "1"
    assert str(federation.root) not in json.dumps(lines)
    assert len(ctl("site", "logs", SHARING, "-n", "1")["lines"]) == 1
    for site, results in ((SITE, ["refused"]), (SHARING, ["ok", "ok"])):
        home = ("--home", str(federation.site_home(site)))
        said = federation.command("fedagent", "audit", "list", "--action", "log.send", *home, "-o", "json")
        sent = said.json["records"]
        assert [record["result"] for record in sent] == results
        assert {record["detail"]["asked_by"] for record in sent} == {"operator/admin"}


def test_a_removed_site_loses_its_certificates_and_keeps_its_history(
    federation: Federation, ctl: Ctl
) -> None:
    token = ctl("enroll", "token", "create", "--site", "leaver")
    enroll = ("--coordinator", token["coordinator"], "--ca-fingerprint", token["ca_fingerprint"])
    home = ("--home", str(federation.site_home("leaver")))
    said = federation.command("fedagent", "enroll", *home, *enroll, "--token", token["token"])
    assert said.code == 0, said
    unused = ctl("enroll", "token", "create", "--site", "leaver")["token"]
    run = federation.submit(digits_plan((*SITES, "leaver"), min_sites=len(SITES) + 1))
    wait_until(lambda: federation.run(run).state == "WAITING", "the run waits for the site")
    assert f"takes part in run {run}" in str(ctl.refused(7, "site", "remove", "leaver", "--yes"))
    assert "can't ask" in str(ctl.refused(2, "site", "remove", "leaver"))
    gone = ctl("site", "remove", "leaver", "--yes", "--force", "--reason", "contract over")
    assert (gone["standing"], gone["revoked"]) == ("removed", 1)
    wait_until(lambda: "leaver (removed by operator admin" in federation.run(run).reason, "the run names it")
    federation.abort_all()
    assert ctl("site", "remove", "leaver", "--yes")["revoked"] == 0
    assert "leaver" not in [row["site"] for row in ctl("site", "list")["sites"]]
    assert "leaver" in [row["site"] for row in ctl("site", "list", "--all")["sites"]]
    (certificate,) = ctl("cert", "list", "--site", "leaver", "--all")["certificates"]
    assert (certificate["state"], "contract over" in certificate["reason"]) == ("revoked", True)
    said = federation.command("fedagent", "enroll", "--force", *home, *enroll, "--token", unused)
    assert (said.code, "expired" in said.err) == (4, True), "tokens made before are void"
    ctl.refused(7, "site", "enable", "leaver")
    (first, second) = records(ctl, "site.remove")[-2:]
    assert (first["detail"]["revoked"], second["detail"]["revoked"]) == (1, 0)
