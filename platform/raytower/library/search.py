"""A published index, opened for search in this process, without Ray.

Shape legend: Q queries, D embedding dimension.
"""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict, Unpack, get_args, overload

from numpy.typing import NDArray

from raytower.data.unseen import is_unseen
from raytower.errors import FormatError, InputError
from raytower.index.hybrid import HybridFusion, check_mode
from raytower.index.reader import Filter, Index
from raytower.index.search_config import HybridConfig
from raytower.library.inputs import Unpicklable, count_of, name_of, plain, texts_of, vectors_of
from raytower.library.models import ENCODER, Encoder, Reranker, Several, load_encoder, load_reranker
from raytower.models.search_mode import SearchMode
from raytower.retrieval.retriever import Hit, Retriever, index_recall, recall_by, recall_order

_INDEX = "the folder or the URI of an index"
_RERANKER = "a Reranker, made by load_reranker, or the name of one"


class _Settings(TypedDict, total=False):
    filter: Filter | None
    rerank: Reranker | str | Path | None
    recall_k: int
    mode: SearchMode
    lexical_weight: float | None


class SearchIndex(Unpicklable):
    """One version of an index; made by `open_index`.

    It goes on answering with that version while newer ones are published: open the index again to see them. Safe for
    threads: searches run side by side, only the models compute one call after another, and each search answers as if it
    were alone.
    """

    def __init__(self, uri: str, index: Index, encoder: Encoder | None) -> None:
        self.uri = uri
        """Where the index lies."""
        self._index = index
        self._encoder = encoder
        self._rerankers: dict[str, Reranker] = {}
        self._loading = threading.Lock()

    def _how_to_send(self) -> str:
        return f"send its uri, {self.uri!r}, and call open_index there"

    def __len__(self) -> int:
        """Documents that can be found."""
        return self._index.num_rows

    @property
    def version(self) -> str:
        """The name of the version, such as `000003`."""
        return self._index.version

    @property
    def dim(self) -> int:
        """D, the embedding dimension."""
        return self._index.dim

    @property
    def encoder(self) -> Encoder:
        """What encodes queries; unless it was given, it is loaded by the name in the index when it is first needed.

        Raises:
            InputError: there is no such model on this machine.
            FormatError: it is another one than made the index.
        """
        with self._loading:
            if self._encoder is None:
                self._encoder = self._load_encoder()
            return self._encoder

    @overload
    def search(self, queries: str, k: int = 10, **settings: Unpack[_Settings]) -> list[Hit]: ...

    @overload
    def search(self, queries: Several, k: int = 10, **settings: Unpack[_Settings]) -> list[list[Hit]]: ...

    def search(
        self,
        queries: str | Several,
        k: int = 10,
        *,
        filter: Filter | None = None,
        rerank: Reranker | str | Path | None = None,
        recall_k: int = 100,
        mode: SearchMode = "dense",
        lexical_weight: float | None = None,
    ) -> list[Hit] | list[list[Hit]]:
        """The best documents for a query, or for each of several, best first: what `raytower search` finds.

        Args:
            queries: one text; or a list, which is encoded, searched and reranked together.
            k: hits a query; fewer come back where fewer documents match.
            filter: which documents may be hits, by their columns: `{"year": {"$gte": 2020}}`, or an SQL condition.
            rerank: puts the first `recall_k` in a new order; a reranker, or its name, which is loaded once. Its scores
                are mixed with recall scores where that was tuned in this mode.
            recall_k: how many documents the reranker sees of each query.
            mode: `dense` finds by vectors; `lexical` by words (BM25), and loads no encoder; `hybrid` by both.
            lexical_weight: share of words in mode hybrid, from 0 to 1; None is what was tuned for this index, else 0.3.

        Returns:
            hits with `id`, `text`, `metadata` (the other columns), `score` (what the order goes by), `recall_score`
            (dense: cosine or inner product; lexical: BM25; hybrid: a sum of both, standardised over the documents of
            this query), `rerank_score` (the reranker's logit, or None) and `rank` (from 1).

        Raises:
            InputError: a blank query, `k` or `recall_k` below 1, a filter that does not fit the columns, no such model,
                a mode that there is not, or that the index does not have.
            FormatError: the encoder is another one than made the index.

        >>> index = raytower.open_index(index_dir)
        >>> hits = index.search("Can I get my money back?", k=2, filter={"topic": "money"})
        >>> [(hit.id, hit.rank, hit.metadata) for hit in hits]
        [('refund', 1, {'topic': 'money'})]
        """
        hybrid = self._fusion(mode, lexical_weight)
        k, recall_k = count_of(k, "k"), count_of(recall_k, "recall_k")
        texts = texts_of([queries] if isinstance(queries, str) else queries, "queries")
        for place, text in enumerate(texts):
            if is_unseen(text):
                raise InputError(f"queries[{place}] is {text!r}, which is blank; give a text to search for")
        scorer = self._reranker(rerank)
        encoder = None if mode == "lexical" else self.encoder
        retriever = Retriever(
            encoder.shared if encoder else None,
            self._index,
            scorer,
            scorer.fusion if scorer is not None and scorer.fusion and scorer.fusion.mode == mode else None,
            query_prefix=encoder.prefix("query") if encoder else "",
            mode=mode,
        )
        recall = recall_by(self._index, mode, hybrid, plain(filter))
        hits = retriever.search(texts, k=k, recall_k=recall_k, recall=recall).hits
        return hits[0] if isinstance(queries, str) else hits

    def _fusion(self, mode: SearchMode, lexical_weight: float | None) -> HybridFusion:
        """How mode hybrid fuses. Raises InputError for a mode that there is not, or a weight that it does not read."""
        if mode not in get_args(SearchMode):
            raise InputError(f"mode is {mode!r}; it must be one of {', '.join(get_args(SearchMode))}")
        if lexical_weight is not None and mode != "hybrid":
            raise InputError(
                f"lexical_weight is {lexical_weight}, which mode {mode} does not read; set mode to 'hybrid', or leave "
                "it out"
            )
        check_mode(self._index.manifest, mode)
        fusion = HybridFusion.of(self._index.manifest, HybridConfig())
        return fusion if lexical_weight is None else replace(fusion, weight=lexical_weight)

    def search_vectors(
        self, vectors: NDArray[Any], k: int = 10, *, filter: Filter | None = None
    ) -> list[list[Hit]]:
        """The nearest documents to each of some query vectors, best first; no model is needed.

        Args:
            vectors: (Q, D), from the encoder that made the index, as queries.
            k: hits a query.
            filter: as of `search`.

        Raises:
            InputError: `k` below 1, another shape, values that are not finite, a filter that does not fit.

        >>> index = raytower.open_index(index_dir)
        >>> query = raytower.load_encoder(encoder_dir).encode(["opening times"], role="query")
        >>> [[hit.id for hit in hits] for hits in index.search_vectors(query, k=1)]
        [['hours']]
        """
        k, queries = count_of(k, "k"), vectors_of(vectors, "vectors", self.dim)
        if not len(queries):
            return []
        return [recall_order(found) for found in index_recall(self._index, plain(filter))(queries, k)]

    @overload
    async def asearch(self, queries: str, k: int = 10, **settings: Unpack[_Settings]) -> list[Hit]: ...

    @overload
    async def asearch(
        self, queries: Several, k: int = 10, **settings: Unpack[_Settings]
    ) -> list[list[Hit]]: ...

    async def asearch(self, queries: Any, k: int = 10, **settings: Unpack[_Settings]) -> Any:
        """`search`, for `await`: it waits in a thread of asyncio's own pool."""
        return await asyncio.to_thread(lambda: self.search(queries, k, **settings))

    def _load_encoder(self) -> Encoder:
        name = self._index.encoder
        try:
            loaded = load_encoder(name)
        except FormatError:
            raise
        except InputError as error:
            raise InputError(
                f"the encoder of {self.uri} cannot be loaded: {error}; name it: open_index(uri, encoder=...)"
            ) from error
        self._index.check_fingerprint(loaded.fingerprint)
        return loaded

    def _reranker(self, named: Reranker | str | Path | None) -> Reranker | None:
        if named is None or isinstance(named, Reranker):
            return named
        with self._loading:
            name = name_of(named, "rerank", _RERANKER)
            if name not in self._rerankers:
                self._rerankers[name] = load_reranker(name)
            return self._rerankers[name]


def open_index(
    uri: str | Path, *, version: str | None = None, encoder: Encoder | str | Path | None = None
) -> SearchIndex:
    """Open an index for search.

    Args:
        uri: a folder or a URI, as `index_texts` or `raytower index build` wrote it. What lies remotely is fetched once.
        version: which version; None is the newest.
        encoder: what encodes queries, or its name; None is the one that the index names, loaded at the first search.

    Raises:
        InputError: no index there, no such version, or no such encoder.
        FormatError: the encoder is another one than made the index, or a file is missing or damaged.
        MissingExtraError: FAISS is not installed.

    >>> index = raytower.open_index(index_dir)
    >>> len(index), index.dim, index.version
    (3, 384, '000001')
    """
    place = name_of(uri, "uri", _INDEX)
    opened = Index.open(place, version)
    if encoder is None or isinstance(encoder, Encoder):
        ready = encoder
    else:
        ready = load_encoder(name_of(encoder, "encoder", ENCODER))
    if ready is not None:
        opened.check_fingerprint(ready.fingerprint)
    return SearchIndex(place, opened, ready)
