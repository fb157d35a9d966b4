"""Autoregressive prior: raster order, level after level (VQGAN, Esser et al. 2021, arXiv:2012.09841)."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from priors.backbone import Backbone, check_settings, cross_entropy, evaluation
from priors.interface import Likelihood, SampleOptions
from priors.sampling import categorical, guided_labels, gumbel, shape_logits
from tokenizer.interface import CodeLayout
from training.command import UserError
from training.loop import Loss


@dataclasses.dataclass(frozen=True)
class AutoregressiveConfig:
    kind: str = "autoregressive"
    dim: int = 128
    depth: int = 4
    heads: int = 4
    dropout: float = 0.1
    label_dropout: float = 0.1  # share of labels made unconditional, for guidance
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_settings(
            self.dim,
            self.depth,
            self.heads,
            dropout=self.dropout,
            label_dropout=self.label_dropout,
            label_smoothing=self.label_smoothing,
        )

    def build(self, layout: CodeLayout, num_classes: int) -> AutoregressivePrior:
        backbone = Backbone(layout, num_classes, self.dim, self.depth, self.heads, True, self.dropout)
        return AutoregressivePrior(backbone, num_classes, self.label_dropout, self.label_smoothing)


class AutoregressivePrior(nn.Module):
    """p(codes | label) = product over i of p(code i | codes before i, label). Likelihoods are exact."""

    def __init__(
        self, backbone: Backbone, num_classes: int, label_dropout: float = 0.0, label_smoothing: float = 0.0
    ) -> None:
        super().__init__()
        self.backbone, self.layout, self.num_classes = backbone, backbone.layout, num_classes
        self.label_dropout, self.label_smoothing = label_dropout, label_smoothing

    def loss(self, codes: Tensor, labels: Tensor, uniform: Tensor | None = None) -> Loss:
        """Mean cross-entropy per position. (B, N), (B,) int64; `uniform` as in priors.interface.Prior."""
        if uniform is None:
            uniform = torch.rand(len(codes), 1, device=codes.device)
        labels = torch.where(uniform[:, 0] < self.label_dropout, self.num_classes, labels)
        logits = self.backbone(codes, labels)
        total = cross_entropy(self.layout, logits, codes, self.label_smoothing).mean()
        with torch.no_grad():
            nats = cross_entropy(self.layout, logits, codes).mean() if self.label_smoothing else total
        return Loss(total, {"nats_per_token": nats.detach()})

    def nll(self, codes: Tensor, labels: Tensor) -> Likelihood:
        """Exact, summed over positions in float64."""
        with evaluation(self):
            logits = [level.double() for level in self.backbone(codes, labels)]
            return Likelihood(cross_entropy(self.layout, logits, codes).sum(1), "exact")

    def sample(self, labels: Tensor, options: SampleOptions, sample_ids: Tensor, known: Tensor | None = None) -> Tensor:
        """(B, N) int64, one position at a time with cached keys and values; `options.steps` plays no part.

        Raises UserError unless the known codes of each sample come before its unknown ones: an order fixed in
        advance conditions exactly on a beginning, and on nothing else.
        """
        if known is None:
            known = torch.full((len(labels), self.layout.length), -1, device=labels.device)
        if ((known[:, 1:] >= 0) & (known[:, :-1] < 0)).any():
            raise UserError(
                "an autoregressive prior continues a beginning: the known codes must all come before the "
                "unknown ones in raster order; to fill any other hole use a masked prior"
            )
        conditions = guided_labels(labels, self.num_classes, options)
        copies = len(conditions) // max(1, len(labels))
        codes, cache, previous = known.clone(), None, None
        with evaluation(self):
            for position in range(self.layout.length):
                logits, cache = self.backbone.step(position, previous, conditions, cache)
                logits = shape_logits(logits, options)
                drawn = categorical(logits, gumbel(options.seed, sample_ids, position, logits.shape[1:]))
                codes[:, position] = torch.where(known[:, position] < 0, drawn, known[:, position])
                previous = codes[:, position].repeat(copies)
        return codes
