# ruff: noqa: N806 - shape suffixes
"""BatchNorm statistics on their way in: from a site's message to a durable artifact and its event."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import structlog

from fedcore.artifact_store import ArtifactStore
from fedcore.errors import ConflictError, DiskError, FedimpresError, NonFiniteError, TransferError
from fedcore.norm_statistics import variance_partner
from fedcore.tensor_file import TensorManifest, TensorSpec, check_expected, write_tensor_file
from fedcore.tensor_stream import manifest_from_proto
from fedcore.v1 import federation_pb2
from fedserver import round_events as ev
from fedserver.round_driver import RoundDriver
from fedserver.round_state import RunState, Stage
from fedserver.threads import in_pool

log = structlog.get_logger(__name__)


class StatisticsIntake:
    """Takes statistics in for the round under way."""

    def __init__(self, driver: RoundDriver, store: ArtifactStore, pool: ThreadPoolExecutor) -> None:
        self._driver = driver
        self._store = store
        self._pool = pool

    async def take(self, site: str, at: float, report: federation_pb2.StatisticsReport) -> None:
        """Store a site's statistics and tell its run; `at` is seconds since the epoch.

        Statistics that can't be are the fact that the site gave none. Raises ConflictError if they are not asked for,
        NotFoundError on an unknown run, DiskError.
        """
        state = self._driver.view(report.run).state
        who = f"{site} round {report.round}"
        check_asked(state, site, report, who)
        try:
            tensors = checked_statistics(state, report, who)
        except TransferError as error:
            log.warning("statistics refused", site=site, run=state.run, code=error.code, error=error.message)
            refused = ev.StatisticsLetGo(at=at, round=report.round, site=site, reason=str(error))
            await self._driver.post(state.run, refused)
            return
        digest = await in_pool(self._pool, self._store_tensors, tensors)
        event = ev.StatisticsStored(
            at=at, round=report.round, site=site, digest=digest, num_examples=report.num_examples
        )
        try:
            await self._driver.post(state.run, event)
        except FedimpresError:
            self._driver.discard_unneeded(digest)
            raise

    def _store_tensors(self, tensors: dict[str, tuple[TensorSpec, memoryview]]) -> str:
        path = self._store.new_path()
        try:
            digest = write_tensor_file(path, dict(tensors))
            self._store.adopt(path, digest)
        except OSError as error:
            raise DiskError(f"{path}: can't be written: {error}") from error
        finally:
            path.unlink(missing_ok=True)
        return digest


def check_asked(state: RunState, site: str, report: federation_pb2.StatisticsReport, who: str) -> None:
    """Raise ConflictError unless the run waits for this site's statistics, of this model."""
    current = state.current
    if (
        state.stage is not Stage.RECALIBRATING
        or current is None
        or current.number != report.round
        or not current.awaits_statistics(site)
    ):
        raise ConflictError(f"{who}: run {state.run} waits for no statistics of it")
    if report.model != current.released:
        raise ConflictError(
            f"{who}: its statistics are of model {report.model[:12]!r}, expected {(current.released or '')[:12]!r}"
        )


def checked_statistics(
    state: RunState, report: federation_pb2.StatisticsReport, who: str
) -> dict[str, tuple[TensorSpec, memoryview]]:
    """The tensors of a report with their bytes, by name. `who` opens the message: "site-07 round 12".

    Raises TransferError for a count below one, a payload of another size than its manifest or a negative variance,
    TensorMismatchError if the tensors are not exactly those that the run measures, NonFiniteError for NaN and Inf.
    """
    if report.num_examples < 1:
        raise TransferError(f"{who}: says that it measured {report.num_examples} images, expected at least 1")
    manifest = manifest_from_proto(report.manifest)
    check_expected(manifest, expected_statistics(state), who)
    payload = memoryview(report.payload)
    if len(payload) != manifest.payload_bytes:
        raise TransferError(
            f"{who}: its statistics have {len(payload)} bytes, their manifest says {manifest.payload_bytes}"
        )
    offsets = manifest.offsets()
    tensors = {}
    for spec in manifest.tensors:
        start, end = offsets[spec.name]
        values_C = np.frombuffer(payload[start:end], "<f4")
        if not bool(np.isfinite(values_C).all()):
            raise NonFiniteError(f"{who}: tensor '{spec.name}' of its statistics holds NaN or Inf")
        if variance_partner(spec.name) and bool((values_C < 0).any()):
            raise TransferError(f"{who}: tensor '{spec.name}' of its statistics holds a negative variance")
        tensors[spec.name] = (spec, payload[start:end])
    return tensors


def expected_statistics(state: RunState) -> TensorManifest:
    """The manifest that every site's statistics of the run must have. All are F32."""
    return TensorManifest.of(
        TensorSpec(name, dtype, tuple(shape)) for name, dtype, shape in state.statistic_tensors
    )
