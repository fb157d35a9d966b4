"""One prior per grid, coarse to fine: p(top) p(bottom | top) (VQ-VAE-2, Razavi et al. 2019,
arXiv:1906.00446, 3.2)."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from priors.families.absorbing import AbsorbingConfig
from priors.families.autoregressive import AutoregressiveConfig
from priors.families.masked import MaskedConfig
from priors.families.pixelcnn import PixelCNNConfig
from priors.families.uniform import UniformConfig
from priors.interface import Likelihood, SampleOptions
from tokenizer.interface import CodeLayout
from training.config import one_of
from training.errors import UserError
from training.loop import Loss
from training.randomness import mix

BOTTOM_STREAM = 0x424F54544F4D  # sets the bottom's noise apart from the top's of the same sample
FAMILIES = {
    "autoregressive": AutoregressiveConfig,
    "masked": MaskedConfig,
    "absorbing": AbsorbingConfig,
    "uniform": UniformConfig,
    "pixelcnn": PixelCNNConfig,
}


@dataclasses.dataclass(frozen=True)
class HierarchicalConfig:
    kind: str = "hierarchical"
    top: Any = one_of(FAMILIES, "autoregressive")
    bottom: Any = one_of(
        FAMILIES, "masked"
    )  # of any family too: it has several times the top's positions

    def build(
        self, layout: CodeLayout, num_classes: int, given: CodeLayout | None = None
    ) -> HierarchicalPrior:
        """Raises UserError unless the layout has two grids, and nothing coarser is given."""
        parts = grids_apart(layout)
        if len(parts) != 2 or given is not None:
            grids = ", ".join("x".join(map(str, part.grids[0])) for part in parts)
            raise UserError(
                f"prior.kind=hierarchical needs codes on a coarse grid and a fine one, as a vqvae2 tokenizer makes "
                f"them, and these lie on {grids}: choose another prior.kind"
            )
        top, bottom = parts
        return HierarchicalPrior(
            self.top.build(top, num_classes), self.bottom.build(bottom, num_classes, given=top)
        )


class HierarchicalPrior(nn.Module):
    """Two priors over one sequence: the top grid's codes, then the bottom grid's. They share no
    parameter.

    In training the bottom is given the true top codes, so that one run equals two separate ones.
    """

    def __init__(self, top: nn.Module, bottom: nn.Module) -> None:
        super().__init__()
        self.top, self.bottom, self.num_classes = top, bottom, top.num_classes
        grids, num_codes = (
            top.layout.grids + bottom.layout.grids,
            top.layout.num_codes + bottom.layout.num_codes,
        )
        self.layout = CodeLayout(grids, num_codes)

    def loss(
        self, codes: Tensor, labels: Tensor, uniform: Tensor | None = None, given: None = None
    ) -> Loss:
        """Both losses, weighted by their positions: per token of the whole. Arguments as in
        priors.interface.Prior."""
        if uniform is None:
            uniform = torch.rand(len(codes), self.layout.length + 2, device=codes.device)
        label_draw, time, positions = uniform.split([1, 1, self.layout.length], 1)
        top, bottom = self._split(codes)
        top_positions, bottom_positions = self._split(positions)
        # half a turn later: a sample whose top is almost hidden shows much of its bottom
        bottom_time = (time + 0.5) % 1
        first = self.top.loss(top, labels, torch.cat([label_draw, time, top_positions], 1))
        second = self.bottom.loss(
            bottom, labels, torch.cat([label_draw, bottom_time, bottom_positions], 1), given=top
        )
        share = self.top.layout.length / self.layout.length
        parts = {f"top_{name}": part for name, part in first.parts.items()}
        parts |= {f"bottom_{name}": part for name, part in second.parts.items()}
        return Loss(share * first.total + (1 - share) * second.total, parts)

    def update(self, step: int, taken: bool) -> None:
        """After each optimizer step, of the families that follow a schedule."""
        for part in (self.top, self.bottom):
            if hasattr(part, "update"):
                part.update(step, taken)

    def nll(self, codes: Tensor, labels: Tensor, given: None = None) -> Likelihood:
        """-log p(top) - log p(bottom | top): as exact as the less exact of the two."""
        top, bottom = self._split(codes)
        parts = self.top.nll(top, labels), self.bottom.nll(bottom, labels, given=top)
        kind = max((part.kind for part in parts), key=("exact", "bound", "none").index)
        return Likelihood(parts[0].nats + parts[1].nats, kind)

    def sample(
        self,
        labels: Tensor,
        options: SampleOptions,
        sample_ids: Tensor,
        known: Tensor | None = None,
        given: None = None,
    ) -> Tensor:
        """(B, N) int64: the top, then the bottom on it. `options.sampler` is TOP/BOTTOM, either may
        be empty.

        Unknown codes of the top follow its known ones, and those of the bottom all others: what is
        known of the bottom has no part in the top.

        Raises UserError, saying which of the two priors, where one of them cannot do what is asked.
        """
        samplers = options.sampler.split("/") if options.sampler else ["", ""]
        if len(samplers) != 2:
            raise UserError(
                f"sampler is {options.sampler!r}: of a hierarchical prior it is TOP/BOTTOM, such as /{samplers[0]}"
            )
        known_top, known_bottom = (None, None) if known is None else self._split(known)
        of_top = dataclasses.replace(options, sampler=samplers[0])
        of_bottom = dataclasses.replace(
            options, sampler=samplers[1], seed=mix(options.seed, BOTTOM_STREAM)
        )
        with _naming("top"):
            top = self.top.sample(labels, of_top, sample_ids, known_top)
        with _naming("bottom"):
            bottom = self.bottom.sample(labels, of_bottom, sample_ids, known_bottom, given=top)
        return torch.cat([top, bottom], 1)

    def _split(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N) of the whole -> those of the top and of the bottom."""
        top, bottom = values.split([self.top.layout.length, self.bottom.layout.length], 1)
        return top, bottom


def grids_apart(layout: CodeLayout) -> list[CodeLayout]:
    """The layout cut where the grid changes: the depths of a residual quantizer stay together."""
    groups = itertools.groupby(zip(layout.grids, layout.num_codes), key=lambda level: level[0])
    return [CodeLayout(*zip(*levels)) for _, levels in groups]


@contextlib.contextmanager
def _naming(level: str) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(f"the {level} grid's prior: {error}") from None
