"""Uniform-state diffusion (UDLM, arXiv:2412.10193; Duo, arXiv:2506.10892) and the hybrid with masks
(GIDD, von Ruette et al. 2025, arXiv:2503.04482; or D3PM's mixture, arXiv:2107.03006, as in
VQ-Diffusion, arXiv:2111.14822).

A code turns into noise as priors.families.noising says: q(z | x) = alpha [z = x] + n(z).

The loss fixes what the logits of position i mean. "leave_one_out": p(x_i | z without z_i), as the
bounds of Duo and GIDD want it. "posterior": p(x_i | z), as cross-entropy wants it. The two differ
by the factor q(z_i | x_i), so each has a tight bound and a right sampler, and is badly off under
the other's. Both depend on the time.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from priors.backbone import BackboneConfig, check_settings, cross_entropy, evaluation
from priors.decoding.parallel import reading
from priors.families.any_order_bound import own_noise
from priors.families.autoregressive import choose_sampler
from priors.families.diffusion import draws, inverse_cdf, share_and_rate, step_noise
from priors.families.noising import (
    Level,
    Noise,
    bound_rate,
    corrupt,
    gidd,
    guide_transition,
    mixture,
    transition,
)
from priors.interface import Likelihood, SampleOptions
from priors.sampling.guidance import begin, shape_branches, shape_logits
from priors.sampling.schedules import SCHEDULES
from tokenizer.interface import CodeLayout
from training.errors import UserError
from training.loop import Loss

# parameterisation -> its sampler: q with the network plugged in for x, or the mixture over p(x | z)
SAMPLERS = {"leave_one_out": "plug_in", "posterior": "mixture"}
HYBRIDS: dict[str, Callable[[float], Noise]] = {"mixture": mixture, "gidd": gidd}
Network = Callable[
    [Tensor, Tensor], list[Tensor]
]  # codes and times (B,) to logits (copies B, n, num_codes) per level
MEANINGS = [(noise, logits) for noise in HYBRIDS for logits in SAMPLERS]  # of weights, by number
LATEST = (
    1 - 1e-3
)  # progress: here the bound stops, as its weight goes to infinity, and the codes are read off z
RECONSTRUCTED = 1 / 32  # share of a loss's samples that are read off
STRATA = 16  # times per sequence in the likelihood bound


@dataclasses.dataclass(frozen=True)
class UniformConfig:
    kind: str = "uniform"
    backbone: BackboneConfig = dataclasses.field(default_factory=BackboneConfig)
    label_dropout: float = 0.1  # share of labels made unconditional, for guidance
    time_conditioning: bool = True  # of the backbone, by AdaLN: the best logits depend on the time
    mask_share: float = 0.0  # of the noise; above 0 makes the hybrid
    # of the hybrid: codes as noise vanish at both ends, or "mixture": in constant proportion
    noise: str = "gidd"
    parameterisation: str = "leave_one_out"  # or "posterior"
    cross_entropy: float = 0.0  # its share in the loss, the bound has the rest; of "posterior" only
    schedule: str = (
        "linear"  # of the noised share, over the times of the loss and the steps of the sampler
    )
    steps: int = 64

    def __post_init__(self) -> None:
        check_settings(label_dropout=self.label_dropout, mask_share=self.mask_share)
        for name, known in (
            ("parameterisation", SAMPLERS),
            ("schedule", SCHEDULES),
            ("noise", HYBRIDS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"prior.{name}={getattr(self, name)!r} is not one of {', '.join(known)}"
                )
        if not 0 <= self.cross_entropy <= 1:
            raise ValueError(f"prior.cross_entropy={self.cross_entropy} must be in [0, 1]")
        if self.cross_entropy and self.parameterisation != "posterior":
            raise ValueError(
                f"prior.cross_entropy={self.cross_entropy} trains a posterior: set prior.parameterisation=posterior"
            )
        if self.steps < 1:
            raise ValueError(f"prior.steps={self.steps}: at least 1 is needed")

    def build(
        self, layout: CodeLayout, num_classes: int, given: CodeLayout | None = None
    ) -> UniformPrior:
        return UniformPrior(
            self.backbone.build(
                layout, num_classes, causal=False, given=given, timed=self.time_conditioning
            ),
            num_classes,
            label_dropout=self.label_dropout,
            mask_share=self.mask_share,
            noise=self.noise,
            parameterisation=self.parameterisation,
            cross_entropy=self.cross_entropy,
            schedule=self.schedule,
            steps=self.steps,
        )


class Estimate(NamedTuple):
    """Of sequences noised to a time each."""

    logits: list[Tensor]  # (B, n, num_codes) per level
    rate: Tensor  # (B,) float64, the bound's integrand over progress
    lost: Tensor  # (B,) float64, -log p(x | z)


class UniformPrior(nn.Module):
    """All codes change all the time. -1 stands for the mask of the hybrid.

    A backbone that is `timed` has `time` (B,) in its forward, t of priors.families.noising: 0 where codes
    are clean, 1 where all is noise.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        label_dropout: float = 0.0,
        mask_share: float = 0.0,
        noise: str = "gidd",
        parameterisation: str = "leave_one_out",
        cross_entropy: float = 0.0,
        schedule: str = "linear",
        steps: int = 64,
    ) -> None:
        super().__init__()
        self.backbone, self.layout, self.num_classes = backbone, backbone.layout, num_classes
        self.label_dropout, self.parameterisation = label_dropout, parameterisation
        self.noise_name = noise if mask_share else "mixture"
        self.noise = HYBRIDS[self.noise_name](mask_share)
        self.cross_entropy, self.schedule, self.steps = cross_entropy, SCHEDULES[schedule], steps
        num_codes = torch.tensor(self.layout.num_codes).repeat_interleave(
            torch.tensor(self.layout.lengths)
        )
        self.register_buffer("num_codes", num_codes, persistent=False)  # (N,)
        meaning = MEANINGS.index((self.noise_name, parameterisation))
        self.register_buffer("meaning", torch.tensor(meaning))  # stays with the weights
        self.register_load_state_dict_pre_hook(_check_meaning)

    def loss(
        self,
        codes: Tensor,
        labels: Tensor,
        uniform: Tensor | None = None,
        given: Tensor | None = None,
    ) -> Loss:
        """The bound per token, mixed with cross-entropy. Arguments as in priors.interface.Prior.

        Most samples estimate its integral over time; a share of them what is lost in reading the
        codes off z.
        """
        uniform = draws(uniform, codes)
        labels = torch.where(uniform[:, 0] < self.label_dropout, self.num_classes, labels)
        place, noised = uniform[:, 1].double(), 1 - RECONSTRUCTED
        progress, weight = spread((place / noised).clamp_max(1))
        weight = torch.where(place < noised, weight / noised, 0)
        found = self._estimate(
            functools.partial(self._predict, labels, given),
            codes,
            progress,
            uniform[:, 2:].double(),
        )
        nats = torch.where(place < noised, found.rate * weight, found.lost / RECONSTRUCTED)
        total = nats.mean() / self.layout.length
        parts = {"nats_per_token_bound": total.detach()}
        if self.cross_entropy:
            plain = (cross_entropy(self.layout, found.logits, codes).mean(1) * weight).mean()
            parts["cross_entropy"] = plain.detach()
            total = torch.lerp(total, plain, self.cross_entropy)
        return Loss(total.float(), parts)

    def nll(self, codes: Tensor, labels: Tensor, given: Tensor | None = None) -> Likelihood:
        """The bound: its integrand at STRATA times per sequence, spread evenly, and -log p(x | z)
        at LATEST.

        The noise depends on the sequence alone.
        """
        noise = own_noise(codes, (STRATA + 1, self.layout.length + 1))
        nats = torch.zeros(len(codes), dtype=torch.float64, device=codes.device)
        with evaluation(self):
            network = self._network(labels, given)
            for stratum in range(STRATA):
                progress, weight = spread((stratum + noise[:, stratum, 0]) / STRATA)
                nats += (
                    self._estimate(network, codes, progress, noise[:, stratum, 1:]).rate
                    * weight
                    / STRATA
                )
            last = torch.full_like(nats, LATEST)
            nats += self._estimate(network, codes, last, noise[:, STRATA, 1:]).lost
        return Likelihood(nats, "bound")

    def sample(
        self,
        labels: Tensor,
        options: SampleOptions,
        sample_ids: Tensor,
        known: Tensor | None = None,
        given: Tensor | None = None,
    ) -> Tensor:
        """(B, N) int64. Each step draws z_s from q(z_s | z_t), of p(x | z_t) shaped by temperature
        and filters.

        Guidance mixes log q(z_s | z_t), as priors.families.noising says.

        Known codes are noised anew to the time of each step. That tells the others less than the
        codes do, so as many steps of Gibbs sampling among clean codes follow. Raises UserError for
        a sampler that is not the parameterisation's.
        """
        self._check_sampler(options)
        start = begin(self, labels, options, known, given)
        known = start.known
        steps, noisy, holds = options.steps or self.steps, known, bool((known >= 0).any())
        times = self.schedule(
            torch.arange(steps + 1, dtype=torch.float64, device=labels.device) / steps
        )
        times = times.clamp(0, 1)
        levels = list(map(self.noise.at, times))
        noises = step_noise(options, sample_ids, 2 * steps + 1, (2, self.layout.length))
        with evaluation(self):
            network = self._network(start.labels, start.given, start.copies)
            for step, noise in zip(range(steps), noises):
                choice, held = noise.unbind(1)
                now, later = levels[step], levels[step + 1]
                if step == 0 or holds:
                    held = corrupt(known, held, now, self.num_codes)
                    noisy = held if step == 0 else torch.where(known < 0, noisy, held)
                logits = self._at(network, noisy, times[step])
                scale = options.guidance_at((step + 1) / steps)
                noisy = self._draw(
                    self._transitions(logits, noisy, now, later, options, scale), choice
                )
            codes = torch.where(known < 0, noisy, known)
            return self._settle(network, codes, known, options, noises) if holds else codes

    def _settle(
        self,
        network: Network,
        codes: Tensor,
        known: Tensor,
        options: SampleOptions,
        noises: Iterator[Tensor],
    ) -> Tensor:
        """Unknown codes drawn anew from p(x_i | the others), in turns of a random order, each once
        or more.

        Samples of which nothing is known stay as they are.
        """
        holes = (known < 0) & (known >= 0).any(1, keepdim=True)
        num_holes = holes.sum(1, keepdim=True).clamp_min(1)
        time = self.schedule(torch.tensor(LATEST, dtype=torch.float64, device=codes.device))
        size = -(-num_holes // (options.steps or self.steps))
        order = next(noises)[:, 0]
        ranks = order.where(holes, torch.inf).argsort(1).argsort(1)
        for step, noise in enumerate(noises):
            logits = self._at(network, codes, time)
            if self.parameterisation == "posterior":
                logits = self._times_likelihood(logits, codes, self.noise.at(time), -1)
            logits = [shape_logits(level, options, options.guidance) for level in logits]
            turn = holes & ((ranks - step * size) % num_holes < size)
            drawn = self._draw([level.softmax(-1) for level in logits], noise[:, 0])
            codes = torch.where(turn, drawn, codes)
        return codes

    def _estimate(
        self, network: Network, codes: Tensor, progress: Tensor, uniform: Tensor
    ) -> Estimate:
        """Of codes noised to the time of `progress` (B,)."""
        time, rate = (value[:, None] for value in share_and_rate(self.schedule, progress))
        time = time.clamp_max(1 - 1e-8)
        level, speed = self.noise.at(time), rate / (time * (1 - time))
        noisy = corrupt(codes, uniform, level, self.num_codes)
        logits = network(noisy, time[:, 0])
        evidence = [each.double() for each in logits]
        if self.parameterisation == "leave_one_out":
            evidence = self._times_likelihood(evidence, noisy, level)
        rates = [
            bound_rate(
                each.softmax(-1), codes[:, span], noisy[:, span], level, speed, self.noise.power
            ).sum(1)
            for each, (span, _) in zip(evidence, self.layout.spans())
        ]
        lost = cross_entropy(self.layout, evidence, codes).sum(1)
        return Estimate(logits, torch.stack(rates).sum(0), lost)

    def _predict(
        self, labels: Tensor, given: Tensor | None, codes: Tensor, time: Tensor
    ) -> list[Tensor]:
        if self.backbone.timed:
            return self.backbone(codes, labels, given=given, time=time)
        return self.backbone(codes, labels, given=given)

    def _network(self, labels: Tensor, given: Tensor | None, copies: int = 1) -> Network:
        """Without gradients, for labels (copies B,) and given (copies B, M)."""
        read, timed = reading(self.backbone, labels, given, copies), self.backbone.timed
        return lambda codes, time: read(codes, time=time if timed else None)

    def _at(self, network: Network, codes: Tensor, time: Tensor) -> list[Tensor]:
        """Logits at one time, float64."""
        return [level.double() for level in network(codes, time.expand(len(codes)))]

    def _transitions(
        self,
        logits: list[Tensor],
        noisy: Tensor,
        now: Level,
        later: Level,
        options: SampleOptions,
        scale: float,
    ) -> list[Tensor]:
        """q(z_s | z_t) per level, (B, n, num_codes + 1), from logits of one or both branches of
        guidance."""
        copies = 1 if options.guidance == 1 else 2
        logits = [shape_branches(level, options, scale) for level in logits]
        if self.parameterisation == "leave_one_out":
            logits = self._times_likelihood(logits, noisy, now)
        levels = []
        for level, (span, _) in zip(logits, self.layout.spans()):
            found = transition(level.log_softmax(-1), noisy[:, span].repeat(copies, 1), now, later)
            levels.append(
                (found if copies == 1 else guide_transition(found, noisy[:, span], scale)).exp()
            )
        return levels

    def _times_likelihood(
        self, logits: list[Tensor], noisy: Tensor, level: Level, power: int = 1
    ) -> list[Tensor]:
        """log of exp(logits) q(z | x)^power: from leave-one-out to posterior, or with -1 from
        posterior back.

        Of q(z | x) only the ratio of x = z to all other x matters; there is none where z is the
        mask.
        """
        noisy = noisy.repeat(len(logits[0]) // max(1, len(noisy)), 1)
        gain = power * torch.log1p(level.alpha * self.num_codes / level.code).expand(noisy.shape)
        gain = gain.masked_fill(noisy < 0, 0)
        return [
            each.scatter_add(-1, noisy[:, span, None].clamp_min(0), gain[:, span, None])
            for each, (span, _) in zip(logits, self.layout.spans())
        ]

    def _draw(self, probabilities: list[Tensor], noise: Tensor) -> Tensor:
        """(B, N) codes of (B, n, num_codes), or of one more, for the mask, per level, with noise
        (B, N)."""
        parts = []
        for level, (span, size) in zip(probabilities, self.layout.spans()):
            drawn = inverse_cdf(level, noise[:, span])
            parts.append(torch.where(drawn < size, drawn, -1))
        return torch.cat(parts, 1)

    def _check_sampler(self, options: SampleOptions) -> None:
        own = SAMPLERS[self.parameterisation]
        if choose_sampler(options, (own, *SAMPLERS.values())) != own:
            raise UserError(
                f"sampler is {options.sampler!r}, of another parameterisation: this prior was trained with "
                f"prior.parameterisation={self.parameterisation}, which needs sampler={own}"
            )


def spread(place: Tensor) -> tuple[Tensor, Tensor]:
    """Places (B,) in [0, 1] to progress in [0, LATEST], denser to its end, and what a sample there
    weighs.

    Near the end few codes are noise, and each of them weighs much: equal spacing would leave it to
    chance.
    """
    left = 1 - place
    return LATEST * (1 - left**2), 2 * LATEST * left


def _check_meaning(module: UniformPrior, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Raise UserError where weights were trained for another noise or parameterisation."""
    stored = MEANINGS[int(state.get(prefix + "meaning", module.meaning))]
    for name, own, theirs in zip(
        ("noise", "parameterisation"), (module.noise_name, module.parameterisation), stored
    ):
        if own != theirs:
            raise UserError(
                f"prior.{name}={own}, but these weights were trained with {theirs}: set that"
            )
