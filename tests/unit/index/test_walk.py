"""Any sequence of operations on an index equals the same sequence on a dictionary.

After each step every search, filter and look-up is compared with brute force over the dictionary: nothing is
lost, nothing comes back from the dead, whatever was left half done. RAYTOWER_WALK_STEPS and RAYTOWER_WALK_RUNS
lengthen the walk.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import raytower.index.change as change
import raytower.index.fold as fold
from raytower.errors import InputError
from raytower.index.change import add_to_index, delete_from_index, set_in_index
from raytower.index.change_config import (
    IndexAddConfig,
    IndexDeleteConfig,
    IndexGcConfig,
    IndexRollbackConfig,
    IndexSetConfig,
    IndexVerifyConfig,
)
from raytower.index.collect import collect_garbage
from raytower.index.compact import compact_index
from raytower.index.config import IndexCompactConfig
from raytower.index.manage import index_rollback, index_verify
from raytower.index.reader import Index
from raytower.index.versions import open_manifest, version_names
from raytower.storage import Location
from tests.support.index_cases import HERE, build, unit_vectors, write_embeddings

DIM = 8
_ids = st.lists(st.integers(0, 60), min_size=1, max_size=12, unique=True)
_FILTERS: list[tuple[dict[str, Any], Any]] = [
    ({"tenant": "a"}, lambda doc: doc["tenant"] == "a"),
    ({"year": {"$gte": 2005}}, lambda doc: doc["year"] is not None and doc["year"] >= 2005),
    ({"year": None}, lambda doc: doc["year"] is None),
    ({"tags": {"$in": ["x", "y"]}}, lambda doc: bool({"x", "y"} & set(doc["tags"]))),
    (
        {"$or": [{"tenant": "b"}, {"year": {"$lt": 2003}}]},
        lambda doc: doc["tenant"] == "b" or (doc["year"] is not None and doc["year"] < 2003),
    ),
]


class IndexWalk(RuleBasedStateMachine):
    """`documents` is what must be found; `history` what each version holds, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="raytower-walk-"))
        self.index = self.folder / "index"
        self.seed = 0
        self.documents: dict[str, dict[str, Any]] = {}
        self.history: dict[str, dict[str, dict[str, Any]]] = {}
        self.owners: dict[int, tuple[str, int]] = {}

    def teardown(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _make(self, numbers: list[int]) -> tuple[str, dict[str, dict[str, Any]]]:
        self.seed += 1
        rng = np.random.default_rng(self.seed)
        vectors = unit_vectors(len(numbers), DIM, self.seed)
        made = {
            f"d'{number}": {
                "text": f"text {self.seed} of {number}",
                "tenant": str(rng.choice(["a", "b", "c"])),
                "year": None if rng.random() < 0.2 else int(rng.integers(2000, 2010)),
                "tags": [str(tag) for tag in rng.choice(["x", "y", "z"], rng.integers(0, 3), replace=False)],
                "vector": vectors[place],
                "made": self.seed,
            }
            for place, number in enumerate(numbers)
        }
        columns = {
            "tenant": pa.array([doc["tenant"] for doc in made.values()], pa.string()),
            "year": pa.array([doc["year"] for doc in made.values()], pa.int64()),
            "tags": pa.array([doc["tags"] for doc in made.values()], pa.list_(pa.string())),
        }
        texts = [doc["text"] for doc in made.values()]
        folder = self.folder / f"embeddings-{self.seed}"
        return write_embeddings(folder, list(made), vectors, texts, columns, rows_per_file=7), made

    def _published(self) -> None:
        self.history[open_manifest(str(self.index)).version] = dict(self.documents)

    @initialize(numbers=_ids, kind=st.sampled_from(["flat", "hnsw"]))
    def start(self, numbers: list[int], kind: str) -> None:
        embeddings, self.documents = self._make(numbers)
        build(self.index, embeddings, kind=kind, indexed=["tenant", "tags"])
        self._published()

    @rule(numbers=_ids, upsert=st.booleans(), again=st.booleans())
    def add(self, numbers: list[int], upsert: bool, again: bool) -> None:
        embeddings, made = self._make(numbers)
        config = IndexAddConfig(index=str(self.index), embeddings=embeddings, upsert=upsert)
        if not upsert and set(made) & set(self.documents):
            with pytest.raises(InputError):
                add_to_index(config)
            return
        add_to_index(config)
        if again:
            add_to_index(config)
        self.documents.update(made)
        self._published()

    @rule(numbers=_ids)
    def delete(self, numbers: list[int]) -> None:
        names = [f"d'{number}" for number in numbers]
        config = IndexDeleteConfig(index=str(self.index), ids=names, on_unknown="ignore")
        if set(self.documents) <= set(names):
            with pytest.raises(InputError):
                delete_from_index(config)
            return
        delete_from_index(config)
        for name in names:
            self.documents.pop(name, None)
        self._published()

    @rule(choice=st.sampled_from(_FILTERS))
    def delete_matching(self, choice: Any) -> None:
        condition, holds = choice
        going = [name for name, doc in self.documents.items() if holds(doc)]
        config = IndexDeleteConfig(index=str(self.index), filter=condition)
        if len(going) == len(self.documents):
            with pytest.raises(InputError):
                delete_from_index(config)
            return
        delete_from_index(config)
        for name in going:
            del self.documents[name]
        self._published()

    @rule(choice=st.sampled_from(_FILTERS), tenant=st.sampled_from(["a", "d'"]))
    def set_values(self, choice: Any, tenant: str) -> None:
        condition, holds = choice
        set_in_index(IndexSetConfig(index=str(self.index), values={"tenant": tenant}, filter=condition))
        for doc in list(self.documents.values()):
            if holds(doc):
                doc = {**doc, "tenant": tenant}
                self.documents[
                    next(name for name, known in self.documents.items() if known["text"] == doc["text"])
                ] = doc
        self._published()

    @rule()
    def compact(self) -> None:
        compact_index(IndexCompactConfig(index=str(self.index)), run=HERE)
        self._published()

    @rule(data=st.data())
    def rollback(self, data: st.DataObject) -> None:
        wanted = data.draw(st.sampled_from(version_names(Location.of(self.index))))
        index_rollback(IndexRollbackConfig(index=str(self.index), to=wanted))
        self.documents = dict(self.history[wanted])
        self._published()

    @rule(keep=st.integers(1, 3))
    def collect(self, keep: int) -> None:
        collect_garbage(IndexGcConfig(index=str(self.index), keep=keep, unfinished=True))

    @rule(numbers=_ids, delete=st.booleans())
    def die_before_publishing(self, numbers: list[int], delete: bool) -> None:
        """The table was changed and its writer killed: no version tells of it."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(change, "publish", _killed)
            with pytest.raises(KeyboardInterrupt):  # noqa: PT012
                if delete:
                    names = [f"d'{number}" for number in numbers]
                    if not set(names) & set(self.documents) or set(self.documents) <= set(names):
                        raise KeyboardInterrupt
                    delete_from_index(
                        IndexDeleteConfig(index=str(self.index), ids=names, on_unknown="ignore")
                    )
                else:
                    embeddings, _ = self._make(numbers)
                    add_to_index(IndexAddConfig(index=str(self.index), embeddings=embeddings, upsert=True))

    @rule()
    def verify(self) -> None:
        assert index_verify(IndexVerifyConfig(index=str(self.index)))["rows"] == len(self.documents)

    @invariant()
    def equals_the_dictionary(self) -> None:
        if not self.documents:
            return
        index = Index.open(str(self.index))
        assert index.num_rows == len(self.documents)
        self._check_rows(index)
        queries = unit_vectors(2, DIM, 10_000 + self.seed)
        self._check_search(index, queries, None, lambda doc: True)
        for condition, holds in _FILTERS:
            self._check_search(index, queries, condition, holds)

    def _check_rows(self, index: Index) -> None:
        """Every document is there as it is, and no row was ever another document's."""
        rows = index.table.row_map.rows()
        found = {document.id: document for document in index.documents(rows)}
        assert sorted(found) == sorted(self.documents)
        for row, document in zip(rows.tolist(), index.documents(rows), strict=True):
            doc = self.documents[document.id]
            assert document.text == doc["text"]
            assert document.metadata == {name: doc[name] for name in ("tenant", "year", "tags")}
            assert self.owners.setdefault(row, (document.id, doc["made"])) == (document.id, doc["made"])

    def _check_search(self, index: Index, queries: Any, condition: Any, holds: Any) -> None:
        k = 5
        allowed = {name: doc for name, doc in self.documents.items() if holds(doc)}
        hits = index.search(queries, k, filter=condition, search_parameters=_exactly(index))
        for place, query in enumerate(queries):
            found = [document.id for document in index.documents(hits.rows[place])]
            scores = {name: float(doc["vector"] @ query) for name, doc in allowed.items()}
            best = sorted(scores, key=lambda name: -scores[name])[:k]
            assert len(found) == len(best)
            assert set(found) <= set(allowed)
            assert np.allclose([scores[name] for name in found], [scores[name] for name in best], atol=1e-5)


def _exactly(index: Index) -> dict[str, int]:
    return {"efSearch": 200} if index.manifest.kind == "hnsw" else {}


def _killed(*arguments: Any) -> None:
    raise KeyboardInterrupt


@pytest.fixture(autouse=True)
def small_tiers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folding, which waits for thousands of rows, happens within a few steps."""
    monkeypatch.setattr(fold, "TAIL_ROWS", 10)
    monkeypatch.setattr(fold, "FLAT_ROWS", 15)


_STEPS = int(os.environ.get("RAYTOWER_WALK_STEPS", "30"))
_RUNS = int(os.environ.get("RAYTOWER_WALK_RUNS", "10"))
IndexWalk.TestCase.settings = settings(
    max_examples=_RUNS,
    stateful_step_count=_STEPS,
    deadline=None,
    derandomize="RAYTOWER_WALK_RUNS" not in os.environ,
    suppress_health_check=list(HealthCheck),
)


class TestWalk:
    def test_any_sequence_equals_a_dictionary(self) -> None:
        IndexWalk.TestCase("runTest").runTest()
