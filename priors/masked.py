"""MaskGIT: masked tokens filled in a few parallel steps (Chang et al. 2022, arXiv:2202.04200), the
most confident ones first, or in Halton order (Besnier et al. 2025, arXiv:2503.17076)."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from priors.autoregressive import choose_sampler
from priors.backbone import BackboneConfig, check_settings, cross_entropy
from priors.bounds import lowest, order_agnostic_bound
from priors.halton import halton_turns, rolled
from priors.interface import Likelihood, SampleOptions
from priors.parallel import Reading, reading
from priors.sampling import begin, categorical, chosen_gumbel, gumbel, shape_logits, uniform_noise
from priors.schedules import SCHEDULES, mean_share
from tokenizer.interface import CodeLayout
from training.loop import Loss

SAMPLERS = {"confidence": "cosine", "halton": "arc_cosine"}  # with the schedules of their papers


@dataclasses.dataclass(frozen=True)
class MaskedConfig:
    kind: str = "masked"
    label_dropout: float = 0.1  # share of labels made unconditional, for guidance
    label_smoothing: float = 0.1
    schedule: str = "cosine"  # of the masked share in training
    sampler: str = "confidence"  # or "halton", where sampling is asked for no other
    sampling_schedule: str = ""  # of the masked share in sampling; empty takes the sampler's own
    steps: int = 8
    choice_temperature: float = 4.5  # of the noise on confidences
    backbone: BackboneConfig = dataclasses.field(default_factory=BackboneConfig)

    def __post_init__(self) -> None:
        check_settings(label_dropout=self.label_dropout, label_smoothing=self.label_smoothing)
        for name, known in (
            ("schedule", SCHEDULES),
            ("sampling_schedule", ("", *SCHEDULES)),
            ("sampler", SAMPLERS),
        ):
            if getattr(self, name) not in known:
                listed = ", ".join(filter(None, known))
                raise ValueError(f"prior.{name}={getattr(self, name)!r} is not one of {listed}")
        if self.steps < 1:
            raise ValueError(f"prior.steps={self.steps}: at least 1 is needed")
        if not 0 <= self.choice_temperature < float("inf"):
            raise ValueError(
                f"prior.choice_temperature={self.choice_temperature} must be a number from 0"
            )

    def build(
        self, layout: CodeLayout, num_classes: int, given: CodeLayout | None = None
    ) -> MaskedPrior:
        return MaskedPrior(
            self.backbone.build(layout, num_classes, causal=False, given=given),
            num_classes,
            self.label_dropout,
            self.label_smoothing,
            self.schedule,
            self.sampler,
            self.sampling_schedule,
            self.steps,
            self.choice_temperature,
        )


class MaskedPrior(nn.Module):
    """p(code i | known codes, label) for every masked i at once. -1 stands for the mask.

    Codes drawn in one step are drawn independently of each other: the fewer steps, the further from
    the law that the conditionals belong to. One code a step in an order that does not look at the
    codes draws from that law: "halton" with N steps does; "confidence" looks at the codes, and only
    without it (choice_temperature to infinity) would.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        label_dropout: float = 0.0,
        label_smoothing: float = 0.0,
        schedule: str = "cosine",
        sampler: str = "confidence",
        sampling_schedule: str = "",
        steps: int = 8,
        choice_temperature: float = 4.5,
    ) -> None:
        super().__init__()
        self.backbone, self.layout, self.num_classes = backbone, backbone.layout, num_classes
        self.label_dropout, self.label_smoothing = label_dropout, label_smoothing
        self.schedule, self.mean_share = SCHEDULES[schedule], mean_share(SCHEDULES[schedule])
        self.sampler, self.sampling_schedule = sampler, sampling_schedule
        self.steps, self.choice_temperature = steps, choice_temperature
        self.register_buffer("halton_turns", halton_turns(self.layout), persistent=False)

    def loss(
        self,
        codes: Tensor,
        labels: Tensor,
        uniform: Tensor | None = None,
        given: Tensor | None = None,
    ) -> Loss:
        """Cross-entropy of masked codes. (B, N), (B,) int64; `uniform` as in
        priors.interface.Prior.

        The sum is divided by the *expected* number of masked codes: each code weighs as in MaskGIT,
        and the mean over a batch does not depend on how the batch was split over processes. It is
        no likelihood.
        """
        length = self.layout.length
        if uniform is None:
            uniform = torch.rand(len(codes), length + 2, device=codes.device)
        labels = torch.where(uniform[:, 0] < self.label_dropout, self.num_classes, labels)
        num_masked = (self.schedule(uniform[:, 1]) * length).ceil().clamp(1, length)
        masked = lowest(uniform[:, 2:], num_masked)
        logits = self.backbone(codes.masked_fill(masked, -1), labels, given=given)
        nats = cross_entropy(self.layout, logits, codes, self.label_smoothing)
        total = (nats * masked).sum() / (len(codes) * length * self.mean_share)
        with torch.no_grad():
            plain = cross_entropy(self.layout, logits, codes) if self.label_smoothing else nats
            per_masked = (plain * masked).sum() / masked.sum()
        return Loss(total, {"nats_per_masked_token": per_masked})

    def nll(self, codes: Tensor, labels: Tensor, given: Tensor | None = None) -> Likelihood:
        """A bound: the mean over orders of the likelihood."""
        return order_agnostic_bound(self.backbone, codes, labels, given)

    def sample(
        self,
        labels: Tensor,
        options: SampleOptions,
        sample_ids: Tensor,
        known: Tensor | None = None,
        given: Tensor | None = None,
    ) -> Tensor:
        """(B, N) int64. Each step draws all unknown codes and keeps some of them; N steps are the
        most.

        Samplers: "confidence" keeps those drawn with most confidence under annealed noise, "halton"
        those whose turn it is, level after level, in an order that starts somewhere else in each
        sample. At temperature 0 confidences are those of temperature 1, without noise: the seed
        then has no part in "confidence".
        """
        start, length = begin(self, labels, options, known, given), self.layout.length
        sampler = choose_sampler(options, (self.sampler, *SAMPLERS))
        steps = min(options.steps or self.steps, length)
        schedule = SCHEDULES[self.sampling_schedule or SAMPLERS[sampler]]
        shares = schedule(torch.arange(1, steps + 1, dtype=torch.float64) / steps).tolist()
        codes, initially_unknown = start.known, (start.known < 0).sum(1)
        streams = len(self.layout.grids) + 1  # of noise in each step
        if sampler == "halton":
            starts = uniform_noise(options.seed, sample_ids, steps * streams, (streams - 1,))
            turns = rolled(self.layout, self.halton_turns, starts).double()
        read = reading(self.backbone, start.labels, start.given, start.copies)
        for step, share in enumerate(shares):
            unknown = codes < 0
            scale: float | Tensor = options.guidance_at((step + 1) / steps)
            if (
                sampler == "halton"
            ):  # a hole of fewer codes than steps is full earlier: its last step has s too
                scales = [
                    options.guidance_at(min(1.0, (step + 1) / own)) for own in range(1, steps + 1)
                ]
                scale = codes.new_tensor(scales, dtype=torch.float64)[
                    initially_unknown.clamp(1, steps) - 1, None
                ]
            codes, confidence = self._draw(read, codes, options, sample_ids, step * streams, scale)
            if step + 1 == steps:
                break  # the result is what was drawn before the last re-masking
            if sampler == "halton":
                num_masked = _num_waiting(initially_unknown, step, share)
                masked = lowest(-turns.masked_fill(~unknown, -torch.inf), num_masked)
            else:
                if options.temperature:
                    noise = gumbel(options.seed, sample_ids, (step + 1) * streams - 1, (length,))
                    confidence = (
                        confidence + self.choice_temperature * (1 - (step + 1) / steps) * noise
                    )
                num_masked = _num_remasked(initially_unknown, unknown.sum(1), share)
                masked = lowest(confidence, num_masked)
            codes = codes.masked_fill(masked, -1)
        return codes

    def _draw(
        self,
        read: Reading,
        codes: Tensor,
        options: SampleOptions,
        sample_ids: Tensor,
        stream: int,
        scale: float | Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Codes with the unknown ones drawn, and log-probabilities of these, infinite at the
        others; both (B, N).

        `scale`: guidance of this step, or (B, 1) of each sample.
        """
        logits, codes = read(codes, codes < 0), codes.clone()
        untempered = dataclasses.replace(options, temperature=1.0, top_k=0, top_p=1.0)
        confidence = torch.full(codes.shape, torch.inf, dtype=torch.float64, device=codes.device)
        for level, (raw, (span, size)) in enumerate(zip(logits, self.layout.spans())):
            unknown = codes[:, span] < 0
            own_scale = (
                scale.expand_as(unknown)[unknown][:, None] if isinstance(scale, Tensor) else scale
            )
            shaped = shape_logits(raw, options, own_scale)
            drawn = categorical(
                shaped, chosen_gumbel(options.seed, sample_ids, stream + level, unknown, size)
            )
            codes[:, span][unknown] = drawn
            if not options.temperature:
                shaped = shape_logits(raw, untempered, own_scale)
            confidence[:, span][unknown] = shaped.gather(-1, drawn[:, None])[
                :, 0
            ] - shaped.logsumexp(-1)
        return codes, confidence


def _num_remasked(initially_unknown: Tensor, unknown: Tensor, share: float) -> Tensor:
    """Codes to mask again: a share of those unknown at first, fewer than now, at least one if
    any."""
    wanted = (initially_unknown * share).floor().long()
    return wanted.minimum(unknown - 1).clamp_min(1).minimum(unknown)


def _num_waiting(initially_unknown: Tensor, step: int, share: float) -> Tensor:
    """Codes whose turn comes after `step`: at most a share of those unknown at first, at most all
    but step + 1."""
    return (
        (initially_unknown * share).ceil().long().minimum(initially_unknown - step - 1).clamp_min(0)
    )
