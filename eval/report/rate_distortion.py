"""Rate and distortion of tokenizers and picture formats: tables and a plot."""

from __future__ import annotations

import io
from collections.abc import Sequence

from eval.metrics.rate_distortion import FIGURES, Point, RateDistortion, pareto
from eval.report.tables import columns_of, markdown_table, number

CAPTION = (
    "Bits per pixel and figures are means over {n} images of {width} x {height} at one setting. Codecs: Pillow "
    "{pillow}, chroma halved as by its default, quality swept at full size, 1/2, 1/4 and 1/8 (Lanczos both ways); "
    "the curve is the best PSNR for the bits. With headers: whole files, one per image. Bare: without what all files "
    "of a setting repeat (JPEG without its frame and quantization tables, WebP without RIFF, AVIF the mdat box alone; "
    "tokens without the file's header). A tokenizer's own weights, and a prior's, are counted nowhere. Images that "
    "come from JPEG files favour JPEG near the quality of those files."
)


def caption(measured: RateDistortion) -> str:
    import PIL

    height, width = measured.size
    return CAPTION.format(
        n=f"{measured.num_images:,}", width=width, height=height, pillow=PIL.__version__
    )


def markdown(measured: RateDistortion) -> str:
    """Each tokenizer beside the codecs at its bits, then the curves."""
    shown = _measured(measured)
    titles = FIGURES | {"lpips": measured.lpips or ""}
    lines = []
    for bare in (False, True):
        lines += [f"### At the bits of each tokenizer, {'bare' if bare else 'with headers'}", ""]
        header = ["", "bits per pixel", *(titles[figure] for figure in shown)]
        rows = []
        for point in measured.points:
            name = f"**{point.name}** ({point.setting})"
            rows.append([name, number(point.rate(bare)), *_figures(point, shown)])
            for codec, curve in measured.curves.items():
                other = measured.matched(point, codec, bare)
                front = pareto(curve, bare)
                low, high = (number(front[end].rate(bare)) for end in (0, -1))
                figures = _figures(other, shown) if other else ["—"] * len(shown)
                rows.append([codec, "the same" if other else f"has {low} … {high}", *figures])
        lines += [*_table(header, rows), ""]
    lines += ["### Curves", ""]
    header = ["", "setting", "bits per pixel", "bare", *(titles[figure] for figure in shown)]
    rows = [
        [codec, point.setting, number(point.bits), number(point.bare_bits), *_figures(point, shown)]
        for codec, curve in measured.curves.items()
        for point in pareto(curve)
    ]
    lines += [*_table(header, rows), "", caption(measured), *measured.notes]
    return "\n".join(lines) + "\n"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return markdown_table(columns_of(header, rows), left=("setting",))


def _measured(measured: RateDistortion) -> list[str]:
    """The figures that all points have."""
    points = [*measured.points, *(point for curve in measured.curves.values() for point in curve)]
    return [
        figure for figure in FIGURES if all(getattr(point, figure) is not None for point in points)
    ]


def _figures(point: Point, shown: Sequence[str]) -> list[str]:
    return [number(getattr(point, figure)) for figure in shown]


def plot(measured: RateDistortion) -> bytes:
    """Bits per pixel against each figure, as PNG. Dashed and hollow: bare."""
    from matplotlib.figure import Figure

    shown = _measured(measured)
    picture = Figure(figsize=(5.6 * len(shown), 4.6), layout="constrained")
    for figure, axes in zip(shown, picture.subplots(1, len(shown), squeeze=False)[0]):
        for index, (codec, curve) in enumerate(measured.curves.items()):
            for bare, style in ((False, "-"), (True, "--")):
                front = pareto(curve, bare)
                line = dict(
                    color=f"C{index}", linestyle=style, linewidth=1.3, label=None if bare else codec
                )
                axes.plot(
                    [each.rate(bare) for each in front],
                    [getattr(each, figure) for each in front],
                    **line,
                )
        for point in measured.points:
            value = getattr(point, figure)
            axes.plot(
                [point.bits, point.bare_bits], [value] * 2, color="0.6", linewidth=0.8, zorder=3
            )
            axes.plot(point.bits, value, "ko", markersize=5, zorder=4)
            axes.plot(point.bare_bits, value, "ko", markersize=5, fillstyle="none", zorder=4)
            place = dict(xytext=(6, 4), textcoords="offset points", fontsize=8)
            axes.annotate(point.name, (point.bits, value), **place)
        axes.set_xscale("log")
        axes.set_xlabel("bits per pixel")
        axes.set_ylabel(measured.lpips if figure == "lpips" else FIGURES[figure])
        axes.grid(True, color="0.92")
    picture.axes[0].legend(frameon=False, title="dashed, hollow: bare")
    data = io.BytesIO()
    picture.savefig(data, dpi=120, format="png")
    return data.getvalue()
