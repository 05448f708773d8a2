"""Tiny random models in the real directory layouts: paths can be tested where weights do not matter."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, BertModel, PreTrainedTokenizerFast

from raytower.models.cross_encoder import CrossEncoder
from raytower.models.encoder import Encoder, EncoderSettings, Projection

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
CHARACTERS = (
    "abcdefghijklmnopqrstuvwxyz0123456789?!.,-' "
    + "的一是不了人我在有他这中大来上国个到说们为子和你地出道也时年得就"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A character tokenizer, so that every text has as many tokens as characters (spaces aside)."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *dict.fromkeys(CHARACTERS)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=64,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def tiny_config(**changes: object) -> BertConfig:
    values = {
        "vocab_size": len(tiny_tokenizer()),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    }
    return BertConfig(**{**values, **changes})


def build_tiny_encoder(
    folder: Path, seed: int = 0, projection_dim: int | None = None, prompts: dict[str, str] | None = None
) -> Path:
    """A two-layer BERT of width 32 with mean pooling, normalised; optionally projected and with prompts."""
    torch.manual_seed(seed)
    projections = [Projection(32, projection_dim)] if projection_dim else []
    backbone = BertModel(tiny_config())
    # The default initialisation makes all texts alike; wider weights spread them over the sphere.
    for parameter in backbone.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    settings = EncoderSettings(max_length=64)
    Encoder(backbone, tiny_tokenizer(), settings, projections, prompts).eval().save(folder)
    return folder


def build_tiny_classifier(folder: Path, seed: int = 0, num_labels: int = 2) -> Path:
    """A two-layer BERT sequence classifier as Hugging Face's library leaves it: no file says what it is for."""
    torch.manual_seed(seed)
    model = BertForSequenceClassification(tiny_config(num_labels=num_labels, initializer_range=0.2))
    model.eval().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def build_tiny_reranker(folder: Path, seed: int = 0, num_labels: int = 1) -> Path:
    """A two-layer BERT sequence classifier in the reranker layout."""
    torch.manual_seed(seed)
    model = BertForSequenceClassification(tiny_config(num_labels=num_labels, initializer_range=0.2))
    CrossEncoder(model, tiny_tokenizer(), max_length=64).eval().save(folder)
    return folder
