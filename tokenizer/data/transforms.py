"""Encoded images to uint8 pixels, augmentation, and pixels to the range models see."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

# Frequent formats first. A closed list: some of Pillow's other readers start programs (EPS runs
# Ghostscript).
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")

SIXTEEN_BITS = 65535
OVERSHOOT = 0.1  # of white, beyond black and white: what bicubic and Lanczos kernels add at an edge
# EXIF orientation (tag 0x0112) -> the transposition that puts the picture upright.
ORIENTATION_TAG = 0x0112
TILE_WIDTH_TAG, TILE_HEIGHT_TAG = 322, 323  # TIFF 6.0, section 15
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImage(ValueError):
    """One item that cannot be read. The message is the reason, without the item's name."""


def decode(data: bytes, size: int, max_pixels: int, crop: str = "lanczos") -> np.ndarray:
    """An encoded image -> (3, size, size) uint8: upright, on white, centre square, grey thrice.

    `crop` is one of CROPS.

    Raises BadImage, before any decoding when the header announces more than `max_pixels`, and
    MemoryError when the machine is short of memory, which says nothing of the image.
    """
    needed = len(data)  # bytes
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            for width, height in (image.size, _tile(image)):
                if width * height > max_pixels:
                    raise BadImage(f"{width}x{height} is more than data.max_pixels={max_pixels}")
                if width * height == 0:
                    raise BadImage(f"has no pixels ({width}x{height})")
            needed += 8 * image.width * image.height
            if crop == "lanczos":
                # JPEG decodes at 1/2, 1/4 or 1/8; twice the target leaves the resize below its
                # antialiasing.
                image.draft(image.mode, (2 * size, 2 * size))
            image.load()
            upright = UPRIGHT.get(orientation(image))
            square = CROPS[crop](on_white(image), size)
    except BadImage:
        raise
    except Image.UnidentifiedImageError:
        raise BadImage("is not an image of a known format" if data else "is empty") from None
    except Exception as error:  # what Pillow's readers raise on damaged bytes is an open list
        if isinstance(
            error, MemoryError
        ):  # of damaged ones, too, that ask for more than their header announces
            bytearray(needed)
        raise BadImage(" ".join(str(error).split()) or type(error).__name__) from error
    # The centre square is the same region in every orientation, so the small image can be turned.
    pixels = np.asarray(square if upright is None else square.transpose(upright))
    return pixels[None].repeat(3, axis=0) if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _tile(image: Image.Image) -> tuple[int, int]:
    """What is decoded at once: a TIFF's tile, however small its picture, else the picture."""
    tags = getattr(image, "tag_v2", {})
    return tags.get(TILE_WIDTH_TAG, image.width), tags.get(TILE_HEIGHT_TAG, image.height)


def orientation(image: Image.Image) -> int:
    """EXIF orientation of a loaded image, 1..8; damaged EXIF counts as upright, as viewers do."""
    try:
        return image.getexif().get(ORIENTATION_TAG, 1)
    except Exception:
        return 1


def on_white(image: Image.Image) -> Image.Image:
    """Any mode -> "L" or "RGB"; whatever is transparent lies on white."""
    if image.mode[0] in "IF":
        values = np.asarray(image).astype(np.float64)
        told = image.mode.startswith("I;16") or (image.mode == "I" and image.format != "TIFF")
        return _grey(values, SIXTEEN_BITS if told else _white(values))
    if image.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        layer = image if image.mode == "RGBA" else image.convert("RGBA")
        white = Image.new("RGB", layer.size, "white")
        white.paste(layer, (0, 0), layer)
        return white
    mode = "L" if image.mode == "1" else "RGB"
    return image if image.mode in ("L", "RGB") else image.convert(mode)


def _white(values: np.ndarray) -> int:
    """What is white in (H, W) floats or 32-bit integers, whose format does not say it. Raises
    BadImage in doubt.

    0..1, 0..255 or 0..65535: resampling may have shot over either end by a tenth (OVERSHOOT), and
    where white is not 1 the brightest pixel must reach a quarter of it, or all be whole numbers up
    to 255. Anything else could be several ranges: 0..4095, [-1, 1], heights in metres, a high
    dynamic range whose white is an exposure of the viewer's choice.
    """
    if not np.isfinite(values).all():
        raise BadImage("has pixels that are not finite")
    low, high = values.min(), values.max()
    levels = high <= 255 and (values == np.rint(values)).all()  # of eight bits, however dark
    for white in (1, 255, SIXTEEN_BITS):
        bright = white == 1 or high >= white / 4 or (white == 255 and levels)
        if high <= (1 + OVERSHOOT) * white and low >= -OVERSHOOT * white and bright:
            return white
    raise BadImage(
        f"has values from {low:g} to {high:g}: what is white is in doubt; scale them to 0..1, "
        "or save it with 8 or 16 bits"
    )


def _grey(values: np.ndarray, white: int) -> Image.Image:
    """(H, W) of 16 or more bits -> "L". Pillow's own conversion clips at 255, which turns 16-bit
    images white."""
    return Image.fromarray(np.rint((values * (255 / white)).clip(0, 255)).astype(np.uint8))


def _centre_square(image: Image.Image, size: int) -> Image.Image:
    """Shorter side to `size` and the rest cut evenly, in one antialiased resize."""
    if image.size == (size, size):
        return image
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    kernel = Image.Resampling.LANCZOS if side > size else Image.Resampling.BICUBIC
    return image.resize(
        (size, size), kernel, (left, top, left + side, top + side), reducing_gap=2.0
    )


def _adm_square(image: Image.Image, size: int) -> Image.Image:
    """guided-diffusion's (Dhariwal and Nichol 2021): halved by averaging while it is twice too
    large, then bicubic, and cut to whole pixels."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    whole = (round(image.width * scale), round(image.height * scale))
    image = image.resize(whole, Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


CROPS = {"lanczos": _centre_square, "adm": _adm_square}


def flip(image: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror left and right with probability 1/2. (3, S, S) uint8."""
    return image.flip(2) if torch.rand((), generator=generator) < 0.5 else image


def shift(image: Tensor, generator: torch.Generator) -> Tensor:
    """Move by up to S/16 (at least one) whole pixels each way; the edge is repeated. (3, S, S)
    uint8."""
    size = image.shape[-1]
    reach = max(1, size // 16)
    down, right = torch.randint(-reach, reach + 1, (2,), generator=generator).tolist()
    places = torch.arange(size)
    return image[:, (places - down).clamp(0, size - 1)][:, :, (places - right).clamp(0, size - 1)]


AUGMENTATIONS: dict[str, tuple[Callable[[Tensor, torch.Generator], Tensor], ...]] = {
    "none": (),
    "flip": (flip,),
    "shift": (shift,),
    "flip_shift": (flip, shift),
}


def augment(image: Tensor, name: str, seed: int) -> Tensor:
    """One item through AUGMENTATIONS[name]; the same seed gives the same result. (3, S, S)
    uint8."""
    generator = torch.Generator().manual_seed(seed)
    for step in AUGMENTATIONS[name]:
        image = step(image, generator)
    return image


def to_float(images: Tensor) -> Tensor:
    """uint8 0..255 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Floats, clamped to [-1, 1] and rounded in float32, -> uint8 0..255; undoes `to_float`
    exactly."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def to_pixels(images: Tensor) -> np.ndarray:
    """(B, 3, H, W) floats in [-1, 1] -> (B, H, W, 3) uint8, as pictures are written."""
    return to_uint8(images).permute(0, 2, 3, 1).contiguous().cpu().numpy()
