"""Build the table that fedagent reads, from a folder of images and a table of grades.

    python make_csv.py --images DIR --grades grades.csv --plan plan.toml --map "0=none, 1=mild" --out images.csv

`grades.csv` has a header and a row an image: `image` (its path below --images), `patient`, `grade`. The result has
the columns path, label, split (train, val, test) and patient. Both eyes of a patient, and all visits, go to the same
split: a model that has seen one eye recognises the other, and its score would mean nothing. Patients are drawn by
their worst grade, so that every split has every grade where there are patients enough; the draw depends on the
table alone. --update adds new patients to an existing table and moves no patient in it.

The table stays at the hospital. fedagent reads path, label and split only.
"""

import csv
import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from fedcore.data import open_dataset
from fedcore.data.images import IMAGE_SUFFIXES
from fedcore.data.splits import cut_held_out
from fedcore.errors import ConfigError, DataError
from fedcore.plan import Plan, load_plan
from fedcore.program import run_program

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
SPLIT_NAMES = {"train": "train", "validation": "val", "test": "test"}
COLUMNS = ("path", "label", "split", "patient")
# How many of many problems a message shows.
SHOWN = 5


@dataclass(frozen=True, slots=True)
class GradedImage:
    """A row of the table of grades: `label` is a class of the plan, `line` where the row stands."""

    path: Path
    patient: str
    label: str
    line: int


@app.command()
def main(
    images: Annotated[Path, typer.Option(help="Folder with the images.")],
    grades: Annotated[Path, typer.Option(help="CSV with the columns image, patient, grade.")],
    plan: Annotated[Path, typer.Option(help="The federation's plan: it names the classes, mildest first.")],
    out: Annotated[Path, typer.Option(help="The table to write, outside of the agent's home.")],
    mapping: Annotated[
        str, typer.Option("--map", help='Grade to class: "0=none, 1=mild"; "ungradable=" leaves images out.')
    ] = "",
    validation: Annotated[
        float, typer.Option(help="Share of patients to validate on.", min=0, max=0.45)
    ] = 0.1,
    test: Annotated[float, typer.Option(help="Share of patients to test on.", min=0, max=0.45)] = 0.2,
    update: Annotated[
        bool, typer.Option("--update", help="Replace --out; its patients keep their split.")
    ] = False,
) -> None:
    """Build the table, check it, and read it back with the agent's own reader."""
    settings = load_plan(plan)
    if settings.data.class_names is None:
        raise ConfigError(f"{plan}: has no [data] class_names", hint="labels are names: the plan lists them")
    classes = settings.class_names
    if out.exists() and not update:
        raise DataError(f"{out} is there already; nothing was changed", hint="--update keeps its splits")
    rows = read_grades(grades, images, parse_map(mapping, classes))
    check_files(rows, images, grades)
    kept = read_splits(out) if update and out.exists() else {}
    splits = split_patients(rows, classes, validation=validation, test=test, kept=kept)
    partial = out.with_name(f".{out.name}.part")
    try:
        write_table(partial, rows, splits, out.parent)
        report(rows, splits, classes)
        typer.echo(read_back(partial, settings))
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)
    typer.echo(f"{out}: {len(rows)} images of {len(splits)} patients")


def parse_map(text: str, classes: Sequence[str]) -> Mapping[str, str]:
    """ "0=none, ungradable=" as a mapping; without text every class is called as the plan calls it.

    Raises ConfigError.
    """
    if not text.strip():
        return {name: name for name in classes}
    mapping: dict[str, str] = {}
    for part in filter(str.strip, text.split(",")):
        grade, equals, label = (word.strip() for word in part.partition("="))
        if not equals or not grade:
            raise ConfigError(f"--map: '{part.strip()}' is not GRADE=CLASS")
        if grade in mapping:
            raise ConfigError(f"--map: grade '{grade}' stands there twice")
        if label and label not in classes:
            raise ConfigError(f"--map: '{label}' is no class of the plan: {', '.join(classes)}")
        mapping[grade] = label
    return mapping


def read_grades(table: Path, images: Path, mapping: Mapping[str, str]) -> list[GradedImage]:
    """The table's rows with the plan's classes, less those whose grade is mapped to nothing.

    Raises DataError: a column or value is missing, a grade is not in the mapping, an image stands there twice
    or leads out of `images`.
    """
    root = images.resolve()
    rows: dict[Path, GradedImage] = {}
    unknown: Counter[str] = Counter()
    for line, row in _read_csv(table, ("image", "patient", "grade")):
        name, patient, grade = row["image"], row["patient"], row["grade"]
        path = (root / name).resolve()
        if not path.is_relative_to(root):
            raise DataError(f"{table} line {line}: '{name}' leads out of {root}")
        if path in rows:
            raise DataError(f"{table} line {line}: '{name}' stands in line {rows[path].line} already")
        if grade not in mapping:
            unknown[grade] += 1
        elif mapping[grade]:
            rows[path] = GradedImage(path, patient, mapping[grade], line)
    if unknown:
        listed = ", ".join(f"'{grade}' ({count} images)" for grade, count in unknown.most_common(SHOWN))
        raise DataError(
            f"{table}: unknown grade {listed}; known: {', '.join(mapping)}",
            hint='say what each means, --map "R1=mild, ungradable="; a grade that fits no class is left out',
        )
    if not rows:
        raise DataError(f"{table}: no row is left with a class of the plan")
    return list(rows.values())


def check_files(rows: Sequence[GradedImage], images: Path, table: Path) -> None:
    """Check that every image is there and that no picture is filed under two patients or two grades.

    Tells of images that no row names. Raises DataError.
    """
    missing = [f"line {row.line}: {row.path.name}" for row in rows if not row.path.is_file()]
    if missing:
        raise DataError(
            f"{table}: {len(missing)} images are not below {images}: {'; '.join(missing[:SHOWN])}",
            hint="check --images; paths in the column `image` start there",
        )
    first: dict[str, GradedImage] = {}
    for row in rows:
        other = first.setdefault(hashlib.sha256(row.path.read_bytes()).hexdigest(), row)
        if (other.patient, other.label) != (row.patient, row.label):
            raise DataError(
                f"{table} lines {other.line} and {row.line}: the same picture is patient {other.patient}, "
                f"{other.label}, and patient {row.patient}, {row.label}",
                hint="one of the rows is wrong; leave both out until it is known which",
            )
    named = {row.path for row in rows}
    found = [p for p in images.resolve().rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p not in named]
    if found:
        typer.echo(
            f"note: {len(found)} images below {images} are not used, {found[0].name} for one", err=True
        )


def split_patients(
    rows: Sequence[GradedImage],
    classes: Sequence[str],
    *,
    validation: float,
    test: float,
    kept: Mapping[str, str],
) -> dict[str, str]:
    """Patient -> split. Patients in `kept` stay where they are; the others are drawn by their worst class.

    `classes` goes from mild to severe. The only patient of a worst class goes to train.
    """
    worst: dict[str, int] = defaultdict(int)
    for row in rows:
        worst[row.patient] = max(worst[row.patient], classes.index(row.label))
    new = sorted(patient for patient in worst if patient not in kept)
    drawn = cut_held_out([worst[p] for p in new], validation_fraction=validation, test_fraction=test)
    splits = {patient: kept[patient] for patient in sorted(worst) if patient in kept}
    splits |= {new[int(n)]: SPLIT_NAMES[split] for split, indices in drawn.items() for n in indices}
    if "train" not in splits.values():
        raise DataError("no patient is left to train on", hint="lower --validation and --test")
    return splits


def read_splits(table: Path) -> dict[str, str]:
    """Patient -> split of a table made earlier. Raises DataError if a patient stands in two splits."""
    splits: dict[str, str] = {}
    for line, row in _read_csv(table, COLUMNS):
        patient, split = row["patient"], row["split"]
        if split not in SPLIT_NAMES.values() or splits.setdefault(patient, split) != split:
            raise DataError(
                f"{table} line {line}: patient '{patient}' is in split '{split}', "
                f"expected {splits.get(patient, 'train, val or test')}",
                hint="this table was not made by make_csv.py, or was edited; make it anew without --update",
            )
    return splits


def write_table(table: Path, rows: Sequence[GradedImage], splits: Mapping[str, str], folder: Path) -> None:
    """Write the table: paths relative to `folder` where they lie below it, else absolute."""
    folder.mkdir(parents=True, exist_ok=True)
    root = folder.resolve()
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in sorted(rows, key=lambda row: str(row.path)):
            path = row.path.relative_to(root) if row.path.is_relative_to(root) else row.path
            writer.writerow((path, row.label, splits[row.patient], row.patient))


def report(rows: Sequence[GradedImage], splits: Mapping[str, str], classes: Sequence[str]) -> None:
    """Print images by class and split, and say where a class is thin."""
    counts = Counter((row.label, splits[row.patient]) for row in rows)
    parts = tuple(SPLIT_NAMES.values())
    width = max(len(name) for name in ("class", *classes))
    typer.echo(f"{'class':{width}}" + "".join(f"{part:>8}" for part in parts))
    for name in classes:
        typer.echo(f"{name:{width}}" + "".join(f"{counts[name, part]:>8}" for part in parts))
    for name in classes:
        held_out = counts[name, "val"] + counts[name, "test"]
        if counts[name, "train"] and not held_out:
            typer.echo(f"note: no '{name}' to validate or test on: too few patients", err=True)
        if not counts[name, "train"] + held_out:
            typer.echo(f"note: no '{name}' at this hospital; the plan may name it all the same", err=True)


def read_back(table: Path, plan: Plan) -> str:
    """Read the table as the agent will, every image decoded at the plan's size, and say what it found.

    Raises DataError (CorruptImagesError above the plan's budget), PlanError.
    """
    # The fractions as in agent.toml: the reader must not cut splits of its own, which would part a patient's eyes.
    reader = open_dataset(
        "csv", table, class_names=plan.class_names, validation_fraction=0.0, test_fraction=0.0
    )
    data = reader.read(plan)
    return (
        f"fedagent's reader: {len(data.train)} train, {len(data.validation)} val, {len(data.test)} test, "
        f"{data.corrupt_images} unreadable"
    )


def _read_csv(table: Path, columns: Sequence[str]) -> list[tuple[int, dict[str, str]]]:
    """Line number and the columns of every row, none of them empty. Raises DataError."""
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            lacking = [column for column in columns if column not in (reader.fieldnames or ())]
            if lacking:
                found = ", ".join(reader.fieldnames or ()) or "none"
                raise DataError(f"{table}: no column '{lacking[0]}', only: {found}")
            rows = [(reader.line_num, {c: (row[c] or "").strip() for c in columns}) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{table}: not a readable CSV table: {error}") from error
    for line, row in rows:
        for column, value in row.items():
            if not value:
                raise DataError(f"{table} line {line}: `{column}` is empty")
    return rows


if __name__ == "__main__":
    run_program(app)
