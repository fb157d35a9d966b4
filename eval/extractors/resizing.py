"""Resizes of (B, 3, H, W) uint8 images to (B, 3, size, size), the input of an extractor's network."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def resize_bilinear(images: Tensor, size: int) -> Tensor:
    """TensorFlow 1's, without antialiasing; float32 in [0, 255]."""
    from torch_fidelity.interpolate_compat_tensorflow import (
        interpolate_bilinear_2d_like_tensorflow1x,
    )

    assert images.dtype == torch.uint8
    return interpolate_bilinear_2d_like_tensorflow1x(
        images.float(), size=(size, size), align_corners=False
    )


def resize_bicubic(images: Tensor, size: int) -> Tensor:
    """Pillow's, antialiased and rounded to uint8."""
    return _pillow(images, size, np.uint8)


def resize_bicubic_float(images: Tensor, size: int) -> Tensor:
    """Pillow's, antialiased, every channel in float32: not rounded, but clipped, since its kernel
    leaves [0, 255]."""
    resized = _pillow(images.flatten(0, 1)[:, None], size, np.float32)
    return resized.clamp(0, 255).unflatten(0, images.shape[:2]).squeeze(2)


def _pillow(images: Tensor, size: int, dtype: type) -> Tensor:
    """(n, C, H, W), C = 3 or 1 -> (n, C, size, size) of the dtype, where the images are."""
    pictures = images.permute(0, 2, 3, 1).cpu().numpy().astype(dtype)
    pictures = pictures.squeeze(3) if pictures.shape[3] == 1 else pictures
    kernel = Image.Resampling.BICUBIC
    resized = np.stack(
        [np.asarray(Image.fromarray(picture).resize((size, size), kernel)) for picture in pictures]
    )
    resized = torch.from_numpy(resized).to(images.device)
    return resized[:, None] if resized.ndim == 3 else resized.permute(0, 3, 1, 2)
