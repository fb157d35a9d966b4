"""Autoregressive prior: code after code, level after level (VQGAN, Esser et al. 2021,
arXiv:2012.09841), in raster order or in permuted ones (RAR, Yu et al. 2024, arXiv:2411.00776)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from priors.backbone import BackboneConfig, check_settings, cross_entropy, evaluation
from priors.interface import Likelihood, SampleOptions
from priors.sampling.guidance import begin, shape_logits
from priors.sampling.noise import categorical, gumbel, uniform_noise
from tokenizer.interface import CodeLayout
from training.errors import UserError
from training.loop import Loss

ORDERS = ("raster", "random", "annealed")


@dataclasses.dataclass(frozen=True)
class AutoregressiveConfig:
    """`order` of the positions of a level in training; "annealed": permuted ones, less and less
    often, then raster."""

    kind: str = "autoregressive"
    order: str = "raster"
    anneal_start_step: int = 0  # of annealed: up to here every order is permuted,
    anneal_end_step: int = 0  # from here on none
    label_dropout: float = 0.1  # share of labels made unconditional, for guidance
    label_smoothing: float = 0.0
    backbone: BackboneConfig = dataclasses.field(default_factory=BackboneConfig)

    def __post_init__(self) -> None:
        check_settings(label_dropout=self.label_dropout, label_smoothing=self.label_smoothing)
        check_order(self.order, self.anneal_start_step, self.anneal_end_step)

    def build(
        self, layout: CodeLayout, num_classes: int, given: CodeLayout | None = None
    ) -> AutoregressivePrior:
        return AutoregressivePrior(
            self.backbone.build(layout, num_classes, causal=True, given=given),
            num_classes,
            self.label_dropout,
            self.label_smoothing,
            self.order,
            (self.anneal_start_step, self.anneal_end_step),
        )


def check_order(order: str, start_step: int, end_step: int) -> None:
    """Raise ValueError for settings of an order that is none."""
    if order not in ORDERS:
        raise ValueError(f"prior.order={order!r} is not one of {', '.join(ORDERS)}")
    if order == "annealed" and not 0 <= start_step < end_step:
        raise ValueError(
            f"prior.anneal_end_step={end_step} must come after anneal_start_step={start_step}: half "
            "and three quarters of loop.steps are usual"
        )


class AutoregressivePrior(nn.Module):
    """p(codes | label) = product over i of p(code i | codes before i in the order, label).
    Likelihoods are exact.

    `backbone` is causal (priors.backbone), or a network with its methods for raster order
    (priors.families.pixelcnn).
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        label_dropout: float = 0.0,
        label_smoothing: float = 0.0,
        order: str = "raster",
        anneal_steps: tuple[int, int] = (0, 0),
    ) -> None:
        super().__init__()
        self.backbone, self.layout, self.num_classes = backbone, backbone.layout, num_classes
        self.label_dropout, self.label_smoothing = label_dropout, label_smoothing
        self.order, self.anneal_steps = order, anneal_steps
        # Of some networks: no class stands for none; and by how many steps guidance is behind (0
        # ends its schedule at s, 1 begins it at 0, as RAR's authors do).
        self.unconditional = getattr(backbone, "unconditional", True)
        self.guidance_lag = getattr(backbone, "guidance_lag", 0)
        if order == "annealed":
            self.register_buffer("next_step", torch.zeros((), dtype=torch.int64))

    def update(self, step: int, taken: bool) -> None:
        """After each optimizer step: orders anneal."""
        if taken and self.order == "annealed":
            self.next_step.fill_(step + 1)

    def loss(
        self,
        codes: Tensor,
        labels: Tensor,
        uniform: Tensor | None = None,
        given: Tensor | None = None,
    ) -> Loss:
        """Mean cross-entropy per position. (B, N), (B,) int64; `uniform` as in
        priors.interface.Prior."""
        if uniform is None:
            uniform = torch.rand(len(codes), self.layout.length + 2, device=codes.device)
        labels = torch.where(uniform[:, 0] < self.label_dropout, self.num_classes, labels)
        logits = self.backbone(codes, labels, order=self.training_order(uniform), given=given)
        total = cross_entropy(self.layout, logits, codes, self.label_smoothing).mean()
        with torch.no_grad():
            nats = (
                cross_entropy(self.layout, logits, codes).mean() if self.label_smoothing else total
            )
        return Loss(total, {"nats_per_token": nats.detach()})

    def training_order(self, uniform: Tensor) -> Tensor | None:
        """(B, N) positions, permuted within levels, from the draws of a loss; None where all are
        raster."""
        if self.order == "raster":
            return None
        keys = uniform[:, 2:]
        if self.order == "annealed":
            start, end = self.anneal_steps
            share = ((end - self.next_step) / (end - start)).clamp(
                0, 1
            )  # of orders that are permuted
            raster = torch.arange(self.layout.length, dtype=keys.dtype, device=keys.device)
            keys = torch.where(uniform[:, 1:2] < share, keys, raster)
        return order_within_levels(self.layout, keys)

    def nll(self, codes: Tensor, labels: Tensor, given: Tensor | None = None) -> Likelihood:
        """Exact, of codes drawn in raster order, summed over positions in float64."""
        self.check_labels(labels)
        with evaluation(self):
            logits = [level.double() for level in self.backbone(codes, labels, given=given)]
            return Likelihood(cross_entropy(self.layout, logits, codes).sum(1), "exact")

    def sample(
        self,
        labels: Tensor,
        options: SampleOptions,
        sample_ids: Tensor,
        known: Tensor | None = None,
        given: Tensor | None = None,
    ) -> Tensor:
        """(B, N) int64, one position at a time with cached keys and values; `options.steps` plays
        no part.

        Samplers: "raster"; of a prior trained in random order "random" (the default) and "raster".
        A random order begins in each level with the known codes, so that what is drawn is
        conditioned on them exactly.

        Raises UserError unless the known codes of each sample come before its unknown ones: in
        raster order they are a beginning; in random order, where one code of a level is unknown,
        none of the levels after it is known.
        """
        batch, length = len(labels), self.layout.length
        self.check_labels(labels, options)
        start = begin(self, labels, options, known, given)
        sampler = choose_sampler(
            options, ("random", "raster") if self.order == "random" else ("raster",)
        )
        keys = torch.arange(length, device=labels.device).expand(batch, -1)
        if sampler == "random":
            keys = (
                uniform_noise(options.seed, sample_ids, length, (length,))
                - (start.known >= 0).double()
            )
        order = order_within_levels(self.layout, keys)
        _check_known(start.known.gather(1, order) >= 0, sampler)
        codes, previous = start.known.clone(), None
        with evaluation(self):
            decoding = self.backbone.decoding(
                start.labels,
                order=order.repeat(start.copies, 1) if sampler == "random" else None,
                given=start.given,
            )
            for slot in range(length):
                scale = options.guidance_at((slot + 1 - self.guidance_lag) / length)
                logits = shape_logits(decoding.step(slot, previous), options, scale)
                drawn = categorical(
                    logits, gumbel(options.seed, sample_ids, slot, logits.shape[1:])
                )
                position = order[:, slot, None]
                kept = codes.gather(1, position)[:, 0]
                code = torch.where(kept < 0, drawn, kept)
                codes.scatter_(1, position, code[:, None])
                previous = code.repeat(start.copies)
        return codes

    def check_labels(self, labels: Tensor, options: SampleOptions | None = None) -> None:
        """Raise UserError where there is no unconditional class and it is asked for."""
        if self.unconditional:
            return
        if (options and options.guidance != 1) or bool((labels == self.num_classes).any()):
            raise UserError(
                "this prior knows no unconditional class, which guidance needs, too: leave --guidance "
                "and --unconditional out, or train with prior.label_dropout above 0"
            )


def order_within_levels(layout: CodeLayout, keys: Tensor) -> Tensor:
    """(B, N) keys -> (B, N) int64: the positions of each level by rising key, level after level."""
    return torch.cat(
        [span.start + keys[:, span].argsort(dim=1, stable=True) for span, _ in layout.spans()], 1
    )


def choose_sampler(options: SampleOptions, names: Sequence[str]) -> str:
    """The sampler asked for, or the first of `names`. Raises UserError where it is none of them."""
    if options.sampler and options.sampler not in names:
        raise UserError(
            f"sampler is {options.sampler!r}: this prior has {', '.join(dict.fromkeys(names))}"
        )
    return options.sampler or names[0]


def _check_known(known: Tensor, sampler: str) -> None:
    """(B, N) bool in the order of sampling."""
    if not (known[:, 1:] & ~known[:, :-1]).any():
        return
    if sampler == "raster":
        raise UserError(
            "a prior in raster order continues a beginning: the known codes must all come before the unknown ones; "
            "to fill any other hole use a masked prior, or an autoregressive one trained with prior.order=random"
        )
    raise UserError(
        "an autoregressive prior goes from level to level: where codes of a level are unknown, none of the levels "
        "after it may be known; to fill such a hole use a masked prior"
    )
