"""What a real coordinator refuses a real site, over mutual TLS, while a run waits for its update: the error on
the caller's side, the line in the coordinator's log, and that nothing was changed.
"""

import hashlib
import json
import queue
import threading
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedcore.channel import open_sync_channel
from fedcore.errors import (
    ConflictError,
    DigestMismatchError,
    FedimpresError,
    IdentityError,
    NonFiniteError,
    NotFoundError,
    PermissionDeniedError,
    PlanError,
    ProtocolError,
    TensorMismatchError,
    TransferError,
    TruncatedStreamError,
)
from fedcore.protocol import PROTOCOL, SESSION_KEY
from fedcore.status import from_rpc_error
from fedcore.tensor_file import TensorManifest, TensorSpec
from fedcore.tensor_stream import manifest_to_proto
from tests.federation_fixture import (
    CLASSES,
    PROBE,
    SITES,
    Federation,
    configure_agent,
    digits_plan,
    load_arrays,
    noop_plan,
    wait_until,
)

# isort: split
import grpc

from fedcore.v1 import admin_pb2, admin_pb2_grpc, federation_pb2, federation_pb2_grpc, tensor_pb2

PARAMS = 400_000
CHUNK = 64 << 10
Part = federation_pb2.DeliverPart


class Probe:
    """A site's side of the protocol, spoken by hand with the site's own credential."""

    def __init__(self, federation: Federation) -> None:
        self.federation = federation
        self.channel = open_sync_channel(federation.site_home(PROBE) / "credential")
        self.stub = federation_pb2_grpc.FederationStub(self.channel)
        self._outbox: queue.SimpleQueue[federation_pb2.AgentMessage | None] = queue.SimpleQueue()

    def connect(self, **capabilities: Any) -> None:
        """Hello, then the directive stream."""
        able = {
            "models": ["noop", "cnn"],
            "objectives": ["cross_entropy"],
            "datasets": ["npz"],
            **capabilities,
        }
        reply = self.stub.Hello(
            federation_pb2.HelloRequest(protocol=PROTOCOL, capabilities=federation_pb2.Capabilities(**able))
        )
        self.directives = self.stub.Directives(
            iter(self._outbox.get, None), metadata=((SESSION_KEY, reply.session),)
        )

    def say(self, **message: Any) -> None:
        self._outbox.put(federation_pb2.AgentMessage(**message))

    def next_train(self) -> federation_pb2.TrainTask:
        """The next training task that the coordinator sends."""
        for directive in self.directives:
            if directive.WhichOneof("directive") == "train":
                return directive.train
        raise AssertionError("the stream ended")

    def close(self) -> None:
        self._outbox.put(None)
        self.channel.close()


@dataclass
class Update:
    """Bytes to deliver, and what is said of them; a test changes one thing."""

    key: federation_pb2.DeliveryKey
    manifest: TensorManifest
    payload: bytes

    def parts(self, offset: int = 0, *, end: int | None = None, **header: Any) -> Iterator[Part]:
        """The header, then chunks from `offset` up to `end`; `header` replaces fields of the header."""
        fields: dict[str, Any] = {
            "key": self.key,
            "manifest": manifest_to_proto(self.manifest, self.key.digest),
            "report": federation_pb2.UpdateReport(num_examples=5, num_steps=1, seconds=0.1),
            "offset": offset,
        }
        yield Part(header=federation_pb2.DeliveryHeader(**{**fields, **header}))
        yield from self.chunks(offset, end)

    def chunks(self, offset: int = 0, end: int | None = None) -> Iterator[Part]:
        payload = self.payload[:end]
        for start in range(offset, len(payload), CHUNK):
            yield Part(chunk=tensor_pb2.Chunk(offset=start, data=payload[start : start + CHUNK]))

    def changed(self, payload: bytes | None = None, specs: Iterable[TensorSpec] | None = None) -> "Update":
        """The same with other bytes or tensors, under the digest that these really have."""
        payload = self.payload if payload is None else payload
        manifest = self.manifest if specs is None else TensorManifest.of(specs)
        key = federation_pb2.DeliveryKey()
        key.CopyFrom(self.key)
        key.digest = hashlib.sha256(manifest.header() + payload).hexdigest()
        return Update(key, manifest, payload)


@dataclass
class Waiting:
    """A run in its first round that waits for the probe's update, and an update it would take."""

    federation: Federation
    probe: Probe
    run: str
    task: federation_pb2.TrainTask
    update: Update

    def deliver(self, parts: Iterable[Part]) -> federation_pb2.DeliverReply:
        return self.call(lambda: self.probe.stub.Deliver(iter(parts), timeout=270))

    def finish(self) -> Any:
        """Report figures once they are asked for, and wait for the end of the run."""
        self.federation.wait_phase(self.run, "evaluating")
        metrics = federation_pb2.SplitMetrics(split="test", num_examples=4, num_correct=3, loss_sum=1.0)
        self.probe.say(evaluation=federation_pb2.EvaluationReport(run=self.run, round=1, splits=[metrics]))
        return self.federation.wait(self.run)

    def offset(self, update: Update) -> federation_pb2.DeliveryOffsetReply:
        request = federation_pb2.DeliveryOffsetRequest(key=update.key)
        return self.call(lambda: self.probe.stub.DeliveryOffset(request))

    def refused(self, parts: Iterable[Part], kind: type[FedimpresError]) -> str:
        """Deliver what must be refused: a clear error here, the same words in the log there, nothing changed."""
        since = self.federation.log_size("coordinator")
        before = self.federation.journal(self.run)
        with pytest.raises(FedimpresError) as caught:
            self.deliver(parts)
        assert type(caught.value) is kind, caught.value
        wait_until(
            lambda: _logged(self.federation.log("coordinator", since), caught.value.message),
            "the refusal stands in the log",
        )
        assert self.federation.journal(self.run) == before
        assert "update_stored" not in before
        assert self.federation.run(self.run).phase == "training"
        return caught.value.message

    def call(self, function: Any) -> Any:
        try:
            return function()
        except grpc.RpcError as error:
            raise from_rpc_error(error, "coordinator") from error


@pytest.fixture
def waiting(federation: Federation) -> Iterator[Waiting]:
    probe = Probe(federation)
    probe.connect()
    run = federation.submit(noop_plan(PARAMS, (PROBE,), rounds=1))
    task = probe.next_train()
    model = list(probe.stub.Fetch(federation_pb2.FetchRequest(digest=task.model.digest)))
    specs = [
        TensorSpec(t.name, tensor_pb2.DType.Name(t.dtype).removeprefix("DTYPE_"), tuple(t.shape))
        for t in model[0].manifest.tensors
    ]
    payload = b"".join(part.chunk.data for part in model[1:])
    digest = hashlib.sha256(TensorManifest.of(specs).header() + payload).hexdigest()
    assert digest == task.model.digest == model[0].manifest.digest
    key = federation_pb2.DeliveryKey(run=run, round=1, site=PROBE, digest=digest)
    made = Waiting(federation, probe, run, task, Update(key, TensorManifest.of(specs), payload))
    made.update = made.update.changed(payload=_set_float(payload, 0, 0.25))
    try:
        yield made
    finally:
        federation.abort_all()
        probe.close()


def _logged(log: str, message: str) -> bool:
    """Whether the coordinator logged a refusal with these words, and of whom."""
    lines = [json.loads(line) for line in log.splitlines() if '"rpc refused"' in line]
    return any(line["error"].startswith(message) and line["caller"] == f"site/{PROBE}" for line in lines)


def _set_float(payload: bytes, at: int, value: float) -> bytes:
    return payload[:at] + np.float32(value).tobytes() + payload[at + 4 :]


def test_a_good_update_is_accepted_once_and_answered_again(waiting: Waiting) -> None:
    """The control of everything below."""
    outcome = federation_pb2.DeliverReply
    assert waiting.deliver(waiting.update.parts()).outcome == outcome.OUTCOME_STORED
    assert waiting.deliver(waiting.update.parts()).outcome == outcome.OUTCOME_ALREADY_STORED
    assert waiting.finish().state == "DONE"
    assert waiting.federation.rounds(waiting.run)[0]["accuracy"] == 0.75
    assert waiting.federation.journal(waiting.run).count("update_stored") == 1
    assert waiting.deliver(waiting.update.parts()).outcome == outcome.OUTCOME_TOO_LATE
    assert waiting.federation.rounds(waiting.run)[0]["bytes_up"] == len(waiting.update.payload)


def test_a_site_may_not_deliver_or_ask_as_another(waiting: Waiting) -> None:
    update = waiting.update
    update.key.site = SITES[0]
    message = waiting.refused(update.parts(), PermissionDeniedError)
    assert message == f"{PROBE} may not deliver for '{SITES[0]}'"
    with pytest.raises(PermissionDeniedError):
        waiting.offset(update)


def test_tensors_that_are_not_the_expected_ones_are_refused_before_a_byte_is_taken(waiting: Waiting) -> None:
    update = waiting.update
    first, *rest = update.manifest.tensors
    flat = TensorSpec(first.name, first.dtype, (1, *first.shape))
    other_dtype = TensorSpec(first.name, "I32", first.shape)
    renamed = TensorSpec("zzz." + first.name, first.dtype, first.shape)
    extra = TensorSpec("zzz", "U8", (8,))
    cases = [
        ([flat, *rest], f"tensor '{first.name}' has shape {list(flat.shape)}, expected {list(first.shape)}"),
        ([other_dtype, *rest], f"tensor '{first.name}' has dtype I32, expected F32"),
        ([renamed, *rest], f"tensor '{first.name}' is missing"),
        (rest, f"tensor '{first.name}' is missing ({len(rest)} tensors, expected {len(rest) + 1})"),
        ([first, *rest, extra], "tensor 'zzz' is not expected"),
    ]
    for specs, expected in cases:
        message = waiting.refused(update.changed(specs=specs).parts(), TensorMismatchError)
        assert message.startswith(f"{PROBE} round 1: ")
        assert expected in message
    assert not list((waiting.federation.server_home / "spool").glob(f"*~{PROBE}~*"))


def test_a_manifest_that_lies_about_sizes_or_order_is_refused(waiting: Waiting) -> None:
    def lying(change: Any) -> tensor_pb2.Manifest:
        manifest = manifest_to_proto(waiting.update.manifest, waiting.update.key.digest)
        change(manifest)
        return manifest

    def huge(manifest: tensor_pb2.Manifest) -> None:
        manifest.tensors[0].shape[:] = [2**62, 2**62]

    def negative(manifest: tensor_pb2.Manifest) -> None:
        manifest.tensors[0].shape[0] = -1

    def size(manifest: tensor_pb2.Manifest) -> None:
        manifest.tensors[0].size_bytes += 4

    def order(manifest: tensor_pb2.Manifest) -> None:
        tensors = list(manifest.tensors)[::-1]
        del manifest.tensors[:]
        manifest.tensors.extend(tensors)

    def total(manifest: tensor_pb2.Manifest) -> None:
        manifest.payload_bytes += 1

    for change, expected in (
        (huge, "bytes in all"), (negative, "is not valid"), (size, "declares"), (order, "canonical order"),
        (total, "manifest declares"),
    ):  # fmt: skip
        message = waiting.refused(waiting.update.parts(manifest=lying(change)), TensorMismatchError)
        assert expected in message


def test_bytes_that_are_not_those_of_the_digest_are_refused_and_dropped(waiting: Waiting) -> None:
    update = waiting.update
    other = Update(update.key, update.manifest, _set_float(update.payload, 4000, 1.5))
    message = waiting.refused(other.parts(), DigestMismatchError)
    assert update.key.digest in message
    assert (waiting.offset(update).offset, waiting.offset(update).stored) == (0, False)
    manifest = manifest_to_proto(update.manifest, "0" * 64)
    assert "differs" in waiting.refused(update.parts(manifest=manifest), TransferError)
    update.key.digest = "../../../etc/passwd"
    assert "is not a SHA-256 digest" in waiting.refused(update.parts(), TransferError)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_are_refused_by_name(waiting: Waiting, value: float) -> None:
    update = waiting.update
    last = update.manifest.tensors[-1]
    poisoned = update.changed(payload=_set_float(update.payload, len(update.payload) - 4, value))
    message = waiting.refused(poisoned.parts(), NonFiniteError)
    assert message == f"{PROBE} round 1: tensor '{last.name}' holds NaN or Inf; update discarded"
    assert waiting.offset(poisoned).offset == 0
    report = federation_pb2.UpdateReport(num_examples=5, train_loss=value)
    assert "its report holds" in waiting.refused(update.parts(report=report), NonFiniteError)
    check = federation_pb2.ImpressionCheck(num_checked=3, pixel_limit=0.3, pixel_smallest=value)
    report = federation_pb2.UpdateReport(num_examples=5, impression_check=check)
    assert "pixel_smallest" in waiting.refused(update.parts(report=report), NonFiniteError)


def test_a_report_of_no_images_is_refused(waiting: Waiting) -> None:
    for number in (0, -5):
        report = federation_pb2.UpdateReport(num_examples=number)
        assert f"trained on {number} images" in waiting.refused(
            waiting.update.parts(report=report), TransferError
        )


def test_a_truncated_stream_is_refused_and_resumed_from_its_offset(waiting: Waiting) -> None:
    update, half = waiting.update, 10 * CHUNK
    message = waiting.refused(update.parts(end=half), TruncatedStreamError)
    assert f"stream ended after {half} of {len(update.payload)} bytes" in message
    assert waiting.offset(update).offset == half
    assert waiting.deliver(update.parts(half)).outcome == federation_pb2.DeliverReply.OUTCOME_STORED
    assert waiting.finish().state == "DONE"


def test_a_connection_that_is_cut_is_resumed_from_its_offset(waiting: Waiting) -> None:
    """The client goes away in the middle of the stream, without an end."""
    update = waiting.update
    over = threading.Event()
    call = waiting.probe.stub.Deliver.future(_endless(update.parts(end=4 * CHUNK), over))
    wait_until(lambda: waiting.offset(update).offset == 4 * CHUNK, "four chunks are there")
    call.cancel()
    over.set()
    assert waiting.deliver(update.parts(4 * CHUNK)).outcome == federation_pb2.DeliverReply.OUTCOME_STORED


def test_a_newer_stream_ends_the_older_at_once(waiting: Waiting) -> None:
    """A reconnect meets its own half-open upload: it need not wait until the old connection is given up."""
    update = waiting.update
    over = threading.Event()
    older = waiting.probe.stub.Deliver.future(_endless(update.parts(end=4 * CHUNK), over))
    wait_until(lambda: waiting.offset(update).offset == 4 * CHUNK, "four chunks are there")
    assert waiting.deliver(update.parts(4 * CHUNK)).outcome == federation_pb2.DeliverReply.OUTCOME_STORED
    error = older.exception(timeout=270)
    over.set()
    assert isinstance(from_rpc_error(error, "coordinator"), ConflictError)


def _endless(parts: Iterable[Part], over: threading.Event) -> Iterator[Part]:
    """Parts, then silence."""
    yield from parts
    over.wait(120)


def test_gaps_and_broken_order_are_refused(waiting: Waiting) -> None:
    update = waiting.update
    header, *chunks = update.parts()
    gap = [header, *chunks[:2], *chunks[3:]]
    assert f"chunk at byte {3 * CHUNK}, expected byte {2 * CHUNK}" in waiting.refused(
        gap, TruncatedStreamError
    )
    repeated = [next(update.parts(2 * CHUNK)), chunks[1]]
    assert "expected byte" in waiting.refused(repeated, TruncatedStreamError)
    crooked = Part(chunk=tensor_pb2.Chunk(offset=2 * CHUNK, data=b"12345"))
    assert "multiple of 8" in waiting.refused([header, crooked], TruncatedStreamError)
    too_long = Part(chunk=tensor_pb2.Chunk(offset=2 * CHUNK, data=bytes(len(update.payload))))
    assert "expected" in waiting.refused([header, too_long], TensorMismatchError)
    assert waiting.deliver(update.parts()).outcome == federation_pb2.DeliverReply.OUTCOME_STORED


def test_a_delivery_begins_with_its_one_header(waiting: Waiting) -> None:
    header, *chunks = waiting.update.parts()
    assert "must begin with a header" in waiting.refused(chunks, ProtocolError)
    assert "must begin with a header" in waiting.refused([], ProtocolError)
    assert "second header" in waiting.refused([header, chunks[0], header], ProtocolError)


def test_unknown_runs_and_other_rounds_get_nothing(waiting: Waiting) -> None:
    update = waiting.update
    update.key.round = 2
    assert waiting.deliver(update.parts()).outcome == federation_pb2.DeliverReply.OUTCOME_TOO_LATE
    update.key.round = 1
    for run in ("no-such-run", waiting.run[:-1], ""):  # an operator may abbreviate, a site may not
        update.key.run = run
        assert "no run" in waiting.refused(update.parts(), NotFoundError)


def test_messages_about_runs_that_are_not_do_no_harm(waiting: Waiting) -> None:
    """A site that talks nonsense must not bring the coordinator down, now or at its next start."""
    since = waiting.federation.log_size("coordinator")
    for run in ("no-such-run", waiting.run[:5], ""):
        waiting.probe.say(started=federation_pb2.TaskStarted(run=run, round=1))
        waiting.probe.say(failed=federation_pb2.TaskFailed(run=run, round=1, reason="?"))
        waiting.probe.say(evaluation=federation_pb2.EvaluationReport(run=run, round=1))
    waiting.probe.say(failed=federation_pb2.TaskFailed(run=waiting.run, round=7, reason="?"))
    wait_until(
        lambda: waiting.federation.log("coordinator", since).count("message came too late") >= 10,
        "all are read",
    )
    assert waiting.federation.run(waiting.run).phase == "training"
    assert waiting.federation.programs["coordinator"].poll() is None


@pytest.mark.parametrize(
    ("split", "words"),
    [
        ({"num_examples": 10, "num_correct": 11}, "11 of 10"),
        ({"num_examples": -1, "num_correct": -1}, "-1 of -1"),
        ({"num_examples": 10, "num_correct": 1, "loss_sum": np.nan}, "is not a finite number"),
        ({"num_examples": 10, "num_correct": 1, "class_totals": [11], "class_correct": [1]}, "out of range"),
    ],
)
def test_figures_that_cannot_be_are_left_out_and_the_run_survives_a_restart(
    waiting: Waiting, split: dict[str, Any], words: str
) -> None:
    waiting.deliver(waiting.update.parts())
    waiting.federation.wait_phase(waiting.run, "evaluating")
    metrics = federation_pb2.SplitMetrics(split="test", **split)
    waiting.probe.say(evaluation=federation_pb2.EvaluationReport(run=waiting.run, round=1, splits=[metrics]))
    assert waiting.federation.wait(waiting.run).state == "DONE"
    assert waiting.federation.rounds(waiting.run)[0]["accuracy"] is None
    from fedserver.round_events import EVENT

    assert "evaluation_let_go" in waiting.federation.journal(waiting.run)
    assert words in _last_reason(waiting.federation, waiting.run, EVENT)


def _last_reason(federation: Federation, run: str, adapter: Any) -> str:
    import sqlite3

    uri = f"file:{federation.server_home / 'fedserver.db'}?mode=ro"
    with closing(sqlite3.connect(uri, uri=True)) as database:
        bodies = [
            b for (b,) in database.execute("SELECT body FROM journal WHERE run = ? ORDER BY seq", (run,))
        ]
    events = [adapter.validate_json(body) for body in bodies]  # every record can be read again
    return str(next(event.reason for event in events if event.kind == "evaluation_let_go"))


def test_fetch_gives_only_what_the_sites_work_needs(waiting: Waiting) -> None:
    def fetch(digest: str, offset: int = 0) -> list[tensor_pb2.ArtifactPart]:
        request = federation_pb2.FetchRequest(digest=digest, offset=offset)
        return waiting.call(lambda: list(waiting.probe.stub.Fetch(request, timeout=270)))  # type: ignore[no-any-return]

    size = waiting.task.model.payload_bytes
    tail = fetch(waiting.task.model.digest, size - 8)
    assert [part.WhichOneof("part") for part in tail] == ["manifest", "chunk"]
    assert len(tail[1].chunk.data) == 8
    stored = {path.stem for path in (waiting.federation.server_home / "artifacts").glob("??/*")}
    foreign = sorted(stored - {waiting.task.model.digest})
    for digest in (*foreign[:1], "0" * 64, "../fedserver.db", ""):
        with pytest.raises(NotFoundError, match="is not part of its present work"):
            fetch(digest)
    for offset in (-1, size + 1):
        with pytest.raises(TransferError, match="lies outside"):
            fetch(waiting.task.model.digest, offset)


def test_directives_need_a_hello_of_the_same_site(federation: Federation) -> None:
    probe = Probe(federation)
    with closing(probe):
        stream = probe.stub.Directives(iter([]), metadata=((SESSION_KEY, "0123456789abcdef"),))
        with pytest.raises(grpc.RpcError) as caught:
            next(stream)
    assert isinstance(from_rpc_error(caught.value, "coordinator"), IdentityError)


def test_what_a_site_says_of_itself_can_not_hurt_operators(federation: Federation) -> None:
    """Megabytes would break the answer to everybody; escapes would steer the operator's terminal."""
    evil = "\x1b]0;owned\x07\x1b[2J" + "x" * 1_500_000
    probe = Probe(federation)
    with closing(probe):
        probe.connect(unavailable_reason=evil, device=evil, device_name=evil, software_version=evil)
        federation.wait_connected(PROBE)
        shown = [
            federation.ctl("status"),
            federation.ctl("site", "list"),
            federation.ctl("site", "list", "-o", "json"),
        ]
    for said in shown:
        assert PROBE in said.out
        assert "\x1b" not in said.out
        assert "\\u001b" not in said.out
        assert len(said.out) < 20_000
    (site,) = [site for site in shown[2].json["sites"] if site["site"] == PROBE]
    assert site["unavailable_reason"].startswith("]0;owned[2Jxxx")


def test_a_sites_credential_opens_no_admin_method(federation: Federation) -> None:
    folder = str(federation.site_home(PROBE) / "credential")
    federation.ctl("context", "add", "as-a-site", "--credential", folder)
    for words in (
        ["run", "list"],
        ["site", "list"],
        ["enroll", "token", "create", "--site", "x"],
        ["status"],
    ):
        said = federation.ctl("--context", "as-a-site", *words, expect=4)
        assert "error[permission_denied]" in said.err
        assert said.out == ""
    with closing(open_sync_channel(Path(folder))) as channel:
        stub = admin_pb2_grpc.AdminStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.AbortRun(admin_pb2.ControlRunRequest(run="x"))
    assert isinstance(from_rpc_error(caught.value, "coordinator"), PermissionDeniedError)


def test_an_operators_credential_opens_no_site_method(federation: Federation) -> None:
    with closing(open_sync_channel(federation.server_home / "operator")) as channel:
        stub = federation_pb2_grpc.FederationStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.Hello(federation_pb2.HelloRequest(protocol=PROTOCOL))
    assert isinstance(from_rpc_error(caught.value, "coordinator"), PermissionDeniedError)


def test_a_plan_with_an_unknown_key_is_refused_on_both_sides(federation: Federation) -> None:
    path = federation.plan({**digits_plan(), "training": {"epochs": 1, "learning_rat": 0.1}})
    before = federation.ctl("run", "list", "-o", "json").json
    said = federation.ctl("run", "submit", str(path), expect=78)
    assert said.err.startswith("error[plan_invalid]")
    assert "unknown key 'training.learning_rat'" in said.err
    request = admin_pb2.SubmitRunRequest(plan_toml=path.read_text())
    with federation.admin() as admin, pytest.raises(PlanError, match=r"unknown key 'training.learning_rat'"):
        admin.call(lambda stub: stub.SubmitRun, request)
    for changes, words in (
        ({"sites": ["nobody"]}, "site 'nobody' is not enrolled"),
        ({"strategy": "fedavvg"}, "fedavvg"),
        ({"strategy_options": {"wieghting": "uniform"}}, "unknown key 'wieghting'"),
    ):
        path = federation.plan({**digits_plan(), **changes})
        assert words in federation.ctl("run", "submit", str(path), expect=78).err
    assert federation.ctl("run", "list", "-o", "json").json == before


def test_data_that_does_not_fit_the_plan_is_told_to_the_operator(federation: Federation) -> None:
    """Labels out of range, and a class that the plan does not name: each is that site's failure, with its reason."""
    good = load_arrays(federation.data(SITES[0]))
    bad = federation.root / "out-of-range.npz"
    labels = good["train_labels"].copy()
    labels[0] = len(CLASSES)
    np.savez(bad, **{**good, "train_labels": labels})  # type: ignore[arg-type]
    try:
        _restart_with(federation, SITES[0], bad, CLASSES)
        _restart_with(federation, SITES[1], federation.data(SITES[1]), (*CLASSES[:-1], "mystery"))
        run = federation.submit(digits_plan(SITES[:3], rounds=1))
        assert federation.wait(run).state == "DEGRADED"
        missing = federation.rounds(run)[0]["missing"]
        shown = federation.ctl("run", "show", run).out
        rounds = federation.ctl("run", "rounds", run).out
        sites = federation.ctl("site", "list").out
    finally:
        for site in SITES[:2]:
            _restart_with(federation, site, federation.data(site), CLASSES)
    assert set(missing) == set(SITES[:2])
    assert f"missing: {SITES[0]} in round 1; {SITES[1]} in round 1" in " ".join(shown.split())
    assert f"label {len(CLASSES)}" in missing[SITES[0]] or str(len(CLASSES)) in missing[SITES[0]]
    assert "its data has class 'mystery', which the plan does not name" in missing[SITES[1]]
    assert "mystery" in rounds
    assert SITES[0] in sites


def _restart_with(federation: Federation, site: str, data: Path, names: Iterable[str]) -> None:
    federation.kill_with_compute(site)
    wait_until(lambda: not _connected(federation, site), "the coordinator notices")
    configure_agent(federation, site, data, tuple(names))
    federation.start_agent(site)
    federation.wait_connected(site)


def _connected(federation: Federation, site: str) -> bool:
    with federation.admin() as admin:
        reply = admin.call(lambda stub: stub.ListSites, admin_pb2.ListSitesRequest(site=site))
    return bool(reply.sites[0].connected)


def test_a_second_coordinator_on_the_same_home_is_refused(federation: Federation) -> None:
    said = federation.command("fedserver", "serve", "--home", str(federation.server_home))
    assert said.code == 7
    pid = federation.programs["coordinator"].pid
    assert f"is already served by process {pid}" in said.err
    said = federation.command("fedagent", "serve", "--home", str(federation.site_home(SITES[0])))
    assert said.code == 7
    assert federation.ctl("status").code == 0


@pytest.mark.parametrize("taken", ["port", "enroll_port"])
def test_a_port_in_use_is_refused_clearly(federation: Federation, tmp_path: Path, taken: str) -> None:
    from fedctl.demo_processes import free_ports

    ports = dict(zip(("port", "enroll_port"), free_ports(2), strict=True)) | {taken: federation.port}
    said = federation.command(
        "fedserver", "init", "--home", str(tmp_path / "home"), "--name", "other", "--host", "127.0.0.1",
        "--port", str(ports["port"]), "--enroll-port", str(ports["enroll_port"]),
    )  # fmt: skip
    assert said.code == 0, said
    said = federation.command("fedserver", "serve", "--home", str(tmp_path / "home"))
    assert said.code == 78
    assert f":{federation.port}: the port is in use" in said.err
    assert "Traceback" not in said.err
