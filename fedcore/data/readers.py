"""Readers by name: `npz`, `folder`, `csv`, `medmnist`, and the plug-ins of `fedimpres.datasets`."""

import importlib
from collections.abc import Callable
from pathlib import Path

from fedcore.data.dataset import DatasetReader, DatasetSettings
from fedcore.errors import ConfigError
from fedcore.plan import Options
from fedcore.plugins import load_plugin, plugin_names

# Each module has `open_reader(settings) -> DatasetReader`.
BUILT_IN = {
    "csv": "fedcore.data.csv_reader",
    "folder": "fedcore.data.folder_reader",
    "medmnist": "fedcore.data.medmnist_reader",
    "npz": "fedcore.data.npz_reader",
}


def dataset_names() -> list[str]:
    """Names that `open_dataset` knows here, plug-ins included. Imports no reader."""
    return sorted([*BUILT_IN, *plugin_names("fedimpres.datasets", BUILT_IN)])


def open_dataset(
    kind: str,
    path: str | Path | None,
    *,
    class_names: tuple[str, ...] | None = None,
    allow_download: bool = False,
    validation_fraction: float = 0.1,
    test_fraction: float = 0.2,
    options: Options | None = None,
) -> DatasetReader:
    """The reader `kind` for a site's data. Reads nothing yet.

    `class_names` names the numbers that the data uses as labels; the fractions are cut from the training
    images where the data has no such split of its own, always the same images. Raises ConfigError if the
    kind is unknown, its plug-in is at fault, or its options are wrong.
    """
    settings = DatasetSettings(
        kind=kind,
        path=None if path is None else Path(path).expanduser(),
        class_names=None if class_names is None else tuple(class_names),
        allow_download=allow_download,
        validation_fraction=validation_fraction,
        test_fraction=test_fraction,
        options=options or {},
    )
    open_reader: Callable[[DatasetSettings], DatasetReader]
    if kind in BUILT_IN:
        open_reader = importlib.import_module(BUILT_IN[kind]).open_reader
        return open_reader(settings)
    plugin = load_plugin("fedimpres.datasets", kind, BUILT_IN)
    if not callable(plugin):
        raise ConfigError(f"dataset plug-in '{kind}' is a {type(plugin).__name__}, expected a callable")
    reader = plugin(settings)
    for method in ("summarise", "read"):
        if not callable(getattr(reader, method, None)):
            raise ConfigError(
                f"dataset plug-in '{kind}' gave a {type(reader).__name__} without the method '{method}'"
            )
    checked: DatasetReader = reader
    return checked
