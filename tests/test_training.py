"""Training: the stream of rows, the optimizer, and whole runs under Ray Train."""

from __future__ import annotations

import json
from collections import Counter
from itertools import chain
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from sentence_transformers import CrossEncoder as PeerCrossEncoder
from torch import nn

from raytower.config import make_config
from raytower.data.pieces import survey
from raytower.data.sources import InputConfig
from raytower.errors import InputError, RaytowerError
from raytower.models.encoder import Encoder
from raytower.training.config import OptimizerConfig, TrainRerankerConfig, TrainRetrieverConfig
from raytower.training.optimizer import load_optimizer, make_optimizer, make_schedule, save_optimizer
from raytower.training.reranker import train_reranker
from raytower.training.retriever import plan_train_retriever, train_retriever
from raytower.training.row_stream import count_steps, stream_batches, worker_slice
from tests.tiny_models import build_tiny_encoder

TOPICS = "abcdefgh"


def write_pairs(path: Path, rows: int) -> Path:
    lines = [f"what is {TOPICS[i % 8] * 3} {i}?\t{TOPICS[i % 8] * 5} is {i}" for i in range(rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def first_batches(path: Path, count: int, **changes: int) -> list[list[str]]:
    pieces = survey(InputConfig(path=str(path)), "pairs", rows_per_piece=7).pieces
    values = {"batch_size": 8, "seed": 3, "window_rows": 20, **changes}
    batches = stream_batches(pieces, **values)
    return [next(batches)["query"] for _ in range(count)]


class TestRowStream:
    def test_an_epoch_holds_every_row_once_and_orders_differ(self, tmp_path: Path) -> None:
        path = write_pairs(tmp_path / "pairs.tsv", 48)
        batches = first_batches(path, 12)
        first, second = [*chain(*batches[:6])], [*chain(*batches[6:])]
        assert Counter(first) == Counter(second)
        assert len(set(first)) == 48
        assert first != second
        assert first != sorted(first)

    def test_the_order_depends_on_the_seed_alone(self, tmp_path: Path) -> None:
        path = write_pairs(tmp_path / "pairs.tsv", 48)
        assert first_batches(path, 12) == first_batches(path, 12)
        assert first_batches(path, 6) != first_batches(path, 6, seed=4)

    @settings(max_examples=20, deadline=None)
    @given(skip=st.integers(min_value=0, max_value=40), window=st.integers(min_value=1, max_value=60))
    def test_skipping_continues_where_an_undisturbed_stream_would_be(
        self, tmp_path_factory: pytest.TempPathFactory, skip: int, window: int
    ) -> None:
        path = write_pairs(tmp_path_factory.mktemp("rows") / "pairs.tsv", 45)
        whole = first_batches(path, skip + 3, window_rows=window)
        assert first_batches(path, 3, window_rows=window, skip_batches=skip) == whole[skip:]

    def test_workers_share_a_batch_without_loss(self) -> None:
        rows = {"query": list("abcdefgh")}
        shares = [worker_slice(rows, rank, 4)["query"] for rank in range(4)]
        assert shares == [["a", "b"], ["c", "d"], ["e", "f"], ["g", "h"]]

    def test_steps(self) -> None:
        assert count_steps(100, 32, 1) == 3
        assert count_steps(100, 32, 2) == 6
        assert count_steps(100, 32, 0.1) == 1
        with pytest.raises(InputError, match="fewer than one batch of 32"):
            count_steps(31, 32, 1)


class TestOptimizer:
    def test_biases_and_norms_do_not_decay(self) -> None:
        model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
        groups = make_optimizer(model, OptimizerConfig(weight_decay=0.1)).param_groups
        assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
        assert [parameter.dim() for parameter in groups[0]["params"]] == [2]
        assert [parameter.dim() for parameter in groups[1]["params"]] == [1, 1, 1]

    def test_schedule_warms_up_and_decays_linearly(self) -> None:
        """Defect of an older system: a warm-up flag that was parsed and never used."""
        optimizer = make_optimizer(nn.Linear(1, 1), OptimizerConfig(lr=1.0))
        schedule = make_schedule(optimizer, num_steps=10, warmup_ratio=0.4)
        seen = []
        for _ in range(10):
            seen.append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
        assert seen == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
        assert schedule.get_last_lr()[0] == pytest.approx(0.0)

    def test_state_survives_as_safetensors(self, tmp_path: Path) -> None:
        def stepped(model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.Tensor:
            optimizer.zero_grad()
            model(torch.ones(1, 3)).sum().backward()
            optimizer.step()
            return next(model.parameters()).detach().clone()

        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        optimizer = make_optimizer(model, OptimizerConfig(lr=0.1))
        stepped(model, optimizer)
        save_optimizer(optimizer, tmp_path / "state.safetensors")
        twin = nn.Linear(3, 2)
        twin.load_state_dict(model.state_dict())
        restored = make_optimizer(twin, OptimizerConfig(lr=0.1))
        load_optimizer(restored, tmp_path / "state.safetensors")
        assert torch.equal(stepped(model, optimizer), stepped(twin, restored))


@pytest.fixture(scope="module")
def still_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder without dropout, so that runs with other worker counts can be compared."""
    folder = build_tiny_encoder(tmp_path_factory.mktemp("models") / "still")
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def retriever_config(encoder: Path, pairs: Path, output: Path, **changes: object) -> TrainRetrieverConfig:
    values = {
        "model": str(encoder),
        "train": {"path": str(pairs)},
        "output": str(output),
        "batch_size": 8,
        "max_length": 32,
        "dtype": "float32",
        "optimizer": {"lr": 1e-3},
        "workers": {"num": 1, "num_cpus": 0.5},
    }
    return make_config(TrainRetrieverConfig, {**values, **changes})


@pytest.mark.usefixtures("ray_cluster")
class TestRetrieverRuns:
    def test_two_workers_end_with_the_weights_of_one_and_a_finished_run_rests(
        self, still_encoder: Path, tmp_path: Path
    ) -> None:
        pairs = write_pairs(tmp_path / "pairs.tsv", 40)
        one = train_retriever(retriever_config(still_encoder, pairs, tmp_path / "one"))
        config = retriever_config(still_encoder, pairs, tmp_path / "two", workers={"num": 2, "num_cpus": 0.5})
        two = train_retriever(config)
        assert one["steps"] == two["steps"] == 5
        first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
        start = load_file(still_encoder / "model.safetensors")
        assert max(float((first[name] - start[name]).abs().max()) for name in first) > 1e-3
        # Attention ignores a shift of all keys: the gradient of a key's bias is rounding noise, which Adam scales up.
        for name in (name for name in first if not name.endswith("key.bias")):
            assert torch.allclose(first[name], second[name], rtol=0, atol=1e-4), name
        assert train_retriever(config) == two
        assert not [path for path in tmp_path.iterdir() if path.name.endswith(".train")]

    def test_dev_recall_rises_and_the_best_checkpoint_is_published(
        self, still_encoder: Path, tmp_path: Path
    ) -> None:
        pairs = write_pairs(tmp_path / "pairs.tsv", 64)
        dev = {"path": str(pairs), "metric": "recall@1", "every_steps": 8, "patience": 5}
        figures = train_retriever(
            retriever_config(still_encoder, pairs, tmp_path / "out", dev=dev, epochs=3, dtype="bfloat16")
        )
        info = json.loads((tmp_path / "out" / "raytower.json").read_text())
        history = {entry["step"]: entry["recall@1"] for entry in info["history"]}
        assert figures["best"] == max(history.values()) > history[8] * 0.99
        assert info["config"]["dev"]["metric"] == "recall@1"
        assert info["fingerprint"] == Encoder.load(tmp_path / "out").fingerprint

    def test_prefixes_become_the_models_prompts(self, still_encoder: Path, tmp_path: Path) -> None:
        pairs = write_pairs(tmp_path / "pairs.tsv", 8)
        train_retriever(
            retriever_config(still_encoder, pairs, tmp_path / "out", query_prefix="q: ", document_prefix="")
        )
        trained = Encoder.load(tmp_path / "out")
        assert (trained.prefix_for("query"), trained.prefix_for("document")) == ("q: ", "")

    def test_relative_paths_reach_the_workers(
        self, still_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Workers run in directories of their own."""
        monkeypatch.chdir(still_encoder.parent)
        pairs = write_pairs(tmp_path / "pairs.tsv", 8)
        config = retriever_config(Path(still_encoder.name), pairs, tmp_path / "out")
        assert train_retriever(config)["steps"] == 1

    def test_a_loss_that_is_no_number_stops_the_run(self, still_encoder: Path, tmp_path: Path) -> None:
        pairs = write_pairs(tmp_path / "pairs.tsv", 40)
        config = retriever_config(
            still_encoder, pairs, tmp_path / "out", optimizer={"lr": 1e30}, max_failures=0
        )
        with pytest.raises(RaytowerError, match="the loss is nan"):
            train_retriever(config)
        assert not (tmp_path / "out").exists()

    def test_an_output_of_another_config_is_refused(self, still_encoder: Path, tmp_path: Path) -> None:
        pairs = write_pairs(tmp_path / "pairs.tsv", 8)
        (tmp_path / "out").mkdir()
        with pytest.raises(InputError, match="made by another config"):
            train_retriever(retriever_config(still_encoder, pairs, tmp_path / "out"))

    def test_fewer_rows_than_a_batch_are_refused(self, still_encoder: Path, tmp_path: Path) -> None:
        pairs = write_pairs(tmp_path / "pairs.tsv", 7)
        with pytest.raises(InputError, match="7 training rows are fewer than one batch of 8"):
            train_retriever(retriever_config(still_encoder, pairs, tmp_path / "out"))


def test_dry_run_plans_without_ray(still_encoder: Path, tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs.tsv", 40)
    plan = plan_train_retriever(retriever_config(still_encoder, pairs, tmp_path / "out"))
    assert (plan["rows"], plan["steps"], plan["workers"]) == (40, 5, 1)
    parameters = sum(parameter.numel() for parameter in Encoder.load(still_encoder).parameters())
    assert plan["predicted_state_bytes_per_worker"] == 16 * parameters


def test_a_batch_that_workers_cannot_share_is_refused(still_encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"make it a multiple of workers\.num"):
        retriever_config(still_encoder, tmp_path / "x", tmp_path / "y", batch_size=9, workers={"num": 2})


def test_max_length_beyond_the_positions_is_refused(still_encoder: Path, tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs.tsv", 40)
    with pytest.raises(InputError, match="max_length is 65"):
        plan_train_retriever(retriever_config(still_encoder, pairs, tmp_path / "out", max_length=65))


@pytest.mark.usefixtures("ray_cluster")
def test_reranker_learns_from_triples_and_loads_with_the_peer(still_encoder: Path, tmp_path: Path) -> None:
    rows = ["query\ttitle\tneg_title"]
    rows += [
        f"find {TOPICS[i % 8]}\t{TOPICS[i % 8]} is here\t{TOPICS[(i + 3) % 8]} is here" for i in range(64)
    ]
    (tmp_path / "triples.tsv").write_text("\n".join(rows) + "\n")
    scored = ["query\ttitle\tlabel"]
    scored += [f"find {a}\t{b} is here\t{int(a == b)}" for a in TOPICS for b in TOPICS]
    (tmp_path / "dev.tsv").write_text("\n".join(scored) + "\n")
    config = make_config(
        TrainRerankerConfig,
        {
            "model": str(still_encoder),
            "train": {"path": str(tmp_path / "triples.tsv")},
            "dev": {"path": str(tmp_path / "dev.tsv"), "every_steps": 8},
            "output": str(tmp_path / "reranker"),
            "batch_size": 16,
            "epochs": 4,
            "max_length": 32,
            "optimizer": {"lr": 2e-3},
            "workers": {"num": 2, "num_cpus": 0.5},
        },
    )
    figures = train_reranker(config)
    assert figures["steps"] == 16
    assert 0.5 < figures["best"] <= 1.0
    peer = PeerCrossEncoder(str(tmp_path / "reranker"), device="cpu").predict([("find a", "a is here")])
    assert 0.0 < float(peer[0]) < 1.0
