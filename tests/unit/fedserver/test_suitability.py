"""What a site says of itself, cut to size, and whether it can take part."""

from dataclasses import replace

from fedcore.plan import validate_plan
from fedcore.v1 import federation_pb2
from fedserver.roster import Session
from fedserver.round_state import RunState
from fedserver.suitability import checked_capabilities, unable_reason

STATE = RunState(
    "t-1",
    validate_plan(
        {
            "name": "t", "rounds": 1, "model": {"name": "cnn", "classes": 2, "input": [1, 8, 8]},
            "data": {"class_names": ["cat", "dog"]},
        }
    ),
)  # fmt: skip
ABLE = federation_pb2.Capabilities(
    software_version="1.0", models=["cnn"], objectives=["cross_entropy"], datasets=["npz"], device="cuda",
    device_name="NVIDIA H200", threads=4, class_names=["cat"], num_examples=7,
)  # fmt: skip


def test_what_is_in_order_stays_as_it_is() -> None:
    assert checked_capabilities(ABLE) == ABLE
    assert unable_reason(STATE, ABLE) == ""


def test_texts_become_short_lines_and_lists_short() -> None:
    evil = "\x1b]0;x\x07\x1b[2J" + "y" * 5_000_000
    many = ["\x1bname"] * 20_000
    taken = checked_capabilities(
        federation_pb2.Capabilities(
            software_version=evil, models=many, objectives=[evil], datasets=[evil], device=evil,
            device_name=evil, class_names=many, num_examples=-3, unavailable_reason=evil,
        )
    )  # fmt: skip
    assert (len(taken.models), len(taken.class_names), taken.num_examples) == (1000, 10_000, 0)
    assert set(taken.models) == {"name"}
    for text in (taken.software_version, taken.device, taken.device_name, taken.unavailable_reason,
                 *taken.objectives, *taken.datasets):  # fmt: skip
        assert text.isprintable()
        assert 90 <= len(text) <= 300
    assert taken.ByteSize() < 100_000


def test_reasons_are_short_however_much_is_installed() -> None:
    assert unable_reason(STATE, federation_pb2.Capabilities(unavailable_reason="paused")) == "paused"
    other = checked_capabilities(federation_pb2.Capabilities(models=[f"model{n}" for n in range(900)]))
    reason = unable_reason(STATE, other)
    assert reason.startswith("model 'cnn' is not installed there (there are: model0, model1")
    assert len(reason) == 300
    fox = federation_pb2.Capabilities(models=["cnn"], class_names=["cat", "fox"])
    assert unable_reason(STATE, fox) == "its data has class 'fox', which the plan does not name (cat, dog)"


def test_what_a_session_can_do_follows_the_run_and_what_the_site_says_last() -> None:
    said = federation_pb2.Capabilities()
    said.CopyFrom(ABLE)
    session = Session("a", "s1", said, since=0.0, last_progress=0.0)
    assert session.unable(STATE) == session.unable(STATE) == ""
    assert "objective 'triplet' is not installed" in session.unable(replace(STATE, objective="triplet"))
    assert session.unable(STATE) == ""
    session.learn(federation_pb2.Capabilities(unavailable_reason="paused"))
    assert session.unable(STATE) == "paused"
