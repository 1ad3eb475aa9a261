"""A coordinator lost with its disk in the middle of a run comes back from a backup; sites follow it, and not the old one."""

import shutil
import stat
from datetime import UTC, datetime
from pathlib import Path

import pytest

from fedcore.backup.files import check_backup
from fedcore.backup.keys import from_key_file, make_key_file
from fedcore.channel import open_enrollment_channel, open_sync_channel
from fedcore.credential import load_credential
from fedcore.errors import HeldError
from fedcore.protocol import PROTOCOL
from fedcore.status import from_rpc_error
from fedctl.admin import open_credential
from fedctl.demo_processes import free_ports
from fedserver.restore import Revoked, release_home, restore
from tests.federation_fixture import PROBE, SITES, Federation, digits_plan, wait_until

# isort: split
import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fedcore.v1 import (
    admin_pb2,
    enrollment_pb2,
    enrollment_pb2_grpc,
    federation_pb2,
    federation_pb2_grpc,
)

ROUNDS = 3
HELD = SITES[0]


def plan() -> dict[str, object]:
    return digits_plan(name="restored", rounds=ROUNDS, strategy="fedimpres", synthesis={"images": 10})


def count(federation: Federation, run: str, kind: str) -> int:
    return federation.journal(run).count(kind)


def stop_coordinator(federation: Federation) -> None:
    program = federation.programs.pop("coordinator")
    program.terminate()
    program.wait(20)


def healthy(operator: Path) -> bool:
    credential = load_credential(operator, datetime.now(UTC))
    with open_sync_channel(credential) as channel:
        reply = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)


@pytest.mark.long
def test_a_run_goes_on_from_a_backup_and_ends_as_if_nothing_had_been(
    federation: Federation, tmp_path: Path
) -> None:
    undisturbed = federation.submit(plan())
    assert federation.wait(undisturbed).state == "DONE"

    key, backup = tmp_path / "backup.key", tmp_path / "lab.fedbackup"
    recipient = federation.ctl("backup", "key", "--out", str(key)).out.strip()
    token = federation.ctl("enroll", "token", "create", "--site", "late", "-o", "json").json
    with federation.second_round(plan()) as run:
        wait_until(
            lambda: count(federation, run, "update_stored") > len(SITES), "an update of the second round"
        )
        made = federation.ctl(
            "backup", "create", "--recipient", recipient, "--out", str(backup), "-o", "json"
        )
        stored_then = count(federation, run, "update_stored")
    assert (made.json["absent"], made.json["bytes"]) == ([], backup.stat().st_size)
    assert made.json["artifacts"] >= len(SITES)

    # The run goes on, beyond what the backup knows; then the machine is gone.
    wait_until(lambda: count(federation, run, "round_finished") >= 2, "the second round's end", every_s=0.01)
    federation.kill_with_compute("coordinator")
    home, dead = federation.server_home, federation.root / "dead"
    operator = shutil.copytree(home / "operator", tmp_path / "operator")
    home.rename(dead)
    verified = federation.command("fedctl", "backup", "verify", str(backup), "--key", str(key), "-o", "json")
    assert (verified.code, verified.json["id"]) == (0, made.json["id"])
    said = federation.command(
        "fedctl", "backup", "restore", str(backup), "--home", str(home), "--key", str(key)
    )
    assert said.code == 0, said
    assert "term 1 is over" in said.out
    shutil.copytree(operator, home / "operator")

    # It serves nobody, and says why, until somebody says what was revoked.
    since = federation.log_size(HELD)
    federation.start_coordinator()
    assert "error[coordinator_held]" in federation.ctl("status", expect=3).err
    assert not healthy(home / "operator")
    wait_until(lambda: "serves nobody until" in federation.log(HELD, since), "the agent is told")
    assert count(federation, run, "update_stored") == stored_then, (
        "the journal is the backup's, and stands still"
    )
    said = federation.command("fedserver", "release", "--home", str(home), "--no-revocations-since")
    assert said.code == 0, said
    wait_until(lambda: healthy(home / "operator"), "it serves")

    ended = federation.wait(run)
    assert (ended.state, ended.reason) == ("DONE", f"{ROUNDS} rounds finished")
    records, expected = federation.rounds(run), federation.rounds(undisturbed)
    assert [record["model"] for record in records] == [record["model"] for record in expected]
    assert [record["impressions_digest"] for record in records] == [
        record["impressions_digest"] for record in expected
    ]
    assert [(record["aggregated"], record["attempts"]) for record in records] == [(len(SITES), 1)] * ROUNDS
    assert count(federation, run, "update_stored") == ROUNDS * len(SITES), "nothing is counted twice"

    # Both ends' logs tell of the restore, and of nothing worse.
    assert federation.ctl("audit", "verify", "-o", "json").json["ok"]
    said = federation.command("fedagent", "audit", "verify", "--home", str(federation.site_home(HELD)))
    assert said.code == 0, said
    assert "the coordinator was restored from a backup, term 2" in said.out
    enrolling = federation.command(
        "fedagent", "enroll", "--home", str(tmp_path / "late"), "--coordinator", token["coordinator"],
        "--token", token["token"], "--ca-fingerprint", token["ca_fingerprint"],
    )  # fmt: skip
    assert (enrolling.code, "error[token_refused]" in enrolling.err) == (4, True)

    # The old machine was only unplugged, and comes back: no site follows it.
    stop_coordinator(federation)
    home.rename(federation.root / "restored")
    dead.rename(home)
    since = federation.log_size(HELD)
    federation.start_coordinator()
    words = "this coordinator is of term 1, but site clinic-a has followed one of term 2"
    wait_until(lambda: words in federation.log(HELD, since), "the site refuses it")
    assert not any(site["connected"] for site in federation.ctl("site", "list", "-o", "json").json["sites"])
    stop_coordinator(federation)
    home.rename(dead)
    (federation.root / "restored").rename(home)
    federation.start_coordinator()
    federation.wait_connected(*SITES)
    listed = federation.command("fedagent", "audit", "list", "--home", str(federation.site_home(HELD)))
    assert listed.out.count("coordinator.refuse") == 1


def moved(credential: Path, copy: Path, old_port: int, port: int) -> Path:
    """A copy of a credential folder, for a coordinator on another port."""
    shutil.copytree(credential, copy)
    settings = copy / "credential.toml"
    settings.write_text(settings.read_text().replace(f":{old_port}", f":{port}"))
    return copy


def test_a_restored_coordinator_serves_nobody_before_it_is_released(
    federation: Federation, tmp_path: Path
) -> None:
    """Beside the one that is backed up, on other ports: no agent finds it."""
    key, backup, home = tmp_path / "backup.key", tmp_path / "lab.fedbackup", tmp_path / "restored"
    recipient = make_key_file(key)
    made = federation.ctl(
        "backup", "create", "--recipient", recipient, "--out", str(backup), "-o", "json"
    ).json
    assert stat.S_IMODE(backup.stat().st_mode) == 0o600
    assert check_backup(backup, from_key_file(key)).header.id == made["id"]
    assert [
        one["id"] for one in federation.ctl("backup", "list", str(tmp_path), "-o", "json").json["backups"]
    ] == [made["id"]]
    restore(home, backup, from_key_file(key), datetime.now(UTC))
    port, enroll_port, metrics_port = free_ports(3)
    config = home / "fedserver.toml"
    text = config.read_text().replace(f"port = {federation.port}\n", f"port = {port}\n")
    shown = federation.metrics_ports["coordinator"]
    text = text.replace(f"port = {shown}\n", f"port = {metrics_port}\n")
    config.write_text(text.replace(f"port = {federation.enroll_port}\n", f"port = {enroll_port}\n"))
    operator = moved(federation.server_home / "operator", tmp_path / "operator", federation.port, port)
    probe = moved(federation.site_home(PROBE) / "credential", tmp_path / "probe", federation.port, port)
    federation.start("restored", "fedserver", "serve", "--home", str(home))
    try:
        wait_until(lambda: "coordinator serves" in federation.log("restored"), "it is up")
        with open_credential(operator) as admin, pytest.raises(HeldError, match="serves nobody until"):
            admin.call(lambda stub: stub.WhoAmI, admin_pb2.WhoAmIRequest())
        with pytest.raises(HeldError):
            hello(probe)
        with pytest.raises(HeldError):
            enrol(enroll_port, load_credential(probe, datetime.now(UTC)).ca_pem)
        assert not healthy(operator)
        release_home(home, Revoked(("operator/nobody",)), datetime.now(UTC))
        wait_until(lambda: healthy(operator), "it serves")
        assert hello(probe).term.number == made["term"] + 1
    finally:
        program = federation.programs.pop("restored")
        program.terminate()
        program.wait(20)


def hello(credential: Path) -> federation_pb2.HelloReply:
    """A site's first words. Raises FedimpresError."""
    with open_sync_channel(credential) as channel:
        try:
            return federation_pb2_grpc.FederationStub(channel).Hello(
                federation_pb2.HelloRequest(protocol=PROTOCOL)
            )
        except grpc.RpcError as error:
            raise from_rpc_error(error, "coordinator") from error


def enrol(port: int, ca_pem: bytes) -> None:
    """A call on the enrolment port. Raises FedimpresError."""
    with open_enrollment_channel(f"127.0.0.1:{port}", ca_pem) as channel:
        try:
            enrollment_pb2_grpc.EnrollmentStub(channel).Enroll(enrollment_pb2.EnrollRequest())
        except grpc.RpcError as error:
            raise from_rpc_error(error, "coordinator") from error
