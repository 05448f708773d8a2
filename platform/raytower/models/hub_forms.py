"""Configs of models that were published with code of their own, for what is a class of transformers by now.

Such a config.json names Python files of its repository in `auto_map`, which are never run. transformers' class of the
same architecture takes the weights under the names that they were published with (its conversion mapping); its
config has other keys. `native_config` writes them, and refuses by name whatever that class does not compute.

Sources: "mGTE: Generalized Long-Context Text Representation and Reranking Models" (2024) for `new` and `gte`; "Nomic
Embed: Training a Reproducible Long Context Text Embedder" (2024) for `nomic_bert`; https://kexue.fm/archives/9706 for
the scaling of rotary positions by NTK.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import Any

from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, model_type_to_module_name
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from raytower.errors import FormatError
from raytower.progress import log

Values = Mapping[str, Any]
# Keys that say nothing of what is computed: of any config, and of what generates text.
_ANYWHERE = frozenset(
    {
        "_name_or_path",
        "architectures",
        "auto_map",
        "chunk_size_feed_forward",
        "dtype",
        "finetuning_task",
        "gradient_checkpointing",
        "id2label",
        "label2id",
        "matryoshka_dimensions",
        "model_type",
        "num_labels",
        "output_attentions",
        "output_hidden_states",
        "problem_type",
        "return_dict",
        "sbert_ce_default_activation_function",
        "sentence_transformers",
        "tie_word_embeddings",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)


@dataclass(frozen=True, kw_only=True)
class _Form:
    """How a config of a repository's own becomes one of transformers."""

    kind: str
    """`model_type` of transformers' class."""
    heads: tuple[str, str]
    """What names in `architectures` begin with, there and in transformers."""
    rope: Callable[[Values], dict[str, Any]]
    """The rotary positions; raises ValueError with what is not known."""
    rope_keys: frozenset[str]
    """What `rope` reads."""
    renamed: Values = field(default_factory=dict)
    """Keys, and what transformers calls them."""
    needed: frozenset[str] = frozenset()
    """Keys without which the config says too little."""
    defaults: Values = field(default_factory=dict)
    """What the repository's class takes for keys that are not there, by transformers' names."""
    fixed: Values = field(default_factory=dict)
    """The one value of a key that transformers' class computes; that of the repository's class too where not needed."""
    unheeded: frozenset[str] = frozenset()
    """Keys of speed, memory and training that change no vector."""


def _gte_rope(config: Values) -> dict[str, Any]:
    stated = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    theta = float(stated.pop("rope_theta", config.get("rope_theta", 10_000.0)))
    kinds = {stated.pop("type", None), stated.pop("rope_type", None)} - {None}
    factor, mixed = stated.pop("factor", None), stated.pop("mixed_b", None)
    if kinds <= {"default"} and factor is None and mixed is None and not stated:
        return {"rope_type": "default", "rope_theta": theta}
    if kinds != {"ntk"} or not isinstance(factor, int | float) or factor < 1 or mixed is not None or stated:
        raise ValueError("rope_scaling")
    # Fixed NTK: the frequency of pair i is (factor * theta)^(-2i/d) / factor^(2/d), over all positions.
    width = int(config.get("hidden_size", 768)) // int(config.get("num_attention_heads", 12))
    return {
        "rope_type": "linear",
        "rope_theta": theta * factor,
        "factor": float(factor) ** (2 / width),
    }


def _nomic_rope(config: Values) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": float(config["rotary_emb_base"])}


_GTE = _Form(
    kind="gte",
    heads=("New", "Gte"),
    rope=_gte_rope,
    rope_keys=frozenset({"rope_parameters", "rope_scaling", "rope_theta"}),
    defaults={
        "attention_probs_dropout_prob": 0.0,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": 768,
        "initializer_range": 0.02,
        "intermediate_size": 3072,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 2048,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "pad_token_id": None,
        "type_vocab_size": 1,
        "vocab_size": 30528,
    },
    fixed={
        "add_cross_attention": False,
        "is_decoder": False,
        "layer_norm_type": "layer_norm",
        "logn_attention_clip1": False,
        "logn_attention_scale": False,
        "pack_qkv": True,
        "position_embedding_type": "rope",
    },
    unheeded=frozenset({"unpad_inputs", "use_memory_efficient_attention"}),
)
_NOMIC = _Form(
    kind="nomic_bert",
    heads=("NomicBert", "NomicBert"),
    rope=_nomic_rope,
    rope_keys=frozenset({"rotary_emb_base"}),
    renamed={
        "attn_pdrop": "attention_probs_dropout_prob",
        "layer_norm_epsilon": "layer_norm_eps",
        "n_embd": "hidden_size",
        "n_head": "num_attention_heads",
        "n_inner": "intermediate_size",
        "n_layer": "num_hidden_layers",
        "n_positions": "max_position_embeddings",
        "resid_pdrop": "hidden_dropout_prob",
    },
    # The class's own defaults are those of GPT-2; every published config says these.
    needed=frozenset(
        {
            "activation_function",
            "layer_norm_epsilon",
            "mlp_fc1_bias",
            "mlp_fc2_bias",
            "n_embd",
            "n_head",
            "n_inner",
            "n_layer",
            "n_positions",
            "qkv_proj_bias",
            "rotary_emb_base",
            "rotary_emb_fraction",
            "type_vocab_size",
            "vocab_size",
        }
    ),
    fixed={
        "activation_function": "swiglu",
        "add_cross_attention": False,
        "causal": False,
        "is_decoder": False,
        "mlp_fc1_bias": False,
        "mlp_fc2_bias": False,
        "parallel_block": False,
        "parallel_block_tied_norm": False,
        "prenorm": False,
        "qkv_proj_bias": False,
        "rotary_emb_fraction": 1.0,
        "rotary_emb_interleaved": False,
        "rotary_emb_scale_base": None,
        "rotary_scaling_factor": None,
        "scale_attn_by_inverse_layer_idx": False,
        "scale_attn_weights": True,
        "use_rms_norm": False,
    },
    unheeded=frozenset(
        {
            "dense_seq_output",
            "embd_pdrop",
            "fused_bias_fc",
            "fused_dropout_add_ln",
            "max_trained_positions",
            "pad_vocab_size_multiple",
            "reorder_and_upcast_attn",
            "summary_activation",
            "summary_first_dropout",
            "summary_proj_to_labels",
            "summary_type",
            "summary_use_proj",
            "use_flash_attn",
            "use_xentropy",
        }
    ),
)


def native_config(config: Values, file: object) -> dict[str, Any] | None:
    """The config for transformers' own class, of one that was made for a repository's code; None where it is one.

    Args:
        config: what a config.json holds.
        file: that file, for messages.

    Raises:
        FormatError: the architecture is none of transformers, or a variant that its class does not compute.
    """
    form = _form_of(config)
    if form is not None:
        return _rewritten(config, form, file)
    code = own_code(config)
    if code is None:
        return None
    kind = str(config.get("model_type"))
    if kind not in CONFIG_MAPPING:
        raise FormatError(
            f"{str(file)!r} is of the kind {kind!r}, which transformers does not know, and names code of its "
            f"repository for it ({code}), which is never run; name a model of a kind that transformers knows"
        )
    if not _has_class(kind, code.rpartition(".")[2]):
        raise FormatError(
            f"{str(file)!r} names code of its repository ({code}), which is never run, and transformers has no class "
            f"of that name for {kind!r}: its own one would give other vectors, without a word; name another model"
        )
    if _looks_back_only(kind) and "AutoModel" in config["auto_map"] and config.get("is_causal") is None:
        raise FormatError(
            f"{str(file)!r} names code of its repository for a decoder ({code}), which is never run, and does not say "
            "whether tokens see those behind them, as encoders made of decoders often have it; where its authors "
            "say so, give it in a copy of the directory: is_causal false in config.json if they do, true if they do not"
        )
    _say_once(
        f"{str(file)!r} names code of its repository ({code}), which is never run; transformers' own class for "
        f"{kind!r} computes this model"
    )
    return None


def own_code(config: Values) -> str | None:
    """The module of a repository's own that a config names for the model itself; None where it names none."""
    named = config.get("auto_map")
    values = named if isinstance(named, dict) else {}
    return next((str(value) for key, value in sorted(values.items()) if key.startswith("AutoModel")), None)


def _has_class(kind: str, name: str) -> bool:
    """Whether transformers has a class of that name for a kind of model."""
    return hasattr(import_module(f"transformers.models.{model_type_to_module_name(kind)}"), name)


def _looks_back_only(kind: str) -> bool:
    """Whether models of a kind generate text, and none of them fills in masked words."""
    return kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def _form_of(config: Values) -> _Form | None:
    kind = config.get("model_type")
    if kind == "new" or (kind == "gte" and own_code(config) is not None):
        return _GTE
    return _NOMIC if kind == "nomic_bert" and (own_code(config) is not None or "n_embd" in config) else None


def _rewritten(config: Values, form: _Form, file: object) -> dict[str, Any]:
    if form.kind not in CONFIG_MAPPING:
        raise FormatError(
            f"{str(file)!r} needs transformers' class for {form.kind!r}, which this version does not have; install a "
            "newer transformers"
        )
    native = set(CONFIG_MAPPING[form.kind]().to_dict()) | set(PretrainedConfig().to_dict())
    known = native - {"rope_parameters", *form.renamed.values()} | form.rope_keys | form.renamed.keys()
    known |= form.fixed.keys() | form.unheeded | _ANYWHERE
    wrong = {key: config[key] for key in sorted(config) if key not in known}
    wrong |= {
        key: config[key] for key, value in form.fixed.items() if not _same(config.get(key, value), value)
    }
    try:
        rope = form.rope(config) if form.needed <= config.keys() else {}
    except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError):
        wrong |= {key: config[key] for key in sorted(form.rope_keys) if key in config}
        rope = {}
    missing = sorted(form.needed - config.keys())
    if wrong or missing:
        has = "has " + ", ".join(f"{key} {value!r}" for key, value in wrong.items()) if wrong else ""
        lacks = f"lacks {', '.join(missing)}" if missing else ""
        code = own_code(config) or config.get("model_type")
        raise FormatError(
            f"{str(file)!r} was made for code of its repository ({code}), which is never run, and "
            f"{' and '.join(filter(None, (has, lacks)))}: transformers' own class {form.kind!r} does not compute that; "
            "name another model"
        )
    dropped = form.rope_keys | form.fixed.keys() | form.unheeded | {"auto_map", "model_type"}
    kept = {form.renamed.get(key, key): value for key, value in config.items() if key not in dropped}
    names = [str(name) for name in config.get("architectures") or []]
    before, after = form.heads
    return {
        **form.defaults,
        **kept,
        "architectures": [
            after + name.removeprefix(before) if name.startswith(before) else name for name in names
        ],
        "model_type": form.kind,
        "rope_parameters": rope,
    }


def _same(found: object, wanted: object) -> bool:
    """Equal, and no 1 for true; null is a switch that is off."""
    if isinstance(wanted, bool):
        return found is wanted or (found is None and not wanted)
    return found == wanted


@cache
def _say_once(line: str) -> None:
    log(line)
