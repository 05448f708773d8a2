"""mine, classify and evaluate in shares of their input: what is written and counted is what one pass over all gives."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raytower.annotation import classify as classify_module
from raytower.annotation import mine as mine_module
from raytower.annotation.classify import classify, depth_of, load_labeller, plan_classify
from raytower.annotation.config import ClassifyConfig, MineConfig
from raytower.annotation.deciding import Decider
from raytower.annotation.label_figures import HIT_CUTOFFS, LabelTally
from raytower.annotation.labels import Prediction
from raytower.annotation.mine import MinedCounts, Miner, Pair, mine, plan_mine
from raytower.annotation.negatives import KnownPositives
from raytower.annotation.rows_in import row_batches, survey_rows
from raytower.annotation.rows_out import open_rows
from raytower.config import make_config
from raytower.data.pieces import read_pieces
from raytower.errors import InputError
from raytower.evaluation import in_shares as evaluation_module
from raytower.evaluation.config import EvaluateConfig
from raytower.evaluation.evaluate import evaluate, plan_evaluate
from raytower.index.reader import Index
from raytower.retrieval.load import load_engine, load_reranker
from raytower.storage import Location
from tests.support.labelled_index import LabelledIndexes

FIRST = ["apple", "river", "stone", "cloud", "tiger", "piano"]
SECOND = ["lemon", "train", "ocean", "candle", "window"]
TEXTS = [f"{first} {second}" for first in FIRST for second in SECOND]
ROWS = [(text, f"things##{text.split()[0]}") for text in TEXTS]
SETTINGS: list[dict[str, Any]] = [
    {"recall_k": 20, "num_negatives": 3},
    {"recall_k": 20, "num_negatives": 2, "sampling": "score", "max_score_ratio": 0.99, "seed": 3},
    {"recall_k": 12, "num_negatives": 2, "format": "scored", "teacher": "reranker", "screen": "reranker"},
    {"recall_k": 4, "num_negatives": 4, "format": "candidates", "file_type": "jsonl", "skip_top": 0},
]


@pytest.fixture(scope="module")
def world(dummy_encoder_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> LabelledIndexes:
    return LabelledIndexes(dummy_encoder_dir, tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def index(world: LabelledIndexes) -> str:
    return world.index(ROWS)


# --- mine ---------------------------------------------------------------------------------------------------------


def pairs_file(folder: Path) -> str:
    """Pairs of which many forbid each other's documents: the next text but one is a positive of each."""
    rows = [(text, TEXTS[(place + 2) % len(TEXTS)]) for place, text in enumerate(TEXTS)]
    (folder / "pairs.tsv").write_text("".join(f"{query}\t{title}\n" for query, title in rows))
    return str(folder / "pairs.tsv")


def mine_config(world: LabelledIndexes, index: str, folder: Path, reranker: Path, **more: Any) -> MineConfig:
    named = {key: str(reranker) for key, value in more.items() if value == "reranker"}
    values = {"encoder": world.encoder, "index": index, "input": pairs_file(folder), "rows_per_batch": 4}
    return make_config(MineConfig, {**values, "output": str(folder / "mined"), **more, **named})


def mined_at_once(config: MineConfig, output: Path) -> MinedCounts:
    """One pass over all pairs with one writer, without shares and parts."""
    assert config.encoder is not None
    surveyed = survey_rows(config, "pairs")
    keys = [KnownPositives.keys_of(table) for table in read_pieces(surveyed.pieces)]
    miner = Miner(
        config,
        load_engine(config.encoder, config),
        Index.open(config.index),
        KnownPositives(np.concatenate(keys)),
        load_reranker(config.teacher, config) if config.teacher else None,
        load_reranker(config.screen.reranker, config) if config.screen else None,
    )
    number = 0
    with open_rows(Location.of(output), config.file_type, mine_module._COLUMNS[config.format]) as writer:
        for table in row_batches(surveyed, config.rows_per_batch):
            rows = zip(table["query"].to_pylist(), table["document"].to_pylist(), strict=True)
            miner.mine([Pair(number + place, *row) for place, row in enumerate(rows)], writer)
            number += table.num_rows
    return miner.counts


@pytest.mark.parametrize("settings", SETTINGS)
def test_shares_mine_what_one_pass_mines(
    world: LabelledIndexes,
    index: str,
    dummy_reranker_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
) -> None:
    config = mine_config(world, index, tmp_path, dummy_reranker_dir, **settings)
    counts = mined_at_once(config, tmp_path / "at once")
    assert counts.pairs == len(TEXTS)
    expected = (tmp_path / "at once").read_bytes()
    for rows in (4, 8, 8192):
        monkeypatch.setattr(mine_module, "_MAX_PAIRS_PER_SHARE", rows)
        assert plan_mine(config)["parts"] == -(-len(TEXTS) // rows)
        result = mine(config)
        assert (tmp_path / "mined").read_bytes() == expected
        assert {name: result[name] for name in asdict(counts)} == asdict(counts)


def test_a_share_forbids_the_positives_of_all_others(
    world: LabelledIndexes, index: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each query stands in a row a share away from the row that says what is relevant to it besides."""
    query = TEXTS[0]
    rows = [(query, other) for other in TEXTS[1:11]]
    (tmp_path / "pairs.tsv").write_text("".join(f"{text}\t{title}\n" for text, title in rows))
    values = {"encoder": world.encoder, "index": index, "input": str(tmp_path / "pairs.tsv")}
    config = {**values, "output": str(tmp_path / "mined.tsv"), "recall_k": 30, "num_negatives": 30}
    monkeypatch.setattr(mine_module, "_MAX_PAIRS_PER_SHARE", 2)
    mine(make_config(MineConfig, config))
    negatives = {line.split("\t")[2] for line in (tmp_path / "mined.tsv").read_text().splitlines()[1:]}
    assert negatives == set(TEXTS[11:])


def test_mining_goes_on_where_it_ended(
    world: LabelledIndexes,
    index: str,
    dummy_reranker_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(mine_module, "_MAX_PAIRS_PER_SHARE", 4)
    config = mine_config(world, index, tmp_path, dummy_reranker_dir, **SETTINGS[0])
    whole = mine(config)
    expected = (tmp_path / "mined").read_bytes()
    (tmp_path / "mined").unlink()
    end_in_share(monkeypatch, mine_module.MineWorker, 3)
    with pytest.raises(KeyboardInterrupt):
        mine(config)
    assert not (tmp_path / "mined").exists()
    monkeypatch.undo()
    monkeypatch.setattr(mine_module, "_MAX_PAIRS_PER_SHARE", 4)
    capsys.readouterr()
    again = mine(config.model_copy(update={"rows_per_batch": 2}))
    assert "3 of 8 parts" in capsys.readouterr().err
    assert (tmp_path / "mined").read_bytes() == expected
    assert {**again, "seconds": None} == {**whole, "seconds": None}
    # Another seed draws anew.
    end_in_share(monkeypatch, mine_module.MineWorker, 3)
    with pytest.raises(KeyboardInterrupt):
        mine(config)
    mine(config.model_copy(update={"seed": 1}))
    assert (tmp_path / "mined").read_bytes() != expected


def end_in_share(monkeypatch: pytest.MonkeyPatch, worker: Any, number: int) -> None:
    """The worker's share of this number ends the job, once, as a kill would."""
    call, done = worker.__call__, []

    def counted(self: Any, *arguments: Any) -> dict[str, Any]:
        if len(done) == number:
            done.append(None)
            raise KeyboardInterrupt
        done.append(None)
        figures: dict[str, Any] = call(self, *arguments)
        return figures

    monkeypatch.setattr(worker, "__call__", counted)


# --- classify -----------------------------------------------------------------------------------------------------


def classify_config(world: LabelledIndexes, index: str, folder: Path, **more: Any) -> ClassifyConfig:
    rows = [*ROWS[::2], ("apple river", "things##none"), ("tiger", "things")]
    (folder / "rows.tsv").write_text("".join(f"{text}\t{label}\n" for text, label in rows))
    values = {"encoder": world.encoder, "index": index, "input": str(folder / "rows.tsv")}
    return make_config(
        ClassifyConfig, {**values, "output": str(folder / "labels"), "rows_per_batch": 4, **more}
    )


CLASSIFIED: list[dict[str, Any]] = [
    {"mode": "labels", "file_type": "jsonl"},
    {"mode": "votes", "k": 5, "positive": "things##apple", "cut": 0.3, "abstain_below": 0.35},
    {"mode": "votes", "k": 5, "suspects": "suspects", "suspect_share": 0.4, "explain": True},
]


@pytest.mark.parametrize("settings", CLASSIFIED)
def test_shares_label_and_count_what_one_pass_does(
    world: LabelledIndexes,
    index: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
) -> None:
    if "suspects" in settings:
        settings = {**settings, "suspects": str(tmp_path / "suspects")}
    config = classify_config(world, index, tmp_path, **settings, report=str(tmp_path / "page.html"))
    names = [name for name in ("labels", "suspects", "page.html") if name != "suspects" or config.suspects]
    whole = classify(config)
    assert plan_classify(config)["parts"] == 1
    files = {name: (tmp_path / name).read_bytes() for name in names}
    assert len(files["labels"].splitlines()) == whole["rows"] + (config.file_type == "tsv")
    assert whole["labels_missing"] == 2
    for rows in (4, 8):
        monkeypatch.setattr(classify_module, "_MAX_TEXTS_PER_SHARE", rows)
        assert plan_classify(config)["parts"] == -(-17 // rows)
        parted = classify(config)
        assert {**parted, "seconds": None} == {**whole, "seconds": None}
        assert {name: (tmp_path / name).read_bytes() for name in names} == files
    if config.suspects:
        lines = files["suspects"].decode().splitlines()
        assert lines[0] == "text\tlabel\tsuggested\tshare\treason"
        assert whole["suspected"] == len(lines) - 1 > 0


def test_figures_of_shares_are_those_of_a_tally_over_all_rows(
    world: LabelledIndexes, index: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decisions counted one by one here, and the rows as they are written, beside what the job says."""
    monkeypatch.setattr(classify_module, "_MAX_TEXTS_PER_SHARE", 4)
    config = classify_config(world, index, tmp_path, mode="votes", k=5, positive="things##tiger")
    result = classify(config)
    labeller, _ = load_labeller(config, depth_of(config, None), temperature=config.temperature)
    decider = Decider("votes", positive="things##tiger")
    tally = LabelTally(decider, [k for k in HIT_CUTOFFS if k <= 5], config.seed)
    rows = [line.split("\t") for line in (tmp_path / "rows.tsv").read_text().splitlines()]
    decisions = [decider.decide(labeller.label([text])[0]) for text, _ in rows]
    for (_, expected), decision in zip(rows, decisions, strict=True):
        tally.add(decision, expected)
    expected = tally.figures()
    for name in ("accuracy", "hit@5", "f1_macro", "recall_weighted", "ece"):
        assert result[name] == pytest.approx(expected[name], abs=1e-6), name
    for name in ("average_precision", "precision", "recall", "f1"):
        assert result["positive"][name] == pytest.approx(expected["positive"][name], abs=1e-6), name
    assert [each["accuracy"] for each in result["levels"]] == [
        each["accuracy"] for each in expected["levels"]
    ]
    written = [line.split("\t") for line in (tmp_path / "labels").read_text().splitlines()[1:]]
    assert [row[:2] for row in written] == [
        [text, decision.label] for (text, _), decision in zip(rows, decisions, strict=True)
    ]


def test_tallies_of_parts_add_up() -> None:
    """Every way in which rows can be parted gives the figures of all, to the last digit."""
    random = np.random.default_rng(0)
    names = ["a##b", "a##c", "d", "a##c##e"]
    decider = Decider("votes", positive="d", cut=0.4, abstain_below=0.3)
    rows = []
    for _ in range(40):
        shares = random.dirichlet(np.ones(3))
        ranked = sorted(zip(random.permutation(names)[:3], shares, strict=True), key=lambda each: -each[1])
        expected = str(random.choice([*names, "never given"]))
        rows.append(
            (decider.decide([Prediction(str(label), float(share)) for label, share in ranked]), expected)
        )
    rows.append((decider.decide([]), "d"))
    whole = LabelTally(decider, (5,), seed=0)
    for row in rows:
        whole.add(*row)
    for cuts in ([13], [1, 2, 40], [20, 20]):
        merged = LabelTally(decider, (5,), seed=0)
        for part in np.split(np.arange(len(rows)), cuts):
            tally = LabelTally(decider, (), seed=0)
            for place in part:
                tally.add(*rows[place])
            merged.add_counted(json.loads(json.dumps(tally.counted())))
        assert merged.figures() == whole.figures()
        assert list(merged.label_counts.items()) == list(whole.label_counts.items())
        assert list(merged.pairs.items()) == list(whole.pairs.items())
        assert merged.classes() == whole.classes()


def test_classifying_goes_on_where_it_ended(
    world: LabelledIndexes,
    index: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(classify_module, "_MAX_TEXTS_PER_SHARE", 4)
    settings = {"mode": "votes", "k": 5, "suspect_share": 0.4}
    config = classify_config(world, index, tmp_path, **settings, suspects=str(tmp_path / "suspects"))
    whole = classify(config)
    expected = [(tmp_path / name).read_bytes() for name in ("labels", "suspects")]
    for name in ("labels", "suspects"):
        (tmp_path / name).unlink()
    end_in_share(monkeypatch, classify_module.ClassifyWorker, 2)
    with pytest.raises(KeyboardInterrupt):
        classify(config)
    assert not (tmp_path / "labels").exists()
    assert not (tmp_path / "suspects").exists()
    capsys.readouterr()
    # Where the page goes, and the seed of the intervals, decide nothing of the rows.
    again = classify(config.model_copy(update={"plots": str(tmp_path / "plots"), "rows_per_batch": 2}))
    assert "2 of 5 parts" in capsys.readouterr().err
    assert [(tmp_path / name).read_bytes() for name in ("labels", "suspects")] == expected
    assert again["accuracy"] == whole["accuracy"]
    assert (tmp_path / "plots" / "confusion.svg").is_file()


def test_texts_of_one_word_alone_are_explained(world: LabelledIndexes, index: str) -> None:
    """Without their word nothing is left, and no text reached the labeller, which failed on none."""
    result, lines = world.classify(index, [("tiger", "things##tiger")], explain=True)
    assert result["rows"] == 1
    assert lines[0]["words"] == [{"word": "tiger", "start": 0, "drop": pytest.approx(lines[0]["score"])}]


def test_a_share_that_fails_leaves_no_output(
    world: LabelledIndexes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"text": text, "label": "x"}) + "\n" for text in [*TEXTS[:9], "with\ta tab"])
    )
    monkeypatch.setattr(classify_module, "_MAX_TEXTS_PER_SHARE", 4)
    values = {"encoder": world.encoder, "index": world.index(ROWS), "input": str(tmp_path / "rows.jsonl")}
    with pytest.raises(InputError, match="holds a tab or a line break"):
        classify(make_config(ClassifyConfig, {**values, "output": str(tmp_path / "labels.tsv")}))
    assert not (tmp_path / "labels.tsv").exists()


# --- evaluate -----------------------------------------------------------------------------------------------------


def evaluate_config(
    world: LabelledIndexes, index: str, folder: Path, output: str, **more: Any
) -> EvaluateConfig:
    """Judged queries of which some are texts of the index, some have two answers, and one has none there."""
    rows = [(text, TEXTS[(place * 7 + 3) % len(TEXTS)]) for place, text in enumerate(TEXTS[:18])]
    rows += [(TEXTS[0], TEXTS[0]), ("tiger lemon", TEXTS[4]), ("piano", "not in the index")]
    (folder / "queries.tsv").write_text("".join(f"{query}\t{text}\n" for query, text in rows))
    values = {"encoder": world.encoder, "index": index, "queries": str(folder / "queries.tsv"), "k": [1, 10]}
    return make_config(
        EvaluateConfig, {**values, "rows_per_batch": 4, "output": str(folder / output), **more}
    )


def files_of(folder: Path) -> dict[str, Any]:
    """What an evaluation has written, without what tells its time and place."""
    report = json.loads((folder / "report.json").read_text())
    for name in ("seconds", "queries_per_second", "output", "counts", "milliseconds", "settings"):
        del report[name]
    texts = {name: (folder / name).read_text() for name in ("run.trec", "qrels.trec", "per_query.jsonl")}
    return {"report": report, **texts}


@pytest.mark.parametrize(
    "settings",
    [{}, {"mode": "hybrid", "metrics": ["mrr@10", "AP", "P@5"]}, {"reranker": "reranker", "recall_k": 12}],
)
def test_shares_measure_what_one_pass_measures(
    world: LabelledIndexes,
    index: str,
    dummy_reranker_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
) -> None:
    if "reranker" in settings:
        settings = {**settings, "reranker": str(dummy_reranker_dir)}
    whole = evaluate(evaluate_config(world, index, tmp_path, "whole", **settings))
    expected = files_of(tmp_path / "whole")
    told = whole.keys() - {"seconds", "queries_per_second", "output"}
    for rows, parts in ((4, 5), (8, 3)):
        monkeypatch.setattr(evaluation_module, "_MAX_QUERIES_PER_SHARE", rows)
        config = evaluate_config(world, index, tmp_path, "parted", **settings)
        assert plan_evaluate(config)["parts"] == parts
        result = evaluate(config)
        assert {name: result[name] for name in told} == {name: whole[name] for name in told}
        assert files_of(tmp_path / "parted") == expected
    assert not [place.name for place in (tmp_path / "parted").iterdir() if place.name.startswith(".")]


def test_an_evaluation_goes_on_where_it_ended(
    world: LabelledIndexes,
    index: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(evaluation_module, "_MAX_QUERIES_PER_SHARE", 4)
    evaluate(evaluate_config(world, index, tmp_path, "whole"))
    config = evaluate_config(world, index, tmp_path, "killed")
    end_in_share(monkeypatch, evaluation_module.EvaluateWorker, 3)
    with pytest.raises(KeyboardInterrupt):
        evaluate(config)
    assert not (tmp_path / "killed" / "run.trec").exists()
    capsys.readouterr()
    evaluate(config.model_copy(update={"seed": 5, "plots": str(tmp_path / "plots")}))
    assert "3 of 5 parts" in capsys.readouterr().err
    assert (tmp_path / "killed" / "run.trec").read_bytes() == (tmp_path / "whole" / "run.trec").read_bytes()
    # Other judgements are another evaluation.
    monkeypatch.undo()
    monkeypatch.setattr(evaluation_module, "_MAX_QUERIES_PER_SHARE", 4)
    end_in_share(monkeypatch, evaluation_module.EvaluateWorker, 3)
    with pytest.raises(KeyboardInterrupt):
        evaluate(config)
    queries = tmp_path / "queries.tsv"
    queries.write_text(queries.read_text().replace("not in the index", TEXTS[3]))
    evaluate(config)
    assert "begun with other settings, models or rows" in capsys.readouterr().err


def test_workers_have_nothing_to_do_without_an_output(world: LabelledIndexes, index: str) -> None:
    values = {"index": index, "queries": "q", "workers": {"num": 2}}
    with pytest.raises(InputError, match="workers are given, which only an evaluation of an index with an"):
        make_config(EvaluateConfig, values)
