"""Which request an operator means, and that the fingerprint is looked at before anybody is let in."""

from types import SimpleNamespace

import pytest
import typer

from fedcore.errors import ConfigError, ConflictError, FingerprintError, NotFoundError
from fedcore.v1 import membership_pb2
from fedctl import enroll_commands

ROWS = [("ward-7", "ab" * 32, "waiting"), ("ward-7", "cd" * 32, "denied"), ("ward-8", "ef" * 32, "approved")]


class Admin:
    """Answers ListEnrollments."""

    membership = SimpleNamespace(ListEnrollments=None)

    def call(self, method, request):
        rows = [
            membership_pb2.EnrollmentRequest(site=site, key_fingerprint=key, state=state)
            for site, key, state in ROWS
            if request.state in ("", state)
        ]
        return membership_pb2.ListEnrollmentsReply(requests=rows)


def meant(text, **more):
    return enroll_commands._one(Admin(), text, **more).key_fingerprint


def test_a_request_is_named_by_its_key_or_by_the_one_site_that_asks():
    assert meant("CD") == "cd" * 32
    assert meant("ward-8") == "ef" * 32
    assert meant("ward-7", waiting=True) == "ab" * 32, "the one that there is something to decide about"
    with pytest.raises(ConflictError, match="2 requests are of 'ward-7'"):
        meant("ward-7")
    with pytest.raises(ConflictError, match="3 requests are of ''"):
        meant("")
    with pytest.raises(NotFoundError):
        meant("ward-9")


def test_a_fingerprint_is_compared_as_people_write_it():
    (found,) = enroll_commands._requests(Admin(), state="waiting")
    enroll_commands._compare(f"SHA256:{':'.join(['AB'] * 32)}", found)
    for other in ("cd" * 32, "ab" * 31, ""):
        with pytest.raises(FingerprintError, match="nothing was approved"):
            enroll_commands._compare(other, found)


def test_nobody_is_let_in_by_a_script_that_compares_nothing(monkeypatch, capsys):
    found = membership_pb2.EnrollmentRequest(
        site="ward-7", key_fingerprint="ab" * 32, enrolled_at="2026-01-02"
    )
    with pytest.raises(ConfigError, match="can't ask for confirmation off a terminal"):
        enroll_commands._ask_to_approve(found)
    monkeypatch.setattr(enroll_commands.sys, "stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr(typer, "confirm", lambda question, err: False)
    with pytest.raises(typer.Exit):
        enroll_commands._ask_to_approve(found)
    said = capsys.readouterr().err
    assert "ab" * 32 in said
    assert "is enrolled since 2026-01-02: this would be its new credential" in said
    monkeypatch.setattr(typer, "confirm", lambda question, err: True)
    enroll_commands._ask_to_approve(found)
