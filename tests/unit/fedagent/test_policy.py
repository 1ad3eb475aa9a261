"""What a site allows, as decisions with a reason; and the files by which its people say so."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedagent.gate import SiteGate
from fedagent.pause import pause, paused_reason, resume
from fedagent.policy import (
    SitePolicy,
    WorkingHours,
    load_policy,
    policy_lines,
    refusal_now,
    refusal_of_task,
)
from fedcore.errors import ConfigError
from fedcore.plan import validate_plan

# A Monday.
MONDAY = datetime(2026, 11, 23, tzinfo=UTC)
PLAN = validate_plan(
    {
        "name": "blood",
        "rounds": 2,
        "strategy": "fedprox",
        "model": {"name": "resnet18", "classes": 2, "input": [1, 8, 8]},
        "training": {"epochs": 3},
    }
).to_json()


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_without_a_file_everything_is_allowed(tmp_path):
    policy = load_policy(tmp_path / "policy.toml")
    assert policy == SitePolicy()
    assert refusal_now(policy, MONDAY, 0) == ""
    # A permissive site need not even understand the plan: the compute process says what is wrong with it.
    assert refusal_of_task(policy, "{}", objective="x", has_impressions=True) == ""


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        ({"models": ["cnn"]}, "refuses: policy forbids model 'resnet18' (allowed: cnn)"),
        ({"models": []}, "refuses: policy forbids model 'resnet18' (allowed: none)"),
        ({"strategies": ["fedavg", "scaffold"]}, "strategy 'fedprox' (allowed: fedavg, scaffold)"),
        ({"objectives": ["plain"]}, "objective 'proximal' (allowed: plain)"),
        ({"max_epochs": 2}, "refuses: policy allows 2 epochs a round, the plan has 3"),
        ({"receive_impressions": False}, "refuses: policy forbids to receive impressions"),
    ],
)
def test_what_a_rule_forbids_is_refused_in_words(rule, reason):
    policy = SitePolicy.model_validate(rule)
    assert reason in refusal_of_task(policy, PLAN, objective="proximal", has_impressions=True)


def test_what_no_rule_forbids_is_done():
    policy = SitePolicy(
        models=("resnet18",),
        strategies=("fedprox",),
        objectives=("proximal",),
        max_epochs=3,
        receive_impressions=False,
    )
    assert refusal_of_task(policy, PLAN, objective="proximal", has_impressions=False) == ""
    # An evaluation has no local half.
    assert refusal_of_task(policy, PLAN, objective=None) == ""


def test_statistics_are_forbidden_by_a_rule_of_their_own_which_binds_no_other_task():
    policy = SitePolicy(recalibrate=False)
    reason = "refuses: policy forbids to measure BatchNorm statistics of merged models"
    assert refusal_of_task(policy, PLAN, objective=None, recalibrates=True) == reason
    assert refusal_of_task(policy, PLAN, objective=None) == ""
    assert refusal_of_task(SitePolicy(), PLAN, objective=None, recalibrates=True) == ""


def test_a_small_site_stays_out_and_does_not_tell_how_small_it_is():
    policy = SitePolicy(min_images=500)
    assert refusal_now(policy, MONDAY, 500) == ""
    assert refusal_now(policy, MONDAY, None) == ""
    reason = refusal_now(policy, MONDAY, 37)
    assert reason == "refuses: policy asks for at least 500 training images, there are fewer"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("model = ['cnn']", "unknown key 'model'"),
        ("max_epochs = 0", "'max_epochs': input should be greater than or equal to 1 (got 0)"),
        ("hide_impressions = true", "unknown key 'hide_impressions'"),
        ("working_hours = {begin = 18:00:00, end = 18:00:00}", "begin and end at 18:00"),
        ("[working_hours]\nbegin = '18:00'", "key 'working_hours.end' is missing"),
        ("[working_hours]\nbegin='8:00Z'\nend='9:00'", "'working_hours.begin'"),
        ("[working_hours]\nbegin='18:00'\nend='06:00'\ntimezone='Zurich'", "no time zone of this machine's"),
        ("[working_hours]\nbegin='18:00'\nend='06:00'\ndays=['monday']", "'working_hours.days.0'"),
        ("models = [", "not valid TOML"),
    ],
)
def test_a_policy_that_is_wrong_keeps_the_agent_from_starting(tmp_path, text, says):
    path = written(tmp_path / "policy.toml", text)
    with pytest.raises(ConfigError) as caught:
        load_policy(path)
    assert str(path) in caught.value.message
    assert says in caught.value.message


def test_working_hours_over_midnight_belong_to_the_day_they_begin(tmp_path):
    policy = load_policy(
        written(
            tmp_path / "policy.toml",
            '[working_hours]\nbegin = 18:00:00\nend = "06:00"\ndays = ["mon"]\ntimezone = "UTC"\n',
        )
    )
    hours = policy.working_hours
    assert hours is not None
    inside = [18, 23.99, 24, 29.99]
    outside = [0, 5, 17.99, 30, 42, 24 * 6 + 23]
    for hour in inside:
        assert hours.contain(MONDAY + timedelta(hours=hour)), hour
    for hour in outside:
        assert not hours.contain(MONDAY + timedelta(hours=hour)), hour
    assert refusal_now(policy, MONDAY, 1) == "refuses: policy allows work mon 18:00-06:00 UTC only"


def test_working_hours_are_those_of_the_zone():
    hours = WorkingHours.model_validate({"begin": "18:00", "end": "20:00", "timezone": "Asia/Tokyo"})
    assert hours.contain(datetime(2026, 11, 23, 9, 30, tzinfo=UTC))
    assert not hours.contain(datetime(2026, 11, 23, 18, 30, tzinfo=UTC))


@given(begin=st.integers(0, 1439), end=st.integers(0, 1439), minute=st.integers(0, 7 * 1440))
def test_a_window_and_its_complement_share_the_day(begin, end, minute):
    if begin == end:
        return
    moment = MONDAY + timedelta(minutes=minute)

    def hours(first: int, last: int) -> WorkingHours:
        return WorkingHours.model_validate(
            {
                "begin": f"{first // 60:02}:{first % 60:02}",
                "end": f"{last // 60:02}:{last % 60:02}",
                "timezone": "UTC",
            }
        )

    assert hours(begin, end).contain(moment) != hours(end, begin).contain(moment)


def test_every_rule_is_shown(tmp_path):
    shown = "\n".join(policy_lines(SitePolicy(models=("cnn",), max_hours_per_round=1.5, bandwidth_mbit_s=20)))
    for words in (
        "cnn",
        "all that are installed",
        "at most 1.5 a round",
        "at most 20 Mbit/s",
        "received",
        "always",
    ):
        assert words in shown
    assert len(policy_lines(SitePolicy())) == len(SitePolicy.model_fields)


def test_a_pause_lasts_until_resume_and_says_why(tmp_path):
    path = tmp_path / "paused"
    assert paused_reason(path) == ""
    assert not resume(path)
    pause(path, "MRI upgrade\x1b[31m", MONDAY)
    assert paused_reason(path) == "paused at the site since 2026-11-23T00:00:00+00:00: MRI upgrade[31m"
    assert path.stat().st_mode & 0o077 == 0
    assert resume(path)
    assert paused_reason(path) == ""


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"since": 1}', b"\xff\xfe"])
def test_any_file_of_that_name_pauses(tmp_path, content):
    path = tmp_path / "paused"
    path.write_bytes(content)
    assert paused_reason(path).startswith("paused at the site")


def test_the_gate_asks_the_pause_first_and_the_file_each_time(tmp_path):
    closed = SitePolicy.model_validate(
        {"working_hours": {"begin": "10:00", "end": "11:00", "timezone": "UTC"}}
    )
    gate = SiteGate(tmp_path / "paused", closed, now=lambda: MONDAY)
    assert "policy allows work" in gate.refusal(None)
    pause(tmp_path / "paused", "", MONDAY)
    assert gate.refusal(None).startswith("paused at the site")
