"""Indexes of format 2, written here by hand with FAISS and Arrow, become format 3 in place."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

import raytower.index.convert as convert_module
from raytower.cli import main
from raytower.errors import FormatError, InputError
from raytower.index.change_config import IndexVerifyConfig
from raytower.index.config import IndexConvertConfig
from raytower.index.convert import convert_index, plan_convert
from raytower.index.manage import index_verify
from raytower.index.reader import Index
from raytower.index.versions import open_manifest
from raytower.runtime import worker_environment
from raytower.storage import Location
from tests.support.index_cases import HERE, unit_vectors
from tests.support.s3_server import s3_server

DIM = 16
# The deleted documents of the second shard: the first, the last, and one between.
GONE = (0, 17, 59)


def file_entry(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    return {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}


def faiss_index(kind: str, vectors: NDArray[np.float32]) -> Any:
    names = {"hnsw": "HNSW8_SQ8,RFlat", "ivf_flat": "IVF4,Flat", "ivf_pq": "IVF4,PQ4x4", "flat": "Flat"}
    index = faiss.index_factory(DIM, names[kind], faiss.METRIC_INNER_PRODUCT)
    index.train(vectors)
    index.add(vectors)
    return index


def write_shard(
    index: Path, version: str, kind: str, vectors: NDArray[Any], documents: pa.Table, exact: bool
) -> dict[str, Any]:
    """The entry of a shard of 7 documents a record batch."""
    name = "shard-00000"
    folder = index / "versions" / version / name
    folder.mkdir(parents=True)
    faiss.write_index(faiss_index(kind, vectors.astype(np.float32)), str(folder / "vectors.faiss"))
    with pa.ipc.new_file(str(folder / "documents.arrow"), documents.schema) as writer:
        writer.write_table(documents, max_chunksize=7)
    if exact:
        np.save(folder / "exact.npy", vectors)
    files = {path.name: file_entry(path) for path in sorted(folder.iterdir())}
    return {
        "version": version,
        "name": name,
        "rows": len(vectors),
        "kind": kind,
        "files": files,
        "deleted": None,
    }


def write_format_2(
    folder: Path, kind: str, added_kind: str = "flat", exact: str | None = None, **columns: pa.Array
) -> tuple[list[str], NDArray[np.float32]]:
    """An index of 100 documents and 60 added ones, three of which were deleted; ids and vectors of the others."""
    vectors = unit_vectors(160, DIM)
    if exact:
        vectors = vectors.astype(exact)
    ids = [f"文档-{number}" for number in range(160)]
    documents = pa.table({"id": ids, "text": [f"text {name}" for name in ids], **columns})
    shards = [
        write_shard(folder, "v000001", kind, vectors[:100], documents[:100], exact is not None),
        write_shard(folder, "v000002", added_kind, vectors[100:], documents[100:], exact is not None),
    ]
    tombstones = folder / "versions/v000003/deleted/v000002-shard-00000.npy"
    tombstones.parent.mkdir(parents=True)
    np.save(tombstones, np.array(GONE))
    shards[1]["deleted"] = {"version": "v000003", "rows": len(GONE), "file": file_entry(tombstones)}
    manifest = {
        "format": "raytower.index",
        "format_version": 2,
        "fingerprint": "f" * 64,
        "encoder": "an-encoder",
        "metric": "cosine",
        "dim": DIM,
        "prefix": "passage: ",
        "query_prefix": "query: ",
        "max_length": 64,
        "version": "v000003",
        "parent": "v000002",
        "operation": "delete",
        "kind": kind,
        "kind_reason": "kind was set",
        "parameters": {"M": 8, "efConstruction": 40}
        if kind == "hnsw"
        else {"nlist": 4}
        if kind != "flat"
        else {},
        "exact_dtype": exact,
        "placement": None,
        "rows": 157,
        "shards": shards,
        "spec_sha256": "0" * 64,
        "recall_k": 10,
        "recall_target": 0.9,
        "recall": 0.99,
        "recall_queries": 100,
        "recall_target_reached": True,
        "recall_curve": [],
        "placement_curve": [],
        "recall_version": "v000001",
        "search_parameters": {},
    }
    (folder / "versions/v000003/manifest.json").write_text(json.dumps(manifest))
    (folder / "CURRENT").write_text("v000003\n")
    live = [number for number in range(160) if number - 100 not in GONE]
    return [ids[number] for number in live], vectors[live].astype(np.float32)


def convert(folder: Path | str, **settings: Any) -> dict[str, Any]:
    return convert_index(IndexConvertConfig.model_validate({"index": str(folder), **settings}), HERE)


def found_ids(index: Index, vectors: NDArray[np.float32], k: int) -> list[list[str]]:
    return [[hit.id for hit in index.table.documents(rows)] for rows in index.search(vectors, k).rows]


@pytest.mark.parametrize(
    ("kind", "added_kind", "exact"),
    [
        ("flat", "flat", None),
        ("hnsw", "flat", None),
        ("ivf_flat", "ivf_flat", None),
        ("ivf_pq", "flat", "float32"),
        ("ivf_pq", "ivf_pq", "float16"),
    ],
)
def test_a_converted_index_answers_as_exact_search_over_its_documents(
    tmp_path: Path, kind: str, added_kind: str, exact: str | None
) -> None:
    ids, vectors = write_format_2(tmp_path, kind, added_kind, exact, n=pa.array(range(160)))
    before = sorted(path for path in tmp_path.rglob("*") if path.is_file())

    done = convert(tmp_path)

    assert (done["converted"], done["version"], done["rows"], done["kind"]) == (True, "000001", 157, kind)
    index = Index.open(tmp_path)
    made = index.manifest
    assert (made.operation, made.engine, made.compute_dtype) == ("convert", "torch", "float32")
    assert (made.query_prefix, made.recall_target, made.vector_dtype) == ("query: ", 0.9, exact or "float32")
    rows = np.arange(157)
    stored = index.table.documents(rows)
    assert [(item.id, item.text) for item in stored] == [(name, f"text {name}") for name in ids]
    assert [item.metadata["n"] for item in stored] == [int(name.split("-")[1]) for name in ids]
    np.testing.assert_array_equal(index.table.vectors(rows, unit=False), vectors)

    queries = unit_vectors(20, DIM, seed=9)
    best = np.argsort(-(queries @ vectors.T), axis=1)[:, :5]
    wanted = [[ids[row] for row in ranked] for ranked in best]
    parameters = {"efSearch": 200} if kind == "hnsw" else {}
    if kind.startswith("ivf"):
        parameters = {"nprobe": made.parameters["nlist"], **({"k_factor": 64} if exact else {})}
    hits = index.search(queries, 5, search_parameters=parameters)
    assert [[item.id for item in index.table.documents(row)] for row in hits.rows] == wanted
    assert (index.search_lexical(["text"], 200).rows >= 0).sum() == 157
    assert index_verify(IndexVerifyConfig(index=str(tmp_path)))["rows"] == 157
    assert all(path.is_file() for path in before), "the old files stay unless asked"


def test_converting_again_changes_nothing_and_old_files_go_when_asked(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_format_2(tmp_path, "flat")
    assert main(["search", "--index", str(tmp_path), "--query", "x"]) == 2
    assert "raytower index convert" in capfd.readouterr().err
    convert(tmp_path)

    assert main(["index", "convert", "--index", str(tmp_path)]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out)["converted"] is False
    assert "of format 3 already" in err
    assert (tmp_path / "CURRENT").is_file()
    plan = plan_convert(IndexConvertConfig(index=str(tmp_path)))
    assert plan == {"version": "000001", "converted": False}

    assert main(["index", "convert", "--index", str(tmp_path), "--remove_old", "true"]) == 0
    assert not (tmp_path / "CURRENT").exists()
    assert [path.name for path in (tmp_path / "versions").iterdir()] == ["000001.json"]
    assert convert(tmp_path, remove_old=True)["converted"] is False
    assert Index.open(tmp_path).num_rows == 157


def test_another_target_is_recorded_with_what_was_measured_for_it(tmp_path: Path) -> None:
    write_format_2(tmp_path, "hnsw")
    convert(tmp_path, target={"recall": 0.75, "k": 4})
    manifest = open_manifest(tmp_path)
    assert manifest.measured is not None
    assert (manifest.recall_target, manifest.recall_k) == (0.75, 4)
    assert (manifest.measured.target, manifest.measured.k) == (0.75, 4)


def test_old_files_that_the_index_was_not_made_of_are_kept(tmp_path: Path) -> None:
    write_format_2(tmp_path, "flat")
    convert(tmp_path)
    place = tmp_path / "versions/v000003/manifest.json"
    changed = json.loads(place.read_text())
    changed["shards"].pop()
    place.write_text(json.dumps({**changed, "rows": 100}))
    with pytest.raises(InputError, match="not made of"):
        convert(tmp_path, remove_old=True)
    assert place.is_file()


def test_shards_of_codes_only_are_refused_before_any_work(tmp_path: Path) -> None:
    write_format_2(tmp_path, "ivf_pq")
    with pytest.raises(InputError, match=r"v000001/shard-00000 .* codes .* from its embeddings"):
        convert(tmp_path)
    with pytest.raises(InputError, match="from its embeddings"):
        plan_convert(IndexConvertConfig(index=str(tmp_path)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["CURRENT", "versions"]


def test_names_that_format_3_does_not_allow_are_renamed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    numbers = pa.array(range(160))
    names = ["row", "tokens", "_rowid", "a.b", "a_b", "a`b", "source_row"]
    write_format_2(tmp_path, "flat", **dict.fromkeys(names, numbers))
    convert(tmp_path)
    stored = Index.open(tmp_path).table.documents(np.array([3]))[0].metadata
    new = ["source_source_row", "source_tokens", "source__rowid", "source_a_b", "a_b", "source_source_a_b"]
    assert stored == dict.fromkeys([*new, "source_row"], 3)
    said = capfd.readouterr().err
    assert "'row' becomes 'source_source_row'" in said
    assert "'a.b' becomes 'source_a_b'" in said


@pytest.mark.parametrize("step", ["publish", "measured", "shards_anew"])
def test_a_killed_conversion_is_taken_up_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    ids, vectors = write_format_2(tmp_path, "ivf_pq", exact="float32")

    def killed(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(convert_module, step, killed)
        with pytest.raises(KeyboardInterrupt):
            convert(tmp_path)
    with pytest.raises(InputError, match="index convert"):
        Index.open(tmp_path)
    data = {path: path.stat().st_mtime_ns for path in (tmp_path / "table.lance/data").iterdir()}

    assert convert(tmp_path)["rows"] == 157
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "table.lance/data").iterdir()} == data
    assert found_ids(Index.open(tmp_path), vectors[:3], 1) == [[name] for name in ids[:3]]
    assert not list((tmp_path / "work").iterdir())


def test_a_version_placed_by_cluster_is_placed_by_cluster_again(tmp_path: Path) -> None:
    write_format_2(tmp_path, "flat")
    place = tmp_path / "versions/v000003/manifest.json"
    manifest = json.loads(place.read_text())
    manifest["placement"] = {"version": "v000001", "shards": 2, "file": {"sha256": "0" * 64, "bytes": 1}}
    place.write_text(json.dumps(manifest))
    convert(tmp_path, shards=2)
    made = Index.open(tmp_path).manifest
    assert made.placement is not None
    assert made.placement.shards == 2


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    write_format_2(tmp_path, "flat")
    place = tmp_path / "versions/v000001/shard-00000/vectors.faiss"
    content = bytearray(place.read_bytes())
    content[-1] ^= 1
    place.write_bytes(content)
    with pytest.raises(FormatError, match=r"v000001/shard-00000/vectors.faiss has sha256 .* was changed"):
        convert(tmp_path)
    (tmp_path / "versions/v000003/manifest.json").unlink()
    with pytest.raises(FormatError, match=r"manifest.json is damaged or missing"):
        convert(tmp_path)


def test_a_folder_without_an_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no CURRENT"):
        convert(tmp_path)


def test_a_worker_gets_the_rows_with_the_columns_of_all_shards(tmp_path: Path) -> None:
    write_format_2(tmp_path, "flat", row=pa.array(range(160)))
    former = convert_module.Format2.open(Location.of(tmp_path))
    former.documents_schema()
    sent = pickle.loads(pickle.dumps(former))
    assert "schema" in vars(sent), "it does not open every shard again"
    documents, vectors = next(sent.stream(1))
    assert documents.column_names == ["id", "text", "source_row"]
    assert documents["source_row"].to_pylist() == [101, 102, 103, 104, 105, 106]
    np.testing.assert_array_equal(vectors, unit_vectors(160, DIM)[101:107])


def test_an_index_on_object_storage_becomes_format_3_there(tmp_path: Path) -> None:
    ids, vectors = write_format_2(tmp_path / "old", "hnsw", exact="float32")
    with s3_server(tmp_path) as s3:
        for path in (tmp_path / "old").rglob("*"):
            if path.is_file():
                s3.put("bucket", f"an index/{path.relative_to(tmp_path / 'old')}", path.read_bytes())
        uri, old = s3.uri("bucket/an index"), s3.keys("bucket")
        assert convert(uri)["converted"] is True
        assert set(old) < set(s3.keys("bucket"))
        assert index_verify(IndexVerifyConfig(index=uri))["rows"] == 157
        opened = Index.open(uri)
        assert found_ids(opened, vectors, 1) == [[name] for name in ids]
        np.testing.assert_array_equal(opened.table.vectors(np.arange(157), unit=False), vectors)
        assert convert(uri, remove_old=True)["converted"] is False
        assert not set(old) & set(s3.keys("bucket"))
        assert Index.open(uri).num_rows == 157


# Ends itself by a signal that nothing can catch, with one more of what a conversion makes than it was told.
DIES = """
import os, signal, sys
import raytower.index.{module} as module
from raytower.index.convert import convert_index
from raytower.index.config import IndexConvertConfig
from raytower.index.tasks import Run

kept, left = module.{step}, [{times}]

def dying(*arguments):
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    return kept(*arguments)

module.{step} = dying
convert_index(IndexConvertConfig(index=sys.argv[1], shards=2), Run())
"""


@pytest.mark.parametrize(
    ("module", "step", "times"),
    [
        ("build", "write_fragments", 1),
        ("build", "build_shard", 1),
        ("build", "exact_hits", 0),
        ("convert", "publish", 0),
    ],
    ids=["half the table", "one of two shards", "measuring", "publishing"],
)
def test_a_conversion_ended_by_sigkill_goes_on(tmp_path: Path, module: str, step: str, times: int) -> None:
    ids, vectors = write_format_2(tmp_path, "hnsw")
    old = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    script = DIES.format(module=module, step=step, times=times)
    ended = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], env={**os.environ, **worker_environment()}, timeout=300
    )
    assert ended.returncode == -signal.SIGKILL
    assert {path: path.read_bytes() for path in old} == old
    with pytest.raises(InputError, match="index convert"):
        Index.open(tmp_path)
    kept = [*(tmp_path / "table.lance/data").iterdir(), *tmp_path.glob("shards/*/vectors.faiss")]
    assert kept, "something was finished"
    made = {path: path.stat().st_mtime_ns for path in kept}

    assert convert(tmp_path, shards=2)["converted"] is True
    assert {path: path.stat().st_mtime_ns for path in made} == made, "what was finished is not made again"
    assert index_verify(IndexVerifyConfig(index=str(tmp_path)))["rows"] == 157
    assert found_ids(Index.open(tmp_path), vectors, 1) == [[name] for name in ids]
    assert not list((tmp_path / "work").iterdir())
