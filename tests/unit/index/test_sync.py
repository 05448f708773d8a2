"""`index sync`: an index made equal to a folder, encoding only what is new or changed. A tiny encoder, no Ray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from raytower.config import make_config
from raytower.encoding import job as encoding_job
from raytower.encoding.config import EncodeConfig
from raytower.errors import FormatError, InputError
from raytower.index.change import delete_from_index
from raytower.index.change_config import IndexDeleteConfig, IndexGcConfig, IndexSyncConfig
from raytower.index.collect import collect_garbage
from raytower.index.compact import compact_index, plan_compact
from raytower.index.config import IndexCompactConfig
from raytower.index.reader import Index
from raytower.index.sync import _workplace, plan_sync, sync_index
from raytower.index.versions import open_manifest, version_names
from raytower.models.encoder import Encoder
from raytower.models.forward import ForwardEngine
from raytower.storage import Location
from tests.support.encoding_here import encode_here
from tests.support.index_cases import HERE, build, write_embeddings
from tests.support.tiny_models import build_tiny_encoder

Rows = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def encoder_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_encoder(tmp_path_factory.mktemp("encoder") / "encoder", seed=1)


@pytest.fixture
def documents() -> Rows:
    words = ("sun", "moon", "star", "月亮", "大地")
    return {
        f"d{n}": {"text": f"{words[n % 5]} {n}", "year": 2000 + n, "tags": ["a"] if n % 2 else []}
        for n in range(40)
    }


@pytest.fixture
def index(tmp_path: Path, encoder_dir: Path, documents: Rows) -> Path:
    encoder = Encoder.load(str(encoder_dir))
    texts = [doc["text"] for doc in documents.values()]
    columns = {
        "year": pa.array([doc["year"] for doc in documents.values()]),
        "tags": pa.array([doc["tags"] for doc in documents.values()], pa.list_(pa.string())),
    }
    embeddings = write_embeddings(
        tmp_path / "embeddings",
        list(documents),
        ForwardEngine(encoder).encode(texts),
        texts,
        columns,
        fingerprint=encoder.fingerprint,
        encoder=str(encoder_dir),
    )
    build(tmp_path / "index", embeddings)
    return tmp_path / "index"


def write(folder: Path, documents: Rows) -> str:
    folder.mkdir(exist_ok=True)
    lines = (json.dumps({"id": name, **doc}, ensure_ascii=False) + "\n" for name, doc in documents.items())
    (folder / "corpus.jsonl").write_text("".join(lines), encoding="utf-8")
    return str(folder)


def sync(index: Path, source: str, **settings: Any) -> dict[str, Any]:
    config = {"index": str(index), "input": {"path": source}, **settings}
    return sync_index(IndexSyncConfig.model_validate(config))


def counts(figures: dict[str, Any]) -> tuple[int, ...]:
    return tuple(figures[name] for name in ("added", "changed", "set", "deleted", "encoded"))


def found(index: Path) -> Rows:
    opened = Index.open(index)
    return {
        document.id: {"text": document.text, **document.metadata}
        for document in opened.documents(opened.table.row_map.rows())
    }


def test_what_is_equal_is_left_alone(index: Path, documents: Rows, tmp_path: Path) -> None:
    figures = sync(index, write(tmp_path / "corpus", documents))
    assert counts(figures) == (0, 0, 0, 0, 0)
    assert version_names(Location.of(index)) == ["000001"]


def test_rejected_rows_are_listed_beside_the_index(index: Path, documents: Rows, tmp_path: Path) -> None:
    source = write(tmp_path / "corpus", documents)
    with open(tmp_path / "corpus" / "corpus.jsonl", "a", encoding="utf-8") as stream:
        stream.write('{"id": "without a text"}\n')
    assert sync(index, source, on_error="quarantine")["rejected_rows"] == 1
    (listed,) = (tmp_path / "index.quarantine").iterdir()
    assert json.loads(listed.read_text())["line"] == 41


def test_new_changed_and_gone_in_one_version(
    index: Path, documents: Rows, tmp_path: Path, encoder_dir: Path
) -> None:
    documents["d3"]["text"] = "moon of another colour"
    documents["d4"]["year"] = 1
    documents["d5"]["tags"] = ["b", "c"]
    del documents["d6"], documents["d7"]
    documents["new"] = {"text": "a new star", "year": None, "tags": ["n"]}
    source = write(tmp_path / "corpus", documents)
    planned = plan_sync(IndexSyncConfig.model_validate({"index": str(index), "input": {"path": source}}))
    assert (planned["added"], planned["changed"], planned["set"], planned["deleted"]) == (1, 1, 2, 2)
    assert version_names(Location.of(index)) == ["000001"]
    figures = sync(index, source)
    assert counts(figures) == (1, 1, 2, 2, 2)
    assert (figures["version"], figures["rows"]) == ("000002", 39)
    assert found(index) == documents
    assert counts(sync(index, source)) == (0, 0, 0, 0, 0)
    engine = ForwardEngine(Encoder.load(str(encoder_dir)))
    opened = Index.open(index)
    for name in ("d3", "new", "d9"):
        hits = opened.search(engine.encode([documents[name]["text"]]), 1)
        assert opened.documents(hits.rows[0])[0].id == name
        assert hits.scores[0, 0] == pytest.approx(1.0, abs=1e-4)


def test_a_deleted_document_that_the_folder_still_has_comes_back(
    index: Path, documents: Rows, tmp_path: Path
) -> None:
    delete_from_index(IndexDeleteConfig(index=str(index), ids=["d1"]))
    assert counts(sync(index, write(tmp_path / "corpus", documents))) == (1, 0, 0, 0, 1)
    assert found(index) == documents


def test_a_half_delivered_folder_deletes_nothing(index: Path, documents: Rows, tmp_path: Path) -> None:
    half = dict(list(documents.items())[:15])
    source = write(tmp_path / "corpus", half)
    with pytest.raises(InputError, match=r"25 of 40 documents .* max_gone 0\.5"):
        sync(index, source)
    assert version_names(Location.of(index)) == ["000001"]
    assert counts(sync(index, source, gone="keep")) == (0, 0, 0, 0, 0)
    assert counts(sync(index, source, max_gone=0.7))[3] == 25
    assert found(index) == half


def test_columns_that_are_new_or_wider(index: Path, documents: Rows, tmp_path: Path) -> None:
    documents["d1"]["price"] = 1.5
    documents["d2"]["year"] = 2002.5
    figures = sync(index, write(tmp_path / "corpus", documents))
    assert counts(figures)[:2] == (0, 0)
    values = found(index)
    assert (values["d1"]["price"], values["d2"]["year"], values["d3"]["price"], values["d3"]["year"]) == (
        1.5,
        2002.5,
        None,
        2003,
    )


def test_a_column_of_another_type_is_refused(index: Path, documents: Rows, tmp_path: Path) -> None:
    for doc in documents.values():
        doc["year"] = str(doc["year"])
    with pytest.raises(InputError, match="year"):
        sync(index, write(tmp_path / "corpus", documents))
    assert version_names(Location.of(index)) == ["000001"]


def test_another_encoder_is_refused(index: Path, documents: Rows, tmp_path: Path) -> None:
    other = build_tiny_encoder(tmp_path / "other", seed=9)
    with pytest.raises(FormatError, match="fingerprint"):
        sync(index, write(tmp_path / "corpus", documents), encoder=str(other))


def test_vectors_equal_those_of_a_whole_encoding(
    index: Path, documents: Rows, tmp_path: Path, encoder_dir: Path
) -> None:
    for number in range(0, 40, 3):
        documents[f"d{number}"]["text"] = f"other words {number}"
    sync(index, write(tmp_path / "corpus", documents))
    opened = Index.open(index)
    rows = opened.table.row_map.rows()
    whole = ForwardEngine(Encoder.load(str(encoder_dir))).encode([doc.text for doc in opened.documents(rows)])
    whole /= np.linalg.norm(whole, axis=1, keepdims=True)
    assert np.allclose(opened.table.vectors(rows, unit=True), whole, atol=1e-5)
    assert open_manifest(index).next_row == 40 + 14


def test_workers_of_other_nodes_find_what_they_encode_in_the_index(
    index: Path, documents: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lay in /tmp of the machine of the driver, where no other node sees it."""
    asked: list[EncodeConfig] = []
    encode = encoding_job.encode

    def encode_recorded(config: EncodeConfig) -> dict[str, Any]:
        asked.append(config)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(encoding_job, "encode", encode)
            return encode_here(config)

    monkeypatch.setattr("raytower.index.sync.TEXTS_IN_PROCESS", 0)
    monkeypatch.setattr("raytower.index.sync.on_ray", lambda *_: HERE)
    monkeypatch.setattr(encoding_job, "encode", encode_recorded)
    (index / ".sync" / "embeddings").mkdir(parents=True)
    (index / ".sync" / "embeddings" / "job.json").write_text("of a sync that was killed")
    documents["d1"]["text"] = "other words"
    assert sync(index, write(tmp_path / "corpus", documents))["changed"] == 1
    (config,) = asked
    workplace = Path(config.output).parent
    assert workplace.parent == index / ".sync"
    assert config.input.path == str(workplace / "corpus.parquet")
    assert not (index / ".sync").exists()
    assert found(index)["d1"]["text"] == "other words"


def test_recall_is_measured_with_real_queries(
    index: Path, documents: Rows, tmp_path: Path, encoder_dir: Path
) -> None:
    (tmp_path / "queries.tsv").write_text(
        "bright sun\tsun 0\nthe moon\tmoon 1\n月亮\t月亮 3\n", encoding="utf-8"
    )
    target = {"queries": str(tmp_path / "queries.tsv")}
    figures = build(tmp_path / "measured", str(tmp_path / "embeddings"), kind="hnsw", target=target)
    manifest = open_manifest(tmp_path / "measured")
    assert manifest.measured is not None
    assert manifest.queries is not None
    assert (manifest.measured.queries, figures["recall_target_reached"]) == (3, True)
    again = build(tmp_path / "measured", str(tmp_path / "embeddings"), kind="hnsw", target=target)
    assert again["version"] == "000001", "a build that is there already is not made again"
    vectors = np.load(tmp_path / "measured" / "queries" / f"{manifest.queries.sha256}.npy")
    expected = ForwardEngine(Encoder.load(str(encoder_dir))).encode(["bright sun", "the moon", "月亮"])
    assert np.allclose(vectors, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-5)


def test_compaction_measures_with_other_queries_where_asked(
    index: Path, tmp_path: Path, encoder_dir: Path
) -> None:
    beir = tmp_path / "beir"
    (beir / "qrels").mkdir(parents=True)
    (beir / "corpus.jsonl").write_text('{"_id": "d1", "text": "moon 1"}\n', encoding="utf-8")
    (beir / "queries.jsonl").write_text(
        '{"_id": "q1", "text": "the moon"}\n{"_id": "q2", "text": "a star"}\n', encoding="utf-8"
    )
    (beir / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\nq2\td1\t1\n", encoding="utf-8")
    queries = {"path": str(beir), "format": "beir", "split": "dev"}
    config = make_config(IndexCompactConfig, {"index": str(index), "target": {"queries": queries}})
    assert plan_compact(config)["compacted"] is True
    assert compact_index(config, run=HERE)["compacted"] is True
    manifest = open_manifest(index)
    assert manifest.queries is not None
    assert manifest.measured is not None
    assert (manifest.measured.queries, manifest.measured.version) == (1, "000002")
    (vector,) = np.load(index / "queries" / f"{manifest.queries.sha256}.npy")
    (expected,) = ForwardEngine(Encoder.load(str(encoder_dir))).encode(["a star"])
    assert np.allclose(vector, expected / np.linalg.norm(expected), atol=1e-5)
    assert compact_index(config, run=HERE)["compacted"] is False, "these queries are the index's own by now"


def test_a_sync_that_lost_its_lease_takes_nothing_from_the_next(tmp_path: Path) -> None:
    """Both worked in one folder, which the first one removed when it found out."""
    frozen, following = _workplace(Location.of(tmp_path)), _workplace(Location.of(tmp_path))
    first = frozen.__enter__()
    (first / "corpus.parquet").write_bytes(b"of the first")
    second = following.__enter__()
    (second / "corpus.parquet").write_bytes(b"of the second")
    (first / "embeddings").make_dir()  # it goes on where it was
    frozen.__exit__(None, None, None)
    assert (second / "corpus.parquet").read_bytes() == b"of the second"
    following.__exit__(None, None, None)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_sync_left_is_garbage(index: Path) -> None:
    """Texts and vectors of all that was new stayed until the next synchronisation."""
    left = index / ".sync" / "of-a-killed-one" / "corpus.parquet"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"x" * 1000)
    freed = collect_garbage(IndexGcConfig(index=str(index), keep=1))["freed_bytes"]
    assert freed >= 1000
    assert not (index / ".sync").exists()
