"""Masks of padded rows that transformers does not look into.

A mask without padding lets a faster kernel run, so transformers asks each mask whether it has any, and the process
waits for the accelerator in every forward pass. Here a mask is only given where a row is filled up (`TokenBlock.pad`):
the answer is known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import masking_utils

# They answer whether a padding mask, the first argument or None, can be left out. A version of transformers that has
# other names asks each mask, which costs time and no result.
_NAMES = ("_ignore_bidirectional_mask_sdpa", "_ignore_causal_mask_sdpa")


def _answering(ask: Callable[..., bool]) -> Callable[..., bool]:
    def can_skip(padding_mask: Any, *arguments: Any, **named: Any) -> bool:
        return padding_mask is None and ask(padding_mask, *arguments, **named)

    return can_skip


_ASKED = {name: getattr(masking_utils, name) for name in _NAMES if hasattr(masking_utils, name)}
_KNOWN = {name: _answering(ask) for name, ask in _ASKED.items()}


@contextmanager
def padding_is_known() -> Iterator[None]:
    """Inside, every mask that a model of transformers is given has a position that is masked out.

    It holds for the whole process, in which one thread at a time computes with models.
    """
    try:
        for name, known in _KNOWN.items():
            setattr(masking_utils, name, known)
        yield
    finally:
        for name, asked in _ASKED.items():
            setattr(masking_utils, name, asked)
