"""The transformer under the priors: codes and a label to logits, through the blocks of priors.block.

A slot is the sum of a token and the place (level, row, column) of the position
that it predicts. Bidirectional: slot i holds the code at i, or the mask. Causal: slot i holds the
code of slot i - 1, the first holds the class; slots may come in any order, as each knows its target
(arXiv:2411.00776).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from priors.block import Block, rms_norm, run_block
from priors.decoding.engine import Decoding
from tokenizer.interface import CodeLayout
from training.errors import UserError
from training.randomness import Dropout

POSITIONS = ("rotary", "learned")
CONDITIONINGS = ("prefix", "adaln")
FREQUENCIES = 16  # of a time's embedding
ROTARY_BASE = 100.0  # of grids tens of codes wide, as in Heo et al. 2024, arXiv:2403.13298


@dataclasses.dataclass(frozen=True)
class BackboneConfig:
    """Sizes, and two choices.

    positions: "learned" adds places to slots; "rotary" besides turns queries and keys by row and
    column (Heo et al. 2024, arXiv:2403.13298). conditioning: "prefix" makes the class a first token
    and adds it to every slot; "adaln" has it set shift, scale and gate of every branch, zero at
    first (AdaLN-zero, Peebles & Xie 2022, arXiv:2212.09748), at 6 dim^2 weights a block more than
    the 13 dim^2 that it has.
    """

    dim: int = 128
    depth: int = 4
    heads: int = 4
    dropout: float = 0.1
    positions: str = "rotary"
    conditioning: str = "prefix"
    gradient_checkpointing: bool = (
        False  # each block runs again in backward: less memory, a third more time
    )

    def __post_init__(self) -> None:
        if min(self.dim, self.depth, self.heads) < 1 or self.dim % self.heads:
            raise ValueError(
                f"prior.backbone: dim={self.dim} must be a multiple of heads={self.heads}, and depth={self.depth} "
                "at least 1"
            )
        check_settings("prior.backbone", dropout=self.dropout)
        for name, known in (("positions", POSITIONS), ("conditioning", CONDITIONINGS)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"prior.backbone.{name}={getattr(self, name)!r} is not one of {', '.join(known)}"
                )
        if self.positions == "rotary" and self.dim // self.heads % 4:
            raise ValueError(
                f"prior.backbone: dim={self.dim} / heads={self.heads} must be a multiple of 4 for rotary positions"
            )

    def build(
        self,
        layout: CodeLayout,
        num_classes: int,
        *,
        causal: bool,
        given: CodeLayout | None = None,
        timed: bool = False,
    ) -> Backbone:
        return Backbone(
            layout,
            num_classes,
            self.dim,
            self.depth,
            self.heads,
            causal=causal,
            dropout=self.dropout,
            rotary=self.positions == "rotary",
            adaptive=self.conditioning == "adaln",
            timed=timed,
            given=given,
            gradient_checkpointing=self.gradient_checkpointing,
        )


class Backbone(nn.Module):
    """Codes and a label to logits per level. The mask and the classes have none, so they are never
    sampled.

    `given` is the layout of codes that are known completely: they stand before the slots as a
    context. Grids of different sizes share coordinates, in units of the finest. `timed`: the time
    of a diffusion sets shift, scale and gate of every branch, alone or, where `adaptive` has the
    class do so, with it.
    """

    def __init__(
        self,
        layout: CodeLayout,
        num_classes: int,
        dim: int,
        depth: int,
        heads: int,
        *,
        causal: bool,
        dropout: float,
        rotary: bool,
        adaptive: bool,
        timed: bool,
        given: CodeLayout | None,
        gradient_checkpointing: bool,
    ) -> None:
        super().__init__()
        self.layout, self.num_classes, self.given = layout, num_classes, given
        self.causal, self.rotary, self.adaptive, self.timed = causal, rotary, adaptive, timed
        self.gradient_checkpointing = gradient_checkpointing
        whole = (
            layout
            if given is None
            else CodeLayout(layout.grids + given.grids, layout.num_codes + given.num_codes)
        )
        self.levels = [
            level for level, length in enumerate(layout.lengths) for _ in range(length)
        ]  # of each slot
        self.mask_id = sum(whole.num_codes)
        place_ids = _place_ids(whole)
        num_places = int(place_ids.max()) + 1

        self.tokens = nn.Embedding(self.mask_id + 1, dim)
        self.classes = nn.Embedding(num_classes + 1, dim)  # the last is unconditional
        self.places = nn.Embedding(num_places, dim)  # of what a slot predicts
        # Rotated keys tell where the code that a causal slot holds comes from; else a slot has this
        # in its sum.
        self.sources = nn.Embedding(num_places, dim) if causal and not rotary else None
        # A time alone says little: a narrow condition does, as in Duo (128 for 768), at 1.5 dim^2
        # weights a block.
        width = dim if adaptive else dim // 4 if timed else 0
        self.time = TimeEmbedding(width) if timed else None
        self.dropout = Dropout(dropout)
        self.blocks = nn.ModuleList(Block(dim, heads, causal, dropout, width) for _ in range(depth))
        self.norm = rms_norm(dim)
        self.modulation = nn.Linear(width, 2 * dim) if width else None
        self.heads = nn.ModuleList(nn.Linear(dim, size) for size in layout.num_codes)

        share = 1 / (
            2 + (not adaptive) + (self.sources is not None)
        )  # of each term in a slot's unit variance
        for embedding, terms in (
            (self.tokens, 1),
            (self.classes, 1),
            (self.places, 3),
            (self.sources, 3),
        ):
            if embedding is not None:
                nn.init.normal_(embedding.weight, std=(share / terms) ** 0.5)
        for linear in (*self.heads, *([self.modulation] if width else [])):
            nn.init.zeros_(linear.weight)  # every code is as likely as any other before training
            nn.init.zeros_(linear.bias)
        self.register_buffer("place_ids", place_ids, persistent=False)
        self.register_buffer("token_starts", token_starts(whole), persistent=False)
        self.register_buffer(
            "angles", _angles(whole, dim // heads) if rotary else None, persistent=False
        )
        self.register_load_state_dict_pre_hook(_check_time)

    def forward(
        self,
        codes: Tensor,
        labels: Tensor,
        *,
        order: Tensor | None = None,
        given: Tensor | None = None,
        time: Tensor | None = None,
    ) -> list[Tensor]:
        """(B, N) int64 codes, negative where masked, and (B,) labels -> (B, n, num_codes) float32
        per level.

        `order` (B, N) int64, of a causal backbone: the position of each slot, permuted within
        levels; slot i sees the codes of the slots before it. Logits are in the order of positions
        all the same. `given` (B, M) int64. `time` (B,) in [0, 1], of a timed one.
        """
        assert order is None or self.causal, "only a causal backbone has an order"
        tokens = self.embed(
            codes if order is None else codes.gather(1, order), slice(0, self.layout.length)
        )
        if self.causal:
            tokens = torch.cat([self.classes(labels)[:, None], tokens[:, :-1]], 1)
        context, context_angles = self.context(labels, given)
        places, queries, keys = self.slots(order)
        if not self.adaptive:
            places = places + self.classes(labels)[:, None]
        angles = None
        if self.rotary:
            angles = [
                torch.cat([context_angles.expand(len(own), -1, -1), own], 1)
                for own in (queries, keys)
            ]
        condition = self.condition(labels, time)
        features = self.dropout(torch.cat([context, tokens + places], 1))
        for block in self.blocks:
            features = run_block(block, self.gradient_checkpointing, features, condition, angles)
        features = self.norm(features[:, context.shape[1] :])
        if condition is not None:
            shift, scale = self.modulation(condition).chunk(2, -1)
            features = features * (1 + scale) + shift
        if order is not None:
            features = features.gather(1, order.argsort(1)[..., None].expand_as(features))
        return [
            head(features[:, span]).float()
            for head, (span, _) in zip(self.heads, self.layout.spans())
        ]

    def decoding(
        self, labels: Tensor, *, order: Tensor | None = None, given: Tensor | None = None
    ) -> Decoding:
        """The same logits slot by slot from cached keys and values, without dropout; of a causal
        backbone."""
        return Decoding(self, labels, order=order, given=given)

    def embed(self, codes: Tensor, span: slice) -> Tensor:
        """Codes of the slots in `span`, in any order within levels, or of the given positions
        behind all slots."""
        return self.tokens(torch.where(codes < 0, self.mask_id, codes + self.token_starts[span]))

    def slots(self, order: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Places that slots add to tokens, (1 or B, N, dim); angles (1 or B, N, dim_head) of
        queries and of keys.

        A query is turned to the position that its slot predicts, a key to that of the code that its
        slot holds.
        """
        positions = (
            torch.arange(self.layout.length, device=self.place_ids.device)[None]
            if order is None
            else order
        )
        ids = self.place_ids[positions]
        places = self.places(ids).sum(-2)
        if self.sources is not None:
            places = places + _one_slot_later(self.sources(ids).sum(-2))
        if not self.rotary:
            return places, None, None
        angles = self.angles[positions]
        return places, angles, _one_slot_later(angles) if self.causal else angles

    def context(self, labels: Tensor, given: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What stands before the slots, (B, C, dim) and (1, C, dim_head): a class token unless
        causal, given codes."""
        assert (given is None) == (self.given is None), (
            "given codes are for a backbone built for their layout"
        )
        classes, span = self.classes(labels)[:, None], slice(self.layout.length, None)
        parts, angles = [classes[:, :0]], self.angles[None, :0] if self.rotary else None
        if not self.causal and not self.adaptive:
            parts.append(classes)
            angles = F.pad(angles, (0, 0, 0, 1)) if self.rotary else None
        if given is not None:
            tokens = self.embed(given, span) + self.places(self.place_ids[span]).sum(-2)
            parts.append(tokens if self.adaptive else tokens + classes)
            angles = torch.cat([angles, self.angles[None, span]], 1) if self.rotary else None
        return torch.cat(parts, 1), angles

    def condition(self, labels: Tensor, time: Tensor | None = None) -> Tensor | None:
        """(B, 1, width), what sets the modulations, if there are any: the class, the time, or their
        sum."""
        assert (time is not None) == self.timed, "a time is for a backbone built for it"
        parts = [self.classes(labels)] if self.adaptive else []
        parts += [] if self.time is None else [self.time(time)]
        return F.silu(sum(parts))[:, None] if parts else None


class TimeEmbedding(nn.Module):
    """Times (B,) in [0, 1] to (B, width): sines and cosines of log(t / (1 - t)), the noise's odds,
    through two layers.

    By the logarithm the last steps of sampling, where what a code is worth changes fastest, are as
    far apart as others.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2 * FREQUENCIES, width), nn.Linear(width, width)
        frequencies = 2 ** torch.linspace(
            -5, 2, FREQUENCIES
        )  # radians; the slowest has a tenth of a turn in all
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, time: Tensor) -> Tensor:
        odds = torch.logit(time.double(), eps=1e-4).to(self.frequencies.dtype)
        angles = odds[:, None] * self.frequencies
        return self.second(F.silu(self.first(torch.cat([angles.sin(), angles.cos()], 1))))


def cross_entropy(
    layout: CodeLayout, logits: list[Tensor], codes: Tensor, label_smoothing: float = 0.0
) -> Tensor:
    """-log p of every code, (B, N) nats in the logits' precision; `logits`: (B, n, num_codes) per
    level."""
    levels = []
    for level, (span, _) in zip(logits, layout.spans()):
        target = codes[:, span]
        nats = F.cross_entropy(
            level.flatten(0, 1), target.flatten(), reduction="none", label_smoothing=label_smoothing
        )
        levels.append(nats.view_as(target))
    return torch.cat(levels, 1)


def token_starts(layout: CodeLayout) -> Tensor:
    """(N,) int64: where a position's codes begin in a table of the codes of all levels."""
    sizes = torch.tensor([0, *layout.num_codes]).cumsum(0)[:-1]
    return sizes.repeat_interleave(torch.tensor(layout.lengths))


def check_settings(section: str = "prior", **shares: float) -> None:
    """Raise ValueError for shares outside [0, 1)."""
    for name, share in shares.items():
        if not 0 <= share < 1:
            raise ValueError(f"{section}.{name}={share} must be in [0, 1)")


@contextlib.contextmanager
def evaluation(module: nn.Module) -> Iterator[None]:
    """Without gradients and dropout inside the block; the module's mode is put back after it."""
    training = module.training
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train(training)


def _check_time(module: Backbone, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Raise UserError where weights were trained with time and the module has none, or the other
    way round."""
    if prefix + "tokens.weight" in state:
        stored = any(name.startswith(prefix + "time.") for name in state)
        if stored != module.timed:
            raise UserError(
                f"prior.time_conditioning={str(module.timed).lower()}, but these weights were trained with "
                f"{str(stored).lower()}: set that in their config.yaml, or train with --fresh (make: FRESH=1)"
            )


def _one_slot_later(values: Tensor) -> Tensor:
    """(B, N, d): what the slot before had, and zeros first, where a causal slot holds the class."""
    return F.pad(values[:, :-1], (0, 0, 1, 0))


def _flat_grids(layout: CodeLayout) -> list[tuple[int, int]]:
    """Rows and columns per level. A grid that is not two-dimensional counts its last axis as
    columns."""
    return [(math.prod(grid[:-1]), grid[-1]) for grid in layout.grids]


def _place_ids(layout: CodeLayout) -> Tensor:
    """(N, 3) int64: rows of the embedding table for the level, row and column of each position, all
    distinct."""
    parts, start = [], 0
    for rows, columns in _flat_grids(layout):
        index = torch.arange(rows * columns)
        row, column = start + 1 + index // columns, start + 1 + rows + index % columns
        parts.append(torch.stack([torch.full_like(index, start), row, column], 1))
        start += 1 + rows + columns
    return torch.cat(parts)


def _angles(layout: CodeLayout, dim_head: int) -> Tensor:
    """(N, dim_head) radians: the first half of a head turns with the row, the second with the
    column.

    Rows and columns are the centres of the codes in units of the finest grid. Neighbours in a head
    share an angle.
    """
    grids = _flat_grids(layout)
    finest = [max(sides) for sides in zip(*grids)]
    frequencies = ROTARY_BASE ** -(torch.arange(0, dim_head // 2, 2) / (dim_head // 2))
    parts = []
    for grid in grids:
        axes = [
            (torch.arange(side) + 0.5) * (finest[axis] / side) - 0.5
            for axis, side in enumerate(grid)
        ]
        centres = torch.cartesian_prod(*axes)  # (n, 2) in raster order
        parts.append(rearrange(centres[..., None] * frequencies, "n s f -> n (s f)"))
    return torch.cat(parts).repeat_interleave(2, dim=1)
