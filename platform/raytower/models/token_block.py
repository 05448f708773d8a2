"""Tokenised rows laid end to end, so that a padded batch is cut from them without a loop over rows. No torch.

Shape legend: N rows (texts or pairs), T tokens of all of them, B rows of a batch, L its longest row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Padding:
    """How rows of a batch are filled up to the longest: with which token and token type, and on which side."""

    token: int
    token_type: int = 0
    on_left: bool = False


@dataclass(frozen=True)
class TokenBlock:
    """Token ids of N rows."""

    ids: Ids
    """(T,) the ids of all rows."""
    starts: Ids
    """(N,) where in `ids` each row begins."""
    lengths: Ids
    """(N,) tokens of each row."""
    types: Ids | None = None
    """(T,) which text of its pair each token belongs to, for models that are told; None for others."""
    unpooled: Ids | None = None
    """(N,) how many of each row's first tokens pooling leaves out, its prompt; None where it leaves out none."""

    @classmethod
    def of(
        cls, token_ids: Sequence[Sequence[int]], types: Sequence[Sequence[int]] | None = None
    ) -> TokenBlock:
        """Lay the ids of each row end to end, and its token types where there are any."""
        lengths_N = np.fromiter(map(len, token_ids), dtype=np.int64, count=len(token_ids))
        ends_N = np.cumsum(lengths_N)
        total = int(ends_N[-1]) if len(ends_N) else 0
        ids_T = np.fromiter(chain.from_iterable(token_ids), dtype=np.int64, count=total)
        types_T = None
        if types is not None:
            types_T = np.fromiter(chain.from_iterable(types), dtype=np.int64, count=total)
        return cls(ids_T, ends_N - lengths_N, lengths_N, types_T)

    @classmethod
    def join(cls, blocks: Sequence[TokenBlock]) -> TokenBlock:
        """One block of the rows of all, in order; all of them have token types, or none."""
        if len(blocks) == 1:
            return blocks[0]
        if not blocks:
            return cls.of([])
        lengths_N = np.concatenate([block.lengths for block in blocks])
        types = [block.types for block in blocks if block.types is not None]
        unpooled = [
            np.zeros(len(block), np.int64) if block.unpooled is None else block.unpooled for block in blocks
        ]
        is_any = any(block.unpooled is not None for block in blocks)
        return cls(
            ids=np.concatenate([block.ids for block in blocks]),
            starts=np.cumsum(lengths_N) - lengths_N,
            lengths=lengths_N,
            types=np.concatenate(types) if types else None,
            unpooled=np.concatenate(unpooled) if is_any else None,
        )

    def __len__(self) -> int:
        return len(self.lengths)

    def take(self, rows_B: Ids) -> TokenBlock:
        """A block of some rows, in this order."""
        lengths_B = self.lengths[rows_B]
        starts_B = np.cumsum(lengths_B) - lengths_B
        # Each token's place: its row's start here, and how far it lies behind its row's start there.
        place_T = np.repeat(self.starts[rows_B] - starts_B, lengths_B) + np.arange(int(lengths_B.sum()))
        types_T = None if self.types is None else self.types[place_T]
        unpooled_B = None if self.unpooled is None else self.unpooled[rows_B]
        return TokenBlock(self.ids[place_T], starts_B, lengths_B, types_T, unpooled_B)

    def pad(self, rows_B: Ids, padding: Padding) -> dict[str, Ids]:
        """What a model takes of `rows_B`, each (B, L) and filled up to the longest: `input_ids`; `attention_mask`,
        unless nothing was filled up; `token_type_ids`, where the block has types; and `unpooled` (B,), where it has it.

        Rows [[5, 6, 7], [8]] become ids [[5, 6, 7], [8, pad, pad]] and the mask [[1, 1, 1], [1, 0, 0]].
        """
        of_rows = {} if self.unpooled is None else {"unpooled": self.unpooled[rows_B]}
        lengths_B = self.lengths[rows_B]
        width = max(int(lengths_B.max()), 1)
        # Left of a row that is filled up on the left the column is negative.
        shift_B1 = (width - lengths_B)[:, None] if padding.on_left else 0
        column_BL = np.arange(width) - shift_B1
        place_BL = self.starts[rows_B][:, None] + column_BL
        if int(lengths_B.min()) == width:
            whole = {"input_ids": self.ids[place_BL], **of_rows}
            return whole if self.types is None else {**whole, "token_type_ids": self.types[place_BL]}
        mask_BL = (column_BL >= 0) & (column_BL < lengths_B[:, None])
        filled = {"input_ids": _fill(self.ids, place_BL, mask_BL, padding.token)}
        filled["attention_mask"] = mask_BL.astype(np.int64)
        if self.types is not None:
            filled["token_type_ids"] = _fill(self.types, place_BL, mask_BL, padding.token_type)
        return {**filled, **of_rows}


def _fill(values_T: Ids, place_BL: Ids, mask_BL: NDArray[np.bool_], filler: int) -> Ids:
    """The values at the places that `mask_BL` says, `filler` elsewhere."""
    values_BL = np.full(mask_BL.shape, filler, dtype=np.int64)
    values_BL[mask_BL] = values_T[place_BL[mask_BL]]
    return values_BL
