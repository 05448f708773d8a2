"""What the files of sentence-transformers say of a reranker beside its model: modules, prompts, chat template, tokens.

A directory of that library's cross-encoders (5.4 and later) has a modules.json: `Transformer` alone, a sequence
classifier, or `Transformer` and `LogitScore`, a causal language model whose next token is the answer: the score is the
logit of one token, less that of another one (Nogueira et al. 2020, "Document Ranking with a Pretrained
Sequence-to-Sequence Model"; Qwen3-Reranker: "yes" less "no").
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from transformers import PreTrainedTokenizerBase

from raytower.errors import FormatError
from raytower.models.directory import inside, read_json, read_json_object, write_json
from raytower.models.pair_format import ChatTemplate, PairFormat, TemplateTokeniser

_MODULES = "modules.json"
_SENTENCE = "sentence_bert_config.json"
_MODEL = "config_sentence_transformers.json"
_SCORE_FOLDER = "1_LogitScore"
_TRANSFORMER = "sentence_transformers.base.modules.transformer.Transformer"
_LOGIT_SCORE = "sentence_transformers.cross_encoder.modules.logit_score.LogitScore"
# What the Transformer module is told, and what it calls its logits, for a classifier and for a causal language model.
_TASKS = {False: ("sequence-classification", "scores"), True: ("text-generation", "causal_logits")}
_FORWARD = {"method": "forward", "method_output_name": "logits"}
# What `apply_chat_template` takes beside what a template is rendered with.
_NOT_RENDERED = frozenset(
    {
        "conversation",
        "max_length",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "sanitize_control_tokens",
        "tokenize",
        "tokenizer_kwargs",
        "truncation",
    }
)
_REMEDY = (
    "write it once with sentence-transformers, by CrossEncoder(modules=[Transformer(DIR, "
    "transformer_task='text-generation'), LogitScore(TRUE_TOKEN_ID, FALSE_TOKEN_ID)]).save(NEW_DIR), with the template "
    "of its authors as the tokenizer's chat_template (docs/training.md)"
)


@dataclass(frozen=True)
class AnswerTokens:
    """The token whose logit is the score, and the one whose logit is taken off it."""

    true: int
    false: int | None = None


@dataclass(frozen=True)
class RerankerLayout:
    """How pairs are put before the model, and how its logits become a score; `answers` is None of a classifier."""

    pairs: PairFormat
    answers: AnswerTokens | None
    max_length: int | None = None


def is_causal(path: Path) -> bool:
    """Whether config.json names a causal language model."""
    names = read_json_object(path / "config.json").get("architectures")
    return isinstance(names, list) and any(str(name).endswith("ForCausalLM") for name in names)


def read_layout(path: Path) -> RerankerLayout | None:
    """The layout of a directory that sentence-transformers knows as a cross-encoder; None of any other one.

    Raises:
        FormatError: a module or a setting is not known here; it is named with its file.
    """
    modules = read_json(path / _MODULES) if (path / _MODULES).is_file() else None
    kinds = (
        [str(module.get("type")).rsplit(".", 1)[-1] for module in modules]
        if isinstance(modules, list) and all(isinstance(module, dict) for module in modules)
        else []
    )
    model = read_json_object(path / _MODEL)
    if model.get("model_type") != "CrossEncoder":
        if "LogitScore" in kinds:
            raise FormatError(
                f"{str(path / _MODULES)!r} names the module LogitScore, and {str(path / _MODEL)!r} has model_type "
                f"{model.get('model_type')!r}, by which sentence-transformers leaves it out; set it to CrossEncoder"
            )
        return None
    if modules is None:
        return None
    if kinds not in (["Transformer"], ["Transformer", "LogitScore"]) or modules[0].get("path") != "":
        raise FormatError(
            f"{str(path / _MODULES)!r} has the modules {modules!r}; known of a reranker are Transformer at the top, "
            "and LogitScore behind it or not at all"
        )
    has_answers = len(kinds) == 2
    template, max_length = _read_sentence_config(path / _SENTENCE, has_answers)
    pairs = PairFormat(
        prompts=_read_prompts(path / _MODEL, model),
        default_prompt_name=model.get("default_prompt_name"),
        template=template,
    )
    if pairs.default_prompt_name not in (None, *pairs.prompts):
        raise FormatError(
            f"{str(path / _MODEL)!r} has default_prompt_name {pairs.default_prompt_name!r}, which is none of its "
            f"prompts {sorted(pairs.prompts)}; name one of them, or set it to null"
        )
    answers = _read_answers(inside(path, modules[1].get("path"), path / _MODULES)) if has_answers else None
    return RerankerLayout(pairs, answers, max_length)


def check_template(path: Path, tokenizer: PreTrainedTokenizerBase, pairs: PairFormat) -> None:
    """Raises FormatError where the chat template that `pairs` asks for is missing, or loses a query or a document."""
    try:
        lost = TemplateTokeniser(tokenizer, pairs).lost_roles()
    except Exception as error:  # whatever a template raises
        raise FormatError(
            f"{str(path / _SENTENCE)!r} asks for a chat template, and that of the tokenizer cannot be rendered with a "
            f"query and a document: {type(error).__name__}: {error}; give the tokenizer one that takes messages of "
            "these roles"
        ) from error
    if lost:
        raise FormatError(
            f"the chat template in {str(path)!r} leaves the text of the {' and the '.join(lost)} out; it must write "
            "down the messages of the roles query and document"
        )


def find_plain_layout(path: Path, tokenizer: PreTrainedTokenizerBase) -> RerankerLayout | None:
    """The layout of a causal language model without modules.json, as far as its chat template says that it reranks.

    Nothing else of such a directory tells a reranker from a model that writes texts. Its template must write down
    messages of the roles query and document by name, and say that the answer is yes or no; the score is then the logit
    of "yes" less that of "no", as sentence-transformers takes it. None of any other directory.
    """
    template = tokenizer.chat_template
    words = {"yes", "no"}
    if not isinstance(template, str) or not all(role in template for role in ("query", "document")):
        return None
    vocabulary = tokenizer.get_vocab()
    if not words <= vocabulary.keys():
        return None
    for structured in (False, True):
        pairs = PairFormat(template=ChatTemplate(structured=structured))
        try:
            tokeniser = TemplateTokeniser(tokenizer, pairs)
            (text,) = tokeniser.render(["alpha"], ["bravo"])
            lost = tokeniser.lost_roles()
        except Exception:  # a template for something else, which may raise anything
            continue
        # A template for plain texts writes a list of parts down as Python prints it.
        if not lost and "'type'" not in text and words <= set(re.findall(r"\w+", text)):
            return RerankerLayout(pairs, AnswerTokens(vocabulary["yes"], vocabulary["no"]))
    return None


def refuse_plain(path: Path) -> FormatError:
    """The error for a causal language model of which nothing says how it reranks."""
    return FormatError(
        f"{str(path)!r} is a causal language model without {_MODULES}, and its chat template does not say that it "
        "answers a query and a document with yes or no; as a reranker it needs to be said which tokens are compared "
        f"and how a pair is put: {_REMEDY}"
    )


def write_layout(path: Path, layout: RerankerLayout, activation: str | None) -> None:
    """Write what `read_layout` reads into a directory that holds the model; `activation` goes on its one logit."""
    modules = [("", _TRANSFORMER)]
    has_answers = layout.answers is not None
    if layout.answers is not None:
        modules.append((_SCORE_FOLDER, _LOGIT_SCORE))
        tokens = {"true_token_id": layout.answers.true, "false_token_id": layout.answers.false}
        write_json(path / _SCORE_FOLDER / "config.json", tokens)
    write_json(
        path / _MODULES,
        [
            {"idx": number, "name": str(number), "path": place, "type": kind}
            for number, (place, kind) in enumerate(modules)
        ],
    )
    task, output = _TASKS[has_answers]
    sentence: dict[str, Any] = {
        "transformer_task": task,
        "modality_config": {"text": _FORWARD},
        "module_output_name": output,
    }
    template = layout.pairs.template
    if template is not None:
        form = "structured" if template.structured else "flat"
        sentence["modality_config"] = {"text": _FORWARD, "message": {**_FORWARD, "format": form}}
        arguments = {**template.arguments, **({} if template.restore_suffix else {"restore_suffix": False})}
        if arguments:
            sentence["processing_kwargs"] = {"chat_template": arguments}
    write_json(path / _SENTENCE, sentence)
    model = {
        "model_type": "CrossEncoder",
        "prompts": dict(layout.pairs.prompts),
        "default_prompt_name": layout.pairs.default_prompt_name,
    }
    write_json(path / _MODEL, model if activation is None else {**model, "activation_fn": activation})


def _read_sentence_config(file: Path, has_answers: bool) -> tuple[ChatTemplate | None, int | None]:
    """The chat template that the Transformer module uses, and the length that it cuts to, where they are stated."""
    config = read_json_object(file)
    task, output = _TASKS[has_answers]
    modalities = config.get("modality_config", {"text": _FORWARD})
    message = modalities.get("message") if isinstance(modalities, dict) else None
    used = "message" if message is not None else "text"
    known = {"transformer_task": task, "module_output_name": output, f"modality_config of {used}": _FORWARD}
    stated = {
        "transformer_task": config.get("transformer_task"),
        "module_output_name": config.get("module_output_name", output),
        f"modality_config of {used}": _without_format(modalities.get(used))
        if isinstance(modalities, dict)
        else modalities,
    }
    other = {key: value for key, value in stated.items() if value != known[key]}
    arguments, unknown = _template_arguments(config.get("processing_kwargs") or {})
    other.update(unknown)
    if config.get("do_lower_case"):
        other["do_lower_case"] = True
    if isinstance(message, dict) and message.get("format") not in ("flat", "structured"):
        other["format of message"] = message.get("format")
    if not isinstance(config.get("max_seq_length", 1), int) or config.get("max_seq_length", 1) < 1:
        other["max_seq_length"] = config["max_seq_length"]
    if other:
        raise FormatError(
            f"{str(file)!r} has {', '.join(f'{key} {value!r}' for key, value in other.items())}; known of a reranker "
            f"are {known}, the formats flat and structured, a max_seq_length of at least 1, and what a chat template "
            "is rendered with"
        )
    if message is None:
        return None, config.get("max_seq_length")
    restore = arguments.pop("restore_suffix", True)
    template = ChatTemplate(
        structured=message["format"] == "structured", arguments=arguments, restore_suffix=bool(restore)
    )
    return template, config.get("max_seq_length")


def _without_format(modality: object) -> object:
    if not isinstance(modality, dict):
        return modality
    return {key: value for key, value in modality.items() if key != "format"}


def _template_arguments(processing: object) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of `processing_kwargs` what the template is rendered with, and what is not known here."""
    if not isinstance(processing, dict) or not isinstance(processing.get("chat_template", {}), dict):
        return {}, {"processing_kwargs": processing}
    arguments = dict(processing.get("chat_template", {}))
    unknown = {
        f"processing_kwargs.{key}": value for key, value in processing.items() if key != "chat_template"
    }
    for key in sorted(arguments.keys() & _NOT_RENDERED):
        unknown[f"processing_kwargs.chat_template.{key}"] = arguments[key]
    return arguments, unknown


def _read_prompts(file: Path, config: Mapping[str, Any]) -> dict[str, str]:
    stated = config.get("prompts") or {}
    if not isinstance(stated, dict) or not all(isinstance(text, str | None) for text in stated.values()):
        raise FormatError(f"{str(file)!r} has prompts {stated!r}; they must be an object of names and texts")
    return {name: text or "" for name, text in stated.items()}


def _read_answers(place: Path) -> AnswerTokens:
    file = place / "config.json"
    config = read_json_object(file)
    true, false = config.get("true_token_id"), config.get("false_token_id")
    source = config.get("module_input_name", _TASKS[True][1])
    if not _is_token(true) or not (false is None or _is_token(false)) or source != _TASKS[True][1]:
        raise FormatError(
            f"{str(file)!r} has true_token_id {true!r}, false_token_id {false!r} and module_input_name {source!r}; "
            f"known are ids of tokens (false_token_id may be null) and {_TASKS[True][1]!r}"
        )
    return AnswerTokens(true, false)


def _is_token(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
