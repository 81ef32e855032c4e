"""What is billed, who gets what of it, and who is to blame for what was not earned. Pure.

A job's price is split by basis points into exact decimals: the model's owner's and the protocol's parts are cut off
after twelve decimals, and the provider gets all the rest, so that the three always add up to the price.
"""

from __future__ import annotations

from datetime import date, timedelta
from decimal import ROUND_FLOOR, Context, Decimal
from enum import StrEnum
from typing import NamedTuple

from lucid_compute.accounting.jobs import Outcome
from lucid_compute.errors import Shortage
from lucid_compute.registry.domain.prices import EXACT

ALL_BPS = 10_000
SHARE_DECIMALS = 12
_SHARE_STEP = Decimal(1).scaleb(-SHARE_DECIMALS)
_CUTTING_OFF = Context(prec=EXACT.prec, rounding=ROUND_FLOOR)
_ENDED_BEFORE_DELIVERY = frozenset({Outcome.FAILED, Outcome.CANCELLED, Outcome.REJECTED})


class Role(StrEnum):
    """Why somebody gets a part of a job's price."""

    PROVIDER = "provider"
    MODEL_OWNER = "model_owner"
    PROTOCOL = "protocol"


class Side(StrEnum):
    """Who is at fault that a request was not completed."""

    PROVIDER = "provider"
    NETWORK = "network"
    CLIENT = "client"
    US = "us"


class Terms(NamedTuple):
    """How prices are split, in basis points of which there are `ALL_BPS` in all."""

    provider_bps: int = 7000
    model_owner_bps: int = 2000
    protocol_bps: int = 1000

    @property
    def are_whole(self) -> bool:
        """Return whether each is a part and together they are all of it."""
        return min(self) >= 0 and sum(self) == ALL_BPS


DEFAULT_TERMS = Terms()


class Blame(NamedTuple):
    """Why a job was not completed, in one word, and whose fault that is."""

    cause: str
    side: Side


def is_billable(outcome: Outcome, tokens_out: int) -> bool:
    """Return whether a job has a price: it was completed, or broke off after it had delivered a part of its answer."""
    return outcome is Outcome.COMPLETED or (tokens_out > 0 and outcome in _ENDED_BEFORE_DELIVERY)


# Reasons of the job ledger that say whose fault it is; any other is of the side that its outcome points to.
_SIDE_OF_OUTCOME = {
    Outcome.FAILED: Side.PROVIDER,
    Outcome.REJECTED: Side.CLIENT,
    Outcome.CANCELLED: Side.CLIENT,
    Outcome.LOST: Side.US,
}
_SIDE_OF_REASON = {
    "connect_failed": Side.NETWORK,  # nobody listens, or nobody answers: from here both look alike
    "connection_lost": Side.NETWORK,
    "endpoint_not_offered": Side.PROVIDER,
    "model_not_offered": Side.PROVIDER,
    "internal": Side.US,
    "shutdown": Side.US,
}
_CAUSE_OF_OUTCOME = {
    Outcome.FAILED: "unknown",
    Outcome.REJECTED: "refused",  # in the middle of a stream
    Outcome.CANCELLED: "cancelled",
    Outcome.LOST: "replica_lost",
}


def blame(outcome: Outcome, reason: str | None) -> Blame:
    """Return the one cause and the one side at fault of a job that ended otherwise than completed."""
    if outcome is Outcome.LOST or not reason:
        return Blame(_CAUSE_OF_OUTCOME[outcome], _SIDE_OF_OUTCOME[outcome])
    return Blame(reason, _SIDE_OF_REASON.get(reason, _SIDE_OF_OUTCOME[outcome]))


# Causes of requests that were refused before a node was asked; what is not named here is the client's own fault.
_SIDE_OF_REFUSAL: dict[str, Side] = {
    Shortage.NODES_BUSY: Side.PROVIDER,
    Shortage.NODES_FAILING: Side.PROVIDER,
    Shortage.NO_HEALTHY_NODE: Side.PROVIDER,
    Shortage.NO_NODE: Side.PROVIDER,
    Shortage.NO_UPSTREAM: Side.US,
    "overloaded": Side.US,
    "database_unavailable": Side.US,
    "internal": Side.US,
    "shutdown": Side.US,
}
_NOT_IN_ORDER = frozenset(
    {
        "invalid_request",
        "body_too_slow",
        "payload_too_large",
        "method_not_allowed",
        "model_not_found",
        "unauthorized",
        "forbidden",
    }
)


def blame_refusal(cause: str) -> Blame:
    """Return the one cause and the one side at fault of a request that was refused before a node was asked."""
    return Blame(cause, _SIDE_OF_REFUSAL.get(cause, Side.CLIENT))


def could_be_served(cause: str) -> bool:
    """Return whether a request that was refused for this cause was in order, and would have earned something."""
    return cause not in _NOT_IN_ORDER


class Typical(NamedTuple):
    """What billed jobs of a model came to: how many, their tokens and what was charged for them."""

    jobs: int
    tokens_in: int
    tokens_out: int
    gross_usd: Decimal


class Unearned(NamedTuple):
    """Jobs of one kind that were not completed: how many, those with known tokens in, these, and what was billed."""

    jobs: int
    jobs_with_tokens: int
    tokens_in: int
    billed_usd: Decimal


def estimate(unearned: Unearned, typical: Typical | None) -> Decimal | None:
    """Return about what jobs would have earned beyond what was billed, never below 0; None when nothing is typical.

    Their own tokens where they are known, else a typical job's, and a typical job's tokens out, at the typical price of
    a token. An estimate, cut off after twelve decimals.
    """
    if typical is None or not typical.jobs:
        return None
    tokens = typical.tokens_in + typical.tokens_out
    if not tokens:
        return Decimal(0)
    without = unearned.jobs - unearned.jobs_with_tokens
    expected = unearned.tokens_in * typical.jobs + without * typical.tokens_in + unearned.jobs * typical.tokens_out
    worth = _CUTTING_OFF.divide(EXACT.multiply(typical.gross_usd, expected), Decimal(tokens * typical.jobs))
    rest = max(_CUTTING_OFF.subtract(worth, unearned.billed_usd), Decimal(0))
    return rest.quantize(_SHARE_STEP, context=_CUTTING_OFF)


class PayoutsClose(StrEnum):
    """When periods are closed without being asked for."""

    MONTHLY = "monthly"
    NEVER = "never"


class ClosingSpan(NamedTuple):
    """Whole days: from `since` on, until before `until`."""

    since: date
    until: date


def month_due(last_end: date | None, first_open: date | None, today: date, *, after_days: int) -> ClosingSpan | None:
    """Return the next span to close, which ends with a month that is over for `after_days`; None when none is due.

    It begins where the last period ended (`last_end`), the first one with the month of the first open line.
    """
    if last_end is None and first_open is None:
        return None
    since = last_end or (first_open or today).replace(day=1)
    until = (since.replace(day=1) + timedelta(days=32)).replace(day=1)
    return ClosingSpan(since, until) if until + timedelta(days=after_days) <= today else None
