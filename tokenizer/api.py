"""What Python code of others calls: a tokenizer by any of its names, and pictures to codes and back.

model = tokenizer.load("runs/digits")
codes = tokenizer.encode_images(model, [Image.open("a.png"), "b.jpg"])  # (2, N) int64
pictures = tokenizer.decode_images(model, codes)  # two PIL images
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenizer.cache import read_manifest
from tokenizer.data import transforms
from tokenizer.data.dataset import DataConfig
from tokenizer.data.pixels import contents
from tokenizer.data.transforms import BadImage, to_pixels
from tokenizer.interface import CodeLayout
from tokenizer.sharing import from_pretrained
from training import distributed
from training.errors import UserError

BATCH = 64  # images that go through a network at once


def load(name_or_folder: str | Path, **options: Any) -> nn.Module:
    """A tokenizer in evaluation mode, on this process's device: `encode`, `decode`, `layout`,
    `config`.

    `name_or_folder` is a run's folder, a pipeline's root (its tokens' tokenizer, else its last
    stage), a shared folder, a Hub name (owner/name), or published:NAME (docs/published.md).
    `options` are those of `from_pretrained`.

    Raises UserError where there is none, or it is damaged.
    """
    folder = Path(name_or_folder).expanduser()
    if folder.is_dir():
        return from_pretrained(find_tokenizer(folder), **options)
    return from_pretrained(name_or_folder, **options)


def find_tokenizer(folder: Path) -> Path:
    """The tokenizer's folder within a pipeline's root; any other folder as it is."""
    if any((folder / name).exists() for name in ("config.yaml", "manifest.json", "weights")):
        return folder
    manifest = read_manifest(folder / "tokens")
    if manifest is not None:
        place = os.path.normpath((folder / "tokens").resolve() / manifest["tokenizer"]["folder"])
        return Path(place)
    stages = sorted(folder.glob("tokenizer*/weights/model.safetensors"))
    return stages[-1].parents[1] if stages else folder


def encode_images(model: nn.Module, images: Any, *, batch_size: int = BATCH) -> Tensor:
    """Pictures -> their codes (B, N) int64, on the CPU.

    `images` is one or a list of PIL images, paths, or uint8 pixels ((3, H, W) tensors, (H, W, 3)
    arrays), or a uint8 tensor (B, 3, H, W). As in training they are turned upright, laid on white,
    cut to the centre square and scaled to the size that the tokenizer was trained on.

    Raises UserError, naming the picture, for one that cannot be read, or pixels that are not uint8.
    """
    pixels = as_pixels(images, model.config.data.image_size)
    device = distributed.device()
    parts = (transforms.to_float(part).to(device) for part in pixels.split(batch_size))
    return torch.cat([model.encode(part).cpu() for part in parts])


def decode_images(
    model: nn.Module,
    codes: Tensor,
    *,
    as_tensor: bool = False,
    layout: CodeLayout | None = None,
    batch_size: int = BATCH,
) -> Any:
    """Codes (B, N) int64 -> B PIL images; with `as_tensor`, (B, 3, H, W) uint8 on the CPU.

    `layout` (of `model.layout_of`) where they are not of the size trained on. Raises ValueError for
    codes that the tokenizer cannot have made.
    """
    from PIL import Image

    device = distributed.device()
    decoded = [model.decode(part.to(device), layout) for part in codes.split(batch_size)]
    if as_tensor:
        return torch.cat([transforms.to_uint8(part).cpu() for part in decoded])
    return [Image.fromarray(image) for part in decoded for image in to_pixels(part)]


def as_pixels(images: Any, image_size: int) -> Tensor:
    """What `encode_images` takes -> (B, 3, image_size, image_size) uint8."""
    many = isinstance(images, Sequence) and not isinstance(images, str)
    many = many or (getattr(images, "ndim", 0) == 4)
    found = []
    for number, image in enumerate(images if many else [images]):
        try:
            data = contents(image)
            decoded = transforms.decode(data, image_size, DataConfig.max_pixels)
        except BadImage as error:
            name = f" ({image})" if isinstance(image, str | Path) else ""
            raise UserError(f"images[{number}]{name}: {error}") from None
        found.append(torch.from_numpy(decoded.copy()))
    if not found:
        raise UserError("images: there are none")
    return torch.stack(found)
