"""Classification by retrieval: votes, trees, chances, cuts, abstention, words that decide, suspected labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import softmax
from sklearn.isotonic import IsotonicRegression
from sklearn.metrics import average_precision_score, log_loss

from raytower.annotation.classify import classify, plan_classify
from raytower.annotation.classify_settings import Calibration
from raytower.annotation.config import ClassifyConfig, TuneClassifyConfig
from raytower.annotation.deciding import Decider, chances_of, read_settings
from raytower.annotation.explaining import in_words, parts_of, weigh_parts, without
from raytower.annotation.label_figures import (
    LabelTally,
    coverage_curve,
    expected_calibration_error,
    reliability,
    threshold_for,
)
from raytower.annotation.label_page import confusion_of
from raytower.annotation.labels import Prediction, count_votes, tree_scores
from raytower.annotation.suspecting import suspect
from raytower.annotation.tune_classify import (
    choose_cut,
    choose_votes,
    fit_calibration,
    padded,
    plan_tune_classify,
    tune_classify,
)
from raytower.config import make_config
from raytower.errors import FormatError, InputError
from raytower.index.change import add_to_index, delete_from_index
from raytower.index.change_config import IndexAddConfig, IndexDeleteConfig
from raytower.models.text_classifier import ClassifierEngine, TextClassifier
from tests.support.labelled_index import LabelledIndexes as World
from tests.support.labelled_index import Rows


def _ranked(**scores: float) -> list[Prediction]:
    return [Prediction(label, score) for label, score in scores.items()]


# --- votes and trees --------------------------------------------------------------------------------------------


def test_kinds_of_votes_by_hand() -> None:
    voters = [("a", 0.9), ("b", 0.8), ("b", 0.7)]
    assert count_votes(voters, 1, "uniform") == [
        Prediction("b", pytest.approx(2 / 3)),
        Prediction("a", pytest.approx(1 / 3)),
    ]
    # 1, 1/2 and 1/3, of 11/6 together
    assert count_votes(voters, 1, "rank") == [
        Prediction("a", pytest.approx(6 / 11)),
        Prediction("b", pytest.approx(5 / 11)),
    ]
    weights = np.exp(np.array([0.9, 0.8, 0.7]) / 0.1)
    assert count_votes(voters, 0.1)[0] == Prediction("a", pytest.approx(weights[0] / weights.sum()))
    # Equal shares: the label with the nearest text leads.
    assert [each.label for each in count_votes([("c", 0.5), ("d", 0.4)], 1, "uniform")] == ["c", "d"]


def test_a_parent_is_never_below_its_child() -> None:
    shares = [Prediction("D##E", 0.4), Prediction("A##B", 0.3), Prediction("A##C", 0.2), Prediction("A", 0.1)]
    top, leaves = tree_scores(shares, are_shares=True)
    assert top == [Prediction("A", pytest.approx(0.6)), Prediction("D", pytest.approx(0.4))]
    assert leaves == shares[:3]  # `A` has no second level
    cosines = [Prediction("A##B##C", 0.9), Prediction("A", 0.5), Prediction("D", -0.2)]
    assert tree_scores(cosines, are_shares=False) == [
        [Prediction("A", 0.9), Prediction("D", -0.2)],
        [Prediction("A##B", 0.9)],
        [Prediction("A##B##C", 0.9)],
    ]


def test_levels_of_unequal_depth_by_hand() -> None:
    tally = LabelTally(Decider("votes"), (), seed=0)
    for expected, given in (("A##B", "A##B"), ("A##B", "A##C"), ("D", "D##E"), ("A##C##F", "A##C")):
        tally.add(Decider("votes").decide([Prediction(given, 1.0)]), expected)
    figures = tally.figures()
    assert figures["accuracy"] == 0.25
    assert [(each["level"], each["rows"], each["accuracy"]) for each in figures["levels"]] == [
        (1, 4, 1.0),
        (2, 3, pytest.approx(2 / 3)),
        (3, 1, 0.0),  # A##C is a whole path, and not the one that was expected
    ]


# --- figures ----------------------------------------------------------------------------------------------------


def test_reliability_and_its_error_by_hand() -> None:
    chances = np.array([0.95, 0.91, 0.15, 1.0])
    right = np.array([True, False, False, True])
    assert reliability(chances, right) == [
        {"from": 0.1, "to": 0.2, "rows": 1, "chance": 0.15, "accuracy": 0.0},
        {
            "from": 0.9,
            "to": 1.0,
            "rows": 3,
            "chance": pytest.approx(2.86 / 3),
            "accuracy": pytest.approx(2 / 3),
        },
    ]
    assert expected_calibration_error(chances, right) == pytest.approx(0.25 * 0.15 + 0.75 * 0.86 / 3)


def test_a_coverage_curve_takes_all_rows_of_a_score() -> None:
    scores = np.array([0.9, 0.5, 0.5, 0.1])
    right = np.array([True, True, False, False])
    assert coverage_curve(scores, right) == [
        {"threshold": 0.9, "coverage": 0.25, "accuracy": 1.0},
        {"threshold": 0.5, "coverage": 0.75, "accuracy": pytest.approx(2 / 3)},
        {"threshold": 0.1, "coverage": 1.0, "accuracy": 0.5},
    ]
    # At 0.5 both rows count, also where the right one stands first.
    assert threshold_for(scores, right, 0.9) == 0.9
    assert threshold_for(scores, right, 0.6) == 0.5
    assert threshold_for(scores, right, 0.5) == 0.1
    assert threshold_for(scores, ~right, 0.9) is None


def test_figures_of_a_rare_class() -> None:
    rows = [("yes", 0.9), ("no", 0.8), ("yes", 0.7), ("no", 0.2)]
    decider = Decider("votes", positive="yes", cut=0.75)
    tally = LabelTally(decider, (), seed=0)
    for expected, score in rows:
        tally.add(decider.decide(_two(score)), expected)
    positive = tally.figures()["positive"]
    # AP: precision 1 at the first, 2/3 at the second of two.
    theirs = average_precision_score([1, 0, 1, 0], [0.9, 0.8, 0.7, 0.2])
    assert positive["average_precision"] == pytest.approx(theirs) == pytest.approx((1 + 2 / 3) / 2)
    assert (positive["rows"], positive["called"], positive["cut"]) == (2, 2, 0.75)
    assert (positive["precision"], positive["recall"], positive["f1"]) == (0.5, 0.5, 0.5)


def test_a_positive_class_that_no_row_has_gives_no_number(capsys: pytest.CaptureFixture[str]) -> None:
    tally = LabelTally(Decider("votes", positive="yes"), (), seed=0)
    tally.add(Decider("votes").decide(_two(0.4)), "no")
    positive = tally.figures()["positive"]
    assert [positive[name] for name in ("average_precision", "precision", "recall", "f1")] == [None] * 4
    assert "no row has the label 'yes'" in capsys.readouterr().err


def _two(yes: float) -> list[Prediction]:
    return sorted(_ranked(yes=yes, no=1 - yes), key=lambda each: -each.score)


# --- deciding ---------------------------------------------------------------------------------------------------


def test_a_cut_moves_a_label_first_or_away() -> None:
    low = Decider("votes", positive="yes", cut=0.2)
    assert low.decide(_two(0.3)).label == "yes"
    assert low.decide(_two(0.1)).label == "no"
    high = Decider("votes", positive="yes", cut=0.8)
    assert (high.decide(_two(0.7)).label, high.decide(_two(0.7)).score) == ("no", pytest.approx(0.3))
    # Where nothing else is known, the text keeps it.
    assert high.decide(_ranked(yes=0.7)).label == "yes"
    # A label without votes has the share 0.
    assert low.decide(_ranked(no=1.0)).label == "no"


def test_a_text_of_which_nothing_is_sure_gets_no_label() -> None:
    decider = Decider("votes", abstain_below=0.5)
    assert decider.decide(_ranked(a=0.5, b=0.3)).label == "a"
    assert decider.decide(_ranked(a=0.4, b=0.3)).label is None
    nothing = decider.decide([])
    assert (nothing.label, nothing.score) == (None, 0.0)


def test_temperatures_by_hand() -> None:
    cosines = Decider("labels", calibration=Calibration(kind="temperature", temperature=0.1))
    weights = np.exp([9.0, 7.0])
    assert cosines.decide(_ranked(a=0.9, b=0.7)).score == pytest.approx(weights[0] / weights.sum())
    # Shares .8 and .2 at T = 1/2 are squared: .64 and .04 of .68
    shares = Decider("votes", calibration=Calibration(kind="temperature", temperature=0.5))
    assert [each.score for each in shares.decide(_ranked(a=0.8, b=0.2)).ranked] == [
        pytest.approx(0.64 / 0.68),
        pytest.approx(0.04 / 0.68),
    ]


# --- tuning -----------------------------------------------------------------------------------------------------


def test_the_temperature_has_the_least_log_loss() -> None:
    random = np.random.default_rng(0)
    logits = np.sort(random.normal(size=(400, 5)))[:, ::-1]
    right = random.random(400) < softmax(logits / 0.4, axis=1)[:, 0]
    found = fit_calibration("temperature", logits, right, were_shares=False)

    def loss(log_temperature: float) -> float:
        return float(log_loss(right, softmax(logits / np.exp(log_temperature), axis=1)[:, 0]))

    theirs = minimize_scalar(loss, bounds=(-5, 3), method="bounded", options={"xatol": 1e-9})
    assert found.temperature == pytest.approx(np.exp(theirs.x), rel=1e-3)


def test_isotonic_chances_are_those_of_scikit_learn() -> None:
    random = np.random.default_rng(0)
    scores = random.random((200, 1))
    right = random.random(200) < scores[:, 0] ** 2
    found = fit_calibration("isotonic", scores, right, were_shares=True)
    theirs = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(scores[:, 0], right)
    asked = np.linspace(-0.5, 1.5, 77)
    assert chances_of(found, asked, True) == pytest.approx(theirs.predict(asked))
    # What is read back from a file gives the same.
    again = Calibration.model_validate_json(found.model_dump_json())
    assert chances_of(again, asked, True).tolist() == chances_of(found, asked, True).tolist()


def test_rows_with_fewer_labels_are_padded_with_what_has_no_part() -> None:
    ranked = [_ranked(a=0.9), _ranked(a=0.5, b=0.4)]
    assert padded(ranked).tolist() == [[0.9, -np.inf], [0.5, 0.4]]
    # The chances that a temperature is fitted on are those that it gives: of one label alone all, whatever it is.
    for temperature in (0.5, 15.6):
        calibration = Calibration(kind="temperature", temperature=temperature)
        for padded_row, row in zip(padded(ranked), ranked, strict=True):
            applied = chances_of(calibration, np.array([item.score for item in row]), True)
            fitted = chances_of(calibration, padded_row, True)
            np.testing.assert_allclose(fitted[: len(row)], applied)


def test_votes_are_chosen_by_the_metric_and_then_the_fewest() -> None:
    # The nearest text is wrong, the three nearest are right together: k = 3, counted by heads.
    voters = [[("b", 0.9), ("a", 0.89), ("a", 0.88)]] * 3
    way, tried = choose_votes(voters, ["a"] * 3, "accuracy", 3)
    assert (way.k, way.votes) == (3, "similarity")
    assert {each["accuracy"] for each in tried if each["k"] == 1} == {0.0}
    assert choose_votes(voters, ["b"] * 3, "accuracy", 3)[0].k == 1


def test_the_cut_has_the_best_f1() -> None:
    config = _tune_config({"encoder": "e", "index": "i", "mode": "votes", "positive": "yes"})
    rows = [("yes", 0.9), ("no", 0.6), ("yes", 0.5), ("no", 0.4), ("no", 0.1)]
    cut, figures = choose_cut(
        config, Decider("votes"), [_two(score) for _, score in rows], [label for label, _ in rows]
    )
    assert figures is not None
    # From .5 on: two of three are right and both are found, F1 = .8; from .9 on 2/3.
    assert (cut, figures["f1"]) == (0.5, pytest.approx(0.8))


def _tune_config(values: dict[str, Any]) -> TuneClassifyConfig:
    return make_config(TuneClassifyConfig, {"input": {"path": "rows.tsv"}, "output": "tuned.json", **values})


# --- words ------------------------------------------------------------------------------------------------------


def test_parts_are_words_and_characters() -> None:
    text = "借 loan, now 2024！"
    assert [text[part.start : part.end] for part in parts_of(text)] == ["借", "loan", "now", "2024"]
    assert without(text, parts_of(text)[1]) == "借 , now 2024！"
    assert [(part.start, part.end) for part in parts_of("a b c d e", most=2)] == [(0, 3), (4, 9)]
    assert parts_of("！？") == []


def test_words_are_weighed_by_what_the_score_loses() -> None:
    text = "borrow some money"
    weights = weigh_parts(text, parts_of(text), 0.9, [0.5, 0.95, 0.2])
    assert [(each.word, each.start, each.drop) for each in weights] == [
        ("money", 12, pytest.approx(0.7)),
        ("borrow", 0, pytest.approx(0.4)),
    ]
    assert in_words(weights) == "money 0.700, borrow 0.400"


# --- suspected labels -------------------------------------------------------------------------------------------


def test_suspicions_by_hand() -> None:
    voters = [("a", 0.9), ("a", 0.8), ("b", 0.7)]
    ranked = count_votes(voters, 1, "uniform")
    assert suspect("a", ranked, voters, ("a",), "near", 0.1) is None
    assert suspect("b", ranked, voters, ("b",), "near", 0.1) is None  # a third of the votes
    found = suspect("c", ranked, voters, ("c",), "near", 0.1)
    assert found is not None
    assert (found.suggested, found.share) == ("a", 0.0)
    assert found.reason == (
        "2 of the 3 nearest other texts are a (share 0.67), 0 are c (share 0.00); the nearest: near"
    )
    copies = suspect("a", ranked, voters, ("a", "d", "d"), "near", 0.1)
    assert copies is not None
    assert copies.suggested == "d"
    assert copies.reason == "the same text is labelled d (2 times) and a (1 times)"
    assert suspect("a", [], [], ("a",), None, 0.1) is None


# --- the jobs ---------------------------------------------------------------------------------------------------

FRUIT = ["apple lemon", "lemon apple pear", "pear apple", "lemon pear"]
WATER = ["river ocean", "ocean lake river", "lake river", "lake ocean"]


@pytest.fixture
def world(dummy_encoder_dir: Path, tmp_path: Path) -> World:
    return World(dummy_encoder_dir, tmp_path)


def _labelled() -> Rows:
    return [(text, "fruit") for text in FRUIT] + [(text, "water") for text in WATER]


def test_depth_counts_labels_and_not_their_descriptions(world: World) -> None:
    """Of 30 descriptions of one label the first 20 would hide every other label."""
    many = [(f"apple lemon {word}", "fruit") for word in [*map(str, range(30))]]
    index = world.index([*many, *[(text, f"water##{n}") for n, text in enumerate(WATER)]])
    result, lines = world.classify(index, [("apple lemon 3", "water##2"), ("apple lemon 4", "fruit")])
    assert [len(line["labels"]) for line in lines] == [5, 5]
    assert (result["accuracy"], result["hit@5"]) == (0.5, 1.0)
    scores = dict(lines[0]["labels"])
    expected = world.cosines("apple lemon 3", WATER)
    assert [scores[f"water##{n}"] for n in range(4)] == pytest.approx(expected.tolist(), abs=1e-5)


def test_votes_have_no_metric_beyond_their_neighbours(world: World) -> None:
    result, _ = world.classify(world.index(_labelled()), [(FRUIT[0], "fruit")], mode="votes", k=5)
    assert "hit@5" in result
    assert "hit@10" not in result


def test_a_label_comes_and_goes_with_its_documents(world: World) -> None:
    """No training: a description, or five examples, added to the index are a label at once, and gone when deleted."""
    index = world.index(_labelled())
    beast = ["tiger", "tiger lion", "lion wolf", "wolf tiger", "lion tiger wolf"]
    asked = [("tiger lion", "beast"), (FRUIT[1], "fruit")]
    before, _ = world.classify(index, asked, mode="votes", k=1)
    assert (before["accuracy"], before["labels_missing"]) == (0.5, 1)
    add = {"index": index, "embeddings": world.embed([(text, "beast") for text in beast], first=100)}
    add_to_index(make_config(IndexAddConfig, add))
    for mode in ("votes", "labels"):
        after, lines = world.classify(index, asked, mode=mode, k=1)
        assert (after["accuracy"], after["labels_missing"]) == (1.0, 0)
        assert lines[0]["label"] == "beast"
    delete_from_index(make_config(IndexDeleteConfig, {"index": index, "filter": {"label": "beast"}}))
    gone, lines = world.classify(index, asked, mode="labels", k=10)
    assert (gone["accuracy"], gone["labels_missing"]) == (0.5, 1)
    assert {label for label, _ in lines[0]["labels"]} == {"fruit", "water"}


def test_tuned_votes_are_used_as_they_were_found(world: World) -> None:
    index = world.index(_labelled())
    dev = [
        ("apple pear lemon", "fruit"),
        ("river lake ocean", "water"),
        ("lemon", "fruit"),
        ("ocean", "water"),
    ]
    tuned = world.tune(index, dev, mode="votes", folds=2, max_k=5, min_accuracy=0.1)
    settings = read_settings(tuned["output"])
    assert tuned["settings"] == settings.model_dump(mode="json")
    best = max(each["accuracy"] for each in tuned["tried"])
    chosen = next(
        each
        for each in tuned["tried"]
        if (each["votes"], each["k"], each["temperature"])
        == (settings.votes, settings.depth, settings.temperature)
    )
    assert chosen["accuracy"] == best == tuned["accuracy"]
    assert {each["kind"] for each in tuned["calibrated"]} == {"temperature", "isotonic"}
    assert sum(each["rows"] for each in tuned["reliability"]) == len(dev)
    result, _ = world.classify(index, dev, mode="votes", tuned=tuned["output"])
    assert result["accuracy"] == tuned["accuracy"]
    assert result["coverage"] == tuned["coverage"]
    assert result["answered"] == 1.0
    # A second tuning replaces the file; what else lies there is not touched.
    assert (
        world.tune(index, dev, mode="votes", folds=2, max_k=5, min_accuracy=0.1)["settings"]
        == tuned["settings"]
    )
    with pytest.raises(InputError, match="was tuned for mode 'votes', and this one is 'labels'"):
        world.classify(index, dev, mode="labels", tuned=tuned["output"])
    (world.folder / "other.json").write_text("{}")
    with pytest.raises(FormatError, match="holds no settings of classify"):
        world.classify(index, dev, mode="votes", tuned=str(world.folder / "other.json"))
    with pytest.raises(FormatError, match="holds no settings of classify"):
        world.tune(index, dev, mode="votes", folds=2, output=str(world.folder / "other.json"))


def test_tuned_chances_of_the_nearest_labels_sum_to_one(world: World) -> None:
    index = world.index(_labelled())
    dev = [(FRUIT[0], "fruit"), (WATER[1], "water"), ("lemon", "fruit"), ("ocean", "water")]
    tuned = world.tune(index, dev, folds=2, calibration="temperature")
    result, lines = world.classify(index, dev, tuned=tuned["output"])
    for line in lines:
        assert sum(score for _, score in line["labels"]) == pytest.approx(1)
    assert result["ece"] == pytest.approx(
        expected_calibration_error(
            np.array([line["score"] for line in lines]),
            np.array([line["label"] == line["expected"] for line in lines]),
        )
    )
    plain, _ = world.classify(index, dev)
    assert "ece" not in plain  # a cosine is no chance


def test_a_trained_classifier_is_tuned_and_explained(world: World) -> None:
    folder = world.folder / "classifier"
    TextClassifier.start_from(world.encoder, ["fruit", "water"]).save(folder)
    dev = [(FRUIT[0], "fruit"), (WATER[1], "water"), ("lemon", "fruit"), ("ocean", "water")]
    values = {"mode": "classifier", "classifier": str(folder), "input": {"path": world.rows(dev)}}
    output = world.folder / "tuned.json"
    more = {"folds": 2, "calibration": "temperature", "positive": "fruit"}
    tuned = tune_classify(make_config(TuneClassifyConfig, {**values, "output": str(output), **more}))
    temperature = tuned["settings"]["calibration"]["temperature"]
    labels = world.folder / "labels.jsonl"
    config = {**values, "output": str(labels), "file_type": "jsonl", "tuned": str(output), "explain": True}
    result = classify(make_config(ClassifyConfig, config))
    assert result["positive"]["cut"] == tuned["positive"]["cut"]
    engine = ClassifierEngine(TextClassifier.load(folder))
    for line in map(json.loads, labels.read_text().splitlines()):
        chances = dict(
            zip(["fruit", "water"], softmax(engine.logits([line["text"]])[0] / temperature), strict=True)
        )
        assert dict(line["labels"]) == pytest.approx(chances, abs=1e-5)
        for word in line["words"]:
            rest = line["text"].replace(word["word"], "", 1)
            other = 0.0
            if rest.strip():
                left = softmax(engine.logits([rest])[0] / temperature)
                other = float(left[["fruit", "water"].index(line["label"])])
            assert word["drop"] == pytest.approx(chances[line["label"]] - other, abs=1e-5)


def test_an_unsure_text_gets_no_label(world: World) -> None:
    index = world.index(_labelled())
    rows = [(FRUIT[0], "fruit"), ("tiger wolf", "water")]
    result, lines = world.classify(index, rows, abstain_below=0.999)
    assert [line["label"] for line in lines] == ["fruit", None]
    assert (result["abstained"], result["answered"], result["accuracy_answered"]) == (1, 0.5, 1.0)
    output = world.folder / "labels.tsv"
    world_rows = {"encoder": world.encoder, "index": index, "input": {"path": world.rows(rows)}}
    config = {**world_rows, "output": str(output), "abstain_below": 0.999}
    classify(make_config(ClassifyConfig, config))
    assert output.read_text().splitlines()[2].split("\t")[1] == ""


def test_words_that_decide_are_those_whose_loss_costs_most(world: World) -> None:
    index = world.index([("apple lemon", "fruit"), ("river ocean", "water")])
    _, [line] = world.classify(index, [("apple tiger lemon", "fruit")], explain=True)
    whole = world.cosines("apple tiger lemon", ["apple lemon", "river ocean"])
    assert line["label"] == ["fruit", "water"][int(whole.argmax())]
    target = ["apple lemon", "river ocean"][int(whole.argmax())]
    drops = {
        word: float(whole.max() - world.cosines(rest, [target])[0])
        for word, rest in (("apple", " tiger lemon"), ("tiger", "apple  lemon"), ("lemon", "apple tiger "))
    }
    expected = sorted((pair for pair in drops.items() if pair[1] > 0), key=lambda pair: -pair[1])
    assert [(each["word"], each["drop"]) for each in line["words"]] == [
        (word, pytest.approx(drop, abs=1e-5)) for word, drop in expected
    ]
    output = world.folder / "words.tsv"
    values = {"encoder": world.encoder, "index": index, "output": str(output), "explain": True}
    config = {**values, "input": {"path": world.rows([("apple tiger lemon", "fruit"), ("apple", "fruit")])}}
    classify(make_config(ClassifyConfig, config))
    lines = output.read_text().splitlines()
    assert lines[0] == "text\tlabel\tscore\tbecause"
    assert lines[1].split("\t")[3] == ", ".join(f"{word} {drop:.3f}" for word, drop in expected)
    # Nothing is left of a text of one word: it keeps none of the score.
    score = world.cosines("apple", ["apple lemon", "river ocean"]).max()
    assert lines[2].split("\t")[3] == f"apple {score:.3f}"


def test_labels_that_other_texts_contradict_are_suspected(world: World) -> None:
    rows = [*_labelled(), ("apple  lemon pear", "water"), (FRUIT[3], "water")]
    index = world.index(rows)
    suspects = world.folder / "suspects.jsonl"
    more = {"mode": "votes", "k": 3, "votes": "uniform", "suspects": str(suspects), "suspect_share": 0.0}
    result, lines = world.classify(index, rows, **more)
    found = [json.loads(line) for line in suspects.read_text().splitlines()]
    assert result["suspected"] == len(found)
    both = [each for each in found if each["text"] == FRUIT[3]]
    assert [(each["label"], each["suggested"]) for each in both] == [("fruit", "water"), ("water", "fruit")]
    assert all("the same text is labelled" in each["reason"] for each in both)
    # Each row is labelled by others than itself: votes of brute force without it and its copies.
    for place, (text, _) in enumerate(rows):
        others = [each for each in rows if each[0] != text]
        scores = world.cosines(text, [other for other, _ in others])
        nearest = [others[number][1] for number in np.argsort(-scores, kind="stable")[:3]]
        shares = dict(lines[place]["labels"])
        assert shares == pytest.approx({label: nearest.count(label) / 3 for label in nearest})


# --- bad input --------------------------------------------------------------------------------------------------


def test_an_unseen_label_is_counted_and_named(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    index = world.index(_labelled())
    result, _ = world.classify(index, [(FRUIT[0], "fruit"), (FRUIT[1], "metal"), (FRUIT[2], "metal")])
    assert (result["labels_missing"], result["accuracy"]) == (2, pytest.approx(1 / 3))
    assert "2 rows have a label that cannot be given ('metal')" in capsys.readouterr().err
    tuned = world.tune(index, [(FRUIT[0], "fruit"), (WATER[0], "water"), ("tiger", "metal")], folds=2)
    assert tuned["labels_missing"] == 1


def test_labels_that_documents_write_otherwise_are_those_of_the_rows(world: World) -> None:
    """1.0 in the corpus is the label 1 of the rows; so are labels with spaces, and texts that are labels."""
    index = world.index([*((text, "1.0") for text in FRUIT), *((text, " hot  water ") for text in WATER)])
    asked = [(FRUIT[0], "1"), (WATER[0], "hot water")]
    for mode in ("labels", "votes"):
        result, lines = world.classify(index, asked, mode=mode, k=3)
        assert [line["label"] for line in lines] == ["1", "hot water"]
        assert (result["accuracy"], result["labels_missing"]) == (1.0, 0)


def test_a_positive_class_is_one_that_is_given(world: World) -> None:
    index = world.index([*((text, "1") for text in FRUIT), *((text, "0") for text in WATER)])
    asked = [(FRUIT[0], "1"), (WATER[0], "0")]
    result, _ = world.classify(index, asked, positive="1.0", cut=0.97)
    assert (result["accuracy"], result["labels_missing"]) == (1.0, 0)
    with pytest.raises(InputError, match=r"positive is '2', a label that .* never gives"):
        world.classify(index, asked, positive="2", cut=0.9)


def test_an_index_of_a_single_label_gives_it_to_all(world: World) -> None:
    index = world.index([(text, "fruit") for text in FRUIT])
    for mode in ("labels", "votes"):
        result, lines = world.classify(index, [(FRUIT[0], "fruit"), ("river", "water")], mode=mode)
        assert [line["label"] for line in lines] == ["fruit", "fruit"]
        assert (result["accuracy"], result["labels_missing"]) == (0.5, 1)


def test_an_empty_class_is_predicted_for_nothing(world: World) -> None:
    """The documents of one label are deleted: its rows count as wrong, and the other label stays as it was."""
    index = world.index(_labelled())
    delete_from_index(make_config(IndexDeleteConfig, {"index": index, "filter": {"label": "water"}}))
    result, lines = world.classify(index, [(FRUIT[0], "fruit"), (WATER[0], "water")], mode="votes", k=3)
    assert [line["label"] for line in lines] == ["fruit", "fruit"]
    assert (result["accuracy"], result["labels_missing"]) == (0.5, 1)
    assert result["f1_macro"] == pytest.approx((2 / 3 + 0) / 2)


def test_what_cannot_be_tuned_is_refused(world: World) -> None:
    index = world.index(_labelled())
    with pytest.raises(InputError, match="has one label, 'fruit', alone"):
        world.tune(index, [(text, "fruit") for text in FRUIT], folds=2)
    with pytest.raises(InputError, match="has 2 rows, and folds is 5"):
        world.tune(index, [(FRUIT[0], "fruit"), (WATER[0], "water")])
    rows = [(FRUIT[0], "fruit"), (WATER[0], "water")]
    with pytest.raises(InputError, match="positive is 'metal', which no row"):
        world.tune(index, rows, folds=2, positive="metal")
    wrong = [(FRUIT[0], "water"), (WATER[0], "fruit")]
    with pytest.raises(InputError, match=r"min_accuracy is 0\.9, and no threshold gives it"):
        world.tune(index, wrong, folds=2, min_accuracy=0.9)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"cut": 0.5}, "no class is named"),
        ({"tuned": "t.json", "temperature": 0.1}, "which holds it too"),
        ({"suspects": "s.tsv"}, "labels are suspected by the votes"),
        ({"suspects": "s.tsv", "mode": "votes", "labelled": False}, "labels are suspected by the votes"),
        ({"suspects": "out.tsv", "mode": "votes"}, "name two files"),
    ],
)
def test_keys_that_contradict_are_refused(more: dict[str, Any], message: str) -> None:
    values = {"encoder": "e", "index": "i", "input": {"path": "rows.tsv"}, "output": "out.tsv"}
    with pytest.raises(InputError, match=message):
        make_config(ClassifyConfig, {**values, **more})


def test_plans_say_rows_and_memory(world: World) -> None:
    values = {
        "encoder": world.encoder,
        "index": world.index(_labelled()),
        "input": {"path": world.rows(_labelled())},
    }
    tune = plan_tune_classify(
        make_config(TuneClassifyConfig, {**values, "output": str(world.folder / "t.json")})
    )
    label = plan_classify(make_config(ClassifyConfig, {**values, "output": str(world.folder / "o.tsv")}))
    assert tune["rows"] == label["rows"] == 8
    assert tune["predicted_memory_bytes"] > label["predicted_memory_bytes"]
    assert not (world.folder / "t.json").exists()


# --- the page -------------------------------------------------------------------------------------------------------


def test_confusion_by_hand() -> None:
    found = confusion_of({("a", "a"): 5, ("a", "b"): 2, ("b", "a"): 1, ("c", "c"): 9})
    # b has as many errors as a, and fewer rows.
    assert found["names"] == ["a", "b", "c"]
    assert found["counts"] == [[5, 2, 0], [1, 0, 0], [0, 0, 9]]
    assert found["pairs"] == [
        {"expected": "a", "given": "b", "rows": 2},
        {"expected": "b", "given": "a", "rows": 1},
    ]


def test_of_many_labels_those_with_errors_are_shown() -> None:
    pairs = {(f"l{number}", f"l{number}"): 10 for number in range(20)} | {("l19", "l18"): 3, ("l3", "l18"): 1}
    found = confusion_of(pairs)
    assert found["names"][:3] == ["l18", "l19", "l3"]
    assert (len(found["names"]), found["names"][-1]) == (12, "(others)")
    assert sum(map(sum, found["counts"])) == 204
    assert found["counts"][11][11] == 90


def test_a_page_and_plots_of_labels(dummy_encoder_dir: Path, tmp_path: Path) -> None:
    world = World(dummy_encoder_dir, tmp_path)
    rows: Rows = [("apple river", "fruit"), ("stone cloud", "thing"), ("tiger piano", "<b>animal</b>")]
    index = world.index(rows)
    page, plots = tmp_path / "page.html", tmp_path / "plots"
    asked = {"mode": "votes", "k": 2, "report": str(page), "plots": str(plots)}
    result, _ = world.classify(index, [*rows, ("apple river", "thing")], **asked)
    assert result["accuracy"] == 0.75
    assert "confusion" not in result  # a matrix is for the page
    shown = page.read_text()
    assert "&lt;b&gt;animal&lt;/b&gt;" in shown
    assert "Do chances come true?" in shown
    assert sorted(place.stem for place in plots.iterdir()) == ["confusion", "coverage", "reliability"]
    world.classify(index, rows, **asked)  # over those of before
    page.write_text("mine")
    with pytest.raises(InputError, match="holds something that classify has not written"):
        world.classify(index, rows, **asked)
    with pytest.raises(InputError, match="labelled is false"):
        world.classify(index, rows, report=str(page), labelled=False)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("हिन्दी में लिखना", ["हिन्दी", "में", "लिखना"]),
        ("مُحَمَّد هنا", ["مُحَمَّد", "هنا"]),
        ("I don't lend 'it'", ["I", "don't", "lend", "it"]),
        ("借钱ok", ["借", "钱", "ok"]),
    ],
)
def test_words_keep_their_marks(text: str, words: list[str]) -> None:
    assert [text[part.start : part.end] for part in parts_of(text)] == words
