"""Training through Ray: whole runs."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import CrossEncoder as PeerCrossEncoder
from torch import Tensor, nn

from raytower.collectives import rank, world_size
from raytower.config import make_config
from raytower.errors import InputError, RaytowerError
from raytower.models.encoder import Encoder
from raytower.models.forward import ForwardEngine
from raytower.models.text_classifier import TextClassifier
from raytower.training.classifier import train_classifier
from raytower.training.config import (
    TrainClassifierConfig,
    TrainRerankerConfig,
)
from raytower.training.dev_recall import evaluate_recall, load_dev_set
from raytower.training.reranker import train_reranker
from raytower.training.retriever import LoadedTexts, RetrieverTask, train_retriever
from raytower.training.runner import fit
from raytower.training.step import TrainingStep
from tests.support.tensorboard_events import read_scalars
from tests.support.tiny_training import (
    retriever_config,
    train_here,
    write_labelled,
    write_pairs,
    write_scored,
    write_triples,
)

_CPU = torch.device("cpu")


@pytest.mark.usefixtures("ray_cluster")
class TestRetrieverRuns:
    def test_two_workers_end_with_the_weights_of_one_and_a_finished_run_rests(
        self, still_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Relative paths reach the workers, which run in folders of their own; the one trains in this process."""
        monkeypatch.chdir(still_encoder.parent)
        pairs = write_pairs(tmp_path / "pairs.tsv", 40)
        config = retriever_config(
            Path(still_encoder.name),
            pairs,
            tmp_path / "out",
            workers={"num": 2, "num_cpus": 0.5},
            query_prefix="q: ",
            document_prefix="",
        )
        figures = train_retriever(config)
        assert figures["steps"] == 5
        trained = Encoder.load(tmp_path / "out")
        assert (trained.prefix_for("query"), trained.prefix_for("document")) == ("q: ", "")
        survey = RetrieverTask.survey(config)
        here, _ = train_here(RetrieverTask.prepare(config, survey), config, survey, num_steps=5)
        start, first, second = (
            model.state_dict() for model in (Encoder.load(still_encoder), here.encoder, trained)
        )
        assert max(float((first[name] - start[name]).abs().max()) for name in first) > 1e-3
        # Attention ignores a shift of all keys: the gradient of a key's bias is rounding noise, which Adam scales up.
        # Elsewhere the noise, which differs with the machine, stays far below the 3e-3 that weights move by.
        for name in (name for name in first if not name.endswith("key.bias")):
            assert torch.allclose(first[name], second[name], rtol=0, atol=3e-4), name
        assert train_retriever(config) == figures
        assert not [path for path in tmp_path.iterdir() if path.name.endswith(".train")]

    def test_the_best_checkpoint_is_published_and_not_the_last(
        self, still_encoder: Path, tmp_path: Path
    ) -> None:
        """The learning rate rises until it destroys the model: the dev metric falls at the end."""
        pairs = write_pairs(tmp_path / "pairs.tsv", 64)
        dev = {"path": str(pairs), "metric": "recall@1", "every_steps": 4, "patience": 9}
        config = retriever_config(
            still_encoder,
            pairs,
            tmp_path / "out",
            dev=dev,
            epochs=4,
            optimizer={"lr": 0.3, "warmup_ratio": 1.0, "max_grad_norm": 1e6},
            checkpoint_every_steps=3,
            keep_checkpoints=1,
        )
        figures = train_retriever(config)
        info = json.loads((tmp_path / "out" / "raytower.json").read_text())
        history = {entry["step"]: entry["recall@1"] for entry in info["history"]}
        assert list(history) == [4, 8, 12, 16, 20, 24, 28, 32]
        assert figures["best"] == max(history.values())
        assert history[figures["best_step"]] == figures["best"] > history[32]
        published = Encoder.load(tmp_path / "out")
        assert info["fingerprint"] == published.fingerprint
        assert config.dev is not None
        engine = ForwardEngine(published, max_length=32)
        measured = evaluate_recall(engine, load_dev_set(config.dev), "recall@1", ("", ""))
        assert measured["recall@1"] == pytest.approx(figures["best"], abs=1e-6)

    def test_two_workers_train_two_sets_as_one_process_would(
        self, still_encoder: Path, tmp_path: Path
    ) -> None:
        """Both take the same set in the same step; the curve is that of one worker to rounding."""
        sets = {
            "ask": {"path": str(write_pairs(tmp_path / "ask.tsv", 40)), "query_prefix": "ask: "},
            "sts": {"path": str(write_scored(tmp_path / "sts.tsv", 24)), "objective": "cosent"},
        }
        dev = {"sets": {"ask": sets["ask"]["path"], "sts": {"path": sets["sts"]["path"], "metric": "auc"}}}
        curves = []
        for num in (1, 2):
            output = tmp_path / f"out{num}"
            config = retriever_config(
                still_encoder,
                tmp_path / "ask.tsv",
                output,
                train={"sets": sets},
                dev={**dev, "chosen_by": "ask"},
                log_every_steps=1,
                workers={"num": num, "num_cpus": 0.5},
            )
            assert train_retriever(config)["steps"] == 8
            info = json.loads((output / "raytower.json").read_text())
            curves.append(info["curve"])
            assert {"ask/recall@10", "sts/auc", "mean"} <= set(info["history"][0])
        one, two = curves
        assert [sorted(row) for row in one] == [sorted(row) for row in two]
        assert Counter(name for row in one for name in row if "/" in name) == {"loss/ask": 5, "loss/sts": 3}
        for first, second in zip(one, two, strict=True):
            assert second == pytest.approx(first, abs=1e-3)

    def test_a_loss_that_is_no_number_stops_the_run_and_names_the_batch(
        self, still_encoder: Path, tmp_path: Path
    ) -> None:
        pairs = write_pairs(tmp_path / "pairs.tsv", 40)
        config = retriever_config(
            still_encoder, pairs, tmp_path / "out", optimizer={"lr": 1e30}, checkpoint_every_steps=1
        )
        with pytest.raises(
            RaytowerError, match=r"is (nan|inf).* at step \d+, whose batch begins with 'what is"
        ):
            train_retriever(config)
        assert not (tmp_path / "out").exists()
        kept = list(tmp_path.glob(".out.*.train/checkpoint_*/model/model.safetensors"))
        assert kept, "the last good checkpoint stays"
        for path in kept:
            assert all(bool(tensor.isfinite().all()) for tensor in load_file(path).values())

    @pytest.mark.parametrize("workers", [1, 2])
    def test_a_failure_that_a_new_start_would_meet_again_ends_the_run(
        self, still_encoder: Path, tmp_path: Path, workers: int
    ) -> None:
        """Ray took it for a lost worker: it started all workers three times, and each time it failed again."""
        pairs = write_pairs(tmp_path / "pairs.tsv", 40)
        config = retriever_config(
            still_encoder, pairs, tmp_path / "out", workers={"num": workers, "num_cpus": 0.5}
        )
        with pytest.raises(InputError, match=r"^the last worker cannot read its rows$"):
            fit(RefusingTask, config)
        # The other of two workers waits for the gradients of the one that failed, until Ray ends both.
        assert len(list(tmp_path.glob("built-*"))) == workers
        assert not list(tmp_path.glob(".out.*.train/failure.json"))


class RefusingTask(RetrieverTask):
    """Its last worker fails in the first step; each start of a worker leaves a file beside the output."""

    def build(self, start_from: Path | None, device: torch.device = _CPU) -> nn.Module:
        (Path(self.config.output).parent / f"built-{uuid4().hex}").touch()
        return super().build(start_from, device)

    def propagate(self, step: TrainingStep, batch: LoadedTexts) -> Tensor:
        if rank() == world_size() - 1:
            raise InputError("the last worker cannot read its rows")
        return super().propagate(step, batch)


def job_values(model: Path, train: Path, output: Path, **changes: object) -> dict[str, Any]:
    return {
        "model": str(model),
        "train": {"path": str(train)},
        "output": str(output),
        "batch_size": 16,
        "max_length": 32,
        "workers": {"num": 1, "num_cpus": 0.5},
        **changes,
    }


@pytest.mark.usefixtures("ray_cluster")
def test_reranker_learns_from_triples_and_loads_with_the_peer(still_encoder: Path, tmp_path: Path) -> None:
    train, dev = write_triples(tmp_path / "triples.tsv", 64), write_scored(tmp_path / "dev.tsv", 64)
    values = job_values(
        still_encoder,
        train,
        tmp_path / "reranker",
        dev={"path": str(dev), "every_steps": 8},
        epochs=6,
        optimizer={"lr": 3e-3},
        lora={"rank": 8},
        dtype="float32",
    )
    figures = train_reranker(make_config(TrainRerankerConfig, values))
    assert figures["steps"] == 24
    assert 0.6 < figures["best"] <= 1.0
    peer = PeerCrossEncoder(str(tmp_path / "reranker"), device="cpu").predict([("find a", "a is here")])
    assert 0.0 < float(peer[0]) < 1.0


@pytest.mark.usefixtures("ray_cluster")
def test_classifier_learns_and_writes_its_log(still_encoder: Path, tmp_path: Path) -> None:
    train = write_labelled(tmp_path / "train.tsv", 64)
    values = job_values(
        still_encoder,
        train,
        tmp_path / "classifier",
        dev={"path": str(train), "metric": "accuracy", "every_epochs": 2, "patience": 1},
        epochs=40,
        keep_checkpoints="all",
        optimizer={"lr": 5e-3},
        log_every_steps=4,
        dtype="float32",
    )
    figures = train_classifier(make_config(TrainClassifierConfig, values))
    assert figures["best"] > 0.9
    # Eight texts of each topic are learnt long before the last step, so patience ends the run.
    assert figures["steps"] < 160
    assert TextClassifier.load(tmp_path / "classifier").labels[0] == "topics##a"
    info = json.loads((tmp_path / "classifier" / "raytower.json").read_text())
    logged = read_scalars(tmp_path / "classifier.tensorboard")
    assert logged["train/loss"] == pytest.approx(
        {row["step"]: row["loss"] for row in info["curve"]}, rel=1e-5
    )
    assert logged["dev/accuracy"].keys() == {row["step"] for row in info["history"]}
    assert set(logged) >= {"train/lr", "train/rows_per_second", "dev/f1"}
    assert logged["train/accuracy"] == pytest.approx(
        {row["step"]: row["accuracy"] for row in info["curve"]}, rel=1e-5
    )
    assert list(logged["train/accuracy"].values())[-1] > 0.8
    # Two epochs of four steps lie between two measurements, and each left a model directory.
    steps = [row["step"] for row in info["history"]]
    assert steps == [*range(8, figures["steps"] + 1, 8)]
    kept = {path.name: TextClassifier.load(path) for path in (tmp_path / "classifier.checkpoints").iterdir()}
    assert kept.keys() == {f"step-{step}" for step in steps}
    best = kept[f"step-{figures['best_step']}"]
    assert best.fingerprint == TextClassifier.load(tmp_path / "classifier").fingerprint
