"""Every series that a server can have, read from metrics that each method was called on once."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from raytower.serving.access_log import RequestFacts
from raytower.serving.figures import AllMetrics
from raytower.serving.metrics import Metrics


def busy_metrics(replica: str = "r1") -> Metrics:
    """Metrics with one of everything."""
    metrics = Metrics(replica)
    facts = RequestFacts(
        request_id="a",
        method="POST",
        route="/v1/{collection}/search",
        collection="faq",
        status=504,
        started_ns=1_000_000_000,
        ended_ns=1_250_000_000,
        tokens=12,
        truncated=1,
        rerank_k=100,
        reranked_k=0,
        missing_shards=[3],
        failed_in="rerank",
    )
    for name, seconds in (("encode", 0.01), ("recall", 0.02), ("fetch", 0.005), ("rerank", 0.2)):
        facts.add_stage(name, seconds)
    metrics.record(facts)
    metrics.forward("encoder", rows=8, tokens=100, padding=28, seconds=0.03)
    metrics.queue_waited("encoder", "search", 0.004)
    metrics.watch_queue("encoder", "search", lambda: 5)
    metrics.admitted("search")
    metrics.refused("bulk", "overload")
    metrics.serves("faq", index_version="000007", generation="g1", rows=1234)
    return metrics


def series(text: bytes) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Each series of an exposition, by name and sorted labels."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def known_series() -> dict[str, set[str]]:
    """Names of series, each with its labels."""
    found: dict[str, set[str]] = {}
    for name, labels in series(AllMetrics(busy_metrics(), dict).render()[0]):
        found.setdefault(name, set()).update(label for label, _ in labels)
    return found
