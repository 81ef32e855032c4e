"""What the demo's clients saw: counted on their side, to be held against what the service says."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(slots=True)
class Tally:
    """Counts of requests by what became of them.

    `errors` are answers that a client can do nothing about, `cut` streams that broke after their first word, and
    `refused` what had to be refused, by status and code. `failed_attempts` were replaced without a client's noticing.
    """

    answered: int = 0
    cut: int = 0
    failed_attempts: int = 0
    rescued: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    by_node: Counter[str] = field(default_factory=Counter)

    def answer(self, node_id: str, attempts: int, tokens_in: int, tokens_out: int) -> None:
        """Count an answer that came whole."""
        self.answered += 1
        self.by_node[node_id] += 1
        self.failed_attempts += attempts - 1
        self.rescued += attempts > 1
        self.tokens_in += tokens_in
        self.tokens_out += tokens_out

    def line(self) -> str:
        """Return the counters in one line."""
        cut = f", {self.cut} streams cut" if self.cut else ""
        return (
            f"{self.answered:,} answered, {self.errors.total()} errors{cut}, {self.rescued} saved by another node, "
            f"{self.refused.total()} rightly refused"
        )
