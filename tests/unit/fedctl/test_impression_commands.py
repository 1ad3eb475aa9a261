"""fedctl impression: what is asked before anything is sent, and how banks are shown."""

from typing import Any

import pytest
from typer.testing import CliRunner

from fedcore.v1 import federation_pb2, impressions_pb2
from fedctl.app import app
from fedctl.impression_view import bank_document, bank_lines, list_row, next_steps


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("purge", "r", "--reason", "x", "--yes"), "needs one of --round N and --all"),
        (
            ("purge", "r", "--reason", "x", "--round", "2", "--all", "--yes"),
            "needs one of --round N and --all",
        ),
        (("purge", "r", "--reason", " ", "--all", "--yes"), "needs a --reason"),
        (("purge", "r", "--reason", "x", "--all"), "can't ask for confirmation off a terminal (add --yes)"),
        (("preview", "r", "--out", "sheet.jpeg"), "end its name in .png or .html"),
    ],
)
def test_mistakes_are_named_before_a_connection_is_made(arguments: tuple[str, ...], said: str) -> None:
    result = CliRunner().invoke(app, ["impression", *arguments])
    assert result.exit_code != 0
    assert said in str(result.exception)


def test_a_purge_without_a_reason_is_a_usage_error() -> None:
    result = CliRunner().invoke(app, ["impression", "purge", "r", "--all", "--yes"])
    assert result.exit_code == 2
    assert "--reason" in result.output


def bank(**fields: Any) -> impressions_pb2.ImpressionBank:
    made = impressions_pb2.ImpressionBank(
        run="blood-1", round=3, digest="ab" * 32, state="stored", num_images=12, bytes=4096,
        classes=[
            impressions_pb2.ClassCount(name="monocyte", num_images=7),
            impressions_pb2.ClassCount(name="platelet", num_images=5),
        ],
        holders=[
            impressions_pb2.ImpressionHolder(site="a", copy="holds", connected=True),
            impressions_pb2.ImpressionHolder(site="b", copy="unknown"),
        ],
    )  # fmt: skip
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def purged(*confirmed: str) -> impressions_pb2.ImpressionBank:
    made = bank(state="purged", num_images=0, bytes=0)
    del made.classes[:]
    made.purge.purge, made.purge.at, made.purge.by, made.purge.reason = (
        "p1",
        "2026-11-24T06:00:00Z",
        "ann",
        "why",
    )
    for site in ("a", "b"):
        one = made.purge.sites.add(site=site)
        if site in confirmed:
            one.confirmed_at, one.deleted, one.audit_head = "2026-11-24T06:00:01Z", True, "17:abcd"
    return made


def test_a_stored_bank_says_who_holds_it() -> None:
    row = list_row(bank(in_use=True))
    assert (row["state"], row["images"], row["classes"]) == ("stored, in use", 12, 2)
    assert row["sites"] == "1 of 2 hold it, 1 unknown"
    lines = dict(bank_lines(bank()))
    assert lines["classes"] == "monocyte: 7, platelet: 5"
    assert lines["copy at a"] == "yes"
    assert lines["copy at b"].startswith("unknown")


def test_a_purge_says_who_confirmed_and_who_is_outstanding() -> None:
    made = purged("a")
    assert list_row(made)["sites"] == "1 of 2 confirmed"
    lines = dict(bank_lines(made))
    assert lines["purged"] == "2026-11-24T06:00:00Z by ann: why"
    assert lines["site a"] == "confirmed 2026-11-24T06:00:01Z: deleted it; record 17 of its audit log"
    assert lines["site b"].startswith("outstanding")
    assert lines["copy at a"] == "yes", "a bank that came back is not hidden"
    assert bank_document(made)["purge"]["outstanding"] == ["b"]


def test_after_a_purge_the_operator_reads_what_is_left() -> None:
    made = purged("a")
    made.lives_on_in.extend([4, 5])
    reply = impressions_pb2.PurgeImpressionsReply(banks=[made], purged=1, other_runs=["blood-2"])
    text = "\n".join(next_steps(reply))
    assert "other runs too: blood-2" in text
    assert "the banks of rounds 4, 5 hold pictures of it too" in text
    assert "asked of b (fedctl impression show blood-1 --round 3 says" in text
    reply.purged = 0
    assert next_steps(reply)[0] == "they were purged before; nothing was changed"


def test_what_sites_found_is_shown_with_its_limits() -> None:
    made = bank()
    check = federation_pb2.ImpressionCheck(
        num_checked=12, num_near_in_pixels=1, pixel_limit=0.5, pixel_smallest=0.4, pixel_median=1.1
    )
    made.checks.add(site="a", round=4, check=check)
    made.figures["kept"] = 0.25
    lines = dict(bank_lines(made))
    assert lines["check at a, round 4"] == "1 of 12 refused; pixels: nearest 0.40, median 1.10, limit 0.50"
    assert lines["kept"] == 0.25
    (shown,) = bank_document(made, full=True)["checks"]
    assert (shown["num_near_in_pixels"], shown["num_not_finite"], shown["feature_limit"]) == (1, 0, None)
