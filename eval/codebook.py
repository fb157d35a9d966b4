"""How a codebook is used, counted over a whole split: per-batch perplexity means nothing."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from eval.interface import Batch
from eval.record import Measurement, Origin
from tokenizer.interface import CodeLayout
from training import distributed


@dataclasses.dataclass(frozen=True)
class Usage:
    """Of one level."""

    perplexity: float  # exp of the plug-in entropy, in [1, K]
    perplexity_corrected: float  # Miller-Madow (Miller 1955): exp(H + (active - 1) / 2n), at most K
    entropy: float  # bits per token, plug-in
    active: int  # codes seen
    dead: list[int]  # codes never seen


def usage(histogram: Tensor) -> Usage:
    """(K,) counts -> figures. Raises ValueError when nothing was counted."""
    counts = histogram.double()
    n = counts.sum()
    if n <= 0:
        raise ValueError("the histogram is empty: no codes were counted")
    shares = counts / n
    nats = -float(torch.special.xlogy(shares, shares).sum())
    active = int((counts > 0).sum())
    corrected = nats + (active - 1) / (2 * float(n))
    return Usage(
        perplexity=math.exp(nats),
        perplexity_corrected=min(math.exp(corrected), float(len(counts))),
        entropy=nats / math.log(2),
        active=active,
        dead=torch.nonzero(counts == 0).flatten().tolist(),
    )


class CodebookUsage:
    """Metric over `Batch.codes`, per level of the layout."""

    def __init__(self, layout: CodeLayout, origin: Origin) -> None:
        self.layout, self.origin = layout, origin
        self.counts = [torch.zeros(size, dtype=torch.int64) for size in layout.num_codes]
        self.images = 0

    def update(self, batch: Batch) -> None:
        self.layout.check(batch.codes)
        self.images += len(batch.codes)
        for counts, (span, size) in zip(self.counts, self.layout.spans()):
            counts += torch.bincount(batch.codes[:, span].flatten().cpu(), minlength=size)

    def histograms(self) -> list[Tensor]:
        """(K,) int64 per level, over ranks."""
        return [distributed.sum_(counts.to(distributed.device())).cpu() for counts in self.counts]

    def compute(self) -> dict[str, Measurement]:
        images = int(distributed.sum_(torch.tensor(self.images, device=distributed.device())))
        measure = self.origin.measure
        found: list[Measurement] = []
        unigram_bits = 0.0
        for level, (histogram, length) in enumerate(zip(self.histograms(), self.layout.lengths), start=1):
            of_level = f", level {level}" if len(self.counts) > 1 else ""
            size, seen = len(histogram), usage(histogram)
            unigram_bits += length * seen.entropy
            counted = {"num_codes": size, "tokens": images * length}
            plug_in, corrected = counted | {"estimator": "plug-in"}, counted | {"estimator": "Miller-Madow"}
            dead = {"dead": seen.dead}
            share = 100 * seen.active / size
            found += [
                measure(f"codebook usage{of_level}", share, "%", True, images, details=dead, **counted),
                measure(f"perplexity{of_level}", seen.perplexity, "codes", True, images, **plug_in),
                measure(
                    f"corrected perplexity{of_level}", seen.perplexity_corrected, "codes", True, images, **corrected
                ),
                measure(f"code entropy{of_level}", seen.entropy, "bits/token", None, images, **plug_in),
            ]
        unit, entropy = "bits/image", "plug-in entropy per level"
        found.append(measure("rate, fixed", self.layout.bits, unit, None, images, rate="tokens x log2 K"))
        found.append(measure("rate, unigram entropy", unigram_bits, unit, None, images, rate=entropy))
        return {measurement.name: measurement for measurement in found}
