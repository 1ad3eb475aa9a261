"""Image folders: a folder a class, optionally below train/, val/ and test/.

    PATH/CLASS/**/*.png      or      PATH/{train,val,test}/CLASS/**/*.png

The class is the folder's name. Hidden files and files that are no images by their suffix are passed over;
any other file that can't be decoded counts as corrupt. Needs the plan's [data] class_names.

Option: `max_value`, the stored value that means full intensity (4095 for 12-bit images, say).
"""

from dataclasses import dataclass
from pathlib import Path

from fedcore.data.dataset import SPLIT_ALIASES, DatasetSettings, DatasetSummary, SiteData, Split
from fedcore.data.image_files import ImageFile, read_files, summarise_files
from fedcore.data.images import IMAGE_SUFFIXES
from fedcore.data.npz_reader import max_value_of
from fedcore.errors import DataError
from fedcore.plan import Plan


@dataclass(frozen=True, slots=True)
class FolderReader:
    """Reads a folder of class folders."""

    path: Path
    settings: DatasetSettings
    max_value: float | None

    def summarise(self) -> DatasetSummary:
        """List the files. Raises DataError."""
        return summarise_files(self._list(), self.settings)

    def read(self, plan: Plan) -> SiteData:
        """Decode the files. Raises DataError, CorruptImagesError, PlanError."""
        return read_files(self._list(), self.settings, plan, self.max_value)

    def _list(self) -> list[ImageFile]:
        if not self.path.is_dir():
            raise DataError(f"{self.path}: not a folder", hint="set [data] path in agent.toml")
        try:
            files = [
                ImageFile(path, str(path.relative_to(self.path)), folder.name, split)
                for split, root in self._roots()
                for folder in _folders(root)
                for path in sorted(folder.rglob("*"))
                if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()
            ]
        except OSError as error:
            raise DataError(f"{self.path}: can't be listed: {error}") from error
        if not files:
            suffixes = " ".join(sorted(IMAGE_SUFFIXES))
            raise DataError(
                f"{self.path}: no images found",
                hint=f"expected PATH/CLASS/IMAGE or PATH/train/CLASS/IMAGE, an image being {suffixes}",
            )
        return files

    def _roots(self) -> list[tuple[Split, Path]]:
        folders = _folders(self.path)
        named = [(SPLIT_ALIASES[f.name.lower()], f) for f in folders if f.name.lower() in SPLIT_ALIASES]
        # A class may be called "test": only a folder of folders is a split.
        if not any(_folders(folder) for _, folder in named):
            return [("train", self.path)]
        if len(named) != len(folders):
            other = next(f.name for f in folders if f.name.lower() not in SPLIT_ALIASES)
            raise DataError(
                f"{self.path}: '{other}' stands beside {named[0][1].name}/, expected only splits there"
            )
        splits = [split for split, _ in named]
        if len(set(splits)) != len(splits) or "train" not in splits:
            raise DataError(
                f"{self.path}: has {', '.join(f.name for f in folders)}, "
                "expected train and at most one val, one test"
            )
        return named


def open_reader(settings: DatasetSettings) -> FolderReader:
    """The reader for `settings.path`. Raises ConfigError."""
    options = settings.read_options({"max_value": None})
    return FolderReader(settings.required_path(), settings, max_value_of(options["max_value"]))


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
