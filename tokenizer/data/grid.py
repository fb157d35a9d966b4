"""Pictures of many images: one grid with thin separators."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

BACKGROUND = 255


def image_grid(images: np.ndarray, columns: int, scale: int = 0) -> Image.Image:
    """(N, H, W, 3) uint8 in reading order -> one picture with `columns` per row; the last row may
    be short.

    Every pixel becomes scale x scale pixels; 0 enlarges tiny images so that a side is about 64.
    """
    from PIL import Image

    count, height, width, channels = images.shape
    scale = scale or max(1, round(64 / max(height, width)))
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    height, width, gap = height * scale, width * scale, 2
    rows = max(1, math.ceil(count / columns))
    size = gap + rows * (height + gap), gap + columns * (width + gap)
    canvas = np.full((*size, channels), BACKGROUND, np.uint8)
    for index, image in enumerate(images):
        top, left = gap + index // columns * (height + gap), gap + index % columns * (width + gap)
        canvas[top : top + height, left : left + width] = image
    return Image.fromarray(canvas)
