"""Objectives against hand-made references, and the proof that two workers equal one process."""

from __future__ import annotations

import math
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing, nn

from raytower.errors import InputError
from raytower.models.encoder import Encoder
from raytower.models.two_tower import TwoTower
from raytower.objectives.in_batch_negatives import BatchKeys, InBatchNegatives, text_keys
from raytower.objectives.pointwise import PointwiseCrossEntropy

QUERIES = [
    "what is a deductible",
    "who pays the debt",
    "a new car",
    "life insurance?",
    "who pays",
    "dog",
    "cat",
    "他的",
]
DOCUMENTS = [
    "the part you pay",
    "the owner does",
    "bought today",
    "pays at death",
    "the owner does",  # the same text as row 1, on the other worker
    "an animal",
    "another animal",
    "我们大学",
]
NEGATIVES = ["not this", "nor that", "the part you pay", "x", "y", "z", "an animal", "国"]


def unit_rows(rows: int, dim: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return nn.functional.normalize(torch.randn(rows, dim, generator=generator), dim=-1)


def reference_loss(
    query: np.ndarray, document: np.ndarray, excluded: set[tuple[int, int]], scale: float, margin: float
) -> float:
    """The formula written out, one query after the other."""
    total = 0.0
    for i in range(len(query)):
        positive = math.exp(scale * (float(query[i] @ document[i]) - margin))
        others = sum(
            math.exp(scale * float(query[i] @ document[j]))
            for j in range(len(document))
            if j != i and (i, j) not in excluded
        )
        total += -math.log(positive / (positive + others))
    return total / len(query)


@pytest.mark.parametrize(("scale", "margin"), [(20.0, 0.0), (20.0, 0.2), (5.0, 0.1)])
def test_loss_is_the_formula(scale: float, margin: float) -> None:
    query, document = unit_rows(6, 5, 1), unit_rows(6, 5, 2)
    keys = BatchKeys(query=text_keys(list("abcdef")), documents=(text_keys(list("uvwxyz")),))
    loss = InBatchNegatives(scale=scale, margin=margin)(query, [document], keys)
    assert float(loss) == pytest.approx(
        reference_loss(query.numpy(), document.numpy(), set(), scale, margin), abs=1e-5
    )


def test_known_relevant_documents_are_no_negatives() -> None:
    """Defect of an older system: duplicate positives inside a batch counted as negatives."""
    query, document, negative = unit_rows(4, 5, 1), unit_rows(4, 5, 2), unit_rows(4, 5, 3)
    keys = BatchKeys(
        query=text_keys(["a", "b", "c", "a"]),  # queries 0 and 3 are equal
        documents=(
            text_keys(["same", "same ", "other", "more"], ["1", "2", "9", "9"]),  # 0, 1 by text; 2, 3 by id
            text_keys(["n", "more", "n", "n"]),  # a hard negative that is query 3's positive
        ),
    )
    excluded = {(0, 1), (1, 0), (2, 3), (3, 2), (0, 3), (3, 0), (3, 5)}
    loss = InBatchNegatives(scale=20.0)(query, [document, negative], keys)
    everything = np.concatenate([document.numpy(), negative.numpy()])
    assert float(loss) == pytest.approx(
        reference_loss(query.numpy(), everything, excluded, 20.0, 0.0), abs=1e-5
    )


def test_missing_ids_are_not_equal() -> None:
    query, document = unit_rows(2, 5, 1), unit_rows(2, 5, 2)
    keys = BatchKeys(
        query=text_keys(["a", "b"], [None, None]), documents=(text_keys(["u", "v"], [None, None]),)
    )
    loss = InBatchNegatives()(query, [document], keys)
    assert float(loss) == pytest.approx(
        reference_loss(query.numpy(), document.numpy(), set(), 20.0, 0.0), abs=1e-5
    )


@pytest.mark.parametrize(("scale", "margin"), [(0.0, 0.0), (-1.0, 0.0), (20.0, -0.1), (20.0, 2.1)])
def test_settings_out_of_range_are_refused(scale: float, margin: float) -> None:
    with pytest.raises(InputError, match="objective"):
        InBatchNegatives(scale=scale, margin=margin)


def test_pointwise_is_binary_cross_entropy() -> None:
    logits, labels = torch.tensor([0.3, -1.2, 2.0]), torch.tensor([1.0, 0.0, 0.25])
    expected = [-math.log(1 / (1 + math.exp(-0.3))), -math.log(1 - 1 / (1 + math.exp(1.2)))]
    sigma = 1 / (1 + math.exp(-2.0))
    expected.append(-(0.25 * math.log(sigma) + 0.75 * math.log(1 - sigma)))
    assert float(PointwiseCrossEntropy()(logits, labels)) == pytest.approx(sum(expected) / 3, abs=1e-6)


def test_pointwise_refuses_labels_out_of_range() -> None:
    with pytest.raises(InputError, match=r"label 3\.0 is outside 0\.\.1"):
        PointwiseCrossEntropy()(torch.zeros(2), torch.tensor([1.0, 3.0]))


def loss_of_slice(model: nn.Module, tower: TwoTower, rows: slice, hard_negatives: bool) -> torch.Tensor:
    columns = [QUERIES[rows], DOCUMENTS[rows], *([NEGATIVES[rows]] if hard_negatives else [])]
    query, *documents = model([tower.tokenise(texts, "") for texts in columns])
    keys = BatchKeys(query=text_keys(columns[0]), documents=tuple(text_keys(texts) for texts in columns[1:]))
    return InBatchNegatives(scale=20.0, margin=0.1)(query, documents, keys)


def worker(rank: int, port: int, encoder_dir: str, hard_negatives: bool, out: str) -> None:
    """One of two data-parallel workers; rank 0 writes the mean loss and its averaged gradients."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    tower = TwoTower(Encoder.load(encoder_dir), max_length=64, tokens_per_batch=64).eval()
    model = nn.parallel.DistributedDataParallel(tower, broadcast_buffers=False)
    loss = loss_of_slice(model, tower, slice(rank * 4, rank * 4 + 4), hard_negatives)
    loss.backward()
    mean_loss = loss.detach().clone()
    dist.all_reduce(mean_loss)
    if rank == 0:
        gradients = {name: p.grad for name, p in tower.named_parameters() if p.grad is not None}
        torch.save({"loss": mean_loss / 2, **gradients}, out)
    dist.destroy_process_group()


@pytest.mark.parametrize("hard_negatives", [False, True])
def test_two_workers_give_the_loss_and_gradients_of_one(
    dummy_encoder_dir: Path, tmp_path: Path, hard_negatives: bool
) -> None:
    """Defect of an older system: gradients off by the world size when negatives are gathered across workers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = tmp_path / "two.pt"
    multiprocessing.spawn(worker, (port, str(dummy_encoder_dir), hard_negatives, str(out)), nprocs=2)
    two = torch.load(out, weights_only=True)

    tower = TwoTower(Encoder.load(dummy_encoder_dir), max_length=64, tokens_per_batch=64).eval()
    loss = loss_of_slice(tower, tower, slice(0, 8), hard_negatives)
    loss.backward()
    assert float(two.pop("loss")) == pytest.approx(float(loss.detach()), abs=1e-5)
    one = {name: p.grad for name, p in tower.named_parameters() if p.grad is not None}
    assert one.keys() == two.keys()
    assert max(float(gradient.abs().max()) for gradient in one.values()) > 1e-2
    for name, gradient in one.items():
        assert torch.allclose(gradient, two[name], rtol=0, atol=1e-5), name
