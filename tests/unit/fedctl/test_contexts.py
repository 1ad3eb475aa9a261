from pathlib import Path

import pytest

from fedcore.errors import ConfigError, ConflictError, NotFoundError
from fedctl.contexts import CREDENTIAL_FILES, Contexts, config_dir, load_contexts, save_contexts


@pytest.fixture
def credential(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "operator")


def make_folder(folder: Path) -> Path:
    folder.mkdir()
    for name in CREDENTIAL_FILES:
        (folder / name).write_text("x")
    return folder


def test_first_context_becomes_current_and_later_ones_do_not(credential: Path, tmp_path: Path) -> None:
    other = make_folder(tmp_path / "other")
    contexts = Contexts().add("lab", credential).add("hospital", other)
    assert contexts.current == "lab"
    assert contexts.folder() == credential
    assert contexts.use("hospital").folder() == other


def test_contexts_survive_saving_whatever_is_in_the_path(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / 'a "quoted" \\ folder é')
    contexts = Contexts().add("lab.1", folder)
    save_contexts(tmp_path / "config", contexts)
    assert load_contexts(tmp_path / "config") == contexts


def test_no_file_means_no_contexts(tmp_path: Path) -> None:
    assert load_contexts(tmp_path) == Contexts()
    with pytest.raises(ConfigError, match="no current context") as caught:
        Contexts().folder()
    assert "fedctl context add" in caught.value.hint


def test_incomplete_folder_is_refused_and_named(credential: Path) -> None:
    (credential / "tls.key").unlink()
    with pytest.raises(ConfigError, match=r"missing tls\.key"):
        Contexts().add("lab", credential)


def test_a_name_is_taken_once(credential: Path) -> None:
    with pytest.raises(ConflictError, match="'lab' is already there"):
        Contexts().add("lab", credential).add("lab", credential)


@pytest.mark.parametrize("name", ["", "a b", "-x", "x/y", "a" * 64, 'q"'])
def test_bad_names_are_refused(name: str, credential: Path) -> None:
    with pytest.raises(ConfigError, match="not valid"):
        Contexts().add(name, credential)


def test_removing_the_current_context_leaves_the_only_other_one_current(credential: Path) -> None:
    contexts = Contexts().add("a", credential).add("b", credential).add("c", credential)
    assert contexts.remove("a").current is None
    assert contexts.remove("b").current == "a"
    assert contexts.remove("a").remove("b").current is None
    assert Contexts().add("a", credential).add("b", credential).remove("a").current == "b"
    with pytest.raises(NotFoundError, match="no context 'z'"):
        contexts.remove("z")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("current = 'x'", "'x' is not among"),
        ("colour = 1", "unknown key 'colour'"),
        ("[contexts.a]\ncredential = 3", "must have the one key"),
        ("[contexts.a]\ncredential = 'x'\nextra = 1", "must have the one key"),
        ("contexts = 3", "must be a table"),
        ("current = [", "can't be read"),
    ],
)
def test_a_damaged_file_is_told_with_its_path(text: str, match: str, tmp_path: Path) -> None:
    (tmp_path / "contexts.toml").write_text(text)
    with pytest.raises(ConfigError, match=match) as caught:
        load_contexts(tmp_path)
    assert "contexts.toml" in caught.value.message


def test_settings_folder_follows_the_environment() -> None:
    assert config_dir({"FEDIMPRES_CONFIG_DIR": "/x"}) == Path("/x")
    assert config_dir({"XDG_CONFIG_HOME": "/y"}) == Path("/y/fedimpres")
    assert config_dir({}) == Path.home() / ".config" / "fedimpres"
