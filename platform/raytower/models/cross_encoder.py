"""The cross-encoder (reranker): query and document in one sequence, one relevance logit out.

The logit is that of a classification head, or of a causal language model the logit of the token that says yes.
Directories load with `sentence_transformers.CrossEncoder` and score the same.
Shape legend: B pairs of one forward call, N in all, L tokens, C logits a pair (1, or 2 classes), V tokens in all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from raytower.errors import FormatError, InputError
from raytower.models.directory import (
    load_tokenizer,
    read_info,
    read_json_object,
    transformer_folder,
)
from raytower.models.fusion import Fusion
from raytower.models.logits_engine import LogitsEngine
from raytower.models.model_class import ModelClass, refuse_other_class
from raytower.models.pair_format import PairFormat, TemplateTokeniser
from raytower.models.reranker_layout import (
    AnswerTokens,
    RerankerLayout,
    check_template,
    find_plain_layout,
    is_causal,
    read_layout,
    refuse_plain,
    write_layout,
)
from raytower.models.sequence_classifier import (
    SequenceClassifier,
    finished_config,
    load_causal,
    load_classifier,
    load_config,
    pad_apart,
    recorded_max_length,
    resolve_transformer,
)
from raytower.models.token_block import TokenBlock

Activation = Literal["sigmoid", "identity"]
# The names under which the peer library keeps what it puts on the logit when it predicts.
_ACTIVATIONS: dict[Activation, str] = {
    "sigmoid": "torch.nn.modules.activation.Sigmoid",
    "identity": "torch.nn.modules.linear.Identity",
}


class CrossEncoder(SequenceClassifier):
    """A sequence classifier over (query, document) with one logit, or two read as their difference."""

    model_class: ClassVar[ModelClass] = "reranker"
    reads_pairs: ClassVar[bool] = True

    activation: Activation = "sigmoid"
    """What a reader puts on what `forward` gives; of two logits it is the sigmoid always."""
    pairs: PairFormat = PairFormat()
    """How a pair is put before the model."""
    answers: AnswerTokens | None = None
    """The tokens of a causal language model that are compared; None of a classifier."""
    name: str = "that was made here"
    """What it was loaded by, for messages."""

    @classmethod
    def load(cls, name: str | Path) -> CrossEncoder:
        """Load a finished reranker directory or hub id.

        Raises:
            FormatError: it is an encoder or a classifier, weights are missing, it has other than 1 or 2 labels, its
                logit has an activation that is not known here, or nothing says how a causal language model reranks.
        """
        loaded = cls._open(resolve_transformer(str(name))).eval()
        loaded.name = str(name)
        return loaded

    @classmethod
    def _open(cls, path: Path) -> CrossEncoder:
        layout = _read_any_layout(path)
        refuse_other_class(path, "reranker")
        if layout is None and is_causal(path):
            raise refuse_plain(path)
        if layout is not None and layout.answers is not None:
            return CausalCrossEncoder.open(path, layout)
        model, missing = load_classifier(path)
        if missing:
            raise FormatError(
                f"{str(path)!r} has no trained classification head ({missing[0]!r} is missing): it is no reranker; "
                "train one with `raytower train-reranker`"
            )
        if model.config.num_labels not in (1, 2):
            raise FormatError(
                f"{str(path)!r} has {model.config.num_labels} labels; a reranker has 1 logit or 2 classes"
            )
        layout = layout or RerankerLayout(PairFormat(), None)
        tokenizer = load_tokenizer(path, model.config)
        max_length = recorded_max_length(path, model, layout.max_length)
        loaded = cls(model, tokenizer, max_length, read_info(path))
        loaded.activation = _read_activation(path, model.config, model.config.num_labels)
        loaded.pairs = layout.pairs
        loaded._check_template(path)
        return loaded

    @classmethod
    def start_from(cls, name: str | Path, num_labels: int = 1) -> CrossEncoder:
        """A reranker to train: on top of any encoder, with a fresh head (seed torch before), or a finished one.

        Raises:
            InputError: `name` is a finished classifier with another number of logits, so its head cannot go on.
        """
        path = resolve_transformer(str(name))
        layout = _read_any_layout(path)
        if layout is not None and layout.answers is not None:
            return CausalCrossEncoder.go_on_from(path, layout, num_labels)
        path = transformer_folder(path)
        finished = finished_config(path)
        if finished is None:
            model, _ = load_classifier(path, num_labels=num_labels)
            tokenizer = load_tokenizer(path, model.config)
            pad_apart(model, tokenizer)
            return cls(model, tokenizer, recorded_max_length(path, model))
        if finished.num_labels != num_labels:
            raise InputError(
                f"{str(path)!r} is a finished classifier with num_labels {finished.num_labels}, and the objective "
                f"trains {num_labels}; choose an objective with as many, or start from an encoder"
            )
        other = cls.load(path)
        # Its metric history and its fusion belong to the weights before this training.
        started = cls(other.model, other.tokenizer, other.max_length)
        started.activation, started.pairs = other.activation, other.pairs
        return started

    def save(self, path: str | Path, info: Mapping[str, Any] | None = None) -> None:
        """Write the directory; `info` goes into raytower.json with the fingerprint."""
        if self.num_labels == 1:
            self.model.config.sentence_transformers = {"activation_fn": _ACTIVATIONS[self.activation]}
        super().save(path, info)
        is_bare = self.pairs == PairFormat() and self.answers is None
        # Without modules.json the peer library would put pairs by a chat template that serves something else.
        if not is_bare or self.tokenizer.chat_template is not None:
            activation = _ACTIVATIONS[self.activation] if self.num_labels == 1 else None
            write_layout(Path(path), RerankerLayout(self.pairs, self.answers), activation)

    def tokenise(self, columns: Sequence[Sequence[str]], max_length: int, start: int = 0) -> TokenBlock:
        """Pairs of (queries, documents) behind their prompt, or by the chat template, cut to `max_length`."""
        if self.pairs.template is not None:
            with_types = "token_type_ids" in self.tokenizer.model_input_names
            return self._template.tokenise(columns, max_length, with_types=with_types, start=start)
        queries, documents = columns
        if prompt := self.pairs.prompt:
            # What is no text is named by the tokenising.
            queries = [prompt + query if isinstance(query, str) else query for query in queries]
        return super().tokenise([queries, documents], max_length, start)

    def forward(self, **inputs: Tensor) -> Tensor:
        """Tokenised pairs (B, L) → relevance logits (B,)."""
        logits_BC = self.logits(**inputs)
        return logits_BC[:, 0] if self.num_labels == 1 else logits_BC[:, 1] - logits_BC[:, 0]

    def digest_model(self) -> Any:
        """The running hash after weights, tokenizer, config.json, how pairs are put and which tokens are compared."""
        digest = super().digest_model()
        digest.update(self.pairs.describe(self.tokenizer).encode())
        if self.answers is not None:
            digest.update(f"logit of {self.answers.true} less that of {self.answers.false}".encode())
        return digest

    @cached_property
    def _template(self) -> TemplateTokeniser:
        return TemplateTokeniser(self.tokenizer, self.pairs)

    def _check_template(self, path: Path) -> None:
        if self.pairs.template is not None:
            check_template(path, self.tokenizer, self.pairs)

    @property
    def fusion(self) -> Fusion | None:
        """How to mix this reranker's logits with recall scores; None where it was never tuned."""
        values = self.info.get("fusion")
        return Fusion.from_dict(values) if values else None


class CausalCrossEncoder(CrossEncoder):
    """A causal language model that is asked about a pair: the score is the logit of a token as the next one.

    Rows are filled up on the left, so that the last position is the last token of each, and logits are made of that one
    alone: (B, V), and not (B, L, V).
    """

    answers: AnswerTokens
    graph_refusal = "a reranker that is a causal language model has no ONNX graph here"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        info: Mapping[str, Any] | None = None,
        *,
        layout: RerankerLayout,
    ) -> None:
        assert layout.answers is not None
        super().__init__(model, tokenizer, max_length, info)
        tokenizer.padding_side = "left"
        self.pairs, self.answers = layout.pairs, layout.answers

    @classmethod
    def open(cls, path: Path, layout: RerankerLayout) -> CausalCrossEncoder:
        """Load the model of a directory with this layout.

        Raises:
            FormatError: the directory cannot be loaded, its model makes logits of all positions, a token of the answers
                is none of its own, or its chat template loses the texts.
        """
        model = load_causal(path)
        tokenizer = load_tokenizer(path, model.config)
        max_length = recorded_max_length(path, model, layout.max_length)
        loaded = cls(model, tokenizer, max_length, read_info(path), layout=layout)
        rows = model.config.get_text_config().vocab_size
        for token in (loaded.answers.true, loaded.answers.false):
            if token is not None and token >= rows:
                raise FormatError(
                    f"{str(path)!r} takes the logit of token {token} for its score, and its model has {rows} tokens; "
                    "give ids of the tokens that say yes and no"
                )
        loaded._check_template(path)
        loaded.activation = _read_activation(path, model.config, num_labels=1)
        return loaded

    @classmethod
    def go_on_from(cls, path: Path, layout: RerankerLayout, num_labels: int) -> CausalCrossEncoder:
        """The same to train; raises InputError where an objective wants other than its one logit."""
        if num_labels != 1:
            raise InputError(
                f"{str(path)!r} is a causal language model that gives one logit a pair, and the objective trains "
                f"{num_labels}; choose an objective with one, or start from an encoder"
            )
        started = cls.open(path, layout)
        started.info = {}  # its metric history and its fusion belong to the weights before this training
        return started

    def logits(self, **inputs: Tensor) -> Tensor:
        """Rows filled up on the left (B, L) → logits (B, 1) in fp32."""
        logits_BV = self.model(**inputs, logits_to_keep=1).logits[:, -1]
        logit_B = logits_BV[:, self.answers.true].float()
        if self.answers.false is not None:
            logit_B = logit_B - logits_BV[:, self.answers.false].float()
        return logit_B[:, None]

    @property
    def num_labels(self) -> int:
        """C, one logit a pair, whatever config.json says of labels."""
        return 1

    def freeze_head(self) -> None:
        """Leave the logits as they are: where adapters are trained, a matrix of V rows of which two are read."""
        self.model.get_output_embeddings().requires_grad_(False)

    def tell_padding(self) -> None:
        """The mask alone tells padding; by its config the model would keep the vector of that token from training."""


class CrossScorer(LogitsEngine[CrossEncoder]):
    """Scores pairs with one cross-encoder at one precision on one device."""

    row_name = "pair"

    @property
    def fusion(self) -> Fusion | None:
        """How to mix its logits with recall scores; None where it was never tuned."""
        return self.model.fusion

    def score(self, queries: Sequence[str], documents: Sequence[str]) -> NDArray[np.float32]:
        """Raw relevance logits, float32 (N,), of the pairs (queries[i], documents[i]).

        Raises:
            InputError: the two lists differ in length, a text is no valid Unicode, or a logit is infinite or no number;
                the first such text is named. Scores that are no numbers would leave the order as it was.
            RaytowerError: one pair alone does not fit into memory.
        """
        if len(queries) != len(documents):
            raise InputError(
                f"{len(queries)} queries and {len(documents)} documents given; pairs need equally many"
            )
        logits_NC = self.logits(queries, documents)
        logits = logits_NC[:, 0] if logits_NC.shape[1] == 1 else logits_NC[:, 1] - logits_NC[:, 0]
        bad = np.flatnonzero(~np.isfinite(logits))
        if len(bad):
            raise InputError(
                f"reranker {self.model.name!r} scores query {queries[bad[0]][:80]!r} with {logits[bad[0]]}; scores "
                "must be finite; set dtype to float32, or name another model"
            )
        return logits

    @property
    def gives_probabilities(self) -> bool:
        """Whether a reader of the directory puts a sigmoid on its logits."""
        return self.model.num_labels > 1 or self.model.activation == "sigmoid"

    def activated(self, logits: NDArray[np.floating]) -> NDArray[np.float64]:
        """Logits (N,) behind the directory's own activation, as the peer library's `predict` gives them."""
        values = logits.astype(np.float64)
        return 0.5 * (1 + np.tanh(values / 2)) if self.gives_probabilities else values


def _read_any_layout(path: Path) -> RerankerLayout | None:
    """The layout that a directory states, or that a causal language model's chat template tells; None of others."""
    layout = read_layout(path)
    if layout is None and is_causal(path):
        layout = find_plain_layout(path, load_tokenizer(path, load_config(path)))
    return layout


def _read_activation(path: Path, config: PretrainedConfig, num_labels: int) -> Activation:
    """What the peer library would put on the logit: it looks into its own file first, then into config.json."""
    stated = read_json_object(path / "config_sentence_transformers.json").get("activation_fn")
    stated = stated or (getattr(config, "sentence_transformers", None) or {}).get("activation_fn")
    stated = stated or getattr(config, "sbert_ce_default_activation_function", None)
    if stated is None or num_labels != 1:
        return "sigmoid"
    known = {full.rsplit(".", 1)[-1]: name for name, full in _ACTIVATIONS.items()}
    name = known.get(str(stated).rsplit(".", 1)[-1])
    if name is None:
        raise FormatError(
            f"{str(path)!r} puts the activation {stated!r} on its logit; known are {sorted(known)}"
        )
    return name
