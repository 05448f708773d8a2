"""Texts laid end to end through a transformer, so that nothing is computed of padding: attention stays within a text.

A transformer of transformers asks for its attention by name. The one that is registered here is told where texts begin
(`cu_seq_lens_q`, as for flash attention), and computes them by torch's flash attention for texts of many lengths on a
GPU, text by text elsewhere; without being told it is `sdpa`. Not every model passes on what it is told, or counts
positions from the text's start, so that `lay_out` tries it on two texts.

Shape legend: B texts of a chunk, L tokens of the longest, T tokens of all, A heads, h width of one, H of the model.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from raytower.errors import RaytowerError

NAME = "raytower_unpadded"
# Vectors of unit length, computed in another order, in float32.
_TOLERANCE = 1e-5
_is_laid_out = False


class PaddedOnlyError(RaytowerError):
    """A transformer computes something else of texts that lie end to end; the message says why."""


def run_laid_out(
    backbone: nn.Module, ids_BL: Tensor, places_T: Tensor, starts: Tensor, first_position: int
) -> Tensor:
    """Hidden states (B, L, H) of texts filled up on the right, zero where they are filled up.

    Args:
        backbone: prepared by `lay_out`.
        ids_BL: tokens.
        places_T: where in the flat ids (B·L) those of texts are, in order.
        starts: (B+1,) int32, where among the T tokens each text begins, and the end.
        first_position: what the backbone counts the positions of a text from.
    """
    longest = ids_BL.shape[1]
    with _laid_out():
        hidden_TH = backbone(
            input_ids=ids_BL.reshape(-1)[places_T][None],
            position_ids=(places_T % longest)[None] + first_position,
            cu_seq_lens_q=starts,
            cu_seq_lens_k=starts,
            max_length_q=longest,
            max_length_k=longest,
        ).last_hidden_state[0]
    hidden = hidden_TH.new_zeros((ids_BL.numel(), hidden_TH.shape[1])).index_copy(0, places_T, hidden_TH)
    return hidden.view(*ids_BL.shape, -1)


def lay_out(
    backbone: PreTrainedModel, first_positions: tuple[int, ...], vectors_of: Callable[[int | None], Tensor]
) -> int:
    """Have the backbone's attention be the one here, in place, and return what positions are counted from.

    Args:
        backbone: it lies on the CPU, in float32 and in eval mode.
        first_positions: those to try.
        vectors_of: what the model makes of texts of different lengths, by `run_laid_out` with that first position, or
            padded for None.

    Raises:
        PaddedOnlyError: it drops a part of attention in training, does not take its attention by name, or gives other
            vectors. Its attention is what it was.
    """
    before = backbone.config._attn_implementation
    padded = vectors_of(None)
    backbone.set_attn_implementation(NAME)
    try:
        if backbone.config._attn_implementation != NAME:
            raise PaddedOnlyError("it does not take its attention by name")
        differences = {}
        for first in first_positions:
            differences[first] = float((vectors_of(first) - padded).abs().max())
            if differences[first] <= _TOLERANCE:
                backbone.train()
                vectors_of(first)  # tells dropout of attention
                return first
        raise PaddedOnlyError(
            f"its vectors of texts that lie end to end are other ones, by {min(differences.values()):.2g}"
        )
    except Exception as error:
        backbone.set_attn_implementation(before)
        if isinstance(error, PaddedOnlyError):
            raise
        raise PaddedOnlyError(f"it cannot compute texts that lie end to end ({error})") from error
    finally:
        backbone.eval()


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of (1, A, T, h) to keys and values of as many or fewer heads → (1, T, A, h)."""
    if cu_seq_lens_q is None:
        if _is_laid_out:
            raise PaddedOnlyError("it does not tell its attention where texts begin")
        found, _ = sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **others,
        )
        return found, None
    _refuse_what_the_kernel_has_not(query.shape[-1], dropout, others)
    causal = bool(getattr(module, "is_causal", False) if is_causal is None else is_causal)
    reach = -1 if sliding_window is None else sliding_window - 1
    window = (reach, 0 if causal else reach)
    if query.is_cuda:
        assert max_length_q is not None
        # Rotations leave queries and keys in float32, and autocast does not know this kernel.
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query.dtype
        query_TAh, key_TAh, value_TAh = (each[0].transpose(0, 1).to(dtype) for each in (query, key, value))
        whole_TAh = varlen_attn(
            query_TAh,
            key_TAh,
            value_TAh,
            cu_seq_lens_q,
            cu_seq_lens_q,
            max_length_q,
            max_length_q,
            scale=scaling,
            window_size=window,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        assert isinstance(whole_TAh, Tensor)
        return whole_TAh[None], None
    return _attend_one_by_one(query, key, value, cu_seq_lens_q, window, scaling), None


def _attend_one_by_one(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, window: tuple[int, int], scaling: float | None
) -> Tensor:
    """What the kernel computes, for CPUs, which have none: (1, A, T, h) → (1, T, A, h), text after text."""
    texts = [
        nn.functional.scaled_dot_product_attention(
            query[:, :, start:end],
            key[:, :, start:end],
            value[:, :, start:end],
            attn_mask=_band(end - start, window),
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        for start, end in itertools.pairwise(starts.tolist())
    ]
    return torch.cat(texts, dim=2).transpose(1, 2)


def _refuse_what_the_kernel_has_not(head_width: int, dropout: float, others: Mapping[str, Any]) -> None:
    """Raises PaddedOnlyError for attention that the kernel of texts laid end to end does not compute."""
    if dropout > 0:
        raise PaddedOnlyError(
            f"its attention has dropout {dropout:g}, which the kernel for such texts has not"
        )
    if others.get("softcap") is not None or others.get("s_aux") is not None:
        raise PaddedOnlyError("its attention limits scores, or has sinks")
    if head_width % 8 or head_width > 256:
        raise PaddedOnlyError(f"its heads are {head_width} wide, and the kernel's a multiple of 8 up to 256")


def _band(length: int, window: tuple[int, int]) -> Tensor | None:
    """(L, L) which key each query sees: so many positions before and behind it; -1 is all. None: all see all."""
    if window == (-1, -1):
        return None
    before, behind = window
    ahead_LL = torch.arange(length)[None] - torch.arange(length)[:, None]
    return (ahead_LL >= (-length if before < 0 else -before)) & (
        ahead_LL <= (length if behind < 0 else behind)
    )


def _mask(*arguments: Any, **named: Any) -> Any:
    # None is needed of texts that lie end to end: it would have T² values.
    return None if _is_laid_out else sdpa_mask(*arguments, **named)


@contextmanager
def _laid_out() -> Iterator[None]:
    """It holds for the whole process, in which one thread at a time computes with models."""
    global _is_laid_out
    _is_laid_out = True
    try:
        yield
    finally:
        _is_laid_out = False


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, _mask)
