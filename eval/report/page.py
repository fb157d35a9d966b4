"""The report as one HTML file that a double click opens offline: styles, pictures and its one
script are inside.

The page is templates/report.html (jinja2, with every text escaped), report.css and report.js.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.record import Measurement, Record
from eval.report.meaning import meaning, warnings
from eval.report.tables import (
    ARROWS,
    FIGURE_COLUMNS,
    FIGURE_NUMBERS,
    extractor_text,
    figure_cells,
    headlines,
    interval_text,
    number,
)
from training.text import printable

if TYPE_CHECKING:
    from jinja2 import Template

    from eval.report.sections import Section
    from eval.report.stages import Stage

TEMPLATES = Path(__file__).parent / "templates"


def html_page(
    title: str,
    about: Sequence[str],
    notes: Sequence[str],
    figures: Sequence[Measurement],
    sections: Sequence[Section],
    records: Sequence[Record],
    stages: Sequence[Stage],
) -> str:
    """`about` stands below the title: what was measured, when, by which commit."""
    script = (TEMPLATES / "report.js").read_text()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return _template().render(
        title=title,
        about=about,
        notes=notes,
        warnings=warnings(figures),
        cards=[_row(figure) for figure in headlines(figures)],
        rows=[_row(figure) for figure in figures],
        columns=FIGURE_COLUMNS,
        numbers=FIGURE_NUMBERS,
        sections=sections,
        settings=_settings(records, stages),
        policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'",
        style=(TEMPLATES / "report.css").read_text(),
        script=script,
    )


@functools.cache
def _template() -> Template:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    pages = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_shown,
    )
    pages.filters["anchor"] = lambda text: re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    return pages.get_template("report.html")


def _shown(value: Any) -> Any:
    """A text without characters that a page has no place for; markup of our own as it is."""
    if isinstance(value, str) and not hasattr(value, "__html__"):
        return printable(value, keep="\n\t")
    return value


def _row(figure: Measurement) -> dict[str, Any]:
    mark = extractor_text(figure)  # a card says it once more below, and in smaller letters
    settings = {"settings": figure.settings, "subject": figure.subject, "details": figure.details}
    return {
        "name": figure.name.replace(f"[{mark}]", ""),
        "mark": mark,
        "arrow": ARROWS[figure.higher_is_better],
        "number": number(figure.value),
        "unit": figure.unit,
        "interval": interval_text(figure),
        "images": f"{figure.n:,} × {figure.split}",
        "meaning": meaning(figure.name),
        "cells": dict(zip(FIGURE_COLUMNS, figure_cells(figure))),
        "hash": figure.settings_hash[:8],
        "settings": _json(settings),
    }


def _settings(records: Sequence[Record], stages: Sequence[Stage]) -> list[tuple[str, str]]:
    """(what, text) of what was run, resolved."""
    texts = [(f"{stage.name}/config.yaml", stage.config) for stage in stages]
    for record in records:
        content = _json({"settings": record.settings, "environment": record.environment})
        texts.append((f"{record.kind}: settings and environment", content))
    return texts


def _json(content: object) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False, sort_keys=True)
