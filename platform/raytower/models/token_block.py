"""Tokenised texts laid end to end, so that a padded batch is cut from them without a loop over rows. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class TokenBlock:
    """Token ids of N texts. Shape legend: N texts, T tokens of all of them, B rows of a batch, L its longest text."""

    ids: NDArray[np.int64]
    """(T,) the ids of all texts."""
    starts: NDArray[np.int64]
    """(N,) where in `ids` each text begins."""
    lengths: NDArray[np.int64]
    """(N,) tokens of each text."""

    @classmethod
    def of(cls, token_ids: Sequence[Sequence[int]]) -> TokenBlock:
        """Lay the ids of each text end to end."""
        lengths_N = np.fromiter(map(len, token_ids), dtype=np.int64, count=len(token_ids))
        ends_N = np.cumsum(lengths_N)
        total = int(ends_N[-1]) if len(ends_N) else 0
        ids_T = np.fromiter(chain.from_iterable(token_ids), dtype=np.int64, count=total)
        return cls(ids_T, ends_N - lengths_N, lengths_N)

    def __len__(self) -> int:
        return len(self.lengths)

    def pad(
        self, rows_B: NDArray[np.int64], pad_id: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64] | None]:
        """Ids (B, L) padded to the longest of `rows_B` and their mask (B, L), or None where nothing was padded."""
        lengths_B = self.lengths[rows_B]
        width = max(int(lengths_B.max()), 1)
        place_BL = self.starts[rows_B][:, None] + np.arange(width)
        if int(lengths_B.min()) == width:
            return self.ids[place_BL], None
        mask_BL = np.arange(width) < lengths_B[:, None]
        ids_BL = np.full(mask_BL.shape, pad_id, dtype=np.int64)
        ids_BL[mask_BL] = self.ids[place_BL[mask_BL]]
        return ids_BL, mask_BL.astype(np.int64)
