"""Traces by OpenTelemetry, sent to a collector over OTLP and HTTP. Imported only when the operator names a collector.

The packages come with `lucid-compute[tracing]`. Spans leave in batches on a thread of the SDK's own; when its queue is
full they are dropped there, and no request waits.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from lucid_compute import __version__

CLOSING_SECONDS = 2.0
EXPORT_SECONDS = 5.0
_HEADERS = ("traceparent", "tracestate")


class OtlpSpan:
    """A span of OpenTelemetry's."""

    __slots__ = ("_span", "_tracer")

    def __init__(self, tracer: trace.Tracer, span: trace.Span) -> None:
        """Stand for `span`, whose parts `tracer` makes."""
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
