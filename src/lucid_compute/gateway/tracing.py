"""Traces of requests: the interface that the gateway uses. `otlp_tracer` implements it over OpenTelemetry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from lucid_compute.accounting.jobs import Job, Outcome
from lucid_compute.registry.fleet.fleet import FleetNode


class Span(Protocol):
    """A span of a request's trace, from its creation until `end`."""

    @property
    def traceparent(self) -> bytes:
        """The `traceparent` header for the next service: W3C Trace Context."""

    def child(self, name: str, *, is_outgoing: bool = False) -> Span:
        """Begin a child span; `is_outgoing` when another service does the work."""

    def set_attributes(self, attributes: Mapping[str, str | int | float | None]) -> None:
        """Set these attributes, except those whose value is None."""

    def end(self, error: str | None = None) -> None:
        """End the span, with an error's name if it failed. A span that has ended does not change."""


class Tracer(Protocol):
    """Begins the spans of one replica."""

    def begin(self, name: str, headers: Mapping[bytes, bytes]) -> Span:
        """Begin the span of a request with these headers, in its sender's trace if they name one."""

    async def close(self) -> None:
        """Send the remaining spans, for two seconds at most."""


def end_choice(span: Span, node: FleetNode | None) -> None:
    """End the span of a choice of `node`; None is the model's upstream."""
    span.set_attributes({"lucid.node.id": None if node is None else node.state.id})
    span.end()


def end_attempt(span: Span, job: Job) -> None:
    """End the span of an attempt with its job's facts; only a node's failure is an error."""
    span.set_attributes(
        {
            "gen_ai.request.model": job.model_name,
            "gen_ai.usage.input_tokens": job.tokens_in,
            "gen_ai.usage.output_tokens": job.tokens_out,
            "http.response.status_code": job.status,
            "lucid.job.id": job.id,
            "lucid.attempt": job.attempt,
            "lucid.node.id": job.node_id,
            "lucid.outcome": job.outcome.value,
            "lucid.first_byte_ms": job.first_byte_ms,
        }
    )
    span.end((job.reason or "failed") if job.outcome is Outcome.FAILED else None)
