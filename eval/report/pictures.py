"""Pictures of the report: strips and grids of images as PNG, plots as SVG."""

from __future__ import annotations

import base64
import dataclasses
import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from eval.report.markup import escape
from tokenizer.data.grid import image_grid
from training.text import printable

if TYPE_CHECKING:
    from markupsafe import Markup

ERROR_TOP = 64  # levels of absolute error that are drawn at full strength
MARGIN_INK = "#1c1e26"


@dataclasses.dataclass(frozen=True)
class Picture:
    """One picture of the report, PNG or SVG by its name's end, and what it shows."""

    name: str  # file name
    caption: str
    content: bytes
    pairs: int = 0  # columns of a pair_strip, which the page gives a slider
    heading: str = ""
    smooth: bool = False  # when scaled: a plot, not pixels

    def inline(self) -> Markup:
        """As an element of an HTML page."""
        from markupsafe import Markup

        if self.name.endswith(".svg"):
            return Markup(_inline_svg(self.content.decode(), self.name, self.label))
        more = f' data-pairs="{self.pairs}"' if self.pairs else ""
        more += ' class="smooth"' if self.smooth else ""
        data = base64.b64encode(self.content).decode()
        return Markup(f'<img alt="{escape(self.label)}"{more} src="data:image/png;base64,{data}">')

    @property
    def label(self) -> str:
        return self.caption or self.heading


def _inline_svg(text: str, name: str, label: str) -> str:
    """matplotlib's file as an element: without what only a file of its own needs (the header, the
    names of its groups, the addresses of formats), and with identifiers that no other plot has."""
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text[text.index("<svg") :])
    text = text.replace("xlink:href", "href")
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", text)
    prefix = re.sub(r"\W+", "-", name)
    text = re.sub(r'(url\(#|href="#| id=")(?!data:)', rf"\g<1>{prefix}-", text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1)


def pair_strip(originals: np.ndarray, images: np.ndarray) -> bytes:
    """(n, H, W, 3) pairs -> three rows: originals, reconstructions, errors."""
    difference = np.abs(originals.astype(np.int16) - images).mean(-1, keepdims=True)
    errors = (difference * (255 / ERROR_TOP)).clip(0, 255).astype(np.uint8).repeat(3, -1)
    return png(np.concatenate([originals, images, errors]), len(originals))


def png(images: np.ndarray, columns: int) -> bytes:
    data = io.BytesIO()
    image_grid(images, columns).save(data, "PNG", optimize=True)
    return data.getvalue()


def labelled_grid(names: Sequence[str], rows: Sequence[np.ndarray]) -> bytes:
    """A row of images (n, H, W, 3) uint8 for each name, which stands on its left, as PNG."""
    from PIL import Image, ImageDraw, ImageFont

    grid = image_grid(np.concatenate(rows), columns=len(rows[0]))
    names, font = [printable(name) for name in names], ImageFont.load_default(16)
    margin = 12 + max(round(font.getlength(name)) for name in names)
    picture = Image.new("RGB", (margin + grid.width, grid.height), "white")
    picture.paste(grid, (margin, 0))
    draw, pitch = ImageDraw.Draw(picture), grid.height / len(rows)
    for index, name in enumerate(names):
        draw.text((margin - 6, (index + 0.5) * pitch), name, MARGIN_INK, font, anchor="rm")
    data = io.BytesIO()
    picture.save(data, "PNG", optimize=True)
    return data.getvalue()
