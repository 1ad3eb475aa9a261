"""A site's deliveries spoken by hand, with the site's own credential, beside its agent."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from fedcore.channel import open_sync_channel
from fedcore.credential import load_credential
from fedcore.errors import FedimpresError
from fedcore.status import from_rpc_error
from fedcore.tensor_file import read_manifest
from fedcore.tensor_stream import CHUNK_BYTES, manifest_to_proto
from fedcore.v1 import federation_pb2, federation_pb2_grpc, tensor_pb2
from tests.faults.chaos_federation import ChaosFederation

# isort: split
import grpc


class RawSite:
    """Speaks for a site, directly to the coordinator."""

    def __init__(self, federation: ChaosFederation, site: str) -> None:
        self._federation = federation
        self.site = site

    def deliver(
        self, run: str, round_number: int, update: Path, *, backwards: bool = False
    ) -> str | FedimpresError:
        """Deliver an update whole, its chunks in order or backwards; gives the outcome or the refusal."""
        manifest, start = read_manifest(update)
        key = federation_pb2.DeliveryKey(run=run, round=round_number, site=self.site, digest=update.stem)
        report = federation_pb2.UpdateReport(
            num_examples=1, num_steps=1, seconds=0.1, threads=1, device="cpu"
        )
        payload = update.read_bytes()[start:]
        offsets = range(0, len(payload), CHUNK_BYTES)

        def parts() -> Iterator[federation_pb2.DeliverPart]:
            header = federation_pb2.DeliveryHeader(
                key=key, manifest=manifest_to_proto(manifest, update.stem), report=report, offset=0
            )
            yield federation_pb2.DeliverPart(header=header)
            for offset in reversed(offsets) if backwards else offsets:
                chunk = tensor_pb2.Chunk(offset=offset, data=payload[offset : offset + CHUNK_BYTES])
                yield federation_pb2.DeliverPart(chunk=chunk)

        credential = load_credential(self._federation.site_home(self.site) / "credential", datetime.now(UTC))
        direct = replace(credential, coordinator=f"127.0.0.1:{self._federation.port}")
        with closing(open_sync_channel(direct)) as channel:
            stub = federation_pb2_grpc.FederationStub(channel)
            try:
                reply = stub.Deliver(parts())
            except grpc.RpcError as error:
                return from_rpc_error(error, "coordinator")
        return federation_pb2.DeliverReply.Outcome.Name(reply.outcome)
