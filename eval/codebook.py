"""How a codebook is used, counted over a whole split: per-batch perplexity means nothing."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from eval.interface import Batch
from eval.record import Measurement
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

    def __init__(self, layout: CodeLayout, split: str, settings: dict) -> None:
        self.layout, self.split, self.settings = layout, split, settings
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
        found: list[Measurement] = []

        def add(name: str, value: float, unit: str, higher: bool | None, **settings: object) -> None:
            found.append(Measurement(name, value, unit, higher, images, self.split, self.settings | settings))

        unigram_bits = 0.0
        for level, (histogram, length) in enumerate(zip(self.histograms(), self.layout.lengths), start=1):
            found_usage, size = usage(histogram), len(histogram)
            unigram_bits += length * found_usage.entropy
            of_level = f", level {level}" if len(self.counts) > 1 else ""
            counted = {"num_codes": size, "tokens": int(histogram.sum())}
            share = 100 * found_usage.active / size
            add(f"codebook usage{of_level}", share, "%", True, **counted, dead=found_usage.dead)
            plug_in = counted | {"estimator": "plug-in"}
            add(f"perplexity{of_level}", found_usage.perplexity, "codes", True, **plug_in)
            corrected = found_usage.perplexity_corrected
            add(
                f"corrected perplexity{of_level}",
                corrected,
                "codes",
                True,
                **counted,
                estimator="Miller-Madow",
            )
            add(f"code entropy{of_level}", found_usage.entropy, "bits/token", None, **plug_in)
        add("rate, fixed", self.layout.bits, "bits/image", None, rate="tokens x log2 K")
        add("rate, unigram entropy", unigram_bits, "bits/image", None, rate="plug-in entropy per level")
        return {measurement.name: measurement for measurement in found}
