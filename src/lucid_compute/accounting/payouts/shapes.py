"""Payouts on the wire: who gets what, closed periods, and what was lost. Amounts are exact US dollars, as text."""

from __future__ import annotations

from pydantic import Field

from lucid_compute.accounting.payouts.revenue import Role, Side
from lucid_compute.wire import AnswerShape, Day, Instant, Pagination, WireShape


class PeriodClose(WireShape):
    """A period to be closed: whole days in UTC."""

    model_config = {"json_schema_extra": {"examples": [{"from": "2026-01-01", "to": "2026-02-01"}]}}

    from_: Day = Field(alias="from", description="The first day.")
    to: Day = Field(description="The day after the last one; today at the latest.")


class PeriodView(AnswerShape):
    """A closed period; nothing of it changes any more."""

    id: str
    from_: Day = Field(alias="from")
    to: Day
    closed_at: Instant
    created_at: Instant = Field(description="The same as `closedAt`: what lists are ordered by.")
    closed_by: str | None = Field(description="Whose key closed it; admins only.")


class PeriodList(AnswerShape):
    """A page of closed periods, the last one first."""

    periods: list[PeriodView]
    pagination: Pagination


class TermsView(AnswerShape):
    """How prices of jobs that start from `since` on are split, in basis points: 10,000 are all."""

    since: Instant
    provider_bps: int
    model_owner_bps: int
    protocol_bps: int


class PayoutTotal(AnswerShape):
    """What one owner gets in one role: the sum of its lines."""

    owner: str | None = Field(description="Null for the protocol.")
    role: Role
    jobs: int
    tokens_in: int
    tokens_out: int
    gross_usd: str = Field(description="What was charged for these jobs, of which others get a part too.")
    amount_usd: str


class PayoutLine(PayoutTotal):
    """What it gets for the jobs of one model, a provider's on one node."""

    passport_id: str | None = Field(description="The node; null but for its provider.")
    node: str | None
    model_id: str
    model: str


class PayoutReport(AnswerShape):
    """What was earned with the jobs that started in a span of days, or what a closed period holds."""

    from_: Day = Field(alias="from")
    to: Day = Field(description="The day after the last one.")
    owner: str | None = Field(description="Whose; null for everybody's.")
    period: PeriodView | None = Field(description="The closed period, when that was asked for.")
    terms: list[TermsView] = Field(description="The terms that held on these days, the newest first.")
    totals: list[PayoutTotal]
    lines: list[PayoutLine] | None = Field(
        description="Null when there are over 20,000: an admin names an owner to see its lines."
    )


class SideTotal(AnswerShape):
    """What was lost by the fault of one side. An estimate is of what would have been charged beyond what was."""

    side: Side = Field(description="The provider, the network, the client, or this service (`us`).")
    requests: int = Field(description="Requests that failed by it.")
    retried: int = Field(description="Attempts that failed by it and were made again elsewhere.")
    refused: int = Field(description="Requests that were refused by it before any node was asked: no attempts.")
    unearned_usd: str = Field(description="Estimate of what the requests would have earned, failed or refused.")
    passed_on_usd: str = Field(description="Estimate of what the attempts would have earned here.")
    unestimated: int = Field(description="Of all of these, those that nothing is known of to estimate by.")


class LossView(SideTotal):
    """What was lost by one cause, which is one side's fault."""

    cause: str = Field(examples=["http_503", "nodes_busy"])


class LossReport(AnswerShape):
    """The loss ledger of some days: `attempts` is `completed` and `running`, and all of `requests` and `retried`.

    What was refused is no attempt, and stands beside them.
    """

    from_: Day = Field(alias="from")
    to: Day
    owner: str | None
    attempts: int
    completed: int
    running: int
    losses: list[LossView] = Field(description="By cause and side, the most requests lost first.")
    sides: list[SideTotal]
