"""The StaticEmbedding module of the directory layout: a vector a token, without a transformer (model2vec's form).

A text's vector is the mean of its tokens', which `Encoder` computes as it pools any backbone's hidden states.
Shape legend: B rows, L tokens, V vocabulary, H width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_outputs import BaseModelOutput

from raytower.errors import FormatError
from raytower.models.directory import loading, save_tensors

_WEIGHTS = "model.safetensors"
# Where the tokenizer itself cuts nothing; a longer text's token vectors are not held at once by a small machine.
_MAX_TOKENS = 1 << 16


class StaticConfig(PreTrainedConfig):
    """V and H of a table."""

    model_type = "static_embedding"

    def __init__(self, vocab_size: int = 1, hidden_size: int = 1, **others: Any) -> None:
        super().__init__(**others)
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size


class StaticBackbone(PreTrainedModel):
    """Token ids (B, L) to their rows of a table, as hidden states (B, L, H)."""

    config_class = StaticConfig

    def __init__(self, config: StaticConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **others: Any
    ) -> BaseModelOutput:
        """The mask changes nothing here: no token looks at another."""
        return BaseModelOutput(last_hidden_state=self.embedding(input_ids))


def load_static(place: Path) -> tuple[StaticBackbone, PreTrainedTokenizerFast]:
    """The table of a StaticEmbedding's folder and its tokenizer, which adds no special tokens.

    Raises:
        FormatError: no table, one whose parts do not fit each other, or fewer rows than tokens.
    """
    with loading(place, "its table of token vectors"):
        tensors = load_file(place / _WEIGHTS)
        table_VH = tensors.get("embedding.weight")
        if table_VH is None:
            table_VH = _fold(tensors, place / _WEIGHTS)
        if table_VH.ndim != 2:
            raise FormatError(
                f"{str(place / _WEIGHTS)!r} has a table of shape {tuple(table_VH.shape)}; it must have two "
                "dimensions, a vector a token; download the model again"
            )
    with loading(place, "its tokenizer"):
        rules = Tokenizer.from_file(str(place / "tokenizer.json"))
    rules.post_processor = None
    if rules.get_vocab_size() > len(table_VH):
        raise FormatError(
            f"the tokenizer in {str(place)!r} has {rules.get_vocab_size()} tokens, and the table {len(table_VH)} rows; "
            "give the tokenizer that it was made with"
        )
    cut = (rules.truncation or {}).get("max_length") or _MAX_TOKENS
    rules.no_padding()  # its token may be none of the table's
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=rules, model_max_length=cut)
    # Any token fills batches up: the mask hides it from the mean. Named when the tokenizer is made, it would become a
    # special one, and an ordinary word be cut out of others: "the" out of "there".
    tokenizer.pad_token = rules.id_to_token(0)
    backbone = StaticBackbone(StaticConfig(vocab_size=table_VH.shape[0], hidden_size=table_VH.shape[1]))
    backbone.embedding.weight.data = table_VH.float()
    return backbone.eval(), tokenizer


def save_static(backbone: StaticBackbone, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write table and tokenizer as the library does."""
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors({"embedding.weight": backbone.embedding.weight.detach().contiguous()}, folder / _WEIGHTS)
    rules = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    rules.no_padding()  # what a batch has set is no part of the model
    rules.no_truncation()
    if tokenizer.model_max_length < _MAX_TOKENS:
        rules.enable_truncation(tokenizer.model_max_length)
    rules.save(str(folder / "tokenizer.json"))


def _fold(tensors: dict[str, Tensor], file: Path) -> Tensor:
    """model2vec's form: rows that tokens share by `mapping`, times a weight a token.

    Raises:
        FormatError: no embeddings, a mapping to a row that they do not have, or more or fewer weights than tokens.
    """
    if "embeddings" not in tensors:
        raise FormatError(
            f"{str(file)!r} holds {sorted(tensors)}; a StaticEmbedding has embedding.weight, or embeddings "
            "as model2vec writes them"
        )
    table_VH = tensors["embeddings"].float()
    if "mapping" in tensors:
        rows_V = tensors["mapping"].to(torch.long)
        outside = rows_V[(rows_V < 0) | (rows_V >= len(table_VH))]
        if len(outside):
            raise FormatError(
                f"{str(file)!r} maps a token to row {int(outside[0])} of its embeddings, which have {len(table_VH)} "
                "rows; they do not belong together: download the model again"
            )
        table_VH = table_VH[rows_V]
    if "weights" in tensors:
        weights_V = tensors["weights"].float()
        if weights_V.shape != table_VH.shape[:1]:
            raise FormatError(
                f"{str(file)!r} has weights of shape {tuple(weights_V.shape)} for {len(table_VH)} tokens; they do not "
                "belong together: download the model again"
            )
        table_VH = table_VH * weights_V[:, None]
    return table_VH.contiguous()
