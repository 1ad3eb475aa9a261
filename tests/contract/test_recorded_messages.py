"""What deployed agents send and understand stays as it is: messages of earlier versions against today's classes.

A test with a real coordinator is in tests/integration/test_old_agent.py.
"""

import pytest
from google.protobuf import descriptor_pb2, message_factory
from google.protobuf.json_format import MessageToDict
from google.protobuf.unknown_fields import UnknownFieldSet

from fedcore.errors import ProtocolError
from fedcore.protocol import PROTOCOL, check_version
from fedcore.v1 import certificates_pb2, enrollment_pb2, federation_pb2, tensor_pb2
from tests.recorded.old_agent import Recorded, Version, versions

VERSIONS = versions()
TODAY = message_factory.GetMessageClassesForFiles(
    [module.DESCRIPTOR.name for module in (tensor_pb2, certificates_pb2, federation_pb2, enrollment_pb2)],
    federation_pb2.DESCRIPTOR.pool,
)


def ids(version: Version) -> str:
    return version.folder.name


def messages() -> list[tuple[str, Recorded]]:
    return [
        (f"{version.folder.name} {rpc.method} {way} {number}", message)
        for version in VERSIONS
        for rpc in version.rpcs().values()
        for way, found in (("request", rpc.requests), ("reply", rpc.replies))
        for number, message in enumerate(found)
    ]


def test_the_version_before_this_one_is_recorded() -> None:
    """Whoever raises the minor version records the one before first: `python -m tests.recorded.record`."""
    assert f"{PROTOCOL.major}.{PROTOCOL.minor - 1}" in {version.folder.name for version in VERSIONS}


@pytest.mark.parametrize("version", VERSIONS, ids=ids)
def test_every_rpc_of_agents_was_recorded_both_ways(version: Version) -> None:
    methods = {
        f"/{file.package}.{service.name}/{method.name}"
        for file in version.descriptors().file
        for service in file.service
        for method in service.method
        if service.name in {"Federation", "Enrollment"}
    }
    rpcs = version.rpcs()
    assert set(rpcs) == methods
    assert all(rpc.requests and rpc.replies for rpc in rpcs.values())
    kinds = {key for m in rpcs["/fedcore.v1.Federation/Directives"].requests for key in m.meaning}
    assert kinds == set(old_fields(version, "AgentMessage"))
    kinds = {key for m in rpcs["/fedcore.v1.Federation/Directives"].replies for key in m.meaning}
    assert kinds == set(old_fields(version, "Directive"))


@pytest.mark.parametrize("message", [m for _, m in messages()], ids=[name for name, _ in messages()])
def test_a_recorded_message_still_means_what_it_meant(message: Recorded) -> None:
    parsed = TODAY[message.kind].FromString(message.data)
    assert MessageToDict(parsed, preserving_proto_field_name=True) == message.meaning
    assert len(UnknownFieldSet(parsed)) == 0
    assert parsed.SerializeToString(deterministic=True) == message.data


@pytest.mark.parametrize("version", VERSIONS, ids=ids)
def test_no_field_value_or_method_changed_its_number_or_kind(version: Version) -> None:
    """Also those that no recorded message happens to hold."""
    today = descriptor_pb2.FileDescriptorSet()
    for file in version.descriptors().file:
        federation_pb2.DESCRIPTOR.pool.FindFileByName(file.name).CopyToProto(today.file.add())
    before, now = shape(version.descriptors()), shape(today)
    assert {name: now.get(name) for name in before} == before


def test_a_version_too_old_is_told_what_to_upgrade() -> None:
    check_version(federation_pb2.ProtocolVersion(major=1, minor=PROTOCOL.minor - 1), "agent a")
    for major, minor in ((1, PROTOCOL.minor + 1), (2, PROTOCOL.minor), (1, PROTOCOL.minor + 9)):
        with pytest.raises(ProtocolError, match=f"agent a speaks protocol {major}.{minor}"):
            check_version(federation_pb2.ProtocolVersion(major=major, minor=minor), "agent a")


def old_fields(version: Version, message: str) -> list[str]:
    (found,) = [m for file in version.descriptors().file for m in file.message_type if m.name == message]
    return [field.name for field in found.field]


def shape(files: descriptor_pb2.FileDescriptorSet) -> dict[str, object]:
    """Everything that the wire depends on, by full name."""
    found: dict[str, object] = {}
    for file in files.file:
        for message in file.message_type:
            for field in message.field:
                oneof = message.oneof_decl[field.oneof_index].name if field.HasField("oneof_index") else ""
                found[f"{message.name}.{field.name}"] = (
                    field.number, field.type, field.label, field.type_name, oneof, field.proto3_optional,
                )  # fmt: skip
            for enum in message.enum_type:
                found.update({f"{message.name}.{enum.name}.{v.name}": v.number for v in enum.value})
        for service in file.service:
            for method in service.method:
                found[f"{service.name}.{method.name}"] = (
                    method.input_type, method.output_type, method.client_streaming, method.server_streaming,
                )  # fmt: skip
    return found
