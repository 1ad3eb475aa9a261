"""Record the messages of the present version: `python -m tests.recorded.record`.

Run once for a version, by the last commit before its protocol changes; what it writes is never edited. It starts a
federation, speaks for the site PROBE with this version's classes, and writes tests/recorded/MAJOR.MINOR.
"""

import base64
import hashlib
import json
import struct
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2
from google.protobuf.json_format import MessageToDict

from fedcore.database import open_database
from fedcore.enrollment_token import decode_token
from fedcore.identity import Subject
from fedcore.pki import certificates_to_pem, make_request, new_key, serial_text
from fedcore.protocol import PROTOCOL
from fedcore.renewal import ended_statement, sign_statement
from fedcore.tensor_file import TensorManifest, TensorSpec
from fedcore.tensor_stream import manifest_to_proto
from fedcore.v1 import audit_pb2, certificates_pb2, enrollment_pb2, federation_pb2, tensor_pb2
from fedserver import registry
from fedserver.authority import load_authority
from fedserver.config import ServerHome
from fedserver.schema import MIGRATIONS
from tests.federation_fixture import NAME, PROBE, Federation, build
from tests.recorded.old_agent import ENROLLMENT, FEDERATION, HERE, PARAMS, OldAgent, play

fed = federation_pb2
FILES = (tensor_pb2, audit_pb2, certificates_pb2, federation_pb2, enrollment_pb2)
# What the coordinator answers with, by method.
REPLIES: dict[str, Any] = {
    FEDERATION + "Hello": fed.HelloReply,
    FEDERATION + "Directives": fed.Directive,
    FEDERATION + "Fetch": tensor_pb2.ArtifactPart,
    FEDERATION + "DeliveryOffset": fed.DeliveryOffsetReply,
    FEDERATION + "Deliver": fed.DeliverReply,
    ENROLLMENT + "Enroll": enrollment_pb2.EnrollReply,
    ENROLLMENT + "RenewEnded": certificates_pb2.RenewReply,
}
# Directives that a coordinator sends seldom: made here, so that they are held too.
SELDOM = (
    fed.Directive(ping=fed.Ping(nonce=7)),
    fed.Directive(drain=fed.Drain(reason="maintenance")),
    fed.Directive(renew_certificate=fed.RenewCertificate()),
)
UPDATE = struct.pack(f"<{PARAMS}f", *(n / 64 for n in range(PARAMS)))
MANIFEST = TensorManifest.of(
    [
        TensorSpec("head.bias", "F32", (10,)),
        TensorSpec("head.weight", "F32", (10, 1)),
        TensorSpec("idle.0", "F32", (PARAMS - 20,)),
    ]
)


class Recorder:
    """Makes requests with this version's classes, and keeps them."""

    def __init__(self, federation: Federation) -> None:
        self.requests: dict[str, list[Any]] = {}
        self._federation = federation
        self._manifest = MANIFEST
        self._payload = UPDATE

    def make(self, method: str, names: dict[str, str]) -> list[bytes]:
        """The requests of an RPC."""
        name = method.rpartition("/")[2]
        made = getattr(self, f"_{name.lower()}")(names)
        self.requests[method] = made
        return [message.SerializeToString(deterministic=True) for message in made]

    def _hello(self, names: dict[str, str]) -> list[Any]:
        able = fed.Capabilities(
            software_version="0.1.0", models=["noop", "cnn"], objectives=["cross_entropy"], datasets=["npz"],
            device="cpu", device_name="a CPU", threads=2, class_names=["0", "1"], num_examples=120,
        )  # fmt: skip
        head = audit_pb2.AuditHead(sequence=3, digest="ab" * 32)
        return [fed.HelloRequest(protocol=PROTOCOL, capabilities=able, audit_head=head)]

    def _directives(self, names: dict[str, str]) -> list[Any]:
        run = names["run"]
        splits = [
            fed.SplitMetrics(split="validation", num_examples=20, num_correct=15, loss_sum=9.5),
            fed.SplitMetrics(split="test", num_examples=10, num_correct=7, loss_sum=4.25),
        ]
        return [
            fed.AgentMessage(heartbeat=fed.Heartbeat()),
            fed.AgentMessage(started=fed.TaskStarted(run=run, round=1)),
            fed.AgentMessage(
                progress=fed.Progress(
                    run=run, round=1, stage="training", done=3, total=9, loss=0.5, images_per_s=88.0
                )
            ),
            fed.AgentMessage(
                failed=fed.TaskFailed(run=run, round=9, reason="no such round", evaluating=True)
            ),
            fed.AgentMessage(
                capabilities=fed.Capabilities(
                    software_version="0.1.0", models=["noop"], unavailable_reason=""
                )
            ),
            fed.AgentMessage(pong=fed.Pong(nonce=7)),
            fed.AgentMessage(evaluation=fed.EvaluationReport(run=run, round=1, splits=splits, seconds=0.25)),
        ]

    def _fetch(self, names: dict[str, str]) -> list[Any]:
        return [fed.FetchRequest(digest=names["model"], offset=8)]

    def _key(self, names: dict[str, str]) -> Any:
        digest = hashlib.sha256(self._manifest.header() + self._payload).hexdigest()
        return fed.DeliveryKey(run=names["run"], round=1, site=PROBE, digest=digest)

    def _deliveryoffset(self, names: dict[str, str]) -> list[Any]:
        return [fed.DeliveryOffsetRequest(key=self._key(names))]

    def _deliver(self, names: dict[str, str]) -> list[Any]:
        key = self._key(names)
        check = fed.ImpressionCheck(
            num_checked=40, num_near_in_pixels=1, num_near_in_features=2, num_not_finite=0, pixel_limit=0.5,
            pixel_smallest=0.25, pixel_median=3.0, feature_limit=1.0, feature_smallest=0.5, feature_median=2.0,
            mean_distance=1.5, covariance_distance=2.5,
        )  # fmt: skip
        report = fed.UpdateReport(
            num_examples=120, num_steps=4, train_loss=0.75, num_impressions=0, seconds=1.5, threads=2, device="cpu",
            corrupt_images=1, impression_check=check,
        )  # fmt: skip
        header = fed.DeliveryHeader(
            key=key, manifest=manifest_to_proto(self._manifest, key.digest), report=report
        )
        half = len(self._payload) // 2 // 8 * 8
        return [
            fed.DeliverPart(header=header),
            fed.DeliverPart(chunk=tensor_pb2.Chunk(offset=0, data=self._payload[:half])),
            fed.DeliverPart(chunk=tensor_pb2.Chunk(offset=half, data=self._payload[half:])),
        ]

    def _enroll(self, names: dict[str, str]) -> list[Any]:
        return [
            enrollment_pb2.EnrollRequest(
                token_id=names["token_id"],
                token_secret=names["token_secret"],
                csr_pem=make_request(new_key(), PROBE).decode(),
            )
        ]

    def _renewended(self, names: dict[str, str]) -> list[Any]:
        """A certificate that ended a day ago is put into the registry by hand: none ends so soon by itself."""
        home = ServerHome(self._federation.server_home)
        authority = load_authority(home.pki, NAME, {"site": timedelta(days=1)})
        subject, key, csr = Subject(NAME, "site", PROBE), new_key(), make_request(new_key(), PROBE).decode()
        # The issuing CA must have been there: its notBefore is backdated by ten minutes only.
        short = load_authority(home.pki, NAME, {"site": timedelta(seconds=1)})
        leaf = short.issue(subject, key.public_key(), datetime.now(UTC) - timedelta(minutes=5))[0]
        database = open_database(home.database, MIGRATIONS)
        try:
            database.write_now(lambda c: registry.record_certificate(c, leaf, subject, datetime.now(UTC)))
        finally:
            database.close()
        signature = sign_statement(key, ended_statement(authority.federation, serial_text(leaf), csr))
        return [
            enrollment_pb2.RenewEndedRequest(
                certificate_pem=certificates_to_pem([leaf]).decode(), csr_pem=csr, signature=signature
            )
        ]


def _document(message: Any) -> dict[str, Any]:
    return {
        "kind": message.DESCRIPTOR.full_name,
        "bytes": base64.b64encode(message.SerializeToString(deterministic=True)).decode(),
        "meaning": MessageToDict(message, preserving_proto_field_name=True),
    }


def main() -> None:
    """Record, into a folder named by the version."""
    folder = HERE / f"{PROTOCOL.major}.{PROTOCOL.minor}"
    with tempfile.TemporaryDirectory() as root:
        federation = build(Path(root))
        try:
            recorder = Recorder(federation)
            agent = OldAgent(federation, recorder.make)
            said = federation.ctl("enroll", "token", "create", "--site", PROBE, "-o", "json").json["token"]
            classes = {kind.DESCRIPTOR.full_name: kind for kind in REPLIES.values()}
            names = play(
                federation,
                agent,
                recorder.make,
                lambda kind, data: classes[kind].FromString(data),
                decode_token(said),
            )
            agent.enrolment("RenewEnded", names)
            agent.close()
        finally:
            federation.stop()
    folder.mkdir()
    for method, requests in recorder.requests.items():
        replies = [REPLIES[method].FromString(data) for data in agent.said[method]]
        if method.endswith("Directives"):
            replies += SELDOM
        document = {
            "method": method,
            "requests": [_document(message) for message in requests],
            "replies": [_document(message) for message in replies],
        }
        name = "-".join(method.split(".")[-1].split("/")).lower()
        (folder / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
    (folder / "names.json").write_text(json.dumps(names, indent=1) + "\n")
    known = descriptor_pb2.FileDescriptorSet()
    for module in FILES:
        module.DESCRIPTOR.CopyToProto(known.file.add())
    (folder / "descriptors.binpb").write_bytes(known.SerializeToString(deterministic=True))


if __name__ == "__main__":
    main()
