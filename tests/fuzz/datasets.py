"""A site's images: npz files and the arrays in them, image files in folders, CSV tables, records of a split."""

import io
import warnings
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from fedcore.data.csv_reader import open_reader as open_csv
from fedcore.data.dataset import DatasetSettings
from fedcore.data.folder_reader import open_reader as open_folder
from fedcore.data.npz_reader import open_reader as open_npz
from fedcore.data.saved_partition import partition_text, read_record
from fedcore.errors import DataError, PlanError
from fedcore.plan import validate_plan
from tests.fuzz.target import BINARY_WORDS, TEXT_WORDS, Target, bounded, only

_PLAN = validate_plan(
    {
        "name": "fuzz",
        "rounds": 1,
        "model": {"name": "cnn", "classes": 2, "input": [1, 4, 4]},
        "data": {"class_names": ["x", "y"], "max_corrupt_fraction": 1.0},
    }
)
# Deflate makes at most a thousand bytes of one; floats and their temporaries take some times the bytes of what is stored.
_PER_BYTE, _FIXED = 1100 * 16, 16 << 20


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


_IMAGES = _npy(np.arange(12 * 16, dtype=np.uint8).reshape(12, 4, 4))
_LABELS = _npy(np.arange(12, dtype=np.int64) % 2)


def _zipped(members: dict[str, bytes], how: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", how) as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return file.getvalue()


def _read_npz(data: bytes, folder: Path) -> None:
    path = folder / "data.npz"
    path.write_bytes(data)
    reader = open_npz(DatasetSettings("npz", path, class_names=("x", "y")))
    # numpy warns of what it finds odd; a site's log takes that.
    with warnings.catch_warnings(), bounded(_FIXED + _PER_BYTE * len(data)):
        warnings.simplefilter("ignore")
        with only(DataError, PlanError):
            reader.summarise()
        with only(DataError, PlanError):
            reader.read(_PLAN)


def check_npz(data: bytes, folder: Path) -> None:
    _read_npz(data, folder)


def check_npz_images(data: bytes, folder: Path) -> None:
    """The images' array as mutated, in a zip whose checksums are right."""
    _read_npz(_zipped({"train_images": data, "train_labels": _LABELS}, zipfile.ZIP_DEFLATED), folder)


def check_npz_labels(data: bytes, folder: Path) -> None:
    _read_npz(_zipped({"train_images": _IMAGES, "train_labels": data, "test_labels": data}), folder)


def _zips() -> list[bytes]:
    members = {
        "train_images": _IMAGES,
        "train_labels": _LABELS,
        "test_images": _IMAGES,
        "test_labels": _LABELS,
    }
    return [
        _zipped(members),
        _zipped(members, zipfile.ZIP_DEFLATED),
        _zipped(members, zipfile.ZIP_LZMA),
        _IMAGES,
    ]


def _image_arrays() -> list[bytes]:
    draw = np.random.default_rng(0)
    return [
        _IMAGES,
        _npy(draw.random((12, 5, 5, 3), dtype=np.float32)),
        _npy(draw.integers(0, 65536, (12, 4, 4, 1), dtype=np.uint16)),
        _npy(np.zeros((12, 4, 4), bool)),
    ]


def _label_arrays() -> list[bytes]:
    return [_LABELS, _npy(np.array(["x", "y"] * 6)), _npy((np.arange(12) % 2).astype(np.uint8)[:, None])]


def check_image(data: bytes, folder: Path) -> None:
    """As a file of every kind of name: what it is, PIL finds out by its content."""
    (folder / "x").mkdir()
    (folder / "x" / "image.png").write_bytes(data)
    (folder / "y").mkdir()
    (folder / "y" / "good.png").write_bytes(_encoded("PNG"))
    reader = open_folder(DatasetSettings("folder", folder, validation_fraction=0.0, test_fraction=0.0))
    assert reader.summarise().num_examples == 2
    site = reader.read(_PLAN)
    assert len(site.train) in (1, 2)
    assert site.train.images.shape[1:] == (4, 4, 1)


def _encoded(form: str, mode: str = "L") -> bytes:
    file = io.BytesIO()
    pixels = np.arange(8 * 8, dtype=np.uint8).reshape(8, 8)
    image = Image.fromarray(pixels.astype(np.uint16) if mode == "I;16" else pixels)
    (image if mode == "I;16" else image.convert(mode)).save(file, form)
    return file.getvalue()


def _images() -> list[bytes]:
    forms = [("PNG", "L"), ("PNG", "RGBA"), ("PNG", "P"), ("PNG", "I;16"), ("PNG", "1"), ("JPEG", "RGB"), ("BMP", "RGB"),
             ("TIFF", "F"), ("GIF", "P"), ("WEBP", "RGB"), ("PPM", "L")]  # fmt: skip
    return [_encoded(form, mode) for form, mode in forms]


_TABLE = b"path,label,split\na.png,x,train\nb.png,y,val\nc.png,x,test\nd.png,y,train\n"


def check_csv(data: bytes, folder: Path) -> None:
    (folder / "a.png").write_bytes(_encoded("PNG"))
    path = folder / "table.csv"
    path.write_bytes(data)
    reader = open_csv(DatasetSettings("csv", path))
    with only(DataError, PlanError), bounded(_FIXED + _PER_BYTE * len(data)):
        reader.summarise()
    with only(DataError, PlanError), bounded(_FIXED + _PER_BYTE * len(data)):
        reader.read(_PLAN)


_SPLIT = {
    "dataset": "digits",
    "seed": 1,
    "alpha": 0.5,
    "sites": {"a": {"sha256": "0" * 64, "indices": {"train": [0, 1], "validation": [2], "test": [3]}}},
}


def check_split(data: bytes, folder: Path) -> None:
    path = folder / "partition.json"
    path.write_bytes(data)
    with only(DataError):
        record = read_record(path)
        path.write_text(partition_text(record))
        assert read_record(path) == record


_NPY_WORDS = (
    *BINARY_WORDS, b"'shape': (999999999999,)", b"'shape': (12, 0, 4)", b"'descr': '|O'", b"'descr': '<f2'", b"'<c16'",
    b"'<M8[s]'", b"'|V8'", b"'<U99999999'", b"(" * 200, b"True", b"-1", b"'<i8'", b"'>f8'",
)  # fmt: skip
TARGETS = [
    Target("npz", check_npz, _zips, BINARY_WORDS),
    Target("npz_images", check_npz_images, _image_arrays, _NPY_WORDS),
    Target("npz_labels", check_npz_labels, _label_arrays, _NPY_WORDS),
    Target("image_folder", check_image, _images, BINARY_WORDS),
    Target(
        "csv",
        check_csv,
        lambda: [_TABLE],
        (*TEXT_WORDS, b"../", b"/", b'"a\nb"', b",,,,", b"a.png", b"a" * 300),
    ),
    Target("partition_json", check_split, lambda: [partition_text(_SPLIT).encode()]),
]
