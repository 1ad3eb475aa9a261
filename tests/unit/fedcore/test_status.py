"""Errors to statuses and back, without a wire."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore import status
from fedcore.errors import (
    BY_CODE,
    CallTimeoutError,
    ConflictError,
    FedimpresError,
    InternalError,
    StorageError,
    TensorMismatchError,
    TruncatedStreamError,
    UnreachableError,
)

# isort: split
import grpc


class Received(grpc.RpcError, grpc.Call):
    """What a client's stub raises."""

    def __init__(self, code, details, metadata=()):
        self._code, self._details, self._metadata = code, details, metadata

    def code(self):
        return self._code

    def details(self):
        return self._details

    def trailing_metadata(self):
        return self._metadata

    def initial_metadata(self):
        return ()

    def is_active(self):
        return False

    def time_remaining(self):
        return None

    def cancel(self):
        return False

    def add_callback(self, callback):
        return False


def round_trip(error: BaseException) -> FedimpresError:
    return status.from_rpc_error(Received(*status.to_status(error)), "coordinator")


@pytest.mark.parametrize("code", sorted(BY_CODE))
def test_the_class_survives_the_wire(code):
    error = BY_CODE[code]("site-07: something", hint="do 100 % of ü")
    back = round_trip(error)
    assert type(back) is BY_CODE[code]
    if status.TABLE[BY_CODE[code]].public is None:
        assert (back.message, back.hint) == ("site-07: something", "do 100 % of ü")
    else:
        assert "site-07" not in back.message
        assert back.hint == ""


@given(
    st.text(min_size=1, alphabet=st.characters(exclude_categories=["Cs"])),
    st.text(alphabet=st.characters(exclude_categories=["Cs"])),
)
def test_any_text_fits_into_metadata(message, hint):
    _, sent, metadata = status.to_status(ConflictError(message * 40, hint=hint * 40))
    assert len(sent.encode()) <= 4000
    for key, value in metadata:
        assert value.isascii()
        assert value.isprintable()
        assert len(value) <= 3000, key


def test_short_texts_are_not_cut():
    back = round_trip(ConflictError("a" * 2999, hint="b" * 2999))
    assert (back.message, back.hint) == ("a" * 2999, "b" * 2999)


def test_exceptions_that_are_not_ours_say_nothing():
    code, message, metadata = status.to_status(ValueError("password=1234"))
    assert code is grpc.StatusCode.INTERNAL
    assert "1234" not in message
    assert dict(metadata) == {status.CODE_KEY: "internal"}
    assert "sqlite path" not in status.to_status(StorageError("sqlite path"))[1]


def test_connection_failures_lose_grpc_s_nesting_and_gain_a_hint():
    details = (
        "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:1: "
        "Failed to connect to remote host: Connection refused"
    )
    error = status.from_rpc_error(Received(grpc.StatusCode.UNAVAILABLE, details), "coordinator lab:1")
    assert isinstance(error, UnreachableError)
    assert error.message == (
        "coordinator lab:1: ipv4:127.0.0.1:1: Failed to connect to remote host: Connection refused"
    )
    assert "nothing listens there" in error.hint


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
def test_every_status_without_our_metadata_gives_an_error_that_names_who(code):
    error = status.from_rpc_error(Received(code, "words"), "coordinator lab:1")
    assert isinstance(error, FedimpresError)
    assert error.message.startswith("coordinator lab:1: ")


def test_a_deadline_is_a_timeout_with_exit_code_5():
    error = status.from_rpc_error(Received(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded"), "x")
    assert isinstance(error, CallTimeoutError)
    assert status.exit_code_of(error) == 5


def test_subclasses_that_the_table_does_not_know_take_their_parent_s_row():
    class Narrower(TensorMismatchError):
        """Made up."""

    assert status.mapping_of(Narrower("x")) is status.TABLE[TensorMismatchError]
    assert status.mapping_of(KeyError("x")) is status.TABLE[InternalError]


def test_report_prints_code_message_and_hint():
    out = io.StringIO()
    assert status.report(ConflictError("home is in use", hint="stop it"), out) == 7
    assert out.getvalue() == "error[conflict]: home is in use\nhint: stop it\n"
    out = io.StringIO()
    assert status.report(KeyError("k"), out) == 70
    assert out.getvalue().startswith("error[internal]: KeyError: 'k'\nhint: ")


def test_a_stream_that_the_other_side_ended_while_this_one_sent_is_cut_and_no_bug():
    error = Received(grpc.StatusCode.INTERNAL, "Internal error from Core")
    assert isinstance(status.from_rpc_error(error, "coordinator"), TruncatedStreamError)
