"""The plots of reports and comparisons: matplotlib draws them, as SVG of the same bytes for the
same numbers.

Lines and letters are drawn in the colour of the text around them (`currentColor`), so that a plot
within a page follows its light and its dark mode.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from eval.report.tables import number
from training.text import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FIRST, SECOND = "#1c1e26", "#3b7dbd", "#c89211"
FAINT = 0.15  # opacity of grids
MOST_POINTS = 300  # of a curve; more are joined to means of neighbours: a plot has no more pixels
# Where a label may lie beside its point, the best first: offsets in points, and which end of the
# text is there.
PLACES = [
    (side * (8 + up), sign * up, "left" if side > 0 else "right")
    for up in range(0, 120, 6)
    for side in (1, -1)
    for sign in ((1, -1) if up else (1,))
]

Curves = Mapping[str, Sequence[tuple[float, float]]]


def codebook_use(counts: np.ndarray) -> bytes:
    """(K,) counts -> each code's share of all tokens, most used first, relative to even use."""
    relative = np.sort(counts)[::-1] * len(counts) / max(1, counts.sum())
    heights = [part.mean() for part in np.array_split(relative, min(len(counts), MOST_POINTS))]
    figure = _figure(8, 2.4)
    axes = figure.add_subplot(xlabel="codes, most used first", ylabel="times even use")
    axes.stairs(heights, np.linspace(0, len(counts), len(heights) + 1), fill=True, color=FIRST)
    axes.axhline(1, color=INK, linestyle="--", linewidth=1)
    axes.set_xlim(0, len(counts))
    axes.set_ylim(0, max(2.0, 1.05 * max(heights)))
    return _svg(figure)


def position_map(values: np.ndarray, unit: str) -> bytes:
    """(H, W) values -> a cell for each; where there are few, with its number in it."""
    rows, columns = values.shape
    figure = _figure(4.4, 0.8 + 3.6 * min(1.5, rows / columns))
    axes = figure.add_subplot()
    image = axes.imshow(values, cmap="Blues")
    figure.colorbar(image, ax=axes, label=printable(unit))
    axes.set_axis_off()
    middle = float(values.min() + values.max()) / 2
    for (row, column), value in np.ndenumerate(values) if values.size <= 64 else ():
        # The cells are white to blue in both modes, so their numbers have colours of their own.
        shade = "#ffffff" if value > middle else "#111111"
        axes.text(column, row, number(float(value)), color=shade, ha="center", va="center")
    return _svg(figure)


def bars(shares: Sequence[tuple[str, float]]) -> bytes:
    """(name, percent) -> horizontal bars over 0 to 100 %, each with its figure."""
    figure = _figure(8, 0.6 + 0.28 * len(shares))
    axes = figure.add_subplot(xlim=(0, 100))
    places = np.arange(len(shares))
    drawn = axes.barh(places, [share for _, share in shares], 0.6, color=FIRST)
    axes.bar_label(drawn, [f"{share:.1f} %" for _, share in shares], padding=4, color=INK)
    names = [name if len(name) <= 24 else name[:23] + "…" for name, _ in shares]
    axes.set_yticks(places, list(map(_plain, names)))
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter("{x:g} %")
    return _svg(figure)


def training_curves(curves: Curves, columns: int = 3) -> bytes:
    """Key of a log -> (step, value); a panel each. A positive curve over a factor of 30 is
    logarithmic."""
    from matplotlib.ticker import MaxNLocator

    rows = math.ceil(len(curves) / columns)
    figure = _figure(3.1 * columns, 0.3 + 1.75 * rows)
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for (key, points), axes in zip(sorted(curves.items()), panels):
        steps, values = _thinned(points)
        axes.plot(steps, values, color=FIRST, linewidth=1.3)
        axes.plot(steps[-1:], values[-1:], "o", color=FIRST, markersize=3)
        axes.set_title(_plain(key if len(key) <= 34 else key[:33] + "…"), fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        if min(values) > 0 and max(values) / min(values) > 30:
            axes.set_yscale("log")
        else:
            axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.tick_params(labelsize=8)
    for axes in list(panels):  # what the last row has left
        axes.set_axis_off()
    figure.supxlabel("step", fontsize=9)
    return _svg(figure)


def named_curves(curves: Curves, across: str, up: str) -> bytes:
    """Name -> points of one figure, in one plot; the legend names the best end first."""
    from matplotlib import colormaps

    figure = _figure(9, 5)
    axes = figure.add_subplot(xlabel=across, ylabel=up)
    order = sorted(curves, key=lambda name: -curves[name][-1][1])
    for index, name in enumerate(order):
        look = {"linestyle": ("-", "--", ":")[index // 10 % 3], "linewidth": 1.5}
        color = colormaps["tab10"](index % 10)
        axes.plot(*zip(*curves[name]), color=color, label=_plain(name), **look)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    return _svg(figure)


def codebook_bars(
    names: Sequence[str], usage: Sequence[float], perplexity: Sequence[float]
) -> bytes:
    """Codes in use and perplexity, both in percent of the codebook."""
    figure = _figure(9, 0.8 + 0.42 * len(names))
    axes = figure.add_subplot(xlabel="% of the codebook", xlim=(0, 100))
    places = np.arange(len(names))
    axes.barh(places - 0.2, usage, 0.38, color=FIRST, label="codes in use")
    axes.barh(places + 0.2, perplexity, 0.38, color=SECOND, label="perplexity")
    axes.set_yticks(places, list(map(_plain, names)))
    axes.invert_yaxis()
    figure.legend(loc="outside upper right", ncols=2, frameon=False)
    return _svg(figure)


def named_points(
    names: Sequence[str], places: Sequence[float], heights: Sequence[float], across: str, up: str
) -> bytes:
    """Named points on a logarithmic and a linear axis; no label lies on another or on a point."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.ticker import StrMethodFormatter

    figure = _figure(9, 5.5)
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
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # settles the layout, which labels depend on
    figure.set_layout_engine("none")
    _label(axes, canvas.get_renderer(), names, places, heights)
    return _svg(figure)


def _label(
    axes: Axes,
    renderer: object,
    names: Sequence[str],
    places: Sequence[float],
    heights: Sequence[float],
) -> None:
    """Names beside their points, each at the first of PLACES where it covers nothing."""
    from matplotlib.text import Text

    points = axes.transData.transform(list(zip(places, heights)))
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in points]  # in pixels
    line = {"arrowstyle": "-", "color": FIRST, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3}
    for name, *point in zip(names, places, heights):
        label = axes.annotate(
            _plain(name),
            point,
            PLACES[0][:2],
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=INK,
            arrowprops=line,
        )
        for dx, dy, end in PLACES:
            label.set_position((dx, dy))
            label.set_horizontalalignment(end)
            label.update_positions(renderer)
            box = Text.get_window_extent(label, renderer).extents  # of the text, without its line
            if not any(_overlap(box, other) for other in taken):
                break
        taken.append(tuple(box))


def _overlap(first: Sequence[float], second: Sequence[float]) -> bool:
    """Whether boxes (left, bottom, right, top) share anything."""
    across = first[0] < second[2] and second[0] < first[2]
    return across and first[1] < second[3] and second[1] < first[3]


def _thinned(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    parts = np.array_split(np.array(points, dtype=float), min(len(points), MOST_POINTS))
    return [float(part[-1, 0]) for part in parts], [float(part[:, 1].mean()) for part in parts]


def _plain(name: str) -> str:
    """What matplotlib takes as text and not as mathematics."""
    return printable(name).replace("$", r"\$")


def _figure(width: float, height: float) -> Figure:
    """In inches. Axes get their look when the figure is written."""
    from matplotlib.figure import Figure

    return Figure((width, height), layout="constrained")


def _svg(figure: Figure) -> bytes:
    import matplotlib

    for axes in figure.axes:
        axes.patch.set_alpha(0)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.axison and not axes.images and axes.get_label() != "<colorbar>":
            axes.grid(axis="x" if axes.yaxis_inverted() else "both", color=INK, alpha=FAINT)
            axes.set_axisbelow(True)
        for each in (axes.title, axes.xaxis.label, axes.yaxis.label, *axes.get_xticklabels()):
            each.set_color(INK)
        axes.tick_params(colors=INK)
        for spine in axes.spines.values():
            spine.set_color(INK)
    figure.patch.set_alpha(0)
    data = io.BytesIO()
    look = {"svg.hashsalt": "plot", "svg.fonttype": "none", "font.family": "sans-serif"}
    with matplotlib.rc_context(look):
        figure.savefig(data, format="svg", metadata={"Date": None, "Creator": None})
    return data.getvalue().replace(INK.encode(), b"currentColor")
