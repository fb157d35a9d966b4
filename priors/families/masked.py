"""MaskGIT: masked tokens filled in a few parallel steps (Chang et al. 2022, arXiv:2202.04200), the
most confident ones first, or in Halton order (Besnier et al. 2025, arXiv:2503.17076)."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import torch
from torch import Tensor, nn

from priors.backbone import BackboneConfig, check_settings, cross_entropy
from priors.decoding.parallel import Reading, reading
from priors.families.any_order_bound import lowest, order_agnostic_bound
from priors.families.autoregressive import choose_sampler
from priors.interface import Likelihood, SampleOptions
from priors.sampling.guidance import begin, shape_logits
from priors.sampling.halton import halton_turns, rolled
from priors.sampling.noise import categorical, chosen_gumbel, gumbel, uniform_noise
from priors.sampling.schedules import SCHEDULES, mean_share
from tokenizer.interface import CodeLayout
from training.loop import Loss

# With the schedules of their papers.
SAMPLERS = {"confidence": "cosine", "halton": "arc_cosine", "annealed": "arc_cosine"}


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
        network = self.backbone.build(layout, num_classes, causal=False, given=given)
        return MaskedPrior(network, num_classes, **self.settings())

    def settings(self) -> dict[str, Any]:
        """Of the prior, beside its network."""
        own = ("kind", "backbone")
        names = [each.name for each in dataclasses.fields(MaskedConfig) if each.name not in own]
        return {name: getattr(self, name) for name in names}


class MaskedPrior(nn.Module):
    """p(code i | known codes, label) for every masked i at once. -1 stands for the mask.

    Codes drawn in one step are drawn independently of each other: the fewer steps, the further from
    the law that the conditionals belong to. One code a step in an order that does not look at the
    codes draws from that law: "halton" with N steps does; "confidence" looks at the codes, and only
    without it (choice_temperature to infinity) would.
    """

    # What authors of published models do otherwise: see priors/families/published_masked.py.
    seen_weight = 0.0  # in the loss, of codes that are not masked
    guided_late = False  # a step's guidance is by the steps before it: the first has none
    redraws = False  # "halton" draws codes again in every later step, those that it began with not
    softmax_temperatures = (1.0, 1.0)  # of "annealed", at its start and at its end

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
        """Cross-entropy of masked codes, and of others where `seen_weight` is not 0. (B, N), (B,)
        int64; `uniform` as in priors.interface.Prior.

        The sum is divided by the *expected* weight of all codes: each code weighs as in MaskGIT,
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
        mean_weight = self.mean_share + self.seen_weight * (1 - self.mean_share)
        weights = torch.where(masked, 1.0, self.seen_weight)
        total = (nats * weights).sum() / (len(codes) * length * mean_weight)
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
        sample. "annealed" is MUSE-PyTorch's and TiTok's: draws, too, are under annealed noise, the
        last are the likeliest codes, and confidence is the code's logit. At temperature 0
        confidences are those of temperature 1, without noise: the seed then has no part in
        "confidence" and "annealed".
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
        redrawn = start.known < 0 if self.redraws and sampler == "halton" else None
        for step, share in enumerate(shares):
            done = (step + 1) / steps
            unknown = codes < 0 if redrawn is None else redrawn
            scale: float | Tensor = self._guidance(options, step, steps)
            if sampler == "halton":
                # A hole of fewer codes than steps is full earlier: its last step has s, too.
                scales = [self._guidance(options, step, own) for own in range(1, steps + 1)]
                scale = codes.new_tensor(scales, dtype=torch.float64)[
                    initially_unknown.clamp(1, steps) - 1, None
                ]
            stepwise, anneal, noise_scale = options, None, self.choice_temperature * (1 - done)
            if sampler == "annealed":
                stepwise, anneal = self._softened(options, done), noise_scale
                noise_scale *= stepwise.temperature  # for confidences that are not divided by it
            codes, confidence = self._draw(
                read, codes, unknown, stepwise, sample_ids, step * streams, scale, anneal
            )
            if step + 1 == steps:
                break  # the result is what was drawn before the last re-masking
            if sampler == "halton":
                num_masked = _num_waiting(initially_unknown, step, share)
                masked = lowest(-turns.masked_fill(~unknown, -torch.inf), num_masked)
            else:
                if options.temperature:
                    noise = gumbel(options.seed, sample_ids, (step + 1) * streams - 1, (length,))
                    confidence = confidence + (noise_scale * noise).nan_to_num()  # finite
                num_masked = _num_remasked(initially_unknown, unknown.sum(1), share)
                masked = lowest(confidence, num_masked)
            codes = codes.masked_fill(masked, -1)
        return codes

    def _guidance(self, options: SampleOptions, step: int, steps: int) -> float:
        """s of a step of so many."""
        return options.guidance_at(min(1.0, (step + (not self.guided_late)) / steps))

    def _softened(self, options: SampleOptions, done: float) -> SampleOptions:
        first, last = self.softmax_temperatures
        temperature = options.temperature * (first * (1 - done) + last * done)
        return dataclasses.replace(options, temperature=min(temperature, sys.float_info.max))

    def _draw(
        self,
        read: Reading,
        codes: Tensor,
        unknown: Tensor,
        options: SampleOptions,
        sample_ids: Tensor,
        stream: int,
        scale: float | Tensor,
        anneal: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Codes with the unknown ones, (B, N) bool, drawn, and log-probabilities of these, infinite
        at the others; both (B, N).

        `scale`: guidance of this step, or (B, 1) of each sample. `anneal`: temperature of the draws
        beside that of the options; what comes with codes then are their logits.
        """
        logits, codes = read(codes, unknown), codes.clone()
        untempered = dataclasses.replace(options, temperature=1.0, top_k=0, top_p=1.0)
        confidence = torch.full(codes.shape, torch.inf, dtype=torch.float64, device=codes.device)
        for level, (raw, (span, size)) in enumerate(zip(logits, self.layout.spans())):
            asked = unknown[:, span]
            own_scale = (
                scale.expand_as(asked)[asked][:, None] if isinstance(scale, Tensor) else scale
            )
            shaped = shape_logits(raw, options, own_scale)
            noise = chosen_gumbel(options.seed, sample_ids, stream + level, asked, size)
            drawn = categorical(shaped, noise if anneal is None else anneal * noise)
            codes[:, span][asked] = drawn
            if anneal is not None or not options.temperature:
                shaped = shape_logits(raw, untempered, own_scale)
            scores = shaped.gather(-1, drawn[:, None])[:, 0]
            confidence[:, span][asked] = scores - shaped.logsumexp(-1) if anneal is None else scores
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
