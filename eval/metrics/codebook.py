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
from training.errors import UserError

COUNTABLE = 1 << 24  # codes of which each one is counted


@dataclasses.dataclass(frozen=True)
class Usage:
    """Of one level."""

    perplexity: float  # exp of the plug-in entropy, in [1, K]
    perplexity_corrected: float  # Miller-Madow (Miller 1955): exp(H + (active - 1) / 2n), at most K
    entropy: float  # bits per token, plug-in
    active: int  # codes seen
    dead: list[int]  # codes never seen


def usage(histogram: Tensor, num_codes: int | None = None) -> Usage:
    """(K,) counts -> figures. Raises ValueError when nothing was counted.

    `num_codes`: K, where the counts are of the codes that were seen alone; the others are too many
    to be listed as dead.
    """
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
        perplexity_corrected=min(math.exp(corrected), float(num_codes or len(counts))),
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


def check_countable(layout: CodeLayout) -> None:
    """Raise UserError where there are too many codes to count each of them."""
    most = max(layout.num_codes)
    if most > COUNTABLE:
        raise UserError(
            f"{most:,} codes are too many to count each of them (up to {COUNTABLE:,} are): of such a tokenizer "
            "`eval.run reconstruction` counts those that were seen"
        )


def code_statistics(codes: np.ndarray, layout: CodeLayout, seed: int = 0) -> list[LevelStatistics]:
    """(n, N) codes of a split, as a token cache holds them, -> one per level. A grid's last axis is
    its columns.

    Raises ValueError when there are no codes.
    """
    check_countable(layout)
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
    histogram: Tensor, origin: Origin, of_level: str, images: int, num_codes: int | None = None
) -> list[Measurement]:
    """The figures of `usage`."""
    measure, seen = origin.measure, usage(histogram, num_codes)
    size = num_codes or len(histogram)
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
        # Of levels with few codes a count of each, of others the codes seen and their counts.
        self.counts = [
            torch.zeros(size if size <= COUNTABLE else 0, dtype=torch.int64)
            for size in layout.num_codes
        ]
        self.seen = [torch.zeros(0, dtype=torch.int64) for _ in layout.num_codes]
        self.images = 0

    def update(self, batch: Batch) -> None:
        self.layout.check(batch.codes)
        self.images += len(batch.codes)
        for level, (span, size) in enumerate(self.layout.spans()):
            codes = batch.codes[:, span].flatten().cpu()
            if size <= COUNTABLE:
                self.counts[level] += torch.bincount(codes, minlength=size)
            else:
                ones = torch.ones_like(codes)
                self.seen[level], self.counts[level] = _merged(
                    torch.cat([self.seen[level], codes]), torch.cat([self.counts[level], ones])
                )

    def histograms(self) -> list[Tensor]:
        """(K,) int64 per level, over ranks; of more than COUNTABLE codes, of those seen alone."""
        found = []
        for counts, seen, size in zip(self.counts, self.seen, self.layout.num_codes):
            if size <= COUNTABLE:
                found.append(distributed.sum_(counts.to(distributed.device())).cpu())
            else:
                both = distributed.gather_parts([seen]), distributed.gather_parts([counts])
                found.append(_merged(*both)[1])
        return found

    def compute(self) -> dict[str, Measurement]:
        images = int(distributed.sum_(torch.tensor(self.images, device=distributed.device())))
        measure = self.origin.measure
        found: list[Measurement] = []
        unigram_bits = 0.0
        for level, (histogram, length) in enumerate(zip(self.histograms(), self.layout.lengths)):
            unigram_bits += length * usage(histogram).entropy
            size = self.layout.num_codes[level]
            found += measure_usage(
                histogram,
                self.origin,
                name_level(self.layout, level),
                images,
                size if size > COUNTABLE else None,
            )
        unit, entropy = "bits/image", "plug-in entropy per level"
        found.append(
            measure("rate, fixed", self.layout.bits, unit, None, images, rate="tokens x log2 K")
        )
        found.append(
            measure("rate, unigram entropy", unigram_bits, unit, None, images, rate=entropy)
        )
        return {measurement.name: measurement for measurement in found}


def _merged(codes: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (n,), some of them several times, and their counts -> each once, with its sum."""
    codes, places = codes.unique(return_inverse=True)
    return codes, counts.new_zeros(len(codes)).index_add_(0, places, counts)


def _mutual_information(first: np.ndarray, second: np.ndarray) -> float:
    """I(X; Y) = H(X) + H(Y) - H(X, Y) of (n,) pairs of codes, plug-in, in bits."""
    pairs = first.astype(np.int64) * (int(second.max()) + 1) + second
    return _entropy(first) + _entropy(second) - _entropy(pairs)


def _entropy(values: np.ndarray) -> float:
    """Plug-in, in bits."""
    counts = np.unique(values, return_counts=True)[1]
    return math.log2(len(values)) - float((counts * np.log2(counts)).sum()) / len(values)
