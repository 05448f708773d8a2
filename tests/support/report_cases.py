"""A report and a comparison of figures that were made up, with texts that want to be more than texts."""

from __future__ import annotations

import math
from typing import Any

HOSTILE = "<script>document.title='owned'</script> & \"quoted\" ' 汽车保险怎么赔付 \x00\u202e"
_NAMES = ("recall@1", "hit@1", "recall@10", "hit@10", "mrr@10", "ndcg@10")
_KS = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100)


def metric(value: float, half: float = 0.02) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half}


def _curve(first: float, rise: float) -> list[dict[str, float]]:
    return [{"k": k, **metric(first + rise * math.log(k) / math.log(100))} for k in _KS]


def _group(name: str, value: float, half: float = 0.03) -> dict[str, Any]:
    return {"name": name, "queries": 300, **metric(value, half)}


def _loss(
    stage: str, against: str | None, values: tuple[float, ...], moves: tuple[float, ...]
) -> dict[str, Any]:
    names = ("recall@1", "recall@10", "ndcg@10")
    return {
        "stage": stage,
        "against": against,
        "metrics": dict(zip(names, map(metric, values), strict=True)),
        "differences": {name: metric(move, 0.008) for name, move in zip(names, moves, strict=bool(moves))},
    }


def _bell(middle: float, width: float, rows: int) -> list[int]:
    shares = [math.exp(-(((0.4 + 0.015 * place - middle) / width) ** 2)) for place in range(40)]
    return [round(rows * share / sum(shares)) for share in shares]


def _figures() -> dict[str, Any]:
    """All that a page draws."""
    return {
        "recall_by_k": [
            {"stage": "encoder", "points": _curve(0.43, 0.45)},
            {"stage": "fusion", "points": _curve(0.45, 0.43)},
            {"stage": "reranker", "points": _curve(0.5, 0.36)},
        ],
        "scores": {
            "edges": [0.4 + 0.015 * place for place in range(41)],
            "relevant": _bell(0.82, 0.08, 1100),
            "others": _bell(0.66, 0.1, 50_000),
            "every": 1,
        },
        "group_metric": "ndcg@10",
        "groups": {
            "length": [
                _group("3–9", 0.44),
                _group("10–17", 0.5),
                _group("18–31", 0.56),
                _group("32–210", 0.6),
            ],
            "script": [_group("Han", 0.55), _group("Latin", 0.5), _group("Han and Latin", 0.46, 0.06)],
        },
        "recall_against_time": [
            {
                "parameter": "nprobe",
                "setting": setting,
                "used": setting == 16,
                "milliseconds": milliseconds,
                "k": 10,
                **metric(recall),
            }
            for setting, milliseconds, recall in (
                (2, 0.1, 0.4),
                (8, 0.22, 0.56),
                (16, 0.4, 0.6),
                (64, 1.3, 0.61),
            )
        ],
    }


def report() -> dict[str, Any]:
    """What report.json may hold, with everything that a page can show."""
    hits = [
        {"rank": n, "score": 0.9 - n / 100, "id": f"document-{n}", "text": HOSTILE * 4, "relevant": n == 4}
        for n in range(1, 6)
    ]
    worst = {"query_id": "q1", "query": HOSTILE, "mrr@10": 0.0, "relevant": [HOSTILE * 3], "hits": hits}
    return {
        "queries": 1200,
        "counts": {"queries": 1200, "queries_without_relevant": 3, "relevant_missing": 12, "seconds": 31.2},
        "milliseconds": {"encode": 4100.0, "recall": 2300.0, "rerank": 61000.0},
        "stages": [
            {"title": "recall alone", "metrics": {name: metric(0.55) for name in _NAMES}},
            {"title": "recall, then rerank", "metrics": {name: metric(0.65) for name in _NAMES}},
        ],
        "loss_by_stage": [
            _loss("encoder", None, (0.43, 0.61, 0.52), ()),
            _loss("index", "encoder", (0.42, 0.60, 0.51), (-0.01, -0.01, -0.01)),
            _loss("lexical", "index", (0.35, 0.55, 0.45), (-0.07, -0.05, -0.06)),
            _loss("fusion", "index", (0.45, 0.64, 0.54), (0.03, 0.04, 0.03)),
            _loss("reranker", "fusion", (0.50, 0.67, 0.58), (0.05, 0.03, 0.004)),
        ],
        "stages_seconds": 12.5,
        "settings": {
            "index": "runs/index",
            "encoder": HOSTILE,
            "reranker": "models/reranker",
            "k": [1, 5, 10],
        },
        "figures": _figures(),
        "worst_queries": [worst, {**worst, "query_id": "q2", "hits": []}],
    }


def comparison() -> dict[str, Any]:
    """What comparison.json may hold."""
    systems = {"runs/reranked": 0.04, "runs/hybrid": -0.02}
    return {
        "baseline": "runs/dense",
        "queries": 1200,
        "queries_left_out": 4,
        "moved_by": "ndcg@10",
        "milliseconds": {"runs/dense": 5.2, "runs/reranked": 55.0, "runs/hybrid": 9.1},
        "comparisons": [
            {
                "metric": name,
                "system": system,
                "baseline_value": 0.5 + place / 50,
                "value": 0.5 + place / 50 + move,
                "difference": move,
                "low": move - 0.015,
                "high": move + 0.015,
                "p": 0.01,
                "p_holm": 0.02,
                "better": 140,
                "worse": 80,
                "equal": 980,
            }
            for place, name in enumerate(("recall@1", "recall@5", "recall@10", "mrr@10", "ndcg@10"))
            for system, move in systems.items()
        ],
        "moved": [
            {
                "system": "runs/reranked",
                "query_id": f"q{number}",
                "query": HOSTILE,
                "baseline_value": 0.1,
                "value": 0.9,
                "difference": 0.8,
            }
            for number in range(3)
        ],
    }


def classification() -> dict[str, Any]:
    """What a page of classify is made of."""
    names = ["cars", "homes", HOSTILE, "保险##汽车##理赔"]
    counts = [[90, 5, 3, 2], [8, 70, 20, 2], [0, 1, 30, 0], [4, 4, 2, 10]]
    return {
        "rows": 251,
        "mode": "votes",
        "accuracy": 0.797,
        "f1_macro": 0.71,
        "ece": 0.04,
        "intervals": {"accuracy": [0.74, 0.84]},
        "classes": {name: {"precision": 0.9, "recall": 0.8, "f1": 0.85, "rows": 60} for name in names},
        "confusion": {
            "names": names,
            "counts": counts,
            "pairs": [{"expected": names[1], "given": names[2], "rows": 20}],
        },
        "reliability": [
            {"chance": 0.05 + n / 10, "accuracy": min(1.0, 0.1 + n / 10), "rows": 25} for n in range(10)
        ],
        "coverage": [
            {"threshold": 1 - n / 10, "coverage": n / 10, "accuracy": 1 - n / 50} for n in range(1, 11)
        ],
        "levels": [
            {"level": n, "rows": 251, "accuracy": 0.9 - n / 10, "f1_macro": 0.8 - n / 10} for n in (1, 2)
        ],
        "settings": {"index": HOSTILE, "mode": "votes"},
    }
