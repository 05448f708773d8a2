"""What the cross-encoder and the text classifier share: a transformer with a classification head, and its directory.

Shape legend: B rows of one forward call, N rows in all, L tokens, C logits a row.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, cast

from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from raytower.errors import FormatError
from raytower.models.directory import (
    INFO_NAME,
    digest_of,
    hash_config,
    is_sequence_classifier,
    is_static,
    load_weights,
    loading,
    max_positions,
    read_info,
    read_json_object,
    resolve_model,
    save_pretrained,
    write_json,
)
from raytower.models.model_class import INFO_KEY, ModelClass
from raytower.models.token_block import Padding, TokenBlock
from raytower.models.tokenising import tokenise


class SequenceClassifier(nn.Module):
    """Model, tokenizer and length of a Hugging Face sequence classifier; a base for what is done with its logits."""

    model_class: ClassVar[ModelClass]
    """What a directory of it states itself to be."""
    reads_pairs: ClassVar[bool] = False
    """Whether a row is a pair of texts, and not one."""
    graph_refusal: ClassVar[str | None] = None
    """Why it has no ONNX graph; None where it may have one."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        info: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.info = dict(info or {})
        self.tell_padding()

    def save(self, path: str | Path, info: Mapping[str, Any] | None = None) -> None:
        """Write the directory; `info` goes into raytower.json with the fingerprint."""
        folder = Path(path)
        self.tokenizer.model_max_length = self.max_length
        save_pretrained(self.model, self.tokenizer, folder)
        self.info = {**self.info, **(info or {}), INFO_KEY: self.model_class, "max_length": self.max_length}
        write_json(folder / INFO_NAME, {**self.info, "fingerprint": self.compute_fingerprint()})

    def tokenise(self, columns: Sequence[Sequence[str]], max_length: int, start: int = 0) -> TokenBlock:
        """Texts, or the pairs of two columns, cut to `max_length`; `start` is the first row's number, for messages."""
        with_types = "token_type_ids" in self.tokenizer.model_input_names
        return tokenise(self.tokenizer, columns, max_length, with_types=with_types, start=start)

    def tell_padding(self) -> None:
        """Put the tokenizer's padding into the model's config, by which a decoder's head finds a row's last token."""
        config = self.model.config.get_text_config()
        if config.pad_token_id is None or reads_last_token(self.model):
            config.pad_token_id = self.tokenizer.pad_token_id

    @property
    def padding(self) -> Padding:
        """How its batches are filled up, as its tokenizer fills them."""
        tokenizer = self.tokenizer
        # XLNet's kind reads a row's last position, so that it must be filled up on the left.
        return Padding(
            int(tokenizer.pad_token_id), int(tokenizer.pad_token_type_id), tokenizer.padding_side == "left"
        )

    def logits(self, **inputs: Tensor) -> Tensor:
        """Padded rows (B, L) → logits (B, C) in fp32."""
        return cast(Tensor, self.model(**inputs).logits.float())

    @property
    def num_labels(self) -> int:
        """C, the logits of a row."""
        return int(cast(Any, self.model.config).num_labels)

    @property
    def max_positions(self) -> int:
        """Tokens the backbone has positions for."""
        return max_positions(self.model.config)

    @cached_property
    def fingerprint(self) -> str:
        """Hash over what maps a string to its answer; valid while the weights rest."""
        return self.compute_fingerprint()

    def compute_fingerprint(self) -> str:
        return str(self.digest_model().hexdigest())

    def digest_model(self) -> Any:
        """The running hash after weights, tokenizer and config.json."""
        digest = digest_of(self.model.state_dict(), self.tokenizer)
        hash_config(digest, self.model.config)
        return digest


def reads_last_token(model: PreTrainedModel) -> bool:
    """Whether the head reads a row's last token that is no padding, as transformers' heads of decoders do."""
    return hasattr(model, "score")


def pad_apart(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Pad by the end of text where the tokenizer ends texts by its padding token and a fresh head reads the last token.

    The head would take that last token for padding. Qwen3-Embedding ends texts so, and it keeps their vector there.
    """
    ids = tokenizer("a")["input_ids"]
    if reads_last_token(model) and ids[-1] == tokenizer.pad_token_id and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token


def load_classifier(path: Path, **changes: Any) -> tuple[PreTrainedModel, list[str]]:
    """The sequence classifier of a directory, in fp32, and the names of the head's weights that the directory lacks.

    Args:
        path: a sequence classifier, or an encoder, whose head is then freshly initialised (seed torch before).
        changes: what to change in the model's config (`num_labels`, `id2label` …).

    Raises:
        FormatError: the directory cannot be loaded, or lacks weights of its backbone.
    """
    model, missing = load_weights(AutoModelForSequenceClassification, path, "its classifier", **changes)
    # The head is what lies outside the backbone, and the pooler, which many encoders are published without.
    backbone = f"{model.base_model_prefix}."
    body = [key for key in missing if key.startswith(backbone) and "pooler" not in key]
    if body:
        raise FormatError(f"{str(path)!r} lacks weights of its backbone, {body[0]!r} among them")
    return model, missing


def load_causal(path: Path) -> PreTrainedModel:
    """The causal language model of a directory, in fp32.

    Raises:
        FormatError: the directory cannot be loaded, lacks weights, or its model makes the logits of every position, of
            which there are batch x length x vocabulary.
    """
    model, missing = load_weights(AutoModelForCausalLM, path, "its causal language model")
    if missing:
        raise FormatError(
            f"{str(path)!r} lacks weights of its causal language model, {missing[0]!r} among them; its safetensors do "
            "not belong to its config.json"
        )
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        raise FormatError(
            f"{str(path)!r} is a {type(model).__name__}, which makes the logits of every position; as a reranker a "
            "family is known whose forward takes logits_to_keep, such as Qwen3, Gemma or Llama"
        )
    return model


def resolve_transformer(name: str) -> Path:
    """`resolve_model`, of what can have a head. Raises FormatError for a table of token vectors."""
    path = resolve_model(name)
    if is_static(path):
        raise FormatError(
            f"{str(path)!r} is a StaticEmbedding, a table of token vectors, on which no reranker or classifier is put; "
            "name an encoder with a transformer"
        )
    return path


def load_config(path: Path) -> PretrainedConfig:
    """config.json of a directory. Raises FormatError where transformers cannot read it."""
    with loading(path, "its config.json"):
        config: PretrainedConfig = AutoConfig.from_pretrained(path, trust_remote_code=False)
    return config


def finished_config(path: Path) -> PretrainedConfig | None:
    """The config of a directory that holds a finished sequence classifier; None for an encoder."""
    config = load_config(path)
    return config if any(map(is_sequence_classifier, config.architectures or [])) else None


def recorded_max_length(path: Path, model: PreTrainedModel, of_modules: int | None = None) -> int:
    """The length that a directory was made for: of raytower.json, `of_modules`, its tokenizer, or its positions.

    Raises:
        FormatError: what is stated is no number from 1 up.
    """
    limit = max_positions(model.config)
    stated = read_info(path).get("max_length") or of_modules
    stated = stated or read_json_object(path / "tokenizer_config.json").get("model_max_length") or limit
    if not isinstance(stated, int | float) or stated < 1:
        raise FormatError(
            f"model directory {str(path)!r} states the length {stated!r}; it must be at least 1"
        )
    return int(min(stated, limit))
