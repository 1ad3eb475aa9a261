"""Writes what many runs came to: table.json, .csv and .md, pictures as SVG and PNG, report.html."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedcore.errors import StorageError
from fedsim.bars import write_bars
from fedsim.impression_plots import write_impressions
from fedsim.plots import write_curves
from fedsim.statistics import settings_of
from fedsim.tables import NOTE, csv_table, markdown
from fedsim.webpage import page

Line = Mapping[str, Any]


def write_results(lines: Sequence[Line], out: Path) -> None:
    """Write everything about these runs into `out`, where their folders lie. Raises StorageError."""
    settings = settings_of(lines)
    rows = [line["row"] for line in lines]
    write_text(out / "table.json", json.dumps(rows, indent=2) + "\n")
    write_text(out / "table.csv", csv_table(rows))
    write_text(out / "table.md", markdown(settings))
    write_curves(settings, out)
    pictures = {
        setting.title: [*write_bars(setting, out), *write_impressions(setting, out)] for setting in settings
    }
    write_text(out / "report.html", page(settings, NOTE.replace("*", ""), pictures))


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all. Raises StorageError."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise StorageError(f"{path}: can't be written: {error}") from error
