"""When certificates are renewed, and what proves an ended one."""

from datetime import UTC, datetime, timedelta

import pytest

from fedcore.errors import IdentityError
from fedcore.pki import make_issuing_ca, make_leaf, make_root, new_key
from fedcore.renewal import check_statement, ended_statement, life_of, renew_at, retry_s, sign_statement

NOW = datetime(2026, 3, 1, tzinfo=UTC)
ISSUING = make_issuing_ca(make_root("lab", NOW), "lab", NOW)


def leaf(key=None, **more):
    return make_leaf(
        ISSUING, (key or new_key()).public_key(), federation="lab", spiffe_id="spiffe://lab/site/a",
        hosts=(), server=False, now=NOW, **more,
    )  # fmt: skip


@pytest.mark.parametrize("days", [30.0, 365 * 0.9, 10 / 86400])
def test_renewal_is_due_after_two_thirds_of_the_life_or_up_to_a_tenth_earlier(days):
    life = timedelta(days=days)
    times = set()
    for _ in range(40):
        certificate = leaf(lifetime=life)
        assert abs(life_of(certificate) - life) < timedelta(seconds=1)
        share = (renew_at(certificate) - NOW) / life_of(certificate)
        assert 0.56 <= share <= 0.667
        assert renew_at(certificate) == renew_at(certificate)
        times.add(renew_at(certificate))
    assert len(times) > 30, "jittered"


def test_the_notbefore_of_ten_minutes_ago_does_not_count_as_life():
    certificate = leaf(lifetime=timedelta(seconds=9))
    assert certificate.not_valid_before_utc == NOW - timedelta(minutes=10)
    assert renew_at(certificate) > NOW + timedelta(seconds=5)


@pytest.mark.parametrize(
    ("life", "expected"),
    [(timedelta(seconds=10), 1), (timedelta(minutes=10), 30), (timedelta(days=30), 3600)],
)
def test_a_failed_renewal_is_tried_again_in_good_time(life, expected):
    assert retry_s(leaf(lifetime=life)) == pytest.approx(expected)


def test_only_the_old_key_signs_for_the_old_certificate():
    key = new_key()
    certificate = leaf(key)
    statement = ended_statement("lab", "1a", "CSR")
    check_statement(certificate, statement, sign_statement(key, statement))
    for signature in (sign_statement(new_key(), statement), b"", b"\x30\x06\x02\x01\x01\x02\x01\x01"):
        with pytest.raises(IdentityError, match="not signed by the key of the ended certificate"):
            check_statement(certificate, statement, signature)


def test_a_signature_is_good_for_one_federation_certificate_and_request():
    key = new_key()
    certificate = leaf(key)
    signature = sign_statement(key, ended_statement("lab", "1a", "CSR"))
    for other in (("lab2", "1a", "CSR"), ("lab", "1b", "CSR"), ("lab", "1a", "CSR2")):
        with pytest.raises(IdentityError):
            check_statement(certificate, ended_statement(*other), signature)
