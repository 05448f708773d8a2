"""The two-tower encoder: backbone, pooling, optional projection, optional normalisation.

Directories have the sentence-transformers layout and load with either library.
Shape legend: B rows, L tokens, H backbone width, D embedding dimension.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase

from raytower.errors import FormatError
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

PoolingMode = Literal["mean", "cls", "max", "lasttoken"]
_POOLING_FLAGS: dict[str, str] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "lasttoken",
}
_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "Identity": nn.Identity,
    "Tanh": nn.Tanh,
    "ReLU": nn.ReLU,
    "GELU": nn.GELU,
    "Sigmoid": nn.Sigmoid,
}


class Projection(nn.Module):
    """A linear layer with an activation: the Dense module of the directory layout. (B, in) → (B, out)."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, activation: str = "Identity"
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias=bias)
        self.activation = _ACTIVATIONS[activation]()

    def forward(self, pooled: Tensor) -> Tensor:
        return cast(Tensor, self.activation(self.linear(pooled)))


@dataclass(frozen=True, kw_only=True)
class EncoderSettings:
    """What besides weights maps a string to a vector."""

    pooling: PoolingMode = "mean"
    normalise: bool = True
    max_length: int = 256
    lower_case: bool = False
    similarity: Literal["cosine", "dot"] = "cosine"


class Encoder(nn.Module):
    """Maps token ids (B, L) to embeddings (B, D)."""

    def __init__(
        self,
        backbone: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: EncoderSettings,
        projections: list[Projection] | None = None,
        prompts: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.projections = nn.ModuleList(projections or [])
        self.tokenizer = tokenizer
        self.settings = settings
        self.prompts = dict(prompts or {})
        # The backbone's pooler is not part of the map from string to vector: no gradient, no place in the hash.
        for name, parameter in backbone.named_parameters():
            if name.startswith("pooler."):
                parameter.requires_grad_(False)

    @classmethod
    def load(cls, name: str | Path) -> Encoder:
        """Load a sentence-transformers directory, a plain Hugging Face encoder (mean pooling, normalised), or a hub id.

        Raises:
            InputError: no such model.
            FormatError: no safetensors weights, weights that do not fit the config, or a module this class lacks.
        """
        path = resolve_model(str(name))
        backbone = _load_backbone(path)
        tokenizer = load_tokenizer(path)
        settings, projections = _read_modules(path)
        sentence_config = _read_json(path / "sentence_bert_config.json")
        st_config = _read_json(path / "config_sentence_transformers.json")
        limit = max_positions(backbone.config)
        length = sentence_config.get("max_seq_length") or min(tokenizer.model_max_length, limit)
        settings = EncoderSettings(
            pooling=settings.pooling,
            normalise=settings.normalise,
            max_length=min(int(length), limit),
            lower_case=bool(sentence_config.get("do_lower_case", False)),
            similarity="dot" if st_config.get("similarity_fn_name") in ("dot", "dot_score") else "cosine",
        )
        return cls(backbone, tokenizer, settings, projections, prompts=st_config.get("prompts")).eval()

    def save(self, path: str | Path, info: Mapping[str, Any] | None = None) -> None:
        """Write the directory (safetensors, fp32 as held); `info` goes into raytower.json with the fingerprint."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        self.backbone.save_pretrained(folder, safe_serialization=True)
        self.tokenizer.save_pretrained(folder)
        modules = [("0", "", "Transformer"), ("1", "1_Pooling", "Pooling")]
        width = int(self.backbone.config.hidden_size)
        pooling = {flag: mode == self.settings.pooling for flag, mode in _POOLING_FLAGS.items()}
        write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": width, **pooling})
        for module in self.projections:
            projection = cast(Projection, module)
            number = str(len(modules))
            _save_projection(projection, folder / f"{number}_Dense")
            modules.append((number, f"{number}_Dense", "Dense"))
        if self.settings.normalise:
            number = str(len(modules))
            (folder / f"{number}_Normalize").mkdir(exist_ok=True)
            modules.append((number, f"{number}_Normalize", "Normalize"))
        write_json(
            folder / "modules.json",
            [
                {"idx": index, "name": name, "path": place, "type": f"sentence_transformers.models.{kind}"}
                for index, (name, place, kind) in enumerate(modules)
            ],
        )
        write_json(
            folder / "sentence_bert_config.json",
            {"max_seq_length": self.settings.max_length, "do_lower_case": self.settings.lower_case},
        )
        write_json(
            folder / "config_sentence_transformers.json",
            {
                "prompts": self.prompts,
                "default_prompt_name": None,
                "similarity_fn_name": self.settings.similarity,
            },
        )
        write_json(folder / INFO_NAME, {**(info or {}), "fingerprint": self.compute_fingerprint()})

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, L) ids and mask (None: no padding anywhere) → (B, D) embeddings in fp32."""
        hidden_BLH = self.backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        # Pooling, projection and norm in fp32: sums over many tokens lose digits in bf16.
        with torch.autocast(device_type=hidden_BLH.device.type, enabled=False):
            vector_BD = pool(hidden_BLH.float(), attention_mask, self.settings.pooling)
            for projection in self.projections:
                vector_BD = projection(vector_BD)
            if self.settings.normalise:
                vector_BD = nn.functional.normalize(vector_BD, dim=-1)
        return vector_BD

    @property
    def dim(self) -> int:
        """D, the embedding dimension."""
        if len(self.projections):
            return cast(Projection, self.projections[-1]).linear.out_features
        return int(self.backbone.config.hidden_size)

    @property
    def max_length(self) -> int:
        """Tokens a text is cut to, special tokens counted."""
        return self.settings.max_length

    @property
    def max_positions(self) -> int:
        """Tokens the backbone has positions for."""
        return max_positions(self.backbone.config)

    @property
    def normalised(self) -> bool:
        return self.settings.normalise

    def prefix_for(self, role: Literal["query", "document"]) -> str:
        """The prompt put before a query or a document; empty where the model names none."""
        names = ("query",) if role == "query" else ("document", "passage", "corpus")
        return next((self.prompts[name] for name in names if name in self.prompts), "")

    @cached_property
    def fingerprint(self) -> str:
        """Hash over weights, tokenizer, pooling, projection and normalisation; valid while the weights rest."""
        return self.compute_fingerprint()

    def compute_fingerprint(self) -> str:
        digest = new_digest()
        weights = {name: tensor for name, tensor in self.state_dict().items() if not _is_outside_map(name)}
        hash_tensors(digest, weights)
        hash_tokenizer(digest, self.tokenizer)
        activations = [type(cast(Projection, module).activation).__name__ for module in self.projections]
        rules = (self.settings.pooling, self.settings.normalise, self.settings.lower_case, activations)
        digest.update(json.dumps(rules).encode())
        return str(digest.hexdigest())


def pool(hidden_BLH: Tensor, mask_BL: Tensor | None, mode: PoolingMode) -> Tensor:
    """Token vectors (B, L, H) to one vector a text (B, H); padded tokens (mask 0) do not count."""
    if mode == "cls":
        return hidden_BLH[:, 0]
    if mask_BL is None:
        mask_BL = hidden_BLH.new_ones(hidden_BLH.shape[:2])
    weight_BL1 = mask_BL.unsqueeze(-1).to(hidden_BLH.dtype)
    if mode == "mean":
        return (hidden_BLH * weight_BL1).sum(1) / weight_BL1.sum(1).clamp(min=1e-9)
    if mode == "max":
        return hidden_BLH.masked_fill(weight_BL1 == 0, -torch.inf).amax(1)
    last_B = mask_BL.shape[1] - 1 - mask_BL.long().flip(1).argmax(1)
    return hidden_BLH[torch.arange(len(hidden_BLH), device=hidden_BLH.device), last_B]


def _is_outside_map(name: str) -> bool:
    return name.startswith("backbone.pooler.") or name.endswith("position_ids")


def _load_backbone(path: Path) -> PreTrainedModel:
    try:
        model, report = AutoModel.from_pretrained(
            path,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise FormatError(f"model directory {str(path)!r} cannot be loaded: {error}") from error
    missing = [
        key for key in report.get("missing_keys", []) if "pooler." not in key and "position_ids" not in key
    ]
    if missing:
        raise FormatError(
            f"model directory {str(path)!r} lacks {len(missing)} weights, {sorted(missing)[0]!r} among them; "
            "its safetensors do not belong to its config.json"
        )
    return cast(PreTrainedModel, model)


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _read_modules(path: Path) -> tuple[EncoderSettings, list[Projection]]:
    file = path / "modules.json"
    if not file.is_file():
        return EncoderSettings(), []
    pooling: PoolingMode = "mean"
    normalise = False
    projections: list[Projection] = []
    for module in json.loads(file.read_text(encoding="utf-8")):
        kind = str(module["type"]).rsplit(".", 1)[-1]
        place = path / module["path"]
        if kind == "Transformer" and module["path"] == "":
            continue
        if kind == "Pooling":
            pooling = _read_pooling(place)
        elif kind == "Dense":
            projections.append(_load_projection(place))
        elif kind == "Normalize":
            normalise = True
        else:
            raise FormatError(
                f"{str(file)!r} names the module {module['type']!r}; known are Transformer (at the top), Pooling, "
                "Dense and Normalize"
            )
    return EncoderSettings(pooling=pooling, normalise=normalise), projections


def _read_pooling(place: Path) -> PoolingMode:
    config = _read_json(place / "config.json")
    modes = [config["pooling_mode"]] if "pooling_mode" in config else []
    modes = [item for mode in modes for item in ([mode] if isinstance(mode, str) else mode)]
    modes = modes or [mode for flag, mode in _POOLING_FLAGS.items() if config.get(flag)]
    other = [
        key
        for key, value in config.items()
        if key.startswith("pooling_mode_") and value and key not in _POOLING_FLAGS
    ]
    if other or len(modes) != 1 or modes[0] not in _POOLING_FLAGS.values():
        raise FormatError(
            f"{str(place)!r} asks for pooling {other + modes}; give one of {sorted(_POOLING_FLAGS.values())}"
        )
    if config.get("include_prompt") is False:
        raise FormatError(
            f"{str(place)!r} leaves the prompt out of pooling (include_prompt false), which is not supported"
        )
    return cast(PoolingMode, modes[0])


def _load_projection(place: Path) -> Projection:
    config = _read_json(place / "config.json")
    activation = str(config.get("activation_function", "torch.nn.modules.activation.Tanh")).rsplit(".", 1)[-1]
    if activation not in _ACTIVATIONS or config.get("use_residual"):
        raise FormatError(
            f"{str(place)!r}: activation {activation!r} or a residual is not known; have {sorted(_ACTIVATIONS)}"
        )
    projection = Projection(
        config["in_features"], config["out_features"], config.get("bias", True), activation
    )
    weights = place / "model.safetensors"
    if not weights.is_file():
        raise FormatError(f"{str(place)!r} has no model.safetensors (pickle is never read)")
    projection.load_state_dict(load_file(weights))
    return projection


def _save_projection(projection: Projection, place: Path) -> None:
    activation = type(projection.activation)
    place.mkdir(parents=True, exist_ok=True)
    config = {
        "in_features": projection.linear.in_features,
        "out_features": projection.linear.out_features,
        "bias": projection.linear.bias is not None,
        "activation_function": f"{activation.__module__}.{activation.__qualname__}",
    }
    write_json(place / "config.json", config)
    save_file(projection.state_dict(), place / "model.safetensors")


def read_encoder_info(path: str | Path) -> dict[str, Any]:
    """raytower.json of an encoder directory: metric history, training config, fingerprint."""
    return read_info(Path(path))
