"""Traces of requests: the interface that the gateway uses. `otlp_tracer` implements it over OpenTelemetry.

Attributes have the names of OpenTelemetry's semantic conventions for HTTP and generative AI.
The names of others begin with `lucid.`
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from lucid_compute.accounting.jobs import Job, Outcome
from lucid_compute.egress.policy import ProviderUrl
from lucid_compute.gateway.endpoints import InferenceEndpoint
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


CLIENT_ERRORS, SERVER_ERRORS = 400, 500
_PROVIDER = "lucid_compute"  # whose API the client calls; what serves behind it is the node's runtime
_OPERATIONS = {
    "chat/completions": "chat",
    "responses": "chat",
    "messages": "chat",
    "completions": "text_completion",
    "embeddings": "embeddings",
}


def begin_request(tracer: Tracer, endpoint: InferenceEndpoint, path: str, headers: Mapping[bytes, bytes]) -> Span:
    """Begin the span of a request of an endpoint, at `path`."""
    method, route = endpoint.method, endpoint.path
    span = tracer.begin(f"{method} {route}", headers)
    span.set_attributes(
        {
            "http.request.method": method,
            "http.route": route,
            "url.path": path,
            "url.scheme": "http",
            "gen_ai.operation.name": _operation_of(endpoint),
            "gen_ai.provider.name": _PROVIDER,
        }
    )
    return span


def _operation_of(endpoint: InferenceEndpoint) -> str:
    return _OPERATIONS.get(endpoint.name, endpoint.name.removeprefix("/"))


def end_request(span: Span, status: int, outcome: str | None, *, asked: str | None, job: Job | None) -> None:
    """End the span of a request.

    - `status`: 0 if none was sent.
    - `outcome`: the code of its error, or why it was cut; None if it was served. By the conventions the client's own
      errors, of status 4xx, are no errors of a server's span.
    - `asked`: the model that it names. `job`: its last attempt.
    """
    span.set_attributes(
        {
            "http.response.status_code": status or None,
            "gen_ai.request.model": asked,
            "gen_ai.response.model": job.model_name if job is not None and outcome is None else None,
            "gen_ai.usage.input_tokens": None if job is None else job.tokens_in,
            "gen_ai.usage.output_tokens": None if job is None else job.tokens_out,
            "lucid.outcome": outcome or "served",
        }
    )
    span.end(None if CLIENT_ERRORS <= status < SERVER_ERRORS else outcome)


def begin_attempt(span: Span, url: ProviderUrl, path: str, endpoint: InferenceEndpoint, number: int) -> None:
    """Say where an attempt is sent: a node's URL, and the endpoint's path there."""
    span.set_attributes(
        {
            "http.request.method": endpoint.method,
            "http.request.resend_count": number - 1 or None,
            "server.address": url.host,
            "server.port": url.port,
            "url.full": f"{url.scheme}://{url.authority}{path}",
            "gen_ai.operation.name": _operation_of(endpoint),
            "gen_ai.provider.name": _PROVIDER,
        }
    )


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
