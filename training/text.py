"""Names that others gave, as text that a terminal, JSON, XML and Markdown take."""

from __future__ import annotations

import collections
import re
import unicodedata
from collections.abc import Sequence

# Control characters, halves of surrogate pairs, and separators of lines and paragraphs (Unicode 15,
# table 4-4).
UNSAFE = ("Cc", "Cs", "Zl", "Zp")
# What turns the order of the letters after it: a name could show itself as another one.
DIRECTIONS = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
UNDECODED = range(
    0xDC80, 0xDD00
)  # how Python keeps the bytes of a file's name that are no UTF-8 (PEP 383)


def printable(text: str, keep: str = "") -> str:
    """A text without what moves a cursor, ends a line or cannot be encoded; the characters of
    `keep` stay.

    Those are written as Python escapes them: a line feed as \\n, ESC as \\x1b, the byte E9 of a
    name in Latin-1 as \\xe9, half of a surrogate pair as \\ud800. Letters of all languages stay
    what they are.
    """
    return text if text.isprintable() else "".join(x if x in keep else _shown(x) for x in text)


def distinct(names: Sequence[str]) -> list[str]:
    """Printable names, of which no two look alike: those that would differ in what nobody sees
    alone (zero-width spaces, other spaces, other spellings of one letter) are spelled out.
    """
    shown = [printable(name) for name in names]
    looks = [_look(name) for name in shown]
    alike = {look for look, count in collections.Counter(looks).items() if count > 1}
    escaped = (name.encode("unicode_escape", "surrogatepass").decode() for name in names)
    spelled = (re.sub(r"^ | $", r"\\x20", name) for name in escaped)
    return [out if look in alike else name for name, look, out in zip(shown, looks, spelled)]


def _look(text: str) -> str:
    """What of a text is seen, where letters that are composed and their parts are the same."""
    seen = (
        " " if unicodedata.category(letter) == "Zs" else letter
        for letter in unicodedata.normalize("NFC", text)
    )
    return "".join(letter for letter in seen if unicodedata.category(letter) != "Cf").strip()


def _shown(letter: str) -> str:
    number = ord(letter)
    if number in UNDECODED:
        return f"\\x{number - 0xDC00:02x}"
    unsafe = (
        unicodedata.category(letter) in UNSAFE or letter in DIRECTIONS or number & 0xFFFE == 0xFFFE
    )
    return letter.encode("unicode_escape").decode() if unsafe else letter
