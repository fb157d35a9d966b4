"""How a codebook is used, counted over a whole split: per-batch perplexity means nothing."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
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


@dataclasses.dataclass(frozen=True)
class Neighbours:
    """Mutual information between codes and their neighbours in one direction, over all such pairs
    of a level.

    The plug-in estimate is too high by about (K - 1)² / 2n nats (Miller 1955), by less where few of
    the pairs can be seen at all. So it is also taken with the second codes shuffled over all pairs,
    which keeps both marginals and leaves no dependence. What position and class alone explain
    counts as information.
    """

    plug_in: float  # bits
    shuffled: float  # bits
    pairs: int  # n

    @property
    def bits(self) -> float:
        """Plug-in less shuffled: 0 on average for independent codes, too low by part of the bias
        for others."""
        return self.plug_in - self.shuffled


def neighbour_information(
    codes: np.ndarray, seed: int = 0
) -> tuple[Neighbours | None, Neighbours | None]:
    """(n, H, W) codes of a level -> horizontal, vertical; None where the grid has one column, or
    one row."""

    def between(first: np.ndarray, second: np.ndarray) -> Neighbours | None:
        if not first.size:
            return None
        first, second = first.ravel(), second.ravel()
        shuffled = np.random.default_rng(seed).permutation(second)
        return Neighbours(
            _mutual_information(first, second), _mutual_information(first, shuffled), first.size
        )

    return between(codes[:, :, :-1], codes[:, :, 1:]), between(codes[:, :-1], codes[:, 1:])


def position_entropy(codes: np.ndarray, num_codes: int) -> np.ndarray:
    """(n, positions) codes -> (positions,) bits: entropy over images of the code at each place,
    Miller-Madow.

    It knows no more than n images can tell: where n is below the number of codes it is too low.
    """
    histograms = (torch.from_numpy(np.bincount(column, minlength=num_codes)) for column in codes.T)
    return np.log2([usage(histogram).perplexity_corrected for histogram in histograms])


@dataclasses.dataclass(frozen=True)
class LevelStatistics:
    """What the codes of one level are like over a split."""

    histogram: np.ndarray  # (K,) int64
    usage: Usage
    position_entropy: np.ndarray  # (H, W) bits
    horizontal: Neighbours | None
    vertical: Neighbours | None


def code_statistics(codes: np.ndarray, layout: CodeLayout, seed: int = 0) -> list[LevelStatistics]:
    """(n, N) codes of a split, as a token cache holds them, -> one per level. A grid's last axis is
    its columns.

    Raises ValueError when there are no codes.
    """
    found = []
    for (span, size), grid in zip(layout.spans(), layout.grids):
        level = np.asarray(codes[:, span]).astype(np.int64)
        histogram = np.bincount(level.ravel(), minlength=size)
        seen = usage(torch.from_numpy(histogram))
        planes = level.reshape(len(level), -1, grid[-1])
        entropies = position_entropy(level, size).reshape(planes.shape[1:])
        found.append(
            LevelStatistics(histogram, seen, entropies, *neighbour_information(planes, seed))
        )
    return found


def measure_codes(codes: np.ndarray, layout: CodeLayout, origin: Origin) -> list[Measurement]:
    """The figures of `code_statistics`; histograms and grids of entropies are for the record's
    arrays."""
    found: list[Measurement] = []
    for level, statistics in enumerate(code_statistics(codes, layout)):
        of_level = name_level(layout, level)
        found += measure_usage(torch.from_numpy(statistics.histogram), origin, of_level, len(codes))
        entropies = statistics.position_entropy
        extremes = {"lowest": float(entropies.min()), "highest": float(entropies.max())}
        own = {
            "num_codes": layout.num_codes[level],
            "estimator": "Miller-Madow",
            "mean": "over positions",
        }
        mean = float(entropies.mean())
        name = f"code entropy per position{of_level}"
        found.append(
            origin.measure(name, mean, "bits/token", None, len(codes), details=extremes, **own)
        )
        for direction in ("horizontal", "vertical"):
            neighbours: Neighbours | None = getattr(statistics, direction)
            if neighbours:
                name = f"information, {direction} neighbours{of_level}"
                own = {"num_codes": layout.num_codes[level], "estimator": "plug-in less shuffled"}
                details = dataclasses.asdict(neighbours)
                found.append(
                    origin.measure(
                        name, neighbours.bits, "bits", None, len(codes), details=details, **own
                    )
                )
    return found


def name_level(layout: CodeLayout, level: int) -> str:
    """What to append to a figure's name: nothing where there is one level."""
    return f", level {level + 1}" if len(layout.grids) > 1 else ""


def measure_usage(
    histogram: Tensor, origin: Origin, of_level: str, images: int
) -> list[Measurement]:
    """The figures of `usage`."""
    measure, size, seen = origin.measure, len(histogram), usage(histogram)
    counted = {"num_codes": size, "tokens": int(histogram.sum())}
    plug_in, corrected = counted | {"estimator": "plug-in"}, counted | {"estimator": "Miller-Madow"}
    dead = {"dead": seen.dead}
    share = 100 * seen.active / size
    return [
        measure(f"codebook usage{of_level}", share, "%", True, images, details=dead, **counted),
        measure(f"perplexity{of_level}", seen.perplexity, "codes", True, images, **plug_in),
        measure(
            f"corrected perplexity{of_level}",
            seen.perplexity_corrected,
            "codes",
            True,
            images,
            **corrected,
        ),
        measure(f"code entropy{of_level}", seen.entropy, "bits/token", None, images, **plug_in),
    ]


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
        for level, (histogram, length) in enumerate(zip(self.histograms(), self.layout.lengths)):
            unigram_bits += length * usage(histogram).entropy
            found += measure_usage(histogram, self.origin, name_level(self.layout, level), images)
        unit, entropy = "bits/image", "plug-in entropy per level"
        found.append(
            measure("rate, fixed", self.layout.bits, unit, None, images, rate="tokens x log2 K")
        )
        found.append(
            measure("rate, unigram entropy", unigram_bits, unit, None, images, rate=entropy)
        )
        return {measurement.name: measurement for measurement in found}


def _mutual_information(first: np.ndarray, second: np.ndarray) -> float:
    """I(X; Y) = H(X) + H(Y) - H(X, Y) of (n,) pairs of codes, plug-in, in bits."""
    pairs = first.astype(np.int64) * (int(second.max()) + 1) + second
    return _entropy(first) + _entropy(second) - _entropy(pairs)


def _entropy(values: np.ndarray) -> float:
    """Plug-in, in bits."""
    counts = np.unique(values, return_counts=True)[1]
    return math.log2(len(values)) - float((counts * np.log2(counts)).sum()) / len(values)
