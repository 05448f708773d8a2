"""Versions of a small index for servers."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from raytower.models.encoder import Encoder
from raytower.models.forward import ForwardEngine
from tests.support.index_cases import build, write_embeddings

TEXTS = [f"{word} {number}" for number in range(10) for word in ("sun", "moon", "star", "月亮", "大地")]


def write_version(
    folder: Path,
    version: str,
    encoder_dir: Path,
    num_shards: int = 2,
    texts: list[str] = TEXTS,
    titles: list[str | None] | None = None,
) -> None:
    """A flat index version, the next one of its folder. Ids carry the version, so that a mix would show."""
    more = {} if titles is None else {"title": pa.array(titles, pa.string())}
    encoder = Encoder.load(str(encoder_dir))
    embeddings = write_embeddings(
        folder.with_name(f"{folder.name}-{version}"),
        [f"{version}/{row}" for row in range(len(texts))],
        ForwardEngine(encoder).encode(texts),
        texts,
        {"number": pa.array(range(len(texts))), **more},
        fingerprint=encoder.fingerprint,
        encoder=str(encoder_dir),
    )
    assert build(folder, embeddings, shards=num_shards, replace=True)["version"] == version
