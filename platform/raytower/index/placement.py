"""Placement by cluster: on which shard a document lies, and which shards a query visits.

The sample is clustered into many more clusters than there are shards, and whole clusters are packed on shards: near
clusters together, no shard much larger than another. A document lies on the shard of its nearest centroid; a query
visits the shards that own the centroids it scores highest. It is the coarse quantiser of an inverted file, with shards
in the place of lists.

Both metrics place a vector at its L2-nearest centroid. Under cosine that is the centroid with the highest inner
product, since vectors and centroids have unit length (spherical k-means, Dhillon and Modha 2001). Under inner product
a centroid is the mean of its cluster, so its score is the mean score of the cluster: a vector much longer than its
neighbours may score far above that, and queries for such vectors need more shards.

Shape legend: N vectors, Q queries, D dimension, C clusters, S shards.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raytower.errors import FormatError, InputError
from raytower.index.config import Metric
from raytower.index.faiss_import import import_faiss
from raytower.storage import Location

FORMAT_VERSION = 1
# More follow the data more closely; each query is scored against all of them.
_CLUSTERS_PER_SHARD = 64

# The largest and the smallest shard, in multiples of the mean. They hold while each cluster has fewer rows than
# (_BALANCE - 1) times the mean.
_BALANCE = 1.25
_LEAST = 0.5
# FAISS asks for 39 training points a centroid and is content with more.
_MIN_ROWS_PER_CLUSTER = 39
_SAMPLE_ROWS_PER_CLUSTER = 64
_K_MEANS_ROUNDS = 20
_SPLIT_ROUNDS = 8
# Packing is cheap beside k-means and falls into local optima: several starts, each improved for some rounds.
_PACKING_STARTS = 8
_PACKING_ROUNDS = 10
# Scores against all centroids exist for so many values at a time (16 MiB).
_BLOCK_VALUES = 1 << 22

# What zipfile and NumPy raise for bytes that are no archive of arrays.
_DAMAGE = (ValueError, KeyError, TypeError, EOFError, OSError, RuntimeError, zipfile.BadZipFile, zlib.error)

Vectors = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Placement:
    """`centroids` float32 (C, D) and the shard that owns each, `shard_of` int32 (C,), in order of the shards.

    Raises:
        FormatError: arrays that do not fit together, values that are not finite, or a shard without a centroid.
    """

    centroids: Vectors
    shard_of: NDArray[np.int32]

    def __post_init__(self) -> None:
        centroids, shard_of = self.centroids, self.shard_of
        if centroids.ndim != 2 or centroids.dtype != np.float32 or not centroids.size:
            raise FormatError(
                f"centroids are {centroids.dtype} {centroids.shape}; a placement needs float32 (clusters, dim)"
            )
        if shard_of.shape != centroids.shape[:1] or shard_of.dtype != np.int32:
            raise FormatError(
                f"shard_of is {shard_of.dtype} {shard_of.shape} beside {len(centroids)} centroids; a placement needs "
                "one int32 shard number for each"
            )
        if not np.isfinite(centroids).all():
            raise FormatError("a placement has centroids that are NaN or infinite")
        if shard_of[0] != 0 or not np.isin(np.diff(shard_of), (0, 1)).all():
            raise FormatError(
                f"the centroids of a placement belong to the shards {shard_of[:20].tolist()}; these must rise from 0 "
                "without a gap"
            )

    @property
    def num_shards(self) -> int:
        return int(self.shard_of[-1]) + 1

    @property
    def dim(self) -> int:
        return self.centroids.shape[1]

    @property
    def sha256(self) -> str:
        """Identifies what this placement does; work done by another placement must not be taken up."""
        shapes = f"{self.centroids.shape}{self.shard_of.shape}".encode()
        return hashlib.sha256(shapes + self.centroids.tobytes() + self.shard_of.tobytes()).hexdigest()

    def assign(self, vectors: Vectors) -> NDArray[np.int32]:
        """The shard of each vector (N, D), shape (N,): that of its L2-nearest centroid, the first of equal ones.

        Raises:
            InputError: vectors of another dimension.
        """
        self._check_dim(vectors)
        return self.shard_of[_nearest(vectors, self.centroids)]

    def visit(self, queries: Vectors, shards_probe: int) -> NDArray[np.bool_]:
        """Which shards each query (Q, D) visits, shape (Q, S): the `shards_probe` with the highest best centroid.

        Equal scores go by shard number, so more shards always include those of fewer. `shards_probe` of S or more
        visits all.

        Raises:
            InputError: `shards_probe` below 1, or queries of another dimension.
        """
        self._check_dim(queries)
        if shards_probe < 1:
            raise InputError(f"shards_probe is {shards_probe}; a query visits at least 1 shard")
        visited = np.ones((len(queries), self.num_shards), np.bool_)
        if shards_probe >= self.num_shards:
            return visited
        visited[:] = False
        starts = np.searchsorted(self.shard_of, np.arange(self.num_shards))
        for part in _blocks(len(queries), len(self.centroids)):
            best = np.maximum.reduceat(queries[part] @ self.centroids.T, starts, axis=1)
            nearest = np.argsort(-best, axis=1, kind="stable")[:, :shards_probe]
            np.put_along_axis(visited[part], nearest, True, axis=1)
        return visited

    def without_empty(self, shard_rows: NDArray[np.int64]) -> Placement:
        """This placement without the shards that got no rows; the others are renumbered in order.

        Their centroids go too: none was any row's nearest, so no row's shard changes.

        Args:
            shard_rows: rows of each shard, (S,).
        """
        filled = shard_rows > 0
        kept = filled[self.shard_of]
        new_numbers = (np.cumsum(filled) - 1).astype(np.int32)
        return Placement(self.centroids[kept], new_numbers[self.shard_of[kept]])

    def save(self, place: str | os.PathLike[str] | Location) -> None:
        """Write one .npz file, atomically and without pickle; equal placements give equal bytes."""
        with Location.of(place).open_write() as sink:
            np.savez(
                sink,
                allow_pickle=False,
                format_version=np.int64(FORMAT_VERSION),
                centroids=self.centroids,
                shard_of=self.shard_of,
            )

    @staticmethod
    def load(place: str | os.PathLike[str] | Location) -> Placement:
        """Read what `save` wrote; the archive's checksums are verified.

        Raises:
            InputError: no such file. FormatError: damaged, of a newer format, or no placement.
        """
        where = Location.of(place)
        content = where.read_bytes()
        try:
            values = _read_arrays(content)
            version = int(values["format_version"])
        except _DAMAGE as error:
            raise FormatError(
                f"{where} is no whole placement file: {error}; roll back or build the index again"
            ) from error
        if version != FORMAT_VERSION:
            raise FormatError(
                f"{where} has format version {version}; this raytower reads version {FORMAT_VERSION}: use the "
                "raytower that wrote it, or build the index again"
            )
        try:
            return Placement(values["centroids"], values["shard_of"])
        except (KeyError, FormatError) as error:
            raise FormatError(f"{where} is no placement: {error}; build the index again") from error

    def _check_dim(self, vectors: Vectors) -> None:
        if vectors.ndim != 2 or vectors.shape[1] != self.dim:
            raise InputError(
                f"vectors have shape {vectors.shape}; this placement takes (vectors, {self.dim}): use the encoder that "
                "made the index"
            )


def sample_rows_for(num_shards: int) -> int:
    """Rows that a sample should have for `train_placement`; fewer make coarser clusters."""
    return num_shards * _CLUSTERS_PER_SHARD * _SAMPLE_ROWS_PER_CLUSTER


def train_placement(
    sample: Vectors, num_shards: int, seed: int, *, metric: Metric, num_threads: int = 1
) -> Placement:
    """Cluster a sample (N, D) and pack the clusters on shards; the same call gives the same placement.

    On the sample every shard holds between 0.5 and 1.25 times the mean as long as no cluster is heavier than a
    quarter of the mean, and heavier ones are split as long as their rows can be told apart. Equal vectors
    are never split, since a query for them would have to visit every shard that holds a copy; so a shard may be as
    large as the mean plus its largest group of equal vectors.

    There are fewer shards than asked where the sample has fewer distinct vectors, down to one shard where all are
    equal. Under cosine the sample must have unit length.

    Args:
        sample: random rows, about `sample_rows_for(num_shards)`; one k-means over all of it takes
            N * num_shards * 64 * D * 40 floating-point operations.

    Raises:
        InputError: an empty sample, values that are not finite, or no shard.
    """
    if num_shards < 1:
        raise InputError(f"shards is {num_shards}; placement by cluster needs at least 1")
    if sample.ndim != 2 or not len(sample):
        raise InputError(f"the sample has shape {sample.shape}; placement is trained on at least one vector")
    if not np.isfinite(sample).all():
        raise InputError("the sample holds NaN or infinity; check the encoder and encode the corpus again")
    import_faiss().omp_set_num_threads(num_threads)
    clusters = max(num_shards, min(num_shards * _CLUSTERS_PER_SHARD, len(sample) // _MIN_ROWS_PER_CLUSTER))
    trainer = _Trainer(seed=seed, spherical=metric == "cosine")
    heaviest = (_BALANCE - 1) * len(sample) / num_shards
    centroids, weights = trainer.clusters(np.ascontiguousarray(sample, np.float32), clusters, heaviest)
    shard_of = trainer.pack(centroids, weights, min(num_shards, len(centroids)))
    order = np.argsort(shard_of, kind="stable")
    return Placement(centroids[order], shard_of[order])


@dataclass(frozen=True, kw_only=True)
class _Trainer:
    seed: int
    spherical: bool

    def clusters(self, sample: Vectors, count: int, heaviest: float) -> tuple[Vectors, NDArray[np.int64]]:
        """Centroids that each are some sample row's nearest, and how many rows'; heavy ones are split."""
        centroids = self._cluster(sample, count)
        for _ in range(_SPLIT_ROUNDS):
            centroids, weights, labels = _occupied(sample, centroids)
            heavy = np.flatnonzero(weights > heaviest)
            parts = [
                self._cluster(sample[labels == cluster], math.ceil(weights[cluster] / heaviest) + 1)
                for cluster in heavy
            ]
            if all(len(part) == 1 for part in parts):
                return centroids, weights
            centroids = np.concatenate([np.delete(centroids, heavy, axis=0), *parts])
        # Rows that differ by less than the arithmetic resolves stay together, as equal ones do.
        centroids, weights, _ = _occupied(sample, centroids)
        return centroids, weights

    def pack(self, centroids: Vectors, weights: NDArray[np.int64], num_shards: int) -> NDArray[np.int32]:
        """The shard of each cluster (C,): of several starts, the packing with the least squared distance in shards."""
        capacity = _BALANCE * weights.sum() / num_shards
        best, least = np.zeros(len(centroids), np.int32), math.inf
        for start in range(_PACKING_STARTS):
            centres = self._k_means(centroids, num_shards, start, weights.astype(np.float32))
            for _ in range(_PACKING_ROUNDS):
                shard_of = _fill(_squared_distances(centroids, centres), weights, capacity)
                centres = _weighted_means(centroids, weights, shard_of, num_shards)
                cost = float(weights @ ((centroids - centres[shard_of]) ** 2).sum(axis=1))
                if cost < least:
                    best, least = shard_of, cost
        return best

    def _cluster(self, rows: Vectors, count: int) -> Vectors:
        """Centroids of at most `count` clusters; the distinct rows themselves where there are no more of them."""
        distinct = _first_distinct(rows, count + 1)
        return distinct if len(distinct) <= count else self._k_means(rows, count, 0, None)

    def _k_means(self, rows: Vectors, count: int, start: int, weights: Vectors | None) -> Vectors:
        faiss = import_faiss()
        k_means = faiss.Kmeans(
            rows.shape[1],
            count,
            niter=_K_MEANS_ROUNDS,
            seed=(self.seed + start) % 2**31,
            # Only the sample's clusters lie on the sphere; the centres of shards are means of centroids.
            spherical=self.spherical and weights is None,
            min_points_per_centroid=1,
            max_points_per_centroid=len(rows),
        )
        k_means.train(rows, weights=weights)
        centroids: Vectors = k_means.centroids.copy()
        return centroids


def _fill(distances: Vectors, weights: NDArray[np.int64], capacity: float) -> NDArray[np.int32]:
    """Each cluster on the nearest shard with room for it, by distances (C, S), and no shard left poor.

    Clusters with most to lose choose first. Where none has room the least loaded takes it: that one is below the mean,
    so it ends at most one cluster above.
    """
    num_clusters, num_shards = distances.shape
    shard_of = np.zeros(num_clusters, np.int32)
    loads = np.zeros(num_shards, np.int64)
    two_nearest = np.partition(distances, min(1, num_shards - 1), axis=1)[:, :2]
    for cluster in np.argsort(two_nearest[:, 0] - two_nearest[:, -1], kind="stable"):
        has_room = loads + weights[cluster] <= capacity
        nearest = np.where(has_room, distances[cluster], np.inf).argmin()
        shard = nearest if has_room.any() else loads.argmin()
        shard_of[cluster] = shard
        loads[shard] += weights[cluster]
    _level(shard_of, loads, distances, weights)
    return shard_of


def _level(
    shard_of: NDArray[np.int32], loads: NDArray[np.int64], distances: Vectors, weights: NDArray[np.int64]
) -> None:
    """Give clusters to the poorest shard until it has half the mean, those that lie nearest to it in comparison.

    A few outliers would otherwise have a shard of their own. A giver stays at least as large as the shard that it
    gives to, so the sum of the squared loads falls with every step and the steps end. A shard of two clusters can
    always give one to an empty shard, so none stays empty.
    """
    num_shards = len(loads)
    while loads.min() < _LEAST * loads.mean():
        poorest = loads.argmin()
        owned = np.bincount(shard_of, minlength=num_shards)
        may_go = (owned[shard_of] > 1) & (loads[shard_of] - 2 * weights >= loads[poorest])
        if not may_go.any():
            return
        own_distances = np.take_along_axis(distances, shard_of[:, None].astype(np.int64), axis=1)[:, 0]
        given = np.where(may_go, distances[:, poorest] - own_distances, np.inf).argmin()
        loads[shard_of[given]] -= weights[given]
        loads[poorest] += weights[given]
        shard_of[given] = poorest


def _weighted_means(
    centroids: Vectors, weights: NDArray[np.int64], shard_of: NDArray[np.int32], num_shards: int
) -> Vectors:
    sums = np.zeros((num_shards, centroids.shape[1]))
    np.add.at(sums, shard_of, centroids * weights[:, None].astype(np.float64))
    return (sums / np.bincount(shard_of, weights, num_shards)[:, None]).astype(np.float32)


def _squared_distances(left: Vectors, right: Vectors) -> Vectors:
    squares = (left**2).sum(axis=1)[:, None] + (right**2).sum(axis=1)
    return np.maximum(squares - 2 * (left @ right.T), 0)


def _occupied(sample: Vectors, centroids: Vectors) -> tuple[Vectors, NDArray[np.int64], NDArray[np.int64]]:
    """The centroids that are some row's nearest, how many rows each has, and the centroid of each row."""
    nearest = _nearest(sample, centroids)
    weights = np.bincount(nearest, minlength=len(centroids))
    kept = weights > 0
    return centroids[kept], weights[kept], (np.cumsum(kept) - 1)[nearest]


def _nearest(vectors: Vectors, centroids: Vectors) -> NDArray[np.int64]:
    """The L2-nearest centroid of each vector (N,): the highest c·x - |c|²/2.

    Both are taken relative to the centroids' mean: embeddings often share a large component, beside which float32
    would lose the differences.
    """
    origin = centroids.mean(axis=0)
    centred = centroids - origin
    half_squares = (centred**2).sum(axis=1) / 2
    nearest = np.empty(len(vectors), np.int64)
    for part in _blocks(len(vectors), len(centroids)):
        nearest[part] = ((vectors[part] - origin) @ centred.T - half_squares).argmax(axis=1)
    return nearest


def _first_distinct(rows: Vectors, count: int) -> Vectors:
    """The first `count` distinct rows, or all of them where there are fewer."""
    found: dict[bytes, int] = {}
    for number, row in enumerate(rows):
        found.setdefault(row.tobytes(), number)
        if len(found) == count:
            break
    return rows[list(found.values())]


def _blocks(rows: int, columns: int) -> Iterator[slice]:
    step = max(_BLOCK_VALUES // columns, 1)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _read_arrays(content: bytes) -> dict[str, NDArray[Any]]:
    # Checksums first: an array's header that is damaged could ask for any amount of memory.
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return dict(arrays)
