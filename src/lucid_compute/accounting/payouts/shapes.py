"""Requests and responses of the payout routes. Amounts are exact US dollars, as text."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StringConstraints

from lucid_compute.accounting.payouts.revenue import ResponsibleParty, Role
from lucid_compute.wire import Day, Identifier, Instant, Pagination, ResponseShape, SignedMoney, WireShape


class PeriodClose(WireShape):
    """A period to close: whole days in UTC."""

    model_config = {"json_schema_extra": {"examples": [{"from": "2026-01-01", "to": "2026-02-01"}]}}

    from_: Day = Field(alias="from", description="The first day.")
    to: Day = Field(description="The day after the last one; today at the latest.")


class PeriodView(ResponseShape):
    """A closed period. It never changes."""

    id: str
    from_: Day = Field(alias="from")
    to: Day
    closed_at: Instant
    created_at: Instant = Field(description="The same as `closedAt`: what lists are ordered by.")
    closed_by: str | None = Field(description="The owner of the key that closed it; admins only.")


class PeriodList(ResponseShape):
    """A page of closed periods, the last one first."""

    periods: list[PeriodView]
    pagination: Pagination


class CorrectedLine(WireShape):
    """An amount that one owner gets in addition or, below 0, gives back, in one role."""

    model_config = {
        "json_schema_extra": {
            "oneOf": [
                {"properties": {"role": {"const": Role.PROTOCOL}, "owner": {"type": "null"}}},
                {
                    "properties": {"role": {"enum": [Role.PROVIDER, Role.MODEL_OWNER]}, "owner": {"type": "string"}},
                    "required": ["owner"],
                },
            ]
        }
    }

    role: Role
    owner: Identifier | None = Field(default=None, description="Leave it out for the protocol.")
    amount_usd: SignedMoney


class PeriodCorrection(WireShape):
    """A correction of a closed period: why, and who gets how much more or less."""

    model_config = {
        "json_schema_extra": {
            "examples": [
                {
                    "reason": "the price of my-model was ten times too high on 2026-01-17",
                    "lines": [
                        {"role": "provider", "owner": "acme", "amountUsd": "-6.3"},
                        {"role": "model_owner", "owner": "lab", "amountUsd": "-1.8"},
                        {"role": "protocol", "amountUsd": "-0.9"},
                    ],
                }
            ]
        }
    }

    reason: Annotated[str, StringConstraints(min_length=1, max_length=500, strip_whitespace=True)]
    lines: Annotated[list[CorrectedLine], Field(min_length=1, max_length=100)]


class CorrectedLineView(ResponseShape):
    """An amount of a correction."""

    role: Role
    owner: str | None
    amount_usd: str


class CorrectionView(ResponseShape):
    """A correction as it was booked. It never changes; a further one takes it back."""

    id: str
    period_id: str = Field(description="The closed period that it corrects.")
    day: Day = Field(description="When it is booked: it belongs to the period of this day.")
    reason: str
    created_at: Instant
    created_by: str
    lines: list[CorrectedLineView]


class CorrectionLineView(CorrectedLineView):
    """An amount of a correction that is booked on a day of the report; it is in the totals."""

    id: str
    period_id: str = Field(description="The closed period that it corrects.")
    day: Day
    reason: str
    created_at: Instant


class TermsView(ResponseShape):
    """How prices of jobs that start at `since` or later are split, in basis points: 10,000 are the whole price."""

    since: Instant
    provider_bps: int
    model_owner_bps: int
    protocol_bps: int


class PayoutTotal(ResponseShape):
    """What one owner gets in one role: the sum of its lines and corrections."""

    owner: str | None = Field(description="Null for the protocol.")
    role: Role
    jobs: int
    tokens_in: int
    tokens_out: int
    gross_usd: str = Field(description="What was charged for these jobs; others get a part of it.")
    amount_usd: str


class PayoutLine(PayoutTotal):
    """What an owner gets for the jobs of one model; a provider's lines are also by node."""

    passport_id: str | None = Field(description="The node; null unless the role is provider.")
    node: str | None
    model_id: str
    model: str


class PayoutReport(ResponseShape):
    """What was earned with the jobs that started in a span of days, or what a closed period holds."""

    from_: Day = Field(alias="from")
    to: Day = Field(description="The day after the last one.")
    owner: str | None = Field(description="Whose; null for everyone's.")
    period: PeriodView | None = Field(description="The closed period, if one was requested.")
    terms: list[TermsView] = Field(description="The terms that were valid on these days, newest first.")
    totals: list[PayoutTotal]
    lines: list[PayoutLine] | None = Field(
        description="Null when there are over 20,000: an admin names an owner to see its lines."
    )
    corrections: list[CorrectionLineView] = Field(
        default=[], description="Corrections of earlier periods that are booked on these days; totals include them."
    )


class SideTotal(ResponseShape):
    """The losses that one party is responsible for. Estimates are of what would have been charged in addition."""

    side: ResponsibleParty = Field(description="The provider, the network, the client, or this service (`us`).")
    requests: int = Field(description="Requests that failed.")
    retried: int = Field(description="Attempts that failed and were retried elsewhere.")
    refused: int = Field(description="Requests that were refused before they reached a node: no attempts.")
    unearned_usd: str = Field(description="Estimate of what the requests would have earned, failed or refused.")
    passed_on_usd: str = Field(description="Estimate of what the attempts would have earned here.")
    unestimated: int = Field(description="Of all of these, those without an estimate.")


class LossView(SideTotal):
    """The losses by one cause, which one party is responsible for."""

    cause: str = Field(examples=["http_503", "nodes_busy"])


class LossReport(ResponseShape):
    """The loss ledger of some days: `attempts` is the sum of `completed`, `running`, `requests` and `retried`.

    Refused requests are no attempts, and are not in that sum.
    """

    from_: Day = Field(alias="from")
    to: Day
    owner: str | None
    attempts: int
    completed: int
    running: int
    losses: list[LossView] = Field(description="By cause and responsible party, most lost requests first.")
    sides: list[SideTotal]
