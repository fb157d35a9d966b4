"""Uniform-state diffusion (UDLM, arXiv:2412.10193; Duo, arXiv:2506.10892) and the absorbing + uniform hybrid (D3PM,
Austin et al. 2021, arXiv:2107.03006; VQ-Diffusion, arXiv:2111.14822; GIDD, arXiv:2503.04482).

At time t a code is what it was with probability alpha and else noise: q(z | x) = alpha [z = x] + (1 - alpha) pi(z),
where pi is the mask (-1) with probability `mask_share`, 0 for uniform-state diffusion, and any code alike otherwise.

The loss fixes what the logits of position i mean. "leave_one_out": p(x_i | z without z_i), as Duo's bound wants it.
"posterior": p(x_i | z), as cross-entropy wants it. The two differ by the factor q(z_i | x_i), so each has a tight bound
and a right sampler, and is badly off under the other's.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from priors.autoregressive import choose_sampler
from priors.backbone import BackboneConfig, check_settings, cross_entropy, evaluation
from priors.bounds import own_noise
from priors.diffusion import draws, inverse_cdf, share_and_rate, step_noise
from priors.interface import Likelihood, SampleOptions
from priors.parallel import reading
from priors.sampling import begin, shape_logits
from priors.schedules import SCHEDULES
from tokenizer.interface import CodeLayout
from training.command import UserError
from training.loop import Loss

# parameterisation -> its sampler: Duo's posterior with the network plugged in, or the mixture over p(x | z)
SAMPLERS = {"leave_one_out": "plug_in", "posterior": "mixture"}
Network = Callable[[Tensor, Tensor], list[Tensor]]  # codes and times (B,) to logits (copies B, n, num_codes) per level
LATEST = 1 - 1e-3  # progress: as clean as training gets, where the weight of the bound is near its infinity
STRATA = 16  # times per sequence in the likelihood bound


@dataclasses.dataclass(frozen=True)
class UniformConfig:
    kind: str = "uniform"
    backbone: BackboneConfig = dataclasses.field(default_factory=BackboneConfig)
    label_dropout: float = 0.1  # share of labels made unconditional, for guidance
    mask_share: float = 0.0  # of the noise; above 0 makes the hybrid (VQ-Diffusion: 0.9)
    parameterisation: str = "leave_one_out"  # or "posterior"
    cross_entropy: float = 0.0  # its share in the loss, the bound has the rest; of "posterior" only
    schedule: str = "linear"  # of the noised share, over the times of the loss and the steps of the sampler
    steps: int = 64

    def __post_init__(self) -> None:
        check_settings(label_dropout=self.label_dropout, mask_share=self.mask_share)
        for name, known in (("parameterisation", SAMPLERS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in known:
                raise ValueError(f"prior.{name}={getattr(self, name)!r} is not one of {', '.join(known)}")
        if not 0 <= self.cross_entropy <= 1:
            raise ValueError(f"prior.cross_entropy={self.cross_entropy} must be in [0, 1]")
        if self.cross_entropy and self.parameterisation != "posterior":
            raise ValueError(
                f"prior.cross_entropy={self.cross_entropy} trains a posterior: set prior.parameterisation=posterior"
            )
        if self.steps < 1:
            raise ValueError(f"prior.steps={self.steps}: at least 1 is needed")

    def build(self, layout: CodeLayout, num_classes: int, given: CodeLayout | None = None) -> UniformPrior:
        return UniformPrior(
            self.backbone.build(layout, num_classes, causal=False, given=given),
            num_classes,
            label_dropout=self.label_dropout,
            mask_share=self.mask_share,
            parameterisation=self.parameterisation,
            cross_entropy=self.cross_entropy,
            schedule=self.schedule,
            steps=self.steps,
        )


class UniformPrior(nn.Module):
    """All codes change all the time. -1 stands for the mask of the hybrid.

    `timed`: the backbone's forward takes `time` (B,) in [0, 1], 0 where codes are clean.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        label_dropout: float = 0.0,
        mask_share: float = 0.0,
        parameterisation: str = "leave_one_out",
        cross_entropy: float = 0.0,
        schedule: str = "linear",
        steps: int = 64,
        timed: bool = False,
    ) -> None:
        super().__init__()
        self.backbone, self.layout, self.num_classes = backbone, backbone.layout, num_classes
        self.label_dropout, self.mask_share, self.parameterisation = label_dropout, mask_share, parameterisation
        self.cross_entropy, self.schedule, self.steps, self.timed = cross_entropy, SCHEDULES[schedule], steps, timed
        num_codes = torch.tensor(self.layout.num_codes).repeat_interleave(torch.tensor(self.layout.lengths))
        self.register_buffer("num_codes", num_codes, persistent=False)  # (N,)
        self.register_buffer("meaning", torch.tensor(list(SAMPLERS).index(parameterisation)))  # stays with the weights
        self.register_load_state_dict_pre_hook(_check_meaning)

    def loss(self, codes: Tensor, labels: Tensor, uniform: Tensor | None = None, given: Tensor | None = None) -> Loss:
        """The bound per token, mixed with cross-entropy. Arguments as in priors.interface.Prior."""
        uniform = draws(uniform, codes)
        labels = torch.where(uniform[:, 0] < self.label_dropout, self.num_classes, labels)
        progress = uniform[:, 1].double().clamp_max(LATEST)
        network = functools.partial(self._predict, labels, given)
        logits, nats = self._estimate(network, codes, progress, uniform[:, 2:].double())
        total = nats.mean() / self.layout.length
        parts = {"nats_per_token_bound": total.detach()}
        if self.cross_entropy:
            plain = cross_entropy(self.layout, logits, codes).mean()
            parts["cross_entropy"] = plain.detach()
            total = torch.lerp(total, plain.double(), self.cross_entropy)
        return Loss(total.float(), parts)

    def nll(self, codes: Tensor, labels: Tensor, given: Tensor | None = None) -> Likelihood:
        """The bound at STRATA times per sequence, spread evenly; the noise depends on the sequence alone."""
        noise = own_noise(codes, (STRATA, self.layout.length + 1))
        nats = torch.zeros(len(codes), dtype=torch.float64, device=codes.device)
        with evaluation(self):
            network = self._network(labels, given)
            for stratum in range(STRATA):
                progress = (stratum + noise[:, stratum, 0]) / STRATA
                nats += self._estimate(network, codes, progress, noise[:, stratum, 1:])[1] / STRATA
        return Likelihood(nats, "bound")

    def sample(
        self,
        labels: Tensor,
        options: SampleOptions,
        sample_ids: Tensor,
        known: Tensor | None = None,
        given: Tensor | None = None,
    ) -> Tensor:
        """(B, N) int64. Each step draws x from p(x | z_t), shaped by the options, then z_s from q(z_s | z_t, x).

        Known codes are noised anew to the time of each step. That tells the others less than the codes do, so as
        many steps of Gibbs sampling among clean codes follow. Raises UserError for a sampler that is not the
        parameterisation's.
        """
        self._check_sampler(options)
        start = begin(self, labels, options, known, given)
        known = start.known
        steps, noisy, holds = options.steps or self.steps, known, bool((known >= 0).any())
        alphas = 1 - self.schedule(torch.arange(steps + 1, dtype=torch.float64, device=labels.device) / steps)
        noises = step_noise(options, sample_ids, 2 * steps + 1, (4, self.layout.length))
        with evaluation(self):
            network = self._network(start.labels, start.given, start.copies)
            for step, noise in zip(range(steps), noises):
                choice, case, fresh, held = noise.unbind(1)
                alpha, next_alpha = alphas[step], alphas[step + 1]
                if step == 0 or holds:
                    held = corrupt(known, held, alpha, self.num_codes, self.mask_share)
                    noisy = held if step == 0 else torch.where(known < 0, noisy, held)
                logits = self._at(network, noisy, 1 - step / steps)
                scale = options.guidance_at((step + 1) / steps)
                logits = [shape_logits(level, options, scale) for level in logits]
                if self.parameterisation == "leave_one_out":
                    logits = self._times_likelihood(logits, noisy, alpha)
                noisy = reverse(
                    noisy, self._draw(logits, choice), alpha, next_alpha, case, fresh, self.num_codes, self.mask_share
                )
            codes = torch.where(known < 0, noisy, known)
            return self._settle(network, codes, known, options, noises) if holds else codes

    def _settle(
        self, network: Network, codes: Tensor, known: Tensor, options: SampleOptions, noises: Iterator[Tensor]
    ) -> Tensor:
        """Unknown codes drawn anew from p(x_i | the others), in turns of a random order, each once or more.

        Samples of which nothing is known stay as they are.
        """
        holes = (known < 0) & (known >= 0).any(1, keepdim=True)
        num_holes = holes.sum(1, keepdim=True).clamp_min(1)
        share, _ = share_and_rate(self.schedule, torch.tensor(LATEST, device=codes.device))
        size = -(-num_holes // (options.steps or self.steps))
        order = next(noises)[:, 0]
        ranks = order.where(holes, torch.inf).argsort(1).argsort(1)
        for step, noise in enumerate(noises):
            logits = self._at(network, codes, 1 - LATEST)
            if self.parameterisation == "posterior":
                logits = self._times_likelihood(logits, codes, 1 - share, -1)
            logits = [shape_logits(level, options, options.guidance) for level in logits]
            turn = holes & ((ranks - step * size) % num_holes < size)
            codes = torch.where(turn, self._draw(logits, noise[:, 0]), codes)
        return codes

    def _estimate(
        self, network: Network, codes: Tensor, progress: Tensor, uniform: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """Logits for codes noised to the time of `progress` (B,), and their term of the bound, (B,) float64."""
        share, rate = (value[:, None] for value in share_and_rate(self.schedule, progress))
        alpha = (1 - share).clamp_min(1e-8)
        noisy = corrupt(codes, uniform, alpha, self.num_codes, self.mask_share)
        logits = network(noisy, 1 - progress)
        evidence = [level.double() for level in logits]
        if self.parameterisation == "leave_one_out":
            evidence = self._times_likelihood(evidence, noisy, alpha)
        nats = [
            bound_rate(level.softmax(-1), codes[:, span], noisy[:, span], alpha, rate, self.mask_share).sum(1)
            for level, (span, _) in zip(evidence, self.layout.spans())
        ]
        return logits, torch.stack(nats).sum(0)

    def _predict(self, labels: Tensor, given: Tensor | None, codes: Tensor, time: Tensor) -> list[Tensor]:
        if self.timed:
            return self.backbone(codes, labels, given=given, time=time)
        return self.backbone(codes, labels, given=given)

    def _network(self, labels: Tensor, given: Tensor | None, copies: int = 1) -> Network:
        """Without gradients, for labels (copies B,) and given (copies B, M)."""
        if self.timed:
            return lambda codes, time: self._predict(labels, given, codes.repeat(copies, 1), time.repeat(copies))
        read = reading(self.backbone, labels, given, copies)
        return lambda codes, time: read(codes)

    def _at(self, network: Network, codes: Tensor, time: float) -> list[Tensor]:
        """Logits at one time, float64."""
        times = torch.full((len(codes),), time, device=codes.device)
        return [level.double() for level in network(codes, times)]

    def _times_likelihood(self, logits: list[Tensor], noisy: Tensor, alpha: Tensor, power: int = 1) -> list[Tensor]:
        """log of exp(logits) q(z | x)^power: from leave-one-out to posterior, or with -1 from posterior back.

        Of q(z | x) only the ratio of x = z to all other x matters; there is none where z is the mask.
        """
        noisy = noisy.repeat(len(logits[0]) // max(1, len(noisy)), 1)
        gain = power * torch.log1p(alpha / ((1 - alpha) * noise_probability(noisy, self.num_codes, self.mask_share)))
        gain = gain.masked_fill(noisy < 0, 0)
        return [
            level.scatter_add(-1, noisy[:, span, None].clamp_min(0), gain[:, span, None])
            for level, (span, _) in zip(logits, self.layout.spans())
        ]

    def _draw(self, logits: list[Tensor], noise: Tensor) -> Tensor:
        """(B, N) codes from the softmax of each level, with noise (B, N)."""
        parts = zip(logits, self.layout.spans())
        return torch.cat([inverse_cdf(level.softmax(-1), noise[:, span]) for level, (span, _) in parts], 1)

    def _check_sampler(self, options: SampleOptions) -> None:
        own = SAMPLERS[self.parameterisation]
        if choose_sampler(options, (own, *SAMPLERS.values())) != own:
            raise UserError(
                f"sampler is {options.sampler!r}, of another parameterisation: this prior was trained with "
                f"prior.parameterisation={self.parameterisation}, which needs sampler={own}"
            )


def noise_probability(codes: Tensor, num_codes: Tensor | int, mask_share: float) -> Tensor:
    """pi(code), float64."""
    mask = torch.full(codes.shape, mask_share, dtype=torch.float64, device=codes.device)
    return torch.where(codes < 0, mask, (1 - mask) / num_codes)


def corrupt(codes: Tensor, uniform: Tensor, alpha: Tensor, num_codes: Tensor, mask_share: float) -> Tensor:
    """A draw of q(z | x): (B, N) codes, uniform numbers and (N,) num_codes -> (B, N) int64, -1 where masked."""
    rest = (uniform - alpha) / (1 - alpha)
    return torch.where(uniform < alpha, codes, draw_noise(rest, num_codes, mask_share))


def draw_noise(uniform: Tensor, num_codes: Tensor, mask_share: float) -> Tensor:
    """A draw of pi, (B, N) int64."""
    code = ((uniform - mask_share) / (1 - mask_share) * num_codes).long()
    return torch.where(uniform < mask_share, -1, code.minimum(num_codes - 1))


def reverse(
    noisy: Tensor,
    clean: Tensor,
    alpha: Tensor,
    next_alpha: Tensor,
    case: Tensor,
    fresh: Tensor,
    num_codes: Tensor,
    mask_share: float,
) -> Tensor:
    """A draw of q(z_s | z_t, x) for s before t: (B, N) z_t and x, and two uniform numbers for each -> (B, N) int64.

    x either survives to s or not, and z_s to t or not; what does not is drawn anew from pi. Given z_t and x these
    four cases have the weights below, and z_s is x where x survives, else z_t where that is older, else new.
    """
    kept, noise = alpha / next_alpha, noise_probability(noisy, num_codes, mask_share)
    survives = next_alpha * ((1 - kept) * noise + kept * (noisy == clean))
    older, new = (1 - next_alpha) * kept * noise, (1 - next_alpha) * (1 - kept) * noise
    case = case * (survives + older + new)
    drawn = torch.where(case < survives + older, noisy, draw_noise(fresh, num_codes, mask_share))
    return torch.where(case < survives, clean, drawn)


def bound_rate(
    posterior: Tensor, codes: Tensor, noisy: Tensor, alpha: Tensor, rate: Tensor, mask_share: float
) -> Tensor:
    """The bound's integrand over time in nats per position, (B, n) float64; `rate` is -d alpha / dt.

    posterior (B, n, K): p(x | z), float64. Jumps of the reverse process from z to j have a rate proportional to
    r(j) = pi(z) E[q(j | x) / q(z | x)], under p(x | z) in the model and at the true x in fact. Between two jump
    processes the divergence is sum over j of r_model - r + r log(r / r_model) (Campbell et al. 2022,
    arXiv:2205.14987, prop. 2; with the plug-in posterior it is Duo's bound, eq. 8, with masks only MDLM's).
    """
    num_codes = posterior.shape[-1]
    at_code = (1 - mask_share) / num_codes  # pi of a code
    jump = alpha / (1 - alpha)
    visible, moved = (noisy >= 0).double(), (noisy != codes).double()
    gain = visible * alpha / (alpha + (1 - alpha) * at_code)  # 1 - (1 - alpha) pi(z) / q(z | z)
    stay = visible * pick(posterior, noisy.clamp_min(0))  # p(x = z)
    base, true_base = 1 - gain * stay, 1 - gain * (1 - moved)  # (1 - alpha) pi(z) E[1 / q(z | x)]

    log_model = torch.log(at_code * base[..., None] + jump[..., None] * posterior)  # r_model(j) of every code j
    others = num_codes - visible  # codes other than z; r is at_code true_base at each, and `jump` more at x
    plain, raised = at_code * true_base, at_code * true_base + jump
    to_codes = (
        others * at_code * (base - true_base)
        + jump * (1 - stay - moved)
        + (others - moved) * plain * plain.log()
        + moved * raised * raised.log()
        - plain * (log_model.sum(-1) - visible * pick(log_model, noisy.clamp_min(0)))
        - moved * jump * pick(log_model, codes)
    )
    to_mask = visible * mask_share * (base - true_base + true_base * torch.log(true_base / base))
    return rate / alpha * (to_codes + to_mask)


def pick(values: Tensor, index: Tensor) -> Tensor:
    """values (B, n, K) at index (B, n)."""
    return values.gather(-1, index[..., None])[..., 0]


def _check_meaning(module: UniformPrior, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Raise UserError where weights were trained for another parameterisation."""
    stored = list(SAMPLERS)[int(state.get(prefix + "meaning", module.meaning))]
    if stored != module.parameterisation:
        raise UserError(
            f"prior.parameterisation={module.parameterisation}, but these weights were trained with {stored}: set that"
        )
