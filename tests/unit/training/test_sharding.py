"""A model that is shared out over workers, against one process that holds all of it. Without Ray, over gloo."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import ray.train
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor
from transformers import (
    AlbertConfig,
    AlbertModel,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    Qwen3Config,
    Qwen3Model,
)

from raytower.config import WorkersConfig, make_config
from raytower.data.pieces import Survey
from raytower.errors import InputError
from raytower.models.cross_encoder import CrossEncoder
from raytower.models.encoder import Encoder
from raytower.models.logits_model import LogitsModel
from raytower.models.text_classifier import TextClassifier
from raytower.models.two_tower import TwoTower
from raytower.storage import Location
from raytower.training.backbone import narrow_base
from raytower.training.batches import Rows
from raytower.training.checkpoint import (
    MODEL_DIR,
    load_state,
    load_trainable,
    save_parts,
    save_state,
    save_trainable,
)
from raytower.training.classifier import ClassifierTask
from raytower.training.config import TrainClassifierConfig, TrainRerankerConfig, TrainRetrieverConfig
from raytower.training.exchange import Alone
from raytower.training.live_engine import LiveEngine
from raytower.training.loop import TrainingPlan, train_worker
from raytower.training.optimizer import make_optimizer, make_schedule
from raytower.training.reranker import RerankerTask
from raytower.training.retriever import RetrieverTask
from raytower.training.runner import _make_plan
from raytower.training.sharding import Sharding, layers_of, with_weights
from raytower.training.step import TrainingStep
from raytower.training.word_gradients import WordGradients
from tests.support.tiny_models import tiny_config
from tests.support.tiny_training import (
    answer,
    batches_of,
    question,
    training_values,
    worker_slice,
    write_labelled,
    write_rows,
    write_scored,
)
from tests.support.warm import in_processes
from tests.support.worker_group import end_worker, join_group

Weights = dict[str, Tensor]
_CPU = torch.device("cpu")


def write_uneven_pairs(path: Path, rows: int) -> Path:
    """Documents of one to five sentences, so that the halves of a batch are cut into different numbers of chunks."""
    return write_rows(
        path, [f"{question(i)}\t{' '.join([answer(i)] * (1 + i * i % 5))}" for i in range(rows)]
    )


KINDS: dict[str, tuple[Any, Any, Any]] = {
    "retriever": (TrainRetrieverConfig, RetrieverTask, write_uneven_pairs),
    "reranker": (TrainRerankerConfig, RerankerTask, write_scored),
    "classifier": (TrainClassifierConfig, ClassifierTask, write_labelled),
}


@dataclass(frozen=True)
class Job:
    """A run's task and the global batches of each step: everything but the model."""

    task: Any
    steps: list[list[Rows]]
    num_workers: int = 4

    def build(self, folder: Path | None = None) -> nn.Module:
        """The model of its start, or of a checkpoint, as the loop builds it."""
        apart = self.task.keeps_weights_apart
        model: nn.Module = self.task.build(folder / MODEL_DIR if folder and not apart else None)
        if isinstance(model, TwoTower):
            model.tokens_per_batch = 128  # a batch of a few texts has several chunks
        narrow_base(model, self.task.config)
        if folder and apart:
            load_trainable(model, folder)
        return model.train()

    def make_step(self, model: nn.Module, is_shared_out: bool) -> TrainingStep:
        config = self.task.config
        dtype = getattr(torch, config.dtype)
        sharding = Sharding(model, dtype=dtype, device=_CPU) if is_shared_out else None
        optimizer = make_optimizer(model, config.optimizer)
        step = TrainingStep(
            model,
            optimizer,
            make_schedule(optimizer, len(self.steps), config.optimizer.warmup_ratio),
            dtype=dtype,
            max_grad_norm=config.optimizer.max_grad_norm,
            seed=config.seed,
            num_shares=self.num_workers,
            words=None if is_shared_out else WordGradients.of(model),
            sharding=sharding,
        )
        if step.scaler.is_enabled():
            # The first scale, 65,536, overflows what is summed in 16 bits, and the step would be left out.
            step.scaler.load_state_dict({**step.scaler.state_dict(), "scale": 512.0})
        return step

    def run(self, step: TrainingStep, first: int, end: int, rank: int = 0, workers: int = 1) -> list[float]:
        own = [[worker_slice(rows, rank, workers) for rows in batches] for batches in self.steps]
        return [step.run(number, own[number], self.task.backward) for number in range(first, end)]


def make_job(kind: str, model: Path, folder: Path, num_steps: int, changes: Mapping[str, Any]) -> Job:
    config_class, task_class, write = KINDS[kind]
    folder.mkdir()
    values = {
        "max_length": 64,
        "workers": {"num": 4, "sharding": "full"},
        "optimizer": {"lr": 1e-3, "max_grad_norm": 1e9},
        **changes,
    }
    train = write(folder / "train.tsv", 16 * num_steps * 2)
    config = make_config(config_class, training_values(model, train, folder, **values))
    surveyed = task_class.survey(config)
    task = task_class.prepare(config, surveyed)
    batches = batches_of(surveyed, config)
    return Job(task, [list(islice(batches, config.accumulate_batches)) for _ in range(num_steps)])


def weights_of(model: nn.Module) -> Weights:
    return {name: p.detach().float().clone() for name, p in model.named_parameters()}


def largest_difference(left: Weights, right: Weights) -> float:
    """The biases of attention keys aside: they have no effect, and Adam scales up what rounding makes of them."""
    assert left.keys() == right.keys()
    return max(float((left[k] - right[k]).abs().max()) for k in left if not k.endswith("key.bias"))


DEV_TEXTS = tuple(question(number) for number in range(7))
ACCUMULATED = {"accumulate_batches": 2}
SHARED_OUT: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("retriever", ACCUMULATED),
    "cached": ("retriever", {**ACCUMULATED, "gradient_cache": 3}),
    "recompute": ("retriever", {"recompute": True}),
    "clipped": ("retriever", {"optimizer": {"lr": 1e-3, "max_grad_norm": 0.05}}),
    "projected": ("retriever", {"projection_dim": 6}),
    "lora": ("retriever", {"lora": {"rank": 4}}),
    "reranker": ("reranker", {}),
    "classifier": ("classifier", {}),
    "bfloat16": ("retriever", {"dtype": "bfloat16"}),
    "bfloat16 lora": ("retriever", {"dtype": "bfloat16", "lora": {"rank": 4}}),
    "float16": ("retriever", {"dtype": "float16"}),
}

IN_16_BITS = [name for name in SHARED_OUT if "float16" in name]


def _worker(rank: int, jobs: dict[str, Job], folder: Path) -> None:
    join_group(folder, rank, 2)
    results = {name: _run_shared_out(job, rank) for name, job in jobs.items()}
    torch.save(results, folder / f"results{rank}.pt")
    end_worker()


def _run_shared_out(job: Job, rank: int) -> dict[str, Any]:
    """Three steps; behind the first the first worker alone makes as many forward passes as its dev rows take."""
    step = job.make_step(job.build(), is_shared_out=True)
    assert step.sharding is not None
    added = _count_added_chunks(step)
    losses = job.run(step, 0, 1, rank, 2)
    with step.sharding.whole_on_each():
        measured = measure(job, step.model, DEV_TEXTS if rank == 0 else ())
    losses += job.run(step, 1, 3, rank, 2)
    whole = step.sharding.gather()
    parts = [cast(DTensor, p).to_local() for p in step.model.parameters()]
    return {
        "losses": losses,
        "measured": measured,
        "weights": None if whole is None else weights_of(whole),
        "share": sum(part.numel() for part in parts) / sum(p.numel() for p in step.model.parameters()),
        "added": added,
    }


def measure(job: Job, model: nn.Module, texts: Sequence[str]) -> Tensor:
    """What a model that trains gives for dev rows, two of them at a time."""
    inner = model.encoder if isinstance(model, TwoTower) else cast(LogitsModel, model).inner
    engine = LiveEngine(inner, dtype=job.task.config.dtype, max_length=64)
    engine.tokens_per_batch = 64
    model.eval()
    columns = [texts, texts] if isinstance(inner, CrossEncoder) else [texts]
    measured = engine.encode(texts) if isinstance(inner, Encoder) else engine.logits(*columns)
    model.train()
    return measured


def _count_added_chunks(step: TrainingStep) -> list[int]:
    """How many chunks without rows each batch gets, in a list that grows."""
    assert step.sharding is not None
    even_out, added = step.sharding.even_out, []

    def counted(chunks: Any) -> Any:
        evened = even_out(chunks)
        added.append(len(evened) - len(chunks))
        return evened

    step.sharding.even_out = counted  # type: ignore[method-assign]
    return added


@pytest.mark.processes
class TestTwoWorkers:
    """Each with its half of every batch and of the model, without dropout."""

    @pytest.fixture(scope="class")
    def jobs(self, still_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
        folder = tmp_path_factory.mktemp("jobs")
        return {
            name: make_job(kind, still_encoder, folder / name, 3, changes)
            for name, (kind, changes) in SHARED_OUT.items()
        }

    @pytest.fixture(scope="class")
    def results(self, jobs: dict[str, Job], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
        folder = tmp_path_factory.mktemp("results")
        in_processes(2, _worker, jobs, folder)
        return [torch.load(folder / f"results{rank}.pt", weights_only=True) for rank in range(2)]

    @pytest.mark.parametrize("name", [name for name in SHARED_OUT if name not in IN_16_BITS])
    def test_they_make_the_steps_of_one_process(
        self, jobs: dict[str, Job], results: list[dict[str, Any]], name: str
    ) -> None:
        alone = jobs[name].make_step(jobs[name].build(), is_shared_out=False)
        losses = jobs[name].run(alone, 0, 1)
        measured = measure(jobs[name], alone.model, DEV_TEXTS)
        losses += jobs[name].run(alone, 1, 3)
        first, second = (worker[name] for worker in results)
        torch.testing.assert_close(first["measured"], measured, rtol=0, atol=1e-5)
        assert first["losses"] == pytest.approx(losses, abs=1e-5)
        assert first["losses"] == second["losses"]
        assert second["weights"] is None
        assert largest_difference(first["weights"], weights_of(alone.model)) < 1e-5
        assert largest_difference(first["weights"], weights_of(jobs[name].build())) > 1e-3
        assert abs(losses[0] - losses[2]) > 1e-3

    @pytest.mark.parametrize("name", IN_16_BITS)
    def test_16_bits_agree_within_their_precision(
        self, jobs: dict[str, Job], results: list[dict[str, Any]], name: str
    ) -> None:
        alone = jobs[name].make_step(jobs[name].build(), is_shared_out=False)
        losses = jobs[name].run(alone, 0, 3)
        for worker in results:
            assert worker[name]["losses"] == pytest.approx(losses, abs=0.02)
            assert worker[name]["losses"] != pytest.approx(results[0]["plain"]["losses"], abs=1e-6)

    def test_each_holds_half_of_the_model(self, results: list[dict[str, Any]]) -> None:
        for worker in results:
            assert worker["plain"]["share"] == pytest.approx(0.5, abs=0.02)

    def test_workers_with_fewer_chunks_make_as_many_forward_passes(
        self, results: list[dict[str, Any]]
    ) -> None:
        """The worker with more chunks waited for ever for the parts of the other."""
        added = [worker["plain"]["added"] for worker in results]
        assert all(min(both) == 0 for both in zip(*added, strict=True))
        assert any(map(sum, added))


CONTINUED: dict[str, dict[str, Any]] = {
    "plain": {"gradient_cache": 4},
    "lora": {"lora": {"rank": 4, "dropout": 0.1}},
}


def save(job: Job, step: TrainingStep, num_steps: int, folder: Path, rank: int) -> None:
    """What the loop puts into a checkpoint, each worker into a folder of its own, and Ray Train into one."""
    task, own = job.task, folder.with_name(f"{folder.name}-{rank}")
    whole: nn.Module | None = step.model
    if step.sharding is not None:
        save_parts(step, own, with_weights=task.keeps_weights_apart)
        whole = step.sharding.gather()
    if whole is not None:
        task.save(whole, own / MODEL_DIR, {})
        if task.keeps_weights_apart and step.sharding is None:
            save_trainable(whole, own)
        save_state(step, {"step": num_steps}, own)
    shutil.copytree(own, folder, dirs_exist_ok=True)


def restore(job: Job, folder: Path, is_shared_out: bool) -> TrainingStep:
    torch.manual_seed(999)  # a new process stands elsewhere in its random numbers
    step = job.make_step(job.build(folder), is_shared_out)
    assert load_state(step, folder) == {"step": int(folder.name[-1])}
    return step


def _worker_of_some(rank: int, workers: int, jobs: dict[str, Job], folder: Path) -> None:
    """Four make six steps with a checkpoint after two; two make the next two from there, and leave one, too.

    They also go on from the checkpoint of one process that held the whole model.
    """
    join_group(folder, rank, workers)
    losses = {}
    for name, job in jobs.items():
        if workers == 4:
            step = job.make_step(job.build(), is_shared_out=True)
            losses[name] = job.run(step, 0, 2, rank, 4)
            save(job, step, 2, folder / f"{name} 2", rank)
            losses[name] += job.run(step, 2, 6, rank, 4)
        else:
            step = restore(job, folder / f"{name} 2", is_shared_out=True)
            losses[name] = job.run(step, 2, 4, rank, 2)
            save(job, step, 4, folder / f"{name} 4", rank)
            step = restore(job, folder / f"{name} whole 2", is_shared_out=True)
            losses[f"{name} whole"] = job.run(step, 2, 4, rank, 2)
    if rank == 0:
        torch.save(losses, folder / f"losses{workers}.pt")
    end_worker()


@pytest.mark.processes
class TestContinuedRuns:
    """With dropout: four workers; two from a checkpoint of theirs; one, which holds all, from one of the two."""

    @pytest.fixture(scope="class")
    def jobs(self, dummy_encoder_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
        folder = tmp_path_factory.mktemp("jobs")
        return {
            name: make_job("retriever", dummy_encoder_dir, folder / name, 6, changes)
            for name, changes in CONTINUED.items()
        }

    @pytest.fixture(scope="class")
    def folder(self, jobs: dict[str, Job], tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("losses")
        for name, job in jobs.items():
            step = job.make_step(job.build(), is_shared_out=False)
            job.run(step, 0, 2)
            save(job, step, 2, folder / f"{name} whole 2", 0)
        for workers in (4, 2):
            in_processes(workers, _worker_of_some, workers, jobs, folder)
        return folder

    @pytest.mark.parametrize("name", list(CONTINUED))
    def test_any_number_of_workers_goes_on(self, jobs: dict[str, Job], folder: Path, name: str) -> None:
        four, two = (torch.load(folder / f"losses{n}.pt", weights_only=True) for n in (4, 2))
        expected = four[name]
        assert two[name] == pytest.approx(expected[2:4], abs=1e-5)
        assert two[f"{name} whole"] == pytest.approx(expected[2:4], abs=1e-5)
        step = restore(jobs[name], folder / f"{name} 4", is_shared_out=False)
        assert jobs[name].run(step, 4, 6) == pytest.approx(expected[4:], abs=1e-5)
        undisturbed = jobs[name].make_step(jobs[name].build(), is_shared_out=False)
        assert jobs[name].run(undisturbed, 0, 6) == pytest.approx(expected, abs=1e-5)

    def test_no_checkpoint_holds_a_pickle(self, folder: Path) -> None:
        files = {path.suffix for path in folder.glob("plain 2/**/*") if path.is_file()}
        assert files == {".json", ".safetensors"}
        assert len(list((folder / "plain 2" / "parts").iterdir())) == 4


def _loop_worker(rank: int, plan: TrainingPlan, survey: Survey, folder: Path) -> None:
    """The loop of a worker, from its start and from the checkpoint in its midst, with Ray Train's calls answered."""
    join_group(folder, rank, 2)
    context = SimpleNamespace(get_world_rank=lambda: rank, get_world_size=lambda: 2)
    reported: list[Path] = []
    began: list[Any] = [None]

    def report(metrics: dict[str, Any], checkpoint: Any, checkpoint_upload_mode: Any) -> None:
        place = folder / f"checkpoint{len(reported)}"
        shutil.copytree(checkpoint.path, place, dirs_exist_ok=True)
        reported.append(place)

    def stream(_: Any, skipped: int, *__: Any) -> Iterator[Rows]:
        batches = islice(batches_of(survey, plan.config), skipped, None)
        yield from (worker_slice(rows, rank, 2) for rows in batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray.train, "get_context", lambda: context)
        patch.setattr(ray.train, "get_checkpoint", lambda: began[0])
        patch.setattr(ray.train, "report", report)
        patch.setattr(ray.train, "get_all_reported_checkpoints", lambda consistency_mode: reported)
        patch.setattr("ray.train.torch.get_device", lambda: _CPU)
        patch.setattr("raytower.training.loop.stream_batches", stream)
        patch.setattr("raytower.training.loop._join_exchange", Alone)
        outcomes = [train_worker({"plan": plan})]
        dist.barrier()
        began[0] = ray.train.Checkpoint.from_directory(str(reported[0]))
        outcomes.append(train_worker({"plan": plan}))
    (folder / f"outcomes{rank}.json").write_text(json.dumps(outcomes), encoding="utf-8")
    end_worker()


@pytest.mark.processes
def test_the_loop_of_a_worker(dummy_encoder_dir: Path, tmp_path: Path) -> None:
    """Its checkpoints are put together from both workers; the model directory is that of any training."""
    train = write_labelled(tmp_path / "train.tsv", 64)
    values = training_values(
        dummy_encoder_dir,
        train,
        tmp_path,
        optimizer={"lr": 1e-2},
        log_every_steps=1,
        dev={"path": str(write_labelled(tmp_path / "dev.tsv", 9)), "every_steps": 2},
        workers={"num": 2, "sharding": "full"},
    )
    config = make_config(TrainClassifierConfig, values)
    survey = ClassifierTask.survey(config)
    task = ClassifierTask.prepare(config, survey)
    plan = _make_plan(config, survey, task, WorkersConfig(num=2), Location.of(tmp_path / "failure.json"))
    in_processes(2, _loop_worker, plan, survey, tmp_path)
    (first, again), (other, _) = (json.loads((tmp_path / f"outcomes{n}.json").read_text()) for n in (0, 1))
    assert first["history"] == other["history"]
    assert [row["step"] for row in first["history"]] == [2, 4]
    losses, same = ([row["loss"] for row in outcome["curve"]] for outcome in (first, again))
    assert same == pytest.approx(losses, abs=1e-5)
    assert again["history"] == first["history"]
    # Checkpoints of steps 2 and 4, and of 4 again.
    ends = [load_file(tmp_path / f"checkpoint{n}" / MODEL_DIR / "model.safetensors") for n in (1, 2)]
    assert largest_difference(*ends) < 1e-5
    dev = [line.split("\t") for line in (tmp_path / "dev.tsv").read_text().splitlines()]
    classifier = TextClassifier.load(tmp_path / "checkpoint1" / MODEL_DIR)
    engine = LiveEngine(classifier.eval(), dtype="float32", max_length=32)
    best = engine.logits([text for text, _ in dev]).argmax(1).tolist()
    right = [classifier.labels[number] == label for number, (_, label) in zip(best, dev, strict=True)]
    assert sum(right) / 9 == pytest.approx(first["history"][1]["accuracy"])


class TestLayers:
    def test_they_are_what_transformers_does_not_split(self) -> None:
        """BERT names its embeddings, too, whose table is no layer."""
        bert = BertModel(tiny_config())
        assert layers_of(bert) == list(bert.encoder.layer)
        sizes = {
            "vocab_size": 50,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
        }
        qwen = Qwen3Model(Qwen3Config(**sizes, num_key_value_heads=2, head_dim=8))
        assert layers_of(nn.ModuleList([qwen])) == list(qwen.layers)

    def test_a_model_that_names_none_gives_what_it_recomputes(self) -> None:
        distilbert = DistilBertModel(
            DistilBertConfig(vocab_size=50, dim=16, hidden_dim=16, n_heads=2, n_layers=2)
        )
        assert layers_of(distilbert) == list(distilbert.transformer.layer)

    def test_a_model_without_layers_is_refused(self) -> None:
        sizes = {"vocab_size": 50, "embedding_size": 8, "hidden_size": 16, "intermediate_size": 16}
        albert = AlbertModel(AlbertConfig(**sizes, num_attention_heads=2))
        with pytest.raises(InputError, match=r"workers\.sharding is full, and AlbertModel names no layers"):
            layers_of(albert)


def test_a_copy_with_other_weights_keeps_what_is_tied() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    model[2].weight.requires_grad_(False)
    weights = {name: torch.full_like(p, 3.0) for name, p in model.named_parameters()}
    made = with_weights(model, weights)
    assert made[1].weight is made[0].weight
    assert made[0].weight.data_ptr() == weights["0.weight"].data_ptr()
    assert not made[2].weight.requires_grad
    assert not torch.equal(model[0].weight, weights["0.weight"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"workers": {"num": 1, "sharding": "full"}}, r"workers\.sharding is full and workers\.num 1"),
        ({"compile": True}, r"workers\.sharding is full and compile is true"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(changes: dict[str, Any], message: str) -> None:
    values = {"model": "m", "train": "t", "output": "o", "workers": {"sharding": "full"}, **changes}
    with pytest.raises(InputError, match=message):
        make_config(TrainRetrieverConfig, values)
