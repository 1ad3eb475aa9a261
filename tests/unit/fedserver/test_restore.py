"""A coordinator's home backed up, restored, held and released; on real files, without a network."""

import asyncio
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from fedcore.artifact_store import ArtifactStore
from fedcore.audit import Fact, Head
from fedcore.audit_heads import head_to_proto
from fedcore.audit_store import AuditLog
from fedcore.backup import keys
from fedcore.backup.files import check_backup
from fedcore.credential import load_credential
from fedcore.database import Database, open_database
from fedcore.enrollment_token import decode_token
from fedcore.errors import (
    BackupError,
    ConfigError,
    ConflictError,
    HeldError,
    IdentityError,
    ProtocolError,
    StorageError,
    TermError,
    TokenError,
)
from fedcore.home_lock import HomeLock
from fedcore.identity import Caller, Subject
from fedcore.pki import issuer_key_id, make_request, new_key, serial_text
from fedcore.plan import validate_plan
from fedcore.term import FIRST_TERM, NO_TERM, Term, term_from_proto, term_to_proto
from fedcore.v1 import federation_pb2
from fedserver import backup as backups
from fedserver import restore as restores
from fedserver import round_events as ev
from fedserver.audit_exchange import AuditExchange
from fedserver.authority import load_authority
from fedserver.backup import back_up_home, snapshot
from fedserver.certificates import Certificates
from fedserver.checks import check_home
from fedserver.config import ServerHome
from fedserver.initialise import initialise
from fedserver.journal import Journal
from fedserver.registry import enrol
from fedserver.restore import Revoked, release_home, restore
from fedserver.schema import MIGRATIONS
from fedserver.terms import Terms
from fedserver.tokens import Tokens

NOW = datetime.now(UTC)
LATER = NOW + timedelta(hours=1)
PLAN = validate_plan({"name": "t", "rounds": 2, "model": {"name": "cnn", "classes": 3, "input": [1, 8, 8]}})


class Place:
    """A coordinator's home with a run that is under way, and what opens its backups."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.home = root / "home"
        initialise(self.home, name="lab", host="127.0.0.1", port=9443, enroll_port=9444, now=NOW)
        self.places = ServerHome(self.home)
        self.recipient = keys.recipient_from_text(keys.make_key_file(root / "key"))
        self.keys = keys.from_key_file(root / "key")

    @contextmanager
    def database(self, home: Path | None = None) -> Iterator[Database]:
        database = open_database(ServerHome(home or self.home).database, MIGRATIONS)
        try:
            yield database
        finally:
            database.close()

    def certificates(self, database: Database, home: Path | None = None) -> Certificates:
        authority = load_authority(ServerHome(home or self.home).pki, "lab")
        return Certificates(database, lambda: authority)

    def issue(self, role: str, name: str) -> Caller:
        with self.database() as database:
            chain = asyncio.run(
                self.certificates(database).issue(Subject("lab", role, name), new_key().public_key())
            )
            database.write_now(lambda c: enrol(c, name, NOW))
        leaf = chain[0]
        return Caller("lab", role, name, serial_text(leaf), leaf.not_valid_after_utc, issuer_key_id(leaf))

    def token(self) -> Any:
        with self.database() as database:
            return decode_token(asyncio.run(self.tokens(database).create("ward-1", 3600)).token)

    def tokens(self, database: Database) -> Tokens:
        authority = load_authority(self.places.pki, "lab")
        return Tokens(database, lambda: authority, coordinator="127.0.0.1:9443", enroll_port=9444)

    def artifact(self, content: bytes) -> str:
        store, digest = ArtifactStore(self.places.artifacts), hashlib.sha256(content).hexdigest()
        path = store.new_path()
        path.write_bytes(content)
        store.adopt(path, digest)
        return digest

    def run_under_way(self, model: str) -> None:
        with self.database() as database:
            journal = Journal(database)
            asyncio.run(journal.submit("t-1", PLAN, request_id=None, submitted_by="ann"))
            started = ev.RunStarted(at=1.0, sites=("a", "b"), synthesises=False)
            initialised = ev.RunInitialised(
                at=2.0, model=model, update_tensors=(("w", "F32", (2, 3)),), local_tensors=(),
                objective="cross_entropy", objective_options_json="{}",
            )  # fmt: skip
            asyncio.run(journal.append([("t-1", started), ("t-1", initialised)]))

    def back_up(self, name: str = "b") -> Path:
        out = self.root / name
        back_up_home(self.home, out, self.recipient, NOW)
        return out

    def restored(self, name: str = "new", backup: str = "b", **terms: Any) -> Path:
        restore(self.root / name, self.root / backup, self.keys, LATER, **terms)
        return self.root / name


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def check(certificates: Certificates, caller: Caller) -> bool:
    try:
        certificates.check(caller)
    except IdentityError:
        return False
    return True


def test_everything_that_serves_comes_back(place: Place) -> None:
    model, gone, stray = place.artifact(b"model"), "ab" * 32, place.artifact(b"nobody needs this")
    place.run_under_way(model)
    site = place.issue("site", "ward-1")
    before = {p.name: p.read_bytes() for p in place.places.pki.iterdir()}
    place.back_up()
    checked = check_backup(place.root / "b", place.keys)
    assert (checked.manifest.artifacts, checked.manifest.absent) == (1, ())
    new = ServerHome(place.restored())
    assert {p.name: p.read_bytes() for p in new.pki.iterdir()} == before
    assert new.config.read_bytes() == place.places.config.read_bytes()
    assert load_credential(new.credential, NOW).subject.role == "coordinator"
    assert list(check_home(new.root, NOW))
    store = ArtifactStore(new.artifacts)
    assert set(store.digests()) == {model}, f"neither {stray} nor {gone}"
    assert store.intact(model)
    with place.database(new.root) as database:
        ((submission, state),) = Journal(database).replay()
        assert (submission.run, state.model) == ("t-1", model)
        assert check(place.certificates(database, new.root), site)
    for path in new.root.rglob("*"):
        assert path.stat().st_mode & 0o077 == 0 or path.suffix == ".safetensors" or "tmp" in path.parts, path
    assert not new.operator.exists(), "people's credentials are theirs to keep"
    assert not list(place.home.glob(".backup-*"))


def test_missing_and_damaged_artifacts_are_told_rather_than_kept(place: Place) -> None:
    model = place.artifact(b"model")
    place.run_under_way(model)
    store = ArtifactStore(place.places.artifacts)
    store.path(model).write_bytes(b"rotten")
    place.back_up()
    assert check_backup(place.root / "b", place.keys).manifest.absent == (model,)
    store.delete(model)
    place.back_up("c")
    assert check_backup(place.root / "c", place.keys).manifest.absent == (model,)


def test_an_artifact_deleted_meanwhile_has_the_state_taken_again(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The round ends between the copy of the database and the links: the next copy names another artifact."""
    model, next_model = place.artifact(b"model"), place.artifact(b"next model")
    place.run_under_way(model)
    store, copy, copies = ArtifactStore(place.places.artifacts), backups.copy_database, []

    def copy_then_move_on(path: Path, target: Path) -> None:
        copy(path, target)
        copies.append(target)
        if len(copies) == 1:
            with place.database() as database:
                database.write_now(
                    lambda c: c.execute("UPDATE journal SET body = replace(body, ?, ?)", (model, next_model))
                )
            store.delete(model)

    monkeypatch.setattr(backups, "copy_database", copy_then_move_on)
    with snapshot(place.places, "lab", store, NOW) as taken:
        store.delete(next_model)  # the coordinator goes on; the snapshot keeps its link
        assert (taken.artifacts, taken.absent, len(copies)) == (1, (), 2)
        assert [s.path.read_bytes() for s in taken.sources if "artifacts" in s.member.name] == [b"next model"]
    assert not list(place.home.glob(".backup-*"))


def test_a_running_coordinators_home_is_not_backed_up_from_outside(place: Place) -> None:
    with HomeLock(place.places.lock), pytest.raises(ConflictError, match="already served by process"):
        place.back_up()


def test_a_restore_begins_a_term_is_held_and_voids_open_tokens(place: Place) -> None:
    token = place.token()
    place.back_up()
    done = restore(place.root / "new", place.root / "b", place.keys, LATER)
    assert (done.before, done.term.number, done.voided_tokens) == (FIRST_TERM, 2, 1)
    with place.database(place.root / "new") as database:
        terms = Terms(database)
        assert terms.current() == done.term
        with pytest.raises(HeldError, match="serves nobody until"):
            terms.check_released()
        with pytest.raises(TokenError, match="expired"):
            tokens = place.tokens(database)
            tokens._clock = lambda: LATER
            asyncio.run(tokens.redeem(token.id, token.secret, make_request(new_key(), "x").decode()))
        (record,) = [
            e.document for e in AuditLog(database).walk() if e.document["action"] == "coordinator.restore"
        ]
        assert record["detail"]["before"] == "term 1"
    with place.database() as database:
        assert not Terms(database).held(), "the home that was backed up is as it was"


@pytest.mark.parametrize("damage", ["cut", "key", "newer", "used"])
def test_what_can_not_be_restored_leaves_nothing(
    place: Place, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, new, opens = place.back_up(), place.root / "new", place.keys
    kind: type[Exception] = BackupError
    if damage == "cut":
        out.write_bytes(out.read_bytes()[:-5])
    elif damage == "key":
        keys.make_key_file(place.root / "other")
        opens = keys.from_key_file(place.root / "other")
    elif damage == "newer":
        kind = StorageError
        monkeypatch.setattr(restores, "MIGRATIONS", MIGRATIONS[:-1])
    else:
        kind = ConflictError
        new.mkdir()
        (new / "x").touch()
    before = sorted(place.root.rglob("*"))
    with pytest.raises(kind):
        restore(new, out, opens, LATER)
    assert sorted(place.root.rglob("*")) == before


def test_revocations_made_since_are_taken_in_before_anybody_is_served(place: Place) -> None:
    stolen, family, fine = (
        place.issue("site", "ward-1"),
        place.issue("site", "ward-2"),
        place.issue("site", "ward-3"),
    )
    with place.database() as database:
        csr = make_request(new_key(), "x").decode()
        renewed = serial_text(asyncio.run(place.certificates(database).renew(family, csr))[0])
    place.back_up()
    unknown = place.issue("site", "ward-9")
    new = place.restored()
    for names in (("x",), ("abc",), ("site/",), ("coordinator/x",)):
        with pytest.raises(ConfigError):
            release_home(new, Revoked(names), LATER)
    with place.database(new) as database:
        assert Terms(database).held(), "nothing was changed"
    names = ("site/ward-1", family.serial[:12], unknown.serial)
    done = release_home(new, Revoked(names), LATER)
    assert set(done.ended) == {stolen.serial, family.serial, renewed}
    assert done.unknown == (unknown.serial,)
    with place.database(new) as database:
        certificates = place.certificates(database, new)
        assert [check(certificates, one) for one in (stolen, family, unknown, fine)] == [
            False,
            False,
            False,
            True,
        ]
        assert not Terms(database).held()
        last = list(AuditLog(database).walk())[-1].document
        assert (last["action"], last["detail"]["not_in_registry"]) == ("coordinator.release", unknown.serial)
    with pytest.raises(ConflictError, match="is not held"):
        release_home(new, Revoked(), LATER)


def test_a_certificate_issued_after_the_backup_is_told_why_it_is_refused(place: Place) -> None:
    place.back_up()
    late = place.issue("site", "ward-1")
    new = place.restored()
    with (
        place.database(new) as database,
        pytest.raises(IdentityError, match="not in this coordinator") as caught,
    ):
        place.certificates(database, new).check(late)
    assert "after the backup" in caught.value.hint


def test_what_is_looked_up_while_held_is_looked_up_again(place: Place) -> None:
    """A health check is answered while held: its caller may be revoked by the release, in another process."""
    site = place.issue("site", "ward-1")
    place.back_up()
    new = place.restored()
    with place.database(new) as database:
        certificates, terms = place.certificates(database, new), Terms(database)
        assert check(certificates, site)
        release_home(new, Revoked(("site/ward-1",)), LATER)
        with pytest.raises(HeldError):
            terms.check_released()
        certificates.forget_checked()
        terms.let_in()
        terms.check_released()
        assert not check(certificates, site)


# -- terms --------------------------------------------------------------------------------------------


def test_the_newest_restore_counts_also_of_two_from_one_backup(place: Place) -> None:
    place.back_up()
    one = restore(place.root / "one", place.root / "b", place.keys, LATER).term
    two = restore(place.root / "two", place.root / "b", place.keys, LATER + timedelta(minutes=1)).term
    assert NO_TERM < FIRST_TERM < one < two
    assert (one.number, two.number) == (2, 2)
    far = restore(place.root / "far", place.root / "b", place.keys, LATER, at_least=7).term
    assert far.number == 7
    assert str(FIRST_TERM) == "term 1"
    assert str(two).startswith("term 2 (began 20")


def test_terms_cross_the_wire_and_nonsense_does_not() -> None:
    term = Term(3, 1_700_000_000_123)
    assert term_from_proto(term_to_proto(term), "a") == term
    assert term_from_proto(federation_pb2.HelloRequest().newest_term, "a") == NO_TERM
    for number, began in ((2**40, 0), (1, -1), (1, 2**60)):
        with pytest.raises(ProtocolError, match="is not a term"):
            term_from_proto(federation_pb2.Term(number=number, began_unix_ms=began), "a")


class Exchange:
    """Hellos of the site ward-1 with a restored coordinator."""

    def __init__(self, database: Database) -> None:
        self.log = AuditLog(database)
        self._exchange = AuditExchange(database, self.log)

    def hello(self, known: Term, kept: Head) -> Any:
        request = federation_pb2.HelloRequest(
            kept_audit_head=head_to_proto(kept), newest_term=term_to_proto(known)
        )
        return asyncio.run(self._exchange.hello("ward-1", request))

    @property
    def contradictions(self) -> list[int]:
        return [one.head.sequence for one in self.log.known()]


def test_records_lost_by_the_restore_are_no_contradiction_and_older_ones_are(place: Place) -> None:
    with place.database() as database:
        log = AuditLog(database)
        kept = [log.record_now(Fact("run.submit", "operator/ann")) for _ in range(3)]
    place.back_up()  # a record more, after the copy
    with place.database() as database:
        lost = [AuditLog(database).record_now(Fact("run.abort", "operator/ann")) for _ in range(9)][-1]
    with place.database(place.restored()) as database:
        exchange = Exchange(database)
        term = exchange.hello(FIRST_TERM, lost).term
        assert term.number == 2
        exchange.hello(NO_TERM, lost)  # an agent of version 1.0 knows no term
        assert exchange.contradictions == [], "lost by the restore, and known to be"
        exchange.hello(FIRST_TERM, kept[-1])
        assert exchange.contradictions == [3], "a claim that holds"
        exchange.hello(FIRST_TERM, Head(2, "cd" * 32))
        assert exchange.contradictions == [3, 2], "before the backup there is no excuse"
        other = AuditLog(database).record_now(Fact("run.submit", "operator/ann"))
        exchange.hello(term, Head(other.sequence, "ef" * 32))
        assert len(exchange.contradictions) == 2, "the first contradiction stays"
        exchange.hello(term, other)
        assert other.sequence in exchange.contradictions, "in its own term the log is held to as ever"


def test_a_site_that_follows_a_newer_term_refuses_and_is_told_how_to_go_on(place: Place) -> None:
    with place.database() as database:
        with pytest.raises(
            TermError, match="is of term 1, but site ward-1 has followed one of term 2"
        ) as caught:
            Exchange(database).hello(Term(2, 5), Head())
        assert "--term 3" in caught.value.hint
