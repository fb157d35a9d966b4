"""Guidance (Ho and Salimans 2022, arXiv:2207.12598), temperature and filters of logits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from priors.interface import Prior, SampleOptions

# temperature of branches that are yet to be guided: infinite logits could not be weighed
COLDEST = 1e-100


class Start(NamedTuple):
    """What the samplers of all families begin with; guidance has every sample twice."""

    known: Tensor  # (B, N), -1 where codes are to be sampled
    labels: Tensor  # (B or 2B,), as of `guided_labels`
    given: Tensor | None  # (B or 2B, M)
    copies: int  # 1 or 2


def begin(
    prior: Prior, labels: Tensor, options: SampleOptions, known: Tensor | None, given: Tensor | None
) -> Start:
    """The arguments of `Prior.sample`, made complete."""
    if known is None:
        known = torch.full((len(labels), prior.layout.length), -1, device=labels.device)
    copies = 1 if options.guidance == 1 else 2
    given = None if given is None else given.repeat(copies, 1)
    return Start(known, guided_labels(labels, prior.num_classes, options), given, copies)


def guide(conditional: Tensor, unconditional: Tensor, scale: float | Tensor) -> Tensor:
    """logits = u + s (c - u): s = 1 is exactly the conditional, s = 0 exactly the unconditional."""
    return torch.lerp(unconditional, conditional, scale)


def guided_labels(labels: Tensor, num_classes: int, options: SampleOptions) -> Tensor:
    """(B,) labels -> (2B,) with the unconditional ones behind, or as they are where s = 1 needs
    none."""
    return (
        labels
        if options.guidance == 1
        else torch.cat([labels, torch.full_like(labels, num_classes)])
    )


def shape_logits(logits: Tensor, options: SampleOptions, scale: float | Tensor) -> Tensor:
    """Logits for `guided_labels` (B or 2B, ..., K) -> guided, tempered, filtered (B, ..., K)
    float64.

    `scale`: s of this step, of `options.guidance_at`, or of each row, (B, 1).
    """
    logits = logits.double()
    if options.guidance != 1:
        logits = guide(*logits.chunk(2), scale)
    if (
        options.temperature == 0
    ):  # the limit: all probability is the likeliest code's, the first of equal ones
        return torch.full_like(logits, -torch.inf).scatter_(
            -1, logits.argmax(-1, keepdim=True), 0.0
        )
    if options.temperature != 1:  # about the highest, so that it stays finite at any temperature
        logits = (logits - logits.amax(-1, keepdim=True)) / options.temperature
    return filter_logits(logits, options.top_k, options.top_p)


def shape_branches(logits: Tensor, options: SampleOptions, scale: float) -> Tensor:
    """As `shape_logits`, but both branches of guidance stay: (B or 2B, ..., K) -> the same,
    float64.

    Each is tempered, and -inf at what the filters leave out of the guided ones.
    """
    if options.guidance == 1:
        return shape_logits(logits, options, scale)
    tempered = logits.double()
    if options.temperature != 1:
        tempered = (tempered - tempered.amax(-1, keepdim=True)) / max(options.temperature, COLDEST)
    if options.temperature == 0 or (not options.top_k and options.top_p == 1):
        return tempered
    kept = shape_logits(logits, options, scale).isfinite()
    return tempered.masked_fill(~torch.cat([kept, kept]), -torch.inf)


def filter_logits(logits: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """-inf for all but the top k, then for all but the fewest whose probability reaches p. (..., K)

    Ties with the last kept one are kept. 0 and 1.0 keep all.
    """
    if 0 < top_k < logits.shape[-1]:
        smallest = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p < 1:
        ordered = logits.sort(dim=-1, descending=True).values
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(
            -1
        )  # probability of all better ones
        smallest = ordered.masked_fill(before >= top_p, torch.inf).amin(-1, keepdim=True)
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    return logits
