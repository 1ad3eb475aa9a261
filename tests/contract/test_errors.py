"""Every error has a status, an exit code and a page, and survives the wire."""

import re
from pathlib import Path

import pytest

from fedcore import errors, status

DOCS = (Path(__file__).parents[2] / "docs" / "errors.md").read_text()
SECTIONS = re.findall(r"^## (\S+)\n(.*?)(?=^## |\Z)", DOCS, flags=re.MULTILINE | re.DOTALL)
ALLOWED_EXITS = {1, 2, 3, 4, 5, 6, 7, 70, 78}


def test_the_docs_have_exactly_one_section_a_code():
    names = [name for name, _ in SECTIONS]
    assert sorted(names) == sorted(errors.BY_CODE)
    for name, body in SECTIONS:
        kind = errors.BY_CODE[name]
        row = status.TABLE[kind]
        assert "What to do: " in body
        assert f"`{kind.__name__}`, exit code {row.exit_code}, gRPC status {row.status.name}." in body


def test_every_class_has_its_own_row_and_nothing_else_has():
    assert set(status.TABLE) == set(errors.all_error_classes())


def test_codes_are_distinct_and_well_formed():
    classes = [kind for kind in errors.all_error_classes() if kind is not errors.FedimpresError]
    assert len({kind.code for kind in classes}) == len(classes)
    assert all(re.fullmatch(r"[a-z_]+", kind.code) for kind in classes)


@pytest.mark.parametrize("kind", errors.all_error_classes())
def test_rows_make_sense(kind):
    row = status.TABLE[kind]
    assert row.exit_code in ALLOWED_EXITS
    assert row.status is not status.grpc.StatusCode.OK
    assert status.mapping_of(kind("x")) is row
