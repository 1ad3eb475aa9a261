"""Impressions as sensitive data, over a real federation: who may look, what is recorded, what a purge leaves: nothing."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fedagent.audit import site_log
from fedcore.audit_text import document
from fedcore.errors import NotFoundError, PermissionDeniedError
from fedcore.v1 import access_pb2, admin_pb2, impressions_pb2
from fedctl.admin import open_credential
from fedctl.impression_commands import fetch_bank, get_bank
from tests.federation_fixture import SITES, Federation, digits_plan, wait_until

HERE, AWAY = SITES[:2]


def plan(seed: int, rounds: int) -> dict[str, Any]:
    return digits_plan(
        (HERE, AWAY), name="pictures", strategy="fedimpres", seed=seed, rounds=rounds,
        synthesis={"warmup_rounds": 1, "images": 10},
    )  # fmt: skip


def operator(lab: Federation, name: str, role: str) -> Path:
    """Another operator with one role; gives its credential folder."""
    folder = lab.root / f"operator-{name}"
    home = ("--home", str(lab.server_home))
    said = lab.command("fedserver", "operator", *home, "--id", name, "--out", str(folder))
    assert said.code == 0, said
    request = access_pb2.ChangeRoleRequest(operator=name, role=role)
    with lab.admin() as admin:
        admin.call(lambda _: admin.access.GrantRole, request)
    return folder


def bank(lab: Federation, run: str, round_: int = 0) -> Any:
    with lab.admin() as admin:
        return get_bank(admin, run, round_)


def on_disk(home: Path, digests: set[str]) -> set[str]:
    """Those of the digests of which a file lies anywhere below a home, whole or in part."""
    return {d for d in digests for path in home.rglob(f"*{d}*") if path.is_file()}


def site_records(lab: Federation, site: str, action: str) -> list[dict[str, Any]]:
    with site_log(lab.site_home(site) / "audit.db") as log:
        return [one for one in map(document, log.walk()) if one["action"] == action]


def control(lab: Federation, method: str, run: str) -> None:
    with lab.admin() as admin:
        admin.call(lambda stub: getattr(stub, method), admin_pb2.ControlRunRequest(run=run))


def confirmed(lab: Federation, run: str) -> set[str]:
    return {site.site for site in bank(lab, run).purge.sites if site.confirmed_at}


def test_who_may_look_is_recorded_and_a_purge_reaches_every_disk(
    federation: Federation, tmp_path: Path
) -> None:
    lab = federation
    run = lab.submit(plan(seed=471, rounds=3))
    assert lab.wait(run).state == "DONE"
    rows = lab.ctl("impression", "list", run, "-o", "json").json["banks"]
    assert len(rows) > 1
    assert all(row["state"] == "stored" and 0 < row["num_images"] <= 10 for row in rows)
    digests = {row["digest"] for row in rows}
    trained_on = rows[-2]
    assert {one["site"] for one in trained_on["holders"] if one["copy"] == "holds"} == {HERE, AWAY}
    shown = lab.ctl("impression", "show", run, "--round", str(trained_on["round"]), "-o", "json").json
    assert sum(shown["classes"].values()) == sum(shown["born"].values()) == shown["num_images"]
    assert {one["site"] for one in shown["checks"]} == {HERE, AWAY}

    # Looking takes the role; who tried is recorded, with what and the result.
    newest = bank(lab, run)
    for name, role, allowed in (
        ("pia", "viewer", False),
        ("otto", "operator", False),
        ("anton", "auditor", True),
    ):
        with open_credential(operator(lab, name, role)) as admin:
            if allowed:
                fetch_bank(admin, newest, tmp_path / "bank.safetensors")
                with pytest.raises(PermissionDeniedError, match="granted to owner"):
                    admin.call(
                        lambda _, admin=admin: admin.impressions.PurgeImpressions,
                        impressions_pb2.PurgeImpressionsRequest(run=run, all=True, reason="x"),
                    )
                continue
            with pytest.raises(PermissionDeniedError, match="PreviewImpressions"):
                fetch_bank(admin, newest, tmp_path / "bank.safetensors")
            download = admin_pb2.DownloadRequest(digest=newest.digest)
            with pytest.raises(PermissionDeniedError, match="may not see impressions"):
                list(admin.stream(lambda stub: stub.Download, download))
    sheet = tmp_path / "sheet.png"
    lab.ctl("impression", "preview", run, "--out", str(sheet))
    with Image.open(sheet) as picture:
        assert (picture.format, picture.width) == ("PNG", 1340)
    assert sheet.stat().st_mode & 0o777 == 0o600

    # A purge while one site is away.
    arguments = ("impression", "purge", run, "--all", "--reason", "a face was recognised", "--yes")
    assert on_disk(lab.server_home, digests) == digests
    held = on_disk(lab.site_home(AWAY), digests)
    assert held == {trained_on["digest"]} == on_disk(lab.site_home(HERE), digests)
    lab.kill(AWAY)
    assert AWAY in lab.ctl(*arguments).err
    assert on_disk(lab.server_home, digests) == set()
    wait_until(lambda: confirmed(lab, run) == {HERE}, "the connected site's word")
    assert on_disk(lab.site_home(HERE), digests) == set()
    assert on_disk(lab.site_home(AWAY), digests) == held
    with lab.admin() as admin:
        with pytest.raises(NotFoundError, match=r"purged at 20.* by admin: a face"):
            list(admin.stream(lambda stub: stub.Download, admin_pb2.DownloadRequest(digest=newest.digest)))
        with pytest.raises(NotFoundError, match=r"purged at 20.* by admin: a face"):
            fetch_bank(admin, newest, tmp_path / "again.safetensors")

    # The journal names digests that are gone: a coordinator that starts anew knows it, and still asks the site.
    lab.kill("coordinator")
    lab.start_coordinator()
    shown = lab.ctl("impression", "show", run).out
    assert f"site {AWAY}" in shown
    assert "outstanding: it is asked when it connects" in shown
    lab.start_agent(AWAY)
    wait_until(lambda: confirmed(lab, run) == {HERE, AWAY}, "the word of the site that was away")
    assert on_disk(lab.site_home(AWAY), digests) == set()

    # Both logs prove it, each by itself and one by the other.
    purge = bank(lab, run).purge.purge
    found = lab.ctl("audit", "list", "--action", "impressions.", "-o", "json").json["records"]
    assert [(one["actor"], one["action"], one["result"]) for one in found] == [
        ("operator/pia", "impressions.preview", "permission_denied"),
        ("operator/otto", "impressions.preview", "permission_denied"),
        ("operator/anton", "impressions.preview", "ok"),
        ("operator/anton", "impressions.purge", "permission_denied"),
        ("operator/admin", "impressions.preview", "ok"),
        ("operator/admin", "impressions.purge", "ok"),
        (f"site/{HERE}", "impressions.purged", "ok"),
        ("operator/admin", "impressions.preview", "not_found"),
        (f"site/{AWAY}", "impressions.purged", "ok"),
    ]
    assert found[2]["object"] == f"artifact/{newest.digest}"
    assert found[5]["object"] == f"run/{run}"
    assert digests <= set(map(str, found[5]["detail"].values()))
    for site, told in ((HERE, found[6]), (AWAY, found[8])):
        (mine,) = [
            one for one in site_records(lab, site, "impressions.purge") if one["detail"]["purge"] == purge
        ]
        assert mine["detail"]["digest_1"] == trained_on["digest"]
        assert mine["detail"]["reason"] == "a face was recognised"
        assert told["detail"]["site_head"] == f"{mine['sequence']}:{mine['digest']}"
    assert lab.ctl("audit", "verify").code == 0


def test_a_run_under_way_goes_on_without_a_bank_where_that_is_forced(federation: Federation) -> None:
    lab = federation
    run = lab.submit(plan(seed=472, rounds=8))
    held = lab.compute_pid(AWAY)
    made = 0
    while not made:  # the first model may be too early for impressions
        lab.wait_phase(run, "training")
        control(lab, "PauseRun", run)
        lab.wait_phase(run, "PAUSED")
        made = max((one["round"] for one in lab.rounds(run) if one["impressions_digest"]), default=0)
        if not made:
            control(lab, "ResumeRun", run)
    digest = bank(lab, run).digest
    os.kill(held, signal.SIGSTOP)  # the round to come can't end before this goes on
    try:
        control(lab, "ResumeRun", run)
        wait_until(
            lambda: on_disk(lab.site_home(AWAY), {digest}) and on_disk(lab.site_home(HERE), {digest}),
            "both sites have the bank",
        )
        arguments = ("impression", "purge", run, "--round", str(made), "--reason", "test", "--yes")
        refused = lab.ctl(*arguments, expect=7)
        assert "under way" in refused.err
        assert "--force" in refused.err
        assert on_disk(lab.server_home, {digest}) == {digest}
        lab.ctl(*arguments, "--force")
        wait_until(
            lambda: {s.site for s in bank(lab, run, made).purge.sites if s.confirmed_at} == {HERE, AWAY},
            "both",
        )
        for home in (lab.server_home, lab.site_home(HERE), lab.site_home(AWAY)):
            assert on_disk(home, {digest}) == set()
    finally:
        if lab.compute_pid(AWAY) == held:
            os.kill(held, signal.SIGCONT)
    wait_until(lambda: lab.run(run).round > made, "the round without a bank is over")
    before, after = lab.rounds(run)[made - 1 : made + 1]
    assert before["impressions_digest"] == digest
    assert after["impressions"]["used"][AWAY] == 0
    assert after["aggregated"] == 2
    assert after["missing"] == {}
