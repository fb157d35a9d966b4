"""ViT decoder in the style of MAE (He et al. 2021, arXiv:2111.06377), with RAE's parameter names.

decoder_embed, decoder_pos_embed, decoder_layers, decoder_norm, decoder_pred, trainable_cls_token:
so that decoders trained for RAE (Zheng et al. 2025, arXiv:2510.11690) load by name.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclasses.dataclass(frozen=True)
class Size:
    dim: int
    depth: int
    heads: int
    mlp: int

    def __post_init__(self) -> None:
        if min(self.dim, self.depth, self.heads, self.mlp) < 1:
            raise ValueError(
                "decoder: dim, depth, heads and mlp must be at least 1: "
                f"{dataclasses.astuple(self)}"
            )
        if self.dim % self.heads or self.dim % 4:
            raise ValueError(
                f"decoder.dim={self.dim} must divide by decoder.heads={self.heads} and by 4"
            )


PRESETS = {
    "B": Size(768, 12, 12, 3072),
    "L": Size(1024, 24, 16, 4096),
    "XL": Size(1152, 28, 16, 4096),
}


@dataclasses.dataclass(frozen=True)
class ViTDecoderConfig:
    """The size is a preset's, or one's own by `dim`, `depth`, `heads` and `mlp`; what neither says
    is B's."""

    kind: str = "vit"
    preset: str = ""  # B, L, XL (of RAE), or mirror: the encoder's own width, depth, heads and MLP
    dim: int | None = None
    depth: int | None = None
    heads: int | None = None
    mlp: int | None = None  # the width inside each MLP; 4 dim
    gradient_checkpointing: bool = False  # less memory in training, a third more time
    weights: str | None = (
        # a decoder trained for RAE, or diffusers' AutoencoderRAE: a file, or the folder of one
        None
    )

    def __post_init__(self) -> None:
        sizes = [
            name for name in ("dim", "depth", "heads", "mlp") if getattr(self, name) is not None
        ]
        if self.preset and self.preset != "mirror" and self.preset not in PRESETS:
            raise ValueError(
                f"decoder.preset={self.preset} is none of {', '.join(PRESETS)}, mirror"
            )
        if self.preset and sizes:
            raise ValueError(
                f"decoder.preset={self.preset} and decoder.{sizes[0]}={getattr(self, sizes[0])} "
                "both give the size: "
                "keep one of them"
            )
        if not self.preset:
            self._own_size()

    def build(
        self, in_channels: int, stride: int, grid: tuple[int, int], encoder: nn.Module
    ) -> ViTDecoder:
        """`encoder` matters to preset mirror only; ValueError when it is no transformer.

        The decoder's weights are random: `weights` are loaded by `pretrained.load_decoder`.
        """
        size = (
            mirrored(encoder)
            if self.preset == "mirror"
            else PRESETS.get(self.preset) or self._own_size()
        )
        return ViTDecoder(in_channels, stride, grid, size, self.gradient_checkpointing)

    def _own_size(self) -> Size:
        base = PRESETS["B"]
        dim = base.dim if self.dim is None else self.dim
        return Size(
            dim,
            base.depth if self.depth is None else self.depth,
            base.heads if self.heads is None else self.heads,
            4 * dim if self.mlp is None else self.mlp,
        )


def mirrored(encoder: nn.Module) -> Size:
    """The size that the transformers config of a pretrained encoder states. Raises ValueError where
    there is none."""
    config = getattr(getattr(encoder, "model", None), "config", None)
    try:
        mlp = getattr(config, "intermediate_size", None) or int(
            config.hidden_size * config.mlp_ratio
        )
        return Size(config.hidden_size, config.num_hidden_layers, config.num_attention_heads, mlp)
    except AttributeError:
        raise ValueError(
            "decoder.preset=mirror needs a vision transformer to mirror "
            "(encoder.kind=foundation): take B, L or XL"
        ) from None


class ViTDecoder(nn.Module):
    """(B, in_channels, h, w) -> (B, 3, stride * h, stride * w); other grids than `grid` get their
    own positions."""

    def __init__(
        self,
        in_channels: int,
        stride: int,
        grid: tuple[int, int],
        size: Size,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        dim = size.dim
        self.stride, self.grid, self.dim, self.heads = stride, grid, dim, size.heads
        self.gradient_checkpointing = gradient_checkpointing
        self.decoder_embed = nn.Linear(in_channels, dim)
        self.trainable_cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.register_buffer("decoder_pos_embed", sin_cos_positions(grid, dim))
        self.decoder_layers = nn.ModuleList(
            Layer(dim, size.heads, size.mlp) for _ in range(size.depth)
        )
        self.decoder_norm = nn.LayerNorm(dim, eps=1e-12)
        self.decoder_pred = nn.Linear(dim, stride * stride * 3)
        nn.init.normal_(self.trainable_cls_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight whose gradients balance the adversarial loss."""
        return self.decoder_pred.weight

    def forward(self, vectors: Tensor) -> Tensor:
        grid = (vectors.shape[2], vectors.shape[3])
        positions = (
            self.decoder_pos_embed
            if grid == self.grid
            else sin_cos_positions(grid, self.dim).to(vectors)
        )
        tokens = self.decoder_embed(rearrange(vectors, "b c h w -> b (h w) c"))
        x = (
            torch.cat([self.trainable_cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
            + positions
        )
        for layer in self.decoder_layers:
            again = self.gradient_checkpointing and torch.is_grad_enabled()
            x = checkpoint(layer, x, use_reentrant=False) if again else layer(x)
        patches = self.decoder_pred(self.decoder_norm(x))[:, 1:]
        return rearrange(
            patches,
            "b (h w) (p q c) -> b c (h p) (w q)",
            h=grid[0],
            w=grid[1],
            p=self.stride,
            q=self.stride,
        )


class Layer(nn.Module):
    """Pre-norm transformer layer, its parts named as in transformers' ViT."""

    def __init__(self, dim: int, heads: int, mlp: int) -> None:
        super().__init__()
        self.layernorm_before = nn.LayerNorm(dim, eps=1e-12)
        self.attention = nn.ModuleDict(
            {
                "attention": nn.ModuleDict(
                    {name: nn.Linear(dim, dim) for name in ("query", "key", "value")}
                ),
                "output": nn.ModuleDict({"dense": nn.Linear(dim, dim)}),
            }
        )
        self.layernorm_after = nn.LayerNorm(dim, eps=1e-12)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(dim, mlp)})
        self.output = nn.ModuleDict({"dense": nn.Linear(mlp, dim)})
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        normed = self.layernorm_before(x)
        parts = self.attention["attention"]
        query, key, value = (
            rearrange(parts[name](normed), "b n (h d) -> b h n d", h=self.heads)
            for name in ("query", "key", "value")
        )
        attended = rearrange(
            F.scaled_dot_product_attention(query, key, value), "b h n d -> b n (h d)"
        )
        x = x + self.attention["output"]["dense"](attended)
        return x + self.output["dense"](F.gelu(self.intermediate["dense"](self.layernorm_after(x))))


def sin_cos_positions(grid: tuple[int, int], dim: int) -> Tensor:
    """Fixed positions of MAE, (1, 1 + h w, dim): zeros for the class token, columns in the first
    half, rows after."""
    frequencies = 10000 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))

    def encode(places: Tensor) -> Tensor:
        angles = places.flatten()[:, None].double() * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    positions = torch.cat([encode(columns), encode(rows)], dim=1)
    return torch.cat([torch.zeros(1, dim), positions.float()])[None]
