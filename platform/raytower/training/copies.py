"""Copying training rows that cannot be read in the order of training: those in compressed files and huge row groups.

A window takes pieces from anywhere. To read one in the midst of a compressed file, or of a row group, a worker reads
all before it, so that an epoch costs the square of their size.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

from raytower.data.beir import JudgedPairs
from raytower.data.copied import CopiedRows
from raytower.data.layouts import Source
from raytower.data.pieces import Piece, read_pieces
from raytower.data.slices import Extent
from raytower.progress import Progress, log
from raytower.storage import Location

# A piece may have so many before it in its file or row group: of eight, a random one costs four and a half.
_MOST_PIECES = 8
# Pieces of a copied file, which are in memory together while it is written.
_PIECES_PER_FILE = 32


def pieces_to_copy(pieces: Sequence[Piece]) -> list[int]:
    """Positions of the pieces that lie in a compressed file or a row group with more than _MOST_PIECES of them."""
    counts = Counter(map(_run_of, pieces))
    return [
        position
        for position, piece in enumerate(pieces)
        if (run := _run_of(piece)) is not None and counts[run] > _MOST_PIECES
    ]


def _run_of(piece: Piece) -> tuple[str, int | None] | None:
    """The file, or its row group, of which all before a piece is read to get at the piece; None where nothing is."""
    source = piece.source
    if isinstance(source, JudgedPairs):
        # The texts of a piece lie all over the file.
        compressed = [each.file for each in (source.queries, source.corpus) if each.file.compression]
        return (str(compressed[0]), None) if compressed else None
    if not isinstance(source, Source) or not (source.file.compression or source.layout.is_columnar):
        return None
    return str(source.file), piece.extent.row_group


def copy_where_needed(pieces: Sequence[Piece], folder: Location) -> tuple[Piece, ...]:
    """The pieces, those of `pieces_to_copy` as pieces of copies in `folder`, with the same rows in the same order.

    A copy that is there already is taken, so a job that was killed goes on.

    Raises:
        InputError: a file has changed since the survey. StorageError: no room for the copies.
    """
    chosen = pieces_to_copy(pieces)
    if not chosen:
        return tuple(pieces)
    num_rows = sum(pieces[position].num_rows for position in chosen)
    files = sorted({run[0] for position in chosen if (run := _run_of(pieces[position])) is not None})
    log(
        f"{num_rows:,} training rows lie in compressed files or row groups of more than {_MOST_PIECES} pieces "
        f"({', '.join(files[:3])}{f' and {len(files) - 3} more' if len(files) > 3 else ''}), into whose midst no way "
        f"leads; they are copied once to {folder}, which is removed when the job has ended"
    )
    progress = Progress("copied", "rows", num_rows)
    copied = list(pieces)
    for first in range(0, len(chosen), _PIECES_PER_FILE):
        positions = chosen[first : first + _PIECES_PER_FILE]
        some = [pieces[position] for position in positions]
        copy = CopiedRows(folder / f"{positions[0]:09d}-{len(positions)}.arrow")
        extents = copy.extents([piece.num_rows for piece in some])
        if extents is None:
            extents = copy.write(read_pieces(some), some[0].schema)
        for position, piece, (start, end) in zip(positions, some, extents, strict=True):
            copied[position] = dataclasses.replace(
                piece,
                source=copy,
                extent=Extent(start, end, piece.extent.first_line),
                left_out=(),
                picked=None,
                label=None,
            )
        progress.advance(sum(piece.num_rows for piece in some))
    return tuple(copied)
