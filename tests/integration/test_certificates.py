"""Certificates that live for seconds, in a federation of real processes: renewal under work, revocation in the middle
of a round, renewal of what has ended, the coordinator's own.

The tests share one federation and run in this order; the last ones take sites away from it.
"""

import json
import re
import shutil
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from fedcore.channel import open_sync_channel
from fedcore.credential import load_credential
from fedcore.data.benchmark_sets import load_benchmark, write_site
from fedcore.errors import IdentityError
from fedcore.protocol import PROTOCOL
from fedcore.status import from_rpc_error
from fedcore.v1 import admin_pb2, admin_pb2_grpc, federation_pb2, federation_pb2_grpc
from fedctl.demo_processes import free_ports
from fedserver.offline_ca import install_ca, request_ca, sign_ca
from tests.federation_fixture import Federation, configure_agent, digits_plan, wait_until

# isort: split
import grpc

A, B = "ward-a", "ward-b"
# Renewed after 7 to 8 seconds.
LIFE_S = 12.0
SITES = (A, B)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    port, enroll_port = free_ports(2)
    made = Federation(tmp_path_factory.mktemp("lab"), port, enroll_port)
    try:
        build(made)
        yield made
    finally:
        made.stop()
    made.check_over()


def build(made: Federation) -> None:
    home = made.server_home
    said = made.command(
        "fedserver", "init", "--home", str(home), "--name", "lab", "--host", "127.0.0.1",
        "--port", str(made.port), "--enroll-port", str(made.enroll_port),
    )  # fmt: skip
    assert said.code == 0, said
    config = home / "fedserver.toml"
    life = LIFE_S / 86400
    config.write_text(
        f"{config.read_text()}\nheartbeat_interval_s = 1.0\n[compute]\nthreads = 1\n"
        f"[certificates]\nsite_days = {life}\ncoordinator_days = {life}\n"
    )
    made.start_coordinator()
    made.ctl("context", "add", "lab", "--credential", str(home / "operator"))
    dealt = load_benchmark("digits", None, sites=2, alpha=1.0, seed=1)
    for site, split in zip(SITES, dealt.sites.values(), strict=True):
        write_site(split, made.data(site))
        enrol(made, site)
        configure_agent(made, site, made.data(site))
        made.start_agent(site)
    made.wait_connected(*SITES)


def enrol(made: Federation, site: str, *options: str) -> None:
    token = made.ctl("enroll", "token", "create", "--site", site, "-o", "json").json
    said = made.command(
        "fedagent", "enroll", "--home", str(made.site_home(site)), "--coordinator", token["coordinator"],
        "--token", token["token"], "--ca-fingerprint", token["ca_fingerprint"], *options,
    )  # fmt: skip
    assert said.code == 0, said


def serial(made: Federation, site: str) -> str:
    folder = made.site_home(site) / "credential"
    return f"{load_credential(folder, datetime.now(UTC), allow_expired=True).certificate.serial_number:x}"


def listed(made: Federation, *options: str) -> list[dict[str, Any]]:
    return made.ctl("cert", "list", *options, "-o", "json").json["certificates"]


def served_serial(made: Federation, port: int) -> str:
    """Serial number of the certificate that the coordinator shows at a port."""
    folder = made.server_home / "operator"
    context = ssl.create_default_context(cafile=str(folder / "ca.crt"))
    context.load_cert_chain(folder / "tls.crt", folder / "tls.key")
    with socket.create_connection(("127.0.0.1", port), 60) as plain:
        with context.wrap_socket(plain, server_hostname="127.0.0.1") as connection:
            return str((connection.getpeercert() or {})["serialNumber"]).lower().lstrip("0")


def plan(**changes: Any) -> dict[str, Any]:
    limits = {"round_deadline_s": 120, "stall_timeout_s": 60, "join_wait_s": 60}
    return digits_plan(SITES, **{"rounds": 3, "limits": limits, **changes})


def hello_as(folder: Path) -> IdentityError | None:
    with open_sync_channel(folder) as channel:
        try:
            request = federation_pb2.HelloRequest(protocol=PROTOCOL)
            federation_pb2_grpc.FederationStub(channel).Hello(request)
        except grpc.RpcError as error:
            failure = from_rpc_error(error, "coordinator")
            assert isinstance(failure, IdentityError), failure
            return failure
    return None


def test_runs_go_on_while_every_certificate_is_renewed_twice(lab: Federation) -> None:
    pids = {name: program.pid for name, program in lab.programs.items()}
    first = {site: serial(lab, site) for site in SITES}
    runs, deadline = [], time.monotonic() + 150

    def renewals(site: str) -> list[dict[str, Any]]:
        return [one for one in listed(lab, "--all", "--site", site) if one["renews"]]

    def submit() -> None:
        runs.append(lab.submit(plan(name=f"renewing{len(runs)}", rounds=8)))

    submit()
    while not all(len(renewals(site)) >= 2 for site in SITES):
        assert time.monotonic() < deadline, lab.log(A)
        submit()  # before the one under way is over: there is never a moment without a run
        assert lab.wait(runs[-2]).state == "DONE", "no site missed a round"
    assert lab.wait(runs[-1]).state == "DONE", "no site missed a round"
    spans = [(run.submitted_at, run.finished_at) for run in map(lab.run, runs)]
    for site in SITES:
        times = [one["issued_at"] for one in renewals(site)]
        assert any(begin < at < end for at in times for begin, end in spans), "while a run was under way"
        assert serial(lab, site) != first[site]
        assert first[site] in {one["serial"] for one in listed(lab, "--all", "--site", site)}
    assert {name: program.pid for name, program in lab.programs.items() if program.poll() is None} == pids


def test_the_coordinator_serves_its_renewed_certificate_on_both_ports_without_restart(
    lab: Federation,
) -> None:
    """The first one, of `init`, lives 30 days: it is made to end soon, in a home that is not served."""
    lab.programs["coordinator"].terminate()
    lab.programs.pop("coordinator").wait(60)
    shorten_own_certificate(lab)
    lab.start_coordinator()
    lab.wait_connected(*SITES)
    before = served_serial(lab, lab.port)
    wait_until(lambda: served_serial(lab, lab.port) != before, "renewed and served")
    newest = listed(lab, "--all")[0:40]
    owners = {one["serial"]: one["owner"] for one in newest}
    for port in (lab.port, lab.enroll_port):
        assert owners[served_serial(lab, port)] == "coordinator"
    lab.wait_connected(*SITES)


def shorten_own_certificate(lab: Federation) -> None:
    import asyncio

    from fedcore.database import open_database
    from fedserver.authority import load_authority
    from fedserver.certificates import Certificates
    from fedserver.checks import load_home
    from fedserver.config import ServerHome
    from fedserver.own_certificate import OwnCertificate
    from fedserver.schema import MIGRATIONS

    places = ServerHome(lab.server_home)
    authority = load_authority(places.pki, "lab", load_home(lab.server_home).certificates.lifetimes())
    database = open_database(places.database, MIGRATIONS)
    try:
        certificates = Certificates(database, lambda: authority)
        asyncio.run(OwnCertificate(places.credential, "127.0.0.1", certificates).renew())
    finally:
        database.close()


def test_an_operator_renews_with_a_new_key_and_goes_on(lab: Federation) -> None:
    old = lab.ctl("auth", "whoami", "-o", "json").json
    key = (lab.server_home / "operator/tls.key").read_bytes()
    said = lab.ctl("cert", "renew", "-o", "json").json
    assert said["replaced"] == old["serial"]
    assert lab.ctl("auth", "whoami", "-o", "json").json["serial"] == said["serial"] != old["serial"]
    assert (lab.server_home / "operator/tls.key").read_bytes() != key
    assert (lab.server_home / "operator/tls.key").stat().st_mode & 0o777 == 0o600
    shown = lab.ctl("cert", "show", old["serial"][:16], "-o", "json").json
    assert (shown["state"], shown["replaced_by"], shown["owner"]) == (
        "replaced", said["serial"], "operator/admin",
    )  # fmt: skip


def test_an_operator_who_lost_the_key_gets_a_new_credential_at_the_coordinator(lab: Federation) -> None:
    out = lab.root / "admin-again"
    words = ("operator", "--home", str(lab.server_home), "--id", "admin", "--out", str(out))
    assert lab.command("fedserver", *words).code == 0
    again = lab.command("fedserver", *words)
    assert (again.code, "already there" in again.err) == (7, True)
    lab.ctl("context", "add", "again", "--credential", str(out))
    new = lab.ctl("--context", "again", "auth", "whoami", "-o", "json").json
    assert (new["role"], new["id"]) == ("operator", "admin")
    lab.ctl("cert", "revoke", new["serial"], "--yes")
    assert "was revoked" in lab.ctl("--context", "again", "auth", "whoami", expect=4).err


def test_a_site_that_was_off_when_its_certificate_ended_comes_back_by_itself(lab: Federation) -> None:
    lab.programs[B].terminate()
    lab.programs.pop(B).wait(60)
    folder = lab.site_home(B) / "credential"
    ended = load_credential(folder, datetime.now(UTC), allow_expired=True).certificate
    wait_until(lambda: datetime.now(UTC) > ended.not_valid_after_utc, "ended")
    since = lab.log_size(B)
    lab.start_agent(B)
    lab.wait_connected(B)
    assert '"ended": true' in lab.log(B, since) or "ended=True" in lab.log(B, since)
    row = next(one for one in listed(lab, "--all", "--site", B) if one["serial"] == serial(lab, B))
    assert row["state"] in ("valid", "replaced")


def test_a_key_that_others_may_read_is_refused_at_start(lab: Federation) -> None:
    key = lab.server_home / "operator/tls.key"
    key.chmod(0o640)
    said = lab.ctl("auth", "whoami", expect=78)
    key.chmod(0o600)
    assert "private key with mode 0640, expected 0600" in said.err
    assert "chmod 600" in said.err


def test_revocation_asks_first_and_names_what_it_needs(lab: Federation) -> None:
    for words, code, text in (
        (("revoke", "--site", B), 2, "add --yes"),
        (("revoke", "--yes"), 2, "needs one of SERIAL, --site and --operator"),
        (("revoke", "ffffffffffffffffffff", "--yes"), 6, "serial numbers begin with"),
        (("revoke", "--site", "nobody", "--yes"), 6, "has no certificate"),
        (("revoke", "--operator", "admin", "--yes"), 7, "lock you out"),
    ):
        said = lab.ctl("cert", *words, expect=code)
        assert text in said.err, said
    assert lab.ctl("auth", "whoami").code == 0


def test_a_site_revoked_in_the_middle_of_a_round_is_out_at_once(lab: Federation) -> None:
    limits = {"round_deadline_s": 60, "stall_timeout_s": 3, "join_wait_s": 2}
    folder = lab.site_home(B) / "credential"
    with lab.training(plan(name="revoking", rounds=2, limits=limits), B) as run, lab.admin() as admin:
        said = lab.ctl("cert", "revoke", "--site", B, "--reason", "laptop stolen", "--yes", "-o", "json").json
        assert said["revoked"] >= 1
        assert {one["owner"] for one in said["certificates"]} == {f"site/{B}"}

        def gone() -> bool:
            sites = admin.call(lambda stub: stub.ListSites, admin_pb2.ListSitesRequest()).sites
            return {site.id for site in sites if site.connected} == {A}

        # Twice a second the coordinator looks. By itself the stream would last until the certificate ends.
        wait_until(gone, "stream ended", LIFE_S / 3)
    error = hello_as(folder)
    assert error is not None
    assert re.search(r"site/ward-b: certificate \w+ was revoked at .* by admin: laptop stolen", error.message)
    again = lab.ctl("cert", "revoke", "--site", B, "--yes", "-o", "json").json
    assert again["revoked"] == 0, "repeated: nothing changes"
    ended = lab.wait(run)
    assert ended.state == "DEGRADED"
    assert {site for missed in ended.missed for site in missed.sites} == {B}
    wait_until(lambda: said_why(lab.log(B)), "the site's log says why")
    rows = listed(lab, "--all", "--site", B)
    assert json.dumps(rows).count("laptop stolen") >= 1
    assert not [one for one in listed(lab) if one["owner"] == f"site/{B}"]


def said_why(log: str) -> bool:
    return any("not connected" in line and "laptop stolen" in line for line in log.splitlines())


def test_a_revoked_site_comes_back_with_a_new_token(lab: Federation) -> None:
    enrol(lab, B, "--force")
    lab.wait_connected(B)


def test_the_ca_is_replaced_under_a_federation_that_works(lab: Federation) -> None:
    before = lab.ctl("cert", "ca", "show", "-o", "json").json
    pids = {name: program.pid for name, program in lab.programs.items()}
    run = lab.submit(plan(name="rotating", rounds=40))
    lab.wait_phase(run, "training")
    assert "can't ask" in lab.ctl("cert", "ca", "rotate", expect=2).err
    moving = lab.ctl("cert", "ca", "rotate", "--yes", "-o", "json").json
    assert moving["previous_fingerprint"] == before["root_fingerprint"] != moving["root_fingerprint"]
    assert "under way already" in lab.ctl("cert", "ca", "rotate", "--yes", expect=7).err

    said = lab.ctl("cert", "ca", "rotate", "--finish", "--yes", expect=7)
    assert "your own certificate is of the old CA" in said.err
    old_credential = lab.root / "old-operator"
    shutil.copytree(lab.server_home / "operator", old_credential)
    lab.ctl("cert", "renew")
    # The agents were told, and renewed over their connection; a new site may enrol meanwhile.
    wait_until(lambda: not waiting(lab), "agents renewed")
    enrol(lab, "ward-c")
    for site in (*SITES, "ward-c"):
        roots = (lab.site_home(site) / "credential/ca.crt").read_text()
        assert roots.count("BEGIN CERTIFICATE") == 2
    with open_sync_channel(old_credential) as channel:  # both are trusted
        assert admin_pb2_grpc.AdminStub(channel).WhoAmI(admin_pb2.WhoAmIRequest()).id == "admin"

        finished = lab.ctl("cert", "ca", "rotate", "--finish", "--yes", "-o", "json").json
        assert finished["root_fingerprint"] == moving["root_fingerprint"]
        assert finished["previous_fingerprint"] is None
        with pytest.raises(grpc.RpcError) as caught:  # the same, open connection
            admin_pb2_grpc.AdminStub(channel).WhoAmI(admin_pb2.WhoAmIRequest())
    refused = from_rpc_error(caught.value, "coordinator")
    assert isinstance(refused, IdentityError)
    assert "which this federation no longer trusts" in refused.message
    lab.wait_connected(*SITES)
    for site in SITES:
        wait_until(lambda site=site: roots_of(lab, site) == 1, "the old root is forgotten")
    assert not (lab.server_home / "pki/previous").exists()
    ended = lab.wait(run)
    assert (ended.state, list(ended.missed)) == ("DONE", []), ended
    assert {name: program.pid for name, program in lab.programs.items() if program.poll() is None} == pids


def test_an_issuing_ca_that_was_signed_by_files_is_taken_over_while_the_coordinator_serves(
    lab: Federation, tmp_path: Path
) -> None:
    before = lab.ctl("cert", "ca", "show", "-o", "json").json
    offline = tmp_path / "offline"
    offline.mkdir()
    for name in ("root.key", "root.crt"):
        shutil.copy2(lab.server_home / "pki" / name, offline)
    (lab.server_home / "pki/root.key").unlink()
    refused = lab.ctl("cert", "ca", "rotate", "--yes", expect=7).err
    assert "root is kept offline" in refused
    assert "fedserver ca request" in refused
    now = datetime.now(UTC)
    asked = request_ca(lab.server_home, tmp_path / "request.pem")
    sign_ca(offline, tmp_path / "request.pem", tmp_path / "issuing.pem", now, expected=asked)
    install_ca(lab.server_home, tmp_path / "issuing.pem", now)
    wait_until(lambda: "another CA was installed" in lab.log("coordinator"), "it is taken over", 20)
    lab.ctl("cert", "renew")
    wait_until(lambda: not waiting(lab), "agents renewed", 20)
    for site in SITES:
        assert roots_of(lab, site) == 1, "the root is the same"
    done = lab.ctl("cert", "ca", "rotate", "--finish", "--yes", "-o", "json").json
    assert (done["root_fingerprint"], done["root_offline"]) == (before["root_fingerprint"], True)
    lab.wait_connected(*SITES)


def waiting(lab: Federation) -> list[str]:
    return list(lab.ctl("cert", "ca", "show", "-o", "json").json["waiting"])


def roots_of(lab: Federation, site: str) -> int:
    with suppress(OSError):  # the folder is replaced meanwhile
        return (lab.site_home(site) / "credential/ca.crt").read_text().count("BEGIN CERTIFICATE")
    return 0


def test_a_coordinator_that_starts_after_a_rotation_serves_all_the_same(lab: Federation) -> None:
    lab.programs["coordinator"].terminate()
    lab.programs.pop("coordinator").wait(60)
    lab.start_coordinator()
    lab.wait_connected(*SITES)
