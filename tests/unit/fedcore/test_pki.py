"""Certificates say what they should, and chains hold only where they do."""

from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID

from fedcore import pki
from fedcore.errors import ConfigError, FingerprintError, IdentityError

NOW = datetime(2026, 5, 1, tzinfo=UTC)
ROOT = pki.make_root("lab", NOW)
ISSUING = pki.make_issuing_ca(ROOT, "lab", NOW)


def leaf(
    hosts=(), server=False, now=NOW, issuing=ISSUING, spiffe_id="spiffe://lab/site/a"
) -> x509.Certificate:
    key = pki.new_key().public_key()
    return pki.make_leaf(
        issuing, key, federation="lab", spiffe_id=spiffe_id, hosts=hosts, server=server, now=now
    )


def extension(certificate, kind):
    return certificate.extensions.get_extension_for_class(kind)


def test_the_three_levels_have_their_lifetimes_backdated_ten_minutes():
    for certificate, lifetime in (
        (ROOT.certificate, timedelta(days=3652)),
        (ISSUING.certificate, timedelta(days=365)),
        (leaf(), timedelta(days=30)),
    ):
        assert certificate.not_valid_before_utc == NOW - timedelta(minutes=10)
        assert certificate.not_valid_after_utc == NOW + lifetime
        assert isinstance(certificate.public_key(), ec.EllipticCurvePublicKey)


def test_no_certificate_outlives_its_issuer():
    late = ISSUING.certificate.not_valid_after_utc - timedelta(days=3)
    assert leaf(now=late).not_valid_after_utc == ISSUING.certificate.not_valid_after_utc
    late = ROOT.certificate.not_valid_after_utc - timedelta(days=3)
    issuing = pki.make_issuing_ca(ROOT, "lab", late)
    assert issuing.certificate.not_valid_after_utc == ROOT.certificate.not_valid_after_utc


def test_constraints_and_purposes():
    root = extension(ROOT.certificate, x509.BasicConstraints)
    assert (root.critical, root.value.ca, root.value.path_length) == (True, True, 1)
    issuing = extension(ISSUING.certificate, x509.BasicConstraints)
    assert (issuing.critical, issuing.value.ca, issuing.value.path_length) == (True, True, 0)
    assert not extension(leaf(), x509.BasicConstraints).value.ca
    assert not extension(leaf(), x509.KeyUsage).value.key_cert_sign
    assert list(extension(leaf(), x509.ExtendedKeyUsage).value) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert list(extension(leaf(server=True), x509.ExtendedKeyUsage).value) == [
        ExtendedKeyUsageOID.SERVER_AUTH
    ]


def test_hosts_become_dns_names_or_addresses_once_each():
    names = extension(
        leaf(hosts=("fed.example.org", "localhost", "127.0.0.1", "::1", "localhost", "[::1]")),
        x509.SubjectAlternativeName,
    ).value
    assert names.get_values_for_type(x509.DNSName) == ["fed.example.org", "localhost"]
    assert [str(a) for a in dict.fromkeys(names.get_values_for_type(x509.IPAddress))] == ["127.0.0.1", "::1"]
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == ["spiffe://lab/site/a"]


@pytest.mark.parametrize("host", ["", "a b", "http://x", "x:8443", "-x", "*.example.org", "x/y", "é.org"])
def test_what_is_no_host_is_refused(host):
    with pytest.raises(ConfigError, match="neither a DNS name nor an IP address"):
        leaf(hosts=(host,))


def test_chains_hold_below_their_root_only():
    certificate = leaf()
    pki.verify_chain([certificate, ISSUING.certificate], ROOT.certificate, "x")
    other = pki.make_root("lab", NOW)  # same name, another key
    for chain, root in (
        ([certificate, ISSUING.certificate], other.certificate),
        ([certificate], ROOT.certificate),
        ([certificate, ROOT.certificate], ROOT.certificate),
        ([leaf(), certificate, ISSUING.certificate], ROOT.certificate),
    ):
        with pytest.raises(IdentityError, match="is not signed by"):
            pki.verify_chain(chain, root, "x")


def test_a_leaf_may_not_sign():
    key = pki.new_key()
    middle = pki.make_leaf(
        ISSUING,
        key.public_key(),
        federation="lab",
        spiffe_id="spiffe://lab/site/m",
        hosts=(),
        server=False,
        now=NOW,
    )
    forged = leaf(issuing=pki.Signer(middle, key))
    with pytest.raises(IdentityError, match="is no CA"):
        pki.verify_chain([forged, middle, ISSUING.certificate], ROOT.certificate, "x")


def test_requests_carry_their_public_key_and_nothing_else_is_believed():
    key = pki.new_key()
    request = pki.make_request(key, "clinic-a").decode()
    assert pki.spki(pki.public_key_of_request(request)) == pki.spki(key.public_key())
    with pytest.raises(IdentityError, match="can't be read"):
        pki.public_key_of_request("rubbish")
    with pytest.raises(IdentityError, match=r"can't be read|not signed"):
        pki.public_key_of_request(request.replace(request[40:44], "AAAA"))


def test_requests_with_other_kinds_of_keys_are_refused():
    from cryptography.hazmat.primitives import hashes, serialization

    for key in (ec.generate_private_key(ec.SECP384R1()), rsa.generate_private_key(65537, 2048)):
        request = (
            x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
        )
        with pytest.raises(IdentityError, match="expected ECDSA P-256"):
            pki.public_key_of_request(request.public_bytes(serialization.Encoding.PEM).decode())


def test_fingerprints_may_be_written_in_the_usual_ways():
    digest = pki.fingerprint(ROOT.certificate)
    colons = ":".join(digest.upper()[i : i + 2] for i in range(0, 64, 2))
    for text in (digest, digest.upper(), colons, f" {colons}\n", f"SHA256:{digest}"):
        assert pki.normalise_fingerprint(text) == digest
    for text in ("", digest[:-1], digest + "0", "g" * 64):
        with pytest.raises(FingerprintError, match="64 hex digits"):
            pki.normalise_fingerprint(text)


def test_keys_are_read_back_and_others_refused():
    key = pki.new_key()
    again = pki.key_from_pem(pki.key_to_pem(key), "tls.key")
    assert pki.spki(again.public_key()) == pki.spki(key.public_key())
    with pytest.raises(ConfigError, match=r"tls\.key: not a readable private key"):
        pki.key_from_pem(b"rubbish", "tls.key")


def test_signers_do_not_show_their_key():
    assert repr(ROOT) == "Signer(CN=lab root,O=lab)"
