"""Prices: what tokens cost on a node, exactly, for any model and any number of tokens."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lucid_compute.accounting.jobs import Outcome
from lucid_compute.errors import InvalidRequest
from lucid_compute.gateway.usage import charge
from lucid_compute.registry.domain.metadata import read_metadata
from lucid_compute.registry.domain.passports import ComputePassport, PassportType
from lucid_compute.registry.domain.prices import TokenPrice, read_price, read_prices, total
from tests.factories import compute_passport
from tests.ledger import new_job

PRICES = st.decimals(0, 1_000_000, places=12)
TOKENS = st.integers(0, 999_999_999_999)
GUIDE = {"vram": 8, "inferenceUrl": "http://gpu"}


@pytest.mark.parametrize(
    ("price", "tokens", "expected"),
    [
        ("0.002", (1000, 500), "0.003"),
        ("0.000000000001", (1, 0), "0.000000000000001"),
        ("1000000", (999_999, 1), "1000000000"),
        ("0", (10, 10), "0"),
        ("0.002", (None, 500), "0.001"),
        ("0.002", (500, None), "0.001"),
        (None, (10, 10), None),
    ],
)
def test_a_completed_job_costs_its_tokens_at_the_nodes_price(
    price: str | None, tokens: tuple[int | None, int | None], expected: str | None
) -> None:
    """None without a price."""
    done = new_job()
    done.outcome, (done.tokens_in, done.tokens_out) = Outcome.COMPLETED, tokens
    assert charge(done, read_price(price)) == (None if expected is None else Decimal(expected))


@given(PRICES, PRICES, TOKENS, TOKENS)
def test_a_price_is_exact_for_any_number_of_tokens(
    into: Decimal, out: Decimal, tokens_in: int, tokens_out: int
) -> None:
    """Also where decimals of 28 digits would round."""
    expected = (Fraction(into) * tokens_in + Fraction(out) * tokens_out) / 1000
    assert Fraction(TokenPrice(into, out).of(tokens_in, tokens_out)) == expected
    both = Fraction(into) * (tokens_in + tokens_out) / 1000
    assert Fraction(TokenPrice(into, into).of(tokens_in, tokens_out)) == both


@given(st.lists(PRICES))
def test_a_total_is_exact(amounts: list[Decimal]) -> None:
    assert Fraction(total(amounts)) == sum(map(Fraction, amounts))


@pytest.mark.parametrize(
    ("outcome", "tokens_out", "is_billed"),
    [
        (Outcome.COMPLETED, 0, True),
        (Outcome.COMPLETED, None, True),
        (Outcome.FAILED, 3, True),
        (Outcome.CANCELLED, 3, True),
        (Outcome.REJECTED, 3, True),
        (Outcome.FAILED, 0, False),
        (Outcome.CANCELLED, 0, False),
        (Outcome.REJECTED, 0, False),
        (Outcome.REJECTED, None, False),
        (Outcome.LOST, 3, False),
    ],
)
def test_what_broke_off_is_billed_for_what_was_delivered_and_for_nothing_when_nothing_was(
    outcome: Outcome, tokens_out: int | None, is_billed: bool
) -> None:
    job = new_job()
    job.outcome, job.tokens_in, job.tokens_out = outcome, 100, tokens_out
    expected = Decimal(100 + (tokens_out or 0)) / 1000 if is_billed else None
    assert charge(job, read_price("1")) == expected


def test_a_models_own_price_goes_before_the_nodes() -> None:
    """The first of the model's id, name and aliases that has a price decides."""
    stored = {"n": {"inputPer1kTokens": "1", "outputPer1kTokens": "2"}}
    node = ComputePassport.read(compute_passport({"pricePer1kTokens": "9", "prices": stored}))
    mine, others = node.price_of(("id", "n", "alias")), node.price_of(("id", "x"))
    assert mine is not None
    assert others is not None
    assert (mine.input_per_1k, mine.output_per_1k, mine.highest_per_1k) == (Decimal(1), Decimal(2), Decimal(2))
    assert (others.input_per_1k, others.output_per_1k) == (Decimal(9), Decimal(9))
    assert ComputePassport.read(compute_passport()).price_of(("id",)) is None


@pytest.mark.parametrize("stored", [None, 5, "x", [], {"m": 1}, {"m": {}}, {"m": {"inputPer1kTokens": "1"}}])
def test_what_an_older_version_kept_unread_is_no_price(stored: Any) -> None:
    """The node can still be read."""
    assert read_prices(stored) == {}
    assert ComputePassport.read(compute_passport({"prices": stored})).prices == {}


def test_prices_are_kept_as_decimal_text() -> None:
    raw = {**GUIDE, "prices": {"m": {"inputPer1kTokens": 0.0015, "outputPer1kTokens": "0.0060"}}}
    kept = read_metadata(PassportType.COMPUTE, raw).public["prices"]
    assert kept == {"m": {"inputPer1kTokens": "0.0015", "outputPer1kTokens": "0.0060"}}


@pytest.mark.parametrize(
    ("prices", "path"),
    [
        ({"m": {"inputPer1kTokens": "1"}}, "metadata.prices.m.outputPer1kTokens"),
        ({"m": {"inputPer1kTokens": "-1", "outputPer1kTokens": "1"}}, "metadata.prices.m.inputPer1kTokens"),
        ({"m": {"inputPer1kTokens": "1", "outputPer1kTokens": "1", "x": 1}}, "metadata.prices.m.x"),
        ({"m": "0.1"}, "metadata.prices.m"),
        ([], "metadata.prices"),
    ],
)
def test_a_price_that_cannot_be_is_refused_by_its_place(prices: Any, path: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        read_metadata(PassportType.COMPUTE, {**GUIDE, "prices": prices})
    assert refused.value.details["fields"][0]["path"] == path
