"""Text that others gave (names of classes, runs and files) as text of a page: HTML, SVG and
Markdown."""

from __future__ import annotations

import html
import re

from training.text import printable


def escape(text: str) -> str:
    """What shows as `text` in HTML or SVG, where characters that XML 1.0 has no place for are
    spelled out."""
    return html.escape(printable(text, keep="\n\t"))


def markdown(text: str) -> str:
    """One line of Markdown (CommonMark, with GitHub's tables) that shows as `text` and is nothing
    but text."""
    text = re.sub(r"[\\`*_<>|&]", r"\\\g<0>", printable(text))
    text = re.sub(r"\](?=[(\[:])", r"\\]", text)  # of links and images
    return re.sub(r"^(\s*\d*)([#+=.)~-])", r"\1\\\2", text)  # of headings, lists, rules and fences


def table_cell(text: str) -> str:
    """Markdown's own text, such as `code`, as one cell of a table."""
    return re.sub(r"(\\*)\|", r"\1\1\\|", printable(text))
