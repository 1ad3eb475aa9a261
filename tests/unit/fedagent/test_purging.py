"""Impressions at a site: found by what they are, deleted for good, recorded; a task that uses them gives them up."""

import asyncio
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from typer.testing import CliRunner

from fedagent.audit import SiteAudit, open_site_audit
from fedagent.cli import app
from fedagent.driver import AgentDriver
from fedagent.held_impressions import HeldImpressions
from fedagent.purging import Purging
from fedcore.artifact_store import ArtifactStore
from fedcore.audit import OK, Fact
from fedcore.audit_text import document
from fedcore.errors import TransferError
from fedcore.tensor_file import TensorSpec, write_tensor_file
from fedcore.v1 import federation_pb2, tensor_pb2


class Site:
    """A home with one bank, one model, and the beginning of another bank."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store = ArtifactStore(root / "artifacts")
        self.held = HeldImpressions(root / "artifacts")
        self.bank = self.add(images=(2, 1, 4, 4), labels=(2,))
        self.model = self.add(weight=(3,))
        self.part = hashlib.sha256(b"part").hexdigest()
        (root / "artifacts/partial").mkdir()
        whole = self.store.path(self.add(images=(5, 1, 4, 4), labels=(5,)))
        (root / f"artifacts/partial/{self.part}.part").write_bytes(whole.read_bytes()[:-20])
        self.store.delete(whole.stem)
        self.database = open_site_audit(root / "audit.db")
        self.audit = SiteAudit(self.database)
        self.purging = Purging(self.held, self.audit)

    def add(self, **shapes: tuple[int, ...]) -> str:
        path = self.store.new_path()
        specs = {name: TensorSpec(name, "I64" if name == "labels" else "U8", s) for name, s in shapes.items()}
        digest = write_tensor_file(
            path, {name: (spec, bytes(spec.size_bytes)) for name, spec in specs.items()}
        )
        self.store.adopt(path, digest)
        return digest

    def records(self) -> list[dict[str, Any]]:
        return list(map(document, self.audit.log.walk()))

    def order(self, *digests: str) -> federation_pb2.PurgeImpressions:
        return federation_pb2.PurgeImpressions(
            purge="p1", digests=digests, by="olga", reason="a \x1b[31mface"
        )


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path)
    yield made
    made.database.close()


def test_banks_are_known_by_their_tensors_whole_or_in_part(site: Site) -> None:
    (site.root / "artifacts/partial/broken.part").write_bytes(b"\xff" * 40)
    found = {bank.digest: (bank.num_images, bank.whole) for bank in site.held.banks()}
    assert found == {site.bank: (2, True), site.part: (5, False)}


def test_only_impressions_are_erased(site: Site) -> None:
    absent = "0" * 64
    assert site.held.erase([site.model, site.bank, absent, site.part]) == [site.bank, site.part]
    assert site.held.banks() == []
    assert site.model in site.store
    with pytest.raises(TransferError):
        site.held.erase(["../../etc/passwd"])


def test_an_order_is_answered_with_the_record_of_it(site: Site) -> None:
    absent = "0" * 64
    answer = asyncio.run(site.purging.carry_out(site.order(site.bank, absent)))
    assert answer is not None
    assert list(answer.deleted) == [site.bank]
    (record,) = site.records()
    assert (record["action"], record["object"]) == ("impressions.purge", f"artifact/{site.bank}")
    assert record["detail"] == {
        "deleted": 1, "asked": 2, "purge": "p1", "by": "olga", "reason": "a [31mface", "digest_1": site.bank,
    }  # fmt: skip
    assert (answer.audit_head.sequence, answer.audit_head.digest) == (record["sequence"], record["digest"])
    # The answer was lost on its way: it is given again, and nothing is recorded twice.
    assert asyncio.run(site.purging.carry_out(site.order(site.bank, absent))) == answer
    assert len(site.records()) == 1
    # The bank is back, from a backup: that is another deletion.
    assert site.add(images=(2, 1, 4, 4), labels=(2,)) == site.bank
    again = asyncio.run(site.purging.carry_out(site.order(site.bank)))
    assert again is not None
    assert list(again.deleted) == [site.bank]
    assert again.audit_head.sequence == 2


def test_what_can_not_be_done_or_recorded_is_not_confirmed(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(digests: object) -> list[str]:
        raise PermissionError("read-only disk")

    with monkeypatch.context() as patch:
        patch.setattr(site.held, "erase", refuse)
        assert asyncio.run(site.purging.carry_out(site.order(site.bank))) is None
    assert asyncio.run(site.purging.carry_out(site.order("nonsense"))) is None
    assert site.records() == []
    assert site.bank in site.store


class Busy:
    """Tasks that last until they are withdrawn, and then until they are let go: to stop takes time."""

    def __init__(self, held: HeldImpressions) -> None:
        self.held = held
        self.let_go = asyncio.Event()
        self.begun: list[str] = []
        self.ended_with: list[list[str]] = []

    async def train(self, task: federation_pb2.TrainTask) -> None:
        self.begun.append(task.impressions.digest)
        try:
            await asyncio.Event().wait()
        finally:
            await self.let_go.wait()
            self.ended_with.append(self.held.digests())


def train(bank: str) -> federation_pb2.Directive:
    task = federation_pb2.TrainTask(run="blood-1", round=3)
    if bank:
        task.impressions.CopyFrom(tensor_pb2.ArtifactRef(digest=bank))
    return federation_pb2.Directive(train=task)


@pytest.mark.parametrize("asked_anew", [True, False], ids=["asked anew", "not yet asked anew"])
def test_a_task_that_trains_on_them_gives_them_up_first(site: Site, asked_anew: bool) -> None:
    async def story() -> None:
        tasks = Busy(site.held)
        driver = AgentDriver("a", cast(Any, None), 60.0, 1, audit=site.audit, purging=site.purging)
        driver._tasks = cast(Any, tasks)
        driver._obey(train(site.bank))
        await asyncio.sleep(0.01)
        if asked_anew:
            driver._obey(train(""))
        driver._obey(federation_pb2.Directive(purge_impressions=site.order(site.bank)))
        await asyncio.sleep(0.01)
        assert site.bank in site.store, "the task has not ended yet"
        tasks.let_go.set()
        async with asyncio.timeout(10):
            await asyncio.gather(*driver._purges)
        assert site.bank in tasks.ended_with[0], "the task ends before the file goes"
        assert site.bank not in site.store
        if not asked_anew:
            assert tasks.begun == [site.bank]
            driver._obey(train(""))
        await asyncio.sleep(0.01)
        assert tasks.begun == [site.bank, ""]
        sent = []
        while not driver._outbox.empty():
            sent.append(driver._outbox.get_nowait())
        answers = [one.impressions_purged for one in sent if one.HasField("impressions_purged")]
        assert [list(one.deleted) for one in answers] == [[site.bank]]
        assert not [one for one in sent if one.HasField("failed")]
        assert list(sent[-1].impressions_held.digests or sent[-2].impressions_held.digests) == [site.part]
        for work in driver._work.values():
            work.cancel()

    asyncio.run(story())


def command(site: Site, *arguments: str) -> Any:
    return CliRunner().invoke(app, ["impressions", *arguments, "--home", str(site.root)])


def test_a_site_lists_and_purges_by_its_own_hand(site: Site) -> None:
    detail = {"purpose": "impressions", "run": "blood-1", "round": 4}
    site.audit.log.record_now(
        Fact("artifact.receive", "agent", object=f"artifact/{site.bank}", detail=detail)
    )
    listed = command(site, "list")
    assert f"{site.bank}  2 images" in listed.stdout
    assert "run blood-1, round 4" in listed.stdout
    assert "(in part)" in listed.stdout
    refused = command(site, "purge", site.bank[:8])
    assert refused.exit_code == 1
    assert "add --yes" in str(refused.exception)
    assert site.bank in site.store
    assert command(site, "purge", "--all", "--yes", "--reason", "ours").exit_code == 0
    assert site.held.banks() == []
    record = site.records()[-1]
    assert (record["action"], record["result"]) == ("impressions.purge", OK)
    assert record["actor"].startswith("account/")
    assert (record["detail"]["deleted"], record["detail"]["reason"]) == (2, "ours")


def test_the_site_looks_unless_its_policy_forbids_it_and_both_are_recorded(site: Site) -> None:
    sheet = site.root / "sheet.png"
    assert command(site, "preview", site.bank, "--out", str(sheet)).exit_code == 0
    assert sheet.stat().st_mode & 0o777 == 0o600
    (site.root / "policy.toml").write_text("show_impressions = false\n")
    refused = command(site, "preview", site.bank, "--out", str(site.root / "other.png"))
    assert "policy forbids to show" in str(refused.exception)
    assert not (site.root / "other.png").exists()
    assert [(one["action"], one["result"]) for one in site.records()] == [
        ("impressions.preview", OK),
        ("impressions.preview", "permission_denied"),
    ]
