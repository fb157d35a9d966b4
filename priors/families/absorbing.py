"""Absorbing diffusion: codes turn into masks (MDLM, arXiv:2406.07524; MD4, Shi et al. 2024,
arXiv:2406.04329).

A code is masked at time t with probability 1 - alpha(t). The network, which needs no time, predicts
the masked codes; the mask has no logit and known codes stay. Samplers differ only in *when* a code
is revealed or masked again, which does not depend on the codes: a sampler is a plan of moves, drawn
in advance.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from priors.backbone import BackboneConfig, check_settings, cross_entropy
from priors.decoding.parallel import Reading, reading
from priors.families.any_order_bound import order_agnostic_bound
from priors.families.autoregressive import choose_sampler
from priors.families.diffusion import draws, inverse_cdf, share_and_rate, step_noise
from priors.interface import Likelihood, SampleOptions
from priors.sampling.guidance import begin, shape_logits
from priors.sampling.noise import uniform_noise
from priors.sampling.schedules import SCHEDULES
from tokenizer.interface import CodeLayout
from training.loop import Loss


@dataclasses.dataclass(frozen=True)
class AbsorbingConfig:
    kind: str = "absorbing"
    backbone: BackboneConfig = dataclasses.field(default_factory=BackboneConfig)
    label_dropout: float = 0.1  # share of labels made unconditional, for guidance
    schedule: str = (
        "cosine"  # of the masked share, over the times of the loss and the steps of the samplers
    )
    steps: int = 32
    eta: float = 0.02  # most that the remasking sampler masks again in a step, as a share

    def __post_init__(self) -> None:
        check_settings(label_dropout=self.label_dropout)
        if self.schedule not in SCHEDULES:
            raise ValueError(
                f"prior.schedule={self.schedule!r} is not one of {', '.join(SCHEDULES)}"
            )
        if self.steps < 1:
            raise ValueError(f"prior.steps={self.steps}: at least 1 is needed")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"prior.eta={self.eta} must be in [0, 1]")

    def build(
        self, layout: CodeLayout, num_classes: int, given: CodeLayout | None = None
    ) -> AbsorbingPrior:
        backbone = self.backbone.build(layout, num_classes, causal=False, given=given)
        return AbsorbingPrior(
            backbone, num_classes, self.label_dropout, self.schedule, self.steps, self.eta
        )


class AbsorbingPrior(nn.Module):
    """p(code i | known codes, label) for every masked i at once. -1 stands for the mask."""

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        label_dropout: float = 0.0,
        schedule: str = "cosine",
        steps: int = 32,
        eta: float = 0.02,
    ) -> None:
        super().__init__()
        self.backbone, self.layout, self.num_classes = backbone, backbone.layout, num_classes
        self.label_dropout, self.schedule, self.steps, self.eta = (
            label_dropout,
            SCHEDULES[schedule],
            steps,
            eta,
        )

    def loss(
        self,
        codes: Tensor,
        labels: Tensor,
        uniform: Tensor | None = None,
        given: Tensor | None = None,
    ) -> Loss:
        """The bound per token, E_t[-alpha' / (1 - alpha) sum over masked of -log p] / N (MDLM, eq.
        10).

        (B, N), (B,) int64; `uniform` and `given` as in priors.interface.Prior.
        """
        uniform = draws(uniform, codes)
        labels = torch.where(uniform[:, 0] < self.label_dropout, self.num_classes, labels)
        share, rate = share_and_rate(self.schedule, uniform[:, 1])
        masked, chance = mask_some(uniform[:, 2:], share)
        logits = self.backbone(codes.masked_fill(masked, -1), labels, given=given)
        nats = (cross_entropy(self.layout, logits, codes) * masked).sum(1)
        bound = (nats * (chance * rate / share).to(nats.dtype)).mean() / self.layout.length
        return Loss(bound, {"nats_per_token_bound": bound.detach()})

    def nll(self, codes: Tensor, labels: Tensor, given: Tensor | None = None) -> Likelihood:
        """A bound, by the estimator of low variance in priors.families.any_order_bound; it is that of every
        schedule."""
        return order_agnostic_bound(self.backbone, codes, labels, given)

    def sample(
        self,
        labels: Tensor,
        options: SampleOptions,
        sample_ids: Tensor,
        known: Tensor | None = None,
        given: Tensor | None = None,
    ) -> Tensor:
        """(B, N) int64. Raises UserError unless options.sampler is one of SAMPLERS, the first by
        default.

        Guidance, temperature and filters shape p(code) and never the rate of unmasking. The network
        is asked only about the codes that are about to be revealed.
        """
        sampler = SAMPLERS[choose_sampler(options, tuple(SAMPLERS))]
        start = begin(self, labels, options, known, given)
        codes = start.known.clone()
        plan = sampler(self, options, sample_ids, codes < 0)
        read = reading(self.backbone, start.labels, start.given, start.copies)
        for move in plan:
            self._reveal(codes, move, read, options)
            if move.mask is not None:
                codes[move.mask] = -1
        return codes

    def _reveal(self, codes: Tensor, move: Move, read: Reading, options: SampleOptions) -> None:
        """Draw the codes of `move.reveal`, in place."""
        if not move.reveal.any():
            return
        logits = read(codes, move.reveal)
        for level, (span, _) in zip(logits, self.layout.spans()):
            reveal, noise = move.reveal[:, span], move.noise[:, span]
            probabilities = shape_logits(
                level, options, options.guidance_at(move.progress)
            ).softmax(-1)
            codes[:, span][reveal] = inverse_cdf(probabilities, noise[reveal])


def mask_some(uniform: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Masks of independent positions, given that one at least is masked, and the chance (B,) of
    that event.

    uniform (B, N) in [0, 1), share (B,) float64 -> (B, N) bool. Rows without a mask add nothing to
    the bound: leaving them out keeps its mean and holds the weight chance / share below N, at no
    matter how late a time. The lowest number of a row is moved to its quantile among those below
    `share`, the others above it alike.
    """
    length, visible = uniform.shape[1], 1 - uniform.double()
    highest = visible.amax(1)
    chance = -torch.expm1(length * torch.log1p(-share))
    moved = torch.exp(torch.log1p(-chance * (1 - highest**length)) / length)
    return visible * (moved / highest)[:, None] > 1 - share[:, None], chance


@dataclasses.dataclass
class Move:
    """One step of a sampler."""

    progress: float  # share of the sampling that is done after it
    reveal: Tensor  # (B, N) bool
    noise: Tensor  # (B, N) in (0, 1), the draw of each revealed code
    mask: Tensor | None = None  # (B, N) bool, to be masked again afterwards


def ancestral(
    prior: AbsorbingPrior, options: SampleOptions, ids: Tensor, unknown: Tensor
) -> Iterator[Move]:
    """Unmask with probability (alpha_s - alpha_t) / (1 - alpha_t) in each step from t to s (MDLM,
    eq. 7).

    The same as one number per position, revealed once the masked share falls to it.
    """
    steps = options.steps or prior.steps
    time, noise = uniform_noise(options.seed, ids, 0, (2, unknown.shape[1])).unbind(1)
    ascending = prior.schedule(_grid(steps))[1:-1].flip(0).to(time.device)
    step_of = len(ascending) - torch.searchsorted(ascending, time.contiguous(), right=True)
    for step in range(steps):
        yield Move((step + 1) / steps, unknown & (step_of == step), noise)


def first_hitting(
    prior: AbsorbingPrior, options: SampleOptions, ids: Tensor, unknown: Tensor
) -> Iterator[Move]:
    """One position after another in random order: exact (Zheng et al. 2024, arXiv:2409.02908).

    A network without time sees only the order of the hitting times. Fewer options.steps than
    unknown codes reveal several at once, in equal groups. The last is revealed in the last step.
    """
    steps = options.steps or unknown.shape[1]
    time, noise = uniform_noise(options.seed, ids, 0, (2, unknown.shape[1])).unbind(1)
    ranks = time.where(unknown, torch.inf).argsort(1).argsort(1)
    step_of = -(-(ranks + 1) * steps // unknown.sum(1, keepdim=True).clamp_min(1)) - 1
    for step in range(steps):
        yield Move((step + 1) / steps, unknown & (step_of == step), noise)


def remasking(
    prior: AbsorbingPrior, options: SampleOptions, ids: Tensor, unknown: Tensor
) -> Iterator[Move]:
    """Ancestral, but revealed codes may be masked again, and so corrected (ReMDM, arXiv:2503.00307,
    4.1, capped)."""
    steps = options.steps or prior.steps
    alphas = (1 - prior.schedule(_grid(steps))).tolist()
    masked = unknown
    for step, noise in enumerate(step_noise(options, ids, steps, (2, unknown.shape[1]))):
        now, after = alphas[step], alphas[step + 1]
        again = min(prior.eta, (1 - after) / now) if now > 0 else 0.0  # sigma
        reveal = masked & (noise[:, 0] < (after - (1 - again) * now) / (1 - now))
        mask = unknown & ~masked & (noise[:, 0] < again)
        yield Move((step + 1) / steps, reveal, noise[:, 1], mask)
        masked = masked & ~reveal | mask


SAMPLERS: dict[str, Callable[[AbsorbingPrior, SampleOptions, Tensor, Tensor], Iterator[Move]]] = {
    "ancestral": ancestral,
    "first_hitting": first_hitting,
    "remasking": remasking,
}


def _grid(steps: int) -> Tensor:
    """Progress before, between and after the steps, (steps + 1,) float64."""
    return torch.arange(steps + 1, dtype=torch.float64) / steps
