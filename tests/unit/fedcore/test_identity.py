"""Who is calling: strict about the certificate, and about time on every call."""

from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from hypothesis import given
from hypothesis import strategies as st

from fedcore.errors import IdentityError
from fedcore.identity import Subject, caller_from_auth_context, check_validity, is_name, subject_of
from fedcore.pki import certificates_to_pem, make_issuing_ca, make_leaf, make_root, new_key, serial_text

NOW = datetime(2026, 5, 1, tzinfo=UTC)
ROOT = make_root("lab", NOW)
ISSUING = make_issuing_ca(ROOT, "lab", NOW)
KEY = new_key()


def certificate(uris: list[str], now: datetime = NOW) -> x509.Certificate:
    """A certificate that names exactly these URIs, whatever they are."""
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "x")])
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(KEY.public_key())
        .serial_number(4711)
        .not_valid_before(now - timedelta(minutes=10))
        .not_valid_after(now + timedelta(days=30))
    )
    if uris:
        names = [x509.UniformResourceIdentifier(uri) for uri in uris]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(KEY, hashes.SHA256())


def context(one: x509.Certificate, **more: list[bytes]) -> dict[str, list[bytes]]:
    return {"x509_pem_cert": [certificates_to_pem([one])], "ssl_tls_version": [b"TLSv1.3"], **more}


@pytest.mark.parametrize("role", ["site", "operator"])
def test_a_good_certificate_gives_its_caller(role):
    subject = Subject("lab", role, "clinic-a")
    leaf = make_leaf(
        ISSUING,
        KEY.public_key(),
        federation="lab",
        spiffe_id=subject.spiffe_id,
        hosts=(),
        server=False,
        now=NOW,
    )
    caller = caller_from_auth_context(context(leaf), "lab", NOW)
    assert (caller.federation, caller.role, caller.id, str(caller)) == (
        "lab",
        role,
        "clinic-a",
        f"{role}/clinic-a",
    )
    assert caller.serial == serial_text(leaf)
    assert caller.not_after == NOW + timedelta(days=30)


@pytest.mark.parametrize(
    ("uris", "reason"),
    [
        ([], "no readable subject alternative names"),
        (["spiffe://lab/site/a", "spiffe://lab/site/b"], "2 URIs"),
        (["https://lab/site/a"], "expected spiffe"),
        (["spiffe://lab/site"], "expected spiffe"),
        (["spiffe://lab/site/"], "expected spiffe"),
        (["spiffe://lab/site/a/b"], "expected spiffe"),
        (["spiffe://lab/site/a?x=1"], "expected spiffe"),
        (["spiffe://lab/admin/a"], "expected spiffe"),
        (["spiffe://lab//site/a"], "expected spiffe"),
        (["spiffe://lab/site/A"], "not a valid name"),
        (["spiffe://lab/site/a\n"], "not a valid name|expected spiffe"),
        (["spiffe://lab/site/.."], "not a valid name"),
        (["spiffe://Lab/site/a"], "not a valid name"),
        (["spiffe://other/site/a"], "federation 'other', expected 'lab'"),
        (["spiffe://lab/coordinator"], "makes no calls"),
    ],
)
def test_a_malformed_or_foreign_identity_is_refused(uris, reason):
    with pytest.raises(IdentityError, match=reason):
        caller_from_auth_context(context(certificate(uris)), "lab", NOW)


def test_time_is_checked_on_every_call_although_parsing_is_cached():
    one = context(certificate(["spiffe://lab/site/a"]))
    assert caller_from_auth_context(one, "lab", NOW).id == "a"
    assert caller_from_auth_context(one, "lab", NOW + timedelta(days=30)).id == "a"
    with pytest.raises(IdentityError, match="certificate ended at"):
        caller_from_auth_context(one, "lab", NOW + timedelta(days=30, seconds=1))
    assert caller_from_auth_context(one, "lab", NOW - timedelta(minutes=10)).id == "a"
    with pytest.raises(IdentityError, match="certificate begins at") as caught:
        caller_from_auth_context(one, "lab", NOW - timedelta(minutes=11))
    assert "clocks" in caught.value.hint


@pytest.mark.parametrize(
    ("role", "advice"),
    [
        ("site", "enrol again with a new token"),
        ("operator", "enroll token create --operator ID"),
        ("coordinator", "renews it when it starts"),
        ("", "clock"),
    ],
)
def test_what_to_do_about_an_ended_certificate_depends_on_whose_it_is(role, advice):
    with pytest.raises(IdentityError, match="x: certificate ended at") as caught:
        check_validity(NOW - timedelta(days=30), NOW, NOW + timedelta(seconds=1), "x", role=role)
    assert advice in caught.value.hint


def test_the_connection_must_be_tls_1_3_where_grpc_tells():
    one = certificate(["spiffe://lab/site/a"])
    with pytest.raises(IdentityError, match=r"TLSv1\.2"):
        caller_from_auth_context(context(one, ssl_tls_version=[b"TLSv1.2"]), "lab", NOW)
    silent = context(one)
    del silent["ssl_tls_version"]
    assert caller_from_auth_context(silent, "lab", NOW).id == "a"


def test_no_certificate_two_certificates_and_rubbish_are_refused():
    with pytest.raises(IdentityError, match="no client certificate"):
        caller_from_auth_context({}, "lab", NOW)
    pem = certificates_to_pem([certificate(["spiffe://lab/site/a"])])
    with pytest.raises(IdentityError, match="more than one"):
        caller_from_auth_context({"x509_pem_cert": [pem, pem]}, "lab", NOW)
    with pytest.raises(IdentityError, match="can't be read"):
        caller_from_auth_context({"x509_pem_cert": [b"-----BEGIN CERTIFICATE-----"]}, "lab", NOW)


@given(st.text(alphabet="abz09._-/A %\n", max_size=70))
def test_only_names_become_identities(text):
    good = is_name(text)
    assert good == (
        0 < len(text) <= 63
        and all(c in "abz09._-" for c in text)
        and text[0] not in "._-"
        and text[-1] not in "._-"
    )
    if good:
        subject = Subject("lab", "site", text)
        assert subject_of(certificate([subject.spiffe_id])) == subject
