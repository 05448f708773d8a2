"""The encoding job in this process: what it plans and writes, that it resumes, and what it refuses."""

from __future__ import annotations

import gzip
import json
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

from raytower.data.config import InputConfig
from raytower.data.pieces import read_piece, survey
from raytower.encoding import job as job_module
from raytower.encoding.config import EncodeConfig
from raytower.encoding.job import encode, plan
from raytower.encoding.manifest import EmbeddingsManifest
from raytower.encoding.plan import (
    CorpusSize,
    ModelSize,
    WorkerShape,
    choose_rows_per_file,
    join_pieces,
    plan_encode,
)
from raytower.encoding.progress import ProgressBoard, progress_line
from raytower.encoding.worker import PieceEncoder, read_answer
from raytower.errors import FormatError, InputError
from raytower.export import export
from raytower.models.ahead import Ahead
from raytower.models.block_engine import ForwardStats
from raytower.models.config import ExportConfig
from raytower.models.encoder import Encoder
from raytower.models.forward import ForwardEngine
from raytower.models.token_block import TokenBlock
from raytower.storage import Location
from raytower.workers import Node
from tests.support.encoding_here import encode_config, encode_here, no_ray, read_folder, write_corpus
from tests.support.tiny_models import build_tiny_encoder


@given(rows=st.integers(min_value=1, max_value=10**9), workers=st.integers(min_value=1, max_value=512))
def test_files_are_few_enough_to_list_and_many_enough_to_share(rows: int, workers: int) -> None:
    size = choose_rows_per_file(rows, workers)
    assert 256 <= size <= 65_536
    assert size & (size - 1) == 0
    if 256 < size < 65_536:
        assert 8 * workers <= -(-rows // size) < 32 * workers


class TestPlan:
    CORPUS = CorpusSize(
        rows=1_000_000, text_bytes=10**8, files=16, rows_per_file=65_536, tokens_per_text=30.0
    )
    MODEL = ModelSize(
        parameters=110_000_000, embedding_parameters=24_000_000, dim=768, width=768, intermediate=3072
    )
    SHAPE = WorkerShape(
        workers=4,
        engine="torch",
        dtype="float32",
        tokens_per_batch=2048,
        block_rows=4096,
        vector_bytes=4,
        on_gpu=False,
        pieces_in_flight=1,
    )

    def test_disk_and_batches_are_counted(self) -> None:
        made = plan_encode(self.CORPUS, self.MODEL, self.SHAPE)
        assert made["predicted_disk_bytes"] == 1_000_000 * 768 * 4 + 10**8
        assert made["estimated_tokens"] == 30_000_000
        assert made["estimated_batches"] == 14_649  # 30,000,000 / 2,048, rounded up
        assert made["workers"] == 4
        assert plan_encode(replace(self.CORPUS, files=3), self.MODEL, self.SHAPE)["workers"] == 3

    def test_a_large_file_costs_its_texts_and_not_its_vectors(self) -> None:
        def memory(corpus: CorpusSize, shape: WorkerShape = self.SHAPE) -> int:
            return plan_encode(corpus, self.MODEL, shape)["predicted_memory_bytes_per_worker"]

        small = memory(replace(self.CORPUS, rows_per_file=8192))
        # 57,344 more rows of 100 bytes, a few times over; their vectors would be 176 MB.
        assert 0 < memory(self.CORPUS) - small < 57_344 * 500
        assert memory(replace(self.CORPUS, rows=10**9, text_bytes=10**11)) == memory(self.CORPUS)
        assert memory(self.CORPUS, replace(self.SHAPE, block_rows=8192)) > memory(self.CORPUS)
        assert memory(self.CORPUS, replace(self.SHAPE, tokens_per_batch=4096)) > memory(self.CORPUS)

    def test_weights_and_batches_of_a_gpu_are_on_the_device(self) -> None:
        made = plan_encode(self.CORPUS, self.MODEL, replace(self.SHAPE, on_gpu=True, dtype="bfloat16"))
        assert made["predicted_device_bytes_per_worker"] > 110_000_000 * 2
        assert plan_encode(self.CORPUS, self.MODEL, self.SHAPE)["predicted_device_bytes_per_worker"] == 0

    def test_the_job_plans_without_encoding(self, dummy_encoder_dir: Path, tmp_path: Path) -> None:
        write_corpus(tmp_path / "corpus.jsonl", 100)
        made = plan(encode_config(dummy_encoder_dir, tmp_path / "corpus.jsonl", tmp_path / "out"))
        assert (made["rows"], made["files"], made["workers"]) == (100, 7, 2)
        assert made["predicted_disk_bytes"] >= 100 * 32 * 4
        assert made["tokens_per_batch"] == 2048
        # 16 texts of each of 4 of the 7 files are tokenised.
        assert made["estimated_tokens"] == pytest.approx(100 * 32, rel=0.2)
        assert not (tmp_path / "out").exists()

    def test_a_machine_with_gpus_encodes_on_them(
        self, dummy_encoder_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It encoded on two of its cores, beside idle GPUs, and said nothing."""
        monkeypatch.setattr(job_module, "find_nodes", lambda: [Node(cpus=32, gpus=4)])
        write_corpus(tmp_path / "corpus.jsonl", 100)
        values = (dummy_encoder_dir, tmp_path / "corpus.jsonl", tmp_path / "out")
        made = plan(encode_config(*values, workers={}))
        assert (made["workers"], made["tokens_per_batch"]) == (4, 65_536)
        assert made["predicted_device_bytes_per_worker"] > 0
        onnx = plan(encode_config(*values, workers={}, engine="onnx"))
        assert (onnx["workers"], onnx["predicted_device_bytes_per_worker"]) == (2, 0)
        monkeypatch.setattr(job_module, "find_nodes", lambda: [Node(cpus=2)])
        assert plan(encode_config(*values, workers={}))["workers"] == 2

    def test_a_column_of_old_vectors_passes_under_another_name(
        self, dummy_encoder_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = tmp_path / "corpus.parquet"
        pq.write_table(pa.table({"text": ["a"], "embedding": [[0.5, 1.0]]}), path)
        plan(encode_config(dummy_encoder_dir, path, tmp_path / "out"))
        assert "column 'embedding' passes through as 'source_embedding'" in capsys.readouterr().err

    def test_small_surveyed_pieces_become_files_of_the_planned_size(
        self, dummy_encoder_dir: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "corpus.txt").write_text("".join(f"text {i}\n" for i in range(40_000)))
        config = encode_config(
            dummy_encoder_dir, tmp_path / "corpus.txt", tmp_path / "out", rows_per_file=None
        )
        made = plan(config)
        # 2 workers, about 8 files each: 40,000 / 16 = 2,500, and the power of two below.
        assert (made["rows_per_file"], made["files"]) == (2048, 20)


class TestJoinedPieces:
    @pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
    @pytest.mark.parametrize("rows_per_file", [40, 64, 10_000])
    def test_they_hold_every_row_once_and_in_order(
        self, suffix: str, rows_per_file: int, tmp_path: Path
    ) -> None:
        expected = []
        for number, rows in enumerate((130, 7, 64)):
            records = [{"id": f"{number} {i}", "text": f"text {i}"} for i in range(rows)]
            # A row that is rejected, and ones that repeat an id: a whole surveyed piece of them in the second file.
            expected += [row["id"] for row in records]
            if suffix != ".parquet":
                records[20:20] = [{"id": "bad"}, *[{"id": f"{number} 1", "text": "again"}] * 20]
            write_rows(tmp_path / "corpus" / f"{number}{suffix}", records)
        found = survey(
            InputConfig(path=str(tmp_path / "corpus")),
            "corpus",
            10,
            "quarantine",
            str(tmp_path / "quarantine"),
        )
        joined = join_pieces(found.pieces, rows_per_file)
        tables = [read_piece(piece) for piece in joined]
        assert [name for table in tables for name in table["id"].to_pylist()] == expected
        assert [len(table) for table in tables] == [piece.num_rows for piece in joined]
        assert [piece.index for piece in joined] == list(range(len(joined)))
        assert [piece.first_row for piece in joined] == np.cumsum([0, *map(len, tables)])[:-1].tolist()
        assert max(map(len, tables)) <= rows_per_file
        assert len(joined) < len(found.pieces) / 2


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=50)
        return
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


class TestBlocks:
    TEXTS = tuple(f"{'long ' * (i * 7 % 11)}{i}" for i in range(83))

    def test_vectors_are_the_same_in_blocks_of_any_size(self, dummy_encoder_dir: Path) -> None:
        engine = ForwardEngine(Encoder.load(dummy_encoder_dir))
        exact = SentenceTransformer(str(dummy_encoder_dir), device="cpu").encode(list(self.TEXTS))
        for engine.block_rows in (1, 7, 83, 4096):
            np.testing.assert_allclose(engine.encode(self.TEXTS), exact, atol=1e-6)

    def test_token_ids_are_the_tokenizers(self, dummy_encoder_dir: Path, minilm_dir: Path) -> None:
        for folder in (dummy_encoder_dir, minilm_dir):
            engine = ForwardEngine(Encoder.load(folder), max_length=20)
            texts = [*self.TEXTS, "", "[SEP] Ünïcode 他们 <mask>", "word " * 50]
            tokenizer = engine.encoder.tokenizer
            expected = tokenizer([f"the {text}" for text in texts], truncation=True, max_length=20)[
                "input_ids"
            ]
            block = engine.tokenise(texts, "the ")
            assert [ids.tolist() for ids in np.split(block.ids, block.starts[1:])] == expected

    def test_a_block_is_tokenised_while_the_one_before_it_is_computed(self, dummy_encoder_dir: Path) -> None:
        """The first forward waits until the second block has been tokenised; else it would wait for ever."""
        engine = ForwardEngine(Encoder.load(dummy_encoder_dir))
        engine.block_rows = 50
        second_tokenised = threading.Event()
        tokenise, forward = engine.tokenise, engine.forward_block
        order = []

        def watched_tokenise(texts: Sequence[str], prefix: str = "", start: int = 0) -> TokenBlock:
            block = tokenise(texts, prefix, start)
            order.append("tokenised")
            if len(order) == 2:
                second_tokenised.set()
            return block

        def waiting_forward(block: TokenBlock, stats: ForwardStats | None = None) -> NDArray[np.float32]:
            assert second_tokenised.wait(timeout=60)
            return forward(block, stats)

        engine.tokenise = watched_tokenise  # type: ignore[method-assign]
        engine.forward_block = waiting_forward  # type: ignore[method-assign]
        assert engine.encode(self.TEXTS).shape == (83, 32)
        assert order == ["tokenised", "tokenised"]

    def test_what_fails_ahead_fails_when_its_turn_comes(self) -> None:
        def divide(value: int) -> float:
            return 1 / value

        seen: list[float] = []
        with Ahead(divide, [1, 2, 0, 4]) as values, pytest.raises(ZeroDivisionError):
            seen.extend(values)
        assert seen == [1, 0.5]
        with Ahead(divide, [1, 2]) as values:
            assert next(iter(values)) == 1  # leaving early does not hang

    def test_what_was_begun_is_finished_at_the_end(self) -> None:
        """Other processes may wait for this one's part in it: nothing is called off."""
        done: list[int] = []
        with Ahead(done.append, range(200)) as values:
            for _, _ in zip(range(100), values, strict=False):
                pass
        assert done == list(range(len(done)))
        assert len(done) > 100

    def test_nothing_is_computed_after_a_rest(self) -> None:
        done: list[int] = []

        def work(value: int) -> int:
            time.sleep(0.05)
            done.append(value)
            return value

        with Ahead(work, [1, 2, 3]) as values:
            outputs = iter(values)
            assert next(outputs) == 1
            values.rest()
            assert done == [1, 2]
            time.sleep(0.1)
            assert done == [1, 2]
            assert list(outputs) == [2, 3]
            values.rest()

    def test_padding_and_tokens_are_counted(self, dummy_encoder_dir: Path) -> None:
        engine = ForwardEngine(Encoder.load(dummy_encoder_dir), tokens_per_batch=20)
        stats = ForwardStats()
        engine.forward_block(TokenBlock.of([[2, 9, 3], [2, 3], [2, 9, 9, 9, 3], [2, 9, 3], [2, 3]]), stats)
        # Sorted 5 3 3 2 | 2 under a budget of 20: 4 x 5 and 1 x 2.
        assert (stats.rows, stats.tokens, stats.padded_tokens) == (5, 15, 22)
        assert stats.forward_seconds > 0

    @pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 2e-2), ("float16", 2e-3)])
    def test_half_precisions_are_near(self, dummy_encoder_dir: Path, dtype: Any, tolerance: float) -> None:
        exact = ForwardEngine(Encoder.load(dummy_encoder_dir)).encode(self.TEXTS)
        found = ForwardEngine(Encoder.load(dummy_encoder_dir), dtype=dtype).encode(self.TEXTS)
        assert found.dtype == np.float32
        assert 0 < (1 - (exact.astype(np.float64) * found).sum(1)).max() < tolerance


class TestProgress:
    def test_a_piece_that_is_begun_again_is_not_counted_twice(self) -> None:
        board = ProgressBoard()
        assert board.totals() == (0, 0, 0.0)
        for piece, rows, tokens in [(0, 0, 0), (0, 10, 55), (1, 4, 20), (0, 0, 0), (0, 10, 55), (0, 12, 66)]:
            board.report(piece, rows, tokens)
        assert board.totals()[:2] == (16, 86)

    def test_the_line_names_rates_and_the_time_left(self) -> None:
        line = progress_line(rows=2_000, total_rows=10_000, tokens=60_000, seconds=4.0)
        assert line == "encoded 2,000/10,000 texts  500 texts/s  15,000 tokens/s  16 s left"


class TestRunsHere:
    """Through the worker alone, in this process."""

    def test_a_killed_run_continues_with_what_is_missing(
        self, dummy_encoder_dir: Path, tmp_path: Path
    ) -> None:
        write_corpus(tmp_path / "corpus.jsonl", 100)
        config = encode_config(dummy_encoder_dir, tmp_path / "corpus.jsonl", tmp_path / "out")
        encode_here(config)
        before = read_folder(tmp_path / "out")
        files = sorted((tmp_path / "out").glob("part-*.parquet"))
        times = {path.name: path.stat().st_mtime_ns for path in files}
        # What a kill leaves: no manifest, some files missing, a temporary file half written.
        (tmp_path / "out" / "manifest.json").unlink()
        files[2].unlink()
        files[5].unlink()
        (tmp_path / "out" / ".part-00000002.parquet.abc.tmp").write_bytes(b"half")
        assert encode_here(config)["files_encoded"] == 2
        assert read_folder(tmp_path / "out").equals(before)
        kept = [path for path in files if path not in (files[2], files[5])]
        assert all(path.stat().st_mtime_ns == times[path.name] for path in kept)
        assert encode_here(config)["files_encoded"] == 0

    def test_a_compressed_folder_of_several_files(self, dummy_encoder_dir: Path, tmp_path: Path) -> None:
        for number in range(2):
            rows = [{"id": f"{number}-{i}", "text": f"text {i}"} for i in range(40)]
            write_rows(tmp_path / "corpus" / f"{number}.jsonl.gz", rows)
        write_rows(tmp_path / "corpus" / "2.jsonl", [{"id": "2-0", "text": "last"}])
        figures = encode_here(encode_config(dummy_encoder_dir, tmp_path / "corpus", tmp_path / "out"))
        # 16 + 16 + 8 rows of each of two files; the lone row of the third joins the last 8.
        assert figures["files_encoded"] == 6
        table = read_folder(tmp_path / "out")
        assert table["id"].to_pylist() == [*(f"{n}-{i}" for n in range(2) for i in range(40)), "2-0"]
        vectors = np.stack(table["embedding"].to_numpy())
        np.testing.assert_allclose(vectors[:40], vectors[40:80], atol=1e-6)

    def test_an_edited_corpus_is_not_mixed_with_what_it_was(
        self, dummy_encoder_dir: Path, tmp_path: Path
    ) -> None:
        write_corpus(tmp_path / "corpus.jsonl", 40)
        config = encode_config(dummy_encoder_dir, tmp_path / "corpus.jsonl", tmp_path / "out")
        encode_here(config)
        content = (tmp_path / "corpus.jsonl").read_text()
        (tmp_path / "corpus.jsonl").write_text(content.replace("number 3", "number 8"))
        with pytest.raises(InputError, match="another encoding job: input_sha256"):
            encode_here(config)

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
        assert encode_here(config)["rejected_rows"] == 1
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
        encode_here(encode_config(dummy_encoder_dir, tmp_path / "corpus.jsonl", tmp_path / "out"))
        other = build_tiny_encoder(tmp_path / "other", seed=5)
        with pytest.raises(InputError, match="belongs to another encoding job: fingerprint"):
            encode_here(encode_config(other, tmp_path / "corpus.jsonl", tmp_path / "out"))
        with pytest.raises(InputError, match="max_length is 64 there and 32 now"):
            encode_here(
                encode_config(dummy_encoder_dir, tmp_path / "corpus.jsonl", tmp_path / "out", max_length=32)
            )

    def test_large_files_are_written_in_blocks(self, dummy_encoder_dir: Path, tmp_path: Path) -> None:
        """More rows than a block: several row groups, and the vectors of every one in its place."""
        texts = [f"text {i}" for i in range(4500)]
        (tmp_path / "corpus.txt").write_text("\n".join(texts) + "\n")
        encode_here(
            encode_config(dummy_encoder_dir, tmp_path / "corpus.txt", tmp_path / "out", rows_per_file=5000)
        )
        (path,) = (tmp_path / "out").glob("part-*.parquet")
        metadata = pq.read_metadata(path)
        assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [4096, 404]
        table = read_folder(tmp_path / "out")
        assert table["id"].to_pylist() == [f"corpus:{i}" for i in range(1, 4501)]
        sample = [0, 17, 4095, 4096, 4499]
        peer = SentenceTransformer(str(dummy_encoder_dir), device="cpu").encode([texts[i] for i in sample])
        np.testing.assert_allclose(np.stack(table["embedding"].to_numpy())[sample], peer, atol=1e-6)

    def test_the_onnx_engine_is_recorded_and_never_mixed_with_another(
        self, dummy_encoder_dir: Path, tmp_path: Path
    ) -> None:
        # A directory with a graph of its own: workers of this Ray would else export into the user's cache.
        encoder = tmp_path / "encoder"
        export(ExportConfig(encoder=str(dummy_encoder_dir), output=str(encoder), graph_dtype="int8"))
        texts = write_corpus(tmp_path / "corpus.jsonl", 40)
        corpus, output = tmp_path / "corpus.jsonl", tmp_path / "out"
        encode_here(encode_config(encoder, corpus, output, engine="onnx", dtype="int8"))
        manifest = EmbeddingsManifest.read(Location.of(output))
        assert (manifest.engine, manifest.compute_dtype) == ("onnx", "int8")
        assert manifest.fingerprint == Encoder.load(dummy_encoder_dir).fingerprint
        vectors = np.stack(read_folder(output)["embedding"].to_numpy()).astype(np.float64)
        peer = SentenceTransformer(str(dummy_encoder_dir), device="cpu").encode(texts)
        assert 1e-6 < (1 - (vectors * peer).sum(1)).max() < 0.05
        (output / "manifest.json").unlink()
        (output / "part-00000001.parquet").unlink()
        with pytest.raises(InputError, match="engine is 'onnx' there and 'torch' now"):
            encode_here(encode_config(encoder, corpus, output))

    def test_a_worker_that_sees_another_encoder_says_so(
        self, dummy_encoder_dir: Path, tmp_path: Path
    ) -> None:
        write_corpus(tmp_path / "corpus.jsonl", 3)
        pieces = survey(InputConfig(path=str(tmp_path / "corpus.jsonl")), "corpus", 10).pieces
        config = EncodeConfig(
            encoder=str(dummy_encoder_dir),
            input=InputConfig(path=str(tmp_path / "corpus.jsonl")),
            output=str(tmp_path / "out"),
        )
        with no_ray():
            worker = PieceEncoder(config, "0123456789abcdef", "", list(pieces))  # type: ignore[arg-type]
            (answer,) = worker({"piece": np.array([0])})["answer"]
        with pytest.raises(
            InputError, match="0123456789ab where the job started; every node must see the same"
        ):
            read_answer(answer)
        assert not (tmp_path / "out").exists()


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
