"""DiffAugment (Zhao et al. 2020, arXiv:2006.10738): colour, translation and cutout that gradients
pass through."""

from __future__ import annotations

import torch
from torch import Tensor

NUM_DRAWS = 10  # uniform numbers that one sample needs


def diff_augment(images: Tensor, uniform: Tensor, probability: float) -> Tensor:
    """(B, 3, H, W) in [-1, 1] -> the same shape. Each sample meets each of the three with
    `probability`.

    `uniform` (B, NUM_DRAWS), in [0, 1), is all the randomness: a row decides for its sample alone.
    """
    chosen = (uniform[:, :3] < probability)[:, :, None, None, None]  # (B, 3, 1, 1, 1)
    images = torch.where(chosen[:, 0], color(images, uniform[:, 3:6]), images)
    images = torch.where(chosen[:, 1], translate(images, uniform[:, 6:8]), images)
    return torch.where(chosen[:, 2], cut_out(images, uniform[:, 8:10]), images)


def color(images: Tensor, uniform: Tensor) -> Tensor:
    """Brightness by -0.5..0.5, saturation times 0..2, contrast times 0.5..1.5; uniform (B, 3), 0.5
    changes nothing."""
    brightness, saturation, contrast = uniform[:, :, None, None, None].unbind(1)  # (B, 1, 1, 1)
    images = images + (brightness - 0.5)
    grey = images.mean(1, keepdim=True)
    images = grey + (images - grey) * (2 * saturation)
    level = images.mean((1, 2, 3), keepdim=True)
    return level + (images - level) * (contrast + 0.5)


def translate(images: Tensor, uniform: Tensor) -> Tensor:
    """Move by up to an eighth of each side, in whole pixels; what comes in is 0. uniform (B, 2),
    0.5 stays."""
    for dim, draw in ((2, uniform[:, 0]), (3, uniform[:, 1])):
        side = images.shape[dim]
        reach = (side + 4) // 8
        shift = (draw * (2 * reach + 1)).long() - reach
        source = torch.arange(side, device=images.device) - shift[:, None]  # (B, side)
        shape = [len(images), 1, 1, 1]
        shape[dim] = side
        inside = ((source >= 0) & (source < side)).view(shape)
        places = source.clamp(0, side - 1).view(shape).expand_as(images)
        images = images.gather(dim, places) * inside
    return images


def cut_out(images: Tensor, uniform: Tensor) -> Tensor:
    """A rectangle of half of each side becomes 0; its centre, uniform (B, 2), lies anywhere in the
    image."""
    spans = []
    for side, draw in zip(images.shape[2:], uniform.unbind(1)):
        extent = (side + 1) // 2
        first = (draw * side).long() - extent // 2
        place = torch.arange(side, device=images.device) - first[:, None]  # (B, side)
        spans.append((place >= 0) & (place < extent))
    hole = spans[0][:, None, :, None] & spans[1][:, None, None, :]
    return images * ~hole
