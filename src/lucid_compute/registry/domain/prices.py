"""Exact prices of tokens on a node: one for all of its models, or one for a model, for input and output. Pure."""

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
    """The price in US dollars of 1,000 input tokens and of 1,000 output tokens."""

    __slots__ = ("_is_one", "_per_input", "_per_output", "input_per_1k", "output_per_1k")

    def __init__(self, input_per_1k: Decimal, output_per_1k: Decimal) -> None:
        self.input_per_1k = input_per_1k
        self.output_per_1k = output_per_1k
        self._is_one = input_per_1k == output_per_1k
        self._per_input = EXACT.scaleb(input_per_1k, -3)
        self._per_output = EXACT.scaleb(output_per_1k, -3)

    @property
    def highest_per_1k(self) -> Decimal:
        """The higher of both prices, which a request's price limit is compared with."""
        return max(self.input_per_1k, self.output_per_1k)

    def of(self, tokens_in: int, tokens_out: int) -> Decimal:
        """Return the exact price of so many input and output tokens."""
        if self._is_one:  # takes a quarter of the time
            return EXACT.multiply(self._per_input, tokens_in + tokens_out)
        return EXACT.fma(self._per_input, tokens_in, EXACT.multiply(self._per_output, tokens_out))


def read_price(per_1k: Any) -> TokenPrice | None:
    """Return the price that a node's passport stores for all tokens; None when it stores none."""
    return None if per_1k is None else TokenPrice(Decimal(per_1k), Decimal(per_1k))


def read_prices(stored: Any) -> dict[str, TokenPrice]:
    """Return the stored prices by model, without values that older versions stored here unchecked."""
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
    """Return the exact sum; 0 when there are no amounts."""
    sum_ = Decimal(0)
    for amount in amounts:
        sum_ = EXACT.add(sum_, amount)
    return sum_
