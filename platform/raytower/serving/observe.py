"""Errors to Sentry and spans to an OpenTelemetry collector, where the config names one; nothing is sent otherwise.

Both come by extras. Neither gets texts: Sentry is sent the type and the stack of an error without messages and without
local variables, and the request's id by which the server's log has the rest; spans carry figures and names.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from pydantic import Field

import raytower
from raytower.config import Config, FractionField
from raytower.errors import InputError, import_extra
from raytower.serving.access_log import RequestFacts, current

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter
    from sentry_sdk.transport import Transport

_LOGGERS = "raytower"  # errors that other libraries log may quote what users wrote


class ObserveConfig(Config):
    """Where errors and spans are sent."""

    sentry_dsn: str | None = None
    """Sentry project that errors are sent to, as its DSN; needs the extra sentry. null sends none."""
    otlp_endpoint: str | None = None
    """OpenTelemetry collector that spans are sent to over HTTP, such as http://127.0.0.1:4318; needs the extra otel.
    null sends none."""
    trace_share: FractionField = Field(
        default=1.0,
        description="Share of requests that get spans, where the caller's traceparent does not say.",
    )
    service_name: str = Field(default="raytower", min_length=1)
    """What spans and errors are known by."""

    def model_post_init(self, context: Any) -> None:
        if self.otlp_endpoint is not None and not self.otlp_endpoint.startswith(("http://", "https://")):
            raise ValueError(
                f"otlp_endpoint is {self.otlp_endpoint!r}; it must begin with http:// or https://, and the collector "
                "must take OTLP over HTTP, by default at port 4318"
            )


class Telemetry:
    """What was installed. `record` is an observer of `access_log.RequestLog`; `close` sends what waits."""

    def __init__(self, spans: _Spans | None, errors: Any | None) -> None:
        self._spans = spans
        self._errors = errors

    def record(self, facts: RequestFacts) -> None:
        """Makes the spans of a request that has ended; its facts get the id of their trace."""
        if self._spans is not None:
            self._spans.record(facts)

    def close(self, timeout_s: float = 2.0) -> None:
        """Sends what waits, for at most `timeout_s` seconds each."""
        if self._spans is not None:
            self._spans.close(timeout_s)
        if self._errors is not None:
            self._errors.get_client().close(timeout=timeout_s)


def install(
    config: ObserveConfig,
    replica: str = "0",
    *,
    exporter: SpanExporter | None = None,
    transport: Transport | None = None,
) -> Telemetry:
    """Prepares what the config names. A test gives the exporter or the transport in place of the network's.

    Raises:
        MissingExtraError: an extra is not installed.
        InputError: the DSN is none.
    """
    errors = _install_sentry(config, replica, transport) if config.sentry_dsn is not None else None
    spans = _Spans(config, replica, exporter) if config.otlp_endpoint is not None else None
    return Telemetry(spans, errors)


def check(config: ObserveConfig) -> None:
    """Refuses a missing extra before anything is started. Raises MissingExtraError."""
    if config.sentry_dsn is not None:
        import_extra("sentry_sdk")
    if config.otlp_endpoint is not None:
        import_extra("opentelemetry.exporter.otlp.proto.http.trace_exporter")


# --- errors ---------------------------------------------------------------------------------------------------


def _install_sentry(config: ObserveConfig, replica: str, transport: Transport | None) -> Any:
    sentry = import_extra("sentry_sdk")
    logs = import_extra("sentry_sdk.integrations.logging")
    try:
        sentry.init(
            dsn=config.sentry_dsn,
            transport=transport,
            release=f"raytower@{raytower.__version__}",
            server_name=f"{config.service_name}/{replica}",
            # Errors are logged where they are answered; nothing else of the process is looked into.
            default_integrations=False,
            auto_enabling_integrations=False,
            integrations=[logs.LoggingIntegration(level=None, event_level=logging.ERROR)],
            before_send=_without_texts,
            max_breadcrumbs=0,
            max_request_body_size="never",
            include_local_variables=False,
            send_default_pii=False,
        )
    except sentry.utils.BadDsn as error:
        raise InputError(
            f"observe.sentry_dsn {config.sentry_dsn!r} is no DSN: {error}; copy it from the project's settings"
        ) from error
    return sentry


def _without_texts(event: Any, hint: Any) -> Any:
    if not event.get("logger", "").startswith(_LOGGERS):
        return None
    for problem in event.get("exception", {}).get("values", ()):
        problem.pop("value", None)
    facts = current()
    event["tags"] = {"request_id": facts.request_id, "method": facts.method}
    if facts.collection is not None:
        event["tags"]["collection"] = facts.collection
    return {
        name: value
        for name, value in event.items()
        if name not in ("request", "extra", "user", "breadcrumbs")
    }


# --- spans ----------------------------------------------------------------------------------------------------


class _Spans:
    """Spans made from a request's facts once it has ended, by a provider of our own: no global one is set."""

    def __init__(self, config: ObserveConfig, replica: str, exporter: SpanExporter | None) -> None:
        if exporter is None:
            over_http = import_extra("opentelemetry.exporter.otlp.proto.http.trace_exporter")
            endpoint = f"{(config.otlp_endpoint or '').rstrip('/')}/v1/traces"
            exporter = over_http.OTLPSpanExporter(endpoint=endpoint)
        sdk = import_extra("opentelemetry.sdk.trace")
        export = import_extra("opentelemetry.sdk.trace.export")
        resources = import_extra("opentelemetry.sdk.resources")
        sampling = import_extra("opentelemetry.sdk.trace.sampling")
        self._api = import_extra("opentelemetry.trace")
        self._parents = import_extra(
            "opentelemetry.trace.propagation.tracecontext"
        ).TraceContextTextMapPropagator()
        self._provider = sdk.TracerProvider(
            resource=resources.Resource(
                {
                    "service.name": config.service_name,
                    "service.version": raytower.__version__,
                    "service.instance.id": replica,
                }
            ),
            sampler=sampling.ParentBased(sampling.TraceIdRatioBased(config.trace_share)),
            shutdown_on_exit=False,
        )
        self._processor = export.BatchSpanProcessor(exporter)
        self._provider.add_span_processor(self._processor)
        self._tracer = self._provider.get_tracer("raytower.serving")

    def record(self, facts: RequestFacts) -> None:
        api = self._api
        carrier = {"traceparent": facts.traceparent} if facts.traceparent else {}
        span = self._tracer.start_span(
            f"{facts.method} {facts.route}",
            context=self._parents.extract(carrier),
            kind=api.SpanKind.SERVER,
            attributes=_attributes(facts),
            start_time=facts.started_ns,
        )
        facts.trace_id = api.format_trace_id(span.get_span_context().trace_id)
        inside = api.set_span_in_context(span)
        for part in facts.stages:
            child = self._tracer.start_span(part.name, context=inside, start_time=part.started_ns)
            child.end(part.ended_ns)
        if (facts.status or 0) >= 500:
            span.set_status(api.StatusCode.ERROR, facts.error)
        span.end(facts.ended_ns)

    def close(self, timeout_s: float) -> None:
        self._processor.force_flush(int(timeout_s * 1000))
        self._provider.shutdown()


def _attributes(facts: RequestFacts) -> dict[str, str | int]:
    # The names of HTTP are those of OpenTelemetry's semantic conventions.
    known: dict[str, str | int | None] = {
        "http.request.method": facts.method,
        "http.route": facts.route,
        "http.response.status_code": facts.status,
        "raytower.request_id": facts.request_id,
        "raytower.collection": facts.collection,
        "raytower.index_version": facts.index_version,
        "raytower.generation": facts.generation,
        "raytower.queries": facts.num_queries,
        "raytower.k": facts.k,
        "raytower.reranked_k": facts.reranked_k,
        "raytower.tokens": facts.tokens or None,
        "raytower.key": facts.key,
        "error.type": facts.error,
    }
    return {name: value for name, value in known.items() if value is not None}
