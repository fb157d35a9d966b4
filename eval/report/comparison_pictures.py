"""Pictures that put runs side by side: points, bars of codebooks, training curves, rows of
images."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from tokenizer.data.grid import image_grid
from training.text import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, FIRST, SECOND, GRID = "#1c1e26", "#2f5d8a", "#c89211", "#d9dde5"
# Where a label may lie beside its point, the best first: offsets in points, and which end of the
# text is there.
PLACES = [
    (side * (8 + up), sign * up, "left" if side > 0 else "right")
    for up in range(0, 120, 6)
    for side in (1, -1)
    for sign in ((1, -1) if up else (1,))
]


def rate_plot(names: Sequence[str], bits: Sequence[float], psnr: Sequence[float]) -> bytes:
    """Bits per image against PSNR, dB, each point with its name, as SVG."""
    return points_plot(names, bits, psnr, "bits per image", "PSNR, dB")


def points_plot(
    names: Sequence[str], places: Sequence[float], heights: Sequence[float], across: str, up: str
) -> bytes:
    """Named points on a logarithmic and a linear axis, as SVG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text
    from matplotlib.ticker import StrMethodFormatter

    figure = _figure(5.5)
    axes = figure.add_subplot(xlabel=across, ylabel=up, xscale="log")
    axes.scatter(places, heights, color=FIRST, zorder=3)
    axes.set_xlim(min(places) / 1.6, max(places) * 1.6)
    axes.margins(y=0.15)
    ticks: list[float] = []
    for tick in sorted(places):
        ticks += [tick] if not ticks or tick > 1.08 * ticks[-1] else []
    axes.set_xticks(ticks)
    axes.xaxis.set_major_formatter(
        StrMethodFormatter("{x:,.0f}" if min(places) >= 10 else "{x:.3g}")
    )
    axes.minorticks_off()
    axes.tick_params(axis="x", labelrotation=45)
    axes.grid(color=GRID)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # settles the layout, which labels depend on
    figure.set_layout_engine("none")
    points = axes.transData.transform(list(zip(places, heights)))
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in points]  # what labels keep off, in pixels
    for name, *point in zip(names, places, heights):
        label = axes.annotate(
            _plain(name),
            point,
            PLACES[0][:2],
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=INK,
            arrowprops={
                "arrowstyle": "-",
                "color": FIRST,
                "linewidth": 0.5,
                "shrinkA": 0,
                "shrinkB": 3,
            },
        )
        for dx, dy, end in PLACES:
            label.set_position((dx, dy))
            label.set_horizontalalignment(end)
            label.update_positions(canvas.get_renderer())
            box = Text.get_window_extent(
                label, canvas.get_renderer()
            ).extents  # of the text, without its line
            if not any(_overlap(box, other) for other in taken):
                break
        taken.append(tuple(box))
    return _svg(figure)


def codebook_bars(
    names: Sequence[str], usage: Sequence[float], perplexity: Sequence[float]
) -> bytes:
    """Codes in use and perplexity, both in percent of the codebook, as SVG."""
    figure = _figure(0.8 + 0.42 * len(names))
    axes = figure.add_subplot(xlabel="% of the codebook", xlim=(0, 100))
    places = np.arange(len(names))
    axes.barh(places - 0.2, usage, 0.38, color=FIRST, label="codes in use")
    axes.barh(places + 0.2, perplexity, 0.38, color=SECOND, label="perplexity")
    axes.set_yticks(places, list(map(_plain, names)))
    axes.invert_yaxis()
    axes.grid(axis="x", color=GRID)
    axes.set_axisbelow(True)
    figure.legend(loc="outside upper right", ncols=2, frameon=False)
    return _svg(figure)


def curves_plot(curves: dict[str, list[tuple[int, float]]]) -> bytes:
    """Name -> (step, held-out PSNR) points, as SVG; the legend names the best end first."""
    from matplotlib import colormaps

    figure = _figure(5)
    axes = figure.add_subplot(xlabel="step", ylabel="held-out PSNR, dB")
    order = sorted(curves, key=lambda name: -curves[name][-1][1])
    for index, name in enumerate(order):
        style = ("-", "--", ":")[index // 10 % 3]
        axes.plot(
            *zip(*curves[name]),
            style,
            color=colormaps["tab10"](index % 10),
            linewidth=1.5,
            label=_plain(name),
        )
    axes.grid(color=GRID)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    return _svg(figure)


def labelled_grid(names: Sequence[str], rows: Sequence[np.ndarray]) -> bytes:
    """A row of images (n, H, W, 3) uint8 for each name, which stands on its left, as PNG."""
    from PIL import Image, ImageDraw, ImageFont

    grid, names = (
        image_grid(np.concatenate(rows), columns=len(rows[0])),
        [printable(name) for name in names],
    )
    font = ImageFont.load_default(16)
    margin = 12 + max(round(font.getlength(name)) for name in names)
    picture = Image.new("RGB", (margin + grid.width, grid.height), "white")
    picture.paste(grid, (margin, 0))
    draw, pitch = ImageDraw.Draw(picture), grid.height / len(rows)
    for index, name in enumerate(names):
        draw.text((margin - 6, (index + 0.5) * pitch), name, INK, font, anchor="rm")
    data = io.BytesIO()
    picture.save(data, "PNG", optimize=True)
    return data.getvalue()


def _plain(name: str) -> str:
    """What matplotlib takes as text and not as mathematics."""
    return printable(name).replace("$", r"\$")


def _overlap(first: Sequence[float], second: Sequence[float]) -> bool:
    """Whether boxes (left, bottom, right, top) share anything."""
    return (
        first[0] < second[2]
        and second[0] < first[2]
        and first[1] < second[3]
        and second[1] < first[3]
    )


def _figure(height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure((9, height), layout="constrained")


def _svg(figure: Figure) -> bytes:
    """The same bytes for the same plot."""
    import matplotlib

    data = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "plot"}):
        figure.savefig(data, format="svg", metadata={"Date": None})
    return data.getvalue()
