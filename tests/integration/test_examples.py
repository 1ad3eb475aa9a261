"""examples/retina and examples/factory: their recipes, their plans, and the factory's README run as it stands."""

import csv
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

import fedsim
from fedagent.config import AgentConfig
from fedagent.site_images import open_site_dataset
from fedcore.config import load_config
from fedcore.data import LabelledImages
from fedcore.data.benchmark_sets import Federation as SimulatedFederation
from fedcore.data.benchmark_sets import SiteSplit
from fedcore.errors import ConfigError, DataError
from fedcore.plan import Plan, load_plan
from fedctl.demo_processes import free_ports
from fedserver.strategies import load_strategy
from tests.federation_fixture import Federation, wait_until

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
RETINA, FACTORY = EXAMPLES / "retina", EXAMPLES / "factory"
HOSPITALS = ("hospital-a", "hospital-b", "hospital-c", "hospital-d")
PLANTS = ("plant-north", "plant-south", "plant-east")
NUMBERS = "0=none, 1=mild, 2=moderate, 3=severe, 4=proliferative"
WORDS = "no DR=none, mild NPDR=mild, moderate NPDR=moderate"


def load_script(path: Path) -> ModuleType:
    """A recipe as a module, whose command is a plain function."""
    name = f"example_{path.parent.name}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


draw_retinas = load_script(RETINA / "make_images.py")
crop_images = load_script(RETINA / "crop_images.py")
make_csv = load_script(RETINA / "make_csv.py")
draw_surfaces = load_script(FACTORY / "make_images.py")


def build_table(hospital: Path, **changes: object) -> Path:
    """make_csv.py as a hospital calls it; returns the table."""
    arguments = {
        "images": hospital / "cropped",
        "grades": hospital / "grades.csv",
        "plan": RETINA / "plan.toml",
        "out": hospital / "images.csv",
        "mapping": WORDS if hospital.name == "hospital-d" else NUMBERS,
        "validation": 0.1,
        "test": 0.2,
        "update": False,
    }
    arguments |= changes
    make_csv.main(**arguments)
    table = arguments["out"]
    assert isinstance(table, Path)
    return table


def rows_of(table: Path) -> list[dict[str, str]]:
    with table.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


@pytest.fixture(scope="module")
def retina(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four hospitals, drawn small, cropped, with their tables."""
    root = tmp_path_factory.mktemp("retina")
    draw_retinas.main(out=root, patients=14, size=96, seed=0)
    for name in HOSPITALS:
        crop_images.main(images=root / name / "images", out=root / name / "cropped", size=80, threshold=0.06)
        build_table(root / name)
    return root


@pytest.fixture
def hospital(retina: Path, tmp_path: Path) -> Path:
    """One hospital's cropped images and grades, to be spoilt."""
    for part in ("cropped", "grades.csv"):
        source = retina / "hospital-b" / part
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / part)
    return tmp_path


# -- plans and configuration ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", sorted(EXAMPLES.glob("*/plan*.toml")), ids=lambda p: f"{p.parent.name}/{p.stem}"
)
def test_plans_are_valid_and_agents_name_the_same_classes(path: Path) -> None:
    plan = load_plan(path)
    strategy = load_strategy(plan)
    assert strategy.name == "fedimpres"
    agent = load_config(path.parent / "agent.toml", AgentConfig)
    assert agent.data.class_names == plan.data.class_names
    assert agent.policy.share_class_metrics is False
    assert plan.sites == (HOSPITALS if path.parent == RETINA else PLANTS)


def test_the_retina_plans_differ_in_size_and_length_only() -> None:
    full, small = load_plan(RETINA / "plan.toml"), load_plan(RETINA / "plan_small.toml")
    assert (full.model.name, full.model.input, full.model.options) == ("alexnet_bn", (3, 256, 256), {})
    assert small.model.name == full.model.name
    for section in ("data", "transform", "sites", "min_sites", "strategy", "strategy_options"):
        assert getattr(small, section) == getattr(full, section), section


# -- retina: images ---------------------------------------------------------------------------------


def test_drawn_retinas_are_the_same_for_the_same_arguments_and_differ_between_hospitals(
    retina: Path, tmp_path: Path
) -> None:
    for out in ("one", "other"):
        draw_retinas.main(out=tmp_path / out, patients=2, size=48, seed=3)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*"))
    assert len(files) == len(HOSPITALS) * 5, "two patients' eyes and a table each"
    assert all((tmp_path / "one" / f).read_bytes() == (tmp_path / "other" / f).read_bytes() for f in files)
    with pytest.raises(ConfigError, match="nothing was changed"):
        draw_retinas.main(out=tmp_path / "one", patients=1, size=48, seed=0)
    colours = [
        np.mean([pixels(path).mean(axis=(0, 1)) for path in (retina / name / "cropped").iterdir()], axis=0)
        for name in HOSPITALS
    ]
    apart = [np.abs(a - b).max() for n, a in enumerate(colours) for b in colours[:n]]
    assert min(apart) > 6, "grey levels between the mean colours of any two cameras"


def test_crops_hold_the_field_of_view_whole_and_round(retina: Path) -> None:
    for name in HOSPITALS:
        before = sorted((retina / name / "images").iterdir())
        after = sorted((retina / name / "cropped").iterdir())
        assert [p.name for p in before] == [p.name for p in after]
        bright = pixels(after[0]).max(axis=2) > 15
        assert bright.shape == (80, 80)
        columns, rows = bright.any(axis=0).sum(), bright.any(axis=1).sum()
        assert columns >= 78, "the field reaches both sides"
        if name != "hospital-b":  # whose camera cuts it off above and below
            assert abs(int(columns) - int(rows)) <= 4, "a circle stays a circle"
    squeezed = pixels(sorted((retina / "hospital-b" / "cropped").iterdir())[0]).max(axis=2) > 15
    assert 60 <= squeezed.any(axis=1).sum() <= 76, "padded, not stretched"


def test_a_photograph_without_a_field_of_view_is_named_and_the_others_are_cropped(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (90, 60), (4, 4, 4)).save(images / "dark.png")
    (images / "broken.jpg").write_bytes(b"no picture")
    Image.new("RGB", (90, 60), (90, 40, 20)).save(images / "fine.png")
    with pytest.raises(DataError, match="2 images could not be cropped") as caught:
        crop_images.main(images=images, out=tmp_path / "out", size=32, threshold=0.06)
    assert "dark.png: no field of view found" in caught.value.message
    assert "broken.jpg" in caught.value.message
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["fine.png"]


# -- retina: the table ------------------------------------------------------------------------------


def test_both_eyes_of_a_patient_are_in_one_split_and_every_split_has_patients(retina: Path) -> None:
    for name in HOSPITALS:
        rows = rows_of(retina / name / "images.csv")
        assert len(rows) == 28
        splits: dict[str, set[str]] = {}
        for row in rows:
            splits.setdefault(row["patient"], set()).add(row["split"])
            assert row["path"] == f"cropped/{row['patient']}_{row['path'].rsplit('_', 1)[1]}"
        assert all(len(found) == 1 for found in splits.values())
        assert set().union(*splits.values()) == {"train", "val", "test"}
    words = {row["label"] for row in rows_of(retina / "hospital-d" / "images.csv")}
    assert words == {"none", "mild", "moderate"}, "this hospital writes words and has no severe eyes"


def test_patients_are_drawn_by_their_worst_grade() -> None:
    classes = ("none", "severe")
    graded = make_csv.GradedImage
    rows = [graded(Path(f"{n}-left"), f"p{n:02}", "none", 2 * n) for n in range(40)]
    rows += [
        graded(Path(f"{n}-right"), f"p{n:02}", "severe" if n < 20 else "none", 2 * n + 1) for n in range(40)
    ]
    splits = make_csv.split_patients(rows, classes, validation=0.1, test=0.2, kept={})
    for patients in (range(20), range(20, 40)):
        found = [splits[f"p{n:02}"] for n in patients]
        assert [found.count(split) for split in ("train", "val", "test")] == [14, 2, 4]


def test_update_adds_patients_and_moves_none(hospital: Path) -> None:
    grades = hospital / "grades.csv"
    lines = grades.read_text().splitlines()
    early = [line for line in lines[1:] if "p00" in line]
    grades.write_text("\n".join([lines[0], *early]) + "\n")
    before = {row["path"]: row["split"] for row in rows_of(build_table(hospital))}
    grades.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match="nothing was changed"):
        build_table(hospital)
    after = {row["path"]: row["split"] for row in rows_of(build_table(hospital, update=True))}
    assert len(before) == len(early) < len(after) == len(lines) - 1
    assert {path: after[path] for path in before} == before
    assert {after[path] for path in after.keys() - before.keys()} >= {"train"}


def _spoil(grades: Path, old: str, new: str) -> None:
    text = grades.read_text()
    assert old in text
    grades.write_text(text.replace(old, new, 1))


def test_what_is_wrong_with_a_table_of_grades_is_said(hospital: Path) -> None:
    grades = hospital / "grades.csv"
    good = grades.read_text()
    (first, second, *_) = good.splitlines()[1:]
    name, patient, grade = first.split(",")
    for old, new, words in (
        (first, f"{name},{patient},7", r"unknown grade '7' \(1 images\); known: 0, 1, 2, 3, 4"),
        (first, f"{name},,{grade}", "line 2: `patient` is empty"),
        (first, f"gone.png,{patient},{grade}", r"1 images are not below .*line 2: gone\.png"),
        (first, f"../{name},{patient},{grade}", "leads out of"),
        (second, first, "line 3: 'p001_left.png' stands in line 2 already"),
        ("patient", "person", "no column 'patient', only: image, person, grade"),
    ):
        _spoil(grades, old, new)
        with pytest.raises(DataError, match=words):
            build_table(hospital)
        grades.write_text(good)
    shutil.copy(hospital / "cropped" / name, hospital / "cropped" / "again.png")
    grades.write_text(f"{good}again.png,p999,{grade}\n")
    with pytest.raises(DataError, match=f"the same picture is patient {patient}, .* and patient p999"):
        build_table(hospital)
    assert sorted(path.name for path in hospital.iterdir()) == ["cropped", "grades.csv"], "no half a table"


def test_a_map_names_classes_of_the_plan_and_may_leave_grades_out(hospital: Path) -> None:
    for text, words in (
        ("0=nothing", "'nothing' is no class"),
        ("0", "not GRADE=CLASS"),
        ("0=none,0=mild", "twice"),
    ):
        with pytest.raises(ConfigError, match=words):
            build_table(hospital, mapping=text)
    rows = rows_of(build_table(hospital, mapping=NUMBERS.replace("4=proliferative", "4=")))
    graded = [row["grade"] for row in rows_of(hospital / "grades.csv")]
    assert len(rows) == sum(grade != "4" for grade in graded) < len(graded)


def test_errors_on_the_command_line_are_two_lines_and_an_exit_code(hospital: Path) -> None:
    words = ["--images", str(hospital / "cropped"), "--grades", str(hospital / "none.csv")]
    words += ["--plan", str(RETINA / "plan.toml"), "--out", str(hospital / "images.csv")]
    done = subprocess.run(
        [sys.executable, str(RETINA / "make_csv.py"), *words],
        capture_output=True, text=True, timeout=270, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("error[data_invalid]: ")
    assert "none.csv: not a readable CSV table" in done.stderr
    assert "Traceback" not in done.stderr


# -- retina: a run ----------------------------------------------------------------------------------


def small(plan: Plan) -> Plan:
    """The plan with the least that alexnet_bn takes, for two rounds."""
    model = plan.model.model_copy(update={"input": (3, 64, 64), "options": {"hidden": 16}})
    training = plan.training.model_copy(update={"epochs": 1, "batch_size": 8})
    synthesis = plan.synthesis.model_copy(update={"images": 5, "warmup_rounds": 1})
    options = {**plan.strategy_options, "steps": 3, "gate": False}
    changes = {"rounds": 2, "model": model, "training": training, "synthesis": synthesis}
    return plan.model_copy(update={**changes, "strategy_options": options})


def test_the_retina_plan_trains_on_the_tables_as_the_agents_read_them(retina: Path, tmp_path: Path) -> None:
    plan = small(load_plan(RETINA / "plan.toml"))
    config = load_config(RETINA / "agent.toml", AgentConfig).data
    sites: dict[str, SiteSplit] = {}
    for name in HOSPITALS:
        table = retina / name / "images.csv"
        reader = open_site_dataset(config.model_copy(update={"path": str(table)}).model_dump())
        assert reader.summarise().class_names == plan.class_names, "what the coordinator is told"
        data = reader.read(plan)
        splits = [row["split"] for row in rows_of(table)]
        counts = (len(data.train), len(data.validation), len(data.test))
        assert counts == tuple(splits.count(split) for split in ("train", "val", "test"))
        sites[name] = SiteSplit(data.train, data.validation, data.test)
    federation = SimulatedFederation(
        dataset="retina",
        sites=sites,
        class_names=plan.class_names,
        input=plan.model.input,
        pooled_test=LabelledImages(
            np.concatenate([site.test.images for site in sites.values()]),
            np.concatenate([site.test.labels for site in sites.values()]),
        ),
        description="examples/retina, drawn small",
        method="real sites",
        alpha=None,
        seed=0,
    )
    result = fedsim.run(plan, federation, threads=1, out=tmp_path / "out")
    assert result.state == "DONE"
    assert [record.aggregated for record in result.records] == [4, 4]
    assert result.records[1].impressions is not None
    for name, site in sites.items():
        assert result.records[1].sites[name].num_examples == len(site.test)
    assert set(result.impressions), "impressions were made"


# -- factory ----------------------------------------------------------------------------------------


def test_each_plant_lacks_a_defect_and_has_a_light_of_its_own(tmp_path: Path) -> None:
    classes = set(load_plan(FACTORY / "plan.toml").class_names)
    assert set(draw_surfaces.DEFECTS) == classes
    for out in ("one", "other"):
        draw_surfaces.main(out=tmp_path / out, images=4, size=32, seed=5)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.png"))
    assert all((tmp_path / "one" / f).read_bytes() == (tmp_path / "other" / f).read_bytes() for f in files)
    levels = []
    for plant in PLANTS:
        held = {path.name for path in (tmp_path / "one" / plant / "train").iterdir()}
        assert held == {path.name for path in (tmp_path / "one" / plant / "test").iterdir()}
        assert 1 <= len(classes - held) <= 2
        assert "none" in held
        levels.append(np.mean([pixels(p).mean() for p in (tmp_path / "one" / plant).rglob("none/*.png")]))
    assert min(abs(a - b) for n, a in enumerate(levels) for b in levels[:n]) > 10
    incoming = {path.stem.rsplit("_", 1)[0] for path in (tmp_path / "one" / "incoming").iterdir()}
    assert incoming == {f"{plant}_{label}" for plant in PLANTS for label in classes}


def commands_of(readme: Path) -> str:
    """The commands that a README shows, in order."""
    blocks = re.findall(r"^```\n(.*?)^```$", readme.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return "\n".join(blocks)


@pytest.fixture
def trial(tmp_path: Path) -> Iterator[Federation]:
    """Environment, mark and ports for a README's commands; no process may be left at the end."""
    made = Federation(tmp_path, *free_ports(2))
    yield made
    for line in made.leftovers():
        os.kill(int(line.split()[0]), signal.SIGKILL)


@pytest.mark.long
def test_the_factorys_readme_runs_as_it_stands(trial: Federation) -> None:
    """Every command of it, with smaller images and fewer rounds, in a folder and on ports of the test's own."""
    plan = trial.root / "plan.toml"
    text = (FACTORY / "plan.toml").read_text()
    for old, new in (
        ("rounds = 15", "rounds = 3"),
        ("[1, 64, 64]", "[1, 32, 32]"),
        ("epochs = 2", "epochs = 5"),
        ("batch_size = 32", "batch_size = 16"),
    ):
        assert old in text
        text = text.replace(old, new)
    plan.write_text(text)
    home = trial.root / "works"
    script = commands_of(FACTORY / "README.md")
    ready = "until fedctl status >/dev/null 2>&1; do sleep 0.2; done\n"
    for old, new in (
        ('"$PWD/.venv/bin:$PATH"', f'"{Path(sys.executable).parent}:$PATH"'),
        ("FED=/tmp/surface", f"FED={home}"),
        ("--out $FED/images\n", "--out $FED/images --images 24 --size 32\n"),
        ("--host 127.0.0.1\n", f"--host 127.0.0.1 --port {trial.port} --enroll-port {trial.enroll_port}\n"),
        ("for plant in", f"{ready}for plant in"),  # a person types slowly enough
        ("submit examples/factory/plan.toml", f"submit {plan}"),
    ):
        assert old in script, f"the README changed: {old}"
        script = script.replace(old, new)
    done = subprocess.run(
        ["bash", "-eu", "-o", "pipefail", "-c", script],
        cwd=EXAMPLES.parent,
        env=trial.environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=270,
        check=False,
    )
    logs = "".join(path.read_text() for path in home.glob("*.log"))
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{logs}"
    assert all(plant in done.stdout for plant in PLANTS)
    assert "DONE" in done.stdout
    scores = [line.split("\t") for line in (home / "scores.tsv").read_text().splitlines()]
    assert len(scores) == 3 * 5 * 6
    right = [Path(path).stem.split("_")[1] == label for path, label, _ in scores]
    assert sum(right) / len(right) > 0.35, "chance is 0.2"
    wait_until(lambda: not trial.leftovers(), f"all processes gone, but there are {trial.leftovers()}", 20)
