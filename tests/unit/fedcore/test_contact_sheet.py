"""The sheet of impressions: enlarged without inventing pixels, labelled, readable by its owner only."""

from pathlib import Path

import numpy as np
import pytest

from fedcore.errors import ConfigError, StorageError
from fedcore.report.contact_sheet import Caption, png_sheet, write_sheet
from fedcore.report.pictures import Pictures

CAPTION = Caption("Federated impressions", "Run blood-1 · round 6")


def pictures(count: int = 30, classes: int = 3, side: int = 28, channels: int = 3) -> Pictures:
    images = np.random.default_rng(0).integers(0, 256, (count, channels, side, side), np.uint8)
    return Pictures(6, images, np.arange(count, dtype=np.int64) % classes)


def test_each_pixel_becomes_a_square_of_its_colour() -> None:
    found = pictures(count=1, classes=1)
    sheet = np.asarray(png_sheet(found, ["monocyte"], CAPTION, per_class=8))
    enlarged = found.images[0].transpose(1, 2, 0).repeat(3, 0).repeat(3, 1)
    height, width = enlarged.shape[:2]
    windows = [
        (y, x)
        for y in range(sheet.shape[0] - height + 1)
        for x in range(200, 260)
        if (sheet[y, x] == enlarged[0, 0]).all() and (sheet[y : y + height, x : x + width] == enlarged).all()
    ]
    assert len(windows) == 1


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side", [8, 28, 224, 1500])
def test_sizes_from_digits_to_slides_fit_on_the_sheet(side: int, channels: int) -> None:
    sheet = png_sheet(pictures(4, 2, side, channels), ["a", "b"], CAPTION, per_class=8)
    assert sheet.width >= 1340
    assert sheet.height > 2 * max(44, side)


def test_a_class_shows_no_more_than_asked_and_wraps() -> None:
    few, many = (png_sheet(pictures(90, 1), ["a"], CAPTION, per_class=n).height for n in (10, 90))
    assert many > few
    long_name = png_sheet(pictures(3, 3), ["immature granulocytes, all of them" * 9, "β", "细胞"], CAPTION, 9)
    assert long_name.width == 1340


def test_a_page_holds_names_and_pictures(tmp_path: Path) -> None:
    out = tmp_path / "made" / "sheet.html"
    write_sheet(out, pictures(), ("<b>lymphocyte</b>",), CAPTION, per_class=4)
    text = out.read_text()
    assert text.count("data:image/png;base64,") == 12
    assert "&lt;b&gt;lymphocyte" in text
    assert out.stat().st_mode & 0o777 == 0o600


def test_other_names_and_places_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="png or .html"):
        write_sheet(tmp_path / "sheet.jpeg", pictures(), (), CAPTION)
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="can't be written"):
        write_sheet(tmp_path / "file" / "sheet.png", pictures(), (), CAPTION)
