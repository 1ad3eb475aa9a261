"""A coordinator's Admin service with scripted answers and faults, over real mutual TLS on a loopback port.

What the coordinator says is scripted; certificates, channel, streams and status codes are the real ones.
"""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from fedcore.channel import SERVER_OPTIONS, server_credentials
from fedcore.credential import load_credential
from fedcore.errors import FedimpresError, NotFoundError
from fedcore.status import to_status
from fedcore.tensor_file import read_manifest
from fedcore.tensor_stream import manifest_to_proto
from fedcore.v1 import admin_pb2, admin_pb2_grpc, tensor_pb2
from fedctl.contexts import Contexts, save_contexts
from fedctl.demo_processes import free_ports
from fedserver.initialise import initialise

# isort: split
import grpc


def _make_run(run: str = "blood-1a2b", state: str = "RUNNING", **fields: Any) -> admin_pb2.Run:
    """A run as the coordinator sends it."""
    values: dict[str, Any] = {
        "run": run, "name": "blood", "state": state, "round": 1, "rounds": 3,
        "sites": ["site-1", "site-2"],
        "strategy": "fedimpres", "phase": "training", "phase_since": "2026-01-02T03:04:05+00:00",
        "plan_json": '{"name": "blood"}', "submitted_at": "2026-01-02T03:00:00+00:00",
        "submitted_by": "admin",
        "progress": [
            admin_pb2.SiteProgress(
                site="site-1", stage="training", done=64, total=128, loss=0.5, images_per_s=900
            ),
            admin_pb2.SiteProgress(site="site-2", stage="absent", reason="no connection"),
        ],
        "missed": [admin_pb2.MissedRound(round=1, sites=["site-2"])],
        "last_round_json": json.dumps(_make_record(1)),
    }  # fmt: skip
    return admin_pb2.Run(**{**values, **fields})


def _make_record(round_: int, **fields: Any) -> dict[str, Any]:
    """A finished round."""
    return {
        "round": round_, "expected": 2, "registered": 2, "started": 2, "reported": 1, "aggregated": 1,
        "accuracy": 0.75, "balanced_accuracy": 0.5, "validation_accuracy": 0.7, "loss": 0.8,
        "sites": {"site-1": {"accuracy": 0.75, "num_examples": 40}}, "classes": {"a": 1.0, "b": 0.0},
        "impressions": {"made": 16, "used": {"site-1": 16}, "note": ""}, "phases_s": {"training": 1.5},
        "seconds": 2.5, "bytes_up": 1000, "bytes_down": 2048, "missing": {"site-2": "no connection"},
        **fields,
    }  # fmt: skip


@dataclass
class Script:
    """What the coordinator answers, what goes wrong, and what it was asked."""

    runs: dict[str, admin_pb2.Run] = field(default_factory=dict)
    # One list of updates for each WatchRun; None at the end drops the connection's stream.
    watches: list[list[admin_pb2.Run | None]] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)
    models: list[admin_pb2.Model] = field(default_factory=list)
    files: dict[str, Path] = field(default_factory=dict)
    chunk_bytes: int = 64
    # For each Download in turn: cut after so many chunks (None: no cut).
    cuts: list[int | None] = field(default_factory=list)
    # Byte of the payload to flip.
    corrupt_at: int | None = None
    error: FedimpresError | None = None
    asked: list[tuple[str, Any]] = field(default_factory=list)
    uploaded: bytes = b""

    def of(self, method: str) -> list[Any]:
        """Requests of one method."""
        return [request for name, request in self.asked if name == method]


class ScriptedAdmin(admin_pb2_grpc.AdminServicer):
    def __init__(self, script: Script) -> None:
        self.script = script

    def _enter(self, name: str, request: Any, context: grpc.ServicerContext) -> None:
        self.script.asked.append((name, request))
        if self.script.error is not None:
            self._fail(self.script.error, context)

    def _fail(self, error: FedimpresError, context: grpc.ServicerContext) -> None:
        status, message, metadata = to_status(error)
        context.set_trailing_metadata(metadata)
        context.abort(status, message)

    def _run(self, text: str, context: grpc.ServicerContext) -> admin_pb2.Run:
        found = [run for name, run in self.script.runs.items() if name.startswith(text)]
        if len(found) != 1:
            self._fail(NotFoundError(f"no run '{text}'", hint="fedctl run list"), context)
        return found[0]

    def WhoAmI(self, request, context):
        self._enter("WhoAmI", request, context)
        return admin_pb2.WhoAmIReply(
            federation="lab", role="operator", id="admin", serial="0a", not_after="2026-02-01T00:00:00+00:00",
            roles=["operator", "owner"],
        )  # fmt: skip

    def GetStatus(self, request, context):
        self._enter("GetStatus", request, context)
        return admin_pb2.GetStatusReply(
            federation="lab", software_version="0.1.0", uptime_s=3700,
            artifact_bytes=1 << 20, free_bytes=5 << 30, sites=self._sites(),
            active_runs=list(self.script.runs.values()), problems=["site-2 is not connected"],
        )  # fmt: skip

    def CreateToken(self, request, context):
        self._enter("CreateToken", request, context)
        return admin_pb2.CreateTokenReply(
            token="secret-token", ca_fingerprint="ab" * 32, coordinator="fed.example.org:8443",
            expires_at="2026-01-02T03:19:05+00:00",
        )  # fmt: skip

    def ListSites(self, request, context):
        self._enter("ListSites", request, context)
        return admin_pb2.ListSitesReply(
            sites=[site for site in self._sites() if request.site in ("", site.id)]
        )

    def _sites(self) -> list[admin_pb2.Site]:
        return [
            admin_pb2.Site(id="site-1", connected=True, enabled=True, activity="training", num_examples=120),
            admin_pb2.Site(id="site-2", enabled=True, unavailable_reason="data [can't] be read"),
        ]

    def SubmitRun(self, request, context):
        self._enter("SubmitRun", request, context)
        return admin_pb2.SubmitRunReply(run="blood-1a2b")

    def ListRuns(self, request, context):
        self._enter("ListRuns", request, context)
        return admin_pb2.ListRunsReply(runs=list(self.script.runs.values()))

    def GetRun(self, request, context):
        self._enter("GetRun", request, context)
        return self._run(request.run, context)

    def WatchRun(self, request, context):
        self._enter("WatchRun", request, context)
        if not self.script.watches:
            yield self._run(request.run, context)
            context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
        for run in self.script.watches.pop(0):
            if run is None:
                context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
            yield run

    def _control(self, method: str, state: str, request: Any, context: grpc.ServicerContext) -> admin_pb2.Run:
        self._enter(method, request, context)
        run = self._run(request.run, context)
        run.state = state
        run.reason = request.reason
        return run

    def PauseRun(self, request, context):
        return self._control("PauseRun", "PAUSED", request, context)

    def ResumeRun(self, request, context):
        return self._control("ResumeRun", "RUNNING", request, context)

    def AbortRun(self, request, context):
        return self._control("AbortRun", "ABORTED", request, context)

    def ListRounds(self, request, context):
        self._enter("ListRounds", request, context)
        return admin_pb2.ListRoundsReply(records_json=[json.dumps(record) for record in self.script.records])

    def ListModels(self, request, context):
        self._enter("ListModels", request, context)
        return admin_pb2.ListModelsReply(models=self.script.models)

    def Download(self, request, context):
        self._enter("Download", request, context)
        path = self.script.files[request.digest]
        manifest, start = read_manifest(path)
        payload = bytearray(path.read_bytes()[start:])
        if self.script.corrupt_at is not None:
            payload[self.script.corrupt_at] ^= 1
        cut = self.script.cuts.pop(0) if self.script.cuts else None
        yield tensor_pb2.ArtifactPart(manifest=manifest_to_proto(manifest, request.digest))
        step = self.script.chunk_bytes
        for number, offset in enumerate(range(request.offset, len(payload), step)):
            if cut is not None and number >= cut:
                context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
            chunk = tensor_pb2.Chunk(offset=offset, data=bytes(payload[offset : offset + step]))
            yield tensor_pb2.ArtifactPart(chunk=chunk)

    def UploadModel(self, request_iterator, context):
        self._enter("UploadModel", None, context)
        digest = ""
        for part in request_iterator:
            if part.WhichOneof("part") == "manifest":
                digest = part.manifest.digest
            else:
                assert part.chunk.offset == len(self.script.uploaded)
                self.script.uploaded += part.chunk.data
        return admin_pb2.UploadModelReply(digest=digest)


@dataclass
class Lab:
    """The scripted coordinator and an operator's settings that point to it."""

    script: Script
    operator: Path
    config_dir: Path
    server: grpc.Server


@pytest.fixture(scope="session")
def lab_home(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A coordinator's home, its certificates made once."""
    home = tmp_path_factory.mktemp("lab") / "home"
    port, enroll_port = free_ports(2)
    initialise(home, name="lab", host="127.0.0.1", port=port, enroll_port=enroll_port, now=datetime.now(UTC))
    return home, port


@pytest.fixture
def lab(lab_home: tuple[Path, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    """A served script, and `fedctl`'s settings for it."""
    home, port = lab_home
    script = Script()
    server = grpc.server(ThreadPoolExecutor(4), options=SERVER_OPTIONS)
    admin_pb2_grpc.add_AdminServicer_to_server(ScriptedAdmin(script), server)
    credential = load_credential(home / "credential", datetime.now(UTC))
    address = f"127.0.0.1:{port}"
    server.add_secure_port(address, server_credentials(credential, require_client_certificate=True))
    server.start()
    config_dir = tmp_path / "config"
    monkeypatch.setenv("FEDIMPRES_CONFIG_DIR", str(config_dir))
    monkeypatch.delenv("FEDIMPRES_CONTEXT", raising=False)
    save_contexts(config_dir, Contexts().add("lab", home / "operator"))
    yield Lab(script, home / "operator", config_dir, server)
    server.stop(None).wait()


@pytest.fixture
def make_run() -> Any:
    """Builder of runs as the coordinator sends them."""
    return _make_run


@pytest.fixture
def make_record() -> Any:
    """Builder of round records."""
    return _make_record
