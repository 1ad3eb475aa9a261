"""How much one member or one address may take, and that it costs nobody else."""

import pytest

from fedcore.channel import CALLS
from fedcore.errors import OverloadedError
from fedserver.config import LimitsConfig
from fedserver.limits import TRANSFERS, Buckets, Limits, address_of


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def limits(clock, **changes):
    return Limits(LimitsConfig(**changes), clock)


def test_a_bucket_gives_its_burst_then_what_flows_in(clock):
    bucket = Buckets(2.0, 3.0, clock)
    assert [bucket.take("a") for _ in range(4)] == [0, 0, 0, 0.5]
    assert bucket.take("b") == 0
    clock.now = 0.5
    assert [bucket.take("a"), bucket.take("a")] == [0, 0.5]
    clock.now = 1000
    assert [bucket.take("a") for _ in range(4)] == [0, 0, 0, 0.5], "it does not overflow"


def test_calls_are_counted_by_member(clock):
    ours = limits(clock, requests_per_s=2)
    for _ in range(10):
        ours.called("site/a")
    with pytest.raises(OverloadedError, match="site/a makes more than 2 calls a second") as caught:
        ours.called("site/a")
    assert "try again in 0.5 s; the limit is requests_per_s" in caught.value.hint
    ours.called("site/b")
    clock.now = 0.5
    ours.called("site/a")


def test_open_calls_and_transfers_are_counted_while_they_are_open(clock):
    ours = limits(clock, open_streams=3, transfers=1)
    fetch, watch = "/fedcore.v1.Federation/Fetch", "/fedcore.v1.Admin/WatchRun"
    with ours.open("site/a", fetch), ours.open("site/a", watch):
        with (
            pytest.raises(OverloadedError, match="site/a has 1 transfers already"),
            ours.open("site/a", fetch),
        ):
            pass
        with ours.open("site/a", watch):
            with pytest.raises(OverloadedError, match="site/a has 3 open calls"), ours.open("site/a", watch):
                pass
        with ours.open("site/b", fetch):
            pass
    with pytest.raises(ZeroDivisionError), ours.open("site/a", fetch):
        raise ZeroDivisionError
    with ours.open("site/a", fetch), ours.open("site/a", watch), ours.open("site/a", watch):
        pass


def test_refused_enrolments_are_counted_by_address(clock):
    ours = limits(clock, failed_enrolments_per_min=2)
    for port in (1, 2):
        ours.enrolment_failed(f"ipv4:10.0.0.1:{port}")
    with pytest.raises(OverloadedError, match=r"2 refused enrolments a minute from 10\.0\.0\.1") as caught:
        ours.enrolment_failed("ipv4:10.0.0.1:3")
    assert "try again in 30 s" in caught.value.hint
    ours.enrolment_failed("ipv4:10.0.0.2:1")


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        ("ipv4:10.0.0.1:4711", "10.0.0.1"),
        ("ipv6:%5B::1%5D:4711", "::1"),
        ("ipv6:[::ffff:10.0.0.1]:4711", "10.0.0.1"),
        ("ipv6:%5B2001:db8:1:2:3:4:5:6%5D:4711", "2001:db8:1:2::/64"),
        ("ipv6:[fe80::1%25eth0]:4711", "fe80::/64"),
        ("unix:/run/x.sock", "unix:/run/x.sock"),
    ],
)
def test_one_host_counts_as_one_address(peer, address):
    assert address_of(peer) == address


def test_transfers_are_the_calls_that_move_tensors_and_no_watches():
    moving = ("Federation/Fetch", "Federation/Deliver", "Admin/Download", "Admin/UploadModel")
    assert {f"/fedcore.v1.{name}" for name in moving} <= TRANSFERS
    assert all(CALLS[method].deadline_s is not None for method in TRANSFERS)
    assert "/fedcore.v1.Federation/Directives" not in TRANSFERS
