from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.errors import StorageError
from fedcore.report.charts import Series, bars, line_chart, nice_ticks, stacked_columns
from fedcore.report.page import worst_site, write_report
from fedcore.report.pictures import MAX_PER_CLASS, Pictures, picture_rows, png_data_uri, read_pictures
from fedcore.tensor_file import TensorSpec, write_tensor_file


class Page(HTMLParser):
    """Checks that tags nest, and collects texts, tags and attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in {"meta", "img"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def record(round_: int, **fields: Any) -> dict[str, Any]:
    return {
        "round": round_, "expected": 2, "registered": 2, "started": 2, "reported": 2, "aggregated": 2,
        "accuracy": 0.5 + round_ / 20, "balanced_accuracy": 0.4,
        "validation_accuracy": 0.6 - round_ / 100, "loss": 1.0,
        "sites": {"north": {"accuracy": 0.9, "num_examples": 40},
                  "south": {"accuracy": 0.3, "num_examples": 1234}},
        "classes": {"cat": 0.8, "dog": 0.25},
        "impressions": {"made": 12, "used": {"north": 12, "south": 10}, "note": ""},
        "phases_s": {"training": 1.5, "aggregating": 0.5}, "seconds": 2.0,
        "bytes_up": 1_500_000, "bytes_down": 900,
        "missing": {}, **fields,
    }  # fmt: skip


def write(tmp_path: Path, **fields: Any) -> tuple[str, Page]:
    path = tmp_path / "report.html"
    write_report(path, **{"title": "t", "records": [record(1), record(2)], **fields})
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


def pictures(count: int = 5) -> Pictures:
    return Pictures(2, np.full((count, 1, 4, 4), 7, np.uint8), np.arange(count, dtype=np.int64) % 2)


def test_report_tells_the_run(tmp_path: Path) -> None:
    _, page = write(
        tmp_path,
        state="DEGRADED",
        facts={"seed": "7"},
        impressions=[pictures()],
        class_names=["cat", "dog"],
        holdings={"north": {"cat": 30, "dog": 0}, "south": {"cat": 1, "dog": 2000}},
        command="fedctl demo --seed 7",
        plan_toml='name = "x"',
    )
    words = "\n".join(page.texts)
    for expected in (
        "DEGRADED", "seed", "60.0 %", "worst site: south", "30.0 %", "1,234 images, 10 impressions used",
        "25.0 %",
        "5 impressions", "12 / 22", "fedctl demo --seed 7", 'name = "x"', "2,000", "1.5 MB",
    ):  # fmt: skip
        assert expected in words, expected
    labels = [attrs["aria-label"] for tag, attrs in page.tags if tag == "svg"]
    assert labels == [
        "Accuracy by round", "Loss by round", "Accuracy at each site by round", "Seconds by round and phase",
    ]  # fmt: skip
    assert sum(tag == "img" for tag, _ in page.tags) == 5
    assert "round 2: aggregating 0.5 s" in words, "numbers are shown on hover"
    assert "best round, by validation" in words


def test_report_needs_nothing_from_elsewhere_and_runs_nothing(tmp_path: Path) -> None:
    text, page = write(tmp_path, impressions=[pictures()], class_names=["a", "b"])
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert "http://" not in text
    assert "https://" not in text
    assert all(attrs["src"].startswith("data:image/png;base64,") for tag, attrs in page.tags if tag == "img")


def test_names_from_outside_stay_text(tmp_path: Path) -> None:
    nasty = '<script>alert("x")</script>'
    text, page = write(
        tmp_path,
        title=nasty,
        facts={nasty: nasty},
        records=[record(
            1, sites={nasty: {"accuracy": 0.5, "num_examples": 1}}, classes={nasty: 0.5},
            missing={nasty: nasty},
        )],
        impressions=[pictures()],
        class_names=[nasty, nasty],
        holdings={nasty: {nasty: 3}},
        command=nasty,
        plan_toml=nasty,
    )  # fmt: skip
    assert "<script" not in text
    assert nasty in page.texts


def test_a_round_that_missed_a_site_stands_out(tmp_path: Path) -> None:
    _, page = write(tmp_path, records=[record(1), record(2, aggregated=1, missing={"south": "no progress"})])
    assert [attrs.get("class") for tag, attrs in page.tags if tag == "tr" and attrs] == ["missed"]
    assert "south: no progress" in page.texts


def test_missing_figures_are_shown_as_such(tmp_path: Path) -> None:
    bare = record(
        1, accuracy=None, balanced_accuracy=None, validation_accuracy=None, loss=None, sites={}, classes=None,
        balanced_accuracy_note="sites share no per-class counts", phases_s={},
    )  # fmt: skip
    _, page = write(tmp_path, records=[bare])
    assert [tag for tag, _ in page.tags if tag == "svg"] == []
    assert "sites share no per-class counts" in page.texts
    assert worst_site(bare) is None
    _, page = write(tmp_path, records=[])
    assert "No round has finished." in page.texts


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="can't be written"):
        write_report(tmp_path / "no" / "report.html", title="t", records=[])


def test_lines_have_gaps_where_there_are_no_values() -> None:
    svg = line_chart([1, 2, 3, 4], [Series("a", [0.1, None, 0.3, 0.4])], label="l", top=1.0)
    (path,) = [part for part in svg.split('"') if part.startswith("M")]
    assert path.count("M") == 2
    assert path.count("L") == 1
    assert line_chart([1], [Series("a", [None])], label="l") == ""


def test_highest_value_lies_at_the_top_and_zero_at_the_bottom() -> None:
    svg = line_chart([1, 2], [Series("a", [0.0, 1.0])], label="l", top=1.0)
    assert "M52.0 226.0 L540.0 12.0" in svg


def test_columns_stack_to_their_sum() -> None:
    svg = stacked_columns([1], {"a": [3.0], "b": [1.0]}, label="l", show=lambda v: f"{v:g} s")
    heights = [float(part.split('"')[1]) for part in svg.split("height=")[1:] if 'class="f' not in part[:5]]
    assert heights[0] == pytest.approx(3 * heights[1], rel=0.02)
    assert stacked_columns([1], {"a": [0.0]}, label="l", show=str) == ""


def test_bars_are_as_wide_as_their_share() -> None:
    html = bars([("x", 0.25, ""), ("y", None, "n"), ("z", 1.5, "")])
    assert [part.split("%")[0] for part in html.split("width:")[1:]] == ["25.0", "0.0", "100.0"]


@given(st.floats(1e-6, 1e9))
def test_ticks_reach_the_largest_value_in_few_even_steps(largest: float) -> None:
    ticks = nice_ticks(largest)
    assert ticks[0] == 0
    assert ticks[-1] >= largest * (1 - 1e-6) - 1e-10
    assert 2 <= len(ticks) <= 8


def test_png_is_the_image() -> None:
    import base64
    import io

    from PIL import Image

    image = np.random.default_rng(0).integers(0, 256, (3, 5, 4)).astype(np.uint8)
    decoded = Image.open(io.BytesIO(base64.b64decode(png_data_uri(image).partition(",")[2])))
    assert np.array_equal(np.asarray(decoded), image.transpose(1, 2, 0))
    grey = Image.open(io.BytesIO(base64.b64decode(png_data_uri(image[:1]).partition(",")[2])))
    assert np.array_equal(np.asarray(grey), image[0])


def test_many_pictures_are_cut_and_counted() -> None:
    html = picture_rows(pictures(4 * MAX_PER_CLASS), ("cat", "dog"))
    assert html.count("<img") == 2 * MAX_PER_CLASS
    assert f"{2 * MAX_PER_CLASS}, {MAX_PER_CLASS} shown" in html
    assert html.index("cat") < html.index("dog")


def test_pictures_are_read_from_their_artifact(tmp_path: Path) -> None:
    images = np.arange(2 * 3 * 4 * 4, dtype=np.uint8).reshape(2, 3, 4, 4)
    labels = np.array([1, 0], np.int64)
    path = tmp_path / "impressions.safetensors"
    tensors = {
        "images": (TensorSpec("images", "U8", (2, 3, 4, 4)), images.tobytes()),
        "labels": (TensorSpec("labels", "I64", (2,)), labels.tobytes()),
    }
    write_tensor_file(path, tensors)
    got = read_pictures(path, 5)
    assert got.round == 5
    assert np.array_equal(got.images, images)
    assert np.array_equal(got.labels, labels)


@pytest.mark.parametrize(
    "specs",
    [
        [TensorSpec("images", "U8", (2, 3, 4, 4))],
        [TensorSpec("images", "F32", (2, 3, 4, 4)), TensorSpec("labels", "I64", (2,))],
        [TensorSpec("images", "U8", (2, 3, 4, 4)), TensorSpec("labels", "I64", (3,))],
        [TensorSpec("images", "U8", (2, 16)), TensorSpec("labels", "I64", (2,))],
    ],
)
def test_what_are_no_impressions_is_refused(specs: list[TensorSpec], tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensor_file(path, {spec.name: (spec, bytes(spec.size_bytes)) for spec in specs})
    with pytest.raises(StorageError, match=r"x\.safetensors"):
        read_pictures(path, 1)
