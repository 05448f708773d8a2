"""The engine under encoders, rerankers and classifiers: tokenising, padding, blocks, memory, wrong values."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import processors
from torch import Tensor
from transformers import (
    GPT2Config,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    XLNetConfig,
)
from transformers.models.auto import AutoModelForSequenceClassification

from raytower.errors import InputError, RaytowerError
from raytower.models import tokenising
from raytower.models.cross_encoder import CrossEncoder, CrossScorer
from raytower.models.encoder import Encoder
from raytower.models.forward import ForwardEngine
from raytower.models.logits_engine import LogitsEngine
from raytower.models.text_classifier import ClassifierEngine, TextClassifier
from raytower.models.token_block import Padding, TokenBlock
from raytower.models.tokenising import tokenise
from tests.support.tiny_models import tiny_config, tiny_tokenizer

# 64 tokens of a tokenizer of characters: the longest are cut, at both sides of a pair, and beyond where texts are cut
# before they are tokenised.
LONG = "the longer side. " * 300
QUERIES = ["what is a deductible?", "a", "", LONG[:40], LONG, LONG, "我要", "gone  far" * 5]
DOCUMENTS = ["the part you pay", LONG, "个体工商户", LONG[:70], LONG[:50], LONG + "more", "", "x"]


def roberta_like() -> tuple[PretrainedConfig, PreTrainedTokenizerFast]:
    """No token types; positions begin behind the padding id."""
    tokenizer = tiny_tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=66,
        type_vocab_size=1,
        pad_token_id=0,
        initializer_range=0.2,
    )
    return config, tokenizer


def bert_like() -> tuple[PretrainedConfig, PreTrainedTokenizerFast]:
    """Token types that matter."""
    return tiny_config(initializer_range=0.2), tiny_tokenizer()


def xlnet_like() -> tuple[PretrainedConfig, PreTrainedTokenizerFast]:
    """Filled up on the left with a token type of its own; reads the last position."""
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = "left"
    tokenizer._pad_token_type_id = 3
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A:0 [SEP]:0 [CLS]:2",
        pair="$A:0 [SEP]:0 $B:1 [SEP]:1 [CLS]:2",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    config = XLNetConfig(
        vocab_size=len(tokenizer), d_model=32, n_layer=2, n_head=2, d_inner=64, initializer_range=0.2
    )
    return config, tokenizer


def decoder_like() -> tuple[PretrainedConfig, PreTrainedTokenizerFast]:
    """Causal, filled up on the left, no special tokens."""
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = "left"
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B")
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=64,
        pad_token_id=0,
        initializer_range=0.2,
    )
    return config, tokenizer


KINDS = [bert_like, roberta_like, xlnet_like, decoder_like]


def build(
    kind: Callable[[], tuple[PretrainedConfig, PreTrainedTokenizerFast]], cls: Any, num_labels: int
) -> Any:
    config, tokenizer = kind()
    config.num_labels = num_labels
    torch.manual_seed(0)
    return cls(AutoModelForSequenceClassification.from_config(config), tokenizer, 64).eval()


@torch.inference_mode()
def peer_logits(model: Any, engine: LogitsEngine[Any], *columns: Sequence[str]) -> np.ndarray:
    """Logits by the tokenizer and the model alone; each batch that the engine would make is filled up by `pad`."""
    encoded = model.tokenizer(
        *(list(column) for column in columns), truncation="longest_first", max_length=engine.max_length
    )
    lengths = np.array([len(ids) for ids in encoded["input_ids"]])
    logits = np.zeros((len(lengths), model.num_labels), dtype=np.float32)
    order = np.argsort(-lengths, kind="stable")
    while len(order):
        count = max(engine.tokens_per_batch // max(lengths[order[0]], 1), 1)
        rows, order = order[:count], order[count:]
        part = {name: [values[row] for row in rows] for name, values in encoded.items()}
        logits[rows] = model.model(**model.tokenizer.pad(part, return_tensors="pt")).logits.numpy()
    return logits


class TestLogits:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("tokens_per_batch", [1, 200])
    def test_pairs_give_what_transformers_gives(self, kind: Any, tokens_per_batch: int) -> None:
        model = build(kind, CrossEncoder, 2)
        scorer = CrossScorer(model, tokens_per_batch=tokens_per_batch)
        queries, documents = QUERIES, DOCUMENTS
        if kind is decoder_like:  # nothing at all is in a pair of two empty texts
            queries, documents = [text or "-" for text in queries], [text or "-" for text in documents]
        expected = peer_logits(model, scorer, queries, documents)
        assert np.abs(scorer.logits(queries, documents) - expected).max() < 1e-5
        assert np.abs(scorer.score(queries, documents) - (expected[:, 1] - expected[:, 0])).max() < 1e-5
        assert np.ptp(expected, axis=0).min() > 0.1

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("tokens_per_batch", [1, 200])
    def test_texts_give_what_transformers_gives(self, kind: Any, tokens_per_batch: int) -> None:
        model = build(kind, TextClassifier, 3)
        engine = ClassifierEngine(model, tokens_per_batch=tokens_per_batch)
        texts = [text or "-" for text in QUERIES + DOCUMENTS]
        expected = peer_logits(model, engine, texts)
        assert np.abs(engine.logits(texts) - expected).max() < 1e-5
        assert np.ptp(expected, axis=0).min() > 0.1

    def test_no_rows(self) -> None:
        assert CrossScorer(build(bert_like, CrossEncoder, 1)).score([], []).shape == (0,)
        assert ClassifierEngine(build(bert_like, TextClassifier, 3)).logits([]).shape == (0, 3)


class TestTokenising:
    @pytest.mark.parametrize("max_length", [4, 20, 21, 64])
    @pytest.mark.parametrize("kind", KINDS)
    def test_the_tokens_are_the_tokenizers(self, kind: Any, max_length: int) -> None:
        _, tokenizer = kind()
        # A call of the tokenizer keeps every cut-off part of one text with every one of the other.
        queries, documents = ([text[: 16 * max_length] for text in column] for column in (QUERIES, DOCUMENTS))
        for columns in ([QUERIES], [DOCUMENTS], [queries, documents], [documents, queries]):
            called = tokenizer(*columns, truncation="longest_first", max_length=max_length)
            block = tokenise(tokenizer, columns, max_length, with_types="token_type_ids" in called)
            assert rows_of(block, block.ids) == called["input_ids"]
            if block.types is None:
                assert "token_type_ids" not in called
            else:
                assert rows_of(block, block.types) == called["token_type_ids"]

    @pytest.mark.parametrize(("first", "second"), [(9, 8), (8, 9), (9, 9), (900, 800), (800, 900)])
    @pytest.mark.parametrize("max_length", [10, 11])
    def test_the_longer_of_two_long_texts_keeps_the_odd_token(
        self, monkeypatch: pytest.MonkeyPatch, first: int, second: int, max_length: int
    ) -> None:
        """Cut before they are tokenised, the first looks shorter: its beginning ends with a word."""
        monkeypatch.setattr(tokenising, "CHARACTERS_PER_TOKEN", 2)
        tokenizer = tiny_tokenizer()
        columns = [[("b" * 12 + " " + "a" * 900)[:first]], ["c" * second]]
        called = tokenizer(*columns, truncation="longest_first", max_length=max_length)
        assert tokenise(tokenizer, columns, max_length).ids.tolist() == called["input_ids"][0]

    def test_the_end_of_a_text_stays_where_the_beginning_is_cut_off(self) -> None:
        tokenizer = tiny_tokenizer()
        tokenizer.truncation_side = "left"
        block = tokenise(tokenizer, [[LONG + "end"]], 8)
        assert tokenizer.convert_ids_to_tokens(block.ids.tolist()) == ["[CLS]", *"e. end", "[SEP]"]

    def test_nothing_is_tokenised_that_is_cut_off_and_little_at_once(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tokenising, "_CHARACTERS_AT_ONCE", 100)
        given: list[list[Any]] = []
        tokenizer = tiny_tokenizer()
        backend = tokenizer.backend_tokenizer

        class Watched:
            def __getattr__(self, name: str) -> Any:
                return getattr(backend, name)

            def encode_batch_fast(self, inputs: list[Any], **more: Any) -> Any:
                given.append(inputs)
                return backend.encode_batch_fast(inputs, **more)

        monkeypatch.setattr(type(tokenizer), "backend_tokenizer", property(lambda _: Watched()))
        # A word has 9 tokens with its space, so 8 tokens of 64 characters are more than enough of it.
        long = "abcdefgh " * 10_000
        tokenise(tokenizer, [["query"] * 3, [long, "short", long]], 8)
        tokenise(tokenizer, [[long, "short"] * 3], 8)
        texts = [
            text for inputs in given for item in inputs for text in ([item] if type(item) is str else item)
        ]
        assert max(map(len, texts)) <= 8 * 64
        assert len(given) > 4
        assert sum(map(len, texts)) < 12 * 8 * 64


def rows_of(block: TokenBlock, values: np.ndarray) -> list[list[int]]:
    return [row.tolist() for row in np.split(values, block.starts[1:])] if len(block) else []


class TestPadding:
    BLOCK = TokenBlock.of([[5, 6, 7], [8], [], [9, 9]], [[0, 0, 1], [2], [], [0, 1]])
    ROWS = np.array([3, 0, 2])

    def test_on_the_right(self) -> None:
        padded = {name: values.tolist() for name, values in self.BLOCK.pad(self.ROWS, Padding(1, 4)).items()}
        assert padded == {
            "input_ids": [[9, 9, 1], [5, 6, 7], [1, 1, 1]],
            "attention_mask": [[1, 1, 0], [1, 1, 1], [0, 0, 0]],
            "token_type_ids": [[0, 1, 4], [0, 0, 1], [4, 4, 4]],
        }

    def test_on_the_left(self) -> None:
        padding = Padding(1, 4, on_left=True)
        padded = {name: values.tolist() for name, values in self.BLOCK.pad(self.ROWS, padding).items()}
        assert padded == {
            "input_ids": [[1, 9, 9], [5, 6, 7], [1, 1, 1]],
            "attention_mask": [[0, 1, 1], [1, 1, 1], [0, 0, 0]],
            "token_type_ids": [[4, 0, 1], [0, 0, 1], [4, 4, 4]],
        }

    @pytest.mark.parametrize("on_left", [False, True])
    def test_rows_of_one_length_need_no_mask(self, on_left: bool) -> None:
        padded = self.BLOCK.pad(np.array([3]), Padding(1, 4, on_left))
        assert {name: values.tolist() for name, values in padded.items()} == {
            "input_ids": [[9, 9]],
            "token_type_ids": [[0, 1]],
        }
        untyped = TokenBlock.of([[5], [6]]).pad(np.array([1, 0]), Padding(1, 4, on_left))
        assert {name: values.tolist() for name, values in untyped.items()} == {"input_ids": [[6], [5]]}

    def test_blocks_are_joined_row_after_row(self) -> None:
        joined = TokenBlock.join([self.BLOCK, TokenBlock.of([[4]], [[3]])])
        assert rows_of(joined, joined.ids) == [[5, 6, 7], [8], [], [9, 9], [4]]
        assert joined.types is not None
        assert rows_of(joined, joined.types) == [[0, 0, 1], [2], [], [0, 1], [3]]
        assert TokenBlock.join([TokenBlock.of([[1]]), TokenBlock.of([[2]])]).types is None
        assert len(TokenBlock.join([])) == 0


class Rows:
    """An engine and the 30 rows that it computes."""

    TEXTS = tuple(f"{'long ' * (i % 11)}{i}" for i in range(30))

    def __init__(self, name: str) -> None:
        self.name = name
        self.engine: LogitsEngine[Any] = (
            CrossScorer(build(bert_like, CrossEncoder, 2))
            if name == "pair"
            else ClassifierEngine(build(bert_like, TextClassifier, 3))
        )

    def run(self) -> np.ndarray:
        columns = [self.TEXTS, self.TEXTS[::-1]] if self.name == "pair" else [self.TEXTS]
        return self.engine.logits(*columns)


@pytest.fixture(params=["pair", "text"])
def rows(request: pytest.FixtureRequest) -> Rows:
    return Rows(request.param)


class TestBlocks:
    def test_the_order_is_that_of_the_input_over_many_blocks(self, rows: Rows) -> None:
        whole = rows.run()
        for rows.engine.block_rows in (1, 7, 29, 30):
            assert np.abs(rows.run() - whole).max() < 1e-5
        assert np.ptp(whole, axis=0).min() > 0.1

    def test_a_block_is_tokenised_while_the_one_before_it_is_computed(
        self, rows: Rows, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The first forward waits until the second block has been tokenised; else it would wait in vain."""
        rows.engine.block_rows = 15
        starts: list[int] = []
        second_tokenised = threading.Event()
        tokenise_rows, compute = rows.engine.model.tokenise, rows.engine.compute

        def watched(columns: Any, max_length: int, start: int) -> TokenBlock:
            block = tokenise_rows(columns, max_length, start)
            starts.append(start)
            if len(starts) == 2:
                second_tokenised.set()
            return block

        def waiting(inputs: dict[str, Tensor]) -> Tensor:
            assert second_tokenised.wait(timeout=60)
            return compute(inputs)

        monkeypatch.setattr(rows.engine.model, "tokenise", watched)
        monkeypatch.setattr(rows.engine, "compute", waiting)
        assert len(rows.run()) == 30
        assert starts == [0, 15]

    def test_a_budget_that_does_not_fit_is_halved_until_it_does(
        self, rows: Rows, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        exact = rows.run()
        sizes: list[int] = []
        compute = rows.engine.compute

        def hungry(inputs: dict[str, Tensor]) -> Tensor:
            sizes.append(inputs["input_ids"].numel())
            if sizes[-1] > 150:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return compute(inputs)

        monkeypatch.setattr(rows.engine, "compute", hungry)
        assert np.abs(rows.run() - exact).max() < 1e-5
        assert sizes[0] > 150
        assert 64 <= rows.engine.tokens_per_batch <= 150
        sizes.clear()
        rows.run()
        assert max(sizes) <= 150

    def test_one_row_that_does_not_fit_says_what_to_change(
        self, rows: Rows, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def starving(inputs: dict[str, Tensor]) -> Tensor:
            raise MemoryError

        monkeypatch.setattr(rows.engine, "compute", starving)
        with pytest.raises(
            RaytowerError, match=rf"one {rows.name} of \d+ tokens does not fit .*max_length \(now 64\)"
        ):
            rows.run()

    def test_other_failures_are_not_taken_for_it(self, rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
        sizes: list[int] = []

        def broken(inputs: dict[str, Tensor]) -> Tensor:
            sizes.append(inputs["input_ids"].numel())
            raise RuntimeError("illegal address")

        monkeypatch.setattr(rows.engine, "compute", broken)
        with pytest.raises(RuntimeError, match="illegal address"):
            rows.run()
        assert len(sizes) == 1


class TestWrongValues:
    @pytest.fixture(scope="class")
    def make(self, dummy_encoder_dir: Path) -> list[Callable[..., Any]]:
        return [
            lambda **settings: ForwardEngine(Encoder.load(dummy_encoder_dir), **settings),
            lambda **settings: CrossScorer(build(bert_like, CrossEncoder, 1), **settings),
            lambda **settings: ClassifierEngine(build(bert_like, TextClassifier, 3), **settings),
        ]

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            *(
                ({"tokens_per_batch": value}, rf"tokens_per_batch is {value}; it must be a whole number of at least 1")
                for value in (0, -1, True, 2.5)
            ),
            *(
                ({"max_length": value}, rf"max_length is {value!r}; this model has positions for 1 to 64 tokens; give")
                for value in (0, -3, "64", True, 64.5, 65)
            ),
            ({"device": "cuba"}, r"device is 'cuba'.*write 'cpu'"),
            ({"device": 7}, r"device is '7'.*type int.*write 'cpu'"),
            ({"device": "meta"}, r"device is 'meta'.*write 'cpu'"),
            ({"dtype": "float8"}, "dtype is 'float8', which engine torch does not compute in"),
        ],
    )  # fmt: skip
    def test_settings(self, make: list[Callable[..., Any]], settings: dict[str, Any], message: str) -> None:
        for engine in make:
            with pytest.raises(InputError, match=message):
                engine(**settings)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_a_gpu_that_there_is_not(self, make: list[Callable[..., Any]]) -> None:
        for engine in make:
            for device in ("cuda", torch.device("cuda:3")):
                with pytest.raises(InputError, match=r"device is 'cuda.*PyTorch sees no GPU here"):
                    engine(device=device)

    def test_what_is_right_is_taken(self, make: list[Callable[..., Any]]) -> None:
        for engine in make:
            made = engine(tokens_per_batch=np.int64(7), max_length=np.int32(9), device=torch.device("cpu"))
            assert (made.tokens_per_batch, made.max_length, made.device.type) == (7, 9, "cpu")

    def test_half_a_character_is_named_with_its_text(self, make: list[Callable[..., Any]]) -> None:
        encoder, scorer, classifier = (engine() for engine in make)
        texts = ["fine", "too", "half \ud800 a character"]
        for encoder.block_rows in (2, 3):  # whichever block it is in
            with pytest.raises(InputError, match=r"^texts\[2\] has a lone surrogate, '\\ud800'.*replace"):
                encoder.encode(texts, "query: ")
        for scorer.block_rows in (2, 3):
            with pytest.raises(InputError, match=r"^documents\[2\] has a lone surrogate"):
                scorer.score(["a"] * 3, texts)
        with pytest.raises(InputError, match=r"^queries\[2\] has a lone surrogate"):
            scorer.score(texts, ["a"] * 3)
        with pytest.raises(InputError, match=r"^texts\[2\] has a lone surrogate"):
            classifier.classify(texts)
        with pytest.raises(
            InputError, match=r"^texts\[1\] is None, of type NoneType; every text must be a string"
        ):
            classifier.classify(["a", None])

    def test_no_room_beside_the_special_tokens(self, make: list[Callable[..., Any]]) -> None:
        """The tokenizers would cut nothing off, and the model run out of positions."""
        encoder, scorer, classifier = (engine(max_length=2) for engine in make)
        for run in (lambda: encoder.encode(["a"]), lambda: classifier.classify(["a"])):
            with pytest.raises(
                InputError, match=r"max_length is 2, .* 2 special tokens to each text; .*least 3"
            ):
                run()
        with pytest.raises(InputError, match=r"max_length is 2, .* 3 special tokens to each pair; .*least 4"):
            scorer.score(["a"], ["b"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_may_be_used_in_the_midst_of_its_own_pass(
    kind: Callable[[], tuple[PretrainedConfig, PreTrainedTokenizerFast]],
) -> None:
    engine = ClassifierEngine(build(kind, TextClassifier, 3), tokens_per_batch=10_000)
    blocks = [engine.model.tokenise([texts], 64) for texts in (DOCUMENTS, QUERIES, ["x"])]
    expected = [engine.forward_block(block) for block in blocks]
    inner: list[np.ndarray] = []
    waiting: list[TokenBlock] = []

    def use() -> None:
        if waiting:  # the inner pass calls this too
            inner.append(engine.forward_block(waiting.pop()))

    assert engine.call_between_layers(use) == 2
    waiting.extend(blocks[1:])
    outer = engine.forward_block(blocks[0])
    np.testing.assert_array_equal(outer, expected[0])
    # The last was asked for first, and the other in its midst.
    for found, wanted in zip(inner, expected[1:], strict=True):
        np.testing.assert_array_equal(found, wanted)
