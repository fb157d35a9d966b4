"""Masked priors as their authors publish them: Halton-MaskGIT (Besnier et al. 2025,
arXiv:2503.17076), the generators of TiTok (Yu et al. 2024, arXiv:2406.07550) and of MaskBit (Weber
et al. 2024, arXiv:2409.16211).

Each is priors.families.masked with a network of its own, and samples by its authors' recipe where nothing
else is asked for; guidance is of the options, which the import of a published file sets.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from priors.families.masked import MaskedConfig, MaskedPrior
from priors.interface import Likelihood, SampleOptions
from priors.networks.bert import MaskBitNetworkConfig, TiTokNetworkConfig, grouped
from priors.networks.halton_maskgit import HaltonNetworkConfig
from tokenizer.interface import CodeLayout
from training.loop import Loss


@dataclasses.dataclass(frozen=True)
class HaltonConfig(MaskedConfig):
    """32 steps in Halton order, with constant guidance."""

    kind: str = "halton_maskgit"
    schedule: str = "arc_cosine"
    sampler: str = "halton"
    steps: int = 32
    backbone: HaltonNetworkConfig = dataclasses.field(default_factory=HaltonNetworkConfig)

    def build(
        self, layout: CodeLayout, num_classes: int, given: CodeLayout | None = None
    ) -> HaltonPrior:
        network = self.backbone.build(layout, num_classes, given=given)
        return HaltonPrior(network, num_classes, **self.settings())


class HaltonPrior(MaskedPrior):
    """Codes are drawn again in every step after their turn, as its authors draw them, so codes that
    are seen are learned, too."""

    seen_weight, redraws = 1.0, True


@dataclasses.dataclass(frozen=True)
class TiTokConfig(MaskedConfig):
    """8 steps of the "annealed" sampler. Noise and guidance are those of L-32's generator, which
    are 9.5, and linear to 5.5."""

    kind: str = "titok"
    schedule: str = "arc_cosine"
    sampler: str = "annealed"
    steps: int = 8
    choice_temperature: float = 9.5
    backbone: TiTokNetworkConfig = dataclasses.field(default_factory=TiTokNetworkConfig)

    def build(
        self, layout: CodeLayout, num_classes: int, given: CodeLayout | None = None
    ) -> TiTokPrior:
        network = self.backbone.build(layout, num_classes, given=given)
        return TiTokPrior(network, num_classes, **self.settings())


class TiTokPrior(MaskedPrior):
    seen_weight, guided_late, softmax_temperatures = 0.1, True, (1.3, 0.5)


@dataclasses.dataclass(frozen=True)
class MaskBitConfig(MaskedConfig):
    """64 steps by confidence, of groups of bits. Noise is that of the generator of 14 bits; its
    guidance is by a cosine of power 3 to 8.1."""

    kind: str = "maskbit"
    schedule: str = "arc_cosine"
    sampling_schedule: str = "arc_cosine"
    steps: int = 64
    choice_temperature: float = 7.8
    backbone: MaskBitNetworkConfig = dataclasses.field(default_factory=MaskBitNetworkConfig)

    def build(
        self, layout: CodeLayout, num_classes: int, given: CodeLayout | None = None
    ) -> MaskBitPrior:
        network = self.backbone.build(layout, num_classes, given=given)
        return MaskBitPrior(layout, GroupsPrior(network, num_classes, **self.settings()))


class GroupsPrior(MaskedPrior):
    """Over groups of bits."""

    seen_weight, guided_late = 1.0, True


class MaskBitPrior(nn.Module):
    """p(groups of bits): a code is several groups, which are masked and drawn each by itself.

    Groups and codes are one to one, so likelihoods are the codes' own.
    """

    def __init__(self, layout: CodeLayout, groups: MaskedPrior) -> None:
        super().__init__()
        self.layout, self.groups, self.num_classes = layout, groups, groups.num_classes
        self.splits = groups.backbone.splits
        self.bits = groups.layout.num_codes[0].bit_length() - 1  # of a group
        assert groups.layout == grouped(layout, self.splits)

    def loss(
        self,
        codes: Tensor,
        labels: Tensor,
        uniform: Tensor | None = None,
        given: None = None,
    ) -> Loss:
        """Cross-entropy of all groups, masked or not. Arguments as in priors.interface.Prior."""
        if uniform is not None:
            positions = split_digits(uniform[:, 2:], self.splits)
            uniform = torch.cat([uniform[:, :2], *positions], 1)
        return self.groups.loss(self.split(codes), labels, uniform)

    def nll(self, codes: Tensor, labels: Tensor, given: None = None) -> Likelihood:
        """A bound: the mean over orders of groups."""
        return self.groups.nll(self.split(codes), labels)

    def sample(
        self,
        labels: Tensor,
        options: SampleOptions,
        sample_ids: Tensor,
        known: Tensor | None = None,
        given: None = None,
    ) -> Tensor:
        """(B, N) int64, as of priors.families.masked; steps are of groups."""
        known = None if known is None else self.split(known)
        return self.join(self.groups.sample(labels, options, sample_ids, known))

    def split(self, codes: Tensor) -> Tensor:
        """(B, N) codes, -1 where unknown -> (B, splits N), the lowest bits of all codes first."""
        size = 1 << self.bits
        groups = [(codes >> self.bits * number) % size for number in range(self.splits)]
        return torch.cat([group.masked_fill(codes < 0, -1) for group in groups], 1)

    def join(self, groups: Tensor) -> Tensor:
        """(B, splits N) -> (B, N)."""
        parts = groups.chunk(self.splits, 1)
        return sum(part << self.bits * number for number, part in enumerate(parts))


def split_digits(uniform: Tensor, parts: int) -> list[Tensor]:
    """Of numbers in [0, 1) so many that are independent, from the digits of each."""
    digits = round(-torch.tensor(torch.finfo(uniform.dtype).eps).log2().item()) + 1
    base, found = 2 ** (digits // parts), []
    for _ in range(parts):
        scaled = uniform * base
        found.append(scaled.floor() / base)
        uniform = scaled - scaled.floor()
    return found
