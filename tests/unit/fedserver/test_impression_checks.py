"""A site's check of its impressions on its way from the wire to a round's record."""

import math
from typing import Any

import pytest
from google.protobuf.descriptor import FieldDescriptor

from fedcore.errors import NonFiniteError, TransferError
from fedcore.impression_check import ImpressionCheck
from fedcore.v1 import federation_pb2
from fedserver.directives import report_from_proto
from fedserver.impression_checks import check_from_proto
from fedserver.round_events import EVENT, Report, UpdateStored

FOUND: dict[str, Any] = {
    "num_checked": 40, "num_near_in_pixels": 2, "num_near_in_features": 1, "num_not_finite": 0,
    "pixel_limit": 0.345, "pixel_smallest": 0.01, "pixel_median": 1.25,
}  # fmt: skip


def test_the_message_has_the_fields_of_the_check_and_the_same_are_optional() -> None:
    fields = federation_pb2.ImpressionCheck.DESCRIPTOR.fields
    assert [field.name for field in fields] == list(ImpressionCheck.model_fields)
    for field in fields:
        whole = field.type == FieldDescriptor.TYPE_INT64
        assert whole == field.name.startswith("num_")
        assert field.has_presence != ImpressionCheck.model_fields[field.name].is_required()


@pytest.mark.parametrize("more", [{}, {"feature_limit": 0.0, "mean_distance": 3.5}])
def test_what_a_site_found_arrives(more: dict[str, float]) -> None:
    said = federation_pb2.UpdateReport(num_examples=5, impression_check={**FOUND, **more})
    assert report_from_proto(said).impression_check == ImpressionCheck(**FOUND, **more)
    assert report_from_proto(federation_pb2.UpdateReport(num_examples=5)).impression_check is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["pixel_limit", "feature_median", "covariance_distance"])
def test_distances_that_are_no_numbers_are_refused(name: str, value: float) -> None:
    message = federation_pb2.ImpressionCheck(**{**FOUND, name: value})
    with pytest.raises(NonFiniteError, match=f"^b round 2: its check of the impressions says {name} = "):
        check_from_proto(message, "b round 2")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"num_checked": 0}, "num_checked"),
        ({"num_not_finite": -1}, "num_not_finite"),
        ({"num_near_in_pixels": 40}, "41 impressions refused of 40"),
        ({"pixel_limit": -0.5}, "pixel_limit"),
        ({"mean_distance": 1e301}, "mean_distance"),
    ],
)
def test_figures_that_cannot_be_are_refused(wrong: dict[str, Any], words: str) -> None:
    message = federation_pb2.ImpressionCheck(**{**FOUND, **wrong})
    with pytest.raises(TransferError, match=f"b round 2: its check of the impressions can't be: .*{words}"):
        check_from_proto(message, "b round 2")


def test_the_journal_keeps_it_and_reads_what_was_written_before_there_was_one() -> None:
    report = Report(num_examples=5, impression_check=ImpressionCheck(**FOUND))
    event = UpdateStored(at=1.0, round=1, site="a", digest="d", payload_bytes=8, report=report)
    assert EVENT.validate_json(event.model_dump_json()) == event
    older = event.model_dump(mode="json", exclude={"report": {"impression_check"}})
    assert EVENT.validate_python(older) == event.model_copy(update={"report": Report(num_examples=5)})
