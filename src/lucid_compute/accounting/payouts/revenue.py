"""Rules of revenue: which jobs are billed, how prices are split, who is responsible for what was not earned. Pure.

A job's price is split by basis points into exact decimals. The parts of the model's owner and of the protocol are cut
off after twelve decimals, and the provider gets the rest, so that the three always add up to the price.
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
    """The role in which an owner gets a part of a job's price."""

    PROVIDER = "provider"
    MODEL_OWNER = "model_owner"
    PROTOCOL = "protocol"


class ResponsibleParty(StrEnum):
    """Who is responsible that a request was not completed; `us` is this service."""

    PROVIDER = "provider"
    NETWORK = "network"
    CLIENT = "client"
    US = "us"


class Terms(NamedTuple):
    """How prices are split, in basis points: `ALL_BPS` are the whole price."""

    provider_bps: int = 7000
    model_owner_bps: int = 2000
    protocol_bps: int = 1000

    @property
    def are_whole(self) -> bool:
        """Return whether no part is negative and together they are the whole price."""
        return min(self) >= 0 and sum(self) == ALL_BPS


DEFAULT_TERMS = Terms()


class LossCause(NamedTuple):
    """Why a job was not completed, in one word, and who is responsible."""

    name: str
    party: ResponsibleParty


def is_billable(outcome: Outcome, tokens_out: int) -> bool:
    """Return whether a job has a price: it was completed, or ended after it had delivered a part of its response."""
    return outcome is Outcome.COMPLETED or (tokens_out > 0 and outcome in _ENDED_BEFORE_DELIVERY)


# Reasons of the job ledger that decide who is responsible; for other reasons the outcome decides.
_PARTY_OF_OUTCOME = {
    Outcome.FAILED: ResponsibleParty.PROVIDER,
    Outcome.REJECTED: ResponsibleParty.CLIENT,
    Outcome.CANCELLED: ResponsibleParty.CLIENT,
    Outcome.LOST: ResponsibleParty.US,
}
_PARTY_OF_REASON = {
    "connection_lost": ResponsibleParty.NETWORK,
    "endpoint_not_offered": ResponsibleParty.PROVIDER,
    "model_not_offered": ResponsibleParty.PROVIDER,
    "http_429": ResponsibleParty.PROVIDER,
    "http_503": ResponsibleParty.PROVIDER,
    "http_529": ResponsibleParty.PROVIDER,
    "node_left": ResponsibleParty.PROVIDER,
    "not_connected": ResponsibleParty.PROVIDER,
    "our_resolver": ResponsibleParty.US,
    "our_sockets": ResponsibleParty.US,
    "internal": ResponsibleParty.US,
    "response_too_large": ResponsibleParty.US,  # by a limit of this service
    "shutdown": ResponsibleParty.US,
}
_CAUSE_OF_OUTCOME = {
    Outcome.FAILED: "unknown",
    Outcome.REJECTED: "refused",  # in the middle of a stream
    Outcome.CANCELLED: "cancelled",
    Outcome.LOST: "replica_lost",
}


def cause_of(outcome: Outcome, reason: str | None) -> LossCause:
    """Return the cause and the responsible party of a job that ended, but was not completed."""
    if outcome is Outcome.LOST or not reason:
        return LossCause(_CAUSE_OF_OUTCOME[outcome], _PARTY_OF_OUTCOME[outcome])
    return LossCause(reason, _PARTY_OF_REASON.get(reason, _PARTY_OF_OUTCOME[outcome]))


# Causes of requests that were refused before they reached a node; for all others the client is responsible.
_PARTY_OF_REFUSAL: dict[str, ResponsibleParty] = {
    Shortage.NODES_BUSY: ResponsibleParty.PROVIDER,
    Shortage.NODES_FAILING: ResponsibleParty.PROVIDER,
    Shortage.NO_HEALTHY_NODE: ResponsibleParty.PROVIDER,
    Shortage.NO_NODE: ResponsibleParty.PROVIDER,
    Shortage.NO_UPSTREAM: ResponsibleParty.US,
    "overloaded": ResponsibleParty.US,
    "database_unavailable": ResponsibleParty.US,
    "internal": ResponsibleParty.US,
    "shutdown": ResponsibleParty.US,
}
_INVALID = frozenset(
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


def cause_of_refusal(cause: str) -> LossCause:
    """Return the cause and the responsible party of a request that was refused before it reached a node."""
    return LossCause(cause, _PARTY_OF_REFUSAL.get(cause, ResponsibleParty.CLIENT))


def could_be_served(cause: str) -> bool:
    """Return whether a request that was refused for this cause was valid, and would have earned something."""
    return cause not in _INVALID


class BilledTotals(NamedTuple):
    """The totals of the billed jobs of a model: their number, their tokens and what was charged."""

    jobs: int
    tokens_in: int
    tokens_out: int
    gross_usd: Decimal


class UnfinishedJobs(NamedTuple):
    """Jobs of one kind that were not completed, and what was billed for them.

    `tokens_in` is the sum of the `jobs_with_tokens`; of the other jobs the tokens are unknown.
    """

    jobs: int
    jobs_with_tokens: int
    tokens_in: int
    billed_usd: Decimal


def estimate(jobs: UnfinishedJobs, billed: BilledTotals | None) -> Decimal | None:
    """Return an estimate of what jobs would have earned beyond what was billed; None without billed jobs of the model.

    It multiplies the average price of a token by the jobs' own tokens in where they are known, else the average, and by
    the average tokens out. It is never below 0, in US dollars, cut off after twelve decimals.
    """
    if billed is None or not billed.jobs:
        return None
    tokens = billed.tokens_in + billed.tokens_out
    if not tokens:
        return Decimal(0)
    without = jobs.jobs - jobs.jobs_with_tokens
    expected = jobs.tokens_in * billed.jobs + without * billed.tokens_in + jobs.jobs * billed.tokens_out
    worth = _CUTTING_OFF.divide(EXACT.multiply(billed.gross_usd, expected), Decimal(tokens * billed.jobs))
    rest = max(_CUTTING_OFF.subtract(worth, jobs.billed_usd), Decimal(0))
    return rest.quantize(_SHARE_STEP, context=_CUTTING_OFF)


class PayoutsClose(StrEnum):
    """When periods are closed automatically."""

    MONTHLY = "monthly"
    NEVER = "never"


class ClosingSpan(NamedTuple):
    """Whole days: from `since` on, until before `until`."""

    since: date
    until: date


def month_due(last_end: date | None, first_open: date | None, today: date, *, after_days: int) -> ClosingSpan | None:
    """Return the next span to close: it ends with a month that has been over for `after_days`. None if none is due.

    It begins where the last period ended (`last_end`); the first one begins with the month of the first open line.
    """
    if last_end is None and first_open is None:
        return None
    since = last_end or (first_open or today).replace(day=1)
    until = (since.replace(day=1) + timedelta(days=32)).replace(day=1)
    return ClosingSpan(since, until) if until + timedelta(days=after_days) <= today else None
