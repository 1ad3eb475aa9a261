"""What a peer says becomes one short line that a terminal only shows."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.text import printable, ranges


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no CUDA device", "no CUDA device"),
        ("\x1b]0;owned\x07\x1b[2Jgone", "]0;owned[2Jgone"),
        ("one\r\ntwo\tthree", "one  two three"),
        ("\u202egnp.exe\u200b\x9b1m", "gnp.exe1m"),
        ("  Röntgen 胸部 \n", "Röntgen 胸部"),
        ("x" * 20, "x" * 20),
        ("x" * 21, "x" * 19 + "…"),
        ("", ""),
    ],
)
def test_examples(text: str, expected: str) -> None:
    assert printable(text, 20) == expected


@given(st.text(), st.integers(1, 50))
def test_never_longer_never_a_control_character_and_stable(text: str, limit: int) -> None:
    shown = printable(text, limit)
    assert len(shown) <= limit
    assert not any(unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") for c in shown)
    assert printable(shown, limit) == shown


def test_numbers_as_people_write_them() -> None:
    assert ranges([]) == "none"
    assert ranges({3}) == "3"
    assert ranges([1, 2, 3, 7, 9, 10]) == "1-3, 7, 9-10"
