"""Tokens of texts, by script: expected values are written by hand from the rules in `index/tokens.py`."""

from __future__ import annotations

import unicodedata

import pytest

from raytower.index.config import TokensConfig
from raytower.index.tokens import MOST_CHARACTERS, joined, tokens

PLAIN = TokensConfig()


def made(text: str, **settings: str) -> list[str]:
    return tokens(text, TokensConfig.model_validate(settings))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("民法典", ["民", "法", "典", "民法", "法典"]),
        ("カレー", ["カ", "レ", "ー", "カレ", "レー"]),
        ("한국어", ["한", "국", "어", "한국", "국어"]),
        ("Reset the MODEM", ["reset", "the", "modem"]),
        ("Ёлка и ΟΔΟΣ", ["ёлка", "и", "οδος"]),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
        ("ＡＢＣ１２３", ["abc123", "abc", "123"]),
        ("㈱", ["株"]),
        ("3.14", ["3.14", "3", "14"]),
        ("C++, C# und c", ["c++", "c", "c#", "c", "und", "c"]),
        ("infor\u00admation", ["information"]),
        ("don’t", ["don’t", "don", "t"]),
    ],
)
def test_scripts(text: str, expected: list[str]) -> None:
    assert made(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("AB-1234/5", ["ab-1234/5", "ab", "1234", "5"]),
        (
            "ERR_CONN_0x80070005",
            ["err_conn_0x80070005", "err", "conn", "0x80070005", "0", "x", "80070005"],
        ),
        ("GB/T 19001-2016", ["gb/t", "gb", "t", "19001-2016", "19001", "2016"]),
        ("《民法典》第1165条", ["民", "法", "典", "民法", "法典", "第", "1165", "条"]),
        ("iPhone15手机壳", ["iphone15", "iphone", "15", "手", "机", "壳", "手机", "机壳"]),
    ],
)
def test_a_code_is_its_whole_and_its_parts(text: str, expected: list[str]) -> None:
    assert made(text) == expected


def test_a_stemmer_takes_endings_of_words_and_leaves_codes() -> None:
    assert made("Connections, connected: E-Mails", stemmer="english") == [
        "connect",
        "connect",
        "e-mails",
        "e",
        "mail",
    ]


def test_thai_is_parted_by_icu_or_into_pairs() -> None:
    assert made("ภาษาไทย") == ["ภาษา", "ไทย"]
    assert made("ไทย", unspaced="grams") == ["ไ", "ท", "ย", "ไท", "ทย"]
    assert made("ຂ້ອຍ မြန်မာဘာသာစကား") == ["ຂ້ອຍ", "မြန်မာဘာသာ", "စကား"]


def test_a_script_that_is_not_known_is_parted_by_its_spaces() -> None:
    assert made("ᏣᎳᎩ ᎦᏬᏂᎯᏍᏗ") == ["ꮳꮃꭹ", "ꭶꮼꮒꭿꮝꮧ"]
    assert made("ꦧꦱꦗꦮ") == ["ꦧꦱꦗꦮ"]


@pytest.mark.parametrize("text", ["", " \n", "?!……《》", "🙂", "\u0301"])
def test_what_holds_no_letter_has_no_tokens(text: str) -> None:
    assert made(text) == []


def test_a_very_long_word_counts_by_its_beginning() -> None:
    word = "q" * 1_000_000
    assert made(word) == ["q" * MOST_CHARACTERS]
    assert made(word + "-z") == ["q" * MOST_CHARACTERS, "q" * MOST_CHARACTERS, "z"]


def test_no_token_holds_a_space() -> None:
    spaces = [
        chr(at) for at in range(0x110000) if chr(at).isspace() or unicodedata.category(chr(at))[0] == "Z"
    ]
    assert len(spaces) > 20
    for space in spaces:
        assert made(f"a{space}b 中{space}文") == ["a", "b", "中", "文"]
        assert joined(f"a{space}b", PLAIN) == "a b"
