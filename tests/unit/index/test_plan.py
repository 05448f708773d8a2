"""Predictions of the index planner, against FAISS itself where it lays bytes out; no Ray."""

from __future__ import annotations

from typing import Any, get_args

import faiss
import numpy as np
import pytest
from hypothesis import event, example, given
from hypothesis import strategies as st

from raytower.config import WorkersConfig
from raytower.errors import InputError
from raytower.index import costs
from raytower.index.config import BuiltKind, HnswConfig, IvfConfig
from raytower.index.faiss_index import fill, new_index, reserve, train
from raytower.index.plan import IndexPlan, IndexRequest
from raytower.index.tasks import on_ray

KINDS = get_args(BuiltKind)
GIB = 2**30


def plan(**values: Any) -> IndexPlan:
    return IndexRequest(**{"rows": 1_000_000, "dim": 256, "memory_bytes": 64 * GIB, **values}).plan()


def plan_or_none(**values: Any) -> IndexPlan | None:
    """None stands for a refusal, which names the memory."""
    try:
        return plan(**values)
    except InputError as error:
        if "target.memory" not in str(error):
            raise
        return None


def trained(
    kind: Any, rows: int, dim: int, iterations: int | None = None
) -> tuple[Any, np.ndarray, dict[str, int]]:
    """`iterations` of k-means, where the place of the centroids does not matter."""
    vectors = np.random.default_rng(0).normal(size=(rows, dim)).astype(np.float32)
    parameters = IndexRequest(rows=rows, dim=dim, kind=kind, shards=1).plan().parameters
    index = new_index(kind, dim, parameters)
    for clustering in (getattr(index, "cp", None), getattr(getattr(index, "pq", None), "cp", None)):
        if iterations and clustering:
            clustering.niter = iterations
    if kind != "flat":
        index.train(vectors)
    return index, vectors, parameters


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "dim"), [(3000, 16), (2000, 100)])
def test_disk_is_what_faiss_writes(kind: BuiltKind, rows: int, dim: int) -> None:
    index, vectors, parameters = trained(kind, rows, dim, iterations=2)
    index.add(vectors)
    written = len(faiss.serialize_index(index))
    assert costs.shard_bytes(kind, rows, dim, parameters) == pytest.approx(written, rel=0.01, abs=2000)


def test_codebooks_are_not_annealed_for_a_search_that_is_not_used() -> None:
    """FAISS's factory trains polysemous codes unless told not to: twenty times the work, for equal hits."""
    assert not new_index("ivf_pq", 16, {"nlist": 4, "pq_m": 4, "nbits": 6}).do_polysemous_training


@pytest.mark.parametrize("kind", ["flat", "hnsw"])
def test_a_reserved_index_is_the_same_and_never_moves(kind: BuiltKind) -> None:
    """The arrays stand where they stood before the first row came, so none was copied into a larger one."""
    grown, vectors, _ = trained(kind, 3000, 16)
    reserved = faiss.deserialize_index(faiss.serialize_index(grown))
    reserve(kind, reserved, len(vectors))

    def addresses() -> list[int]:
        if kind == "flat":
            return [int(reserved.codes.data())]
        graph = faiss.downcast_index(reserved.base_index)
        return [
            int(faiss.downcast_index(reserved.refine_index).codes.data()),
            int(faiss.downcast_index(graph.storage).codes.data()),
            int(graph.hnsw.neighbors.data()),
        ]

    before = addresses()
    faiss.omp_set_num_threads(1)  # the graph depends on who comes first
    for start in range(0, len(vectors), 500):
        grown.add(vectors[start : start + 500])
        reserved.add(vectors[start : start + 500])
    assert addresses() == before
    assert np.array_equal(faiss.serialize_index(reserved), faiss.serialize_index(grown))


def test_the_hnsw_reserve_holds_for_any_draw_of_levels() -> None:
    """Levels are drawn at random: the room must do for many draws, small and large."""
    for rows in (1, 2, 33, 1000, 20_000):
        for seed in range(20):
            index = faiss.index_factory(4, "HNSW8_SQ8,RFlat", faiss.METRIC_INNER_PRODUCT)
            graph = faiss.downcast_index(index.base_index).hnsw
            graph.rng = faiss.RandomGenerator(seed)
            reserve("hnsw", index, rows)
            before = int(graph.neighbors.data())
            graph.prepare_level_tab(rows, False)
            assert int(graph.neighbors.data()) == before


@pytest.mark.parametrize("kind", KINDS)
def test_training_assigns_on_the_gpus_that_faiss_sees(
    kind: BuiltKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for the GPU build gives CPU indexes in place of copies on a GPU, and counts what they were asked."""
    moved: list[Any] = []

    def index_cpu_to_all_gpus(index: Any) -> Any:
        moved.append(index)
        return index

    plain, vectors, parameters = trained(kind, 3000, 16)
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1, raising=False)
    monkeypatch.setattr(faiss, "index_cpu_to_all_gpus", index_cpu_to_all_gpus, raising=False)
    index = new_index(kind, 16, parameters)
    train(kind, index, vectors)
    # k-means leaves its centroids in the index that it assigned with.
    sizes = {"flat": [], "hnsw": [], "ivf_pq": [parameters.get("nlist"), 1 << parameters.get("nbits", 0)]}
    assert [item.ntotal for item in moved] == sizes.get(kind, [parameters.get("nlist")])
    assert np.array_equal(faiss.serialize_index(index), faiss.serialize_index(plain))


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [([2.0], 2), ([16.0, 4.0], 8), ([1.0], 2), ([0.0], 2), ([], 2)],
)
def test_a_lone_task_takes_what_the_workers_would_on_one_node(
    nodes: list[float], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four workers of two CPUs: eight where a node has them, and never less than one worker asks for."""
    alive = [{"Alive": True, "Resources": {"CPU": cpus} if cpus else {}} for cpus in nodes]
    gone = {"Alive": False, "Resources": {"CPU": 64.0}}
    monkeypatch.setattr("ray.nodes", lambda: [*alive, gone])
    monkeypatch.setattr("raytower.runtime.ensure_ray", lambda num_cpus: None)
    assert on_ray(WorkersConfig(num=4, num_cpus=2)).threads_alone == expected


def test_a_lone_task_takes_the_cores_of_nodes_that_it_may_run_on(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [("spot", 4.0), ("on-demand", 64.0)]
    found = [{"Alive": True, "Resources": {"CPU": cpus}, "Labels": {"market": name}} for name, cpus in nodes]
    monkeypatch.setattr("ray.nodes", lambda: found)
    monkeypatch.setattr("raytower.runtime.ensure_ray", lambda num_cpus: None)
    workers = WorkersConfig(num=4, num_cpus=2, label_selector={"market": "spot"})
    assert on_ray(workers).threads_alone == 4


class TestLatency:
    def test_a_slow_kind_is_passed_over(self) -> None:
        """20,000 rows of 1,024 dimensions are scanned in some 3 ms; a graph walk takes a fraction of that."""
        assert plan(rows=20_000, dim=1024).kind == "flat"
        fast = plan(rows=20_000, dim=1024, latency_ms=1.0)
        assert fast.kind == "hnsw"
        assert fast.predicted_query_ms <= 1.0

    def test_what_no_kind_keeps_is_said(self) -> None:
        found = plan(rows=100_000_000, memory_bytes=32 * GIB, latency_ms=0.01)
        assert "over target.latency_ms 0.01" in found.reason
        coded = ("ivf_rabitq", "ivf_sq8", "ivf_pq")
        others = [plan(rows=100_000_000, memory_bytes=32 * GIB, kind=kind) for kind in coded]
        assert found.predicted_query_ms == min(other.predicted_query_ms for other in others)


class TestAuto:
    """`auto` against each of its kinds, asked for by name."""

    @given(
        rows=st.floats(2, 9).map(lambda digits: int(10**digits)),
        dim=st.sampled_from([8, 256, 768]),
        # From less than the smallest codes take to more than a graph with whole vectors.
        bytes_per_dim=st.floats(-1.5, 2).map(lambda digits: 10**digits),
        room=st.sampled_from([0, 2**20, 2**30]),
        latency=st.floats(-3, 3).map(lambda digits: 10**digits),
    )
    # ivf_sq8 fits as one shard, and not as the many in which it can be built.
    @example(rows=3_162_277, dim=8, bytes_per_dim=10**0.3125, room=0, latency=1.0)
    def test_it_plans_what_some_kind_can_and_keeps_the_latency_that_some_kind_keeps(
        self, rows: int, dim: int, bytes_per_dim: float, room: int, latency: float
    ) -> None:
        values = {"rows": rows, "dim": dim, "memory_bytes": int(rows * dim * bytes_per_dim) + room}
        names = ["flat"] * (rows <= 20_000) + ["hnsw", "ivf_rabitq", "ivf_sq8", "ivf_pq"]
        others = [other for name in names if (other := plan_or_none(**values, kind=name))]
        found = plan_or_none(**values, latency_ms=latency)
        event(f"{found.kind if found else 'refused'}, {len(others)} of {len(names)} kinds fit")

        assert (found is not None) == bool(others)
        if found is None:
            return
        assert found.predicted_search_memory_bytes <= values["memory_bytes"]
        assert found.predicted_build_memory_bytes_per_task <= values["memory_bytes"]
        assert values["memory_bytes"] >= rows * 9  # an id of eight bytes and one of codes
        fastest = min(other.predicted_query_ms for other in others)
        assert (found.predicted_query_ms <= latency) == (fastest <= latency)
        assert ("within target.latency_ms" in found.reason) == (fastest <= latency)
        if fastest > latency:
            assert found.predicted_query_ms == fastest

    def test_a_kind_that_can_be_searched_and_not_built_is_passed_over(self) -> None:
        values = {"rows": 134_151, "dim": 256, "memory_bytes": 160_925_824}
        with pytest.raises(InputError, match="building kind ivf_sq8"):
            plan(**values, kind="ivf_sq8")
        assert plan(**values, rescore=False).kind == "ivf_pq"


class TestGrowth:
    @given(kind=st.sampled_from(KINDS), rows=st.integers(10_000, 10**8), dim=st.sampled_from([16, 256, 1024]))
    def test_more_rows_never_cost_less(self, kind: BuiltKind, rows: int, dim: int) -> None:
        less, more = (
            plan(rows=count, dim=dim, kind=kind, shards=4, memory_bytes=2**50) for count in (rows, 2 * rows)
        )
        for name in (
            "predicted_disk_bytes",
            "predicted_search_memory_bytes",
            "predicted_build_memory_bytes_per_task",
            "predicted_build_seconds",
            "predicted_query_ms",
        ):
            assert getattr(less, name) <= getattr(more, name)
        assert more.predicted_disk_bytes > more.rows * (dim // 8)

    def test_filling_a_shard_takes_more_than_the_shard(self) -> None:
        for kind in KINDS:
            found = plan(kind=kind, shards=2)
            share = (found.predicted_search_memory_bytes) // 2
            assert share < found.predicted_build_memory_bytes_per_task < 3 * share + 600 * 2**20

    def test_workers_and_threads_shorten_the_build(self) -> None:
        one = plan(kind="hnsw", shards=4, num_workers=1).predicted_build_seconds
        two = plan(kind="hnsw", shards=4, num_workers=2).predicted_build_seconds
        threads = plan(kind="hnsw", shards=4, num_workers=1, threads_per_task=2).predicted_build_seconds
        assert two == pytest.approx(one / 2, rel=0.02)
        assert threads == pytest.approx(one / 2, rel=0.1)

    def test_memory_that_holds_one_task_makes_them_wait(self) -> None:
        alone = plan(kind="ivf_flat", shards=4, num_workers=4, memory_bytes=int(1.2 * GIB))
        room = plan(kind="ivf_flat", shards=4, num_workers=4, memory_bytes=20 * GIB)
        assert alone.tasks_at_once < room.tasks_at_once == 4
        assert alone.predicted_build_seconds > room.predicted_build_seconds


class TestOneBit:
    def test_bytes_of_a_row(self) -> None:
        """256 bits, two factors of 4 bytes and an id of 8."""
        assert costs.bytes_per_row("ivf_rabitq", 256, {"nlist": 100}) == 32 + 8 + 8
        assert costs.bytes_per_row("ivf_rabitq", 100, {"nlist": 100}) == 13 + 8 + 8

    def test_auto_takes_it_before_the_other_codes(self) -> None:
        found = plan(rows=50_000_000, memory_bytes=8 * GIB)
        assert (found.kind, found.exact_dtype) == ("ivf_rabitq", "float32")
        assert "hnsw would take" in found.reason

    def test_without_stored_vectors_auto_passes_it_over(self) -> None:
        found = plan(rows=50_000_000, memory_bytes=8 * GIB, rescore=False)
        assert (found.kind, found.exact_dtype) == ("ivf_pq", None)
        assert "rabitq" not in found.reason

    def test_without_stored_vectors_it_is_refused(self) -> None:
        with pytest.raises(InputError, match="rescore is false, but one bit a dimension ranks too coarsely"):
            plan(kind="ivf_rabitq", rescore=False)

    @pytest.mark.parametrize("rescore", [True, False])
    def test_what_does_not_fit_names_the_smallest_kind(self, rescore: bool) -> None:
        least = "ivf_rabitq" if rescore else "ivf_pq"
        with pytest.raises(InputError, match=f"even as {least}"):
            plan(rows=10**9, memory_bytes=8 * GIB, rescore="auto" if rescore else False)


class TestSettings:
    def test_they_take_the_place_of_what_is_planned(self) -> None:
        graph = plan(kind="hnsw", hnsw=HnswConfig(m=16, ef_construction=200))
        assert graph.parameters == {"M": 16, "efConstruction": 200}
        assert plan(kind="ivf_flat", ivf=IvfConfig(nlist=77)).parameters == {"nlist": 77}
        codes = plan(kind="ivf_pq", ivf=IvfConfig(nlist=77, pq_m=32)).parameters
        assert (codes["nlist"], codes["pq_m"]) == (77, 32)
        # `auto` takes those of the kind that it chooses.
        assert plan(hnsw=HnswConfig(m=8), ivf=IvfConfig(pq_m=8)).parameters["M"] == 8

    def test_null_is_planned(self) -> None:
        assert plan(kind="hnsw", hnsw=HnswConfig()).parameters == {"M": 32, "efConstruction": 100}

    def test_they_change_what_is_predicted(self) -> None:
        thin, thick = (plan(kind="hnsw", hnsw=HnswConfig(m=m)) for m in (8, 64))
        # 56 more links of 4 bytes, twice on the lowest level.
        assert thick.predicted_search_memory_bytes - thin.predicted_search_memory_bytes == 10**6 * 2 * 56 * 4

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            (
                {"kind": "ivf_flat", "hnsw": HnswConfig(m=8)},
                "hnsw.m is set, but an index of kind ivf_flat has no such",
            ),
            ({"kind": "hnsw", "ivf": IvfConfig(nlist=8)}, "ivf.nlist is set, but an index of kind hnsw"),
            ({"kind": "flat", "ivf": IvfConfig(nlist=8)}, "ivf.nlist is set, but an index of kind flat"),
            ({"kind": "ivf_sq8", "ivf": IvfConfig(pq_m=8)}, "ivf.pq_m is set, but an index of kind ivf_sq8"),
            (
                {"ivf": IvfConfig(pq_m=60)},
                "ivf.pq_m is 60, which does not divide the dimension 256; take 32 or 64",
            ),
            (
                {"kind": "ivf_flat", "rows": 1000, "ivf": IvfConfig(nlist=1001)},
                "ivf.nlist is 1001, but centroids are trained on 1000 rows.*set ivf.nlist to 1000 or fewer",
            ),
            (
                {"kind": "ivf_flat", "memory_bytes": 2 * GIB, "ivf": IvfConfig(nlist=600_000)},
                "takes .* a task, more than target.memory 2.0 GiB",
            ),
        ],
    )
    def test_refused(self, values: dict[str, Any], message: str) -> None:
        with pytest.raises(InputError, match=message):
            plan(**values)

    def test_float16_embeddings_make_a_graph_smaller_and_are_stored_so(self) -> None:
        whole, half = (plan(kind="hnsw", vector_dtype=dtype) for dtype in ("float32", "float16"))
        assert whole.predicted_search_memory_bytes - half.predicted_search_memory_bytes == 10**6 * 256 * 2
        vectors = np.random.default_rng(0).normal(size=(2000, 100)).astype(np.float32)
        parameters = plan(rows=2000, dim=100, kind="hnsw", vector_dtype="float16").parameters
        index = new_index("hnsw", 100, parameters)
        train("hnsw", index, vectors)
        written = len(faiss.serialize_index(fill("hnsw", index, [vectors], 2000)))
        assert costs.shard_bytes("hnsw", 2000, 100, parameters) == pytest.approx(written, rel=0.01, abs=2000)
