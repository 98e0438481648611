"""OpenTelemetry traces: a span a call, with children for the time in the queue, in prefill and in decode."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

_NAME = "grokmesh"


def make_tracer(endpoint: str | None, model: str, version: str) -> tuple[trace.Tracer, Callable[[], None]]:
    """A tracer that sends to an OTLP/gRPC endpoint, and what must be called at the end; without an endpoint it does nothing.

    Without a sampled parent every call is traced; a caller's own decision, in `traceparent`, is followed.
    """
    if endpoint is None:
        return trace.NoOpTracer(), lambda: None
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    resource = Resource.create({"service.name": _NAME, "service.version": version, "gen_ai.request.model": model})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    exporter = OTLPSpanExporter(endpoint=endpoint, insecure=endpoint.startswith("http://"))
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider.get_tracer(_NAME, version), provider.shutdown


def parent_of(metadata: Iterable[tuple[str, str | bytes]]) -> Context:
    """The W3C trace context that a call's metadata bring."""
    return TraceContextTextMapPropagator().extract({key: value for key, value in metadata if isinstance(value, str)})


def child(tracer: trace.Tracer, parent: trace.Span, name: str, began: float, ended: float) -> None:
    """A child of a span that is over already; `began` and `ended` are times of time.monotonic."""
    offset = time.time() - time.monotonic()
    span = tracer.start_span(name, trace.set_span_in_context(parent), start_time=_nanoseconds(began + offset))
    span.end(_nanoseconds(ended + offset))


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
