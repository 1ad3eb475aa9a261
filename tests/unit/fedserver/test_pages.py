"""Pages: everything comes once, in order, in messages of bounded size."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcore.errors import ProtocolError
from fedserver.pages import page, token_number

MIB = 1 << 20


@settings(max_examples=50)
@given(st.lists(st.integers(0, 3 * MIB), max_size=1200))
def test_pages_hold_everything_once(sizes: list[int]) -> None:
    items = [(str(n), (n, size)) for n, size in enumerate(sizes, 1)]
    found, token, pages = [], None, 0
    while token != "":
        after = token_number(token or "")
        taken, token = page(iter(items[after:]), lambda item: item[1])
        assert len(taken) <= 500
        assert sum(size for _, size in taken) <= 4 * MIB
        assert taken or not items
        found += taken
        pages += 1
    assert found == [item for _, item in items]
    assert pages <= 1 + len(sizes) // 500 + sum(sizes) // MIB


def test_an_item_larger_than_a_page_comes_alone() -> None:
    items = [("1", 9 * MIB), ("2", 1), ("3", 9 * MIB)]
    assert page(items, int) == ([9 * MIB], "1")
    assert page(items[1:], int) == ([1], "2")
    assert page(items[2:], int) == ([9 * MIB], "")


@pytest.mark.parametrize("token", ["x", "-1", "1.5", "²", "9" * 11, "../" * 1000])
def test_a_token_of_nobody_is_refused(token: str) -> None:
    with pytest.raises(ProtocolError, match="page token") as caught:
        token_number(token)
    assert len(str(caught.value)) < 200
