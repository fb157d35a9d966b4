"""Figures as text: numbers, the headline figures, aligned tables."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence

from eval.record import Measurement, Record
from eval.report.markup import table_cell
from training.text import printable

HEADLINES = (
    r"PSNR$",
    r"SSIM$",
    r"LPIPS",
    r"rF",
    r"codebook usage",
    r"perplexity",
    r"F.* to held-out$",
    r"F.* of real images$",
    r"IS(\[.*\])?$",
    r"nearer to train",
    r"NLL",
    r"class agreement$",
    r"classifier accuracy",
)
ARROWS = {True: "↑", False: "↓", None: ""}
FIGURE_COLUMNS = ("figure", "value", "95 %", "N", "of", "extractor", "seed")
FIGURE_NUMBERS = ("value", "95 %", "N")  # of these, those that are ordered by value


def unique_figures(records: Iterable[Record]) -> list[Measurement]:
    """All records' figures in order; one that two records share comes once."""
    found = {(m.name, m.settings_hash): m for record in records for m in record.measurements}
    return list(found.values())


def headlines(figures: Iterable[Measurement]) -> list[Measurement]:
    return [
        figure for figure in figures if any(re.match(pattern, figure.name) for pattern in HEADLINES)
    ]


def text_table(figures: Sequence[Measurement]) -> str:
    """Figures as aligned plain text."""
    rows = [("figure", "value", "95 %", "N", "of")]
    rows += [(f.name, value_text(f), interval_text(f), f"{f.n:,}", f.split) for f in figures]
    rows = [tuple(map(printable, row)) for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    right = (False, True, True, True, False)
    return "\n".join(
        "  ".join(
            cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right)
        ).rstrip()
        for row in rows
    )


def markdown_table(columns: Mapping[str, Sequence[str]], left: Sequence[str] = ()) -> list[str]:
    """Lines of Markdown, aligned: the first column and those of `left` to the left, the others to
    the right. Cells are Markdown's own text (eval.report.markup makes it of any other)."""
    padded = []
    for head, cells in columns.items():
        texts = [table_cell(text) for text in (head, *cells)]
        width = max(map(len, texts))
        to_left = not padded or head in left
        place, rule = (str.ljust, "-" * width) if to_left else (str.rjust, "-" * (width - 1) + ":")
        padded.append([place(texts[0], width), rule, *(place(text, width) for text in texts[1:])])
    return [f"| {' | '.join(line)} |" for line in zip(*padded)]


def columns_of(header: Sequence[str], rows: Sequence[Sequence[str]]) -> dict[str, list[str]]:
    """Rows of cells -> columns by their heads."""
    return {head: [row[place] for row in rows] for place, head in enumerate(header)}


def figure_cells(figure: Measurement) -> tuple[str, ...]:
    """A figure's row, by FIGURE_COLUMNS."""
    return (
        f"{figure.name} {ARROWS[figure.higher_is_better]}".strip(),
        value_text(figure),
        interval_text(figure),
        f"{figure.n:,}",
        figure.split,
        extractor_text(figure),
        seed_text(figure),
    )


def value_text(figure: Measurement) -> str:
    return f"{number(figure.value)} {figure.unit}".strip()


def interval_text(figure: Measurement) -> str:
    return "" if figure.interval is None else " … ".join(map(number, figure.interval))


def number(value: float) -> str:
    """Four significant digits, without an exponent where people need none."""
    if not math.isfinite(value):
        return "∞" if value > 0 else str(value)
    if value == 0 or 1e-4 <= abs(value) < 1e6:
        digits = 3 - math.floor(math.log10(abs(value))) if value else 0
        return f"{value:,.{max(0, digits)}f}"
    return f"{value:.3g}"


def extractor_text(figure: Measurement) -> str:
    settings = figure.settings
    return (
        f"{settings['extractor']}@{settings['extractor_sha256'][:8]}"
        if "extractor" in settings
        else ""
    )


def seed_text(figure: Measurement) -> str:
    return str(figure.subject.get("seed", ""))
