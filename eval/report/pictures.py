"""Pictures of the report: image strips as PNG, plots as SVG that needs no script, font or
network."""

from __future__ import annotations

import base64
import dataclasses
import io
import math
from collections.abc import Iterable, Sequence

import numpy as np

from eval.report.markup import escape
from eval.report.tables import number
from tokenizer.data.grid import image_grid

ERROR_TOP = 64  # levels of absolute error that are drawn at full strength
INK, MUTED, LINE, FILL = "#1c1e26", "#6b7080", "#2f5d8a", "#d9dde5"


@dataclasses.dataclass(frozen=True)
class Picture:
    """One picture of the report: PNG bytes or SVG text, and what it shows."""

    name: str  # file name
    caption: str
    content: bytes | str
    pairs: int = 0  # columns of a pair_strip, which the page gives a slider
    smooth: bool = False  # when scaled: a plot, not pixels

    def file(self) -> bytes:
        if isinstance(self.content, bytes):
            return self.content
        return self.content.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1).encode()

    def inline(self) -> str:
        if isinstance(self.content, str):
            return self.content
        data = base64.b64encode(self.content).decode()
        more = f' data-pairs="{self.pairs}"' if self.pairs else ""
        more += ' class="smooth"' if self.smooth else ""
        return f'<img alt="{escape(self.caption)}"{more} src="data:image/png;base64,{data}">'


def pair_strip(originals: np.ndarray, images: np.ndarray) -> bytes:
    """(n, H, W, 3) pairs -> three rows: originals, reconstructions, errors."""
    difference = np.abs(originals.astype(np.int16) - images).mean(-1, keepdims=True)
    errors = (difference * (255 / ERROR_TOP)).clip(0, 255).astype(np.uint8).repeat(3, -1)
    return png(np.concatenate([originals, images, errors]), len(originals))


def png(images: np.ndarray, columns: int) -> bytes:
    data = io.BytesIO()
    image_grid(images, columns).save(data, "PNG", optimize=True)
    return data.getvalue()


def codebook_plot(counts: np.ndarray, width: int = 720, height: int = 180) -> str:
    """(K,) counts -> SVG: share of tokens per code, sorted, relative to even use."""
    relative = np.sort(counts)[::-1] * len(counts) / max(1, counts.sum())
    left, bottom, top = 44, 24, 12
    plot_width, plot_height = width - left - 8, height - bottom - top
    peak = _nice_ceiling(float(relative.max()))
    y = [top + plot_height * (1 - value / peak) for value in relative.tolist()]
    edges = [left + plot_width * i / len(relative) for i in range(len(relative) + 1)]
    steps = " ".join(f"L{a:.2f} {v:.2f} L{b:.2f} {v:.2f}" for a, b, v in zip(edges, edges[1:], y))
    base, even = top + plot_height, top + plot_height * (1 - 1 / peak)
    across = f'x1="{left}" x2="{edges[-1]:.1f}"'
    shapes = [
        f'<path d="M{left} {base} {steps} L{edges[-1]:.2f} {base} Z" fill="{LINE}"/>',
        f'<line {across} y1="{even:.1f}" y2="{even:.1f}" stroke="{INK}" stroke-dasharray="4 3"/>',
        f'<line {across} y1="{base}" y2="{base}" stroke="{MUTED}"/>',
        _text(left - 6, even + 4, "even", "end"),
        *([_text(left - 6, top + 8, f"{peak:g}x", "end")] if even - top > 16 else []),
        _text(left, height - 7, "most used", "start"),
        _text(edges[-1], height - 7, f"code {len(counts):,}", "end"),
    ]
    return _svg(width, height, shapes, "codebook use")


def heat_map(values: np.ndarray, unit: str, width: int = 360) -> str:
    """(H, W) values -> SVG: a cell for each, from the lowest in white to the highest in full
    colour."""
    rows, columns = values.shape
    low, high = float(values.min()), float(values.max())
    side = min(32.0, width / columns)
    shares = (values - low) / ((high - low) or 1)
    shapes = [
        f'<rect x="{column * side:.2f}" y="{row * side:.2f}" width="{side:.2f}" height="{side:.2f}" fill="{LINE}" '
        f'fill-opacity="{shares[row, column]:.3f}"><title>row {row + 1}, column {column + 1}: '
        f"{number(float(values[row, column]))} {escape(unit)}</title></rect>"
        for row in range(rows)
        for column in range(columns)
    ]
    bottom = rows * side
    box = f'x="0" y="0" width="{columns * side:.2f}" height="{bottom:.2f}"'
    shapes += [
        f'<rect {box} fill="none" stroke="{FILL}"/>',
        _text(0, bottom + 16, f"white {number(low)}, full {number(high)} {unit}", "start"),
    ]
    return _svg(max(columns * side, 200), bottom + 24, shapes, "value by position")


def bars(
    shares: Sequence[tuple[str, float]],
    width: int = 720,
    row: int = 24,
    label: str = "share per class",
) -> str:
    """(name, percent) rows -> SVG of horizontal bars over 0..100 %."""
    left, right = 150, 60
    reach = width - left - right
    shapes = []
    for index, (name, share) in enumerate(shares):
        top = 6 + index * row
        box = f'x="{left}" y="{top + 3}" height="{row - 8}" rx="2"'
        shapes += [
            _text(left - 8, top + 15, name if len(name) <= 20 else name[:19] + "…", "end", INK),
            f'<rect {box} width="{reach}" fill="{FILL}"/>',
            f'<rect {box} width="{reach * share / 100:.1f}" fill="{LINE}">'
            f"<title>{escape(name)}: {share:.1f} %</title></rect>",
            _text(width - right + 8, top + 15, f"{share:.1f} %", "start", INK),
        ]
    return _svg(width, 12 + len(shares) * row, shapes, label)


def curves_plot(curves: dict[str, list[tuple[int, float]]], columns: int = 3) -> str:
    """Log key -> points, as an SVG of small panels; a positive curve over a factor of 30 is
    logarithmic."""
    width, height, gap = 232, 118, 12
    shapes = []
    for index, (key, points) in enumerate(sorted(curves.items())):
        x, y = (index % columns) * (width + gap), (index // columns) * (height + gap)
        shapes.append(f'<g transform="translate({x} {y})">{_panel(key, points, width, height)}</g>')
    rows = math.ceil(len(curves) / columns)
    return _svg(
        columns * (width + gap) - gap, rows * (height + gap) - gap, shapes, "training curves"
    )


def _panel(
    key: str, points: list[tuple[int, float]], width: int, height: int, most: int = 200
) -> str:
    if len(points) > most:  # means of neighbours: a curve has no more pixels than that
        parts = np.array_split(np.array(points, dtype=float), most)
        points = [(int(part[-1, 0]), float(part[:, 1].mean())) for part in parts]
    values = np.array([value for _, value in points])
    low, high = float(values.min()), float(values.max())
    logarithmic = low > 0 and high / low > 30
    scaled = np.log10(values) if logarithmic else values
    bottom, reach = float(scaled.min()), float(scaled.max() - scaled.min()) or 1.0
    first, last = points[0][0], points[-1][0]
    left, top, plot_width, plot_height = 8, 24, width - 16, height - 44
    place = [
        f"{left + plot_width * (step - first) / max(1, last - first):.1f},"
        f"{top + plot_height * (1 - (value - bottom) / reach):.1f}"
        for (step, _), value in zip(points, scaled.tolist())
    ]
    shown = key if len(key) <= 30 else key[:29] + "…"
    end_x, end_y = place[-1].split(",")
    return "".join(
        [
            f'<rect width="{width}" height="{height}" rx="6" fill="none" stroke="{FILL}"/>',
            f"<title>{escape(key)}: {number(values[-1])} at step {last:,}</title>",
            _text(left, 16, shown + (" (log)" if logarithmic else ""), "start", INK),
            f'<polyline points="{" ".join(place)}" fill="none" stroke="{LINE}" stroke-width="1.5"/>',
            f'<circle cx="{end_x}" cy="{end_y}" r="2.5" fill="{LINE}"/>',
            _text(left, height - 7, f"{number(low)} … {number(high)}", "start"),
            _text(width - 8, height - 7, f"step {last:,}", "end"),
        ]
    )


def _svg(width: float, height: float, shapes: Iterable[str], label: str) -> str:
    head = f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img" aria-label="{label}" '
    head += 'font-family="system-ui, sans-serif" font-size="11">'
    return head + '<rect width="100%" height="100%" fill="#ffffff"/>' + "".join(shapes) + "</svg>"


def _text(x: float, y: float, text: str, anchor: str, fill: str = MUTED) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{fill}">{escape(text)}</text>'
    )


def _nice_ceiling(value: float) -> float:
    """The next of 2, 5, 10, 20, ... at or above a value; at least 2."""
    scale = 10 ** math.floor(math.log10(max(value, 1.0)))
    return max(2.0, next(step * scale for step in (1, 2, 5, 10) if step * scale >= value))
