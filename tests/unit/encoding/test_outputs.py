"""What a second start of an encoding job finds in its output; a stand-in gives the vectors, no Ray is needed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raytower import only_job
from raytower.config import make_config
from raytower.data.config import InputConfig
from raytower.data.pieces import Piece, read_piece, survey
from raytower.encoding import job as job_module
from raytower.encoding.config import EncodeConfig
from raytower.encoding.job import _content_hash, encode, plan
from raytower.encoding.manifest import EmbeddingsFile, EmbeddingsManifest
from raytower.encoding.parts import PartFigures, open_part, part_name, write_part
from raytower.encoding.records import find_parts, remove_left_overs, write_record
from raytower.encoding.worker import EncodedPiece
from raytower.errors import InputError, RaytowerError
from raytower.storage import Location, writer_lease
from tests.support.encoding_here import encode_config, encode_here, write_corpus
from tests.support.tiny_models import build_tiny_encoder


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the parts that were encoded so far."""
    names: list[str] = []

    def run(job: Any, missing: Sequence[Piece]) -> list[EncodedPiece]:
        answers = []
        for piece in missing:
            table = read_piece(piece)
            with open_part(job.output / part_name(piece), "float32") as part:
                part.write(table, np.ones((len(table), job.encoder.dim), np.float32))
                figures = part.finish(len(table), len(table))
            write_record(job.output, figures)
            seconds = {"total": 1.0, "reading": 0.0, "tokenising": 0.0, "forward": 1.0, "writing": 0.0}
            answers.append(EncodedPiece(part=figures, seconds=seconds, started_at=0.0, tokens_per_batch=1))
            names.append(part_name(piece))
        return answers

    monkeypatch.setattr(job_module, "_run", run)
    monkeypatch.setattr(job_module, "ensure_ray", lambda _: None)
    for name in ("check_room", "check_shared"):
        monkeypatch.setattr(job_module, name, lambda _: None)
    return names


@pytest.fixture
def config(tmp_path: Path, encoded: list[str]) -> EncodeConfig:
    """A finished job of 40 rows in three files."""
    write_corpus(tmp_path / "corpus.jsonl", 40)
    made = encode_config(
        build_tiny_encoder(tmp_path / "encoder"), tmp_path / "corpus.jsonl", tmp_path / "out"
    )
    assert encode(made)["files_encoded"] == 3
    encoded.clear()
    return made


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [Path.unlink, lambda f: f.write_bytes(f.read_bytes()[:-1]), flip])
@pytest.mark.parametrize("is_finished", [True, False])
def test_what_is_missing_or_damaged_is_encoded_again(
    config: EncodeConfig, encoded: list[str], damage: Any, is_finished: bool
) -> None:
    out = Path(config.output)
    before = EmbeddingsManifest.read(Location.of(out))
    assert encode(config)["files_encoded"] == 0
    damage(out / "part-00000001.parquet")
    if not is_finished:
        (out / "manifest.json").unlink()
    assert encode(config)["files_encoded"] == 1
    assert encoded == ["part-00000001.parquet"]
    assert EmbeddingsManifest.read(Location.of(out)) == before
    assert {path.name for path in out.iterdir()} == {
        "job.json",
        "manifest.json",
        *(f.name for f in before.files),
    }
    assert encode(config)["files_encoded"] == 0


def test_what_killed_writers_had_begun_is_gone_in_the_end(config: EncodeConfig, encoded: list[str]) -> None:
    output = Path(config.output)
    name = "part-00000001.parquet"
    before = {path.name for path in output.iterdir()}
    (output / name).unlink()

    def begun(name: str) -> None:
        with suppress(KeyboardInterrupt), Location.of(output / name).open_write() as sink:
            sink.write(b"half")
            (temporary,) = (path for path in output.iterdir() if path.name.endswith(".tmp"))
            kept.append((temporary.name, temporary.read_bytes()))
            raise KeyboardInterrupt

    kept: list[tuple[str, bytes]] = []
    begun(name)
    begun(f".{name}.json")
    for temporary, content in kept:
        (output / temporary).write_bytes(content)
    assert encode(config)["files_encoded"] == 1
    assert encoded == [name]
    assert {path.name for path in output.iterdir()} == before


@pytest.mark.parametrize("is_finished", [True, False])
def test_only_what_changed_since_its_record_is_read_again(config: EncodeConfig, is_finished: bool) -> None:
    """Bytes are flipped in all three parts; the one that is older than its record is believed unread."""
    output = Location.of(config.output)
    job_file, manifest = output / "job.json", EmbeddingsManifest.read(output)
    values = job_file.read_json()
    recorded = [job_file]
    if not is_finished:
        for part in values.pop("parts"):
            write_record(output, PartFigures.of(part))
        job_file.write_json(values)
        recorded = [output / f".{file.name}.json" for file in manifest.files]
    for second, file in enumerate(manifest.files, start=1):
        flip(Path(config.output) / file.name)
        os.utime(Path(config.output) / file.name, (second, second))
    for place in recorded:
        os.utime(Path(config.output) / place.name, (2, 2))
    rows = {file.name: file.rows for file in manifest.files}
    assert list(find_parts(job_file, rows)) == [manifest.files[0].name]


def test_a_part_of_another_number_of_rows_is_not_the_piece(config: EncodeConfig) -> None:
    output = Location.of(config.output)
    rows = {file.name: file.rows for file in EmbeddingsManifest.read(output).files}
    first, second, third = rows
    wanted = {**rows, second: rows[second] + 1, "part-00000003.parquet": 1}
    found = find_parts(output / "job.json", wanted)
    assert list(found) == [first, third]
    assert found[first].file.rows == rows[first]


@pytest.mark.parametrize("records", [True, False])
def test_left_overs_are_what_writers_name_so(tmp_path: Path, records: bool) -> None:
    begun = [".part-00000001.parquet.1a.tmp", "..part-00000001.parquet.json.1a.tmp"]
    record = ".part-00000001.parquet.json"
    others = ["part-00000001.parquet", "job.json", ".encode.lock", "notes.tmp", ".notes.json", ".part-2.txt"]
    for name in (*begun, record, *others):
        (tmp_path / name).write_text("{}")
    remove_left_overs(Location.of(tmp_path), records=records)
    left = others if records else [*others, record]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(left)


def test_a_part_holds_its_blocks_in_order_and_its_figures(tmp_path: Path) -> None:
    """Two blocks: three rows, then one; half precision halves the vectors alone."""
    table = pa.table({"id": list("abcd"), "text": ["one", "two", "three", "four"], "n": [1, 2, 3, 4]})
    vectors = np.arange(8, dtype=np.float32).reshape(4, 2)
    with open_part(Location.of(tmp_path) / "part.parquet", "float16") as part:
        part.write(table.slice(0, 3), vectors[:3])
        part.write(table.slice(3), vectors[3:])
        figures = part.finish(tokens=9, padded_tokens=12)
        assert part.seconds > 0
        assert not (tmp_path / "part.parquet").exists()
    written = (tmp_path / "part.parquet").read_bytes()
    assert figures.file == EmbeddingsFile(
        name="part.parquet", rows=4, bytes=len(written), sha256=hashlib.sha256(written).hexdigest()
    )
    assert (figures.tokens, figures.padded_tokens) == (9, 12)
    found = pq.ParquetFile(tmp_path / "part.parquet")
    assert found.schema_arrow.names == ["id", "text", "embedding", "n"]
    assert found.schema_arrow.field("embedding").type == pa.list_(pa.float16(), 2)
    assert found.schema_arrow.metadata is None
    assert [found.metadata.row_group(number).num_rows for number in range(2)] == [3, 1]
    whole = found.read()
    assert whole.drop_columns("embedding").equals(table)
    assert whole["embedding"].to_pylist() == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_texts_are_compressed_and_vectors_are_not(tmp_path: Path) -> None:
    table = pa.table({"id": ["a"], "text": ["one"], "tags": [["x", "y"]]})
    write_part(Location.of(tmp_path) / "p.parquet", table, np.ones((1, 2), np.float32), {b"key": b"value"})
    file = pq.ParquetFile(tmp_path / "p.parquet")
    columns = [file.metadata.row_group(0).column(number) for number in range(4)]
    assert [(column.path_in_schema.split(".")[0], column.compression) for column in columns] == [
        ("id", "ZSTD"),
        ("text", "ZSTD"),
        ("embedding", "UNCOMPRESSED"),
        ("tags", "ZSTD"),
    ]
    assert [column.is_stats_set for column in columns] == [True, True, False, True]
    assert file.metadata.metadata[b"key"] == b"value"


def test_what_writing_raises_comes_with_the_next_call(tmp_path: Path) -> None:
    table = pa.table({"id": ["a"], "text": ["one"]})

    def write() -> None:
        with open_part(Location.of(tmp_path) / "part.parquet", "float32") as part:
            part.write(table, np.ones((2, 2), np.float32))  # two vectors for one row
            part.finish(1, 1)

    with pytest.raises(pa.ArrowInvalid):
        write()
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_manifest_is_written_again(config: EncodeConfig, encoded: list[str]) -> None:
    place = Path(config.output) / "manifest.json"
    intact = place.read_bytes()
    place.write_bytes(intact[:20])
    encode(config)
    assert place.read_bytes() == intact
    assert not encoded


def test_every_change_of_the_model_is_told_with_both_sides(config: EncodeConfig) -> None:
    file = Path(config.encoder) / "config_sentence_transformers.json"
    intact = file.read_text()
    file.write_text(json.dumps({"prompts": {"query": "query: "}, "similarity_fn_name": "dot"}))
    with pytest.raises(
        InputError, match=r"query_prefix is '' there and 'query: ' now; similarity is 'cosine' there"
    ):
        encode(config)
    file.write_text(intact)
    values = json.loads((Path(config.encoder) / "config.json").read_text())
    (Path(config.encoder) / "config.json").write_text(json.dumps({**values, "hidden_act": "relu"}))
    with pytest.raises(InputError, match=r"another encoding job: fingerprint is '\w+' there and '\w+' now"):
        encode(config)


def test_an_output_of_the_older_format_is_explained(config: EncodeConfig) -> None:
    file = Path(config.output) / "job.json"
    values = json.loads(file.read_text())
    former = job_module.Encoder.load(config.encoder).former_fingerprint
    del values["format_version"]
    file.write_text(json.dumps({**values, "fingerprint": former}))
    with pytest.raises(
        InputError, match=r"has format 1, this version writes 2.*the same weights and tokenizer"
    ):
        encode(config)
    file.write_text(json.dumps({**values, "fingerprint": "f" * 64}))
    with pytest.raises(InputError, match="other weights and tokenizer"):
        encode(config)


@pytest.mark.usefixtures("encoded")
def test_a_renamed_folder_of_the_input_is_another_input(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "x.txt").write_text(f"text of {name}\n")
    made = encode_config(build_tiny_encoder(tmp_path / "encoder"), tmp_path / "in", tmp_path / "out")
    encode(made)
    (tmp_path / "in" / "a").rename(tmp_path / "in" / "a2")
    with pytest.raises(InputError, match="input_sha256"):
        encode(made)


def test_a_renamed_partition_above_all_files_is_another_input(tmp_path: Path) -> None:
    hashes = []
    for language in ("zh", "en"):
        folder = tmp_path / language / f"lang={language}"
        folder.mkdir(parents=True)
        (folder / "x.jsonl").write_text('{"id": "1", "text": "a"}\n')
        hashes.append(_content_hash(survey(InputConfig(path=str(tmp_path / language)), "corpus").pieces))
    assert hashes[0] != hashes[1]


def test_a_second_job_is_refused_while_one_is_at_work(config: EncodeConfig) -> None:
    (Path(config.output) / "part-00000001.parquet").unlink()
    with (
        writer_lease(Location.of(config.output) / ".encode.lock", owner="another"),
        pytest.raises(InputError, match="being written by another"),
    ):
        encode(config)
    assert encode(config)["files_encoded"] == 1


@pytest.mark.usefixtures("encoded")
def test_a_job_that_lost_its_lease_finishes_nothing(
    config: EncodeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, stand_in = Path(config.output), job_module._run

    def run(*arguments: Any) -> list[EncodedPiece]:
        answers = stand_in(*arguments)
        (output / ".encode.lock").unlink()
        return answers

    monkeypatch.setattr(job_module, "_run", run)
    (output / "manifest.json").unlink()
    (output / "part-00000001.parquet").unlink()
    with pytest.raises(RaytowerError, match="was lost"):
        encode(config)
    assert not (output / "manifest.json").exists()


def test_a_storage_without_locks_is_written_with_a_warning(
    config: EncodeConfig, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def no_lease(*place: Any, **settings: Any) -> None:
        raise InputError("this storage cannot write under a condition")

    monkeypatch.setattr(only_job, "writer_lease", no_lease)
    encode(config)
    assert "cannot be locked; start no second job" in capfd.readouterr().err


@pytest.mark.usefixtures("encoded")
def test_the_number_of_workers_never_matters_to_a_resume(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus.jsonl", 3000)
    values = (build_tiny_encoder(tmp_path / "encoder"), tmp_path / "corpus.jsonl", tmp_path / "out")
    encode(encode_config(*values, rows_per_file=None, workers={"num": 1}))
    assert encode(encode_config(*values, rows_per_file=None, workers={"num": 8}))["files_encoded"] == 0
    chosen = json.loads((tmp_path / "out" / "job.json").read_text())["rows_per_file"]
    assert encode(encode_config(*values, rows_per_file=chosen))["files_encoded"] == 0


def test_a_length_that_is_left_out_is_what_the_model_has_positions_for(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus.jsonl", 3)
    encoder = build_tiny_encoder(tmp_path / "encoder")
    values = {
        "encoder": str(encoder),
        "input": str(tmp_path / "corpus.jsonl"),
        "output": str(tmp_path / "out"),
    }
    encode_here(make_config(EncodeConfig, values))
    assert EmbeddingsManifest.read(Location.of(tmp_path / "out")).max_length == 64
    assert encode_here(make_config(EncodeConfig, {**values, "max_length": 64}))["files_encoded"] == 0
    with pytest.raises(InputError, match="max_length is 65; this model has positions for 1 to 64 tokens"):
        encode_here(make_config(EncodeConfig, {**values, "max_length": 65}))


def test_what_is_passed_over_is_said_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "corpus").mkdir()
    for name, text in (("a.txt", "one\n"), ("empty.txt", ""), ("b.md", "")):
        (tmp_path / "corpus" / name).write_text(text)
    values = (build_tiny_encoder(tmp_path / "encoder"), tmp_path / "corpus", tmp_path / "out")
    job_module.plan(encode_config(*values, rows_per_file=None))
    said = capfd.readouterr().err
    assert (said.count("empty.txt"), said.count("b.md")) == (1, 1)


@pytest.mark.usefixtures("encoded")
def test_rejected_rows_are_listed_only_by_the_job_that_owns_the_output(tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text('{"id": "a", "text": "one"}\n{"id": "b"}\n')
    values = (build_tiny_encoder(tmp_path / "encoder"), tmp_path / "corpus.jsonl", tmp_path / "out")
    made = encode_config(*values, on_error="quarantine")
    assert plan(made)["rejected_rows"] == 1
    assert not (tmp_path / "out").exists()
    encode(made)
    (listed,) = (tmp_path / "out.quarantine").iterdir()
    assert listed.name.startswith("corpus.jsonl-corpus-")
    assert not (tmp_path / "out" / "quarantine").exists()
    before = listed.read_bytes()
    (tmp_path / "corpus.jsonl").write_text('{"id": "a", "text": "one"}\n{"id": "c"}\n')
    with pytest.raises(InputError, match="input_sha256"):
        encode(made)
    assert listed.read_bytes() == before


def test_a_write_that_failed_is_not_forgotten_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = pa.table({"id": ["a"], "text": ["one"]})
    vectors = np.ones((1, 4), np.float32)

    def write_two() -> None:
        with open_part(Location.of(tmp_path / "part-00000000.parquet"), "float32") as part:
            with monkeypatch.context() as patch:
                patch.setattr(part, "_write", fail)
                part.write(table, vectors)
            part.write(table, vectors)
            part.finish(1, 1)

    def fail(*_: object) -> None:
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        write_two()
    assert not (tmp_path / "part-00000000.parquet").exists()


def test_a_file_without_a_record_is_no_part(tmp_path: Path) -> None:
    """The disk may be full, or the worker killed, between the two."""
    (tmp_path / "job.json").write_text("{}")
    (tmp_path / "part-00000000.parquet").write_bytes(b"PAR1")
    assert find_parts(Location.of(tmp_path / "job.json"), {"part-00000000.parquet": 3}) == {}
