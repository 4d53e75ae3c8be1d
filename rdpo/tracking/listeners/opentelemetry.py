"""A run as an OpenTelemetry trace: a span for it, and one in it for each stage, sent by OTLP over HTTP."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rdpo.config import Job
from rdpo.files.manifest import Manifest
from rdpo.files.stores import absolute
from rdpo.tracking.console import Listener, Meter
from rdpo.tracking.listeners.figures import stage_figures

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Span

NANO = 1_000_000_000


class OpenTelemetry(Listener):
    """Spans of the stages that this command does something in; those that it finds up to date have none.

    Where `TRACEPARENT` is set, as workflow systems set it, the run is a part of that trace. A stage that has begun and
    does not finish ends with the run, as an error.
    """

    def __init__(self, job: Job, run_dir: str, logs: Path):
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        # A provider of its own: the process' may belong to Ray, or to who calls `rdpo.run`.
        self.provider = TracerProvider(resource=Resource.create({"service.name": job.tracking.project}))
        self.provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self.tracer = self.provider.get_tracer("rdpo")
        about: dict[str, str | int] = {
            "rdpo.run_dir": absolute(run_dir),
            "rdpo.seed": job.seed,
            "rdpo.model": job.student.model,
        }
        self.run = self.tracer.start_span(f"rdpo {job.name}", context=_parent(), attributes=about)
        self.stages: dict[str, Span] = {}

    def progress(self, meter: Meter) -> None:
        """A stage that comes further has begun; stages through which rows stream come further together."""
        for stage in meter.stage.split("+"):
            if stage not in self.stages:
                self.stages[stage] = self._span(stage, meter.seconds)

    def made(self, manifest: Manifest) -> None:
        """One stage is finished."""
        span = self.stages.pop(manifest.stage, None) or self._span(manifest.stage, manifest.seconds)
        span.set_attribute("rdpo.key", manifest.key)
        for name, value in stage_figures(manifest).items():
            span.set_attribute(f"rdpo.{name.replace('/', '.')}", value)
        span.end()

    def close(self) -> None:
        """Nothing more comes: what is open ends, and all is sent."""
        from opentelemetry.trace import StatusCode

        for span in self.stages.values():
            span.set_status(StatusCode.ERROR, "the stage did not finish")
            span.end()
        self.stages = {}
        self.run.end()
        self.provider.shutdown()

    def _span(self, stage: str, seconds: float) -> Span:
        """A span of a stage that began so many seconds ago."""
        from opentelemetry.trace import set_span_in_context

        began = time.time_ns() - int(seconds * NANO)
        return self.tracer.start_span(f"rdpo {stage}", context=set_span_in_context(self.run), start_time=began)


def _parent() -> Context:
    """What the environment says that the run belongs to, as a context; an empty one where it says nothing."""
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier = {name: os.environ[name.upper()] for name in ("traceparent", "tracestate") if name.upper() in os.environ}
    return TraceContextTextMapPropagator().extract(carrier)
