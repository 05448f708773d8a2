"""Keys that tell which rows of a batch are relevant to each other beyond their own pair.

A batch holds false negatives: the same document twice, two answers to one question, two texts of one label. Each text
carries three keys, and two texts are equal when any of them agrees:

    text    hash of the stripped text
    id      hash of the user's id
    label   hash of the label; NO_KEY where the rows carry none

Document d is known to be relevant to query i when d equals the first document of i, or of a query equal to i.

A row with fewer documents than others has none in some columns. Such a place carries NO_KEY three times: a document
always has a text, so none looks like that.

Equal rows are few, so nothing here holds a row for each query and a column for each document: keys become small ids by
sorting, and the known pairs of a block of queries are listed when a loss comes to that block. All of that is done in
the CPU's memory, while an accelerator makes the embeddings: sorting and listing there would wait for it each time.

Shape legend: B rows of this worker, W workers, N = B·W rows of all, C documents of all workers (N to a column), 3 keys,
R queries of a block, G groups of equal rows, E entries, P pairs of a query and a document.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from raytower.collectives import gather_constants, rank
from raytower.data.plain_texts import plain_text
from raytower.models.device import send

NO_KEY = 0
_CPU = torch.device("cpu")

CELLS_PER_BLOCK = {"cpu": 2**22, "cuda": 2**24}
"""Cells, queries times documents, of a block of cosines by the kind of device: 16 and 64 MiB in float32. Less, and each
block's pass over all documents counts; more, and it leaves a CPU's cache."""


@dataclass(frozen=True, kw_only=True)
class BatchKeys:
    """Keys of this worker's rows; NO_KEY where there is none, and NO_KEY equals nothing.

    query: (B, 3). documents: one (B, 3) for each document column, in the order of the columns. device: where a loss
    reads what is known; the keys themselves stay in the CPU's memory.
    """

    query: Tensor
    documents: tuple[Tensor, ...]
    device: torch.device = _CPU

    def to(self, device: torch.device) -> BatchKeys:
        """The keys for a loss on the device: themselves if they are, with all that is known of them."""
        return self if self.device == device else replace(self, device=device)

    @cached_property
    def known(self) -> KnownRelevant:
        """Documents known to be relevant. Computed once, though each of several dimensions asks for it; every worker
        has to ask, since the first time gathers the keys of all."""
        return known_relevant(self)

    @cached_property
    def exchanged(self) -> BatchKeys:
        """The roles exchanged: first documents look for queries."""
        return BatchKeys(query=self.documents[0], documents=(self.query,), device=self.device)


class KnownRelevant:
    """Which documents of the gathered batch are known to be relevant to a query of this worker, or missing.

    Memory is linear in the rows. Example: queries 0 and 2 are equal, document 2 equals document 1. The group {0, 2} of
    queries leads to document 0, alone, and to the group {1, 2} of documents: these are known to queries 0 and 2.
    """

    def __init__(
        self,
        own_B: Tensor,
        missing_C: Tensor,
        group_B4: Tensor,
        reached: _Lists,
        held: _Lists,
        device: torch.device,
    ) -> None:
        """All given lies in the CPU's memory.

        Args:
            own_B: place of each query's own document.
            missing_C: True where a column has no document in its row.
            group_B4: groups of queries that each query lies in, -1 for none.
            reached: groups of documents that each group of queries leads to.
            held: documents of each group of documents.
            device: where the places that are asked for are wanted.
        """
        self.own_B = send(own_B, device)
        self.num_documents = len(missing_C)
        self.missing_M = send(missing_C.nonzero(as_tuple=True)[0], device)
        """Places without a document, which are nobody's negative."""
        self._device = device
        self._group_B4 = group_B4
        self._reached = reached
        self._held = held

    def blocks(self, width: int | None = None) -> Iterator[slice]:
        """This worker's queries in slices of which each has at most CELLS_PER_BLOCK cells, or one query.

        `width` is the cells of a query, the documents unless given.
        """
        cells = CELLS_PER_BLOCK.get(self._device.type, CELLS_PER_BLOCK["cuda"])
        size = max(1, cells // (width or self.num_documents))
        for first in range(0, len(self.own_B), size):
            yield slice(first, min(first + size, len(self.own_B)))

    def pairs(self, rows: slice) -> tuple[Tensor, Tensor]:
        """(P,) queries of the slice, counted from its start, and (P,) documents known to be relevant to them.

        A query's own document may be among them or not; a pair may come more than once.
        """
        row_E, column_E = (self._group_B4[rows] >= 0).nonzero(as_tuple=True)
        entry_E, group_E = self._reached.of(self._group_B4[rows][row_E, column_E])
        pair_P, document_P = self._held.of(group_E)
        return send(row_E[entry_E][pair_P], self._device), send(document_P, self._device)

    def mask(self, rows: slice) -> Tensor:
        """(R, C) True where a document is missing, or known to be relevant to a query of the slice, as its own is."""
        own_R = self.own_B[rows]
        known_RC = torch.zeros(len(own_R), self.num_documents, dtype=torch.bool, device=own_R.device)
        known_RC[torch.arange(len(own_R), device=own_R.device), own_R] = True
        known_RC[self.pairs(rows)] = True
        known_RC[:, self.missing_M] = True
        return known_RC


class _Lists:
    """One list of numbers for each of G groups, end to end."""

    def __init__(self, group_E: Tensor, value_E: Tensor, num_groups: int) -> None:
        order_E = group_E.argsort(stable=True)
        self._value_E = value_E[order_E]
        self._count_G = torch.bincount(group_E, minlength=num_groups)
        self._first_G = self._count_G.cumsum(0) - self._count_G

    def of(self, group_E: Tensor) -> tuple[Tensor, Tensor]:
        """The lists of the groups end to end: (P,) which of the E it belongs to, and (P,) the number itself.

        Lists [[7], [8, 9]] of the groups 1, 0 give 0 0 1 and 8 9 7.
        """
        count_E = self._count_G[group_E]
        entry_P = torch.arange(len(group_E), device=group_E.device).repeat_interleave(count_E)
        # From where a list lies in the answer to where it lies here.
        shift_E = self._first_G[group_E] - (count_E.cumsum(0) - count_E)
        source_P = shift_E[entry_P]
        source_P += torch.arange(len(source_P), device=group_E.device)
        return entry_P, self._value_E[source_P]


def known_relevant(keys: BatchKeys) -> KnownRelevant:
    """Compare the keys of all workers: sorting (N, 3) queries and (C, 3) documents, and gathering them before."""
    query_N3 = gather_constants(keys.query)
    document_C3 = torch.cat([gather_constants(column) for column in keys.documents])
    num_rows, device = len(query_N3), query_N3.device

    group_N3, asked_N3, num_asked = _groups(query_N3)
    bag_C3, shared_C3, num_bags = _groups(document_C3)
    bag_N3, kept_N3 = bag_C3[:num_rows], shared_C3[:num_rows].clone()
    # A group of one document says what any other group with it says: one is kept where there is no larger.
    alone_N1 = ~kept_N3.any(1, keepdim=True)
    kept_N3 |= alone_N1 & (bag_N3 >= 0) & ((bag_N3 >= 0).cumsum(1) == 1)

    # A query equal to no other is a group of its own, which matters where its first document equals others.
    single_N1 = ~asked_N3.any(1, keepdim=True) & shared_C3[:num_rows].any(1, keepdim=True)
    itself_N1 = torch.arange(num_asked, num_asked + num_rows, device=device)[:, None]
    group_N4 = torch.cat([group_N3, itself_N1], 1).masked_fill(~torch.cat([asked_N3, single_N1], 1), -1)

    row_E, asked_E, kept_E = ((group_N4 >= 0)[:, :, None] & kept_N3[:, None]).nonzero(as_tuple=True)
    step_E = (group_N4[row_E, asked_E] * num_bags + bag_N3[row_E, kept_E]).unique()
    reached = _Lists(step_E // max(num_bags, 1), step_E % max(num_bags, 1), num_asked + num_rows)
    document_E, column_E = (bag_C3 >= 0).nonzero(as_tuple=True)
    held = _Lists(bag_C3[document_E, column_E], document_E, num_bags)
    own_B = own_places(keys.query)
    return KnownRelevant(own_B, missing_documents(document_C3), group_N4[own_B], reached, held, keys.device)


def missing_documents(document_C3: Tensor) -> Tensor:
    """(C,) True where a column has no document in this row; such a place is nobody's negative."""
    return (document_C3 == NO_KEY).all(-1)


def own_places(rows: Tensor) -> Tensor:
    """(B,) where this worker's rows (B, …) lie among the rows of all workers."""
    return torch.arange(len(rows), device=rows.device) + rank() * len(rows)


def _groups(keys_N3: Tensor) -> tuple[Tensor, Tensor, int]:
    """Group of rows with the same key, (N, 3) and -1 for NO_KEY; whether it has two rows or more, (N, 3); how many.

    Groups count on from one key to the next: a text is never an id.
    """
    groups, shared, num_groups = [], [], 0
    for keys_N in keys_N3.T:
        _, group_N, count_G = keys_N.unique(return_inverse=True, return_counts=True)
        groups.append((group_N + num_groups).masked_fill(keys_N == NO_KEY, -1))
        shared.append((count_G[group_N] > 1) & (keys_N != NO_KEY))
        num_groups += len(count_G)
    return torch.stack(groups, 1), torch.stack(shared, 1), num_groups


def text_keys(
    texts: Sequence[str | None],
    ids: Sequence[str | None] | None = None,
    labels: Sequence[str | None] | None = None,
) -> Tensor:
    """int64 (B, 3): keys of the text in its plain form, of the id and of the label, for BatchKeys.

    A text is None where a row has no document in this column.
    """
    nothing = [None] * len(texts)
    given_ids = nothing if ids is None else ids
    given_labels = nothing if labels is None else labels
    rows = [
        [_key(None if text is None else plain_text(text)), _key(name), _key(label)]
        for text, name, label in zip(texts, given_ids, given_labels, strict=True)
    ]
    return torch.tensor(rows, dtype=torch.int64).reshape(len(texts), 3)


def _key(value: str | None) -> int:
    if value is None:
        return NO_KEY
    digest = hashlib.blake2b(value.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True) or 1
