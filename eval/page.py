"""The report as one HTML file that a double click opens offline: styles and pictures are inside."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from eval.record import Measurement, Record
from eval.tables import ARROWS, extractor_text, headlines, interval_text, seed_text, value_text

if TYPE_CHECKING:
    from eval.report import Section, Stage

STYLE = """
:root { color-scheme: light; --ink: #1c1e26; --muted: #6b7080; --line: #d9dde5; --accent: #2f5d8a; }
* { box-sizing: border-box; }
body { margin: 0; background: #f4f5f8; color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 28px; margin: 0 0 4px; }
h2 { font-size: 20px; margin: 0 0 4px; }
.banner { background: #fff6da; border-left: 4px solid #c89211; border-radius: 4px; padding: 10px 14px; }
.banner, .note { margin: 12px 0; overflow-wrap: anywhere; }
.note, section > p, figcaption, .tile span, th { color: var(--muted); }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(190px, 1fr)); gap: 12px; }
.tile, section { background: #fff; border: 1px solid var(--line); border-radius: 8px; }
.tile { padding: 12px 14px; }
.tile b { display: block; font-size: 23px; font-variant-numeric: tabular-nums; }
.tile span { font-size: 13px; overflow-wrap: anywhere; }
section { padding: 20px; margin: 20px 0; }
section > p { margin: 0 0 12px; }
figure { margin: 16px 0 0; overflow-x: auto; }
figcaption { font-size: 13px; margin-top: 4px; }
figure img, figure svg { display: block; max-width: 100%; height: auto; }
img { image-rendering: pixelated; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { text-align: left; padding: 6px 10px; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
details summary { cursor: pointer; color: var(--accent); }
code, pre { font: 12px/1.45 ui-monospace, monospace; }
pre { overflow: auto; background: #f4f5f8; padding: 12px; border-radius: 6px; max-height: 420px; }
td pre { max-width: 420px; max-height: 240px; white-space: pre-wrap; overflow-wrap: anywhere; }
"""
VIEWPORT = '<meta name="viewport" content="width=device-width, initial-scale=1">'
COLUMNS = ("figure", "value", "95 %", "N", "of", "extractor", "seed", "settings")
NUMBERS = ("value", "95 %", "N")


def html_page(
    title: str,
    notes: Sequence[str],
    figures: Sequence[Measurement],
    sections: Sequence[Section],
    records: Sequence[Record],
    stages: Sequence[Stage],
) -> str:
    blocks = [
        _element("h1", escape(title)),
        *(_element("div", escape(note), "banner" if note.startswith("Not ") else "note") for note in notes),
        _element("div", "".join(map(_tile, headlines(figures))), "tiles"),
        *map(_section, sections),
        _figures_section(figures),
        _settings_section(records, stages),
    ]
    head = f'<meta charset="utf-8">{VIEWPORT}{_element("title", escape(title))}{_element("style", STYLE)}'
    body = _element("main", "\n".join(blocks))
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{body}</body></html>\n'


def _tile(figure: Measurement) -> str:
    name = escape(f"{figure.name} {ARROWS[figure.higher_is_better]}")
    images = escape(f"{figure.n:,} × {figure.split}")
    value = _element("b", escape(value_text(figure)))
    return _element("div", f"<span>{name}</span>{value}<span>{images}</span>", "tile")


def _section(section: Section) -> str:
    pictures = "".join(
        _element("figure", picture.inline() + _element("figcaption", escape(picture.caption)))
        for picture in section.pictures
    )
    return _element("section", _heading(section.title, section.text) + pictures)


def _figures_section(figures: Sequence[Measurement]) -> str:
    head = "".join(_element("th", name, "number" if name in NUMBERS else "") for name in COLUMNS)
    rows = "\n".join(_element("tr", _cells(figure)) for figure in figures)
    table = _element("div", f"<table><tr>{head}</tr>\n{rows}</table>", "scroll")
    text = "Figures with equal settings hashes may be compared. Arrows say which way is better."
    return _element("section", _heading("All figures", text) + table)


def _cells(figure: Measurement) -> str:
    texts = (
        f"{figure.name} {ARROWS[figure.higher_is_better]}",
        value_text(figure),
        interval_text(figure),
        f"{figure.n:,}",
        figure.split,
        extractor_text(figure),
        seed_text(figure),
    )
    cells = [_element("td", escape(text), "number" if name in NUMBERS else "") for name, text in zip(COLUMNS, texts)]
    code = _element("code", figure.settings_hash[:8])
    return "".join(cells) + _element(
        "td", _fold(code, _json({"settings": figure.settings, "subject": figure.subject, "details": figure.details}))
    )


def _settings_section(records: Sequence[Record], stages: Sequence[Stage]) -> str:
    folds = [_fold(escape(f"{stage.name}/config.yaml"), stage.config) for stage in stages]
    for record in records:
        content = _json({"settings": record.settings, "environment": record.environment})
        folds.append(_fold(f"{record.kind}: settings and environment", content))
    return _element("section", _heading("Settings", "What was run, resolved.") + "".join(folds))


def _heading(title: str, text: str) -> str:
    return _element("h2", escape(title)) + _element("p", escape(text))


def _fold(summary: str, text: str) -> str:
    return f"<details><summary>{summary}</summary><pre>{escape(text)}</pre></details>"


def _element(name: str, content: str, kind: str = "") -> str:
    opening = f'{name} class="{kind}"' if kind else name
    return f"<{opening}>{content}</{name}>"


def _json(content: object) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False, sort_keys=True)
