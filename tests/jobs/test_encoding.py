"""The encoding job through Ray Data."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

from raytower.encoding import job
from raytower.encoding.job import encode
from raytower.encoding.manifest import EmbeddingsManifest
from raytower.errors import RaytowerError
from raytower.storage import Location
from tests.support.encoding_here import encode_config, encode_here, read_folder, write_corpus
from tests.support.tiny_models import build_tiny_encoder, tiny_tokenizer

ONE_WORKER = {"min": 1, "num": 1, "num_cpus": 0.5}


@pytest.mark.usefixtures("ray_cluster")
class TestRuns:
    """Through Ray Data."""

    def test_the_folder_is_what_one_process_would_have_written(
        self, dummy_encoder_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
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
        tokens = sum(min(len(text) + 2, 64) for text in texts)  # a character a token, and two special ones
        assert figures["tokens"] == manifest.tokens == tokens
        assert figures["files_encoded"] == 7
        assert figures["tokens_per_batch"] == 2048
        assert 0 < figures["padding_share"] < 0.5
        assert all(
            0 < figures[f"{name}_share"] < 1 for name in ("reading", "tokenising", "forward", "writing")
        )
        assert figures["tokens_per_second"] > figures["texts_per_second"] > 0
        logged = capfd.readouterr().err
        assert "encoded 100/100 texts" in logged
        assert "padding " in logged
        assert "forward " in logged

    def test_two_pieces_in_flight_give_the_same_folder(
        self, dummy_encoder_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What a worker with a GPU does."""
        write_corpus(tmp_path / "corpus.jsonl", 200)
        corpus = tmp_path / "corpus.jsonl"
        encode_here(encode_config(dummy_encoder_dir, corpus, tmp_path / "one"))
        monkeypatch.setattr(job, "pieces_in_flight", lambda _: 2)
        encode(encode_config(dummy_encoder_dir, corpus, tmp_path / "two", workers=ONE_WORKER))
        assert read_folder(tmp_path / "two").equals(read_folder(tmp_path / "one"))

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
            RaytowerError, match=r"^the encoder gave 2 vectors that are not finite, the first for id 'doc 18'"
        ):
            encode(encode_config(broken, tmp_path / "corpus.jsonl", tmp_path / "out", workers=ONE_WORKER))
        assert not (tmp_path / "out" / "manifest.json").exists()
