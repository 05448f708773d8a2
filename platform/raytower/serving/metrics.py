"""What a replica counts and times, as Prometheus reads it.

Each replica has one `Metrics` with a registry of its own; nothing here knows Ray, torch or HTTP. `record` takes the
facts of a request that has ended (`access_log.RequestFacts`); the engine reports what no single request knows: forward
passes, queues, admission. `render` puts the label `replica` on every series, so that `merge` can join the texts of all
replicas.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from raytower.serving.access_log import RequestFacts

# The oldest version of the text format, which everything that scrapes reads.
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.035, 0.05, 0.1, 0.2, 0.35, 0.5, 1, 2, 5, 10, 30, 60)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_TOKENS = (16, 64, 256, 512, 1024, 2048, 4096, 8192, 16384, 65536)


class Metrics:
    """The metrics of one replica. All methods may be called from any thread."""

    def __init__(self, replica: str = "0") -> None:
        self.replica = replica
        self._registry = CollectorRegistry()
        self._labelled = _Labelled(self._registry, replica)
        self._served: dict[str, tuple[str, str]] = {}
        ProcessCollector(registry=self._registry)
        self._define_requests()
        self._define_work()

    # --- what requests were -----------------------------------------------------------------------------------

    def record(self, facts: RequestFacts) -> None:
        """Counts a request that has ended."""
        route, collection = facts.route or "", facts.collection or ""
        self._requests.labels(route, collection, str(facts.status)).inc()
        self._request_seconds.labels(route).observe(facts.seconds)
        for part in facts.stages:
            self._stage_seconds.labels(collection, part.name).observe(part.seconds)
        if facts.late:
            self._late.labels(facts.failed_in or "waiting").inc()
        if facts.tokens:
            self._tokens.labels(route).inc(facts.tokens)
        if facts.truncated:
            self._truncated.labels(route).inc(facts.truncated)
        if facts.missing_shards:
            self._partial.labels(collection).inc()
        if facts.rerank_k and facts.reranked_k is not None and facts.reranked_k < facts.rerank_k:
            self._rerank_skips.labels(collection, "fewer" if facts.reranked_k else "none").inc()

    def _define_requests(self) -> None:
        self._requests = self._counter(
            "raytower_requests",
            "Requests that have ended, by route; status 499 is a caller who hung up",
            ("route", "collection", "status"),
        )
        self._request_seconds = self._seconds(
            "raytower_request_seconds",
            "Seconds from a request's arrival to the end of its answer",
            ("route",),
        )
        self._stage_seconds = self._seconds(
            "raytower_stage_seconds",
            "Seconds of a stage of a request: encode, recall, fetch, rerank; waiting for a batch included",
            ("collection", "stage"),
        )
        self._late = self._counter(
            "raytower_deadline_exceeded",
            "Requests answered 504, by the stage that was late; waiting: before the first one",
            ("stage",),
        )
        self._tokens = self._counter("raytower_tokens", "Tokens of requests' texts", ("route",))
        self._truncated = self._counter(
            "raytower_truncated_texts", "Texts that were cut to the model's length", ("route",)
        )
        self._partial = self._counter(
            "raytower_partial_answers", "Answers without the hits of a late or dead shard", ("collection",)
        )
        self._rerank_skips = self._counter(
            "raytower_rerank_skips",
            "Answers with none or fewer of the documents reranked than were asked for, for want of time",
            ("collection", "reranked"),
        )

    # --- what the engine did ----------------------------------------------------------------------------------

    def forward(self, model: str, *, rows: int, tokens: int, padding: int, seconds: float) -> None:
        """A forward pass of a model's queue: its rows, their tokens, and the padded positions beside them."""
        self._forward_rows.labels(model).observe(rows)
        self._forward_tokens.labels(model).observe(tokens)
        self._forward_padding.labels(model).inc(padding)
        self._forward_seconds.labels(model).observe(seconds)

    def queue_waited(self, queue: str, lane: str, seconds: float) -> None:
        """A submission was taken out of a queue."""
        self._queue_seconds.labels(queue, lane).observe(seconds)

    def watch_queue(self, queue: str, lane: str, length: Callable[[], float]) -> None:
        """`length` is called whenever metrics are read; it must be quick and must not wait for a lock."""
        self._queue_items.labels(queue, lane).set_function(length)

    def admitted(self, lane: str) -> None:
        """A request was let in."""
        self._admitted.labels(lane).inc()

    def refused(self, lane: str, reason: str) -> None:
        """A request was turned away before any work; `reason` is one of a few words, such as `overload`."""
        self._refused.labels(lane, reason).inc()

    def serves(self, collection: str, *, index_version: str, generation: str, rows: int) -> None:
        """The generation that a collection answers from, from now on."""
        former, new = self._served.get(collection), (index_version, generation)
        self._generation.labels(collection, *new).set(1)
        self._rows.labels(collection).set(rows)
        self._served[collection] = new
        # Last, so that whoever reads metrics meanwhile never finds a collection without a generation.
        if former is not None and former != new:
            self._generation.remove(collection, *former)

    def _define_work(self) -> None:
        self._forward_rows = self._histogram(
            "raytower_forward_rows", "Rows of a forward pass", ("model",), _ROWS
        )
        self._forward_tokens = self._histogram(
            "raytower_forward_tokens", "Tokens of a forward pass without padding", ("model",), _TOKENS
        )
        self._forward_padding = self._counter(
            "raytower_forward_padding_tokens", "Padded positions that were computed", ("model",)
        )
        self._forward_seconds = self._seconds(
            "raytower_forward_seconds", "Seconds of a forward pass", ("model",)
        )
        self._queue_seconds = self._seconds(
            "raytower_queue_wait_seconds",
            "Seconds that a submission waited for its first forward pass",
            ("queue", "lane"),
        )
        self._queue_items = self._gauge(
            "raytower_queue_items", "What waits in a queue now", ("queue", "lane")
        )
        self._admitted = self._counter("raytower_admitted", "Requests that were let in", ("lane",))
        self._refused = self._counter(
            "raytower_refused", "Requests that were turned away", ("lane", "reason")
        )
        self._generation = self._gauge(
            "raytower_generation_info",
            "1: the generation that a collection answers from",
            ("collection", "index_version", "generation"),
        )
        self._rows = self._gauge("raytower_rows", "Documents of a collection", ("collection",))

    def _counter(self, name: str, meaning: str, labels: Sequence[str]) -> Counter:
        return Counter(name, meaning, labels, registry=self._registry)

    def _gauge(self, name: str, meaning: str, labels: Sequence[str]) -> Gauge:
        return Gauge(name, meaning, labels, registry=self._registry)

    def _seconds(self, name: str, meaning: str, labels: Sequence[str]) -> Histogram:
        return self._histogram(name, meaning, labels, _SECONDS)

    def _histogram(
        self, name: str, meaning: str, labels: Sequence[str], buckets: Sequence[float]
    ) -> Histogram:
        return Histogram(name, meaning, labels, registry=self._registry, buckets=buckets)

    # --- out --------------------------------------------------------------------------------------------------

    def render(self) -> tuple[bytes, str]:
        """This replica's metrics in Prometheus' text format, and their content type."""
        return generate_latest(self._labelled), CONTENT_TYPE


class _Labelled(Collector):
    """A registry whose every series says which replica it is of. Nothing reads times of creation: they are left out."""

    def __init__(self, registry: CollectorRegistry, replica: str) -> None:
        self._registry = registry
        self._replica = replica

    def collect(self) -> Iterable[Metric]:
        for family in self._registry.collect():
            labelled = Metric(family.name, family.documentation, family.type)
            labelled.samples = [
                Sample(sample.name, {**sample.labels, "replica": self._replica}, sample.value)
                for sample in family.samples
                if not sample.name.endswith("_created")
            ]
            yield labelled


def merge(texts: Sequence[bytes]) -> bytes:
    """The texts of several replicas' `render` as one: each family once, with the series of all of them.

    Raises:
        ValueError: two texts hold one series, so two replicas have one name.
    """
    families: dict[bytes, list[bytes]] = {}
    series: set[bytes] = set()
    for text in texts:
        samples: list[bytes] = []
        for line in text.removesuffix(b"\n").split(b"\n"):
            if line.startswith(b"# HELP "):
                samples = families.setdefault(line, [])
            elif line.startswith(b"# TYPE "):
                if line not in samples:
                    samples.insert(0, line)
            else:
                name = line.rpartition(b" ")[0]
                if name in series:
                    raise ValueError(f"two replicas have the series {name.decode()}; name them apart")
                series.add(name)
                samples.append(line)
    return b"".join(line + b"\n" for head, samples in families.items() for line in (head, *samples))


def age_text(ages: Mapping[str, float]) -> bytes:
    """How many seconds ago the figures of each replica were true, as a text that `merge` takes."""
    registry = CollectorRegistry()
    gauge = Gauge(
        "raytower_figures_age_seconds",
        "Seconds since a replica's figures were true; those of the replica that is asked are fresh",
        ["replica"],
        registry=registry,
    )
    for replica, seconds in ages.items():
        gauge.labels(replica).set(round(seconds, 3))
    return generate_latest(registry)
