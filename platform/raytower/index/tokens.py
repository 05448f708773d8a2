"""Texts as the tokens that lexical search counts: one pure function, chosen by script.

Text is normalised first: NFKC, so that full-width ＡＢＣ１２３ is abc123, and lower case. Invisible joiners and soft
hyphens go. Then, by script:

    Han, kana, bopomofo, Hangul    characters and pairs of neighbours: 民法典 is 民 法 典 民法 法典
    Thai, Lao, Khmer, Burmese      words of ICU's dictionaries, or characters and pairs (`unspaced`)
    every other script             words as spaces and punctuation part them, stemmed where a stemmer is set

A code is found by its whole and by its parts. ERR_CONN_0x80070005 is itself; err, conn and 0x80070005; 0, x and
80070005. iPhone15手机壳 is iphone15, iphone, 15, 手 机 壳 手机 机壳. A script that is not known here is parted by its
spaces.
"""

from __future__ import annotations

import itertools
import threading
import unicodedata
from collections.abc import Callable, Iterator

import regex

from raytower.index.config import TokensConfig

# Characters of a token; what is longer is known by its beginning, in documents as in queries.
MOST_CHARACTERS = 128
# Soft hyphen, joiners and their opposite, word joiner, byte order mark: they are seen by nobody who types a query.
_UNSEEN = dict.fromkeys(map(ord, "\u00ad\u200c\u200d\u2060\ufeff"))
_GRAMS = r"\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}\p{Script=Bopomofo}\p{Script=Hangul}ー"
_UNSPACED = r"\p{Script=Thai}\p{Script=Lao}\p{Script=Khmer}\p{Script=Myanmar}"
_WORD = rf"[[\p{{L}}\p{{N}}]--[{_GRAMS}{_UNSPACED}]][[\p{{L}}\p{{N}}\p{{M}}]--[{_GRAMS}{_UNSPACED}]]*+"
# What joins the parts of a code, a number, a name or an address; c++ and c# keep their signs.
_JOINTS = r"[-_./:@&'’+\\]"
_RUNS = regex.compile(
    rf"(?P<grams>[{_GRAMS}]++)|(?P<unspaced>[{_UNSPACED}]++)"
    rf"|(?P<code>{_WORD}(?:{_JOINTS}{_WORD})*+(?:\+\+|\#)?+)",
    regex.V1,
)
_WORDS = regex.compile(_WORD, regex.V1)
# Letters with their marks, or digits.
_LETTERS_OR_DIGITS = regex.compile(r"[\p{L}\p{M}]++|\p{N}++", regex.V1)


def tokens(text: str, settings: TokensConfig) -> list[str]:
    """The tokens of a text, as often as they occur; none for a text of punctuation alone."""
    found: list[str] = []
    for run in _RUNS.finditer(_normalised(text)):
        if run.lastgroup == "grams":
            found += _grams(run.group())
        elif run.lastgroup == "unspaced":
            found += _icu_words(run.group()) if settings.unspaced == "icu" else _grams(run.group())
        else:
            code = run.group()
            # Most runs are a word of letters.
            found += [_word(code, settings.stemmer)] if code.isalpha() else _code(code, settings.stemmer)
    return found


def joined(text: str, settings: TokensConfig) -> str:
    """The tokens of a text parted by spaces, which none of them holds."""
    return " ".join(tokens(text, settings))


def _normalised(text: str) -> str:
    # Lower case may make what NFKC would join, as of İ.
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).lower()).translate(_UNSEEN)


def _grams(run: str) -> list[str]:
    return [*run, *map("".join, itertools.pairwise(run))]


def _code(code: str, stemmer: str | None) -> Iterator[str]:
    """A word; of a code of several the whole, each word, and the letters and digits of a word that has both."""
    words = _WORDS.findall(code)
    if code != words[0]:
        yield code[:MOST_CHARACTERS]
    for word in words:
        parts = _LETTERS_OR_DIGITS.findall(word)
        if len(parts) > 1:
            yield word[:MOST_CHARACTERS]
        for part in parts:
            yield _word(part, stemmer)


def _word(letters: str, stemmer: str | None) -> str:
    return (letters if stemmer is None else _stem(stemmer)(letters))[:MOST_CHARACTERS]


def _icu_words(run: str) -> list[str]:
    from icu4py.breakers import WordBreaker

    return [word[:MOST_CHARACTERS] for word in WordBreaker(run, "und") if word.isalnum() or _has_letter(word)]


def _has_letter(word: str) -> bool:
    return any(character.isalnum() for character in word)


_stemmers = threading.local()


def _stem(language: str) -> Callable[[str], str]:
    """Snowball's stemmer of a language; one a thread, since it keeps its words while it works."""
    known = getattr(_stemmers, language, None)
    if known is None:
        import Stemmer

        known = Stemmer.Stemmer(language).stemWord
        setattr(_stemmers, language, known)
    stem: Callable[[str], str] = known
    return stem
