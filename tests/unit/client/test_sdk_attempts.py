"""When a call is sent again, with the time and the chance as arguments."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest

from lucid_compute.client import compute_calls, key_calls
from lucid_compute.client.answers import read_retry_after
from lucid_compute.client.attempts import SHORTEST_ATTEMPT_SECONDS, Attempts, RetryPolicy
from lucid_compute.client.call import ApiCall
from lucid_compute.client.errors import (
    ConnectionFailed,
    Forbidden,
    KeyNotFound,
    LucidClientError,
    NodeNotFound,
    RateLimited,
    TimedOut,
    TlsFailed,
    Unavailable,
    UnexpectedAnswer,
)
from lucid_compute.client.settings import read_settings
from lucid_compute.client.transport import AsyncTransport, Transport
from tests.fault_answers import respond
from tests.fault_node import Behaviour, FaultNode
from tests.sdk import KINDS, Kind

HEALTH = compute_calls.health("p")
NEW_KEY = key_calls.create(name="k", owner="o", scopes=["compute"])
POLICY = RetryPolicy(retries=3, attempt_seconds=10.0, total_seconds=30.0)
LOST = ConnectionFailed("lost")
NOW = datetime(2026, 1, 1, 12, 0, tzinfo=UTC)


def attempts(call: ApiCall[Any] = HEALTH, *, policy: RetryPolicy = POLICY, share: float = 1.0) -> Attempts:
    """Attempts that began at 100 s of the clock."""
    return Attempts(call, policy, now_seconds=100.0, random=lambda: share)


def test_pauses_double_up_to_their_bound_and_are_any_part_of_it() -> None:
    """Full jitter: the longest pause doubles, and each is between nothing and that."""
    longest, none = attempts(), attempts(share=0.0)
    assert [longest.find_pause_seconds(LOST, 100.0) for _ in range(3)] == [0.25, 0.5, 1.0]
    assert [none.find_pause_seconds(LOST, 100.0) for _ in range(3)] == [0.0, 0.0, 0.0]
    assert POLICY.backoff_seconds(10_000) == POLICY.longest_pause_seconds


def test_a_call_is_repeated_as_often_as_it_may_be() -> None:
    """Three retries are four attempts; none is one."""
    tried = attempts()
    assert [tried.find_pause_seconds(LOST, 100.0) is None for _ in range(4)] == [False, False, False, True]
    assert attempts(policy=RetryPolicy(0, 10.0, 30.0)).find_pause_seconds(LOST, 100.0) is None


@pytest.mark.parametrize("error", [Forbidden("no"), NodeNotFound("no"), UnexpectedAnswer("no"), TlsFailed("no")])
def test_what_no_repetition_mends_is_not_repeated(error: LucidClientError) -> None:
    """A refusal for good, another service, a certificate."""
    assert attempts().find_pause_seconds(error, 100.0) is None


@pytest.mark.parametrize("error", [LOST, TimedOut("late"), Unavailable("away"), RateLimited("slow")])
def test_what_passes_is_repeated_where_it_is_safe(error: LucidClientError) -> None:
    """A call that does twice what it does once is always sent again; another when nothing was done for certain."""
    assert attempts().find_pause_seconds(error, 100.0) is not None
    assert attempts(NEW_KEY).find_pause_seconds(error, 100.0) is None
    undone = type(error)("x", is_certainly_undone=True)
    assert attempts(NEW_KEY).find_pause_seconds(undone, 100.0) is not None


def test_what_the_service_asks_is_waited_in_full_and_some_time_on_top() -> None:
    """Everyone who was told the same second comes back at another instant."""
    error = Unavailable("away", retry_after_seconds=2.0)
    assert attempts(share=0.0).find_pause_seconds(error, 100.0) == 2.0
    assert attempts(share=1.0).find_pause_seconds(error, 100.0) == 2.25


def test_no_pause_goes_past_the_calls_time() -> None:
    """Who could not be answered in time any more is answered now."""
    assert attempts().find_pause_seconds(Unavailable("away", retry_after_seconds=29.0), 100.0) is not None
    assert attempts().find_pause_seconds(Unavailable("away", retry_after_seconds=30.0), 100.0) is None
    assert attempts().find_pause_seconds(LOST, 129.9) is None


def test_an_attempt_takes_no_longer_than_is_left() -> None:
    """Nor longer than one attempt may, nor so short that it can't succeed; a wait that was asked for is on top."""
    assert attempts().seconds_for_attempt(100.0) == 10.0
    assert attempts().seconds_for_attempt(127.0) == 3.0
    assert attempts().seconds_for_attempt(140.0) == SHORTEST_ATTEMPT_SECONDS
    assert attempts(compute_calls.deregister("p", wait_seconds=60)).seconds_for_attempt(127.0) == 63.0


def test_a_repetition_that_finds_nothing_was_done_before() -> None:
    """Only a repetition, and only of a call that ends what it names."""
    revoke = attempts(key_calls.revoke("k"))
    assert not revoke.is_done_by(KeyNotFound("none"))
    revoke.find_pause_seconds(LOST, 100.0)
    assert revoke.is_done_by(KeyNotFound("none"))
    assert not revoke.is_done_by(Forbidden("no"))
    other = attempts()
    other.find_pause_seconds(LOST, 100.0)
    assert not other.is_done_by(NodeNotFound("none"))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (None, None),
        ("7", 7.0),
        ("0.5", 0.5),
        ("-3", 0.0),
        ("soon", None),
        ("", None),
        ("nan", None),
        ("1e999", None),
        (format_datetime(NOW + timedelta(seconds=90), usegmt=True), 90.0),
        (format_datetime(NOW - timedelta(seconds=90), usegmt=True), 0.0),
    ],
)
def test_retry_after_is_read_as_seconds_or_as_a_date(text: str | None, seconds: float | None) -> None:
    """What is neither is as good as nothing."""
    assert read_retry_after(text, NOW) == seconds


@pytest.mark.parametrize("kind", KINDS)
async def test_a_client_pauses_as_long_as_was_decided(kind: Kind) -> None:
    """Both clients sleep between attempts, and count time by the clock that they are given."""
    clock, slept = [100.0], list[float]()

    def pass_time(seconds: float) -> None:
        slept.append(seconds)
        clock[0] += seconds

    async def pass_time_later(seconds: float) -> None:
        pass_time(seconds)

    refusal = b'{"error":{"code":"OVERLOADED","message":"Wait.","status":503,"details":{}}}'
    async with FaultNode(Behaviour(answer=respond(refusal, "Retry-After: 4", status=503))) as node:
        settings = read_settings(
            node.url, "k", timeout_seconds=5.0, total_timeout_seconds=10.0, retries=5, ca_file=None
        )
        if kind is KINDS[0]:
            transport = Transport(settings, clock=lambda: clock[0], sleep=pass_time, random=lambda: 1.0)
            with pytest.raises(Unavailable):
                await asyncio.to_thread(transport.run, HEALTH)
            transport.close()
        else:
            later = AsyncTransport(settings, clock=lambda: clock[0], sleep=pass_time_later, random=lambda: 1.0)
            with pytest.raises(Unavailable):
                await later.run(HEALTH)
            await later.close()
    assert slept == [4.25, 4.5]  # a third one would end after ten seconds
