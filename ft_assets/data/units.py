r"""Split text into the units that are compared: words, symbols, and letters where no blanks are.

A word is a run of letters, digits and their combining marks. Chinese, Japanese, Thai, Lao, Khmer
and Burmese have no blanks between words: each of their letters is a unit. Signs that carry meaning
are units (`C++`, `2 - 2`, `50%`, an emoji); punctuation and Markdown are not.
"""

import re
import unicodedata

import regex

_BLANKLESS = (
    r"\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}\p{Script=Thai}\p{Script=Lao}"
    r"\p{Script=Khmer}\p{Script=Myanmar}\u30fc"
)
_MARKED = rf"[[{_BLANKLESS}]&&[\p{{L}}\p{{N}}]]\p{{M}}*"
_WORD = rf"[[\p{{L}}\p{{M}}\p{{N}}]--[{_BLANKLESS}]]+"


def _pattern(letter: str, word: str, symbol: str) -> str:
    return rf"""(?x)
      [0-9]+(?:[.,][0-9]+)+                     # 3.5 is not 35
    | {word}
    | {symbol}
    | (?<={letter})\#                           # C#
    | (?<=[\w)])[*/^](?=[\w(])                  # 2*3, and no Markdown
    | (?<=[\w)]\ )(?:\*\*?|[/^])(?=\ [\w(])
    | (?<!{letter})-(?=\ ?[0-9])                # a minus, and no hyphen
    | (?<=\b{letter}\ )-(?=\ {letter}\b)       # x - y
    """


# Most text is ASCII, for which the simpler pattern is three times as fast.
_ASCII = re.compile(_pattern("[a-z]", "[a-z0-9]+", "[$+<=>|~%&@]"))
_UNIT = regex.compile(
    _pattern(r"\p{L}", f"{_MARKED}|{_WORD}", r"[\p{Sc}\p{Sm}\p{So}%&@]"), regex.V1
)
_LETTER = regex.compile(f"[{_BLANKLESS}]")
_DASHES = str.maketrans("\u2212\u2013\u2012\u2010\u2011", "-----")
_APOSTROPHE = regex.compile(r"(?<=\p{L})['\u2019](?=\p{L})")
# Soft hyphens, joiners, marks of direction, variation selectors: they change no word.
_IGNORED = regex.compile(r"[\p{Cf}\ufe00-\ufe0f\U000e0100-\U000e01ef]")


def units(text: str) -> list[str]:
    """Return the units of a text, in its order: NFKC, lower case."""
    plain = text.isascii()
    text = text.lower() if plain else _folded(text)
    if "'" in text or "\u2019" in text:
        text = _APOSTROPHE.sub("", text)
    return _ASCII.findall(text) if plain else _UNIT.findall(text)


def _folded(text: str) -> str:
    text = unicodedata.normalize("NFKC", text).translate(_DASHES)
    return unicodedata.normalize("NFKC", _IGNORED.sub("", text).casefold())


def is_blankless(unit: str) -> bool:
    """Return True for a letter of a script that has no blanks between words."""
    return not unit.isascii() and _LETTER.match(unit) is not None


def normalise(text: str) -> str:
    """Return text for comparison: its units, with single blanks."""
    return " ".join(units(text))
