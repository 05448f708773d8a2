"""Queries by a causal language model: a tiny random one shows that it runs, not what it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from raytower.adapt.config import GenerateConfig, PairsConfig
from raytower.adapt.pairs import pairs
from raytower.adapt.questions import Asker, first_line
from raytower.config import make_config
from raytower.errors import InputError
from tests.support.tiny_models import build_tiny_encoder, tiny_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("causal")
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def asker(model: str, seed: int = 0, **values: Any) -> Asker:
    return Asker(make_config(GenerateConfig, {"model": model, "max_new_tokens": 12, **values}), seed)


def test_the_same_seed_writes_the_same_queries(model: str) -> None:
    passages = ["a river and a stone", "我们在中国"]
    ask = asker(model, num_queries=3)
    state = torch.random.get_rng_state()
    first = ask(passages)
    assert torch.equal(torch.random.get_rng_state(), state), "draws of others go on as if none were made here"
    assert first == ask(passages) == asker(model, num_queries=3)(passages)
    assert first != asker(model, seed=1, num_queries=3)(passages)
    assert [len(queries) <= 3 for queries in first] == [True, True]
    assert all(queries for queries in first)


def test_prompts_are_of_the_script_of_the_passage_and_long_passages_are_cut(model: str) -> None:
    ask = asker(model, prompt_zh="中国{text}?", prompt_en="ask {text}?", max_length=20)
    assert ask.prompt("我们在大地上") == "中国我们在大地上?"
    assert ask.prompt("a stone") == "ask a stone?"
    # [CLS], 5 characters of the prompt and its space, [SEP]: at most 12 characters of the passage are left.
    assert len(ask.prompt("stone" * 20)) < len("ask ?") + 2 * 20


def test_a_query_is_the_first_line_that_says_something() -> None:
    assert first_line('\n "Question: how to reset it?" \nBecause') == "how to reset it?"
    assert first_line("**问题：** 怎么开通？") == "怎么开通？"
    assert first_line("---\n\n") == ""


def test_pairs_of_generated_queries_stand_beside_those_of_structure(model: str, tmp_path: Path) -> None:
    rows = [{"id": str(n), "text": f"a long text of the number {'xyz'[n]}"} for n in range(3)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "input": str(tmp_path / "corpus.jsonl"),
        "output": str(tmp_path / "pairs.jsonl"),
        "file_type": "jsonl",
        "generate": {"model": model, "max_new_tokens": 12, "batch_size": 2},
        "min_query_letters": 1,
    }
    figures = pairs(make_config(PairsConfig, values))
    lines = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert figures["by_rule"] == {"generated": len(lines)}
    assert lines
    assert {line["document"] for line in lines} <= {row["text"] for row in rows}


def test_what_is_no_causal_model_is_refused(tmp_path: Path) -> None:
    encoder = build_tiny_encoder(tmp_path / "encoder")
    with pytest.raises(InputError, match=r"generate.model .* is no causal language model"):
        asker(str(encoder))
    with pytest.raises(InputError, match="prompt_en is 'ask', which has no"):
        asker("anything", prompt_en="ask")
    with pytest.raises(InputError, match="num_queries is 2 and temperature 0"):
        asker("anything", num_queries=2, temperature=0)
