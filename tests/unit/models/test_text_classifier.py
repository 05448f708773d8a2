"""The text classifier: the directory contract with transformers, the engine, and classification of a file by it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    BertForSequenceClassification,
    DebertaV2Config,
    ModernBertConfig,
    PretrainedConfig,
    RobertaConfig,
    pipeline,
)

from raytower.annotation.classify import classify, plan_classify
from raytower.annotation.config import ClassifyConfig
from raytower.config import make_config
from raytower.errors import FormatError, InputError
from raytower.models.text_classifier import ClassifierEngine, TextClassifier
from tests.support.tiny_models import tiny_config, tiny_tokenizer

LABELS = ("工学##农业工程", "sports", "law##civil law", "other")
TEXTS = [
    "what is a deductible?",
    "a",
    "  spaces around, and a trailing line\n",
    "个体工商户的债务由谁偿还",
    'tabs\tand "quotes" are data. ' * 12,  # longer than the 64 tokens of the model
    "我要开通微粒贷",
    "dogs and cats",
    "1234567890",
]


def build(folder: Path, labels: tuple[str, ...] = LABELS, seed: int = 0, **changes: Any) -> Path:
    """A random classifier whose head is wide enough to tell texts apart."""
    torch.manual_seed(seed)
    numbers = dict(enumerate(labels))
    config = tiny_config(
        id2label=numbers, label2id={name: n for n, name in numbers.items()}, initializer_range=0.2, **changes
    )
    TextClassifier(BertForSequenceClassification(config), tiny_tokenizer(), 64).eval().save(folder)
    return folder


@pytest.fixture(scope="module")
def classifier_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("models") / "classifier")


def peer_scores(folder: Path, texts: list[str]) -> list[list[dict[str, Any]]]:
    """Every label of each text with its probability, best first, by transformers alone."""
    peer = pipeline("text-classification", model=str(folder), device="cpu", top_k=None)
    return [peer([text], truncation=True)[0] for text in texts]


class TestDirectory:
    def test_a_pipeline_gives_the_same_labels_and_probabilities(self, classifier_dir: Path) -> None:
        labels, probabilities = ClassifierEngine(TextClassifier.load(classifier_dir)).classify(TEXTS)
        peer = peer_scores(classifier_dir, TEXTS)
        assert labels == [[item["label"] for item in row] for row in peer]
        expected = np.array([[item["score"] for item in row] for row in peer])
        assert np.abs(probabilities - expected).max() < 1e-5
        assert len({row[0] for row in labels}) > 1

    def test_it_holds_safetensors_alone(self, classifier_dir: Path) -> None:
        names = {place.name for place in classifier_dir.iterdir()}
        assert "model.safetensors" in names
        assert not [name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl"))]

    def test_a_copy_is_the_same(self, classifier_dir: Path, tmp_path: Path) -> None:
        first = TextClassifier.load(classifier_dir)
        first.max_length = 20
        first.save(tmp_path / "copy", {"history": [{"step": 3, "accuracy": 0.5}]})
        second = TextClassifier.load(tmp_path / "copy")
        assert (second.labels, second.max_length, second.max_positions) == (LABELS, 20, 64)
        assert second.info["history"] == [{"step": 3, "accuracy": 0.5}]
        assert second.fingerprint == first.fingerprint == second.info["fingerprint"]
        ours = [ClassifierEngine(model).probabilities(TEXTS) for model in (first, second)]
        assert np.array_equal(*ours)

    def test_the_fingerprint_tells_weights_and_labels_apart(self, tmp_path: Path) -> None:
        prints = {
            TextClassifier.load(build(tmp_path / "a")).fingerprint,
            TextClassifier.load(build(tmp_path / "b", seed=1)).fingerprint,
            TextClassifier.load(build(tmp_path / "c", LABELS[::-1])).fingerprint,
        }
        assert len(prints) == 3

    def test_an_encoder_is_refused(self, dummy_encoder_dir: Path) -> None:
        with pytest.raises(FormatError, match=r"is an encoder .* it is no classifier"):
            TextClassifier.load(dummy_encoder_dir)

    def test_a_reranker_is_refused(self, dummy_reranker_dir: Path) -> None:
        with pytest.raises(FormatError, match=r"is a reranker .* it is no classifier"):
            TextClassifier.load(dummy_reranker_dir)

    def test_labels_that_hold_together_are_refused(self, tmp_path: Path) -> None:
        folder = build(tmp_path / "model", problem_type="multi_label_classification")
        with pytest.raises(FormatError, match="problem_type 'multi_label_classification'"):
            TextClassifier.load(folder)


class TestStart:
    def test_an_encoder_gets_a_head_for_the_labels(self, dummy_encoder_dir: Path, tmp_path: Path) -> None:
        torch.manual_seed(0)
        started = TextClassifier.start_from(dummy_encoder_dir, LABELS)
        assert (started.labels, started.max_length) == (LABELS, 64)
        inputs = dict(started.tokenizer(TEXTS[:3], padding=True, return_tensors="pt"))
        assert started(**inputs).shape == (3, 4)
        started.eval().save(tmp_path / "started")
        config = json.loads((tmp_path / "started" / "config.json").read_text())
        assert [config["id2label"][str(n)] for n in range(4)] == list(LABELS)
        assert config["label2id"] == {label: n for n, label in enumerate(LABELS)}
        ((best, *_),) = peer_scores(tmp_path / "started", TEXTS[:1])
        assert best["label"] in LABELS

    @pytest.mark.parametrize("config_class", [RobertaConfig, DebertaV2Config, ModernBertConfig])
    def test_heads_of_other_families_are_told_from_their_backbones(
        self, config_class: type[PretrainedConfig], tmp_path: Path
    ) -> None:
        """Their heads have other names than BERT's, and some an own pooler; none of it is a missing backbone."""
        config = tiny_config()
        sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        tiny = config_class(pad_token_id=0, **{name: getattr(config, name) for name in sizes})
        AutoModel.from_config(tiny).save_pretrained(tmp_path)
        tiny_tokenizer().save_pretrained(tmp_path)
        assert TextClassifier.start_from(tmp_path, LABELS).labels == LABELS
        with pytest.raises(FormatError, match=r"is an encoder .* it is no classifier"):
            TextClassifier.load(tmp_path)
        weights = load_file(tmp_path / "model.safetensors")
        del weights[next(name for name in weights if "layers.1." in name or "layer.1." in name)]
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(FormatError, match="lacks weights of its backbone"):
            TextClassifier.start_from(tmp_path, LABELS)

    def test_the_head_depends_on_the_seed_alone(self, dummy_encoder_dir: Path) -> None:
        prints = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            prints.append(TextClassifier.start_from(dummy_encoder_dir, LABELS).fingerprint)
        assert prints[0] == prints[1] != prints[2]

    def test_a_finished_classifier_goes_on_with_its_head(self, classifier_dir: Path) -> None:
        started = TextClassifier.start_from(classifier_dir, list(LABELS))
        assert started.fingerprint == TextClassifier.load(classifier_dir).fingerprint
        assert started.info == {}

    @pytest.mark.parametrize(
        ("labels", "message"),
        [
            ((*LABELS, "new", "newer"), "does not know 'new', one of 2 new labels"),
            (LABELS[1:], "knows '工学##农业工程', one of 1 labels that are not asked for"),
        ],
    )
    def test_its_head_is_of_no_use_for_other_labels(
        self, classifier_dir: Path, labels: tuple[str, ...], message: str
    ) -> None:
        with pytest.raises(InputError, match=message):
            TextClassifier.start_from(classifier_dir, labels)

    def test_it_keeps_the_order_of_its_own(self, classifier_dir: Path) -> None:
        """Labels were sorted as texts once (1, 10, 2), and other tools call a class 1.0."""
        assert TextClassifier.start_from(classifier_dir, LABELS[::-1]).labels == LABELS

    @pytest.mark.parametrize(
        ("labels", "message"),
        [(["a"], "at least 2"), (["a", " "], "label ' ' is blank"), (["a", "b", "a"], "'a' is repeated")],
    )
    def test_labels_must_differ(self, dummy_encoder_dir: Path, labels: list[str], message: str) -> None:
        with pytest.raises(InputError, match=message):
            TextClassifier.start_from(dummy_encoder_dir, labels)


class TestEngine:
    def test_probabilities_do_not_depend_on_the_batch(self, classifier_dir: Path) -> None:
        alone = ClassifierEngine(TextClassifier.load(classifier_dir), tokens_per_batch=1)
        together = ClassifierEngine(TextClassifier.load(classifier_dir), tokens_per_batch=100_000)
        given, reverse = alone.probabilities(TEXTS), together.probabilities(TEXTS[::-1])[::-1]
        assert np.abs(given - reverse).max() < 1e-6
        assert np.abs(given.sum(axis=1) - 1).max() < 1e-6
        assert np.abs(given[0] - given[1]).max() > 1e-3

    def test_the_first_labels(self, classifier_dir: Path) -> None:
        engine = ClassifierEngine(TextClassifier.load(classifier_dir))
        labels, probabilities = engine.classify(TEXTS, top_k=2)
        everything, all_probabilities = engine.classify(TEXTS, top_k=50)
        assert labels == [row[:2] for row in everything]
        assert np.array_equal(probabilities, all_probabilities[:, :2])
        assert bool((np.diff(all_probabilities) <= 0).all())
        assert {frozenset(row) for row in everything} == {frozenset(LABELS)}

    def test_no_texts(self, classifier_dir: Path) -> None:
        labels, probabilities = ClassifierEngine(TextClassifier.load(classifier_dir)).classify([])
        assert labels == []
        assert probabilities.shape == (0, 4)

    def test_max_length_beyond_the_positions(self, classifier_dir: Path) -> None:
        with pytest.raises(InputError, match="max_length is 65"):
            ClassifierEngine(TextClassifier.load(classifier_dir), max_length=65)


class TestJob:
    """`raytower classify` in mode classifier."""

    def run(self, classifier_dir: Path, folder: Path, rows: str, **more: Any) -> tuple[dict[str, Any], Any]:
        (folder / "texts.tsv").write_text(rows, encoding="utf-8")
        values = {
            "mode": "classifier",
            "classifier": str(classifier_dir),
            "input": {"path": str(folder / "texts.tsv")},
            "output": str(folder / "labels.out"),
        }
        result = classify(make_config(ClassifyConfig, {**values, **more}))
        return result, (folder / "labels.out").read_text(encoding="utf-8").splitlines()

    def test_rows_and_figures_are_those_of_the_classifier(self, classifier_dir: Path, tmp_path: Path) -> None:
        texts = [TEXTS[row] for row in (0, 3, 5, 6, 7)]
        peer = peer_scores(classifier_dir, texts)
        # The right label is the first, the first, the second, the last, and one that the classifier does not know.
        expected = [peer[0][0], peer[1][0], peer[2][1], peer[3][3], {"label": "un##known"}]
        lines = [f"{text}\t{item['label']}" for text, item in zip(texts, expected, strict=True)]
        result, written = self.run(classifier_dir, tmp_path, "\n".join(lines), rows_per_batch=2)
        assert written[0] == "text\tlabel\tscore"
        for text, row, line in zip(texts, peer, written[1:], strict=True):
            first, label, score = line.split("\t")
            assert (first, label) == (text, row[0]["label"])
            assert float(score) == pytest.approx(row[0]["score"], abs=1e-5)
        assert (result["rows"], result["mode"], result["labels_missing"]) == (5, "classifier", 1)
        assert (result["accuracy"], result["hit@5"]) == (pytest.approx(2 / 5), pytest.approx(4 / 5))
        assert set(result["intervals"]) == {"accuracy", "hit@5", "hit@10", "hit@20"}
        assert result["fingerprint"] == TextClassifier.load(classifier_dir).fingerprint
        assert "index_version" not in result
        predicted = [row[0]["label"] for row in peer]
        classes = {*predicted, *(item["label"] for item in expected)}
        recalls = {
            name: [p for p, e in zip(predicted, expected, strict=True) if e["label"] == name]
            for name in classes
        }
        recall = sum(found.count(name) / len(found) for name, found in recalls.items() if found) / len(
            classes
        )
        assert result["recall_macro"] == pytest.approx(recall)
        assert 0 < result["f1_macro"] < 1

    def test_json_lines_list_the_first_k_labels(self, classifier_dir: Path, tmp_path: Path) -> None:
        _, written = self.run(classifier_dir, tmp_path, f"{TEXTS[3]}\tsports", file_type="jsonl", k=2)
        row = json.loads(written[0])
        (peer,) = peer_scores(classifier_dir, [TEXTS[3]])
        assert [label for label, _ in row["labels"]] == [item["label"] for item in peer[:2]]
        assert [p for _, p in row["labels"]] == pytest.approx([item["score"] for item in peer[:2]], abs=1e-5)
        assert (row["label"], row["expected"]) == (row["labels"][0][0], "sports")

    def test_texts_without_labels(self, classifier_dir: Path, tmp_path: Path) -> None:
        result, written = self.run(classifier_dir, tmp_path, "one\ntwo\n", labelled=False)
        assert (result["rows"], len(written)) == (2, 3)
        assert not {"accuracy", "f1_macro", "labels_missing"} & set(result)

    def test_the_plan_counts_and_writes_nothing(self, classifier_dir: Path, tmp_path: Path) -> None:
        (tmp_path / "texts.tsv").write_text("a\tsports\nb\tother\nc\tother\n")
        values = {
            "mode": "classifier",
            "classifier": str(classifier_dir),
            "input": {"path": str(tmp_path / "texts.tsv")},
            "output": str(tmp_path / "out"),
            "rows_per_batch": 2,
        }
        plan = plan_classify(make_config(ClassifyConfig, values))
        classifier = TextClassifier.load(classifier_dir)
        assert (plan["rows"], plan["batches"], plan["labels"], plan["rejected_rows"]) == (3, 2, 4, 0)
        assert plan["fingerprint"] == classifier.fingerprint
        parameters = sum(parameter.numel() for parameter in classifier.parameters())
        assert 8 * parameters < plan["predicted_memory_bytes"] < 8 * parameters + 100_000
        assert sorted(place.name for place in tmp_path.iterdir()) == ["texts.tsv"]
        with pytest.raises(InputError, match="max_length is 65"):
            plan_classify(make_config(ClassifyConfig, {**values, "max_length": 65}))

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"mode": "classifier"}, "mode classifier needs classifier, which is not given"),
            (
                {"mode": "classifier", "classifier": "c", "encoder": "e"},
                "encoder is 'e', which mode classifier",
            ),
            ({"mode": "classifier", "classifier": "c", "index": "i"}, "index is 'i', which mode classifier"),
            (
                {"mode": "classifier", "classifier": "c", "temperature": 0.1},
                "temperature is 0.1, which mode classifier",
            ),
            ({"mode": "labels", "index": "i"}, "mode labels needs encoder, which is not given"),
            ({"mode": "votes", "encoder": "e"}, "mode votes needs index, which is not given"),
            (
                {"mode": "votes", "encoder": "e", "index": "i", "classifier": "c"},
                "classifier is 'c', which mode votes does not read",
            ),
        ],
    )
    def test_keys_must_fit_the_mode(self, values: dict[str, str], message: str) -> None:
        with pytest.raises(InputError, match=message):
            make_config(ClassifyConfig, {**values, "input": {"path": "p"}, "output": "o"})

    def test_a_dumped_config_is_accepted_again(self) -> None:
        values = {"mode": "classifier", "classifier": "c", "input": {"path": "p"}, "output": "o"}
        config = make_config(ClassifyConfig, values)
        assert make_config(ClassifyConfig, config.model_dump()) == config
