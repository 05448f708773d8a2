"""Texts laid end to end through a transformer, against the same texts filled up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    ModernBertConfig,
    ModernBertModel,
    PreTrainedModel,
    Qwen3Config,
    Qwen3Model,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from raytower.errors import InputError
from raytower.models.chunks import cut_chunks, in_row_order
from raytower.models.encoder import Encoder, EncoderSettings
from raytower.models.token_block import Padding, TokenBlock
from raytower.models.two_tower import TwoTower
from raytower.models.unpadded import PaddedOnlyError, run_laid_out
from tests.support.tiny_models import tiny_tokenizer
from tests.support.tiny_training import retriever_config, write_pairs

TEXTS = ("a", "what is a long text of many words here?", "ab c", "", "the end of it all.")
SIZES: dict[str, Any] = {
    "vocab_size": len(tiny_tokenizer()),
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def _qwen3() -> PreTrainedModel:
    """Causal, rotary positions, two heads of queries to one of keys, and a window shorter than the texts."""
    window = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
    return Qwen3Model(Qwen3Config(**SIZES, num_key_value_heads=1, head_dim=16, **window))


def _modernbert() -> PreTrainedModel:
    """Two of three layers see four tokens on each side."""
    tokens = {"bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
    return ModernBertModel(
        ModernBertConfig(**SIZES, local_attention=8, global_attn_every_n_layers=3, **tokens)
    )


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "bert": lambda: BertModel(BertConfig(**SIZES, **STILL), add_pooling_layer=False),
    "xlm-roberta": lambda: XLMRobertaModel(XLMRobertaConfig(**SIZES, **STILL), add_pooling_layer=False),
    "qwen3": _qwen3,
    "modernbert": _modernbert,
}


def tower_of(backbone: PreTrainedModel) -> TwoTower:
    encoder = Encoder(backbone, tiny_tokenizer(), EncoderSettings(pooling="mean", max_length=60)).eval()
    return TwoTower(encoder, 60, 128)


@pytest.mark.parametrize("name", list(MODELS))
def test_vectors_and_gradients_are_those_of_padded_texts(name: str) -> None:
    torch.manual_seed(0)
    tower = tower_of(MODELS[name]())
    results = []
    for is_unpadded in (False, True):
        if is_unpadded:
            tower.leave_out_padding([TEXTS[0], TEXTS[1]])
        chunks = tower.plan_chunks([tower.tokenise(TEXTS, "")])
        assert ("places" in chunks[0].inputs) == is_unpadded
        tower.zero_grad()
        vectors = in_row_order(tower.train()(chunks), chunks)
        (vectors * torch.linspace(-1, 1, vectors.numel()).view_as(vectors)).sum().backward()
        results.append(
            (vectors.detach(), {n: p.grad.clone() for n, p in tower.named_parameters() if p.grad is not None})
        )
    (padded, padded_grads), (unpadded, grads) = results
    torch.testing.assert_close(unpadded, padded, rtol=0, atol=2e-6)
    assert grads.keys() == padded_grads.keys()
    largest = max(float(gradient.abs().max()) for gradient in padded_grads.values())
    for parameter, gradient in grads.items():
        torch.testing.assert_close(gradient, padded_grads[parameter], rtol=0, atol=2e-6 * max(largest, 1.0))


def test_without_being_told_where_texts_begin_attention_is_padded(tmp_path: Path) -> None:
    """What evaluates during training, and what is saved, knows nothing of it."""
    torch.manual_seed(0)
    tower = tower_of(MODELS["bert"]())
    chunks = tower.plan_chunks([tower.tokenise(TEXTS, "")])
    before = in_row_order(tower(chunks), chunks)
    tower.leave_out_padding(TEXTS[:2])
    torch.testing.assert_close(in_row_order(tower(chunks), chunks), before, rtol=0, atol=0)
    tower.encoder.save(tmp_path)
    assert "unpadded" not in (tmp_path / "config.json").read_text()


def test_places_and_starts() -> None:
    """Texts of 1, 3 and 2 tokens: of the flat 9 places those of the texts, in order."""
    block = TokenBlock.of([[5], [6, 7, 8], [9, 4]])
    (chunk,) = cut_chunks(block, Padding(0), torch.device("cpu"), tokens_per_batch=100, unpadded=True)
    assert np.array_equal(
        chunk.inputs["input_ids"].reshape(-1)[chunk.inputs["places"]], block.take(chunk.rows.numpy()).ids
    )
    lengths = block.lengths[chunk.rows.numpy()].tolist()
    assert chunk.inputs["starts"].tolist() == [0, lengths[0], lengths[0] + lengths[1], 6]
    assert chunk.inputs["starts"].dtype is torch.int32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_probs_dropout_prob": 0.1}, r"its attention has dropout 0\.1"),
        ({"num_attention_heads": 8}, r"its heads are 4 wide"),
    ],
)
def test_a_model_without_such_attention_stays_as_it_was(changes: dict[str, Any], message: str) -> None:
    tower = tower_of(BertModel(BertConfig(**{**SIZES, **STILL, **changes}), add_pooling_layer=False))
    before = tower.encoder.backbone.config._attn_implementation
    with pytest.raises(PaddedOnlyError, match=message):
        tower.leave_out_padding(TEXTS[:2])
    assert tower.encoder.backbone.config._attn_implementation == before
    assert not tower.unpadded
    assert not tower.encoder.backbone.training


def test_a_model_that_looks_beyond_a_text_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    tower = tower_of(MODELS["bert"]())
    monkeypatch.setattr(
        "raytower.models.encoder.run_laid_out",
        lambda backbone, ids, places, starts, first: run_laid_out(
            backbone, ids, places, starts[[0, -1]], first
        ),
    )
    with pytest.raises(
        PaddedOnlyError, match=r"its vectors of texts that lie end to end are other ones, by 0\.\d+"
    ):
        tower.leave_out_padding(TEXTS[:2])


def test_the_key_attention(dummy_encoder_dir: Path, still_encoder: Path, tmp_path: Path) -> None:
    """The encoder with dropout is refused where padding must be left out; auto fills up on a CPU."""
    from raytower.training.retriever import RetrieverTask

    train = write_pairs(tmp_path / "train.tsv", 16)

    def build(model: Path, attention: str) -> TwoTower:
        config = retriever_config(model, train, tmp_path / "out", attention=attention)
        task = RetrieverTask.prepare(config, RetrieverTask.survey(config))
        tower = task.build(None)
        assert isinstance(tower, TwoTower)
        return tower

    assert build(still_encoder, "unpadded").unpadded
    assert not build(still_encoder, "auto").unpadded
    with pytest.raises(
        InputError, match=r"attention is unpadded, which BertModel is not trained with: its attention"
    ):
        build(dummy_encoder_dir, "unpadded")
