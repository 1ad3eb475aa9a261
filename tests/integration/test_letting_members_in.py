"""Sites that ask to be let in without a token, and an operator's credential for a token: the commands, on the federation."""

import subprocess
import sys
from datetime import UTC, datetime

import pytest

from fedagent.config import AgentHome
from fedagent.enroll import enroll
from fedagent.enroll_request import prepare_request, pursue_request
from fedcore.credential import load_credential
from fedcore.errors import (
    ConfigError,
    ConflictError,
    FingerprintError,
    PermissionDeniedError,
    TokenError,
    UnreachableError,
)
from fedcore.v1 import admin_pb2, membership_pb2
from fedctl.admin import open_credential
from fedctl.operator_enrolment import enroll_operator
from tests.federation_fixture import Federation, wait_until


def terms(federation: Federation, site: str) -> dict:
    return {
        "site": site,
        "coordinator": f"127.0.0.1:{federation.port}",
        "ca_fingerprint": fingerprint(federation),
        "enroll_port": federation.enroll_port,
    }


def fingerprint(federation: Federation) -> str:
    return federation.journey["init"].out.partition("CA fingerprint")[2].split()[0]


def words(federation: Federation, site: str, home: object) -> list[str]:
    return [
        "enroll", "--request", "--site", site, "--home", str(home),
        "--coordinator", f"127.0.0.1:{federation.port}", "--enroll-port", str(federation.enroll_port),
        "--ca-fingerprint", fingerprint(federation),
    ]  # fmt: skip


def test_a_site_that_is_killed_while_it_waits_is_let_in_with_the_same_key(federation, tmp_path):
    home = tmp_path / "ward-new"
    waiting = subprocess.Popen(
        [sys.executable, "-m", "fedagent.cli", *words(federation, "ward-new", home)],
        env=federation.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said = waiting.stdout.readline()
    wait_until(lambda: "waiting for the operator's decision" in waiting.stdout.readline(), "it waits")
    waiting.kill()
    waiting.communicate()
    key = (home / "enrolling/tls.key").read_bytes()
    assert (home / "enrolling/tls.key").stat().st_mode & 0o777 == 0o600

    (listed,) = federation.ctl("enroll", "request", "list", "-o", "json").json["requests"]
    asked = listed["key_fingerprint"]
    assert (listed["site"], listed["address"], listed["state"]) == ("ward-new", "127.0.0.1", "waiting")
    assert asked in said
    refused = federation.ctl("enroll", "request", "approve", "ward-new", "--fingerprint", "ab" * 32, expect=4)
    assert "nothing was approved" in refused.err
    shown = ":".join(asked.upper()[i : i + 2] for i in range(0, 64, 2))
    federation.ctl("enroll", "request", "approve", asked[:10], "--fingerprint", shown)

    shown = federation.ctl("enroll", "request", "show", "ward-new", "-o", "json").json
    assert (shown["state"], shown["decided_by"], bool(shown["serial"])) == ("approved", "admin", True)

    done = federation.command("fedagent", *words(federation, "ward-new", home))
    assert done.code == 0, done
    credential = load_credential(home / "credential", datetime.now(UTC))
    assert credential.key_pem == key
    assert credential.subject.id == "ward-new"
    assert sorted(path.name for path in home.iterdir()) == ["agent.toml", "credential"]
    with federation.admin() as admin:
        sites = admin.call(lambda stub: stub.ListSites, admin_pb2.ListSitesRequest()).sites
    assert "ward-new" in {site.id for site in sites}
    actions = {
        row["action"]: row["actor"]
        for row in federation.ctl("audit", "list", "--object", "site/ward-new", "-o", "json").json["records"]
    }
    assert actions["enrollment.request"] == "anyone"
    assert actions["enrollment.approve"] == "operator/admin"
    federation.ctl("site", "remove", "ward-new", "--yes")


def test_a_denied_site_is_told_why_and_may_ask_again_with_another_key(federation, tmp_path):
    opened = prepare_request(tmp_path, **terms(federation, "ward-odd"))
    naps = []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        federation.ctl("enroll", "request", "deny", "ward-odd", "--reason", "who are you?")

    with pytest.raises(PermissionDeniedError, match=r"site ward-odd was denied: who are you\?"):
        pursue_request(tmp_path, opened, wait_s=None, sleep=nap)
    assert len(naps) == 1
    assert not AgentHome(tmp_path).enrolling.exists()
    assert prepare_request(tmp_path, **terms(federation, "ward-odd")).fingerprint != opened.fingerprint


def test_nothing_is_sent_to_a_coordinator_of_another_root(federation, tmp_path):
    wrong = {**terms(federation, "ward-x"), "ca_fingerprint": "0" * 64}
    with pytest.raises(FingerprintError, match="nothing was sent"):
        prepare_request(tmp_path / "x", **wrong)
    with pytest.raises(UnreachableError, match="enrolment at 127"):
        prepare_request(tmp_path / "x", **{**terms(federation, "ward-x"), "enroll_port": 1})
    assert not (tmp_path / "x").exists()


def test_a_request_under_way_is_gone_on_with_and_not_mixed_with_another(federation, tmp_path):
    opened = prepare_request(tmp_path, **terms(federation, "ward-y"))
    assert prepare_request(tmp_path, **terms(federation, "ward-y")).fingerprint == opened.fingerprint
    with pytest.raises(ConflictError, match="another request is under way, of site ward-y"):
        prepare_request(tmp_path, **terms(federation, "ward-z"))
    assert (
        prepare_request(tmp_path, force=True, **terms(federation, "ward-z")).fingerprint != opened.fingerprint
    )
    (tmp_path / "enrolling/tls.key").chmod(0o640)
    with pytest.raises(ConfigError, match="private key with mode 0640, expected 0600"):
        prepare_request(tmp_path, **terms(federation, "ward-z"))


def test_a_second_operator_enrols_with_a_token_on_a_machine_of_its_own(federation, tmp_path):
    made = federation.ctl(
        "enroll", "token", "create", "--operator", "bea", "--role", "viewer", "-o", "json"
    ).json
    terms = {
        "token": made["token"],
        "ca_fingerprint": made["ca_fingerprint"],
        "coordinator": made["coordinator"],
    }
    with pytest.raises(TokenError, match="for operator bea, not for a site"):
        enroll(tmp_path / "site", **terms)
    folder = tmp_path / "bea"
    options = [word for key, value in terms.items() for word in (f"--{key.replace('_', '-')}", value)]
    said = federation.ctl("context", "enroll", "as-bea", "--credential", str(folder), *options)
    assert "context 'as-bea' added" in said.err
    assert (folder / "tls.key").stat().st_mode & 0o777 == 0o600
    with open_credential(folder) as bea:
        me = bea.call(lambda stub: stub.WhoAmI, admin_pb2.WhoAmIRequest())
        assert (me.id, list(me.roles)) == ("bea", ["viewer"])
        request = membership_pb2.CreateOperatorTokenRequest(operator="eve", roles=["owner"])
        with pytest.raises(PermissionDeniedError, match="granted to owner"):
            bea.call(lambda _: bea.membership.CreateOperatorToken, request)
    with pytest.raises(TokenError, match="was used at"):
        enroll_operator(tmp_path / "twice", now=datetime.now(UTC), **terms)
    assert not (tmp_path / "twice").exists()
    with pytest.raises(ConflictError, match="is already there; nothing was changed"):
        enroll_operator(folder, now=datetime.now(UTC), **terms)
