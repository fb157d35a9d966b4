"""Projected discriminator: small heads on a frozen, self-supervised vision transformer.

Sauer et al. 2023 (StyleGAN-T, arXiv:2301.09515), section 3.2, as RAE's code has it (Zheng et al.
2025, arXiv:2510.11690): images are resized, class tokens left out, the last input is the trunk's
before its last norm, and what is called batch normalisation there is of one image at a time. Other
than there, estimates of spectral norms move once for an optimizer step, and DINO's GELU is the
exact one that it was trained with.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.nn.utils.parametrize import is_parametrized

from tokenizer.encoders.foundation import FoundationConfig, FoundationEncoder
from training.config import signed
from training.errors import UserError
from training.sharding import blocks_of


@dataclasses.dataclass(frozen=True)
class DinoConfig:
    kind: str = "dino"
    name: str = (
        "facebook/dino-vits8"  # any encoder of kind foundation: a folder, or a model of the Hub
    )
    revision: str | None = None
    # The last block has a head too.
    layers: tuple[int, ...] = signed((2, 5, 8, 11))  # blocks with a head; negative: from the end
    kernel: int = 9
    resize: bool = (
        True  # images to the size that the trunk was trained on (DINO: 224 px); false: as they are
    )

    def __post_init__(self) -> None:
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"objective.discriminator.kernel={self.kernel} must be odd")
        if not self.layers:
            raise ValueError("objective.discriminator.layers=[] must name at least one block")

    def build(self, image_size: int, weights: bool = True) -> DinoDiscriminator:
        """With `weights=False`, the trunk's architecture alone.

        Raises UserError for a trunk that cannot be loaded, that lacks a block of `layers`, or whose
        patches do not fit the images.
        """
        try:
            trunk = FoundationConfig(name=self.name, revision=self.revision, frozen=False).build(
                image_size, weights=weights
            )
        except UserError as error:  # the encoder's section is not where this name stands
            raise UserError(
                str(error).replace("model.encoder.", "objective.discriminator.")
            ) from None
        size = self._native_size(trunk) if self.resize else image_size
        if size % trunk.stride:
            raise UserError(
                f"objective.discriminator.name={self.name}: images of {size} px are no whole "
                "number of its patches of "
                f"{trunk.stride} px: set objective.discriminator.resize=true"
            )
        tokens = (size // trunk.stride) ** 2
        if tokens == 1:  # whose normalisation leaves nothing
            raise UserError(
                f"objective.discriminator.name={self.name}: images of {size} px are one patch of "
                "it: "
                "set objective.discriminator.resize=true, or take another trunk"
            )
        if self.kernel // 2 > tokens:
            raise UserError(
                f"objective.discriminator.kernel={self.kernel} is too wide for {tokens} patches: "
                "take 1"
            )
        depth = trunk.model.config.num_hidden_layers
        blocks = [layer % depth for layer in self.layers if -depth <= layer < depth]
        if len(set(blocks)) < len(self.layers):
            quarters = sorted({max(1, depth * part // 4) - 1 for part in (1, 2, 3, 4)})
            raise UserError(
                f"objective.discriminator.layers={list(self.layers)} are not all different blocks "
                "of a trunk that has "
                f"{depth}: take {quarters}"
            )
        return DinoDiscriminator(trunk, tuple(blocks), self.kernel, size)

    def _native_size(self, trunk: FoundationEncoder) -> int:
        size = getattr(trunk.model.config, "image_size", None)
        if size is None:
            raise UserError(
                f"objective.discriminator.name={self.name} has no size of its own: "
                "set objective.discriminator.resize=false"
            )
        return size if isinstance(size, int) else size[0]


class DinoDiscriminator(nn.Module):
    """(B, 3, H, W) in [-1, 1] -> (B, heads, h, w) logits: per head, one for every patch of the
    trunk.

    Gradients pass through the trunk to the images. The trunk itself never learns, stays in
    evaluation mode, and is in neither the parameters nor the state dict.
    """

    def __init__(
        self, trunk: FoundationEncoder, blocks: tuple[int, ...], kernel: int, size: int
    ) -> None:
        """`blocks`: those with a head, counted from 0; images are resized to `size` where theirs
        differs."""
        super().__init__()
        self.blocks, self.size = blocks, size
        self._unregistered = (
            trunk.eval().requires_grad_(False),
        )  # a tuple hides it from nn.Module
        # Hooks of our own that stay, as a compiler traces through these and not through those of
        # transformers.
        self._met: list[Tensor] = []  # what the blocks in `asked` gave, in their order
        layers = blocks_of(trunk.model)
        assert len(layers) == trunk.model.config.num_hidden_layers
        self.asked = sorted({*blocks, len(layers) - 1})
        for block in self.asked:
            layers[block].register_forward_hook(self._keep)
        self.heads = nn.ModuleList(Head(trunk.channels, kernel) for _ in range(len(blocks) + 1))
        self.train()

    @property
    def trunk(self) -> FoundationEncoder:
        return self._unregistered[0]

    def _apply(self, fn, recurse: bool = True) -> DinoDiscriminator:
        self.trunk._apply(fn, recurse)  # to(device) takes the trunk along
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> DinoDiscriminator:
        """The estimates of spectral norms move in `update` alone, whatever the mode."""
        super().train(mode)
        for module in self._normed():
            module.parametrizations.weight.train(False)
        return self

    @torch.no_grad()
    def update(self) -> None:
        """After an optimizer step: one power iteration for each spectral norm, however many forward
        passes it took."""
        for module in self._normed():
            estimate = module.parametrizations.weight.train(True)
            module.weight  # noqa: B018  in training mode the estimate moves where the weight is computed
            estimate.train(False)

    def _normed(self) -> list[nn.Module]:
        return [module for module in self.modules() if is_parametrized(module, "weight")]

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[2:] != (self.size, self.size):
            images = F.interpolate(
                images, (self.size, self.size), mode="bilinear", align_corners=False
            )
        side = self.size // self.trunk.stride
        logits = [
            head(tokens[:, -(side**2) :].mT)
            for head, tokens in zip(self.heads, self._tokens(images))
        ]
        return torch.cat(logits, 1).unflatten(2, (side, side))

    def _tokens(self, images: Tensor) -> list[Tensor]:
        """(B, prefix + h * w, C) after each of `blocks`, and once more after the last, before the
        trunk's norm."""
        self._met.clear()
        self.trunk(images)
        met = dict(zip(self.asked, self._met))
        self._met.clear()
        return [*(met[block] for block in self.blocks), met[self.asked[-1]]]

    def _keep(
        self, layer: nn.Module, arguments: tuple, output: Tensor | tuple[Tensor, ...]
    ) -> None:
        self._met.append(output if isinstance(output, Tensor) else output[0])


class Head(nn.Module):
    """(B, C, N) tokens in raster order -> (B, 1, N): a pointwise and a residual circular
    convolution, spectral norm.

    Each channel of each image is normalised over its tokens, so that no image depends on its batch.
    """

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.enter, self.mix = _block(channels, 1), _block(channels, kernel)
        self.leave = spectral_norm(nn.Conv1d(channels, 1, 1))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.enter(tokens)
        return self.leave((x + self.mix(x)) / math.sqrt(2))


def _block(channels: int, kernel: int) -> nn.Sequential:
    # RAE's convolution has a bias, which the normalisation takes away again.
    convolution = nn.Conv1d(
        channels, channels, kernel, padding=kernel // 2, padding_mode="circular", bias=False
    )
    return nn.Sequential(
        spectral_norm(convolution), nn.GroupNorm(channels, channels, eps=1e-6), nn.LeakyReLU(0.2)
    )
