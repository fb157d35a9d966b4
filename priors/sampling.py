"""The mathematics of sampling: guidance (arXiv:2207.12598), filters, and Gumbel noise owned by each
sample.

Noise comes from `training.philox` under the key (seed, sample id) and is made on the ids' device,
so a sample meets the same numbers in any batch and on any device. It is float64: in float32 it
lowers the effective temperature.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from priors.interface import Prior, SampleOptions
from training import philox

# temperature of branches that are yet to be guided: infinite logits could not be weighed
COLDEST = 1e-100
JUMP = 256  # numbers that the CPU draws in the time of a jump past them


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


def uniform_noise(seed: int, sample_ids: Tensor, stream: int, shape: tuple[int, ...]) -> Tensor:
    """(B, *shape) float64 in (0, 1) on the ids' device; a row depends on seed, its id and stream
    only."""
    return philox.uniform(seed, sample_ids, stream, math.prod(shape)).view(len(sample_ids), *shape)


def chosen_noise(seed: int, sample_ids: Tensor, stream: int, chosen: Tensor, size: int) -> Tensor:
    """`uniform_noise(seed, sample_ids, stream, (N, size))[chosen]` for chosen (B, N) bool, without
    the rest."""
    if size < JUMP:
        return uniform_noise(seed, sample_ids, stream, (chosen.shape[1], size))[chosen]
    rows, places = chosen.nonzero().unbind(1)
    return philox.uniform(seed, sample_ids[rows], stream, size, places * size)


def gumbel(seed: int, sample_ids: Tensor, stream: int, shape: tuple[int, ...]) -> Tensor:
    """(B, *shape) float64 standard Gumbel noise, seeded as `uniform_noise`."""
    return _to_gumbel_(uniform_noise(seed, sample_ids, stream, shape))


def chosen_gumbel(seed: int, sample_ids: Tensor, stream: int, chosen: Tensor, size: int) -> Tensor:
    """`gumbel(seed, sample_ids, stream, (N, size))[chosen]` for chosen (B, N) bool, without the
    rest."""
    return _to_gumbel_(chosen_noise(seed, sample_ids, stream, chosen, size))


def _to_gumbel_(uniform: Tensor) -> Tensor:
    """-log(-log u), in the place of u."""
    return uniform.log_().neg_().log_().neg_()


def categorical(logits: Tensor, noise: Tensor) -> Tensor:
    """(..., K) logits and Gumbel noise -> (...) int64 drawn from softmax(logits), by the Gumbel-max
    trick."""
    return (logits + noise).argmax(-1)
