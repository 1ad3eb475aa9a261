"""A raw chunk is what the protobuf message would be, byte for byte."""

from hypothesis import given
from hypothesis import strategies as st

from fedcore.raw_chunks import RawChunk, accepting_raw_chunks
from fedcore.v1 import federation_pb2, tensor_pb2

OFFSETS = st.one_of(st.integers(0, 300), st.integers(0, 2**63 - 1))
DATA = st.one_of(st.binary(max_size=300), st.integers(0, 40_000).map(bytes))


@given(OFFSETS, DATA)
def test_the_bytes_are_those_of_the_message(offset: int, data: bytes) -> None:
    chunk = tensor_pb2.Chunk(offset=offset, data=data)
    raw = RawChunk(offset, data).to_wire()
    assert raw == tensor_pb2.ArtifactPart(chunk=chunk).SerializeToString()
    assert raw == federation_pb2.DeliverPart(chunk=chunk).SerializeToString()


def test_other_messages_are_serialised_as_ever() -> None:
    serialise = accepting_raw_chunks(tensor_pb2.ArtifactPart.SerializeToString)
    assert serialise is not None
    part = tensor_pb2.ArtifactPart(manifest=tensor_pb2.Manifest(digest="d", payload_bytes=7))
    assert serialise(part) == part.SerializeToString()
    assert serialise(RawChunk(1, b"x")) == RawChunk(1, b"x").to_wire()
    assert accepting_raw_chunks(None) is None
