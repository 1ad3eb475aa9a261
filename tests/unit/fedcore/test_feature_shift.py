"""What a feature shift does to pixels, worked out by hand."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcore.data.benchmark_sets import load_benchmark
from fedcore.data.feature_shift import (
    MOST_BLUR_PX,
    MOST_BRIGHTNESS,
    MOST_NOISE,
    Shift,
    apply_shift,
    draw_shift,
)

NOTHING = Shift(stain=(1.0,), brightness=0.0, blur_px=0.0, noise=0.0, seed=0)


def image(*rows: list[int]) -> np.ndarray:
    """One grey image [1, H, W, 1]."""
    return np.array(rows, dtype=np.uint8)[np.newaxis, :, :, np.newaxis]


def test_no_change_changes_no_pixel() -> None:
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    assert np.array_equal(apply_shift(pixels, NOTHING, "train"), pixels)


def test_brightness_adds_levels_and_stays_within_the_range() -> None:
    shifted = apply_shift(image([0, 100, 250]), replace(NOTHING, brightness=10.0), "train")
    assert shifted.ravel().tolist() == [10, 110, 255]


def test_stain_squares_the_light_of_its_channel_and_leaves_white() -> None:
    pixels = np.array([[[[127, 127, 127], [255, 255, 255]]]], dtype=np.uint8)
    shifted = apply_shift(pixels, replace(NOTHING, stain=(2.0, 1.0, 0.5)), "train")
    # Level 127 is half the light: twice the density lets a quarter through, half of it 1/sqrt(2).
    assert shifted[0, 0, 0].tolist() == [63, 127, 180]
    assert shifted[0, 0, 1].tolist() == [255, 255, 255]


def test_blur_spreads_a_point_and_keeps_what_is_even() -> None:
    point = np.zeros((1, 9, 9, 1), dtype=np.uint8)
    point[0, 4, 4, 0] = 255
    blurred = apply_shift(point, replace(NOTHING, blur_px=0.5), "train")[0, :, :, 0].astype(int)
    # Weights of offsets 0 and 1 at 0.5 px: 0.7866 and 0.1065.
    assert blurred[4, 4] == round(255 * 0.78657**2)
    assert blurred[4, 3] == blurred[4, 5] == blurred[3, 4] == blurred[5, 4] == round(255 * 0.78657 * 0.10645)
    even = np.full((2, 5, 7, 1), 93, dtype=np.uint8)
    assert np.array_equal(apply_shift(even, replace(NOTHING, blur_px=0.8), "train"), even)


def test_noise_has_its_deviation_and_is_the_same_each_time_but_for_each_split() -> None:
    grey = np.full((300, 16, 16, 1), 128, dtype=np.uint8)
    shift = replace(NOTHING, noise=8.0, seed=7)
    first = apply_shift(grey, shift, "train")
    assert float(first.std()) == pytest.approx(8.0, rel=0.02)
    assert np.array_equal(first, apply_shift(grey, shift, "train"))
    assert not np.array_equal(first, apply_shift(grey, shift, "test"))
    # An image's noise does not depend on how many come after it.
    assert np.array_equal(first[:10], apply_shift(grey[:10], shift, "train"))


@settings(max_examples=50)
@given(st.floats(0.01, 5), st.integers(1, 4), st.integers(0, 2**40))
def test_drawn_shifts_stay_within_their_strength(strength: float, channels: int, seed: int) -> None:
    shift = draw_shift(strength, channels, seed=seed)
    assert shift == draw_shift(strength, channels, seed=seed)
    assert len(shift.stain) == channels
    assert all(1.5**-strength * 0.999 <= scale <= 1.5**strength * 1.001 for scale in shift.stain)
    assert abs(shift.brightness) <= strength * MOST_BRIGHTNESS
    assert 0 <= shift.blur_px <= strength * MOST_BLUR_PX
    assert 0 <= shift.noise <= strength * MOST_NOISE


def test_a_shift_changes_pixels_of_a_federation_and_nothing_else() -> None:
    plain = load_benchmark("digits", sites=3, alpha=0.5, seed=1)
    shifted = load_benchmark("digits", sites=3, partition="dirichlet:0.5+feature_shift:1", seed=1)
    assert shifted.alpha == 0.5
    for name in plain.sites:
        for before, after in zip(plain.sites[name].parts, shifted.sites[name].parts, strict=True):
            assert np.array_equal(before.labels, after.labels)
            assert before.images.shape == after.images.shape
            assert not np.array_equal(before.images, after.images)
    assert len({split.shift for split in shifted.sites.values()}) == 3
    tests = np.concatenate([split.test.images for split in shifted.sites.values()])
    assert np.array_equal(shifted.pooled_test.images, tests)


def test_no_images_make_no_images() -> None:
    none = np.zeros((0, 4, 4, 1), dtype=np.uint8)
    assert apply_shift(none, replace(NOTHING, noise=1.0), "test").shape == (0, 4, 4, 1)
