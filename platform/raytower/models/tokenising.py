"""Texts, or pairs of texts, to token ids, at a cost that the length they are cut to bounds.

The ids are those of a call of the tokenizer, without the masks, the offsets and the dict that such a call builds for
each text.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NoReturn

from transformers import PreTrainedTokenizerBase
from transformers.tokenization_utils_base import PaddingStrategy, TruncationStrategy

from raytower.errors import InputError
from raytower.models.token_block import TokenBlock

CHARACTERS_PER_TOKEN = 64
"""More than a token of any text in words stands for. Of longer texts the beginning alone is tokenised at first."""
# A tokenizer keeps about 100 bytes of each token that it cuts off until its batch is done.
_CHARACTERS_AT_ONCE = 4_000_000
_NAMES = {1: ("texts",), 2: ("queries", "documents")}

Render = Callable[[Sequence[str], Sequence[str]], list[str]]


def tokenise(
    tokenizer: PreTrainedTokenizerBase,
    columns: Sequence[Sequence[str]],
    max_length: int,
    *,
    with_types: bool = False,
    start: int = 0,
    render: Render | None = None,
) -> TokenBlock:
    """Token ids of each row, special tokens included, cut to `max_length`.

    Args:
        tokenizer: a fast one; its truncation and padding are set.
        columns: texts; or queries and as many documents, whose pairs are cut at the longer side first.
        max_length: most tokens of a row.
        with_types: whether the block gets token types.
        start: the number of the first row, for messages.
        render: makes one text of each pair, special tokens and all, so that none are added.

    Raises:
        InputError: a text that is no string or holds half of a surrogate pair, or no room beside the special tokens.
    """
    if render is None:
        _check_room(tokenizer, len(columns), max_length)
    _set_truncation(tokenizer, max_length)
    # Where the end of a text is what stays, its beginning is of no use.
    limit = max_length * CHARACTERS_PER_TOKEN if tokenizer.truncation_side == "right" else sys.maxsize
    blocks = []
    try:
        for run in _runs(columns, limit):
            part = [list(column[run]) for column in columns]
            encode = _encode_texts if len(part) == 1 else _encode_pairs
            if render is not None:
                encode = partial(_encode_rendered, render)
            encodings = encode(tokenizer, part, limit, max_length)
            types = [encoding.type_ids for encoding in encodings] if with_types else None
            blocks.append(TokenBlock.of([encoding.ids for encoding in encodings], types))
    except TypeError as error:  # all that the tokenizers say of a wrong text
        _refuse(columns, start, error)
    return TokenBlock.join(blocks)


def _set_truncation(tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
    """Cut to `max_length` from now on, and fill nothing up, whatever the directory says."""
    tokenizer.set_truncation_and_padding(
        padding_strategy=PaddingStrategy.DO_NOT_PAD,
        truncation_strategy=TruncationStrategy.LONGEST_FIRST,
        max_length=max_length,
        stride=0,
        pad_to_multiple_of=None,
        padding_side=None,
    )


def _check_room(tokenizer: PreTrainedTokenizerBase, num_columns: int, max_length: int) -> None:
    # Below this length the tokenizers cut nothing off, without a word.
    special = tokenizer.num_special_tokens_to_add(pair=num_columns == 2)
    if max_length <= special:
        row = "pair" if num_columns == 2 else "text"
        raise InputError(
            f"max_length is {max_length}, and this tokenizer puts {special} special tokens to each {row}; give at "
            f"least {special + 1}"
        )


def _runs(columns: Sequence[Sequence[str]], limit: int) -> Iterator[slice]:
    """Rows that are tokenised in one go, so that what is held of them besides their ids is bounded."""
    start = held = 0
    for row, texts in enumerate(zip(*columns, strict=True)):
        size = sum(min(len(text), limit) for text in texts)
        if held + size > _CHARACTERS_AT_ONCE and row > start:
            yield slice(start, row)
            start, held = row, 0
        held += size
    if len(columns[0]) > start:
        yield slice(start, len(columns[0]))


def _encode_texts(
    tokenizer: PreTrainedTokenizerBase, columns: Sequence[list[str]], limit: int, max_length: int
) -> list[Any]:
    return _encode_beginnings(tokenizer.backend_tokenizer.encode_batch_fast, columns[0], limit, max_length)[1]


def _encode_rendered(
    render: Render,
    tokenizer: PreTrainedTokenizerBase,
    columns: Sequence[list[str]],
    limit: int,
    max_length: int,
) -> list[Any]:
    encode = partial(tokenizer.backend_tokenizer.encode_batch_fast, add_special_tokens=False)
    return _encode_beginnings(encode, render(*columns), limit, max_length)[1]


def _encode_pairs(
    tokenizer: PreTrainedTokenizerBase, columns: Sequence[list[str]], limit: int, max_length: int
) -> list[Any]:
    """The tokens of each pair, as the tokenizer gives them of both texts in one call.

    In one call it would keep all that it cuts off, every part of one text with every part of the other: of two long
    texts thousands of times what is asked for. So each distinct text is tokenised once, and cut, before it is paired.
    """
    firsts, seconds = (
        _Side(tokenizer, column, limit, max_length, is_second)
        for column, is_second in zip(columns, (False, True), strict=True)
    )
    pairs = []
    for first, second in zip(*columns, strict=True):
        left, right = firsts.encodings[first], seconds.encodings[second]
        if len(left) == len(right) == max_length and firsts.count(first) > seconds.count(second):
            # Cut alike, the second would keep the odd token, which is the longer one's.
            right = seconds.shorter(second)
        pairs.append((left, right))
    _set_truncation(tokenizer, max_length)
    return [tokenizer.backend_tokenizer.post_process(left, right) for left, right in pairs]


class _Side:
    """The distinct texts of one side of pairs, without special tokens, each cut to `max_length` tokens."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        texts: Sequence[str],
        limit: int,
        max_length: int,
        is_second: bool,
    ) -> None:
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._is_second = is_second
        distinct = list(dict.fromkeys(texts))
        beginnings, encodings = _encode_beginnings(self._encode, distinct, limit, max_length)
        self.encodings = dict(zip(distinct, encodings, strict=True))
        # Of a text whose beginning alone was tokenised the count is not known yet.
        self._counts = {
            text: len(encoding)
            for text, beginning, encoding in zip(distinct, beginnings, encodings, strict=True)
            if len(beginning) == len(text)
        }
        for encoding in encodings:
            if len(encoding) > max_length:
                encoding.truncate(max_length, direction=tokenizer.truncation_side)

    def count(self, text: str) -> int:
        """Tokens of the whole text."""
        if text not in self._counts:
            self._counts[text] = len(self._encode([text])[0])
        return self._counts[text]

    def shorter(self, text: str) -> Any:
        """Its tokens cut to one less."""
        (encoding,) = self._encode([text])
        encoding.truncate(self._max_length - 1, direction=self._tokenizer.truncation_side)
        return encoding

    def _encode(self, texts: list[str]) -> list[Any]:
        backend = self._tokenizer.backend_tokenizer
        backend.no_truncation()
        # Behind an empty text the tokens are those of a second text, token types and all.
        inputs: list[Any] = [("", text) for text in texts] if self._is_second else texts
        encodings: list[Any] = backend.encode_batch_fast(inputs, add_special_tokens=False)
        return encodings


def _encode_beginnings(
    encode: Callable[[list[str]], list[Any]], texts: Sequence[str], limit: int, max_length: int
) -> tuple[list[str], list[Any]]:
    """A beginning of each text that gives at least the first `max_length` tokens of the whole, and its tokens.

    A text is tokenised up to a white space before `limit` characters. Where what stands there (a run of spaces, a word
    without end) gave fewer tokens, eight times as much is taken, and in the end the whole.
    """
    beginnings = [_beginning(text, limit) for text in texts]
    encodings = encode(beginnings)
    while short := [
        row
        for row, text in enumerate(texts)
        if len(beginnings[row]) < len(text) and len(encodings[row].ids) < max_length
    ]:
        limit *= 8
        for row in short:
            beginnings[row] = _beginning(texts[row], limit)
        again = encode([beginnings[row] for row in short])
        for row, encoding in zip(short, again, strict=True):
            encodings[row] = encoding
    return beginnings, encodings


def _beginning(text: str, limit: int) -> str:
    """The first `limit` characters or less, ending with a word where words end at all."""
    if len(text) <= limit:
        return text
    space = max(text.rfind(mark, limit // 2, limit) for mark in (" ", "\n"))
    return text[: space if space > 0 else limit]


def _refuse(columns: Sequence[Sequence[str]], start: int, error: TypeError) -> NoReturn:
    """Say which text the tokenizer did not take, and what to do."""
    for name, column in zip(_NAMES[len(columns)], columns, strict=True):
        for row, text in enumerate(column, start):
            if not isinstance(text, str):
                raise InputError(
                    f"{name}[{row}] is {text!r}, of type {type(text).__name__}; every text must be a string"
                ) from error
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as broken:
                raise InputError(
                    f"{name}[{row}] has a lone surrogate, {text[broken.start]!r}: half of a character that stands "
                    "alone; read the text as UTF-8, or replace what is broken by "
                    "text.encode('utf-8', 'replace').decode()"
                ) from error
    raise error
