"""Ray Datasets of records: the rows and order of one process, and errors of workers as what they are."""

from __future__ import annotations

import gzip
import time
from pathlib import Path

import pyarrow as pa
import pytest

from raytower.data.records import canonical_schema
from raytower.data.sources import InputConfig
from raytower.errors import InputError, find_cause
from tests.data_files import beir_folder, read, write, write_jsonl


@pytest.mark.usefixtures("ray_cluster")
def test_datasets(tmp_path: Path) -> None:
    import ray.data

    from raytower.data.datasets import read_dataset

    plain = write(tmp_path / "in" / "a.txt", "".join(f"text {number}\n" for number in range(100)) + "\n\n")
    write(
        tmp_path / "in" / "b.txt.gz",
        gzip.compress("".join(f"文 {number}\n" for number in range(50)).encode()),
    )
    config = InputConfig(path=str(tmp_path / "in"))
    with pytest.raises(InputError, match=r"a\.txt:101: empty text"):
        read_dataset(config, "corpus")
    dataset = read_dataset(config, "corpus", "quarantine", str(tmp_path / "q"), rows_per_piece=9)

    def slow_at_first(batch: pa.Table) -> pa.Table:
        time.sleep(0.3 if batch["text"][0].as_py() == "text 0" else 0)
        return batch

    rows = dataset.map_batches(slow_at_first, batch_size=None, batch_format="pyarrow").take_all()
    assert [row["id"] for row in rows] == [f"a:{n}" for n in range(1, 101)] + [f"b:{n}" for n in range(1, 51)]
    assert dataset.schema().base_schema == canonical_schema("corpus")
    assert dataset.count() == 150
    assert len(list((tmp_path / "q").iterdir())) == 1
    assert not ray.data.DataContext.get_current().execution_options.preserve_order

    folder = beir_folder(tmp_path / "beir")
    pairs = read_dataset(InputConfig(path=str(folder)), "pairs", rows_per_piece=2)
    assert pairs.take_all() == read(folder, "pairs")

    lists = [{"query": f"q{n}", "positive": ["a", "b"], "negatives": ["c"] * (n + 1)} for n in range(5)]
    path = write_jsonl(tmp_path / "lists.jsonl", lists)
    candidates = read_dataset(InputConfig(path=str(path)), "candidates", rows_per_piece=2)
    batches = list(candidates.iter_batches(batch_size=None, batch_format="pyarrow"))
    assert pa.concat_tables(batches).to_pylist() == read(path, "candidates")
    assert {batch.schema for batch in batches} == {canonical_schema("candidates")}
    assert candidates.count() == 10

    plain.unlink()
    with pytest.raises(Exception) as raised:  # noqa: PT011 (whatever Ray makes of it)
        dataset.take_all()
    cause = find_cause(raised.value)
    assert isinstance(cause, InputError)
    assert f"no file at {plain}" in str(cause)
