"""MaskGIT: masked tokens filled in a few parallel steps (Chang et al. 2022, arXiv:2202.04200)."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from priors.backbone import Backbone, check_settings, cross_entropy, evaluation
from priors.interface import Likelihood, SampleOptions
from priors.sampling import categorical, guided_labels, gumbel, shape_logits, uniform_noise
from priors.schedules import SCHEDULES, mean_share
from tokenizer.interface import CodeLayout
from training.distributed import mix
from training.loop import Loss

STRATA = 8  # mask counts per image in the likelihood bound


@dataclasses.dataclass(frozen=True)
class MaskedConfig:
    kind: str = "masked"
    dim: int = 128
    depth: int = 4
    heads: int = 4
    dropout: float = 0.1
    label_dropout: float = 0.1  # share of labels made unconditional, for guidance
    label_smoothing: float = 0.1
    schedule: str = "cosine"
    steps: int = 8
    choice_temperature: float = 4.5  # of the noise on confidences

    def __post_init__(self) -> None:
        check_settings(
            self.dim,
            self.depth,
            self.heads,
            dropout=self.dropout,
            label_dropout=self.label_dropout,
            label_smoothing=self.label_smoothing,
        )
        if self.schedule not in SCHEDULES:
            raise ValueError(f"prior.schedule={self.schedule!r} is not one of {', '.join(SCHEDULES)}")
        if self.steps < 1:
            raise ValueError(f"prior.steps={self.steps}: at least 1 is needed")

    def build(self, layout: CodeLayout, num_classes: int) -> MaskedPrior:
        backbone = Backbone(layout, num_classes, self.dim, self.depth, self.heads, False, self.dropout)
        return MaskedPrior(
            backbone,
            num_classes,
            self.label_dropout,
            self.label_smoothing,
            self.schedule,
            self.steps,
            self.choice_temperature,
        )


class MaskedPrior(nn.Module):
    """p(code i | known codes, label) for every masked i at once. -1 stands for the mask."""

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        label_dropout: float = 0.0,
        label_smoothing: float = 0.0,
        schedule: str = "cosine",
        steps: int = 8,
        choice_temperature: float = 4.5,
    ) -> None:
        super().__init__()
        self.backbone, self.layout, self.num_classes = backbone, backbone.layout, num_classes
        self.label_dropout, self.label_smoothing = label_dropout, label_smoothing
        self.schedule, self.steps, self.choice_temperature = SCHEDULES[schedule], steps, choice_temperature
        self.mean_share = mean_share(self.schedule)

    def loss(self, codes: Tensor, labels: Tensor, uniform: Tensor | None = None) -> Loss:
        """Cross-entropy of masked codes. (B, N), (B,) int64; `uniform` as in priors.interface.Prior.

        The sum is divided by the *expected* number of masked codes: each code weighs as in MaskGIT, and the
        mean over a batch does not depend on how the batch was split over processes.
        """
        length = self.layout.length
        if uniform is None:
            uniform = torch.rand(len(codes), length + 2, device=codes.device)
        labels = torch.where(uniform[:, 0] < self.label_dropout, self.num_classes, labels)
        num_masked = (self.schedule(uniform[:, 1]) * length).ceil().clamp(1, length)
        masked = _lowest(uniform[:, 2:], num_masked)
        logits = self.backbone(codes.masked_fill(masked, -1), labels)
        nats = cross_entropy(self.layout, logits, codes, self.label_smoothing)
        total = (nats * masked).sum() / (len(codes) * length * self.mean_share)
        with torch.no_grad():
            plain = cross_entropy(self.layout, logits, codes) if self.label_smoothing else nats
            per_masked = (plain * masked).sum() / masked.sum()
        return Loss(total, {"nats_per_masked_token": per_masked})

    def nll(self, codes: Tensor, labels: Tensor) -> Likelihood:
        """A bound: the mean over orders of the likelihood, E_k[(N / k) sum over k masked codes of -log p].

        k is uniform in 1..N, stratified; which codes are masked depends on the sequence alone, so batches do
        not matter. (MaskGIT's own loss weighs the terms otherwise and is no likelihood.)
        """
        length, nats = self.layout.length, torch.zeros(len(codes), dtype=torch.float64, device=codes.device)
        own = torch.tensor([mix(*row) for row in codes.tolist()], dtype=torch.int64, device=codes.device)
        with evaluation(self):
            for stratum in range(STRATA):
                drawn = uniform_noise(0, own, stratum, (length + 1,))
                num_masked = ((stratum + drawn[:, 0]) / STRATA * length).floor() + 1
                masked = _lowest(drawn[:, 1:], num_masked)
                logits = [level.double() for level in self.backbone(codes.masked_fill(masked, -1), labels)]
                total = (cross_entropy(self.layout, logits, codes) * masked).sum(1)
                nats += total * (length / num_masked) / STRATA
        return Likelihood(nats, "bound")

    def sample(self, labels: Tensor, options: SampleOptions, sample_ids: Tensor, known: Tensor | None = None) -> Tensor:
        """(B, N) int64. Each step draws all unknown codes and keeps those drawn with most confidence."""
        if known is None:
            known = torch.full((len(labels), self.layout.length), -1, device=labels.device)
        codes = known
        initially_unknown = (codes < 0).sum(1)
        conditions = guided_labels(labels, self.num_classes, options)
        copies = len(conditions) // max(1, len(labels))
        steps = options.steps or self.steps
        with evaluation(self):
            for step in range(steps):
                logits = self.backbone(codes.repeat(copies, 1), conditions)
                drawn, confidence = self._draw(logits, options, sample_ids, step)
                unknown = codes < 0
                codes = torch.where(unknown, drawn, codes)
                progress = (step + 1) / steps
                if step + 1 == steps:
                    break  # the result is what was drawn before the last re-masking
                stream = (step + 1) * (len(logits) + 1) - 1
                noise = gumbel(options.seed, sample_ids, stream, (self.layout.length,))
                confidence = confidence + self.choice_temperature * (1 - progress) * noise
                share = float(self.schedule(torch.tensor(progress, dtype=torch.float64)))
                num_masked = _num_remasked(initially_unknown, unknown.sum(1), share)
                least_confident = _lowest(confidence.masked_fill(~unknown, torch.inf), num_masked)
                codes = codes.masked_fill(least_confident, -1)
        return codes

    def _draw(
        self, logits: list[Tensor], options: SampleOptions, sample_ids: Tensor, step: int
    ) -> tuple[Tensor, Tensor]:
        """A code for every position and its log-probability, both (B, N)."""
        drawn, log_probabilities = [], []
        for level, raw in enumerate(logits):
            shaped = shape_logits(raw, options)
            stream = step * (len(logits) + 1) + level
            codes = categorical(shaped, gumbel(options.seed, sample_ids, stream, shaped.shape[1:]))
            drawn.append(codes)
            log_probabilities.append(shaped.log_softmax(-1).gather(-1, codes[..., None])[..., 0])
        return torch.cat(drawn, 1), torch.cat(log_probabilities, 1)


def _lowest(values: Tensor, counts: Tensor) -> Tensor:
    """(B, N) values and (B,) counts -> (B, N) bool, true at each row's `count` lowest values."""
    ranks = values.argsort(dim=1, stable=True).argsort(dim=1)
    return ranks < counts[:, None]


def _num_remasked(initially_unknown: Tensor, unknown: Tensor, share: float) -> Tensor:
    """Codes to mask again: a share of those unknown at first, fewer than now, at least one if any."""
    wanted = (initially_unknown * share).floor().long()
    return wanted.minimum(unknown - 1).clamp_min(1).minimum(unknown)
