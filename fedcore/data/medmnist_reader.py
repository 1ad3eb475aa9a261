"""MedMNIST by name (Yang et al. 2023, MedMNIST v2): from its local npz file, fetched only where the site
allows it.

Options: `name` ("bloodmnist", ...), `size` (28, 64, 128 or 224). The file lies in `path`, else in
~/.medmnist, under MedMNIST's own name. The set's class names come from the medmnist package; a plan without
class names takes the set's numbering.
"""

import ast
import hashlib
import importlib.util
import os
import tempfile
import urllib.request
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedcore.data.dataset import DatasetSettings, DatasetSummary, SiteData
from fedcore.data.npz_reader import NpzReader
from fedcore.errors import ConfigError, DataError
from fedcore.plan import Plan

_TIMEOUT_S = 60
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class MedmnistReader:
    """Reads one MedMNIST set. `url` and `md5` are those that the medmnist package names for it."""

    file: Path
    url: str
    md5: str
    settings: DatasetSettings

    def summarise(self) -> DatasetSummary:
        """Read the labels; fetches the file first if need be. Raises DataError."""
        return self._npz().summarise()

    def read(self, plan: Plan) -> SiteData:
        """Read all splits; fetches the file first if need be. Raises DataError, CorruptImagesError."""
        return self._npz().read(plan)

    def _npz(self) -> NpzReader:
        if not self.file.exists():
            if not self.settings.allow_download:
                raise DataError(
                    f"{self.file}: no such file",
                    hint=f"put MedMNIST's file there ({self.url}), or set [data] allow_download = true",
                )
            fetch(self.url, self.md5, self.file)
        return NpzReader(self.file, self.settings, None, numbers_are_standard=True)


def open_reader(settings: DatasetSettings) -> MedmnistReader:
    """The reader for option `name`. Raises ConfigError if there is no such set."""
    options = settings.read_options({"name": "", "size": 28})
    name, size = str(options["name"]), options["size"]
    info = load_info()
    if name not in info:
        raise ConfigError(
            f"data.options.name: no MedMNIST set '{name}', known: {', '.join(sorted(info))}",
            hint='write [data] kind = "medmnist", options = { name = "bloodmnist" }',
        )
    suffix = "" if size == 28 else f"_{size}"
    if f"url{suffix}" not in info[name]:
        raise ConfigError(f"data.options.size: '{name}' has no size {size}")
    labels = info[name]["label"]
    names = settings.class_names or tuple(str(labels[str(k)]) for k in range(len(labels)))
    folder = settings.path or Path.home() / ".medmnist"
    return MedmnistReader(
        folder / f"{name}{suffix}.npz",
        str(info[name][f"url{suffix}"]),
        str(info[name][f"MD5{suffix}"]),
        replace(settings, class_names=names),
    )


def load_info() -> dict[str, dict[str, Any]]:
    """The medmnist package's table of sets, by name.

    Read from its source, not imported: its import loads torch and pandas, makes a folder in the home and
    may print. Raises ConfigError if the package is not installed or has no such table.
    """
    spec = importlib.util.find_spec("medmnist")
    if spec is None or spec.origin is None:
        raise ConfigError("kind 'medmnist' needs the package medmnist", hint="pip install medmnist")
    source = Path(spec.origin).with_name("info.py")
    try:
        for node in ast.parse(source.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and [ast.unparse(t) for t in node.targets] == ["INFO"]:
                table: dict[str, dict[str, Any]] = ast.literal_eval(node.value)
                return table
    except (OSError, ValueError, SyntaxError) as error:
        raise ConfigError(f"{source}: can't be read: {error}") from error
    raise ConfigError(f"{source}: has no table INFO", hint="install medmnist 3")


def fetch(url: str, md5: str, destination: Path) -> None:
    """Download `url` to `destination`, checked by MD5 before it gets that name. Raises DataError."""
    if not url.startswith(("https://", "http://")):
        raise DataError(f"{url}: not a web address")
    digest = hashlib.md5(usedforsecurity=False)  # the only checksum that MedMNIST publishes
    temporary: Path | None = None
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with (
            urllib.request.urlopen(url, timeout=_TIMEOUT_S) as reply,  # noqa: S310 - checked above
            tempfile.NamedTemporaryFile(dir=destination.parent, delete=False) as file,
        ):
            temporary = Path(file.name)
            while chunk := reply.read(_CHUNK_BYTES):
                digest.update(chunk)
                file.write(chunk)
        if digest.hexdigest() != md5:
            raise DataError(f"{url}: MD5 is {digest.hexdigest()}, expected {md5}; download discarded")
        os.replace(temporary, destination)
    except OSError as error:
        raise DataError(f"{url}: can't be fetched: {error}", hint=f"put the file at {destination}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
