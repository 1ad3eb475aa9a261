"""Texts that say how images are dealt: read, written, refused."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.data.partition_scheme import Scheme, choose_scheme, deal, number_text, scheme_of
from fedcore.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "alpha", "meaning"),
    [
        (None, None, "iid"),
        (None, 0.1, "dirichlet:0.1"),
        ("iid", None, "iid"),
        ("dirichlet:0.05", None, "dirichlet:0.05"),
        ("dirichlet", 0.5, "dirichlet:0.5"),
        ("dirichlet:0.5", 0.5, "dirichlet:0.5"),
        ("shards", None, "shards:2"),
        ("shards:3", None, "shards:3"),
        ("quantity", None, "quantity:0.5"),
        ("by_site", None, "by_site"),
        ("feature_shift", None, "iid+feature_shift:1"),
        ("feature_shift:0.5", 0.1, "dirichlet:0.1+feature_shift:0.5"),
        ("quantity:2+feature_shift", None, "quantity:2+feature_shift:1"),
        ("dirichlet+feature_shift", 0.1, "dirichlet:0.1+feature_shift:1"),
    ],
)
def test_a_text_means_one_scheme(text: str | None, alpha: float | None, meaning: str) -> None:
    scheme = choose_scheme(text, alpha, dataset="digits", real_sites=False)
    assert scheme.text == meaning
    assert scheme_of(scheme.text) == scheme


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        (None, "by_site"),
        ("by_site", "by_site"),
        ("feature_shift:2", "by_site+feature_shift:2"),
        ("by_site+feature_shift", "by_site+feature_shift:1"),
    ],
)
def test_real_sites_stay_what_they_are(text: str | None, meaning: str) -> None:
    assert choose_scheme(text, None, dataset="wbc_multisite", real_sites=True).text == meaning


@pytest.mark.parametrize(
    ("text", "alpha", "message"),
    [
        ("iid", 0.1, "'iid' contradicts alpha 0.1"),
        ("shards:2+feature_shift:1", 0.1, "contradicts alpha 0.1"),
        ("dirichlet:0.2", 0.1, "contradicts alpha 0.1"),
        ("dirichlet", None, "dirichlet needs its alpha"),
        ("dirichlet:-1", None, "'-1' is not a number above 0"),
        ("quantity:nan", None, "'nan' is not a number above 0"),
        ("shards:1.5", None, "expected a whole number of shards a site, got 1.5"),
        ("shards:", None, None),
        ("iid:3", None, "iid takes no number"),
        ("nine", None, "'nine' is unknown, known: dirichlet, iid, shards, quantity, by_site, feature_shift"),
        ("", None, "'' is unknown"),
        ("iid+shards", None, "'shards' after '\\+'"),
        ("iid+", None, "'' after '\\+'"),
        ("feature_shift+iid", None, "'feature_shift' is unknown"),
        ("feature_shift:6", None, "at most 5"),
        (None, -1.0, "alpha is -1.0"),
        (None, math.nan, "alpha is nan"),
    ],
)
def test_contradictions_and_nonsense_are_refused(
    text: str | None, alpha: float | None, message: str | None
) -> None:
    if message is None:
        assert choose_scheme(text, alpha, dataset="digits", real_sites=False).text == "shards:2"
        return
    with pytest.raises(ConfigError, match=message):
        choose_scheme(text, alpha, dataset="digits", real_sites=False)


@pytest.mark.parametrize(("text", "alpha"), [("iid", None), (None, 0.1), ("shards:2+feature_shift:1", None)])
def test_a_set_of_real_sites_is_dealt_no_other_way(text: str | None, alpha: float | None) -> None:
    with pytest.raises(ConfigError, match="wbc_multisite is dealt by its real sites"):
        choose_scheme(text, alpha, dataset="wbc_multisite", real_sites=True)


@given(
    st.sampled_from(["dirichlet", "quantity"]),
    st.floats(1e-9, 1e6),
    st.one_of(st.just(0.0), st.floats(1e-9, 5)),
)
def test_every_number_survives_its_text(method: str, parameter: float, shift: float) -> None:
    scheme = Scheme(method, parameter, shift)
    assert scheme_of(scheme.text) == scheme
    assert float(number_text(parameter)) == parameter


def test_dealing_goes_by_the_method() -> None:
    labels = np.repeat(np.arange(4), 50).astype(np.int64)
    held = {text: deal(scheme_of(text), labels, 4, seed=1) for text in ("iid", "shards:1", "quantity:0.1")}
    assert [len(part) for part in held["iid"]] == [50] * 4
    # One shard a site of four equal classes: each site has one class.
    assert sorted(labels[part][0] for part in held["shards:1"]) == [0, 1, 2, 3]
    assert all(len(set(labels[part].tolist())) == 1 for part in held["shards:1"])
    sizes = [len(part) for part in held["quantity:0.1"]]
    assert sum(sizes) == 200
    assert max(sizes) > 3 * min(sizes)
