"""Readers of a site's data: npz, folder, CSV, MedMNIST. Real files, real decoders, a real web server."""

import hashlib
import io
import threading
import tracemalloc
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedcore.data import DatasetSummary, dataset_names, open_dataset
from fedcore.data.medmnist_reader import fetch, load_info
from fedcore.data.npz_reader import read_held_out, read_test_set
from fedcore.errors import ConfigError, CorruptImagesError, DataError, PlanError
from fedcore.plan import Plan

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"
NAMES = ("cat", "dog", "owl")


def plan(classes: int = 3, names: tuple[str, ...] | None = NAMES, **more: Any) -> Plan:
    document: dict[str, Any] = {
        "name": "d", "rounds": 1, "data": {},
        "model": {"name": "cnn", "classes": classes, "input": [3, 8, 8]},
    }  # fmt: skip
    if names:
        document["data"]["class_names"] = names
    document["data"] |= more
    return Plan.model_validate(document)


def npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, allow_pickle=False, **arrays)
    return path


def images(count: int, *shape: int, dtype: Any = np.uint8) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 250, (count, *(shape or (8, 8, 3))), dtype=dtype)


def picture(path: Path, level: int = 7) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 10), (level, level, level)).save(path)
    return path


# npz


def test_npz_with_all_splits_is_read_as_it_is(tmp_path: Path) -> None:
    train, val, test = images(5), images(2), images(3)
    path = npz(
        tmp_path / "a.npz",
        train_images=train, train_labels=np.array([[0], [1], [2], [1], [0]], dtype=np.uint8),
        val_images=val, val_labels=np.array([0, 2]), test_images=test, test_labels=np.array([[1], [1], [0]]),
    )  # fmt: skip
    reader = open_dataset("npz", path)
    assert reader.summarise() == DatasetSummary(5, None)
    data = reader.read(plan())
    assert np.array_equal(data.train.images, train)
    assert data.train.labels.tolist() == [0, 1, 2, 1, 0]
    assert np.array_equal(data.validation.images, val)
    assert data.test.labels.tolist() == [1, 1, 0]
    assert (data.class_names, data.corrupt_images) == (NAMES, 0)


def test_site_numbers_map_by_name_even_where_a_class_is_lacking(tmp_path: Path) -> None:
    path = npz(tmp_path / "a.npz", train_images=images(4), train_labels=np.array([0, 1, 1, 0]))
    reader = open_dataset("npz", path, class_names=("owl", "cat"), validation_fraction=0, test_fraction=0)
    assert reader.summarise().class_names == ("owl", "cat")
    data = reader.read(plan())
    assert data.train.labels.tolist() == [2, 0, 0, 2]
    assert len(data.test) == len(data.validation) == 0
    assert data.test.images.shape == (0, 8, 8, 3)


def test_npz_labels_may_be_names(tmp_path: Path) -> None:
    path = npz(tmp_path / "a.npz", train_images=images(3), train_labels=np.array(["owl", "cat", "owl"]))
    data = open_dataset("npz", path, validation_fraction=0, test_fraction=0).read(plan())
    assert data.train.labels.tolist() == [2, 0, 2]


@pytest.mark.parametrize(
    ("labels", "names", "plan_names", "message"),
    [
        ([0, 1, 3, 3], None, NAMES, r"label 3 is out of range \(2 images in all\), expected 0\.\.2"),
        ([0, 1, -1, 0], None, NAMES, r"label -1 is out of range"),
        ([0, 1, 2, 0], ("cat", "dog"), NAMES, r"label 2 .*expected 0\.\.1 \(the site's data\.class_names\)"),
        (
            [0, 1, 1, 0],
            ("cat", "cow"),
            NAMES,
            r"unknown class 'cow' \(2 images\); the plan's classes: cat, dog, owl",
        ),
        ([0, 1, 1, 0], ("cat", "dog"), None, r"the plan names no classes"),
        ([0.0, 1.0, 1.0, 0.0], None, NAMES, r"labels are float64, expected whole numbers or text"),
        ([[0, 1], [1, 0], [1, 1], [0, 0]], None, NAMES, r"multi-label"),
    ],
)
def test_npz_labels_that_fit_no_class_are_refused(
    labels: list[Any],
    names: tuple[str, ...] | None,
    plan_names: tuple[str, ...] | None,
    message: str,
    tmp_path: Path,
) -> None:
    path = npz(tmp_path / "a.npz", train_images=images(4), train_labels=np.array(labels))
    with pytest.raises((DataError, PlanError), match=message):
        open_dataset("npz", path, class_names=names).read(plan(names=plan_names))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"train_images": images(4)}, "no array 'train_labels', only: train_images"),
        ({"train_labels": np.zeros(4, int)}, "no array 'train_images'"),
        ({"train_images": images(4), "train_labels": np.zeros(5, int)}, "4 images, but 5 labels"),
        ({"train_images": images(4, 3, 8, 8), "train_labels": np.zeros(4, int)}, "channels last"),
        ({"train_images": images(0), "train_labels": np.zeros(0, int)}, "no training images"),
    ],
)
def test_npz_of_the_wrong_form_is_refused(arrays: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        open_dataset("npz", npz(tmp_path / "a.npz", **arrays)).read(plan())


def test_npz_is_never_unpickled_and_damage_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    with pytest.raises(DataError, match="no such file"):
        open_dataset("npz", path).summarise()
    np.savez(path, train_images=np.array([{}], dtype=object), train_labels=np.zeros(1, int))
    with pytest.raises(DataError, match=r"'train_images' can't be read: .*allow_pickle"):
        open_dataset("npz", path).read(plan())
    npz(path, train_images=images(40), train_labels=np.zeros(40, int))
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(DataError, match="not a readable npz file"):
        open_dataset("npz", path).read(plan())
    np.save(path.with_suffix(".npy"), images(3))
    with pytest.raises(DataError, match="holds one array"):
        open_dataset("npz", path.with_suffix(".npy")).summarise()


def stored_npy(path: Path, header: str, how: int = zipfile.ZIP_DEFLATED) -> Path:
    """An npz whose images have such a header, and 32 bytes of content."""
    text = header.encode().ljust(117) + b"\n"
    with zipfile.ZipFile(path, "w", how) as archive:
        archive.writestr(
            "train_images.npy", b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(32)
        )
        labels = io.BytesIO()
        np.save(labels, np.arange(2))
        archive.writestr("train_labels.npy", labels.getvalue())
    return path


@pytest.mark.parametrize(
    ("shape", "how", "message"),
    [
        (
            "(10000000000, 100)",
            zipfile.ZIP_DEFLATED,
            "'train_images' can't be read: declares 1000000000128 bytes",
        ),
        ("(2, 17)", zipfile.ZIP_STORED, "declares 162 bytes, holds 160"),
        ("(2, 4, 4)", zipfile.ZIP_LZMA, "compressed by method 14, expected none or deflate"),
        ("'", zipfile.ZIP_STORED, "'train_images' can't be read"),
        ("(", zipfile.ZIP_STORED, "'train_images' can't be read"),
    ],
)
def test_npz_that_declares_what_it_does_not_hold_is_refused_before_it_is_allocated(
    tmp_path: Path, shape: str, how: int, message: str
) -> None:
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}}}"
    path = stored_npy(tmp_path / "a.npz", header, how)
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=message):
            open_dataset("npz", path).read(plan(2, NAMES[:2]))
        assert tracemalloc.get_traced_memory()[1] < 20 << 20
    finally:
        tracemalloc.stop()


def test_npz_member_that_is_no_array_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("train_labels.npy", b"not an array")
    with pytest.raises(DataError, match="'train_labels' can't be read"):
        open_dataset("npz", tmp_path / "a.npz").summarise()


@pytest.mark.parametrize("order", ["<", ">"])
def test_npz_labels_that_are_no_text_are_refused(tmp_path: Path, order: str) -> None:
    letters = np.array([ord("x"), 0x110000], np.dtype("u4").newbyteorder(order))
    path = npz(tmp_path / "a.npz", train_images=images(2), train_labels=letters.view(f"{order}U1"))
    with pytest.raises(DataError, match="labels hold bytes that are no text"):
        open_dataset("npz", path).summarise()


def test_npz_splits_are_cut_alike_for_every_plan_and_counted_in_the_summary(tmp_path: Path) -> None:
    path = npz(tmp_path / "a.npz", train_images=images(100), train_labels=np.arange(100) % 3)
    reader = open_dataset("npz", path)
    first = reader.read(plan())
    second = reader.read(plan().model_copy(update={"seed": 99}))
    assert [len(s) for s in (first.train, first.validation, first.test)] == [70, 10, 20]
    assert reader.summarise().num_examples == 70
    assert np.array_equal(first.test.images, second.test.images)
    everything = np.concatenate([first.train.images, first.validation.images, first.test.images])
    assert len(np.unique(everything.reshape(100, -1), axis=0)) == 100


def test_npz_with_a_test_split_only_cuts_validation_only(tmp_path: Path) -> None:
    path = npz(
        tmp_path / "a.npz", train_images=images(30), train_labels=np.arange(30) % 3,
        test_images=images(4), test_labels=np.zeros(4, int),
    )  # fmt: skip
    data = open_dataset("npz", path).read(plan())
    assert [len(s) for s in (data.train, data.validation, data.test)] == [27, 3, 4]
    assert np.array_equal(data.test.images, images(4))


def test_16_bit_grey_npz_becomes_the_plans_input(tmp_path: Path) -> None:
    path = npz(
        tmp_path / "a.npz", train_images=np.full((9, 20, 20), 65535, np.uint16), train_labels=np.arange(9) % 3
    )
    data = open_dataset("npz", path).read(plan())
    assert data.train.images.shape[1:] == (8, 8, 3)
    assert (data.train.images == 255).all()


def test_bad_float_images_are_skipped_within_the_budget(tmp_path: Path) -> None:
    stored = np.full((20, 8, 8, 3), 0.5, dtype=np.float32)
    stored[[4, 11]] = np.nan
    path = npz(tmp_path / "a.npz", train_images=stored, train_labels=np.arange(20) % 3)
    reader = open_dataset("npz", path)
    data = reader.read(plan(max_corrupt_fraction=0.1))
    assert data.corrupt_images == 2
    assert len(data.train) + len(data.validation) + len(data.test) == 18
    with pytest.raises(
        CorruptImagesError, match=r"2 of 20 images can't be read, at most 1 allowed: train_images\[4\]"
    ):
        reader.read(plan(max_corrupt_fraction=0.05))


def test_real_blood_cells_or_digits_are_read_in_the_plans_order(tmp_path: Path) -> None:
    path = SHARED / "bloodmnist_rebuilt.npz"
    if path.exists():
        names = tuple("abcdefgh")
        swapped = (*names[1:], names[0])
        document = {
            "name": "b", "rounds": 1, "model": {"name": "cnn", "classes": 8, "input": [3, 28, 28]},
            "data": {"class_names": swapped},
        }  # fmt: skip
        reader = open_dataset("npz", path, class_names=names)
        assert reader.summarise().num_examples == 11_959
        data = reader.read(Plan.model_validate(document))
        with np.load(path, allow_pickle=False) as file:
            assert np.array_equal(data.test.labels, (file["test_labels"][:, 0].astype(int) - 1) % 8)
        assert (len(data.train), len(data.validation), len(data.test)) == (11_959, 1_712, 3_421)
        return
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    stored = npz(tmp_path / "a.npz", train_images=pixels.reshape(-1, 8, 8) / 16, train_labels=labels)
    data = open_dataset("npz", stored).read(plan(classes=10, names=None))
    assert len(data.train) + len(data.validation) + len(data.test) == 1797


def test_a_test_set_of_the_coordinators_needs_no_training_images(tmp_path: Path) -> None:
    path = npz(tmp_path / "a.npz", test_images=images(3), test_labels=np.array([2, 0, 1]))
    test = read_test_set(path, plan())
    assert np.array_equal(test.images, images(3))
    assert test.labels.tolist() == [2, 0, 1]
    npz(path, test_images=np.full((3, 8, 8), np.nan), test_labels=np.zeros(3, int))
    with pytest.raises(CorruptImagesError, match="3 of 3 images"):
        read_test_set(path, plan())


def test_held_out_images_are_the_validation_split_or_else_the_test_split(tmp_path: Path) -> None:
    splits = {"test_images": images(3), "test_labels": np.array([2, 0, 1])}
    path = npz(tmp_path / "a.npz", **splits)
    assert read_held_out(path, plan()).labels.tolist() == [2, 0, 1]
    npz(path, **splits, val_images=images(2), val_labels=np.array([1, 1]))
    held_out = read_held_out(path, plan())
    assert np.array_equal(held_out.images, images(2))
    assert held_out.labels.tolist() == [1, 1]
    npz(path, train_images=images(2), train_labels=np.array([1, 1]))
    with pytest.raises(DataError, match="no array 'test_labels'"):
        read_held_out(path, plan())


# folder


def test_a_folder_of_class_folders(tmp_path: Path) -> None:
    for n in range(10):
        picture(tmp_path / "cat" / f"{n}.png", level=n)
        picture(tmp_path / "owl" / "deeper" / f"{n}.jpg", level=100)
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    picture(tmp_path / "cat" / ".hidden.png")
    (tmp_path / "README").write_text("not a class")
    reader = open_dataset("folder", tmp_path)
    assert reader.summarise() == DatasetSummary(14, ("cat", "owl"))
    data = reader.read(plan())
    assert [len(s) for s in (data.train, data.validation, data.test)] == [14, 2, 4]
    assert set(data.train.labels.tolist()) == {0, 2}
    assert data.test.images.shape == (4, 8, 8, 3)
    assert np.array_equal(reader.read(plan()).test.images, data.test.images)


def test_a_folder_with_splits_above_the_classes(tmp_path: Path) -> None:
    for split, count in (("train", 5), ("val", 2), ("test", 3)):
        for n in range(count):
            picture(tmp_path / split / "dog" / f"{n}.png", level=count)
    data = open_dataset("folder", tmp_path).read(plan())
    assert [len(s) for s in (data.train, data.validation, data.test)] == [5, 2, 3]
    assert (data.validation.images == 2).all()
    picture(tmp_path / "dog" / "x.png")
    with pytest.raises(DataError, match="'dog' stands beside test/"):
        open_dataset("folder", tmp_path).summarise()


def test_a_class_called_test_is_a_class(tmp_path: Path) -> None:
    picture(tmp_path / "test" / "a.png")
    picture(tmp_path / "cat" / "a.png")
    assert open_dataset("folder", tmp_path).summarise().class_names == ("cat", "test")


@pytest.mark.parametrize(
    ("arrange", "expected", "message"),
    [
        (lambda root: None, DataError, "no images found"),
        (lambda root: picture(root / "cow" / "a.png"), DataError, r"unknown class 'cow' \(1 images\)"),
        (lambda root: picture(root / "test" / "cat" / "a.png"), DataError, "expected train"),
    ],
)
def test_folders_that_fit_no_plan_are_refused(
    arrange: Any, expected: type[Exception], message: str, tmp_path: Path
) -> None:
    arrange(tmp_path)
    with pytest.raises(expected, match=message):
        open_dataset("folder", tmp_path).read(plan())


def test_a_folder_needs_the_plans_class_names(tmp_path: Path) -> None:
    picture(tmp_path / "0" / "a.png")
    with pytest.raises(PlanError, match=r"the plan names no classes .*\[data\] class_names"):
        open_dataset("folder", tmp_path).read(plan(names=None))
    with pytest.raises(DataError, match="not a folder"):
        open_dataset("folder", tmp_path / "none").summarise()


def test_corrupt_files_are_counted_named_and_move_no_other_image(tmp_path: Path) -> None:
    for n in range(20):
        picture(tmp_path / "cat" / f"{n:02}.png", level=n)
    reader = open_dataset("folder", tmp_path)
    whole = reader.read(plan())
    broken = tmp_path / "cat" / "05.png"
    broken.write_bytes(broken.read_bytes()[:40])
    data = reader.read(plan(max_corrupt_fraction=0.05))
    assert data.corrupt_images == 1
    for before, after in (
        (whole.test, data.test),
        (whole.validation, data.validation),
        (whole.train, data.train),
    ):
        kept = [image.tolist() for image in before.images if image[0, 0, 0] != 5]
        assert [image.tolist() for image in after.images] == kept
    (tmp_path / "cat" / "06.png").write_bytes(b"")
    with pytest.raises(CorruptImagesError) as caught:
        reader.read(plan(max_corrupt_fraction=0.05))
    assert "2 of 20 images can't be read, at most 1 allowed" in caught.value.message
    assert "cat/05.png" in caught.value.message
    assert "max_corrupt_fraction" in caught.value.hint


# CSV


def test_a_table_with_splits_columns_of_its_own_and_an_absolute_path(tmp_path: Path) -> None:
    elsewhere = picture(tmp_path / "elsewhere" / "x.png", level=50)
    picture(tmp_path / "site" / "img" / "a.png", level=10)
    picture(tmp_path / "site" / "img" / "b.png", level=20)
    table = tmp_path / "site" / "table.csv"
    # With a byte order mark, as spreadsheets write it.
    table.write_text(
        f"file,dx,split\nimg/a.png,cat,train\n{elsewhere},owl,Train\nimg/b.png,dog,val\n", "utf-8-sig"
    )
    reader = open_dataset(
        "csv", table, test_fraction=0, options={"path_column": "file", "label_column": "dx"}
    )
    assert reader.summarise() == DatasetSummary(2, ("cat", "dog", "owl"))
    data = reader.read(plan())
    assert data.train.labels.tolist() == [0, 2]
    assert data.train.images[:, 0, 0, 0].tolist() == [10, 50]
    assert data.validation.labels.tolist() == [1]
    assert len(data.test) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label\na.png,cat\n", "no column 'path', only: file, label"),
        ("path,label\n", "the table has no rows"),
        ("path,label\na.png,\n", "line 2: path or label is empty"),
        ("path,label\na.png\n", "line 2: path or label is empty"),
        ("path,label,split\na.png,cat,holdout\n", "line 2: split is 'holdout'"),
        ("path,label\n../../etc/a.png,cat\n", "line 2: '../../etc/a.png' leads out of"),
        (
            "path,label,split\na.png,cat,train\n./a.png,cat,test\n",
            "line 3: './a.png' stands in line 2 already",
        ),
        ("path,label\na.png,cow\n", "unknown class 'cow'"),
        ("path,label\nnone.png,cat\n", "1 of 1 images can't be read.*none.png: FileNotFoundError"),
        ('path,label\n"a.png,cat\n', "not a readable CSV table"),
        ("path,label\na\0.png,cat\n", r"line 2: 'a\\x00.png' is no path"),
    ],
)
def test_tables_that_cannot_be_used_say_which_line(text: str, message: str, tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        open_dataset("csv", tmp_path / "t.csv").read(plan())


# MedMNIST


@pytest.fixture
def web(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

    folder = tmp_path / "web"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", folder
    server.shutdown()
    server.server_close()
    thread.join()


def test_medmnist_reads_its_local_file_and_knows_its_classes(tmp_path: Path) -> None:
    arrays = {}
    for split, count in (("train", 16), ("val", 8), ("test", 8)):
        arrays |= {
            f"{split}_images": images(count, 28, 28, 3),
            f"{split}_labels": np.arange(count)[:, None] % 8,
        }
    npz(tmp_path / "bloodmnist.npz", **arrays)
    reader = open_dataset("medmnist", tmp_path, options={"name": "bloodmnist"})
    names = reader.summarise().class_names
    assert names is not None
    assert names[:2] == ("basophil", "eosinophil")
    by_number = reader.read(plan(classes=8, names=None))
    assert by_number.train.labels.tolist() == [*range(8), *range(8)]
    by_name = reader.read(plan(classes=8, names=tuple(reversed(names))))
    assert by_name.train.labels.tolist() == [7 - n for n in by_number.train.labels]


def test_medmnist_is_not_fetched_unless_the_site_allows_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"bloodmnist_64\.npz: no such file .*allow_download = true"):
        open_dataset("medmnist", tmp_path, options={"name": "bloodmnist", "size": 64}).summarise()
    with pytest.raises(ConfigError, match=r"no MedMNIST set 'bloodmist', known: .*bloodmnist"):
        open_dataset("medmnist", tmp_path, options={"name": "bloodmist"})
    with pytest.raises(ConfigError, match="has no size 32"):
        open_dataset("medmnist", tmp_path, options={"name": "bloodmnist", "size": 32})


def test_a_download_is_checked_by_md5_before_it_gets_its_name(web: tuple[str, Path], tmp_path: Path) -> None:
    url, folder = web
    content = npz(folder / "set.npz", train_images=images(3), train_labels=np.zeros(3, int)).read_bytes()
    md5 = hashlib.md5(content).hexdigest()
    target = tmp_path / "cache" / "set.npz"
    with pytest.raises(DataError, match=f"MD5 is {md5}, expected 0000; download discarded"):
        fetch(f"{url}/set.npz", "0000", target)
    assert list(target.parent.iterdir()) == []
    fetch(f"{url}/set.npz", md5, target)
    assert target.read_bytes() == content
    assert list(target.parent.iterdir()) == [target]
    with pytest.raises(DataError, match=r"can't be fetched: .*404"):
        fetch(f"{url}/none.npz", md5, target)
    with pytest.raises(DataError, match="not a web address"):
        fetch(f"file://{folder}/set.npz", md5, target)


def test_medmnists_table_is_read_without_importing_it() -> None:
    info = load_info()
    assert len(info) == 18
    assert info["bloodmnist"]["MD5"] == "7053d0359d879ad8a5505303e11de1dc"


# by name


def test_kinds_paths_and_options_are_checked(tmp_path: Path) -> None:
    assert dataset_names() == ["csv", "folder", "medmnist", "npz"]
    with pytest.raises(ConfigError, match=r"unknown name 'dicom', known: csv, folder, medmnist, npz"):
        open_dataset("dicom", tmp_path)
    for kind in ("npz", "folder", "csv"):
        with pytest.raises(ConfigError, match=r"data\.path is not set"):
            open_dataset(kind, None)
        with pytest.raises(ConfigError, match=rf"kind '{kind}' has no option 'colour', known: .*max_value"):
            open_dataset(kind, tmp_path, options={"colour": 1})
    with pytest.raises(ConfigError, match=r"data\.options\.max_value: expected int or float, got 'high'"):
        open_dataset("npz", tmp_path, options={"max_value": "high"})
