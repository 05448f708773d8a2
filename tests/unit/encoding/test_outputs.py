"""What a second start of an encoding job finds in its output; a stand-in gives the vectors, no Ray is needed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raytower.data.config import InputConfig
from raytower.data.pieces import Piece, read_piece, survey
from raytower.encoding import job as job_module
from raytower.encoding.config import EncodeConfig
from raytower.encoding.job import _content_hash, encode, plan
from raytower.encoding.manifest import EmbeddingsManifest
from raytower.encoding.parts import open_part, part_name
from raytower.encoding.records import write_record
from raytower.encoding.worker import EncodedPiece
from raytower.errors import InputError, RaytowerError
from raytower.storage import Location, writer_lease
from tests.support.encoding_here import encode_config, write_corpus
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
    monkeypatch.setattr(job_module, "ensure_ray", lambda: None)
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

    monkeypatch.setattr(job_module, "writer_lease", no_lease)
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
