"""The cross-encoder (reranker): query and document in one sequence, one relevance logit out.

Directories load with `sentence_transformers.CrossEncoder` and score the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from raytower.errors import FormatError, InputError
from raytower.models.batch_planner import plan_batches
from raytower.models.directory import (
    INFO_NAME,
    hash_tensors,
    hash_tokenizer,
    load_tokenizer,
    max_positions,
    new_digest,
    read_info,
    resolve_model,
    write_json,
)
from raytower.models.forward import (
    TORCH_DTYPES,
    ComputeDtype,
    check_max_length,
    default_device,
    default_tokens_per_batch,
)
from raytower.models.fusion import Fusion


class CrossEncoder(nn.Module):
    """A sequence classifier over (query, document) with one logit, or two read as their difference."""

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

    @classmethod
    def load(cls, name: str | Path) -> CrossEncoder:
        """Load a finished reranker directory or hub id.

        Raises:
            FormatError: weights are missing (an encoder is no reranker yet), or it has other than 1 or 2 labels.
        """
        path = resolve_model(str(name))
        model, missing = _load_classifier(path, num_labels=None)
        if missing:
            raise FormatError(
                f"{str(path)!r} has no trained classification head ({missing[0]!r} is missing): it is no reranker; "
                "train one with `raytower train-reranker`"
            )
        return cls(model, load_tokenizer(path), _max_length(path, model), read_info(path)).eval()

    @classmethod
    def start_from(cls, name: str | Path) -> CrossEncoder:
        """A new one-logit reranker on top of any encoder; its head is freshly initialised (seed torch before)."""
        path = resolve_model(str(name))
        model, _ = _load_classifier(path, num_labels=1)
        return cls(model, load_tokenizer(path), _max_length(path, model))

    def save(self, path: str | Path, info: Mapping[str, Any] | None = None) -> None:
        """Write the directory; `info` goes into raytower.json with the fingerprint."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        # One logit, squashed to 0..1 when the peer library predicts: what training with BCE means by it.
        activation = {"activation_fn": "torch.nn.modules.activation.Sigmoid"}
        if self.model.config.num_labels == 1:
            self.model.config.sentence_transformers = activation
        self.model.save_pretrained(folder, safe_serialization=True)
        self.tokenizer.model_max_length = self.max_length
        self.tokenizer.save_pretrained(folder)
        self.info = {**self.info, **(info or {}), "max_length": self.max_length}
        write_json(folder / INFO_NAME, {**self.info, "fingerprint": self.compute_fingerprint()})

    def forward(self, **inputs: Tensor) -> Tensor:
        """Tokenised pairs (B, L) → relevance logits (B,)."""
        logits_BC = self.model(**inputs).logits.float()
        if logits_BC.shape[1] == 1:
            return cast(Tensor, logits_BC[:, 0])
        return cast(Tensor, logits_BC[:, 1] - logits_BC[:, 0])

    @property
    def max_positions(self) -> int:
        return max_positions(self.model.config)

    @property
    def fusion(self) -> Fusion | None:
        """How to mix this reranker's logits with recall scores; None where it was never tuned."""
        values = self.info.get("fusion")
        return Fusion.from_dict(values) if values else None

    @cached_property
    def fingerprint(self) -> str:
        return self.compute_fingerprint()

    def compute_fingerprint(self) -> str:
        digest = new_digest()
        hash_tensors(
            digest, {k: v for k, v in self.model.state_dict().items() if not k.endswith("position_ids")}
        )
        hash_tokenizer(digest, self.tokenizer)
        return str(digest.hexdigest())


class CrossScorer:
    """Scores pairs with one cross-encoder at one precision on one device."""

    def __init__(
        self,
        cross_encoder: CrossEncoder,
        *,
        dtype: ComputeDtype = "float32",
        device: str | torch.device | None = None,
        tokens_per_batch: int | None = None,
        max_length: int | None = None,
    ) -> None:
        """Raises InputError: `max_length` is beyond the model's positions."""
        self.max_length = check_max_length(
            max_length or cross_encoder.max_length, cross_encoder.max_positions
        )
        self.device = torch.device(device) if device is not None else default_device()
        self.fusion = cross_encoder.fusion
        self.fingerprint = cross_encoder.fingerprint
        self.cross_encoder = cross_encoder.eval().to(self.device, TORCH_DTYPES[dtype])
        self.tokens_per_batch = tokens_per_batch or default_tokens_per_batch(self.device)

    @torch.inference_mode()
    def score(self, queries: Sequence[str], documents: Sequence[str]) -> NDArray[np.float32]:
        """Raw relevance logits, float32 (n,), of the pairs (queries[i], documents[i]).

        Raises:
            InputError: the two lists differ in length.
        """
        if len(queries) != len(documents):
            raise InputError(
                f"{len(queries)} queries and {len(documents)} documents given; pairs need equally many"
            )
        output = np.zeros(len(queries), dtype=np.float32)
        if not len(queries):
            return output
        tokenizer = self.cross_encoder.tokenizer
        rows = tokenizer(
            list(queries),
            list(documents),
            truncation="longest_first",
            max_length=self.max_length,
            padding=False,
        )
        plan = plan_batches([len(ids) for ids in rows["input_ids"]], self.tokens_per_batch)
        for batch in plan.batches:
            part = {name: [values[row] for row in batch] for name, values in rows.items()}
            inputs = tokenizer.pad(part, return_tensors="pt").to(self.device)
            output[batch] = self.cross_encoder(**inputs).cpu().numpy()
        return output


def _load_classifier(path: Path, num_labels: int | None) -> tuple[PreTrainedModel, list[str]]:
    extra = {} if num_labels is None else {"num_labels": num_labels}
    try:
        model, report = AutoModelForSequenceClassification.from_pretrained(
            path,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **extra,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise FormatError(
            f"model directory {str(path)!r} cannot be loaded as a classifier: {error}"
        ) from error
    if model.config.num_labels not in (1, 2):
        raise FormatError(
            f"{str(path)!r} has {model.config.num_labels} labels; a reranker has 1 logit or 2 classes"
        )
    head = [
        key
        for key in report.get("missing_keys", [])
        if "classifier" in key or "score" in key or "pooler" in key
    ]
    body = [key for key in report.get("missing_keys", []) if key not in head and "position_ids" not in key]
    if body:
        raise FormatError(f"{str(path)!r} lacks weights of its backbone, {sorted(body)[0]!r} among them")
    return cast(PreTrainedModel, model), sorted(head)


def _max_length(path: Path, model: PreTrainedModel) -> int:
    limit = max_positions(model.config)
    recorded = read_info(path).get("max_length")
    if recorded:
        return min(int(recorded), limit)
    config = path / "tokenizer_config.json"
    stated = (
        json.loads(config.read_text(encoding="utf-8")).get("model_max_length") if config.is_file() else None
    )
    return min(int(stated), limit) if stated else limit
