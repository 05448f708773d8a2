"""What a server counts: the facts of requests, the engine's figures, and the texts of several replicas as one."""

from __future__ import annotations

import pytest

from raytower.serving.access_log import RequestFacts
from raytower.serving.metrics import CONTENT_TYPE, Metrics, merge
from tests.support.metric_names import busy_metrics, series


def value(text: bytes, name: str, **labels: str) -> float:
    return series(text)[name, tuple(sorted({"replica": "r1", **labels}.items()))]


def test_a_request_is_counted_by_route_collection_and_status() -> None:
    text, content_type = busy_metrics().render()
    assert content_type == CONTENT_TYPE == "text/plain; version=0.0.4; charset=utf-8"
    route = "/v1/{collection}/search"
    assert value(text, "raytower_requests_total", route=route, collection="faq", status="504") == 1
    assert value(text, "raytower_request_seconds_sum", route=route) == 0.25
    assert value(text, "raytower_request_seconds_bucket", route=route, le="0.2") == 0
    assert value(text, "raytower_request_seconds_bucket", route=route, le="0.35") == 1
    assert value(text, "raytower_stage_seconds_count", collection="faq", stage="fetch") == 1
    assert value(text, "raytower_stage_seconds_sum", collection="faq", stage="rerank") == pytest.approx(0.2)
    assert value(text, "raytower_deadline_exceeded_total", stage="rerank") == 1
    assert value(text, "raytower_tokens_total", route=route) == 12
    assert value(text, "raytower_truncated_texts_total", route=route) == 1
    assert value(text, "raytower_partial_answers_total", collection="faq") == 1
    assert value(text, "raytower_rerank_skips_total", collection="faq", reranked="none") == 1


def test_the_engine_reports_forwards_queues_and_admission() -> None:
    text, _ = busy_metrics().render()
    assert value(text, "raytower_forward_rows_sum", model="encoder") == 8
    assert value(text, "raytower_forward_tokens_sum", model="encoder") == 100
    assert value(text, "raytower_forward_padding_tokens_total", model="encoder") == 28
    assert value(text, "raytower_forward_seconds_sum", model="encoder") == 0.03
    assert value(text, "raytower_queue_wait_seconds_sum", queue="encoder", lane="search") == 0.004
    assert value(text, "raytower_queue_items", queue="encoder", lane="search") == 5
    assert value(text, "raytower_admitted_total", lane="search") == 1
    assert value(text, "raytower_refused_total", lane="bulk", reason="overload") == 1
    assert value(text, "process_resident_memory_bytes") > 1e6


@pytest.mark.parametrize(
    ("asked", "reranked", "counted"),
    [
        (100, 100, None),
        (100, 40, "fewer"),
        (100, 0, "none"),
        (0, 0, None),
        (None, None, None),
        (100, None, None),
    ],
)
def test_a_rerank_skip_is_one_that_was_asked_for(
    asked: int | None, reranked: int | None, counted: str | None
) -> None:
    metrics = Metrics("r1")
    metrics.record(RequestFacts(request_id="a", route="/v1/search", rerank_k=asked, reranked_k=reranked))
    skips = {
        dict(labels)["reranked"]: count
        for (name, labels), count in series(metrics.render()[0]).items()
        if name == "raytower_rerank_skips_total"
    }
    assert skips == ({} if counted is None else {counted: 1})


def test_a_swap_replaces_the_generation_and_another_collection_stays() -> None:
    metrics = Metrics("r1")
    metrics.serves("faq", index_version="000001", generation="g1", rows=10)
    metrics.serves("news", index_version="000009", generation="g9", rows=7)
    for _ in range(2):
        metrics.serves("faq", index_version="000002", generation="g2", rows=11)
    text, _ = metrics.render()
    generations = [dict(labels) for name, labels in series(text) if name == "raytower_generation_info"]
    assert sorted(labels["generation"] for labels in generations) == ["g2", "g9"]
    assert value(text, "raytower_rows", collection="faq") == 11
    assert value(text, "raytower_rows", collection="news") == 7


def test_a_queue_is_measured_when_it_is_asked_for() -> None:
    metrics = Metrics("r1")
    lengths = iter([3, 7])
    metrics.watch_queue("reranker", "bulk", lambda: next(lengths))
    assert value(metrics.render()[0], "raytower_queue_items", queue="reranker", lane="bulk") == 3
    assert value(metrics.render()[0], "raytower_queue_items", queue="reranker", lane="bulk") == 7
    metrics.watch_queue("reranker", "bulk", lambda: 9)
    assert value(metrics.render()[0], "raytower_queue_items", queue="reranker", lane="bulk") == 9


def test_two_metrics_share_nothing() -> None:
    first, second = Metrics("r1"), Metrics("r2")
    first.admitted("search")
    assert b"raytower_admitted_total{" not in second.render()[0]


def test_merging_keeps_every_series_of_every_replica_and_names_each_family_once() -> None:
    texts = [busy_metrics(name).render()[0] for name in ("r1", "r2", "r3")]
    merged = merge(texts)
    assert series(merged).keys() == set().union(*(series(text).keys() for text in texts))
    lines = merged.decode().split("\n")
    assert lines[-1] == ""
    heads = [line for line in lines if line.startswith("#")]
    assert len(heads) == len(set(heads))
    # Prometheus reads a family's series in one run: each comes after its own TYPE line.
    seen = [line.split()[2] for line in lines if line.startswith("# TYPE")]
    assert len(seen) == len(set(seen))
    family = ""
    for line in lines:
        if line.startswith("# TYPE"):
            family = line.split()[2]
        elif line and not line.startswith("#"):
            assert line.startswith(family), line


def test_merging_one_is_the_same_text() -> None:
    metrics = Metrics("r1")
    metrics.refused("bulk", 'a\nb "c" \\ d\re\u2028f')
    text = metrics.render()[0]
    # Figures of the process differ between two calls, so one text is compared with itself.
    assert merge([text]) == text
    assert merge([]) == b""
    assert value(merge([text]), "raytower_refused_total", lane="bulk", reason='a\nb "c" \\ d\re\u2028f') == 1


def test_two_replicas_of_one_name_are_refused() -> None:
    text = busy_metrics("r1").render()[0]
    with pytest.raises(ValueError, match=r"two replicas have the series .*replica=\"r1\""):
        merge([text, text])


def test_times_of_creation_are_left_out() -> None:
    assert b"_created" not in busy_metrics().render()[0]
