"""What the gateway asks of traces. Who makes them is not its business: nobody, unless there is a collector."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from typing import Protocol

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from lucid_compute import __version__
from lucid_compute.accounting.jobs import Job, Outcome
from lucid_compute.registry.fleet.fleet import FleetNode


class Span(Protocol):
    """A part of a request's way, from when it is made until `end`."""

    @property
    def traceparent(self) -> bytes:
        """The header by which the next one on the way joins in: W3C Trace Context."""

    def child(self, name: str, *, is_outgoing: bool = False) -> Span:
        """Begin a part of this one; `is_outgoing` when another service does it."""

    def note(self, facts: Mapping[str, str | int | float | None]) -> None:
        """Add what became known; None is left out."""

    def end(self, error: str | None = None) -> None:
        """End it, well or with an error in a word; what was ended before stays as it is."""


class Tracer(Protocol):
    """Makes the spans of one replica."""

    def begin(self, name: str, headers: Mapping[bytes, bytes]) -> Span:
        """Begin the span of a request that came with `headers`, in its sender's trace if they name one."""

    async def close(self) -> None:
        """Send what is left, within a moment."""


CLOSING_SECONDS = 2.0
EXPORT_SECONDS = 5.0
_HEADERS = ("traceparent", "tracestate")


class OtlpSpan:
    """A span of OpenTelemetry's."""

    __slots__ = ("_span", "_tracer")

    def __init__(self, tracer: trace.Tracer, span: trace.Span) -> None:
        self._tracer = tracer
        self._span = span

    @property
    def traceparent(self) -> bytes:
        """The header by which the next one on the way joins in: W3C Trace Context, version 00."""
        context = self._span.get_span_context()
        return b"00-%032x-%016x-%02x" % (context.trace_id, context.span_id, context.trace_flags)

    def child(self, name: str, *, is_outgoing: bool = False) -> OtlpSpan:
        """Begin a part of this one; `is_outgoing` when another service does it."""
        kind = SpanKind.CLIENT if is_outgoing else SpanKind.INTERNAL
        parent = trace.set_span_in_context(self._span)
        return OtlpSpan(self._tracer, self._tracer.start_span(name, context=parent, kind=kind))

    def note(self, facts: Mapping[str, str | int | float | None]) -> None:
        """Add what became known; None is left out."""
        for name, fact in facts.items():
            if fact is not None:
                self._span.set_attribute(name, fact)

    def end(self, error: str | None = None) -> None:
        """End it, well or with an error in a word; what was ended before stays as it is."""
        if not self._span.is_recording():
            return
        if error is not None:
            self._span.set_attribute("error.type", error)
            self._span.set_status(StatusCode.ERROR)
        self._span.end()


class OtlpTracer:
    """Makes the spans of one replica, and sends them."""

    def __init__(self, endpoint: str, share: float, replica_id: str) -> None:
        """Send to the collector at `endpoint`; trace a `share` of the requests whose sender has not decided."""
        service = {"service.name": "lucid-compute", "service.version": __version__, "service.instance.id": replica_id}
        sampler = ParentBased(TraceIdRatioBased(share))
        self._provider = TracerProvider(sampler, Resource.create(service), shutdown_on_exit=False)
        exporter = OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces", timeout=EXPORT_SECONDS)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("lucid_compute", __version__)
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, name: str, headers: Mapping[bytes, bytes]) -> OtlpSpan:
        """Begin the span of a request that came with `headers`, in its sender's trace if they name one."""
        sent = {key: headers[key.encode()].decode("latin-1") for key in _HEADERS if key.encode() in headers}
        parent = self._propagator.extract(sent) if sent else None
        return OtlpSpan(self._tracer, self._tracer.start_span(name, context=parent, kind=SpanKind.SERVER))

    async def close(self) -> None:
        """Send what is left, for two seconds at most: a collector that hangs must not hold up the end."""
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        await asyncio.to_thread(closing.join, CLOSING_SECONDS)


def end_choice(span: Span, node: FleetNode | None) -> None:
    """End the span of a choice that found `node`; None is the model's upstream."""
    span.note({"lucid.node.id": None if node is None else node.state.id})
    span.end()


def end_attempt(span: Span, job: Job) -> None:
    """End the span of an attempt with what its job says; only a node's failure is an error."""
    span.note(
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
