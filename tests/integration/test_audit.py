"""The audit logs of a real federation: what is recorded on both ends, who may read it, and that tampering is found.

The tests share one federation and run in order: the last ones damage the logs.
"""

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from fedcore.errors import PermissionDeniedError
from fedcore.v1 import admin_pb2
from fedctl.admin import open_credential
from fedserver.config import ServerHome
from tests.federation_fixture import SITES, Federation, build, digits_plan, wait_until

TWO = SITES[:2]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    federation = build(tmp_path_factory.mktemp("audit"), TWO)
    yield federation
    federation.stop()
    federation.check_over()


@pytest.fixture(scope="module")
def run(lab: Federation) -> str:
    """A finished run that made impressions."""
    run = lab.submit(
        digits_plan(TWO, strategy="fedimpres", rounds=4, synthesis={"warmup_rounds": 1, "images": 10})
    )
    lab.wait(run)
    return run


def records(lab: Federation, *arguments: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = lab.ctl("audit", "list", "-o", "json", *arguments).json["records"]
    return found


def site_records(lab: Federation, site: str) -> list[dict[str, Any]]:
    said = lab.command("fedagent", "audit", "list", "--home", str(lab.site_home(site)), "-o", "jsonl")
    assert said.code == 0, said
    return [json.loads(line) for line in said.out.splitlines()]


def verify_site(lab: Federation, site: str) -> Any:
    return lab.command("fedagent", "audit", "verify", "--home", str(lab.site_home(site)), "-o", "json")


def operator(lab: Federation, name: str, *roles: str) -> Path:
    """Another operator, as a context of its own; gives its credential folder."""
    folder = lab.root / f"operator-{name}"
    home = ("--home", str(lab.server_home))
    said = lab.command("fedserver", "operator", *home, "--id", name, "--out", str(folder))
    assert said.code == 0, said
    lab.ctl("context", "add", name, "--credential", str(folder))
    for role in roles:
        lab.ctl("role", "grant", name, role)
    return folder


def as_(lab: Federation, name: str, *arguments: str, expect: int = 0) -> Any:
    return lab.ctl("--context", name, *arguments, expect=expect)


def test_the_coordinator_says_who_did_what_to_what_from_where(lab: Federation, run: str) -> None:
    found = records(lab)
    assert [one["sequence"] for one in found] == list(range(1, len(found) + 1))
    by_action: dict[str, list[dict[str, Any]]] = {}
    for one in found:
        by_action.setdefault(one["action"], []).append(one)
    assert by_action["coordinator.start"][0]["actor"] == "coordinator"
    enrolled = {one["object"] for one in by_action["member.enroll"] if one["result"] == "ok"}
    assert {f"site/{site}" for site in TWO} <= enrolled
    assert {one["object"] for one in by_action["token.create"]} == enrolled
    (submitted,) = [one for one in by_action["run.submit"] if one["object"] == f"run/{run}"]
    assert (submitted["actor"], submitted["role"], submitted["result"]) == (
        "operator/admin",
        "operator",
        "ok",
    )
    assert submitted["peer"].startswith("ipv4:127.0.0.1:")
    deliveries = [one for one in by_action["update.deliver"] if one["detail"]["run"] == run]
    assert {one["actor"] for one in deliveries} == {f"site/{site}" for site in TWO}
    assert all(one["detail"]["bytes"] > 0 for one in by_action["artifact.fetch"] if one["result"] == "ok")
    assert records(lab, "--action", "run.submit") == by_action["run.submit"]


def test_every_byte_that_left_a_site_is_accounted_there(lab: Federation, run: str) -> None:
    for site in TWO:
        mine = site_records(lab, site)
        sent = [one for one in mine if one["action"] == "artifact.sent" and one["detail"]["run"] == run]
        taken = [
            one
            for one in records(lab, "--action", "update.deliver", "--actor", f"site/{site}")
            if one["detail"]["run"] == run
        ]
        assert {one["object"] for one in sent} == {one["object"] for one in taken}
        assert len(sent) == 4
        assert all(one["detail"]["bytes"] > 0 for one in sent)
        purposes = {one["detail"]["purpose"] for one in mine if one["action"] == "artifact.receive"}
        assert purposes == {"model", "impressions"}
        assert [one for one in mine if one["action"] == "figures.send"]
        hello = next(one for one in mine if one["action"] == "site.hello")
        assert hello["detail"]["coordinator_head"].partition(":")[0].isdecimal()


def test_both_logs_are_whole_and_the_head_is_told(lab: Federation, run: str) -> None:
    report = lab.ctl("audit", "verify", "-o", "json").json
    assert report["ok"] is True
    assert lab.ctl("audit", "verify", "--head", report["head"]).code == 0
    for site in TWO:
        said = verify_site(lab, site)
        assert (said.code, said.json["ok"]) == (0, True)


def test_roles_are_granted_taken_and_recorded(lab: Federation, run: str) -> None:
    operator(lab, "vera")
    whoami = as_(lab, "vera", "auth", "whoami", "-o", "json").json
    assert (whoami["id"], whoami["roles"]) == ("vera", [])
    assert "granted to auditor or operator or owner or viewer" in as_(lab, "vera", "status", expect=4).err
    lab.ctl("role", "grant", "vera", "viewer")
    as_(lab, "vera", "status")
    assert as_(lab, "vera", "auth", "can-i", "run.list").code == 0
    assert "granted to operator" in as_(lab, "vera", "auth", "can-i", "run.submit", expect=4).err
    as_(lab, "vera", "run", "abort", run, "--yes", expect=4)
    as_(lab, "vera", "role", "grant", "vera", "owner", expect=4)
    as_(lab, "vera", "audit", "list", expect=4)
    lab.ctl("role", "revoke", "vera", "viewer")
    as_(lab, "vera", "status", expect=4)
    assert lab.ctl("role", "revoke", "admin", "owner", expect=7).err.count("only owner") == 1
    lab.ctl("role", "grant", "vera", "nonsense", expect=2)
    said = [(one["action"], one["result"]) for one in records(lab, "--actor", "operator/vera")]
    assert ("status.read", "permission_denied") in said
    assert ("role.grant", "permission_denied") in said
    assert ("audit.read", "permission_denied") in said
    changes = records(lab, "--action", "role.", "--object", "operator/vera")
    assert [one["action"] for one in changes if one["result"] == "ok"] == ["role.grant", "role.revoke"]


def test_impressions_are_shown_to_auditors_and_owners_only_and_that_is_recorded(
    lab: Federation, run: str
) -> None:
    models = lab.ctl("model", "list", run, "-o", "json").json["models"]
    digest = next(one["impressions_digest"] for one in models if one["impressions_digest"])
    for name, role, allowed in (
        ("olga", "operator", False),
        ("vito", "viewer", False),
        ("aude", "auditor", True),
    ):
        with open_credential(operator(lab, name, role)) as admin:
            parts = admin.stream(lambda stub: stub.Download, admin_pb2.DownloadRequest(digest=digest))
            if allowed:
                assert sum(len(part.chunk.data) for part in parts) > 0
            else:
                with pytest.raises(PermissionDeniedError, match="may not see impressions"):
                    list(parts)
    seen = [
        (one["actor"], one["result"], one["detail"].get("purpose"))
        for one in records(lab, "--action", "artifact.download", "--object", digest)
    ]
    assert seen == [
        ("operator/olga", "permission_denied", None),
        ("operator/vito", "permission_denied", None),
        ("operator/aude", "ok", "impressions"),
    ]


def test_an_export_is_verified_line_by_line(lab: Federation, run: str, tmp_path: Path) -> None:
    whole = tmp_path / "audit.jsonl"
    lab.ctl("audit", "export", "--out", str(whole))
    head = lab.ctl("audit", "verify", "--file", str(whole), "-o", "json").json["head"]
    lines = whole.read_text().splitlines()
    assert len(lines) > 20
    damaged = {
        "edited": [line.replace("operator/admin", "operator/other") for line in lines],
        "removed": [*lines[:9], *lines[10:]],
        "reordered": [*lines[:9], lines[10], lines[9], *lines[11:]],
        "cut": lines[:-3],
    }
    for kind, content in damaged.items():
        path = tmp_path / f"{kind}.jsonl"
        path.write_text("\n".join(content) + "\n")
        said = lab.ctl("audit", "verify", "--file", str(path), "--head", head, "-o", "json", expect=1)
        assert said.json["finding"]["kind"] == kind
        assert "error[audit_broken]" in said.err
        assert str(said.json["finding"]["sequence"]) in said.err


def test_a_cut_tail_of_a_site_is_found_on_both_ends(lab: Federation, run: str) -> None:
    site = TWO[1]
    path = lab.site_home(site) / "audit.db"
    hellos = len(records(lab, "--action", "site.hello", "--actor", f"site/{site}"))
    for number, keep in enumerate(
        (None, 2), start=1
    ):  # the first gives the coordinator the head after the run
        lab.kill(site)
        if keep is not None:
            cut(path, keep)
        lab.start_agent(site)
        wait_until(
            lambda number=number: (
                len(records(lab, "--action", "site.hello", "--actor", f"site/{site}")) == hellos + number
            ),
            "the agent's hello",
        )
    said = lab.ctl("audit", "verify", "-o", "json", expect=1)
    assert said.json["finding"] is None
    assert f"the log of site/{site} had record" in said.err
    at_site = verify_site(lab, site)
    assert at_site.code == 1
    assert "coordinator has seen record" in at_site.err


def test_a_cut_tail_of_the_coordinator_is_found_by_what_the_sites_have_kept(lab: Federation) -> None:
    lab.kill("coordinator")
    cut(
        ServerHome(lab.server_home).database,
        keep=5,
        also="DELETE FROM audit_witnesses; DELETE FROM audit_peers",
    )
    lab.start_coordinator()
    lab.wait_connected(*TWO)
    said = lab.ctl("audit", "verify", "-o", "json", expect=1)
    assert said.json["finding"]["kind"] in {"cut", "edited"}
    assert "site/clinic-" in said.err
    at_site = verify_site(lab, TWO[0])
    assert at_site.code == 1
    assert "the log of coordinator had record" in at_site.err


def cut(path: Path, keep: int, also: str = "") -> None:
    with closing(sqlite3.connect(path)) as database:
        database.executescript(
            "DROP TRIGGER audit_is_append_only_1; DROP TRIGGER audit_is_append_only_2;"
            f"DELETE FROM audit WHERE position > {keep}; {also};"
        )
        database.commit()
