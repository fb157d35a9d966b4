"""Images that somebody holds in memory, as the bytes of a file, which take the path of any file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tokenizer.data.transforms import UPRIGHT, BadImage, on_white, orientation

BEYOND = (
    16.0  # no image of [-1, 1] reaches it, whatever resampling or noise added; of 255 levels any
)


def contents(image: Any) -> bytes:
    """A PIL image, or uint8 pixels: a tensor (3, H, W), an array (H, W, 3), or of one channel -> a
    PGM or PPM file. A path -> what its file holds.

    Raises BadImage, with the reason, for anything else: floats do not say what is white.
    """
    if isinstance(image, str | Path):
        try:
            return Path(image).expanduser().read_bytes()
        except OSError as error:
            raise BadImage(f"cannot be read ({error.strerror})") from None
    pixels = _of_pil(image) if isinstance(image, Image.Image) else _of_array(image)
    kind, (height, width) = b"P5" if pixels.ndim == 2 else b"P6", pixels.shape[:2]
    return b"%s %d %d 255\n" % (kind, width, height) + np.ascontiguousarray(pixels).tobytes()


def _of_pil(image: Image.Image) -> np.ndarray:
    turn = UPRIGHT.get(orientation(image))
    return np.asarray(on_white(image if turn is None else image.transpose(turn)))


def _of_array(image: Any) -> np.ndarray:
    """(H, W) or (H, W, 3) uint8."""
    if not isinstance(image, torch.Tensor | np.ndarray):
        raise BadImage(f"is a {type(image).__name__}, not a PIL image, a path or uint8 pixels")
    if image.dtype not in (torch.uint8, np.uint8):
        raise BadImage(f"has pixels of {image.dtype}, not of uint8: give 0 to 255")
    tensor = torch.as_tensor(image)
    if isinstance(image, torch.Tensor) and tensor.ndim == 3:  # channels first, as torch has them
        tensor = tensor.movedim(0, -1)
    if tensor.ndim == 3 and tensor.shape[2] == 1:
        tensor = tensor[:, :, 0]
    if tensor.ndim != 2 and (tensor.ndim != 3 or tensor.shape[2] != 3):
        expected = "(3, H, W)" if isinstance(image, torch.Tensor) else "(H, W, 3)"
        raise BadImage(f"has the shape {tuple(image.shape)}, not {expected}")
    return tensor.cpu().numpy()


def check_floats(images: torch.Tensor) -> None:
    """Raise ValueError unless images (B, 3, H, W) are finite floats that may be of [-1, 1]: what is
    of [0, 255] would get a code like any other, and the same one everywhere."""
    remedy = (
        "encode takes floats in [-1, 1] (uint8 / 127.5 - 1); tokenizer.encode_images takes pictures"
    )
    if not images.is_floating_point():
        raise ValueError(f"images are {str(images.dtype).removeprefix('torch.')}: {remedy}")
    # both ends at once: the host waits for the device once
    low, high = torch.stack(images.detach().aminmax()).tolist() if images.numel() else (0, 0)
    if not (low > -math.inf and high < math.inf):  # NaN is neither
        raise ValueError(f"images have pixels that are not finite: {remedy}")
    if max(-low, high) > BEYOND:
        raise ValueError(f"images are from {low:.4g} to {high:.4g}: {remedy}")
