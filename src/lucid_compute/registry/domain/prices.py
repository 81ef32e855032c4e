"""What tokens cost on a node, exactly: a price for all of its models, or one for a model, in and out apart. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from decimal import Context, Decimal, Inexact, InvalidOperation
from typing import Any

from lucid_compute.wire import read_money

EXACT = Context(prec=200, traps=[Inexact, InvalidOperation])
"""Arithmetic that refuses to round: the default of 28 digits would, for a trillion tokens at twelve decimals."""

INPUT_KEY = "inputPer1kTokens"
OUTPUT_KEY = "outputPer1kTokens"


class TokenPrice:
    """The price of tokens in US dollars: for 1,000 that go in, and for 1,000 that come out."""

    __slots__ = ("_is_one", "_per_input", "_per_output", "input_per_1k", "output_per_1k")

    def __init__(self, input_per_1k: Decimal, output_per_1k: Decimal) -> None:
        self.input_per_1k = input_per_1k
        self.output_per_1k = output_per_1k
        self._is_one = input_per_1k == output_per_1k
        self._per_input = EXACT.scaleb(input_per_1k, -3)
        self._per_output = EXACT.scaleb(output_per_1k, -3)

    @property
    def highest_per_1k(self) -> Decimal:
        """The most that 1,000 tokens can cost, whichever they are: what a request's limit is held against."""
        return max(self.input_per_1k, self.output_per_1k)

    def of(self, tokens_in: int, tokens_out: int) -> Decimal:
        """Return what so many tokens cost, exactly."""
        if self._is_one:  # a quarter of the time
            return EXACT.multiply(self._per_input, tokens_in + tokens_out)
        return EXACT.fma(self._per_input, tokens_in, EXACT.multiply(self._per_output, tokens_out))


def read_price(per_1k: Any) -> TokenPrice | None:
    """Return a node's one price for every token as it is stored; None when it names none."""
    return None if per_1k is None else TokenPrice(Decimal(per_1k), Decimal(per_1k))


def read_prices(stored: Any) -> dict[str, TokenPrice]:
    """Return prices by model; what an older version kept under that key without reading it is no price."""
    if not isinstance(stored, Mapping):
        return {}
    prices = {}
    for model, price in stored.items():
        try:
            prices[model] = TokenPrice(read_money(price[INPUT_KEY]), read_money(price[OUTPUT_KEY]))
        except (KeyError, TypeError, ValueError):
            continue
    return prices


def total(amounts: Iterable[Decimal]) -> Decimal:
    """Return the exact sum; 0 of nothing."""
    whole = Decimal(0)
    for amount in amounts:
        whole = EXACT.add(whole, amount)
    return whole
