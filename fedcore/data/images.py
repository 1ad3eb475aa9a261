"""From an image as stored to the model's input: uint8 [H, W, C] of the plan's size.

In this order: depth to 8 bits (16-bit and float images scaled), channels (grey <-> RGB, alpha dropped),
size (PIL's bilinear filter, antialiased, aspect ratio not kept). Coordinator and sites share what follows,
`transforms.py`. PIL is imported when it is first needed.
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedcore.data.dataset import ImageArray
from fedcore.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

AnyArray = NDArray[Any]
Input = tuple[int, int, int]

IMAGE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".gif", ".webp", ".ppm", ".pgm"}
)
# A compressed file that claims more pixels is taken for a decompression bomb.
MAX_PIXELS = 100_000_000
# How many images are converted at a time, so that temporaries stay small.
_BLOCK = 1024


class UnreadableImageError(Exception):
    """One image can't be decoded or has impossible values; the reader counts it. Not a FedimpresError."""


def convert_array(
    images: AnyArray, target: Input, *, max_value: float | None = None, who: str = "images"
) -> tuple[ImageArray, NDArray[np.bool_]]:
    """Convert stored images [N, H, W] or [N, H, W, C] to uint8 [N, H, W, C] of `target` (channels, height,
    width).

    `max_value` is the stored value that means full intensity; unset, it is 255 for uint8, 65535 for uint16,
    1 for floats. Also returns which images [N] are good: a float image is not if it holds NaN or a value
    outside [0, max_value]. uint8 images of the target's shape come back as they are, not copied. Raises
    DataError if shape or dtype fit no image.
    """
    if images.ndim == 3:
        images = images[..., np.newaxis]
    if images.ndim != 4:
        raise DataError(f"{who}: shape {list(images.shape)}, expected [N, H, W] or [N, H, W, C]")
    channels, height, width = target
    _check_channels(images.shape[3], channels, images.shape, who)
    if min(images.shape[1:3]) < 1:
        raise DataError(f"{who}: shape {list(images.shape)} has no pixels")
    good = np.ones(len(images), dtype=bool)
    if images.dtype == np.uint8 and images.shape[1:] == (height, width, channels) and max_value is None:
        return np.ascontiguousarray(images), good
    result = np.empty((len(images), height, width, channels), dtype=np.uint8)
    for start in range(0, len(images), _BLOCK):
        part = slice(start, start + _BLOCK)
        pixels, good[part] = to_8_bit(images[part], max_value, who)
        result[part] = _resize(convert_channels(pixels, channels), height, width)
    return result, good


def to_8_bit(images: AnyArray, max_value: float | None, who: str) -> tuple[ImageArray, NDArray[np.bool_]]:
    """Scale [0, max_value] to uint8 [0, 255], and say which images [N] are good. Raises DataError."""
    good = np.ones(len(images), dtype=bool)
    if images.dtype == np.uint8 and max_value is None:
        return images, good
    if images.dtype == np.bool_:
        return images.astype(np.uint8) * np.uint8(255), good
    if images.dtype.kind not in "iuf" or (max_value is None and images.dtype.kind == "i"):
        raise DataError(
            f"{who}: images are {images.dtype}, expected uint8, uint16 or floats in [0, 1]",
            hint="store another type, or say which value is white: [data] options = { max_value = 4095 }",
        )
    if max_value is None:
        max_value = 1.0 if images.dtype.kind == "f" else float(np.iinfo(images.dtype).max)
    values = images.astype(np.float32)
    axes = tuple(range(1, images.ndim))
    # Rounding in a resize outside leaves values a little outside of the range.
    slack = 0.001 * max_value
    low, high = values.min(axis=axes), values.max(axis=axes)
    good = (low >= -slack) & (high <= max_value + slack)
    values[~good] = 0
    return np.clip(np.rint(values * (255.0 / max_value)), 0, 255).astype(np.uint8), good


def convert_channels(images: ImageArray, channels: int) -> ImageArray:
    """Convert [N, H, W, C] to so many channels: grey <-> RGB (ITU-R 601 luma), alpha dropped.

    The channel counts must have passed the check of `convert_array`.
    """
    stored = images.shape[3]
    if stored == channels:
        return images
    if stored in (2, 4):
        images = images[..., : stored - 1]
        stored -= 1
    if stored == channels:
        return images
    if stored == 1:
        return np.repeat(images, channels, axis=3)
    # Fixed point, as in PIL's mode "L", so that both ways to read an image give the same bytes.
    weights = np.array([19595, 38470, 7471], dtype=np.uint32)
    luma = (images.astype(np.uint32) @ weights + np.uint32(0x8000)) >> np.uint32(16)
    grey: ImageArray = np.asarray(luma, dtype=np.uint8)[..., np.newaxis]
    return grey


def decode_file(path: Path, target: Input, *, max_value: float | None = None) -> ImageArray:
    """Decode an image file to uint8 [H, W, C] of `target`. Call within `quiet_decoding`.

    Raises UnreadableImageError, whatever is wrong with the file.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(path.read_bytes())) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UnreadableImageError(f"{image.width} x {image.height} pixels, at most {MAX_PIXELS}")
            stored = _as_array(image)
        # 16-bit modes of PIL hold the full range, a 1-bit image has become 0 or 255.
        converted, good = convert_array(stored[np.newaxis], target, max_value=max_value, who=path.name)
    except UnreadableImageError:
        raise
    except DataError as error:
        raise UnreadableImageError(error.message) from error
    except Exception as error:  # a decoder fed with a damaged file raises whatever it likes
        raise UnreadableImageError(f"{type(error).__name__}: {error}") from error
    if not good[0]:
        raise UnreadableImageError("values are NaN or out of range")
    result: ImageArray = converted[0]
    return result


@contextmanager
def quiet_decoding() -> Iterator[None]:
    """Silence PIL's warnings about damaged metadata, and make its warning about decompression bombs an error.

    Covers all threads of the process while it lasts.
    """
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def _as_array(image: "Image.Image") -> AnyArray:
    if image.mode in ("L", "RGB", "RGBA", "LA", "F") or image.mode.startswith("I;16"):
        return np.asarray(image)
    if image.mode == "1":
        return np.asarray(image.convert("L"))
    if image.mode == "I":
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise UnreadableImageError("a 32-bit image with values beyond 16 bits")
        return values.astype(np.uint16)
    return np.asarray(image.convert("RGB"))


def _check_channels(stored: int, wanted: int, shape: tuple[int, ...], who: str) -> None:
    if stored == wanted or (stored in (1, 2, 3, 4) and wanted in (1, 3)):
        return
    hint = (
        "fedimpres expects channels last"
        if shape[1] in (1, 3)
        else "set model.input's channels to what is stored"
    )
    raise DataError(
        f"{who}: shape {list(shape)} has {stored} channels, the plan's model takes {wanted}", hint=hint
    )


def _resize(images: ImageArray, height: int, width: int) -> ImageArray:
    count, stored_height, stored_width, channels = images.shape
    if (stored_height, stored_width) == (height, width):
        return images
    from PIL import Image

    result = np.empty((count, height, width, channels), dtype=np.uint8)
    for n, image in enumerate(images):
        if channels == 3:
            resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
            result[n] = np.asarray(resized)
            continue
        for c in range(channels):
            plane = Image.fromarray(np.ascontiguousarray(image[..., c]))
            result[n, ..., c] = np.asarray(plane.resize((width, height), Image.Resampling.BILINEAR))
    return result
