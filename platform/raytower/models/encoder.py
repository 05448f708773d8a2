"""The two-tower encoder: backbone, pooling, optional projection, optional normalisation.

Directories have the sentence-transformers layout and load with either library.
Shape legend: B rows, L tokens, H backbone width, D embedding dimension.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModel,
    LongT5EncoderModel,
    MT5EncoderModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5EncoderModel,
    UMT5EncoderModel,
)

from raytower.errors import FormatError, InputError, RaytowerError
from raytower.models.config import PoolingMode
from raytower.models.directory import (
    INFO_NAME,
    hash_config,
    hash_tensors,
    hash_tokenizer,
    inside,
    is_cross_encoder,
    is_sequence_classifier,
    load_tokenizer,
    load_weights,
    loading,
    max_positions,
    new_digest,
    read_info,
    read_json,
    read_json_object,
    resolve_model,
    save_pretrained,
    save_tensors,
    tensor_shapes,
    transformer_folder,
    write_json,
)
from raytower.models.token_block import Padding

# Of these kinds AutoModel would take the decoder too, whose weights an encoder's directory lacks.
_ENCODERS_ALONE: dict[object, type[PreTrainedModel]] = {
    "longt5": LongT5EncoderModel,
    "mt5": MT5EncoderModel,
    "t5": T5EncoderModel,
    "umt5": UMT5EncoderModel,
}
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
# The output that the peer library pools where nothing else is said.
_KNOWN_OUTPUT = {"method": "forward", "method_output_name": "last_hidden_state"}
_MODULE_ORDER = re.compile(r"Transformer Pooling( Dense)*( Normalize)?")
# The formula of `compute_fingerprint`, which raytower.json records beside its value; the first left config.json out.
_FINGERPRINT_VERSION = 2


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
        width: int | None = None,
    ) -> None:
        """`width` is H, where it is known already; it is found by a forward pass otherwise."""
        super().__init__()
        self.width = _output_width(backbone) if width is None else width
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
    def load(
        cls, name: str | Path, *, from_classifier: bool = False, pooling: PoolingMode | None = None
    ) -> Encoder:
        """Load a sentence-transformers directory, a plain Hugging Face encoder (normalised), or a hub id.

        Args:
            name: a directory, a hub id or a storage URI.
            from_classifier: take a reranker or classifier too, whose transformer an encoder may be trained from.
            pooling: of a plain directory; None is mean. A sentence-transformers directory brings its own.

        Raises:
            InputError: no such model, or `pooling` is not that of the directory.
            FormatError: no safetensors weights, weights that do not fit the config, a module this class lacks, or a
                reranker or classifier, whose vectors mean nothing.
        """
        path = resolve_model(str(name))
        body = transformer_folder(path)
        if not from_classifier:
            _refuse_classifier(path)
        backbone = _load_backbone(body)
        tokenizer = load_tokenizer(body, backbone.config)
        with loading(body, "a forward pass of its backbone"):
            width = _output_width(backbone)
        is_for_pairs = is_cross_encoder(path)
        own_pooling, normalise, projections = (None, True, []) if is_for_pairs else _read_modules(path, width)
        if own_pooling is not None and pooling not in (None, own_pooling):
            raise InputError(
                f"pooling is {pooling!r}, and model {str(name)!r} brings its own, {own_pooling!r}, which its vectors "
                "were trained for; leave pooling out, or give a plain Hugging Face directory"
            )
        sentence_file = _sentence_file(body)
        sentence_config = {} if is_for_pairs else read_json_object(sentence_file)
        _refuse_other_output(sentence_file, sentence_config)
        st_config = {} if is_for_pairs else read_json_object(path / "config_sentence_transformers.json")
        limit = max_positions(backbone.config)
        length = sentence_config.get("max_seq_length") or min(tokenizer.model_max_length, limit)
        if not isinstance(length, int) or length < 1:
            raise FormatError(
                f"{str(sentence_file)!r} has max_seq_length {length!r}; it must be a whole number "
                "of tokens, at least 1"
            )
        settings = EncoderSettings(
            pooling=own_pooling or pooling or "mean",
            normalise=normalise,
            max_length=min(length, limit),
            lower_case=bool(sentence_config.get("do_lower_case", False)),
            similarity="dot" if st_config.get("similarity_fn_name") in ("dot", "dot_score") else "cosine",
        )
        prompts = _read_prompts(path, st_config)
        return cls(backbone, tokenizer, settings, projections, prompts=prompts, width=width).eval()

    def save(self, path: str | Path, info: Mapping[str, Any] | None = None) -> None:
        """Write the directory (safetensors, fp32 as held); `info` goes into raytower.json with the fingerprint."""
        folder = Path(path)
        save_pretrained(self.backbone, self.tokenizer, folder)
        modules = [("0", "", "Transformer"), ("1", "1_Pooling", "Pooling")]
        pooling = {flag: mode == self.settings.pooling for flag, mode in _POOLING_FLAGS.items()}
        write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": self.width, **pooling})
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
        made = {"fingerprint": self.compute_fingerprint(), "fingerprint_version": _FINGERPRINT_VERSION}
        write_json(folder / INFO_NAME, {**(info or {}), **made})

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
        return self.width

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

    @property
    def padding(self) -> Padding:
        """How its batches are filled up: on the right, whatever its tokenizer would do; pooling goes by the mask."""
        return Padding(int(cast(int, self.tokenizer.pad_token_id)))

    def prepared(self, texts: Sequence[str], prefix: str = "") -> list[str]:
        """What the tokenizer is given: each text behind its prefix, in lower case where the directory says so."""
        joined = [prefix + text for text in texts] if prefix else list(texts)
        return [text.lower() for text in joined] if self.settings.lower_case else joined

    def prefix_for(self, role: Literal["query", "document"]) -> str:
        """The prompt put before a query or a document; empty where the model names none."""
        names = ("query",) if role == "query" else ("document", "passage", "corpus")
        return next((self.prompts[name] for name in names if name in self.prompts), "")

    @cached_property
    def fingerprint(self) -> str:
        """Hash over all that maps a string to a vector; valid while the weights rest."""
        return self.compute_fingerprint()

    @cached_property
    def former_fingerprint(self) -> str:
        """The fingerprint by the first formula, by which older folders and indexes name the same encoder."""
        return str(self._digest().hexdigest())

    def compute_fingerprint(self) -> str:
        """Over weights, config.json, tokenizer, pooling, projections and normalisation, not over names or versions."""
        digest = self._digest()
        hash_config(digest, self.backbone.config)
        return str(digest.hexdigest())

    def _digest(self) -> Any:
        digest = new_digest()
        weights = {name: tensor for name, tensor in self.state_dict().items() if not _is_outside_map(name)}
        hash_tensors(digest, weights)
        hash_tokenizer(digest, self.tokenizer)
        activations = [type(cast(Projection, module).activation).__name__ for module in self.projections]
        rules = (self.settings.pooling, self.settings.normalise, self.settings.lower_case, activations)
        digest.update(json.dumps(rules).encode())
        return digest


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


def _refuse_classifier(path: Path) -> None:
    names = read_json_object(transformer_folder(path) / "config.json").get("architectures") or []
    is_headed = any(is_sequence_classifier(str(name)) for name in names)
    if is_cross_encoder(path) or (is_headed and not (path / "modules.json").is_file()):
        raise FormatError(
            f"{str(path)!r} is a {', '.join(map(str, names))}, a reranker or a classifier; as an encoder it would lose "
            "its head and give vectors that it was never trained for: name an encoder, or train one of it with "
            "`raytower train-retriever`"
        )


def _load_backbone(path: Path) -> PreTrainedModel:
    kind = _ENCODERS_ALONE.get(read_json_object(path / "config.json").get("model_type"), AutoModel)
    model, lacking = load_weights(kind, path, "its backbone")
    missing = [key for key in lacking if "pooler." not in key]
    if missing:
        raise FormatError(
            f"model directory {str(path)!r} lacks {len(missing)} weights, {missing[0]!r} among them; "
            "its safetensors do not belong to its config.json"
        )
    return model


def _output_width(backbone: PreTrainedModel) -> int:
    """H: the length of the vectors that the backbone gives for one token.

    Configs say it under many names, those made of several under none, and some project what they call hidden size.
    """
    was_training = backbone.training
    token_11 = torch.zeros(1, 1, dtype=torch.long, device=backbone.device)
    with torch.no_grad():
        hidden_11H = backbone.eval()(input_ids=token_11).last_hidden_state
    backbone.train(was_training)
    return int(hidden_11H.shape[-1])


def _sentence_file(folder: Path) -> Path:
    """Settings of the Transformer module; older directories name the file after the kind of backbone."""
    named = folder / "sentence_bert_config.json"
    other = sorted(folder.glob("sentence_*_config.json"))
    return other[0] if other and not named.is_file() else named


def _refuse_other_output(file: Path, config: Mapping[str, Any]) -> None:
    """Pooling is over the backbone's last hidden state; a directory may say that it takes another output."""
    modalities = config.get("modality_config") or {}
    text = modalities.get("text", _KNOWN_OUTPUT) if isinstance(modalities, dict) else modalities
    stated = {
        "transformer_task": config.get("transformer_task") or "feature-extraction",
        "modality_config of text": text,
        "module_output_name": config.get("module_output_name") or "token_embeddings",
    }
    known = {
        "transformer_task": "feature-extraction",
        "modality_config of text": _KNOWN_OUTPUT,
        "module_output_name": "token_embeddings",
    }
    other = {key: value for key, value in stated.items() if value != known[key]}
    if isinstance(modalities, dict) and "message" in modalities:
        other["modality_config"] = "message (a chat template)"
    if other:
        raise FormatError(
            f"{str(file)!r} has {', '.join(f'{key} {value!r}' for key, value in other.items())}; known is pooling over "
            f"the transformer's last hidden state: {known}"
        )


def _read_prompts(path: Path, config: Mapping[str, Any]) -> dict[str, str]:
    prompts = config.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(isinstance(text, str) for text in prompts.values()):
        raise FormatError(
            f"{str(path / 'config_sentence_transformers.json')!r} has prompts {prompts!r}; they must be an object of "
            "names and texts"
        )
    return prompts


def _read_modules(path: Path, width: int) -> tuple[PoolingMode | None, bool, list[Projection]]:
    """Pooling (None of a plain directory), whether vectors are normalised, and projections of a backbone of `width`."""
    file = path / "modules.json"
    if not file.is_file():
        return None, True, []
    modules = read_json(file)
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise FormatError(f"{str(file)!r} must hold a list of modules, each an object with type and path")
    pooling: PoolingMode = "mean"
    projections: list[Projection] = []
    kinds: list[str] = []
    for module in modules:
        kind = str(module.get("type")).rsplit(".", 1)[-1]
        place = inside(path, module.get("path"), file)
        kinds.append(kind)
        if kind == "Pooling":
            pooling = _read_pooling(place)
        elif kind == "Dense":
            projections.append(_load_projection(place, width))
            width = projections[-1].linear.out_features
        elif kind not in ("Transformer", "Normalize") or (
            kind == "Transformer" and place != transformer_folder(path)
        ):
            raise FormatError(
                f"{str(file)!r} names the module {module.get('type')!r} in {module['path']!r}; known are Transformer "
                "(at the top, or first in a folder of its own), Pooling, Dense and Normalize"
            )
    if not _MODULE_ORDER.fullmatch(" ".join(kinds)):
        raise FormatError(
            f"{str(file)!r} has the modules {', '.join(kinds)}; known is the order Transformer, Pooling, any number of "
            "Dense, and Normalize last or not at all"
        )
    return pooling, "Normalize" in kinds, projections


def _read_pooling(place: Path) -> PoolingMode:
    config = read_json_object(place / "config.json")
    stated = config.get("pooling_mode", [])
    modes = stated if isinstance(stated, list) else [stated]
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


def _load_projection(place: Path, width: int) -> Projection:
    config = read_json_object(place / "config.json")
    activation = str(config.get("activation_function", "torch.nn.modules.activation.Tanh")).rsplit(".", 1)[-1]
    if activation not in _ACTIVATIONS or config.get("use_residual"):
        raise FormatError(
            f"{str(place)!r}: activation {activation!r} or a residual is not known; have {sorted(_ACTIVATIONS)}"
        )
    file = place / "model.safetensors"
    if not file.is_file():
        raise FormatError(f"{str(place)!r} has no model.safetensors (pickle is never read)")
    # Compared before anything of these sizes is made: a config may ask for more memory than there is.
    shapes = tensor_shapes(file)
    bias = bool(config.get("bias", True))
    out, bias = config.get("out_features"), bool(config.get("bias", True))
    wanted = {"linear.weight": (out, width), **({"linear.bias": (out,)} if bias else {})}
    if not isinstance(out, int) or config.get("in_features") != width or shapes != wanted:
        raise FormatError(
            f"{str(place)!r} has in_features {config.get('in_features')!r}, out_features {out!r} and bias {bias}; its "
            f"weights are {shapes}, and {width} values come in"
        )
    projection = Projection(width, out, bias, activation)
    with loading(place, "its projection"):
        projection.load_state_dict(load_file(file))
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
    save_tensors(projection.state_dict(), place / "model.safetensors")


def former_words(fingerprint: str, name: str) -> str:
    """What to add to a message about a fingerprint that is not the encoder's: whether an older formula gave it."""
    try:
        is_former = Encoder.load(name).former_fingerprint == fingerprint
    except RaytowerError:  # the message is about something else
        return ""
    return (
        "; by the older formula, which left config.json out, it is that of this encoder: its vectors were made by an "
        "older version of raytower and have to be encoded again"
        if is_former
        else ""
    )


def read_encoder_info(path: str | Path) -> dict[str, Any]:
    """raytower.json of an encoder directory: metric history, training config, and the fingerprint if it is today's."""
    info = read_info(Path(path))
    if info.get("fingerprint_version") != _FINGERPRINT_VERSION:
        info.pop("fingerprint", None)
    return info
