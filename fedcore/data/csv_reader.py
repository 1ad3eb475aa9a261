"""CSV tables with a header: columns `path`, `label`, and optionally `split` (train, val, test).

A relative path starts at the CSV's own folder and may not lead out of it; an absolute path may lie
anywhere, since the site writes its own table. A file that is missing or can't be decoded counts as corrupt.
Needs the plan's [data] class_names; labels are their names.

Options: `path_column`, `label_column`, `split_column` name the columns; `max_value` is the stored value
that means full intensity (4095 for 12-bit images, say).
"""

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fedcore.data.dataset import SPLIT_ALIASES, DatasetSettings, DatasetSummary, SiteData
from fedcore.data.image_files import ImageFile, read_files, summarise_files
from fedcore.data.npz_reader import max_value_of
from fedcore.errors import DataError
from fedcore.plan import Plan


@dataclass(frozen=True, slots=True)
class CsvReader:
    """Reads the images that a table lists."""

    path: Path
    settings: DatasetSettings
    path_column: str
    label_column: str
    split_column: str
    max_value: float | None

    def summarise(self) -> DatasetSummary:
        """Read the table. Raises DataError."""
        return summarise_files(self._list(), self.settings)

    def read(self, plan: Plan) -> SiteData:
        """Decode the files. Raises DataError, CorruptImagesError, PlanError."""
        return read_files(self._list(), self.settings, plan, self.max_value)

    def _list(self) -> list[ImageFile]:
        try:
            with self.path.open(encoding="utf-8-sig", newline="") as table:
                files = list(self._rows(csv.DictReader(table, strict=True)))
        except FileNotFoundError as error:
            raise DataError(f"{self.path}: no such file", hint="set [data] path in agent.toml") from error
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{self.path}: not a readable CSV table: {error}") from error
        if not files:
            raise DataError(f"{self.path}: the table has no rows")
        return files

    def _rows(self, table: "csv.DictReader[str]") -> Iterator[ImageFile]:
        columns = table.fieldnames or []
        for column in (self.path_column, self.label_column):
            if column not in columns:
                raise DataError(
                    f"{self.path}: no column '{column}', only: {', '.join(columns) or 'none'}",
                    hint="name the columns with [data] options = { path_column = ..., label_column = ... }",
                )
        seen: dict[Path, int] = {}
        for row in table:
            where = f"{self.path} line {table.line_num}"
            file = self._file(row, where, has_split=self.split_column in columns)
            if file.path in seen:
                raise DataError(
                    f"{where}: '{file.name}' stands in line {seen[file.path]} already",
                    hint="an image in two splits would be tested on after training on it",
                )
            seen[file.path] = table.line_num
            yield file

    def _file(self, row: dict[str, str], where: str, *, has_split: bool) -> ImageFile:
        name = (row[self.path_column] or "").strip()
        label = (row[self.label_column] or "").strip()
        if not name or not label:
            raise DataError(f"{where}: path or label is empty")
        split = (row[self.split_column] or "").strip().lower() if has_split else "train"
        if split not in SPLIT_ALIASES:
            raise DataError(f"{where}: split is '{split}', expected train, val or test")
        root = self.path.parent.resolve()
        try:
            path = Path(name) if Path(name).is_absolute() else (root / name).resolve()
        except (OSError, ValueError, RuntimeError) as error:  # too long, a null byte, links in a circle
            raise DataError(f"{where}: {name!r:.200} is no path: {error}") from error
        if not Path(name).is_absolute() and not path.is_relative_to(root):
            raise DataError(
                f"{where}: '{name}' leads out of {root}", hint="use an absolute path for images elsewhere"
            )
        return ImageFile(path, name, label, SPLIT_ALIASES[split])


def open_reader(settings: DatasetSettings) -> CsvReader:
    """The reader for `settings.path`. Raises ConfigError."""
    options = settings.read_options(
        {"path_column": "path", "label_column": "label", "split_column": "split", "max_value": None}
    )
    return CsvReader(
        settings.required_path(),
        settings,
        path_column=str(options["path_column"]),
        label_column=str(options["label_column"]),
        split_column=str(options["split_column"]),
        max_value=max_value_of(options["max_value"]),
    )
