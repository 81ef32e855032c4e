"""Traces over OpenTelemetry (OTLP). Only this file imports its packages: they are the extra `tracing`."""

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
    """A span of OpenTelemetry."""

    __slots__ = ("_span", "_tracer")

    def __init__(self, tracer: trace.Tracer, span: trace.Span) -> None:
        self._tracer = tracer
        self._span = span

    @property
    def traceparent(self) -> bytes:
        """The `traceparent` header for the next service: W3C Trace Context, version 00."""
        context = self._span.get_span_context()
        return b"00-%032x-%016x-%02x" % (context.trace_id, context.span_id, context.trace_flags)

    def child(self, name: str, *, is_outgoing: bool = False) -> OtlpSpan:
        """Begin a child span; `is_outgoing` when another service does the work."""
        kind = SpanKind.CLIENT if is_outgoing else SpanKind.INTERNAL
        parent = trace.set_span_in_context(self._span)
        return OtlpSpan(self._tracer, self._tracer.start_span(name, context=parent, kind=kind))

    def set_attributes(self, attributes: Mapping[str, str | int | float | None]) -> None:
        """Set these attributes, except those whose value is None."""
        for name, value in attributes.items():
            if value is not None:
                self._span.set_attribute(name, value)

    def end(self, error: str | None = None) -> None:
        """End the span, with an error's name if it failed. A span that has ended does not change."""
        if not self._span.is_recording():
            return
        if error is not None:
            self._span.set_attribute("error.type", error)
            self._span.set_status(StatusCode.ERROR)
        self._span.end()


class OtlpTracer:
    """Begins the spans of one replica, and sends them to a collector."""

    def __init__(self, endpoint: str, share: float, replica_id: str) -> None:
        """`share`: the part, 0 to 1, of the requests whose sender did not decide about a trace that is traced."""
        service = {"service.name": "lucid-compute", "service.version": __version__, "service.instance.id": replica_id}
        sampler = ParentBased(TraceIdRatioBased(share))
        self._provider = TracerProvider(sampler, Resource.create(service), shutdown_on_exit=False)
        exporter = OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces", timeout=EXPORT_SECONDS)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("lucid_compute", __version__)
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, name: str, headers: Mapping[bytes, bytes]) -> OtlpSpan:
        """Begin the span of a request with these headers, in its sender's trace if they name one."""
        sent = {key: headers[key.encode()].decode("latin-1") for key in _HEADERS if key.encode() in headers}
        parent = self._propagator.extract(sent) if sent else None
        return OtlpSpan(self._tracer, self._tracer.start_span(name, context=parent, kind=SpanKind.SERVER))

    async def close(self) -> None:
        """Send the remaining spans, for two seconds at most: a collector that hangs must not delay the shutdown."""
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        await asyncio.to_thread(closing.join, CLOSING_SECONDS)
