"""Pictures: what is drawn is worked out by hand; files are whole, and the same each time."""

import base64
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import fedsim
from fedcore.data.benchmark_sets import Federation
from fedcore.errors import StorageError
from fedcore.plan import Plan
from fedcore.report.pictures import Pictures
from fedsim.bars import MOST_SITES, class_bars, forgetting_bars, forgetting_curve, site_bars
from fedsim.figure_files import stem_of
from fedsim.impression_plots import CELL_GAP_PX, GAP_PX, SHOWN, grid
from fedsim.projection import PROJECTION_FILE, principal_plane, write_projection
from fedsim.statistics import Setting, settings_of
from fedsim.summary import picked_of
from fedsim.writing import write_results

Line = dict[str, Any]
MakePlan = Callable[..., Plan]
FIGURES = (
    "accuracy", "accuracy_last5", "balanced_accuracy", "balanced_accuracy_last5", "worst_site_accuracy",
    "worst_class_recall", "forgetting", "bytes_per_round", "seconds_per_round", "rounds_to_90_percent",
)  # fmt: skip


def line(
    strategy: str,
    seed: int,
    sites: dict[str, float] | None = None,
    classes: dict[str, float] | None = None,
    *,
    forgetting: dict[str, float | None] | None = None,
    partition: str = "dirichlet:0.1",
    **data: Any,
) -> Line:
    """A line of runs.jsonl; without `sites` one of an older version."""
    row: Line = {"profile": "small", "dataset": "digits", "alpha": 0.1, "model": "cnn", "strategy": strategy}
    row |= {"ablation": None, "seed": seed, **dict.fromkeys(FIGURES, 0.5), "hardware": "cpu"}
    row["forgetting"] = None if forgetting is None else sum(v or 0 for v in forgetting.values())
    curve = [0.2, 0.4 + seed / 10]
    found: Line = {
        "row": row,
        "config": f"{strategy}{seed}",
        "model": "m",
        "seconds": 1.0,
        "folder": "runs/none",
    }
    found["curves"] = dict.fromkeys(("accuracy", "balanced_accuracy", "worst_site_accuracy"), curve)
    found["spec"] = {"data": {"sites": 2, **data}}
    if sites is not None:
        picked = {"sites": sites, "classes": classes or {}}
        found |= {"picked": picked, "forgetting": forgetting or {}, "partition": partition}
    return found


def setting(*lines: Line) -> Setting:
    (found,) = settings_of(lines)
    return found


def test_sites_that_each_seed_deals_anew_are_ranked() -> None:
    found = site_bars(
        setting(
            line("fedavg", 0, {"site-1": 0.9, "site-2": 0.3, "site-3": 0.6}),
            line("fedavg", 1, {"site-1": 0.5, "site-2": 0.7, "site-3": 0.8}),
            line("fedbn", 0, {"site-1": 0.2, "site-2": 0.4, "site-3": 0.1}),
        ).groups
    )
    assert found is not None
    assert found.ticks == ("worst", "2", "best")
    assert found.values[0][0] == pytest.approx((0.4, 0.3, 0.5))
    assert found.values[0][2] == pytest.approx((0.85, 0.8, 0.9))
    assert found.values[1] == ((0.1, 0.1, 0.1), (0.2, 0.2, 0.2), (0.4, 0.4, 0.4))


@pytest.mark.parametrize("how", [{"partition": "by_site+feature_shift:1"}, {"partition_file": "p.json"}])
def test_sites_that_stay_the_same_keep_their_names(how: dict[str, str]) -> None:
    lines = [line("fedavg", seed, {"b": 0.2 + seed / 10, "a": 0.9}, **how) for seed in (0, 1)]
    lines = [{**entry, "split": "0123abcd"} for entry in lines]
    found = site_bars(setting(*lines).groups)
    assert found is not None
    assert found.ticks == ("b", "a")
    assert found.values[0][0] == pytest.approx((0.25, 0.2, 0.3))


def test_of_many_sites_the_worst_are_shown() -> None:
    accuracies = {f"site-{n}": n / 100 for n in range(40, 0, -1)}
    found = site_bars(setting(line("fedavg", 0, accuracies)).groups)
    assert found is not None
    assert found.title.endswith(f"the {MOST_SITES} worst of 40")
    assert found.ticks[:2] == ("site-1", "site-2")
    assert len(found.ticks) == len(found.values[0]) == MOST_SITES
    ranked = site_bars(setting(line("fedavg", 0, accuracies), line("fedavg", 1, accuracies)).groups)
    assert ranked is not None
    assert ranked.ticks[-1] == str(MOST_SITES)


def test_classes_and_forgetting_are_averaged_over_the_seeds_that_have_them() -> None:
    groups = setting(
        line("fedavg", 0, {"a": 1.0}, {"x": 0.2}, forgetting={"4": 0.1, "5": None}),
        line("fedavg", 1, {"a": 1.0}, {"x": 0.4, "y": 1.0}, forgetting={"4": 0.3, "5": 0.2}),
        line("pooled", 0),
    ).groups
    bars = class_bars(groups)
    assert bars is not None
    assert bars.ticks == ("x", "y")
    assert bars.values[0][0] == pytest.approx((0.3, 0.2, 0.4))
    assert bars.values[0][1] == (1.0, 1.0, 1.0)
    assert bars.values[1] == (None, None)
    forgotten = forgetting_bars(groups)
    assert forgotten is not None
    assert forgotten.ticks == ("fedavg",)
    assert forgotten.values[0][0] == pytest.approx((0.3, 0.1, 0.5))
    assert forgetting_curve(groups[0]) == [(4, pytest.approx(0.2), 0.1, 0.3), (5, 0.2, 0.2, 0.2)]
    assert forgetting_curve(groups[1]) == []


def test_lines_of_older_versions_have_neither() -> None:
    groups = setting(line("fedavg", 0), line("fedavg", 1)).groups
    assert site_bars(groups) is class_bars(groups) is forgetting_bars(groups) is None
    assert picked_of([], None, {}) == {"picked": None, "forgetting": {}}


def test_names_are_short_and_tell_settings_apart() -> None:
    assert stem_of("sites", setting(line("fedavg", 0))) == "sites-digits-a0.1-2s-cnn-small"
    other = line("fedavg", 0, partition="shards:2+feature_shift:1")
    other["row"]["alpha"] = None
    other["row"]["dataset"] = "/data/own.npz"
    other["spec"]["data"]["partition"] = "shards:2+feature_shift:1"
    assert setting(other).title == "/data/own.npz, shards:2+feature_shift:1, 2 sites, cnn, small profile"
    assert stem_of("features", setting(other), "fedimpres") == (
        "features-own.npz-shards-2-shift1-2s-cnn-small-fedimpres"
    )
    saved = {**line("fedavg", 0, partition_file="p.json"), "split": "0123abcd"}
    assert setting(saved).title == "digits, alpha 0.1, split 0123abcd of p.json, 2 sites, cnn, small profile"


def test_a_grid_has_a_row_a_class_and_a_column_a_round() -> None:
    def bank(number: int, labels: list[int]) -> Pictures:
        images = np.stack([np.full((1, 2, 3), 10 * number + n, np.uint8) for n in range(len(labels))])
        return Pictures(number, images, np.array(labels, dtype=np.int64))

    found = grid([bank(1, [0, 5, 0]), bank(2, [5, 5])], [0, 5])
    cell = 2 * 3 + GAP_PX
    assert found.across == 2
    assert found.pixels.shape == (2 + CELL_GAP_PX + 2, cell + CELL_GAP_PX + cell, 3)
    assert (found.rows, found.columns[0]) == ((0.5, 2 + CELL_GAP_PX + 0.5), (cell - 1) / 2)
    assert found.pixels[0, 0].tolist() == [10, 10, 10]
    assert found.pixels[0, 3 + GAP_PX, 0] == 12
    assert found.pixels[0, 3, 0] == 255
    # Round 2 has no impression of class 0.
    assert (found.pixels[:2, cell + CELL_GAP_PX :] == 255).all()
    assert found.pixels[-1, -1, 0] == 21
    many = grid([bank(1, [0] * 9)], [0])
    assert many.across == SHOWN


def test_principal_plane_by_hand() -> None:
    # Spread 3 times as wide along (3, 4)/5 as along (4, -3)/5, about (1, 2).
    long, short = np.array([0.6, 0.8]), np.array([0.8, -0.6])
    points = np.array([1.0, 2.0]) + np.stack([3 * long, -3 * long, short, -short])
    mean, axes, shares = principal_plane(points)
    assert mean == pytest.approx([1.0, 2.0])
    assert axes[0] == pytest.approx(long)
    assert axes[1] == pytest.approx(short)
    assert shares == pytest.approx((0.9, 0.1))
    _, axes, shares = principal_plane(np.ones((5, 3)))
    assert not axes.any()
    assert shares == (0.0, 0.0)


@pytest.fixture(scope="module")
def real_run(federation: Federation, make_plan: MakePlan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One real run that made impressions in two rounds."""
    folder = tmp_path_factory.mktemp("pictures") / "real"
    eager = {"worth_remembering": 0, "gate": False}
    result = fedsim.run(make_plan(strategy="fedimpres", strategy_options=eager), federation, out=folder)
    write_projection(result, federation, folder)
    return folder


@pytest.fixture
def run_folder(real_run: Path, tmp_path: Path) -> Path:
    """A folder of results with that run, to be changed."""
    return Path(shutil.copytree(real_run, tmp_path / "runs" / "real"))


def real_line(folder: Path) -> Line:
    found = line("fedimpres", 0, {"site-1": 0.5}, {"0": 0.5})
    return {**found, "folder": f"{folder.parent.name}/{folder.name}"}


def test_projection_holds_real_images_and_impressions(run_folder: Path) -> None:
    found = json.loads((run_folder / PROJECTION_FILE).read_text())
    assert found["round"] == 2
    assert found["class_names"] == [str(n) for n in range(10)]
    points = np.array(found["real"]["points"])
    assert points.shape == (len(found["real"]["labels"]), 2)
    # The plane is that of the real images: their mean is its origin, its axes are uncorrelated there.
    assert np.abs(points.mean(axis=0)).max() < 1e-3
    assert abs(np.corrcoef(points.T)[0, 1]) < 1e-2
    assert points[:, 0].std() >= points[:, 1].std()
    assert 0 < found["explained"][1] <= found["explained"][0] <= 1
    assert len(found["impressions"]["points"]) == len(found["impressions"]["labels"]) > 0


def test_everything_is_drawn_and_embedded(run_folder: Path, tmp_path: Path) -> None:
    lines = [
        real_line(run_folder),
        line("fedimpres", 1, {"site-1": 0.7}, {"0": 0.1}, forgetting={"1": 0.1, "2": 0.2}),
    ]
    write_results(lines, tmp_path)
    kinds = ("curves", "sites", "classes", "forgetting", "impressions", "features")
    pictures = {kind: sorted(tmp_path.glob(f"{kind}-*")) for kind in kinds}
    for found in pictures.values():
        assert [path.suffix for path in found] == [".png", ".svg"]
        with Image.open(found[0]) as image:
            colours = image.convert("RGB").getcolors(1 << 24)
        assert colours is not None
        assert len(colours) > 20
    report = (tmp_path / "report.html").read_text()
    embedded = [base64.b64decode(data) for data in re.findall(r"data:image/png;base64,([^\"]+)", report)]
    assert embedded == [pictures[kind][0].read_bytes() for kind in kinds[1:]]
    assert "img-src data:" in report
    assert "http" not in report.replace("http-equiv", "").replace("http://www.w3.org/2000/svg", "")

    before = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in tmp_path.glob("*-*.*g")}
    write_results(lines, tmp_path)
    assert before == {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in tmp_path.glob("*-*.*g")}


def test_results_of_older_versions_are_drawn_as_far_as_they_go(tmp_path: Path) -> None:
    write_results([line("fedavg", 0), line("pooled", 0)], tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.svg")) == ["curves-digits-a0.1-2s-cnn-small.svg"]
    assert "<img" not in (tmp_path / "report.html").read_text()
    # New lines beside old ones: what is known is drawn.
    write_results([line("fedavg", 0), line("fedbn", 0, {"site-1": 0.5}, {"$x$": 0.5})], tmp_path)
    assert len(list(tmp_path.glob("classes-*.png"))) == 1


def test_damaged_files_of_a_run_are_named(run_folder: Path, tmp_path: Path) -> None:
    for text, message in (('{"round": ', "can't be read"), ('{"round": 2}', "'class_names' is missing")):
        (run_folder / PROJECTION_FILE).write_text(text)
        with pytest.raises(StorageError, match=f"projection.json: .*{message}"):
            write_results([real_line(run_folder)], tmp_path)
