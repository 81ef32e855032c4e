"""Rate limits: a burst, then a steady pace; what is not limited any more is forgotten."""

from __future__ import annotations

import pytest

from lucid_compute.errors import RateLimited
from lucid_compute.registry.domain.identity import Principal
from lucid_compute.registry.fleet.replicas import ReplicaRecord, Replicas, Snapshot
from lucid_compute.registry.keys.authentication import FailedAttempts
from lucid_compute.registry.keys.rate_limits import (
    LEAST_REMEMBERED,
    PROBE_SECONDS,
    UNKNOWN_BURST,
    UNKNOWN_PER_SECOND,
    HeartbeatRate,
    ProbeRate,
    Throttle,
    UnknownNodeRate,
    WriteRates,
)
from tests.factories import NOW


class Clock:
    """A monotonic clock that only the test moves."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> Clock:
    """The clock of the rates."""
    return Clock()


def test_a_node_has_a_burst_of_six_and_then_one_a_second(clock: Clock) -> None:
    """The seventh at once is refused with the seconds to wait; another node is not affected."""
    rate = HeartbeatRate(1.0, clock)
    for _ in range(6):
        rate.spend("a")
    with pytest.raises(RateLimited) as refused:
        rate.spend("a")
    assert refused.value.retry_after_seconds == 1
    rate.spend("b")
    clock.seconds += 1.0
    rate.spend("a")
    with pytest.raises(RateLimited):
        rate.spend("a")
    HeartbeatRate(0, clock).spend("a")


@pytest.mark.parametrize("others", [0, 2])
def test_a_host_is_probed_once_in_ten_seconds_on_average_over_all_replicas(clock: Clock, others: int) -> None:
    """Each of three replicas allows one in thirty seconds; another host is counted separately."""
    replicas = Replicas()
    lease = [ReplicaRecord(str(n), NOW, NOW, NOW, Snapshot.parse("3:3:"), {}) for n in range(others)]
    replicas.apply("own", lease, NOW)
    rate = ProbeRate(replicas, clock)
    rate.spend("a")
    rate.spend("b")
    clock.seconds += PROBE_SECONDS * (1 + others) - 1
    with pytest.raises(RateLimited) as refused:
        rate.spend("a")
    assert refused.value.retry_after_seconds == 1
    clock.seconds += 1
    rate.spend("a")


def test_names_with_a_full_allowance_are_forgotten(clock: Clock) -> None:
    """Nodes, hosts, keys and owners that come and go leave nothing behind; who has spent something is remembered."""
    throttle = Throttle(clock)
    assert throttle.wait_seconds("spent", 10_000, 1) == 0
    for number in range(50_000):
        clock.seconds += 0.01
        throttle.wait_seconds(str(number), 10, 1)
        assert len(throttle._full_at) <= LEAST_REMEMBERED + 2 * 1005
    assert throttle.wait_seconds("spent", 10_000, 1) > 0


def test_nodes_that_come_and_go_leave_nothing_in_the_rate_of_heartbeats(clock: Clock) -> None:
    rate = HeartbeatRate(1.0, clock)
    for number in range(20_000):
        clock.seconds += 0.1
        rate.spend(f"node-{number}")
    assert len(rate._throttle._full_at) <= LEAST_REMEMBERED + 30


def test_hosts_that_are_probed_once_are_forgotten(clock: Clock) -> None:
    rate = ProbeRate(Replicas(), clock)
    for number in range(20_000):
        clock.seconds += 1
        rate.spend(f"host-{number}")
    assert len(rate._throttle._full_at) <= LEAST_REMEMBERED + 30


def writer(key_id: str, owner: str) -> Principal:
    """A key that changes things."""
    return Principal(key_id, owner, frozenset(), None, None)


def test_a_key_has_a_burst_of_changes_and_then_so_many_a_second(clock: Clock) -> None:
    """The message names the limit, what is spent and the seconds; another key is not affected."""
    rates = WriteRates(key_per_second=2, owner_per_second=0, burst=1000, clock=clock)
    for _ in range(1000):
        rates.spend(writer("a", "acme"))
    with pytest.raises(
        RateLimited, match=r"key's limit of 2 changes a second .* 1,000 .* spent. Retry in 1 s."
    ) as refused:
        rates.spend(writer("a", "acme"))
    assert refused.value.retry_after_seconds == 1
    rates.spend(writer("b", "acme"))
    clock.seconds += 1
    for _ in range(2):
        rates.spend(writer("a", "acme"))
    with pytest.raises(RateLimited):
        rates.spend(writer("a", "acme"))


def test_the_keys_of_an_owner_have_a_limit_together(clock: Clock) -> None:
    rates = WriteRates(key_per_second=100, owner_per_second=3, burst=10, clock=clock)
    for number in range(10):
        rates.spend(writer(f"key-{number}", "acme"))
    with pytest.raises(RateLimited, match="owner's limit of 3 changes a second"):
        rates.spend(writer("key-11", "acme"))
    rates.spend(writer("key-12", "other"))


def test_limits_of_changes_can_be_switched_off(clock: Clock) -> None:
    rates = WriteRates(key_per_second=0, owner_per_second=0, burst=1, clock=clock)
    for _ in range(100):
        rates.spend(writer("a", "acme"))


def test_heartbeats_of_unknown_nodes_are_limited_and_those_that_are_found_are_not_counted(clock: Clock) -> None:
    rate = UnknownNodeRate(clock)
    for _ in range(3 * UNKNOWN_BURST):
        rate.spend("key")
        rate.take_back("key")
    for _ in range(UNKNOWN_BURST):
        rate.spend("key")
    with pytest.raises(RateLimited, match="Retry in 1 s"):
        rate.spend("key")
    rate.spend("another")
    clock.seconds += 1
    for _ in range(UNKNOWN_PER_SECOND):
        rate.spend("key")
    with pytest.raises(RateLimited):
        rate.spend("key")


def test_addresses_that_fail_once_are_forgotten() -> None:
    attempts = FailedAttempts(20)
    for number in range(25_000):
        attempts.record(f"10.0.{number // 250}.{number % 250}")
        assert len(attempts._counts) <= 10_001
