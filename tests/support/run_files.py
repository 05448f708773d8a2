"""Reading a run file as trec_eval does, and ids back from their percent-encoding."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote

from raytower.storage import Location


def read_run(place: Location | Path) -> dict[str, list[tuple[str, float]]]:
    """Documents with scores of each query, best score first; the rank column plays no part."""
    run: dict[str, list[tuple[str, float]]] = {}
    for line in Location.of(place).read_bytes().decode().splitlines():
        query, constant, document, _, score, _ = line.split()
        assert constant == "Q0"
        run.setdefault(unquote(query), []).append((unquote(document), float(score)))
    return {query: sorted(ranked, key=lambda item: -item[1]) for query, ranked in run.items()}
