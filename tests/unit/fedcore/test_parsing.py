import pytest

from fedcore.parsing import parse_json, parse_toml


def test_what_is_right_is_read():
    assert parse_json('{"a": [1, 2.5, null]}') == {"a": [1, 2.5, None]}
    assert parse_json(b"[]") == []
    assert parse_toml('a = 1\n[b]\nc = "d"') == {"a": 1, "b": {"c": "d"}}


@pytest.mark.parametrize(
    "text", ["", "{", "[" * 5000, '{"a":' * 5000, "9" * 5000, "NaN", "[-Infinity]", b"\xff"]
)
def test_whatever_is_wrong_with_json_is_a_value_error(text):
    with pytest.raises(ValueError):
        parse_json(text)


@pytest.mark.parametrize(
    "text", ["a", "a = " + "[" * 5000, "a = " + "{a=" * 5000, "a = " + "9" * 5000, "a = 2020-13-45"]
)
def test_whatever_is_wrong_with_toml_is_a_value_error(text):
    with pytest.raises(ValueError):
        parse_toml(text)
