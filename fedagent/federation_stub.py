"""The agent's end of the service Federation."""

from fedcore import tls as _tls  # noqa: F401 - before grpc
from fedcore.raw_chunks import accepting_raw_chunks
from fedcore.v1 import federation_pb2, federation_pb2_grpc

# isort: split
import grpc


def federation_stub(channel: grpc.aio.Channel) -> "federation_pb2_grpc.FederationAsyncStub":
    """The generated stub, but for Deliver, which takes chunks as `fedcore.raw_chunks.RawChunk` too."""
    stub = federation_pb2_grpc.FederationStub(channel)
    stub.Deliver = channel.stream_unary(
        "/fedcore.v1.Federation/Deliver",
        request_serializer=accepting_raw_chunks(federation_pb2.DeliverPart.SerializeToString),
        response_deserializer=federation_pb2.DeliverReply.FromString,
    )
    return stub
