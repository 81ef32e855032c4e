"""The limits of a key: requests, tokens, requests at once, money, models; and the rules that decide on them. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta
from decimal import Decimal
from enum import StrEnum
from functools import lru_cache
from typing import Annotated, Self

from pydantic import Field, model_validator

from lucid_compute.errors import BudgetExceeded, ModelNotAllowed
from lucid_compute.wire import ModelId, Money, PositiveCount, WireShape, write_instant, write_money

MAX_MODELS = 100
_MAX_PARSED = 1000


class BudgetPeriod(StrEnum):
    """What a budget is for: each day or each month, in UTC."""

    DAY = "day"
    MONTH = "month"

    def starts_at(self, now: datetime) -> datetime:
        """Return the start of the period that contains `now`, an instant in UTC."""
        day = now.replace(hour=0, minute=0, second=0, microsecond=0)
        return day if self is BudgetPeriod.DAY else day.replace(day=1)

    def resets_at(self, now: datetime) -> datetime:
        """Return the start of the next period."""
        start = self.starts_at(now)
        if self is BudgetPeriod.DAY:
            return start + timedelta(days=1)
        return (start + timedelta(days=31)).replace(day=1)


class KeyLimitsPatch(WireShape):
    """What to change of a key's limits: null removes a limit, what is left out stays."""

    requests_per_minute: PositiveCount | None = None
    tokens_per_minute: PositiveCount | None = None
    concurrency: PositiveCount | None = Field(default=None, description="Requests at once, over all replicas.")
    budget_usd: Money | None = Field(default=None, description="What its requests may cost in each period; not 0.")
    budget_period: BudgetPeriod | None = Field(default=None, description="When the budget is full again, in UTC.")
    models: Annotated[tuple[ModelId, ...], Field(min_length=1, max_length=MAX_MODELS)] | None = Field(
        default=None,
        description="The models that it may use: ids, names, aliases, or patterns in which `*` is any text.",
        examples=[["llama-*", "mistral-7b"]],
    )


class KeyLimits(KeyLimitsPatch):
    """A key's own limits; null is no limit. A budget has both `budgetUsd` and `budgetPeriod`."""

    @model_validator(mode="after")
    def _has_a_complete_budget(self) -> Self:
        if (self.budget_usd is None) is not (self.budget_period is None):
            message = "A budget needs both `budgetUsd` and `budgetPeriod` (day or month). Send both, or neither."
            raise ValueError(message)
        if self.budget_usd == 0:
            message = "A budget of 0 US dollars allows nothing. Send more than 0, or revoke the key."
            raise ValueError(message)
        return self


def is_model_allowed(limits: KeyLimits | None, names: Iterable[str]) -> bool:
    """Return whether a key with these limits may use the model that has these names: its id, name and aliases.

    Names are case-sensitive. In a pattern `*` is any text, also none and also with slashes; all else is literal.
    """
    if limits is None or limits.models is None:
        return True
    plain, patterns = _parse(limits.models)
    return any(name in plain or any(_fits(name, pieces) for pieces in patterns) for name in names)


def require_model(limits: KeyLimits | None, model: str, names: Iterable[str]) -> None:
    """Refuse a model that the key may not use. `model` is the name in the request, `names` are all that the model has.

    Raises:
        ModelNotAllowed: none of the names is allowed.
    """
    if not is_model_allowed(limits, names):
        raise ModelNotAllowed(model, limits.models if limits and limits.models else ())


def require_budget(limits: KeyLimits | None, spent_usd: Decimal, now: datetime) -> None:
    """Refuse a request of a key that has spent its budget. `spent_usd` is since `BudgetPeriod.starts_at(now)`.

    Raises:
        BudgetExceeded: the budget is spent until the period ends.
    """
    if limits is None or limits.budget_usd is None or limits.budget_period is None or spent_usd < limits.budget_usd:
        return
    resets_at = limits.budget_period.resets_at(now)
    raise BudgetExceeded(
        f"This key's budget of {write_money(limits.budget_usd)} US dollars a {limits.budget_period} is spent: its "
        f"requests have cost {write_money(spent_usd)}. It is full again at {write_instant(resets_at)}.",
        details={
            "budgetUsd": write_money(limits.budget_usd),
            "budgetPeriod": limits.budget_period,
            "spentUsd": write_money(spent_usd),
            "resetsAt": write_instant(resets_at),
        },
        retry_after_seconds=max(1, -int((now - resets_at).total_seconds() // 1)),
    )


@lru_cache(maxsize=_MAX_PARSED)
def _parse(models: tuple[str, ...]) -> tuple[frozenset[str], tuple[tuple[str, ...], ...]]:
    """Return the plain names, and the patterns as the pieces between their gaps."""
    patterns = tuple(tuple(entry.split("*")) for entry in models if "*" in entry)
    return frozenset(entry for entry in models if "*" not in entry), patterns


def _fits(name: str, pieces: tuple[str, ...]) -> bool:
    """Return whether the pieces are in the name in this order, the first at its start and the last at its end.

    Taking each piece at its first place is enough, so no name takes long to compare.
    """
    first, *middle, last = pieces
    end = len(name) - len(last)
    if not (name.startswith(first) and name.endswith(last)):
        return False
    at = len(first)
    for piece in middle:
        if (found := name.find(piece, at, end)) < 0:
            return False
        at = found + len(piece)
    return at <= end
