"""Entry points are found, refused and blamed by name. Real dist-info folders on sys.path, no mocks."""

import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fedcore.errors import ConfigError
from fedcore.plugins import load_plugin, plugin_names

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    def _install(name: str, entries: str, **modules: str) -> None:
        folder = tmp_path / name
        info = folder / f"{name}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(entries)
        for module, source in modules.items():
            (folder / f"{module}.py").write_text(source)
        monkeypatch.syspath_prepend(folder)

    return _install


def test_a_plugin_is_listed_without_import_and_loaded_by_name(install: Install) -> None:
    install("fi_one", "[fedimpres.models]\nmine = fi_one_mod:build\n", fi_one_mod="build = 'the builder'")
    assert plugin_names("fedimpres.models") == ["mine"]
    assert "fi_one_mod" not in sys.modules
    assert load_plugin("fedimpres.models", "mine", ["cnn"]) == "the builder"
    assert plugin_names("fedimpres.datasets") == []


def test_an_unknown_name_lists_what_is_there(install: Install) -> None:
    install("fi_two", "[fedimpres.models]\nmine = fi_two_mod:build\n")
    with pytest.raises(ConfigError, match=r"unknown name 'mien', known: cnn, mine"):
        load_plugin("fedimpres.models", "mien", ["cnn"])
    with pytest.raises(ConfigError, match=r"known: none"):
        load_plugin("fedimpres.strategies", "x")


def test_a_plugin_may_not_shadow_a_built_in(install: Install, caplog: pytest.LogCaptureFixture) -> None:
    install("fi_three", "[fedimpres.models]\ncnn = fi_three_mod:build\n", fi_three_mod="build = 1")
    with caplog.at_level(logging.WARNING, "fedcore.plugins"):
        assert plugin_names("fedimpres.models", ["cnn"]) == []
    assert "fi_three" in caplog.text
    assert "'cnn' is built in" in caplog.text
    with pytest.raises(ConfigError, match="'cnn' is built in"):
        load_plugin("fedimpres.models", "cnn", ["cnn"])


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import no_such_module_here", "ModuleNotFoundError"),
        ("1 / 0", "ZeroDivisionError"),
        ("", "AttributeError"),
    ],
)
def test_a_failing_import_names_the_distribution(install: Install, source: str, reason: str) -> None:
    install("fi_four", "[fedimpres.models]\nbroken = fi_four_mod:build\n", fi_four_mod=source)
    sys.modules.pop("fi_four_mod", None)
    with pytest.raises(ConfigError, match=rf"'fi_four_mod:build' of fi_four can't be imported: {reason}"):
        load_plugin("fedimpres.models", "broken")


def test_two_distributions_with_one_name_are_refused(install: Install) -> None:
    install("fi_five", "[fedimpres.models]\ntwin = fi_five_mod:build\n")
    install("fi_six", "[fedimpres.models]\ntwin = fi_six_mod:build\n")
    with pytest.raises(ConfigError, match=r"'twin' is claimed by .*fi_five.* and .*fi_six"):
        load_plugin("fedimpres.models", "twin")


def test_names_need_neither_torch_nor_pil_nor_medmnist() -> None:
    code = """if True:
        import sys
        import fedcore.data.benchmark_sets, fedcore.data.transforms, fedcore.evaluation
        from fedcore.data import dataset_names, open_dataset
        from fedcore.models import model_names
        assert model_names() == ["alexnet_bn", "cnn", "noop", "resnet18"]
        assert dataset_names() == ["csv", "folder", "medmnist", "npz"]
        for kind in dataset_names():
            open_dataset(kind, "/x", options={"name": "bloodmnist"} if kind == "medmnist" else {})
        heavy = {"torch", "PIL", "medmnist", "sklearn", "pandas", "matplotlib"} & set(sys.modules)
        assert not heavy, heavy
    """
    subprocess.run([sys.executable, "-c", code], check=True, timeout=270)
