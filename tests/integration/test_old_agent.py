"""An agent one minor version behind, spoken for by the bytes it sent: a whole round, and an enrolment."""

import pytest

from fedcore.enrollment_token import decode_token
from fedcore.status import from_rpc_error
from tests.federation_fixture import NAME, PROBE, SITES, Federation
from tests.recorded.old_agent import ENROLLMENT, FEDERATION, OldAgent, Version, play, serials, versions

# isort: split
import grpc


@pytest.mark.parametrize("version", versions(), ids=lambda version: version.folder.name)
def test_an_agent_of_an_earlier_version_is_served(federation: Federation, version: Version) -> None:
    said = federation.ctl("enroll", "token", "create", "--site", PROBE, "-o", "json").json["token"]
    agent = OldAgent(federation, version.make)
    try:
        names = play(federation, agent, version.make, version.parse, decode_token(said))
        with pytest.raises(grpc.RpcError) as refused:
            agent.enrolment("RenewEnded", names)
    finally:
        agent.close()
    assert f"site/{PROBE}: certificate" in from_rpc_error(refused.value, "coordinator").message, "it was read"
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED

    heard = {
        method: [version.parse(kind(version, method), one) for one in replies]
        for method, replies in agent.said.items()
    }
    (hello,) = heard[FEDERATION + "Hello"]
    assert (hello.federation, hello.protocol.major, hello.heartbeat_interval_s) == (NAME, 1, 1.0)
    (enrolled,) = heard[ENROLLMENT + "Enroll"]
    assert (enrolled.site, enrolled.coordinator) == (PROBE, f"127.0.0.1:{federation.port}")
    assert len(serials(enrolled.certificate_chain_pem)) == 2
    assert enrolled.ca_pem
    model, *chunks = heard[FEDERATION + "Fetch"]
    assert model.manifest.digest == names["model"]
    assert [part.chunk.offset for part in chunks] == [8]
    (offset,) = heard[FEDERATION + "DeliveryOffset"]
    assert (offset.offset, offset.stored) == (0, False)
    assert heard[FEDERATION + "Deliver"][0].outcome == 1, "OUTCOME_STORED"

    (record,) = federation.rounds(names["run"])
    assert (record["aggregated"], record["sites"][PROBE]["num_examples"]) == (1, 10)
    assert record["accuracy"] == pytest.approx(7 / 10), "of the recorded figures"
    assert federation.run(names["run"]).state == "DONE"
    assert "no such round" not in str(record), "a message for another round is only logged"
    federation.wait_connected(*SITES)


def kind(version: Version, method: str) -> str:
    return version.rpcs()[method].replies[0].kind
