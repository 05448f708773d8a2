"""The rows of a shard that may be hits: what a filter lets through, less what is deleted."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class AllowedRows:
    """Rows of one shard that may be hits. Make it with `of`; its arrays must not change afterwards."""

    mask: NDArray[np.bool_]  # (rows of the shard,)
    count: int  # rows allowed
    bits: NDArray[np.uint8]  # packed little-endian, as faiss.IDSelectorBitmap reads them

    @classmethod
    def of(cls, mask: NDArray[np.bool_]) -> AllowedRows:
        """From a mask (rows of the shard,) that is true where a row may be a hit.

        Raises:
            ValueError: the mask is not one line of booleans.
        """
        if mask.dtype != np.bool_ or mask.ndim != 1:
            raise ValueError(f"the mask is {mask.dtype} {mask.shape}; it must be bool (rows of the shard,)")
        return cls(mask, int(np.count_nonzero(mask)), np.packbits(mask, bitorder="little"))

    @cached_property
    def rows(self) -> NDArray[np.int64]:
        """Numbers of the allowed rows (count,), rising."""
        return np.flatnonzero(self.mask)
