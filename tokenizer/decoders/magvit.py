"""Convolutional decoder without attention, as MaskGIT's and MAGVIT-v2's: encoders/magvit.py in a
mirror."""

from __future__ import annotations

import dataclasses

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tokenizer.decoders.resnet import Upsample
from tokenizer.encoders.magvit import check_magvit, unbiased_blocks
from tokenizer.encoders.resnet import group_norm, resnet_stride

UPSAMPLING = ("nearest", "channels")


@dataclasses.dataclass(frozen=True)
class MagvitDecoderConfig:
    kind: str = "magvit"
    channels: int = 128
    multipliers: tuple[int, ...] = (
        1,
        1,
        2,
        2,
        4,
    )  # of the channels, one per resolution, finest first
    blocks: int = 2  # per resolution, and in the middle
    # where a block changes width, what its 1x1 shortcut is of; MaskGIT's is of the "output"
    shortcut: str = "input"
    upsampling: str = (
        "nearest"  # neighbour, then 3x3; or 3x3 to four times the "channels", which become pixels
    )
    # before each resolution a group norm whose scale and shift the codes' statistics give
    adaptive: bool = False
    groups: int = 0  # of each group norm; 0 for 32, or as many as leave four channels to each
    unit_range: bool = False  # the network gives images in [0, 1]

    def __post_init__(self) -> None:
        check_magvit("decoder", self)
        if self.upsampling not in UPSAMPLING:
            raise ValueError(
                f"decoder.upsampling={self.upsampling!r} is not one of {', '.join(UPSAMPLING)}"
            )

    def build(
        self, in_channels: int, stride: int, grid: tuple[int, int], encoder: nn.Module
    ) -> MagvitDecoder:
        """Raises ValueError when the encoder's pixels per code are not this decoder's."""
        made = resnet_stride(self.multipliers, 1)
        if made != stride:
            raise ValueError(
                f"decoder.multipliers={list(self.multipliers)} make {made} pixels per code, where "
                "the encoder has "
                f"{stride}: give both as many"
            )
        return MagvitDecoder(in_channels, self)


class MagvitDecoder(nn.Module):
    """(B, in_channels, h, w) -> (B, 3, stride * h, stride * w)."""

    def __init__(self, in_channels: int, config: MagvitDecoderConfig) -> None:
        super().__init__()
        self.unit_range = config.unit_range
        width = config.channels * config.multipliers[-1]
        self.conv_in = nn.Conv2d(in_channels, width, 3, padding=1)
        self.middle = nn.Sequential(*unbiased_blocks(width, width, config.blocks, config))
        self.norms, self.up = nn.ModuleList(), nn.ModuleList()  # coarsest first
        for level, multiplier in reversed(list(enumerate(config.multipliers))):
            channels = config.channels * multiplier
            if config.adaptive:
                self.norms.append(AdaptiveGroupNorm(in_channels, width, config.groups))
            layers = unbiased_blocks(width, channels, config.blocks, config)
            width = channels
            if level:
                layers.append(
                    Upsample(width) if config.upsampling == "nearest" else ChannelsToPixels(width)
                )
            self.up.append(nn.Sequential(*layers))
        self.norm_out = group_norm(width, config.groups)
        self.conv_out = nn.Conv2d(width, 3, 3, padding=1)

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight whose gradients balance the adversarial loss."""
        return self.conv_out.weight

    def forward(self, vectors: Tensor) -> Tensor:
        x = self.middle(self.conv_in(vectors))
        for number, layers in enumerate(self.up):
            x = layers(self.norms[number](x, vectors) if len(self.norms) else x)
        images = self.conv_out(F.silu(self.norm_out(x)))
        return images * 2 - 1 if self.unit_range else images


class AdaptiveGroupNorm(nn.Module):
    """A group norm whose scale and shift come from the codes: from each of their channels'
    deviation and mean."""

    def __init__(
        self, code_channels: int, channels: int, groups: int = 0, eps: float = 1e-6
    ) -> None:
        super().__init__()
        plain = group_norm(channels, groups)
        self.norm = nn.GroupNorm(plain.num_groups, channels, eps=eps, affine=False)
        self.scale, self.shift, self.eps = (
            nn.Linear(code_channels, channels),
            nn.Linear(code_channels, channels),
            eps,
        )

    def forward(self, x: Tensor, vectors: Tensor) -> Tensor:
        places = vectors.flatten(2)
        # Of a single place there is no deviation.
        variance = places.var(2) if places.shape[2] > 1 else places.new_zeros(places.shape[:2])
        scale, shift = self.scale((variance + self.eps).sqrt()), self.shift(places.mean(2))
        return self.norm(x) * scale[:, :, None, None] + shift[:, :, None, None]


class ChannelsToPixels(nn.Module):
    """Twice the resolution: a 3x3 convolution to four values per channel, the place in the 2x2
    changing slowest."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 4 * channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return rearrange(self.conv(x), "b (p q c) h w -> b c (h p) (w q)", p=2, q=2)
