"""The report as one HTML file that a double click opens offline: styles, pictures and its one
script are inside."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from eval.record import Measurement, Record
from eval.report.markup import escape
from eval.report.tables import (
    ARROWS,
    extractor_text,
    headlines,
    interval_text,
    seed_text,
    value_text,
)

if TYPE_CHECKING:
    from eval.report.report import Section, Stage

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
details summary { cursor: pointer; white-space: nowrap; color: var(--accent); }
nav { display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 12px 0; font-size: 14px; }
a, th button { color: var(--accent); }
th button { all: unset; cursor: pointer; }
:is(a, summary, th button, input, select):focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
th[aria-sort=ascending] button::after { content: " ▲"; }
th[aria-sort=descending] button::after { content: " ▼"; }
img.smooth { image-rendering: auto; }
.slider { display: flex; flex-wrap: wrap; align-items: center; gap: 6px 16px; margin-top: 10px; font-size: 13px; }
.slider canvas { image-rendering: pixelated; width: 224px; height: auto; border: 1px solid var(--line); }
.slider div { display: grid; gap: 8px; min-width: 200px; flex: 1; max-width: 420px; }
.slider input { width: 100%; accent-color: var(--accent); }
code, pre { font: 12px/1.45 ui-monospace, monospace; }
pre { overflow: auto; background: #f4f5f8; padding: 12px; border-radius: 6px; max-height: 420px; }
td pre { max-width: 420px; max-height: 240px; white-space: pre-wrap; overflow-wrap: anywhere; }
"""
# Sorts tables by a click on a head, and gives every strip of pairs a view with a slider from
# original to reconstruction. Without it everything is still there to read.
SCRIPT = """
"use strict";
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  const value = (row, at, numeric) => {
    const text = row.cells[at].textContent.trim();
    if (!numeric) return text;
    const number = text.startsWith("\u221e") ? Infinity : parseFloat(text.replaceAll(",", ""));
    return Number.isNaN(number) ? -Infinity : number;
  };
  heads.forEach((head, at) => {
    const button = document.createElement("button"), numeric = head.classList.contains("number");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    head.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      const state = down ? "descending" : "ascending";
      heads.forEach(other => other.setAttribute("aria-sort", other === head ? state : "none"));
      const order = (a, b) => {
        const [x, y] = [value(a, at, numeric), value(b, at, numeric)];
        return (numeric ? (x > y) - (x < y) : x.localeCompare(y)) * (down ? -1 : 1);
      };
      body.append(...[...body.rows].sort(order));
    });
  });
}
for (const strip of document.querySelectorAll("img[data-pairs]")) {
  const pairs = Number(strip.dataset.pairs), gap = 2;  // as tokenizer.data.grid lays them out
  const [canvas, view, panel] = ["canvas", "div", "div"].map(name => document.createElement(name));
  const range = (text, max, start) => {
    const label = document.createElement("label"), input = document.createElement("input");
    Object.assign(input, { type: "range", min: 0, max: max, value: start });
    label.append(text, input);
    panel.append(label);
    input.addEventListener("input", draw);
    return input;
  };
  const chosen = range("Image", pairs - 1, 0);
  const edge = range("Original to the left, reconstruction to the right", 100, 50);
  view.className = "slider";
  canvas.setAttribute("role", "img");
  view.append(canvas, panel);
  strip.closest("figure").append(view);
  function draw() {
    const width = (strip.naturalWidth - gap) / pairs - gap, height = (strip.naturalHeight - gap) / 3 - gap;
    const left = gap + chosen.value * (width + gap), cut = Math.round(width * edge.value / 100);
    const pen = canvas.getContext("2d");
    canvas.width = width;
    canvas.height = height;
    pen.drawImage(strip, left, gap + height + gap, width, height, 0, 0, width, height);
    if (cut) pen.drawImage(strip, left, gap, cut, height, 0, 0, cut, height);
    pen.fillStyle = "#c89211";
    pen.fillRect(Math.min(width - 1, cut), 0, Math.max(1, width / 200), height);
    const text = `Image ${Number(chosen.value) + 1} of ${pairs}`;
    chosen.setAttribute("aria-valuetext", text);
    canvas.setAttribute("aria-label", `${text}: original up to ${edge.value} % from the left, then reconstruction`);
  }
  strip.addEventListener("click", event => {
    chosen.value = Math.floor(event.offsetX / strip.clientWidth * pairs);
    draw();
  });
  strip.complete ? draw() : strip.addEventListener("load", draw);
}
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{}'"
VIEWPORT = '<meta name="viewport" content="width=device-width, initial-scale=1">'
COLUMNS = ("figure", "value", "95 %", "N", "of", "extractor", "seed", "settings")
NUMBERS = ("value", "95 %", "N")
FIGURES_TITLE, SETTINGS_TITLE = "All figures", "Settings"


def html_page(
    title: str,
    notes: Sequence[str],
    figures: Sequence[Measurement],
    sections: Sequence[Section],
    records: Sequence[Record],
    stages: Sequence[Stage],
) -> str:
    titles = [*(section.title for section in sections), FIGURES_TITLE, SETTINGS_TITLE]
    blocks = [
        _element("h1", escape(title)),
        "<nav>"
        + "".join(f'<a href="#{_anchor(each)}">{escape(each)}</a>' for each in titles)
        + "</nav>",
        *(
            _element("div", escape(note), "banner" if note.startswith("Not ") else "note")
            for note in notes
        ),
        _element("div", "".join(map(_tile, headlines(figures))), "tiles"),
        *map(_section, sections),
        _figures_section(figures),
        _settings_section(records, stages),
    ]
    policy = POLICY.format(base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode())
    head = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">{VIEWPORT}'
    head += _element("title", escape(title)) + _element("style", STYLE)
    body = _element("main", "\n".join(blocks)) + _element("script", SCRIPT)
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
    table = ""
    if section.table:
        columns, numbers = section.table.columns, section.table.numbers
        rows = [
            "".join(
                _element("td", escape(text), "number" if name in numbers else "")
                for name, text in zip(columns, cells)
            )
            for cells in zip(*columns.values())
        ]
        table = _table(list(columns), numbers, rows)
    return _titled(section.title, section.text, table + pictures)


def _figures_section(figures: Sequence[Measurement]) -> str:
    text = "Figures with equal settings hashes may be compared. Arrows say which way is better."
    return _titled(FIGURES_TITLE, text, _table(COLUMNS, NUMBERS, list(map(_cells, figures))))


def _table(heads: Sequence[str], numbers: Sequence[str], rows: Sequence[str]) -> str:
    """`rows` are cells in HTML."""
    head = "".join(
        f'<th scope="col"{" class=number" if name in numbers else ""}>{escape(name)}</th>'
        for name in heads
    )
    body = "\n".join(_element("tr", row) for row in rows)
    table = f"<table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>"
    return _element("div", table, "scroll")


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
    cells = [
        _element("td", escape(text), "number" if name in NUMBERS else "")
        for name, text in zip(COLUMNS, texts)
    ]
    code = _element("code", figure.settings_hash[:8])
    return "".join(cells) + _element(
        "td",
        _fold(
            code,
            _json(
                {"settings": figure.settings, "subject": figure.subject, "details": figure.details}
            ),
        ),
    )


def _settings_section(records: Sequence[Record], stages: Sequence[Stage]) -> str:
    folds = [_fold(escape(f"{stage.name}/config.yaml"), stage.config) for stage in stages]
    for record in records:
        content = _json({"settings": record.settings, "environment": record.environment})
        folds.append(_fold(f"{record.kind}: settings and environment", content))
    return _titled(SETTINGS_TITLE, "What was run, resolved.", "".join(folds))


def _titled(title: str, text: str, content: str) -> str:
    heading = _element("h2", escape(title)) + _element("p", escape(text))
    return f'<section id="{_anchor(title)}">{heading}{content}</section>'


def _anchor(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def _fold(summary: str, text: str) -> str:
    return f"<details><summary>{summary}</summary><pre>{escape(text)}</pre></details>"


def _element(name: str, content: str, kind: str = "") -> str:
    opening = f'{name} class="{kind}"' if kind else name
    return f"<{opening}>{content}</{name}>"


def _json(content: object) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False, sort_keys=True)
