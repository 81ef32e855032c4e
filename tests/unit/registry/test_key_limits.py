"""The limits of a key that are decided by rules alone: its models and its budget."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fnmatch import fnmatchcase

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lucid_compute.errors import BudgetExceeded, DatabaseUnavailable, ModelNotAllowed
from lucid_compute.registry.domain.identity import Principal
from lucid_compute.registry.domain.key_limits import (
    BudgetPeriod,
    KeyLimits,
    is_model_allowed,
    require_budget,
    require_model,
)
from lucid_compute.registry.keys.budgets import FORGET_AFTER_SECONDS, KeyBudgets

NOON = datetime(2026, 12, 31, 12, tzinfo=UTC)


def limited(**limits: object) -> KeyLimits:
    """Limits as a request has them."""
    return KeyLimits.model_validate(limits)


@pytest.mark.parametrize(
    ("models", "name", "allowed"),
    [
        (["llama-3"], "llama-3", True),
        (["llama-3"], "llama-3-70b", False),
        (["llama-3"], "Llama-3", False),
        (["llama-*"], "llama-", True),
        (["llama-*"], "llama-3/instruct", True),
        (["llama-*"], "my-llama-3", False),
        (["*-70b"], "llama-3-70b", True),
        (["a*b*c"], "abc", True),
        (["a*b*c"], "acb", False),
        (["a*a"], "a", False),
        (["ab*ba"], "aba", False),
        (["*"], "", True),
        (["m.d?l[1]"], "m.d?l[1]", True),
        (["m.d?l[1]"], "model1", False),
        (["x", "y*"], "yes", True),
    ],
)
def test_a_pattern_is_text_with_gaps(models: list[str], name: str, allowed: bool) -> None:
    assert is_model_allowed(limited(models=models), [name]) is allowed


@given(st.lists(st.text("ab*/", min_size=1), min_size=1, max_size=3), st.text("ab/", max_size=12))
def test_patterns_are_those_of_shells(models: list[str], name: str) -> None:
    """Except that nothing but the star has a meaning."""
    assert is_model_allowed(limited(models=models), [name]) is any(fnmatchcase(name, entry) for entry in models)


def test_any_name_of_a_model_is_enough() -> None:
    """Its id, its name or an alias, however the request calls it."""
    limits = limited(models=["alias", "llama-*"])
    require_model(limits, "id", ["id", "org/name", "alias"])
    require_model(None, "id", ["id"])
    require_model(limited(requestsPerMinute=1), "id", ["id"])
    with pytest.raises(ModelNotAllowed, match=r"may not use the model 'gpt'. Use one of alias, llama-\*,") as refused:
        require_model(limits, "gpt", ["id", "gpt"])
    assert (refused.value.status, refused.value.details) == (403, {"model": "gpt", "allowed": ["alias", "llama-*"]})


def test_a_message_names_a_few_models_of_many() -> None:
    with pytest.raises(ModelNotAllowed) as refused:
        require_model(limited(models=[f"m{n}-" + "x" * 500 for n in range(100)]), "gpt", ["gpt"])
    assert len(refused.value.message) < 3000


@pytest.mark.parametrize(
    ("period", "starts", "resets"),
    [
        (BudgetPeriod.DAY, datetime(2026, 12, 31, tzinfo=UTC), datetime(2027, 1, 1, tzinfo=UTC)),
        (BudgetPeriod.MONTH, datetime(2026, 12, 1, tzinfo=UTC), datetime(2027, 1, 1, tzinfo=UTC)),
    ],
)
def test_periods_are_days_and_months_of_utc(period: BudgetPeriod, starts: datetime, resets: datetime) -> None:
    for instant in (starts, NOON, resets - timedelta(microseconds=1)):
        assert (period.starts_at(instant), period.resets_at(instant)) == (starts, resets)
    assert period.starts_at(resets) == resets


@given(st.integers(0, 7000 * 365 * 86_400 * 10**6))
def test_each_instant_is_in_one_period(microseconds: int) -> None:
    now = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=microseconds)
    for period in BudgetPeriod:
        assert period.starts_at(now) <= now < period.resets_at(now)
        assert period.starts_at(period.resets_at(now)) == period.resets_at(now)


def test_a_budget_is_spent_when_nothing_of_it_is_left() -> None:
    limits = limited(budgetUsd="5", budgetPeriod="day")
    require_budget(limits, Decimal("4.999999999999"), NOON)
    require_budget(limited(requestsPerMinute=1), Decimal(10**6), NOON)
    with pytest.raises(
        BudgetExceeded, match=r"budget of 5 US dollars a day is spent: .* 5.1\. .*2027-01-01T00"
    ) as spent:
        require_budget(limits, Decimal("5.1"), NOON)
    assert (spent.value.status, spent.value.retry_after_seconds) == (429, 12 * 3600)
    assert spent.value.details["resetsAt"] == "2027-01-01T00:00:00.000Z"


class Ledger:
    """The sums of keys that a test sets, and what was read of them."""

    def __init__(self) -> None:
        self.spent: dict[str, Decimal] = {}
        self.reads: list[tuple[list[str], datetime]] = []
        self.is_away = False

    async def read(self, key_ids: Sequence[str], since: datetime) -> dict[str, Decimal]:
        """Return the sums."""
        if self.is_away:
            raise DatabaseUnavailable
        self.reads.append((list(key_ids), since))
        return {key_id: self.spent[key_id] for key_id in key_ids if key_id in self.spent}


def holder(key_id: str, period: str = "day") -> Principal:
    """A key with a budget of 5 dollars."""
    return Principal(key_id, "carl", frozenset(), None, limited(budgetUsd="5", budgetPeriod=period))


async def test_a_budget_is_read_once_and_then_once_a_second_while_its_key_is_used() -> None:
    seconds = [0.0]
    ledger, key = Ledger(), holder("key")
    budgets = KeyBudgets(ledger.read, lambda: seconds[0])
    assert budgets.admit(Principal("free", "carl", frozenset(), None, None), NOON)
    assert not budgets.admit(key, NOON)
    await budgets.ask(key, NOON)
    assert budgets.admit(key, NOON)
    ledger.spent["key"] = Decimal(6)
    assert budgets.admit(key, NOON)  # not read again yet
    await budgets.refresh()
    with pytest.raises(BudgetExceeded):
        budgets.admit(key, NOON)
    assert [len(ids) for ids, _ in ledger.reads] == [1, 1]
    seconds[0] = FORGET_AFTER_SECONDS + 1
    await budgets.refresh()
    assert len(ledger.reads) == 2


async def test_a_new_period_has_the_whole_budget() -> None:
    ledger, daily, monthly = Ledger(), holder("daily"), holder("monthly", "month")
    budgets = KeyBudgets(ledger.read)
    ledger.spent = {"daily": Decimal(5), "monthly": Decimal(5)}
    for key in (daily, monthly):
        await budgets.ask(key, NOON)
        with pytest.raises(BudgetExceeded):
            budgets.admit(key, NOON)
    ledger.spent = {}
    tomorrow = NOON + timedelta(days=1)
    for key in (daily, monthly):
        assert not budgets.admit(key, tomorrow)
        await budgets.ask(key, tomorrow)
        assert budgets.admit(key, tomorrow)
        assert budgets.admit(key, NOON)  # a clock that stepped back waits for nothing
    assert {since for _, since in ledger.reads} >= {NOON.replace(hour=0), NOON.replace(day=1, hour=0)}


async def test_a_late_answer_about_the_last_period_does_not_replace_the_new_ones() -> None:
    """What was spent yesterday, read slowly, neither refuses a request of today nor is waited for again."""
    ledger, key, tomorrow = Ledger(), holder("key"), NOON + timedelta(days=1)
    may_answer = asyncio.Event()

    async def read_slowly(key_ids: Sequence[str], since: datetime) -> dict[str, Decimal]:
        if since < tomorrow.replace(hour=0):
            await may_answer.wait()
            return {"key": Decimal(5)}
        return await ledger.read(key_ids, since)

    budgets = KeyBudgets(read_slowly)
    slow = asyncio.create_task(budgets.ask(key, NOON))
    await asyncio.sleep(0)
    await budgets.ask(key, tomorrow)
    may_answer.set()
    await slow
    assert budgets.admit(key, tomorrow)


async def test_without_the_database_the_last_sums_decide() -> None:
    ledger, key = Ledger(), holder("key")
    budgets = KeyBudgets(ledger.read)
    ledger.is_away = True
    with pytest.raises(DatabaseUnavailable):
        await budgets.ask(key, NOON)
    ledger.is_away = False
    await budgets.ask(key, NOON)
    ledger.is_away = True
    with pytest.raises(DatabaseUnavailable):
        await budgets.refresh()
    assert budgets.admit(key, NOON)
    task = asyncio.create_task(budgets.run())
    await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
