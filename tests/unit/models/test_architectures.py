"""Backbones of many families, tiny and random: vectors as the peer library's, a step of training, saved and loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from transformers import PreTrainedConfig, PreTrainedModel

from raytower.models.encoder import Encoder
from raytower.models.forward import ForwardEngine
from tests.support.tiny_models import tiny_tokenizer

TEXTS = ["what does a deductible mean?", "a", "个体工商户的债务由谁偿还", "short one", "a longer text, " * 3]

VOCABULARY = len(tiny_tokenizer())
USUAL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 66,
    "pad_token_id": 0,
}
DECODER = {**USUAL, "num_key_value_heads": 1, "head_dim": 8, "eos_token_id": 3, "bos_token_id": 2, "pad_token_id": None}

# Family: the class of its backbone, and the config's values.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", USUAL),
    "roberta": ("Roberta", USUAL),
    "xlm_roberta": ("XLMRoberta", USUAL),
    "distilbert": (
        "DistilBert",
        {"vocab_size": VOCABULARY, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "max_position_embeddings": 66},
    ),
    "mpnet": ("MPNet", USUAL),
    "albert": ("Albert", {**USUAL, "embedding_size": 8}),
    "deberta_v2": (
        "DebertaV2",
        {**USUAL, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False, "type_vocab_size": 0},
    ),
    "roformer": ("RoFormer", {**USUAL, "embedding_size": 16}),
    "longformer": ("Longformer", {**USUAL, "attention_window": [8, 8]}),
    "modernbert": (
        "ModernBert",
        {**USUAL, "local_attention": 16, "global_attn_every_n_layers": 2, "cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3},
    ),
    "ernie": ("Ernie", {**USUAL, "use_task_id": True}),
    "nomic_bert": ("NomicBert", USUAL),
    "eurobert": ("EuroBert", {**DECODER, "pad_token_id": 0}),
    "qwen2": ("Qwen2", DECODER),
    "qwen3": ("Qwen3", DECODER),
    "mistral": ("Mistral", DECODER),
    "gemma3_text": ("Gemma3Text", {**DECODER, "query_pre_attn_scalar": 8, "sliding_window": 16}),
    "t5": (
        "T5",
        {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "pad_token_id": 0},
    ),
}


def build(family: str, folder: Path) -> Path:
    """A plain Hugging Face directory of a tiny model of the family."""
    name, values = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**values)
    kind = getattr(transformers, "T5EncoderModel" if family == "t5" else f"{name}Model")
    torch.manual_seed(0)
    model = kind(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def gradient_step(encoder: Encoder) -> None:
    from raytower.models.two_tower import TwoTower
    tower = TwoTower(encoder.train(), 32, 4096)
    (v,) = tower(tower.plan_chunks([tower.tokenise(TEXTS, "")]))
    (v @ torch.randn(v.shape[1], 3)).sum().backward()

if __name__ == "__main__":
    import sys, time, traceback, tempfile
    for family in sys.argv[1:] or FAMILIES:
        t = time.time()
        with tempfile.TemporaryDirectory() as f:
            folder = build(family, Path(f) / "m")
            try:
                e = Encoder.load(folder)
                ours = ForwardEngine(e).encode(TEXTS)
                body = Transformer(str(folder), max_seq_length=64)
                peer = SentenceTransformer(modules=[body, Pooling(body.get_embedding_dimension(), "mean"), Normalize()], device="cpu").encode(TEXTS)
                print(family, "diff", np.abs(ours - peer).max(), ours.shape, e.dim, "cache", getattr(e.backbone.config, "use_cache", None))
                e = Encoder.load(folder)
                gradient_step(e)
                none = [n for n, p in e.named_parameters() if p.requires_grad and p.grad is None]
                print("   no gradient:", none)
                peer.save
            except Exception as error:
                print(family, type(error).__name__, str(error)[:300])
        print("   ", round(time.time() - t, 2))
