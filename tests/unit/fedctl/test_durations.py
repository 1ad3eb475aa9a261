import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.errors import ConfigError
from fedctl.durations import format_bytes, format_duration, parse_duration


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90),
        ("15m", 900),
        ("1h30m", 5400),
        ("2d", 172800),
        ("0.5s", 0.5),
        ("250ms", 0.25),
        (" 3M ", 180),
    ],
)
def test_durations_as_people_write_them(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "m", "15 m", "-3s", "0", "0m", "1y", "nan", "1m2", "inf"])
def test_what_is_no_duration_is_refused_with_a_hint(text: str) -> None:
    with pytest.raises(ConfigError, match="duration") as caught:
        parse_duration(text)
    assert "15m" in caught.value.hint


@given(st.integers(1, 59), st.integers(1, 59), st.integers(1, 400))
def test_parts_add_up(seconds: int, minutes: int, hours: int) -> None:
    assert parse_duration(f"{hours}h{minutes}m{seconds}s") == hours * 3600 + minutes * 60 + seconds


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(4.21, "4.2 s"), (59.4, "59 s"), (185, "3m 05s"), (7800, "2h 10m"), (273600, "3d 4h")],
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (2048, "2.0 KiB"), (43 << 20, "43.0 MiB"), (3 << 40, "3.0 TiB")],
)
def test_bytes_read_well(count: int, text: str) -> None:
    assert format_bytes(count) == text
