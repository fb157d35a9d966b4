"""The mathematics of sampling: guidance (arXiv:2207.12598), filters, and Gumbel noise owned by each sample.

Noise comes from the counter-based Philox generator (Salmon et al. 2011) under the key (seed, sample id), so a
sample meets the same numbers in any batch. It is float64: in float32 it lowers the effective temperature.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from priors.interface import SampleOptions

# the state of a generator that has drawn nothing, without its counter and key
EMPTY = {"bit_generator": "Philox", "buffer": np.zeros(4, np.uint64), "buffer_pos": 4, "has_uint32": 0, "uinteger": 0}


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """logits = u + s (c - u): s = 1 is exactly the conditional, s = 0 exactly the unconditional."""
    return torch.lerp(unconditional, conditional, scale)


def guided_labels(labels: Tensor, num_classes: int, options: SampleOptions) -> Tensor:
    """(B,) labels -> (2B,) with the unconditional ones behind, or as they are where s = 1 needs none."""
    return labels if options.guidance == 1 else torch.cat([labels, torch.full_like(labels, num_classes)])


def shape_logits(logits: Tensor, options: SampleOptions, progress: float = 0.0) -> Tensor:
    """Logits for `guided_labels` (B or 2B, ..., K) -> guided, tempered, filtered (B, ..., K) float64.

    `progress` in [0, 1] is the share of the sampling that is done, for the guidance's schedule.
    """
    logits = logits.double()
    if options.guidance != 1:
        logits = guide(*logits.chunk(2), options.guidance_at(progress))
    return filter_logits(logits / options.temperature, options.top_k, options.top_p)


def filter_logits(logits: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """-inf for all but the top k, then for all but the fewest whose probability reaches p. (..., K)

    Ties with the last kept one are kept. 0 and 1.0 keep all.
    """
    if 0 < top_k < logits.shape[-1]:
        smallest = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p < 1:
        ordered = logits.sort(dim=-1, descending=True).values
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # probability of all better ones
        smallest = ordered.masked_fill(before >= top_p, torch.inf).amin(-1, keepdim=True)
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    return logits


def uniform_noise(seed: int, sample_ids: Tensor, stream: int, shape: tuple[int, ...]) -> Tensor:
    """(B, *shape) float64 in (0, 1) on the ids' device; a row depends on seed, its id and stream only."""
    rows = np.empty((len(sample_ids), *shape))
    philox = np.random.Philox(0)  # one for all rows: making one reads the system's entropy
    generator, counter = np.random.Generator(philox), np.array([0, 0, 0, stream], np.uint64)
    for row, sample_id in zip(rows, sample_ids.tolist()):
        state = {"counter": counter, "key": np.array([seed, sample_id], np.uint64)}
        philox.state = {**EMPTY, "state": state}
        generator.random(out=row)
    return torch.from_numpy(rows).clamp_min(np.finfo(np.float64).tiny).to(sample_ids.device)


def gumbel(seed: int, sample_ids: Tensor, stream: int, shape: tuple[int, ...]) -> Tensor:
    """(B, *shape) float64 standard Gumbel noise, seeded as `uniform_noise`."""
    return -torch.log(-torch.log(uniform_noise(seed, sample_ids, stream, shape)))


def categorical(logits: Tensor, noise: Tensor) -> Tensor:
    """(..., K) logits and Gumbel noise -> (...) int64 drawn from softmax(logits), by the Gumbel-max trick."""
    return (logits + noise).argmax(-1)
