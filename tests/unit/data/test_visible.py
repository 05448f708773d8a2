"""Texts in which nothing can be seen are refused, and what can be seen is left as it is."""

from __future__ import annotations

import sys
import unicodedata
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from raytower.data.unseen import INVISIBLE
from raytower.data.visible import shows_nothing
from tests.support.data_files import quarantined, read, write, write_jsonl

_NAMED = "\u200b\u200c\u200d\u2060\ufeff"


def test_every_space_and_control_character_is_invisible_and_nothing_with_a_glyph() -> None:
    characters = [chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code <= 0xDFFF]
    is_unseen = dict(zip(characters, shows_nothing(pa.array(characters)).tolist(), strict=True))
    category = unicodedata.category
    must_be = {c for c in characters if c.isspace() or category(c) in ("Cc", "Zs", "Zl", "Zp")} | set(_NAMED)
    assert all(is_unseen[character] for character in must_be)
    others = [c for c in characters if is_unseen[c] and c not in must_be]
    assert {category(c) for c in others} <= {"Cf", "Mn"}
    assert [c for c in others if category(c) == "Mn"] == [chr(code) for code in range(0xFE00, 0xFE10)]
    # Format characters that are drawn: signs above Arabic and Syriac numbers.
    assert not any(is_unseen[c] for c in "\u0600\u0605\u06dd\u070f")


def test_an_encoder_has_no_token_for_what_is_invisible(minilm_dir: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(minilm_dir)
    assert tokenizer(INVISIBLE, add_special_tokens=False)["input_ids"] == []
    assert tokenizer(INVISIBLE + "x", add_special_tokens=False)["input_ids"] != []


def test_invisible_characters_beside_others_are_data(tmp_path: Path) -> None:
    texts = [f"{character}x" for character in _NAMED] + ["👨\u200d👩", "\u200b \u0007.", "x\u200b", "\ufffd"]
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": text} for text in texts])
    assert [row["text"] for row in read(path, "lines")] == texts
    path = write(tmp_path / "x.txt", "first\n" + "\n".join(texts))
    assert [row["text"] for row in read(path, "lines")] == ["first", *texts]


def test_an_invisible_title_is_left_out(tmp_path: Path) -> None:
    rows = [{"title": "\u200b", "text": "body"}, {"title": "Title", "text": "\u200bbody"}]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    assert [row["text"] for row in read(path, "lines")] == ["body", "Title \u200bbody"]


def test_an_invisible_text_counts_as_missing_in_a_beir_corpus(tmp_path: Path) -> None:
    rows = [
        {"_id": "1", "title": "only a title", "text": "\u200b"},
        {"_id": "2", "title": "\ufeff", "text": " "},
        {"_id": "3", "title": "", "text": "\t"},
    ]
    write_jsonl(tmp_path / "corpus.jsonl", rows)
    write_jsonl(tmp_path / "queries.jsonl", [{"_id": "q", "text": "query"}])
    write(tmp_path / "qrels" / "test.tsv", "query-id\tcorpus-id\tscore\nq\t1\t1\n")
    surveyed, entries = quarantined(tmp_path, "corpus", tmp_path / "q")
    assert [(entry["line"], entry["reason"]) for entry in entries] == [(2, "empty text"), (3, "empty text")]
    assert surveyed.num_rows == 1


def test_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a", "\u2060\u200b", "b"]}), tmp_path / "x.parquet")
    _, entries = quarantined(tmp_path / "x.parquet", "corpus", tmp_path / "q")
    assert [(e["line"], e["reason"]) for e in entries] == [(2, "the text holds only invisible characters")]
