"""Pixels to tensors and back, stored images to pixels, and augmentation."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fedcore.data.images import UnreadableImageError, convert_array, decode_file, quiet_decoding
from fedcore.data.transforms import augment, normalise, pixel_bounds, to_pixels
from fedcore.errors import DataError
from fedcore.plan import Plan

torch.set_num_threads(1)


def plan(channels: int = 3, height: int = 6, width: int = 8, **transform: Any) -> Plan:
    return Plan.model_validate(
        {
            "name": "t", "rounds": 1, "transform": transform,
            "model": {"name": "cnn", "classes": 2, "input": [channels, height, width]},
        }
    )  # fmt: skip


def test_normalise_by_hand_and_from_either_layout() -> None:
    p = plan(mean=[0.5, 0.0, 0.25], std=[0.5, 1.0, 0.25])
    pixels = torch.randint(0, 256, (4, 6, 8, 3), dtype=torch.uint8)
    result = normalise(pixels, p)
    assert result.shape == (4, 3, 6, 8)
    assert result.dtype == torch.float32
    assert torch.equal(result, normalise(pixels.permute(0, 3, 1, 2), p))
    assert result[1, 2, 3, 4].item() == pytest.approx(
        (pixels[1, 3, 4, 2].item() / 255 - 0.25) / 0.25, abs=1e-5
    )


def test_to_pixels_inverts_normalise_and_clamps() -> None:
    p = plan(channels=1, height=16, width=16, mean=[0.2], std=[0.3])
    every_level = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert torch.equal(to_pixels(normalise(every_level, p), p), every_level)
    assert to_pixels(torch.full((1, 1, 16, 16), 99.0), p).unique().tolist() == [255]
    low, high = pixel_bounds(p)
    assert low.shape == (1, 1, 1, 1)
    assert torch.equal(to_pixels(low.expand(1, 1, 16, 16), p).unique(), torch.tensor([0], dtype=torch.uint8))
    assert torch.equal(
        to_pixels(high.expand(1, 1, 16, 16), p).unique(), torch.tensor([255], dtype=torch.uint8)
    )


@pytest.mark.parametrize("kind", ["hflip", "vflip", "rot90", "shift"])
@pytest.mark.parametrize("shape", [(64, 3, 8, 8), (64, 1, 8, 12)])
def test_augmentation_follows_the_generator_and_stays_within_its_kind(
    kind: str, shape: tuple[int, ...]
) -> None:
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    once = augment(images, [kind], torch.Generator().manual_seed(5))
    again = augment(images, [kind], torch.Generator().manual_seed(5))
    other = augment(images, [kind], torch.Generator().manual_seed(6))
    assert torch.equal(once, again)
    assert not torch.equal(once, other)
    assert once.shape == images.shape
    if kind == "shift":
        assert set(once.unique().tolist()) <= set(images.unique().tolist())
        return
    turns = (0, 1, 2, 3) if shape[2] == shape[3] else (0, 2)
    allowed = {
        "hflip": [images, images.flip(3)],
        "vflip": [images, images.flip(2)],
        "rot90": [images.rot90(k, (2, 3)) for k in turns],
    }[kind]
    chosen = [next(k for k, a in enumerate(allowed) if torch.equal(once[n], a[n])) for n in range(64)]
    assert set(chosen) == set(range(len(allowed)))


def test_shift_moves_by_at_most_an_eighth_and_repeats_the_edge() -> None:
    columns = torch.arange(16.0).expand(200, 1, 16, 16)
    shifted = augment(columns, ["shift"], torch.Generator().manual_seed(1))
    moved = shifted[:, 0, 0, 8] - 8
    assert set(moved.tolist()) == {-2.0, -1.0, 0.0, 1.0, 2.0}
    by_two = shifted[moved == 2][0, 0, 0]
    assert by_two.tolist() == [*range(2, 16), 15, 15]


def test_images_of_the_target_shape_are_not_copied() -> None:
    stored = np.zeros((5, 6, 8, 3), dtype=np.uint8)
    converted, good = convert_array(stored, (3, 6, 8))
    assert np.shares_memory(converted, stored)
    assert good.all()


@pytest.mark.parametrize(
    ("stored", "target", "expected"),
    [
        (np.full((1, 2, 2), 200, np.uint8), 3, [200, 200, 200]),
        (np.full((1, 2, 2, 1), 65535, np.uint16), 1, [255]),
        (np.full((1, 2, 2, 1), 257, np.uint16), 1, [1]),
        (np.full((1, 2, 2), 0.5, np.float64), 1, [128]),
        (np.full((1, 2, 2), True), 1, [255]),
        (np.full((1, 2, 2, 4), [10, 20, 30, 0], np.uint8), 3, [10, 20, 30]),
        (np.full((1, 2, 2, 2), [10, 99], np.uint8), 3, [10, 10, 10]),
        (np.full((1, 2, 2, 3), [255, 0, 0], np.uint8), 1, [76]),
        (np.full((1, 2, 2, 5), [1, 2, 3, 4, 5], np.uint8), 5, [1, 2, 3, 4, 5]),
    ],
)
def test_depth_and_channels_are_converted(stored: np.ndarray, target: int, expected: list[int]) -> None:
    converted, good = convert_array(stored, (target, 2, 2))
    assert converted.shape == (1, 2, 2, target)
    assert converted[0, 1, 1].tolist() == expected
    assert good.all()


def test_grey_is_pils_grey() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (1, 20, 20, 3), dtype=np.uint8)
    converted, _ = convert_array(rgb, (1, 20, 20))
    assert np.array_equal(converted[0, ..., 0], np.asarray(Image.fromarray(rgb[0]).convert("L")))


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_resizing_is_antialiased_and_keeps_orientation(channels: int) -> None:
    stored = np.zeros((2, 32, 64, channels), dtype=np.uint8)
    stored[:, :, 32:] = 200
    # A one-pixel checkerboard averages to grey when it shrinks, unless it is merely sampled.
    stored[:, :, :32][:, ::2, ::2] = stored[:, :, :32][:, 1::2, 1::2] = 200
    converted, _ = convert_array(stored, (channels, 4, 8))
    assert converted.shape == (2, 4, 8, channels)
    assert np.abs(converted[:, :, :3].astype(int) - 100).max() <= 3
    assert (converted[:, :, 6:] == 200).all()


def test_max_value_reads_12_bit_images_and_signed_integers() -> None:
    stored = np.array([[[0, 4095], [2048, 1024]]], dtype=np.int16)
    converted, good = convert_array(stored, (1, 2, 2), max_value=4095)
    assert converted[0, ..., 0].tolist() == [[0, 255], [128, 64]]
    assert good.all()
    with pytest.raises(DataError, match=r"images are int16.*max_value"):
        convert_array(stored, (1, 2, 2))


def test_float_images_with_nan_or_beyond_the_range_are_bad_one_by_one() -> None:
    stored = np.full((4, 2, 2), 0.5)
    stored[1, 0, 0] = np.nan
    stored[3, 0, 0] = 200.0
    _, good = convert_array(stored, (1, 2, 2))
    assert good.tolist() == [True, False, True, False]


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((4, 3, 8, 8), "8 channels.*channels last"),
        ((4, 8, 8, 5), "5 channels"),
        ((4, 8), r"expected \[N, H, W\]"),
    ],
)
def test_shapes_that_fit_no_image_are_refused(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        convert_array(np.zeros(shape, dtype=np.uint8), (3, 8, 8), who="train_images")


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "I;16", "F", "CMYK"])
def test_files_of_every_mode_are_decoded(mode: str, tmp_path: Path) -> None:
    grey = np.full((4, 4), 255, dtype=np.uint8)
    if mode == "I;16":
        image = Image.fromarray(np.full((4, 4), 65535, dtype=np.uint16))
    elif mode == "F":
        image = Image.fromarray(np.ones((4, 4), dtype=np.float32))
    else:
        image = Image.fromarray(grey).convert("RGB").convert(mode) if mode != "L" else Image.fromarray(grey)
    path = tmp_path / ("image.tif" if mode in ("F", "CMYK") else "image.png")
    image.save(path)
    with quiet_decoding():
        assert (decode_file(path, (3, 4, 4)) == 255).all()


def test_damaged_files_and_bombs_are_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = tmp_path / "good.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(good)
    for name, content in {
        "cut.jpg": good.read_bytes()[:900], "text.png": b"not an image", "empty.png": b"",
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(content)
        with quiet_decoding(), pytest.raises(UnreadableImageError):
            decode_file(tmp_path / name, (3, 8, 8))
    with quiet_decoding(), pytest.raises(UnreadableImageError, match="FileNotFoundError"):
        decode_file(tmp_path / "none.png", (3, 8, 8))
    bomb = tmp_path / "bomb.png"
    Image.new("1", (20_000, 20_000)).save(bomb)
    assert bomb.stat().st_size < 1_000_000
    with quiet_decoding(), pytest.raises(UnreadableImageError, match=r"DecompressionBomb|at most"):
        decode_file(bomb, (3, 8, 8))
