"""How a reranker's directory puts a pair before its model: as two texts, behind a prompt, or by a chat template.

The rules are those of sentence-transformers' CrossEncoder (6.2). A prompt goes before the query, or into the template
as the system's message. A template makes one text of a pair, special tokens and all; query and document are messages
with these roles. Where such a text is cut, the tokens that the template ends with are put over the last ones that were
kept: a causal reranker answers there, and without them it would be asked nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
from transformers import PreTrainedTokenizerBase

from raytower.errors import InputError
from raytower.models.token_block import TokenBlock
from raytower.models.tokenising import tokenise

# Two contents that differ from their first token to their last and in their number.
_FILLERS = ("0", "1 2 3 4")
# A pair, the pair with another query, and the pair with another document.
_PROBES = (("alpha", "bravo"), ("charlie", "bravo"), ("alpha", "foxtrot"))


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """How the tokenizer's chat template is rendered."""

    structured: bool = False
    """Whether a message's content is a list of parts, ours the one of type text, and not the text itself."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """What it is rendered with besides: `add_generation_prompt`, the name of a template in `chat_template`, …"""
    restore_suffix: bool = True
    """Whether a row that was cut ends as the template does."""


@dataclass(frozen=True, kw_only=True)
class PairFormat:
    """What a directory says of its pairs; by default two texts as the tokenizer joins them."""

    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None
    template: ChatTemplate | None = None

    @property
    def prompt(self) -> str:
        """The prompt that every pair gets; empty without one."""
        return "" if self.default_prompt_name is None else self.prompts[self.default_prompt_name]

    def describe(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """All that it does to a pair, for a hash; empty where that is nothing."""
        if self.template is None:
            return self.prompt and json.dumps(["prompt", self.prompt])
        template = tokenizer.get_chat_template(self.template.arguments.get("chat_template"))
        rules = [self.template.structured, dict(self.template.arguments), self.template.restore_suffix]
        return json.dumps(
            ["template", template, rules, self.prompt, tokenizer.special_tokens_map],
            sort_keys=True,
            default=str,
        )


class TemplateTokeniser:
    """Pairs to token ids by a chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, pairs: PairFormat) -> None:
        assert pairs.template is not None
        self._tokenizer = tokenizer
        self._template = pairs.template
        self._system = [self._message("system", pairs.prompt)] if pairs.prompt else []
        self._num_template_tokens = len(self._whole("", ""))
        self._suffix = np.array(self._common_suffix() if pairs.template.restore_suffix else [], np.int64)

    def tokenise(
        self, columns: Sequence[Sequence[str]], max_length: int, *, with_types: bool = False, start: int = 0
    ) -> TokenBlock:
        """Token ids of each pair of (queries, documents), cut to `max_length`; see `tokenising.tokenise`.

        Raises:
            InputError: as `tokenising.tokenise`; `max_length` leaves no room beside the template.
        """
        if max_length <= self._num_template_tokens:
            raise InputError(
                f"max_length is {max_length}, and this reranker's chat template puts "
                f"{self._num_template_tokens} tokens around each pair; give at least {self._num_template_tokens + 1}"
            )
        block = tokenise(
            self._tokenizer, columns, max_length, with_types=with_types, start=start, render=self.render
        )
        kept = len(self._suffix)
        for row in np.flatnonzero(block.lengths >= max_length) if kept else ():
            end = int(block.starts[row] + block.lengths[row])
            block.ids[end - kept : end] = self._suffix
        return block

    def render(self, queries: Sequence[str], documents: Sequence[str]) -> list[str]:
        """One text of each pair. Raises TypeError where a text is none, as the tokenizers do."""
        conversations = []
        for query, document in zip(queries, documents, strict=True):
            if not isinstance(query, str) or not isinstance(document, str):
                raise TypeError("a text is no string")  # a template would write it down as it is printed
            pair = [self._message("query", query), self._message("document", document)]
            conversations.append([*self._system, *pair])
        if not conversations:
            return []
        rendered = self._tokenizer.apply_chat_template(
            conversations, tokenize=False, **self._template.arguments
        )
        return cast("list[str]", rendered)

    def lost_roles(self) -> list[str]:
        """Of query and document those whose text does not change what the template gives."""
        pair, *others = self.render(*zip(*_PROBES, strict=True))
        return [role for role, other in zip(("query", "document"), others, strict=True) if other == pair]

    def _message(self, role: str, text: str) -> dict[str, Any]:
        content = [{"type": "text", "text": text}] if self._template.structured else text
        return {"role": role, "content": content}

    def _whole(self, query: str, document: str) -> list[int]:
        (text,) = self.render([query], [document])
        return cast("list[int]", self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _common_suffix(self) -> list[int]:
        """The last tokens that any pair has."""
        first, second = (self._whole(filler, filler) for filler in _FILLERS)
        suffix = list(_common_prefix(reversed(first), reversed(second)))[::-1]
        return suffix if len(suffix) < min(len(first), len(second)) else []


def _common_prefix(first: Iterator[int], second: Iterator[int]) -> Iterator[int]:
    for left, right in zip(first, second, strict=False):
        if left != right:
            return
        yield left
