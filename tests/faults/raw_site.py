"""A site's deliveries spoken by hand, with the site's own credential, beside its agent."""

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from fedcore.channel import open_sync_channel
from fedcore.credential import load_credential
from fedcore.errors import ConflictError, FedimpresError, TruncatedStreamError
from fedcore.status import from_rpc_error
from fedcore.tensor_file import read_manifest
from fedcore.tensor_stream import CHUNK_BYTES, manifest_to_proto
from fedcore.v1 import federation_pb2, federation_pb2_grpc, tensor_pb2
from tests.faults.chaos_federation import ChaosFederation

# isort: split
import grpc

_ATTEMPTS = 5


class RawSite:
    """Speaks for a site, directly to the coordinator."""

    def __init__(self, federation: ChaosFederation, site: str) -> None:
        self._federation = federation
        self.site = site

    def deliver(
        self, run: str, round_number: int, update: Path, *, backwards: bool = False
    ) -> str | FedimpresError:
        """Deliver an update from where the coordinator has it, or whole and backwards; gives the outcome or the refusal."""
        manifest, start = read_manifest(update)
        key = federation_pb2.DeliveryKey(run=run, round=round_number, site=self.site, digest=update.stem)
        report = federation_pb2.UpdateReport(
            num_examples=1, num_steps=1, seconds=0.1, threads=1, device="cpu"
        )
        payload = update.read_bytes()[start:]

        def parts(start: int) -> Iterator[federation_pb2.DeliverPart]:
            header = federation_pb2.DeliveryHeader(
                key=key, manifest=manifest_to_proto(manifest, update.stem), report=report, offset=start
            )
            yield federation_pb2.DeliverPart(header=header)
            offsets = range(start, len(payload), CHUNK_BYTES)
            for offset in reversed(offsets) if backwards else offsets:
                chunk = tensor_pb2.Chunk(offset=offset, data=payload[offset : offset + CHUNK_BYTES])
                yield federation_pb2.DeliverPart(chunk=chunk)

        credential = load_credential(self._federation.site_home(self.site) / "credential", datetime.now(UTC))
        direct = replace(credential, coordinator=f"127.0.0.1:{self._federation.port}")
        with closing(open_sync_channel(direct)) as channel:
            stub = federation_pb2_grpc.FederationStub(channel)
            for attempt in range(_ATTEMPTS):
                try:
                    known = stub.DeliveryOffset(federation_pb2.DeliveryOffsetRequest(key=key))
                    reply = stub.Deliver(parts(0 if backwards else known.offset))
                    return federation_pb2.DeliverReply.Outcome.Name(reply.outcome)
                except grpc.RpcError as error:
                    refusal = from_rpc_error(error, "coordinator")
                # The agent's own stream brings more meanwhile, or takes over: then agents try again too.
                if backwards or not isinstance(refusal, TruncatedStreamError | ConflictError):
                    break
                time.sleep(0.2 * (attempt + 1))
        return refusal
