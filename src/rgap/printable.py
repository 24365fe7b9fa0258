"""Text of others, such as names in a file, made harmless to print. Whatever is foreign passes `visible`."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

LONGEST = 1000
"""Characters of one text that are shown; the middle of a longer one is left out."""
NAME = 100
"""The same of a name."""
# They change the order in which the characters around them are shown: a name can pose as another one.
# The last two are no characters, and no XML may hold them.
_HIDDEN = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufffe\uffff")


def visible(text: str, longest: int = LONGEST) -> str:
    """Characters that would hide, reorder or break what is around them are spelt out; endless text is cut."""
    if len(text) > longest:
        half = longest // 2
        left_out = f"… {len(text) - 2 * half:,} characters left out …"
        return f"{visible(text[:half], half)} {left_out} {visible(text[-half:], half)}"
    return "".join(f"[U+{ord(each):04X}]" if _hides(each) else each for each in text)


def line(text: str, longest: int = LONGEST) -> str:
    """The same in one line, whatever ends of lines are in it."""
    return " ".join(visible(text, longest).split("\n"))


def shown(name: str) -> str:
    """A name from a file."""
    return line(name, NAME)


def listed(names: Iterable[str], most: int = 8) -> str:
    """Names in one line, the first few of many."""
    names = list(names)
    text = ", ".join(map(shown, names[:most]))
    return text if len(names) <= most else f"{text} and {len(names) - most} more"


def _hides(character: str) -> bool:
    # Controls, halves of a surrogate pair (a file name that is not UTF-8 has them), and line separators.
    category = unicodedata.category(character)
    return (category in ("Cc", "Cs", "Zl", "Zp") and character not in "\n\t") or character in _HIDDEN
