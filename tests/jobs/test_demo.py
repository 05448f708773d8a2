"""`raytower demo` in its small form: every stage runs, and what it prints agrees with what it made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from raytower.config import make_config
from raytower.demo.config import DemoConfig
from raytower.demo.run import QUESTIONS, run_demo
from raytower.models.cross_encoder import CrossEncoder, CrossScorer
from tests.support.tiny_models import build_tiny_encoder

RECALL_K = 6


@pytest.mark.usefixtures("ray_cluster")
def test_the_demo_ends_with_recall_and_rerank_of_each_question(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on a machine without fast bfloat16: its last digits depend on the rows beside, and ranks here on them.
    monkeypatch.setattr("raytower.demo.run.fast_dtype", lambda device: "float32")
    model = build_tiny_encoder(tmp_path / "model")
    values = {"sample": "small", "model": str(model), "work_dir": str(tmp_path / "demo"), "port": 0}
    figures = run_demo(make_config(DemoConfig, {**values, "recall_k": RECALL_K}))
    printed = capsys.readouterr().out.splitlines()
    check_verdicts(figures, printed)
    stored = json.loads((tmp_path / "demo" / "reranker" / "raytower.json").read_text())["fusion"]
    assert stored["weight"] == figures["dev"]["fusion_weight"]
    texts = {
        row["_id"]: row["text"]
        for row in map(json.loads, (tmp_path / "demo" / "data" / "corpus.jsonl").read_text().splitlines())
    }
    scorer = CrossScorer(CrossEncoder.load(tmp_path / "demo" / "reranker"))
    for question in QUESTIONS:
        answers = figures["questions"][question]["answers"]
        assert [answer["recall_rank"] for answer in answers] == list(range(1, RECALL_K + 1))
        recall = [answer["recall_score"] for answer in answers]
        assert recall == sorted(recall, reverse=True)
        logits = scorer.score([question] * RECALL_K, [texts[answer["id"]] for answer in answers]).tolist()
        assert [answer["rerank_score"] for answer in answers] == pytest.approx(logits, abs=1e-4)
        assert [answer["rerank_rank"] for answer in answers] == ranks(logits)
        fused = [
            (1 - stored["weight"]) * (score - stored["recall_mean"]) / stored["recall_std"]
            + stored["weight"] * (logit - stored["rerank_mean"]) / stored["rerank_std"]
            for score, logit in zip(recall, logits, strict=True)
        ]
        assert [answer["fused_rank"] for answer in answers] == ranks(fused)
        check_question(question, figures, printed)


def ranks(scores: list[float]) -> list[int]:
    return [1 + sum(other > score for other in scores) for score in scores]


def check_verdicts(figures: dict[str, Any], printed: list[str]) -> None:
    """A stage is served where dev says so, and the lines say the same."""
    dev, served = figures["dev"], figures["served"]
    better = dev["trained"] > dev["zero-shot"]
    assert served == {
        "encoder": "trained" if better else "zero-shot",
        "reranker": dev["fused"] > dev["recall"],
    }
    assert dev["fused"] >= max(dev["recall"], dev["reranker alone"])
    said = {True: "promoted", False: "no better, so it is NOT served"}
    assert f"training: dev mrr@10 {dev['zero-shot']:.4f} → {dev['trained']:.4f}: {said[better]}" in printed
    assert f"reranker alone: dev mrr@10 {dev['recall']:.4f} → {dev['reranker alone']:.4f}" in printed
    assert (
        f"fused reranking (weight {dev['fusion_weight']:.2f}): dev mrr@10 {dev['recall']:.4f} → "
        f"{dev['fused']:.4f}: {said[served['reranker']]}" in printed
    )
    rows = ["zero-shot", "trained", *(["reranked"] if served["reranker"] else [])]
    assert list(figures["test"]) == rows
    winner = rows[-1] if served["reranker"] else served["encoder"]
    assert [line.split(" |")[0] for line in printed if "(served)" in line] == [f"| {winner} (served)"]
    assert {"train retriever", "mine", "train reranker", "rerank dev", "serve"} <= figures[
        "seconds_by_stage"
    ].keys()


def check_question(question: str, figures: dict[str, Any], printed: list[str]) -> None:
    """The server's first three are those of the order that is served, and each stands in the question's table."""
    answers, ids = (figures["questions"][question][key] for key in ("answers", "served"))
    order = "fused_rank" if figures["served"]["reranker"] else "recall_rank"
    best = sorted(answers, key=lambda answer: answer[order])[:3]
    assert ids == [answer["id"] for answer in best]
    start = printed.index(question)
    weight = f"{figures['dev']['fusion_weight']:.2f}"
    by_recall, by_both = (
        ("recall", f"both (weight {weight}), served")
        if figures["served"]["reranker"]
        else ("recall, served", f"both (weight {weight})")
    )
    assert printed[start + 1].startswith(f"| rank by {by_recall} | by the reranker | by {by_both} |")
    end = next(row for row in range(start, len(printed)) if printed[row].startswith("answered over HTTP in"))
    assert printed[end].endswith(f"ms: {', '.join(ids)}")
    table = printed[start + 3 : end]
    shown = [
        answer
        for answer in answers
        if any(answer[name] <= 3 for name in ("recall_rank", "rerank_rank", "fused_rank"))
    ]
    assert len(table) == len(shown)
    for line, answer in zip(table, shown, strict=True):
        assert line.startswith(
            f"| {answer['recall_rank']} | {answer['rerank_rank']} | {answer['fused_rank']} "
            f"| {answer['recall_score']:.3f} | {answer['rerank_score']:.3f} | [{answer['id']}] "
        )
