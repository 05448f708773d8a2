"""The two-tower encoder: backbone, pooling, optional projection, optional normalisation.

Directories have the sentence-transformers layout and load with either library.
Shape legend: B rows, L tokens, H backbone width, D embedding dimension.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModel,
    LongT5EncoderModel,
    MT5EncoderModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    T5EncoderModel,
    UMT5EncoderModel,
)

from raytower.errors import FormatError, InputError, RaytowerError
from raytower.models.config import PoolingMode
from raytower.models.directory import (
    INFO_NAME,
    digest_of,
    hash_config,
    is_cross_encoder,
    is_static,
    load_tokenizer,
    load_weights,
    loading,
    max_positions,
    read_info,
    read_json_object,
    resolve_model,
    save_pretrained,
    save_tensors,
    tensor_shapes,
    transformer_folder,
    write_json,
)
from raytower.models.library_modules import (
    LibraryModules,
    ListedModule,
    read_modules_file,
    write_modules_file,
)
from raytower.models.model_class import refuse_other_class
from raytower.models.static_embedding import StaticBackbone, load_static, save_static
from raytower.models.token_block import Padding, TokenBlock
from raytower.models.tokenising import tokenise
from raytower.models.unpadded import run_laid_out

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
# The settings of a Transformer module whose vector is what BERT's pooler gives, with no Pooling behind it.
_POOLER_SETTINGS = {
    "transformer_task": "feature-extraction",
    "modality_config": {"text": {"method": "forward", "method_output_name": "pooler_output"}},
    "module_output_name": "sentence_embedding",
}
# In this order, and with settings of `_is_plain`, modules are computed here; the library carries all others.
_STATIC_ORDER = re.compile(r"(Dense ?)*(Normalize)?")
_PLAIN_ORDER = re.compile(r"Pooling( Dense)*( Normalize)?")
# Hub ids, and the folders of a cache, of which the peer library knows what their files do not say.
_POOLED_WITHOUT_PROMPT = re.compile(r"hkunlp(/|--)instructor-(base|large|xl)(?![\w.-])")
# The formula of `compute_fingerprint`, which raytower.json records beside its value; the first left config.json out.
_FINGERPRINT_VERSION = 2
_SENTENCE_NAME = "sentence_bert_config.json"
_ST_NAME = "config_sentence_transformers.json"


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
    include_prompt: bool = True
    """Whether a prompt's tokens are pooled like others; INSTRUCTOR's are not. Counts only without `library`."""
    normalise: bool = True
    max_length: int = 256
    lower_case: bool = False
    similarity: Literal["cosine", "dot"] = "cosine"
    truncate_dim: int | None = None
    """Vectors keep their first so many values, as the directory asks; they are not of unit length then."""


@dataclass(frozen=True, kw_only=True)
class Head:
    """What follows the backbone: what is computed here, or `library` modules."""

    pooling: PoolingMode | None = None
    """None of a plain Hugging Face directory, which names none."""
    include_prompt: bool = True
    projections: tuple[Projection, ...] = ()
    normalise: bool = True
    library: LibraryModules | None = None


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
        library: LibraryModules | None = None,
        files: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """An encoder of its parts.

        Args:
            backbone: the transformer.
            tokenizer: its tokenizer.
            settings: pooling counts only without `library`.
            projections: what pooled vectors pass.
            prompts: texts put before others, by name.
            width: H, where it is known already; it is found by a forward pass otherwise.
            library: modules in place of pooling and projections.
            files: settings files of the directory by name; keys that are not known here survive saving.
        """
        super().__init__()
        self.output_name = "pooler_output" if settings.pooling == "pooler" else "last_hidden_state"
        """What of the backbone's output vectors are made from."""
        self.first_position = 0
        """What the backbone counts positions from; only of texts that are laid end to end it has to be known."""
        self.width = _output_width(backbone) if width is None else width
        self.backbone = backbone
        self.projections = nn.ModuleList(projections or [])
        self.library = library
        self.tokenizer = tokenizer
        self.settings = settings
        self.prompts = dict(prompts or {})
        self._files = dict(files or {})
        self._library_dim = None if library is None else library.dim_after(self.width)
        # Elsewhere the pooler is not part of the map from string to vector: no gradient, no place in the hash.
        if settings.pooling != "pooler":
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
            refuse_other_class(path, "encoder")
        backbone: PreTrainedModel
        tokenizer: PreTrainedTokenizerBase
        by_pooler = _asks_for_pooler(_sentence_file(body))
        if is_static(path):
            backbone, tokenizer = load_static(body)
        else:
            backbone = _load_backbone(body, with_pooler=by_pooler or pooling == "pooler")
            tokenizer = load_tokenizer(body, backbone.config)
        with loading(body, "a forward pass of its backbone"):
            width = _output_width(backbone)
        # Modules, prompts and length of a cross-encoder are for pairs of texts.
        head = Head() if is_cross_encoder(path) else _read_head(path, width, by_pooler=by_pooler)
        _refuse_other_pooling(str(name), pooling, head)
        if head.pooling is not None and _POOLED_WITHOUT_PROMPT.search(f"{name} {path}"):
            head = replace(head, include_prompt=False)
        settings, prompts, files = _read_settings(path, backbone, tokenizer, head, pooling)
        return cls(
            backbone,
            tokenizer,
            settings,
            list(head.projections),
            prompts=prompts,
            width=width,
            library=head.library,
            files=files,
        ).eval()

    def save(self, path: str | Path, info: Mapping[str, Any] | None = None) -> None:
        """Write the directory (safetensors, fp32 as held); `info` goes into raytower.json with the fingerprint."""
        folder = Path(path)
        sentence: dict[str, Any]
        sentence = {"max_seq_length": self.settings.max_length, "do_lower_case": self.settings.lower_case}
        if isinstance(self.backbone, StaticBackbone):
            save_static(self.backbone, cast(PreTrainedTokenizerFast, self.tokenizer), folder)
            entries = [("", "StaticEmbedding"), *self._save_projections(folder, first=1)]
        else:
            save_pretrained(self.backbone, self.tokenizer, folder)
            entries = [("", "Transformer"), *self._save_head(folder)]
            sentence |= _POOLER_SETTINGS if self.settings.pooling == "pooler" else {}
        if self.settings.normalise:
            entries.append((f"{len(entries)}_Normalize", "Normalize"))
            (folder / entries[-1][0]).mkdir(exist_ok=True)
        write_modules_file(folder, entries)
        write_json(folder / _SENTENCE_NAME, {**self._files.get(_SENTENCE_NAME, {}), **sentence})
        library = {
            "default_prompt_name": None,
            **self._files.get(_ST_NAME, {}),
            "prompts": self.prompts,
            "similarity_fn_name": self.settings.similarity,
        }
        write_json(folder / _ST_NAME, library)
        made = {"fingerprint": self.compute_fingerprint(), "fingerprint_version": _FINGERPRINT_VERSION}
        write_json(folder / INFO_NAME, {**(info or {}), **made})

    def _save_head(self, folder: Path) -> list[tuple[str, str]]:
        """Write what lies between the backbone and Normalize; place and type of each module, for modules.json."""
        if self.library is not None:
            return self.library.save(folder, first=1)
        if self.settings.pooling == "pooler":
            return self._save_projections(folder, first=1)
        pooling = {flag: mode == self.settings.pooling for flag, mode in _POOLING_FLAGS.items()}
        prompt = {} if self.settings.include_prompt else {"include_prompt": False}
        write_json(
            folder / "1_Pooling" / "config.json",
            {"word_embedding_dimension": self.width, **pooling, **prompt},
        )
        return [("1_Pooling", "Pooling"), *self._save_projections(folder, first=2)]

    def _save_projections(self, folder: Path, first: int) -> list[tuple[str, str]]:
        entries = []
        for number, module in enumerate(self.projections, first):
            entries.append((f"{number}_Dense", "Dense"))
            _save_projection(cast(Projection, module), folder / entries[-1][0])
        return entries

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        unpooled: Tensor | None = None,
        places: Tensor | None = None,
        starts: Tensor | None = None,
    ) -> Tensor:
        """(B, L) ids and mask (None: no padding anywhere) → (B, D) embeddings in fp32.

        `unpooled` (B,) says how many of each row's first tokens pooling leaves out; None: none. `places` and `starts`
        have texts laid end to end for the backbone; see `run_laid_out`.
        """
        if places is None or starts is None:
            output = self.backbone(input_ids=input_ids, attention_mask=attention_mask)
            hidden = getattr(output, self.output_name).float()
        else:
            hidden = run_laid_out(self.backbone, input_ids, places, starts, self.first_position).float()
        # Pooling, projection and norm in fp32: sums over many tokens lose digits in bf16.
        with torch.autocast(device_type=hidden.device.type, enabled=False):
            if self.library is None:
                vector_BD = pool(hidden, attention_mask, self.settings.pooling, unpooled)
                for projection in self.projections:
                    vector_BD = projection(vector_BD)
            else:
                vector_BD = self.library(hidden, attention_mask, input_ids, unpooled)
            if self.settings.normalise:
                vector_BD = nn.functional.normalize(vector_BD, dim=-1)
        return vector_BD[:, : self.settings.truncate_dim]

    @property
    def dim(self) -> int:
        """D, the embedding dimension."""
        dim = self.width if self._library_dim is None else self._library_dim
        if len(self.projections):
            dim = cast(Projection, self.projections[-1]).linear.out_features
        return dim if self.settings.truncate_dim is None else min(dim, self.settings.truncate_dim)

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
        """Whether vectors are of unit length."""
        unit = self.settings.normalise or (self.library is not None and self.library.normalised)
        return unit and self.settings.truncate_dim is None

    @property
    def padding(self) -> Padding:
        """How its batches are filled up: on the right, whatever its tokenizer would do; pooling goes by the mask."""
        return Padding(int(cast(int, self.tokenizer.pad_token_id)))

    def tokenise(
        self, texts: Sequence[str], max_length: int, prefix: str | Sequence[str] = "", *, start: int = 0
    ) -> TokenBlock:
        """Token ids of the texts behind `prefix`, or each behind its own, cut to `max_length`.

        `start` is the first one's number, for messages.

        Raises:
            InputError: as `tokenising.tokenise`.
        """
        block = tokenise(self.tokenizer, [self.prepared(texts, prefix)], max_length, start=start)
        prefixes = [prefix] * len(block) if isinstance(prefix, str) else prefix
        if not any(prefixes) or self._pools_prompt:
            return block
        lengths = {each: self._prompt_length(each, max_length) if each else 0 for each in set(prefixes)}
        return replace(block, unpooled=np.array([lengths[each] for each in prefixes], np.int64))

    @property
    def _pools_prompt(self) -> bool:
        return self.settings.include_prompt if self.library is None else self.library.pools_prompt

    def _prompt_length(self, prefix: str, max_length: int) -> int:
        """Tokens of a prompt as the peer library counts them: alone, with the special tokens before it.

        Where its end and a text's beginning make one token, that is one more or less than the prompt has in the text.
        """
        ids = tokenise(self.tokenizer, [self.prepared([""], prefix)], max_length).ids.tolist()
        return len(ids) - bool(ids and ids[-1] in self.tokenizer.all_special_ids)

    def prepared(self, texts: Sequence[str], prefix: str | Sequence[str] = "") -> list[str]:
        """What the tokenizer is given: each text behind its prefix, in lower case where the directory says so."""
        if not isinstance(prefix, str):
            joined = [own + text for own, text in zip(prefix, texts, strict=True)]
        else:
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
        unread = () if self.settings.pooling == "pooler" else ("backbone.pooler.",)
        weights = {name: tensor for name, tensor in self.state_dict().items() if not name.startswith(unread)}
        digest = digest_of(weights, self.tokenizer)
        activations = [type(cast(Projection, module).activation).__name__ for module in self.projections]
        rules: tuple[object, ...]
        rules = (self.settings.pooling, self.settings.normalise, self.settings.lower_case, activations)
        # Named where they are there, so that all others keep the fingerprints that indexes know.
        if self.library is not None:
            rules += (self.library.rules,)
        if self.settings.truncate_dim is not None:
            rules += ({"truncate_dim": self.settings.truncate_dim},)
        if not self.settings.include_prompt:
            rules += ({"include_prompt": False},)
        digest.update(json.dumps(rules).encode())
        return digest


def pool(
    hidden_BLH: Tensor, mask_BL: Tensor | None, mode: PoolingMode, unpooled_B: Tensor | None = None
) -> Tensor:
    """Token vectors (B, L, H) to one vector a text (B, H); padded tokens (mask 0) do not count.

    Nor do the first `unpooled_B` (B,) tokens of each row, its prompt: as in the peer library, cls is then the first
    token behind it, and the mean of a text that was cut to nothing but its prompt is 0.

    What BERT's pooler gives, (B, H), is one vector a text already.
    """
    if mode == "pooler":
        return hidden_BLH
    if mode == "cls" and unpooled_B is None:
        return hidden_BLH[:, 0]
    if mask_BL is None:
        mask_BL = hidden_BLH.new_ones(hidden_BLH.shape[:2])
    if unpooled_B is not None:
        position_L = torch.arange(mask_BL.shape[1], device=mask_BL.device)
        mask_BL = mask_BL * (position_L >= unpooled_B.unsqueeze(1))
    rows_B = torch.arange(len(hidden_BLH), device=hidden_BLH.device)
    if mode == "cls":
        return hidden_BLH[rows_B, mask_BL.argmax(1)]
    weight_BL1 = mask_BL.unsqueeze(-1).to(hidden_BLH.dtype)
    if mode == "mean":
        return (hidden_BLH * weight_BL1).sum(1) / weight_BL1.sum(1).clamp(min=1e-9)
    if mode == "max":
        return hidden_BLH.masked_fill(weight_BL1 == 0, -torch.inf).amax(1)
    last_B = mask_BL.shape[1] - 1 - mask_BL.long().flip(1).argmax(1)
    return hidden_BLH[rows_B, last_B] * weight_BL1[rows_B, last_B]


def _load_backbone(path: Path, *, with_pooler: bool) -> PreTrainedModel:
    kind = _ENCODERS_ALONE.get(read_json_object(path / "config.json").get("model_type"), AutoModel)
    model, lacking = load_weights(kind, path, "its backbone")
    if with_pooler and getattr(model, "pooler", None) is None:
        raise FormatError(
            f"model directory {str(path)!r} is to give vectors by its pooler, and a {type(model).__name__} has none; "
            "choose another pooling"
        )
    missing = [key for key in lacking if with_pooler or "pooler." not in key]
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


def _read_settings(
    path: Path,
    backbone: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    head: Head,
    pooling: PoolingMode | None,
) -> tuple[EncoderSettings, dict[str, str], dict[str, dict[str, Any]]]:
    """What the directory's settings files say: settings, prompts, and both files whole, by name."""
    sentence_file = _sentence_file(transformer_folder(path))
    is_for_pairs = is_cross_encoder(path)
    sentence_config = {} if is_for_pairs else read_json_object(sentence_file)
    _refuse_other_output(sentence_file, sentence_config)
    st_file = path / _ST_NAME
    st_config = {} if is_for_pairs else read_json_object(st_file)
    if (kind := st_config.get("model_type", "SentenceTransformer")) != "SentenceTransformer":
        raise FormatError(f"{str(st_file)!r} says that this is a {kind}; an encoder is a SentenceTransformer")
    limit = max_positions(backbone.config)
    length = sentence_config.get("max_seq_length") or min(tokenizer.model_max_length, limit)
    if not isinstance(length, int) or length < 1:
        raise FormatError(
            f"{str(sentence_file)!r} has max_seq_length {length!r}; it must be a whole number of tokens, at least 1"
        )
    settings = EncoderSettings(
        pooling=head.pooling or pooling or "mean",
        include_prompt=head.include_prompt,
        normalise=head.normalise,
        max_length=min(length, limit),
        lower_case=bool(sentence_config.get("do_lower_case", False)),
        similarity=_read_similarity(st_file, st_config),
        truncate_dim=_read_truncate_dim(st_file, st_config),
    )
    return settings, _read_prompts(st_file, st_config), {_SENTENCE_NAME: sentence_config, _ST_NAME: st_config}


def _sentence_file(folder: Path) -> Path:
    """Settings of the Transformer module; older directories name the file after the kind of backbone."""
    named = folder / _SENTENCE_NAME
    other = sorted(folder.glob("sentence_*_config.json"))
    return other[0] if other and not named.is_file() else named


def _asks_for_pooler(file: Path) -> bool:
    """Whether the Transformer's settings take BERT's pooler for the text's vector."""
    config = {"transformer_task": "feature-extraction", **read_json_object(file)}
    return all(config.get(key) == value for key, value in _POOLER_SETTINGS.items())


def _refuse_other_output(file: Path, config: Mapping[str, Any]) -> None:
    """Vectors come of the backbone's last hidden state or its pooler; a directory may ask for another output."""
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
    for place, values in (config.get("processing_kwargs") or {}).items():
        # Texts are padded and cut here by themselves.
        if place in ("common", "text") and set(values) - {
            "padding",
            "padding_side",
            "truncation",
            "return_tensors",
        }:
            other[f"processing_kwargs of {place}"] = values
    if _asks_for_pooler(file):
        other = {key: value for key, value in other.items() if key not in known}
    if other:
        raise FormatError(
            f"{str(file)!r} has {', '.join(f'{key} {value!r}' for key, value in other.items())}; known is pooling over "
            f"the transformer's last hidden state: {known}, and the pooler's output: {_POOLER_SETTINGS}"
        )


def _read_prompts(file: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The prompts by name. As in the library, the default one is for texts that are neither queries nor documents."""
    prompts = config.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(isinstance(text, str) for text in prompts.values()):
        raise FormatError(f"{str(file)!r} has prompts {prompts!r}; they must be an object of names and texts")
    default = config.get("default_prompt_name")
    if default is not None and default not in (*prompts, "query", "document"):
        raise FormatError(
            f"{str(file)!r} has default_prompt_name {default!r}, and its prompts are {sorted(prompts)}"
        )
    return prompts


def _read_similarity(file: Path, config: Mapping[str, Any]) -> Literal["cosine", "dot"]:
    stated = config.get("similarity_fn_name")
    if stated in (None, "cosine"):
        return "cosine"
    if stated in ("dot", "dot_score"):
        return "dot"
    raise FormatError(
        f"{str(file)!r} has similarity_fn_name {stated!r}; vectors are compared by cosine or dot here: an index would "
        "rank by another measure than the model was trained for"
    )


def _read_truncate_dim(file: Path, config: Mapping[str, Any]) -> int | None:
    stated = config.get("truncate_dim")
    if stated is not None and (type(stated) is not int or stated < 1):
        raise FormatError(
            f"{str(file)!r} has truncate_dim {stated!r}; it must be a whole number of dimensions, at least 1, or null"
        )
    return stated


def _read_head(path: Path, width: int, *, by_pooler: bool) -> Head:
    """What modules.json says of the modules behind a backbone of `width`, whose pooler may give the text's vector."""
    file = path / "modules.json"
    listed = read_modules_file(path)
    if listed is None:
        return Head()
    static = is_static(path)
    if not static and (
        not listed or listed[0].kind != "Transformer" or listed[0].place != transformer_folder(path)
    ):
        first = f"{listed[0].type!r} in {str(listed[0].place)!r}" if listed else "nothing"
        raise FormatError(
            f"{str(file)!r} begins with {first}; known is a Transformer (at the top, or first in a folder of its own)"
        )
    behind = listed[1:]
    kinds = [module.kind for module in behind]
    if (static or by_pooler) and not (
        _STATIC_ORDER.fullmatch(" ".join(kinds)) and all(map(_is_plain, behind))
    ):
        raise FormatError(
            f"{str(file)!r} lists {', '.join(kinds)} behind a {listed[0].kind} that gives one vector a text; known are "
            "Dense, and Normalize last"
        )
    if not (static or by_pooler or kinds):
        raise FormatError(
            f"{str(file)!r} lists a Transformer alone, which gives a vector a token; a module that makes one vector of "
            "a text, such as Pooling, has to follow"
        )
    if not (static or by_pooler) and not (
        _PLAIN_ORDER.fullmatch(" ".join(kinds)) and all(map(_is_plain, behind))
    ):
        library = LibraryModules.load(behind, file)
        with loading(path, f"a pass through its modules {', '.join(kinds)}"):
            library.dim_after(width)
        return Head(library=library, normalise=False)
    projections: list[Projection] = []
    for module in behind:
        if module.kind == "Dense":
            projections.append(_load_projection(module.place, width))
            width = projections[-1].linear.out_features
    pooling: PoolingMode = "pooler" if by_pooler else "mean"
    include_prompt = True
    if not (static or by_pooler):
        pooling, include_prompt = _read_pooling(behind[0])
    return Head(
        pooling=pooling,
        include_prompt=include_prompt,
        projections=tuple(projections),
        normalise="Normalize" in kinds,
    )


def _refuse_other_pooling(name: str, asked: PoolingMode | None, head: Head) -> None:
    own = ", ".join(head.library.types) if head.library else repr(head.pooling)
    if asked is not None and (head.library or head.pooling not in (None, asked)):
        raise InputError(
            f"pooling is {asked!r}, and model {name!r} brings its own, {own}, which its vectors were trained for; "
            "leave pooling out, or give a plain Hugging Face directory"
        )


def _is_plain(module: ListedModule) -> bool:
    """Whether a Pooling, Dense or Normalize computes what is computed here."""
    settings = module.settings()
    if module.kind == "Pooling":
        modes = _pooling_modes(settings)
        return len(modes) == 1 and modes[0] in _POOLING_FLAGS.values()
    known = "sentence_embedding"
    places = {settings.get(f"module_{end}_name") or known for end in ("input", "output")}
    if module.kind == "Dense":
        return (
            places == {known} and not settings.get("use_residual") and _activation(settings) in _ACTIVATIONS
        )
    return places == {known}


def _pooling_modes(settings: Mapping[str, Any]) -> list[str]:
    stated = settings.get("pooling_mode", [])
    modes = stated if isinstance(stated, list) else [stated]
    flags = [key for key, value in settings.items() if key.startswith("pooling_mode_") and value]
    return modes or [_POOLING_FLAGS.get(flag, flag) for flag in flags]


def _activation(settings: Mapping[str, Any]) -> str:
    """The name of a Dense module's activation where it is one of torch, else its dotted name."""
    named = str(settings.get("activation_function", "torch.nn.modules.activation.Tanh"))
    return named.rsplit(".", 1)[-1] if named.startswith("torch.nn.") else named


def _read_pooling(module: ListedModule) -> tuple[PoolingMode, bool]:
    """Its mode, and whether a prompt's tokens are pooled."""
    settings = module.settings()
    return cast(PoolingMode, _pooling_modes(settings)[0]), settings.get("include_prompt", True) is not False


def _load_projection(place: Path, width: int) -> Projection:
    config = read_json_object(place / "config.json")
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
    projection = Projection(width, out, bias, _activation(config))
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
