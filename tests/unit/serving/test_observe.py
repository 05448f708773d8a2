"""What goes to Sentry and to an OpenTelemetry collector, and that nothing does unless it is asked for."""

from __future__ import annotations

import builtins
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient

from raytower.errors import InputError, MissingExtraError
from raytower.serving.access_log import RequestFacts, RequestLog, current, stage
from raytower.serving.observe import ObserveConfig, check, install

DSN = "http://public@127.0.0.1:9/1"
SECRET = "花呗 secret text"
LOGGER = logging.getLogger("raytower.serving")


def make_app(*observers: Any) -> TestClient:
    async def search(request: Request) -> Response:
        query = SECRET
        facts = current()
        facts.route, facts.collection = "/v1/search", "faq"
        facts.num_queries, facts.texts = 1, [query]
        with stage("encode"):
            pass
        with stage("recall"):
            if "fail" in request.query_params:
                try:
                    raise ValueError(f"cannot encode {query!r}")
                except ValueError:
                    LOGGER.exception("request %s failed", facts.request_id)
                    logging.getLogger("somebody").error("quotes %s", query)
        return JSONResponse("ok")

    return TestClient(RequestLog(Starlette(routes=[Route("/v1/search", search)]), observers))


def missing(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **values: Any) -> Any:
        if name == module or name.startswith(f"{module}."):
            raise ModuleNotFoundError(f"No module named {module!r}", name=module)
        return real(name, *args, **values)

    for name in [name for name in sys.modules if name == module or name.startswith(f"{module}.")]:
        monkeypatch.delitem(sys.modules, name)

    class Finder:
        def find_spec(self, name: str, *args: Any) -> None:
            if name == module or name.startswith(f"{module}."):
                raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    monkeypatch.setattr(builtins, "__import__", refuse)


def test_a_missing_extra_is_named_with_its_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    missing(monkeypatch, "sentry_sdk")
    missing(monkeypatch, "opentelemetry.exporter")
    for call in (check, install):
        with pytest.raises(
            MissingExtraError, match=r"observe.sentry_dsn needs.*pip install 'raytower\[sentry\]'"
        ):
            call(ObserveConfig(sentry_dsn=DSN))
        with pytest.raises(
            MissingExtraError, match=r"observe.otlp_endpoint needs.*pip install 'raytower\[otel\]'"
        ):
            call(ObserveConfig(otlp_endpoint="http://127.0.0.1:9"))
        call(ObserveConfig())


def test_nothing_is_imported_unless_it_is_asked_for() -> None:
    code = (
        "import sys\n"
        "from raytower.serving.observe import ObserveConfig, check, install\n"
        "check(ObserveConfig()); install(ObserveConfig()).close()\n"
        "print([name for name in sys.modules if name.partition('.')[0] in ('sentry_sdk', 'opentelemetry')])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


# --- Sentry ---------------------------------------------------------------------------------------------------


@pytest.fixture
def sentry_events() -> Iterator[list[Any]]:
    sdk = pytest.importorskip("sentry_sdk")
    events: list[Any] = []

    class Kept(sdk.transport.Transport):  # type: ignore[misc]
        def capture_envelope(self, envelope: Any) -> None:
            events.extend(item.get_event() for item in envelope.items if item.get_event() is not None)

    telemetry = install(ObserveConfig(sentry_dsn=DSN), "r1", transport=Kept())
    yield events
    telemetry.close()
    sdk.get_global_scope().set_client(None)


def test_an_error_is_sent_with_its_id_and_without_any_text(sentry_events: list[Any]) -> None:
    make_app().get("/v1/search?fail=true&q=secret", headers={"x-request-id": "req-7", "cookie": "secret"})
    (event,) = sentry_events
    assert event["tags"] == {"request_id": "req-7", "method": "GET", "collection": "faq"}
    assert event["server_name"] == "raytower/r1"
    (problem,) = event["exception"]["values"]
    assert problem["type"] == "ValueError"
    assert problem["stacktrace"]["frames"][-1]["function"] == "search"
    whole = json.dumps(event, ensure_ascii=False)
    # The source line holds the name `SECRET`, never its value.
    assert SECRET not in whole
    assert "q=secret" not in whole
    assert "cookie" not in whole


def test_a_request_that_went_well_sends_nothing(sentry_events: list[Any]) -> None:
    assert make_app().get("/v1/search").status_code == 200
    assert sentry_events == []


def test_what_is_no_dsn_is_refused() -> None:
    pytest.importorskip("sentry_sdk")
    with pytest.raises(InputError, match=r"observe.sentry_dsn 'nonsense' is no DSN"):
        install(ObserveConfig(sentry_dsn="nonsense"))


# --- OpenTelemetry --------------------------------------------------------------------------------------------


def spans_of(
    config: ObserveConfig, headers: dict[str, str], path: str = "/v1/search"
) -> tuple[Any, str | None]:
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
    exporter = memory.InMemorySpanExporter()
    telemetry = install(config, "r1", exporter=exporter)
    traces: list[str | None] = []
    make_app(telemetry.record, lambda facts: traces.append(facts.trace_id)).get(path, headers=headers)
    telemetry.close()
    return exporter.get_finished_spans(), traces[0]


OTLP = ObserveConfig(otlp_endpoint="http://127.0.0.1:9")


def test_an_endpoint_without_http_is_refused() -> None:
    with pytest.raises(ValueError, match=r"otlp_endpoint is 'collector:4317'; it must begin with http://"):
        ObserveConfig(otlp_endpoint="collector:4317")


def test_a_request_is_a_span_with_its_stages_inside() -> None:
    spans, trace = spans_of(OTLP, {"x-request-id": "req-7"})
    by_name = {span.name: span for span in spans}
    assert set(by_name) == {"GET /v1/search", "encode", "recall"}
    request = by_name["GET /v1/search"]
    assert request.attributes["http.response.status_code"] == 200
    assert request.attributes["raytower.request_id"] == "req-7"
    assert request.attributes["raytower.collection"] == "faq"
    assert request.resource.attributes["service.instance.id"] == "r1"
    assert request.parent is None
    for name in ("encode", "recall"):
        assert by_name[name].parent.span_id == request.context.span_id
        assert request.start_time <= by_name[name].start_time <= by_name[name].end_time <= request.end_time
    assert trace == format(request.context.trace_id, "032x")
    assert not any("secret" in str(value) for span in spans for value in (span.attributes or {}).values())


def test_a_callers_trace_goes_on_and_its_word_on_sampling_counts() -> None:
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    never = ObserveConfig(otlp_endpoint="http://127.0.0.1:9", trace_share=0)
    spans, told = spans_of(never, {"traceparent": f"00-{trace}-00f067aa0ba902b7-01"})
    assert len(spans) == 3
    assert {format(span.context.trace_id, "032x") for span in spans} == {trace} == {told}
    assert spans_of(never, {})[0] == ()
    assert spans_of(OTLP, {"traceparent": f"00-{trace}-00f067aa0ba902b7-00"})[0] == ()
    assert len(spans_of(OTLP, {"traceparent": "nonsense"})[0]) == 3


def test_a_failed_request_is_an_error_span() -> None:
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
    exporter = memory.InMemorySpanExporter()
    telemetry = install(OTLP, exporter=exporter)
    telemetry.record(
        RequestFacts(request_id="a", method="GET", route="/v1/search", status=503, error="not_ready")
    )
    telemetry.record(
        RequestFacts(request_id="b", method="GET", route="/v1/search", status=422, error="invalid_value")
    )
    telemetry.close()
    codes = [span.status.status_code.name for span in exporter.get_finished_spans()]
    assert codes == ["ERROR", "UNSET"]


def test_spans_go_over_http_to_the_collectors_path() -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http.trace_exporter")
    import http.server
    import threading

    paths: list[tuple[str, bytes]] = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            paths.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Collector)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        telemetry = install(ObserveConfig(otlp_endpoint=f"http://127.0.0.1:{server.server_port}/"))
        make_app(telemetry.record).get("/v1/search")
        telemetry.close()
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert [path for path, _ in paths] == ["/v1/traces"]
    assert b"GET /v1/search" in paths[0][1]
