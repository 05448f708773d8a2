"""The encoding job: what it writes, that it resumes, and what it refuses."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

from raytower.config import make_config
from raytower.encoding.config import EncodeConfig
from raytower.encoding.job import encode, plan
from raytower.encoding.manifest import EmbeddingsManifest
from raytower.encoding.plan import choose_rows_per_file
from raytower.errors import FormatError, InputError, RaytowerError
from raytower.storage import Location
from tests.tiny_models import build_tiny_encoder, tiny_tokenizer


def write_corpus(path: Path, rows: int) -> list[str]:
    texts = [f"text {'long ' * (i % 7)}number {i}，在中国" for i in range(rows)]
    lines = [json.dumps({"id": f"doc {i}", "text": text, "year": 2000 + i}) for i, text in enumerate(texts)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return texts


def encode_config(encoder: Path, corpus: Path, output: Path, **changes: object) -> EncodeConfig:
    values = {
        "encoder": str(encoder),
        "input": {"path": str(corpus)},
        "output": str(output),
        "max_length": 64,
        "rows_per_file": 16,
        "workers": {"min": 1, "max": 2, "num_cpus": 0.5},
    }
    return make_config(EncodeConfig, {**values, **changes})


def read_folder(folder: Path) -> pa.Table:
    manifest = EmbeddingsManifest.read(Location.of(folder))
    return pa.concat_tables([pq.read_table(folder / item.name) for item in manifest.files])


@given(rows=st.integers(min_value=1, max_value=10**9), workers=st.integers(min_value=1, max_value=512))
def test_files_are_few_enough_to_list_and_many_enough_to_share(rows: int, workers: int) -> None:
    size = choose_rows_per_file(rows, workers)
    assert 256 <= size <= 65_536
    assert size & (size - 1) == 0
    if 256 < size < 65_536:
        assert 8 * workers <= -(-rows // size) < 32 * workers


@pytest.mark.usefixtures("ray_cluster")
class TestRuns:
    def test_the_folder_is_what_one_process_would_have_written(
        self, dummy_encoder_dir: Path, tmp_path: Path
    ) -> None:
        texts = write_corpus(tmp_path / "corpus.jsonl", 100)
        figures = encode(encode_config(dummy_encoder_dir, tmp_path / "corpus.jsonl", tmp_path / "out"))
        table = read_folder(tmp_path / "out")
        assert table["id"].to_pylist() == [f"doc {i}" for i in range(100)]
        assert table["text"].to_pylist() == texts
        assert table["year"].to_pylist() == list(range(2000, 2100))
        assert table.schema.field("embedding").type == pa.list_(pa.float32(), 32)
        vectors = np.stack(table["embedding"].to_numpy())
        peer = SentenceTransformer(str(dummy_encoder_dir), device="cpu").encode(texts)
        assert (1 - (vectors.astype(np.float64) * peer).sum(1)).max() < 1e-6
        manifest = EmbeddingsManifest.read(Location.of(tmp_path / "out"))
        assert (manifest.rows, manifest.dim, len(manifest.files)) == (100, 32, 7)
        for item in manifest.files:
            content = (tmp_path / "out" / item.name).read_bytes()
            assert (len(content), hashlib.sha256(content).hexdigest()) == (item.bytes, item.sha256)
        assert figures["rows"] == 100
        assert figures["fingerprint"] == manifest.fingerprint
        tokens = sum(min(len(text.replace(" ", " ")) + 2, 64) for text in texts)
        assert figures["tokens"] == tokens

    def test_a_killed_run_continues_with_what_is_missing(
        self, dummy_encoder_dir: Path, tmp_path: Path
    ) -> None:
        write_corpus(tmp_path / "corpus.jsonl", 100)
        config = encode_config(dummy_encoder_dir, tmp_path / "corpus.jsonl", tmp_path / "out")
        encode(config)
        before = read_folder(tmp_path / "out")
        files = sorted((tmp_path / "out").glob("part-*.parquet"))
        times = {path.name: path.stat().st_mtime_ns for path in files}
        # What a kill leaves: no manifest, some files missing, a temporary file half written.
        (tmp_path / "out" / "manifest.json").unlink()
        files[2].unlink()
        files[5].unlink()
        (tmp_path / "out" / ".part-00000002.parquet.abc.tmp").write_bytes(b"half")
        assert encode(config)["files_encoded"] == 2
        assert read_folder(tmp_path / "out").equals(before)
        kept = [path for path in files if path not in (files[2], files[5])]
        assert all(path.stat().st_mtime_ns == times[path.name] for path in kept)
        assert encode(config)["files_encoded"] == 0

    def test_float16_prefix_and_quarantine(self, dummy_encoder_dir: Path, tmp_path: Path) -> None:
        texts = write_corpus(tmp_path / "corpus.jsonl", 20)
        with open(tmp_path / "corpus.jsonl", "a", encoding="utf-8") as stream:
            stream.write('{"id": "bad"}\n')
        config = encode_config(
            dummy_encoder_dir,
            tmp_path / "corpus.jsonl",
            tmp_path / "out",
            prefix="the ",
            embedding_dtype="float16",
            on_error="quarantine",
        )
        assert encode(config)["rejected_rows"] == 1
        table = read_folder(tmp_path / "out")
        assert table.schema.field("embedding").type == pa.list_(pa.float16(), 32)
        vectors = np.stack(table["embedding"].to_numpy()).astype(np.float64)
        peer = SentenceTransformer(str(dummy_encoder_dir), device="cpu").encode(
            ["the " + text for text in texts]
        )
        assert np.abs(vectors - peer).max() < 1e-3
        assert EmbeddingsManifest.read(Location.of(tmp_path / "out")).prefix == "the "

    def test_an_output_of_another_encoder_is_refused(self, dummy_encoder_dir: Path, tmp_path: Path) -> None:
        write_corpus(tmp_path / "corpus.jsonl", 20)
        encode(encode_config(dummy_encoder_dir, tmp_path / "corpus.jsonl", tmp_path / "out"))
        other = build_tiny_encoder(tmp_path / "other", seed=5)
        with pytest.raises(InputError, match="belongs to another encoding job: fingerprint"):
            encode(encode_config(other, tmp_path / "corpus.jsonl", tmp_path / "out"))
        with pytest.raises(InputError, match="max_length is 64 there and 32 now"):
            encode(
                encode_config(dummy_encoder_dir, tmp_path / "corpus.jsonl", tmp_path / "out", max_length=32)
            )

    def test_vectors_that_are_not_finite_name_the_text(self, dummy_encoder_dir: Path, tmp_path: Path) -> None:
        broken = build_tiny_encoder(tmp_path / "broken")
        weights = load_file(broken / "model.safetensors")
        # Only texts that hold this character break; which worker meets its text first does not matter.
        character = tiny_tokenizer().convert_tokens_to_ids("!")
        weights["embeddings.word_embeddings.weight"][character] = float("nan")
        save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
        lines = [{"id": f"doc {i}", "text": "hot!" if i in (18, 19) else f"text {i}"} for i in range(20)]
        (tmp_path / "corpus.jsonl").write_text(
            "\n".join(json.dumps(line) for line in lines), encoding="utf-8"
        )
        with pytest.raises(
            RaytowerError, match="gave 2 vectors that are not finite, the first for id 'doc 18'"
        ):
            encode(encode_config(broken, tmp_path / "corpus.jsonl", tmp_path / "out"))
        assert not (tmp_path / "out" / "manifest.json").exists()


class TestRefusals:
    def test_bad_rows_fail_before_any_encoding(self, dummy_encoder_dir: Path, tmp_path: Path) -> None:
        write_corpus(tmp_path / "corpus.jsonl", 3)
        with open(tmp_path / "corpus.jsonl", "a", encoding="utf-8") as stream:
            stream.write("not json\n")
        with pytest.raises(InputError, match=r"corpus\.jsonl.*4"):
            encode(encode_config(dummy_encoder_dir, tmp_path / "corpus.jsonl", tmp_path / "out"))

    def test_duplicate_ids(self, dummy_encoder_dir: Path, tmp_path: Path) -> None:
        (tmp_path / "corpus.jsonl").write_text('{"id": "x", "text": "a"}\n{"id": "x", "text": "b"}\n')
        with pytest.raises(InputError, match="'x'"):
            encode(encode_config(dummy_encoder_dir, tmp_path / "corpus.jsonl", tmp_path / "out"))

    def test_an_output_with_foreign_files(self, dummy_encoder_dir: Path, tmp_path: Path) -> None:
        write_corpus(tmp_path / "corpus.jsonl", 3)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine.parquet").write_bytes(b"precious")
        with pytest.raises(InputError, match="holds files of something else"):
            encode(encode_config(dummy_encoder_dir, tmp_path / "corpus.jsonl", tmp_path / "out"))

    def test_manifests_that_cannot_be_trusted(self, tmp_path: Path) -> None:
        place = Location.of(tmp_path)
        with pytest.raises(FormatError, match="no finished embeddings folder"):
            EmbeddingsManifest.read(place)
        (tmp_path / "manifest.json").write_text('{"format_version": 99, "kind": "embeddings"}')
        with pytest.raises(FormatError, match="format version 99"):
            EmbeddingsManifest.read(place)
        (tmp_path / "manifest.json").write_text('{"format_version": 1, "kind": "embeddings"}')
        with pytest.raises(FormatError, match="not an embeddings manifest"):
            EmbeddingsManifest.read(place)


def test_the_plan_predicts_disk_without_encoding(dummy_encoder_dir: Path, tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus.jsonl", 100)
    made = plan(encode_config(dummy_encoder_dir, tmp_path / "corpus.jsonl", tmp_path / "out"))
    assert (made["rows"], made["files"], made["workers"]) == (100, 7, 2)
    assert made["predicted_disk_bytes"] >= 100 * 32 * 4
    assert not (tmp_path / "out").exists()
