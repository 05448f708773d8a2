"""Queries that an index measures its recall with: vectors of `target.queries`, kept in the index."""

from __future__ import annotations

import hashlib
import io

import numpy as np

from raytower.data.config import QueriesConfig
from raytower.data.queries import read_queries
from raytower.errors import FormatError
from raytower.index.manifest import QUERIES_NAME, FileEntry, IndexManifest, Origin
from raytower.index.measure import NUM_QUERIES, HeldOut
from raytower.index.shard import local_file
from raytower.storage import Location


def kept_queries(index: Location, origin: Origin, queries: QueriesConfig) -> FileEntry:
    """Up to 256 of the queries as vectors in the index, made by the encoder of its documents.

    Raises:
        InputError: bad queries, or an encoder that is not on this machine. FormatError: another encoder of that name.
    """
    content = _encoded(origin, queries)
    entry = FileEntry(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))
    (index / QUERIES_NAME / f"{entry.sha256}.npy").put_if_absent(content)
    return entry


def opened_queries(index: Location, draft: IndexManifest) -> HeldOut | None:
    """The queries of an index, none of them a row of it; None where documents are taken as queries."""
    if draft.queries is None:
        return None
    path = local_file(index / QUERIES_NAME / f"{draft.queries.sha256}.npy", draft.queries)
    vectors = np.load(path, allow_pickle=False)
    return HeldOut(np.full(len(vectors), -1, np.int64), vectors)


def _encoded(origin: Origin, queries: QueriesConfig) -> bytes:
    from raytower.models.encoder import Encoder
    from raytower.models.forward import ForwardEngine

    texts = read_queries(queries.path, queries.format, queries.split).texts
    encoder = Encoder.load(origin.encoder)
    if encoder.fingerprint != origin.fingerprint:
        raise FormatError(
            f"target.queries cannot be encoded: {origin.encoder!r} has fingerprint {encoder.fingerprint}, the "
            f"embeddings were made with {origin.fingerprint}"
        )
    chosen = texts[:: -(-len(texts) // NUM_QUERIES)]
    vectors = ForwardEngine(encoder, max_length=origin.max_length).encode(chosen, origin.query_prefix)
    if origin.metric == "cosine":
        vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    stream = io.BytesIO()
    np.save(stream, vectors.astype(np.float32), allow_pickle=False)
    return stream.getvalue()
