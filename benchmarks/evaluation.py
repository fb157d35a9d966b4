"""The Fréchet distance against torch-fidelity and scipy, memory of moments, and what a distance
notices.

`python -m benchmarks.evaluation [distance memory sensitivity]`; the last by EXTRACTOR, an in-domain
extractor's run folder, on the data that it was trained on: `python -m benchmarks.evaluation
sensitivity EXTRACTOR`.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import in_fresh_process, keep, median, ratio, run_parts, seconds, table
from eval.extractors.in_domain import Classifier, InDomain
from eval.extractors.interface import tag
from eval.metrics.frechet import Gaussian, frechet_distance
from eval.metrics.moments import Moments
from eval.pipeline import load
from eval.reference import npz_batches
from tokenizer.data.dataset import open_split
from tokenizer.data.transforms import to_float

DIM = 2048
COUNTS = (1_000, 10_000)  # images, in the measurement of memory


def made_features(n: int, seed: int) -> Tensor:
    """(n, 2048) float64 with variances that fall as 1/i, and a shift between seeds."""
    rows = torch.randn(n, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return rows * torch.arange(1, DIM + 1).rsqrt() * (1 + 0.1 * seed) + 0.01 * seed


def keeping(values: dict[str, float], name: str, run: Callable[[], float]) -> Callable[[], None]:
    """`run`, which leaves what it returns under the name."""

    def keep_value() -> None:
        values[name] = run()

    return keep_value


def distance() -> None:
    """The same statistics to each; ours also from fewer rows than features."""
    from scipy.linalg import sqrtm
    from torch_fidelity.metric_fid import fid_statistics_to_metric

    lines = []
    for n in (10_000, 1_000):
        rows = [made_features(n, seed) for seed in (0, 1)]
        moments = [Moments.of(each) for each in rows]
        statistics = [
            {"mu": each.mean.numpy(), "sigma": each.covariance.numpy()} for each in moments
        ]

        def ours(rows=rows, moments=moments, n=n) -> float:
            sides = rows if n < DIM else moments
            make = Gaussian.of_features if n < DIM else Gaussian.of_moments
            return frechet_distance(*(make(side) for side in sides))

        def fidelity(statistics=statistics) -> float:
            return fid_statistics_to_metric(*statistics, verbose=False)[
                "frechet_inception_distance"
            ]

        def scipys(statistics=statistics) -> float:
            a, b = statistics
            root = sqrtm(a["sigma"] @ b["sigma"])
            means = np.square(a["mu"] - b["mu"]).sum()
            return float(
                means + np.trace(a["sigma"]) + np.trace(b["sigma"]) - 2 * np.trace(root).real
            )

        rivals = {"ours": ours, "torch-fidelity": fidelity}
        if n >= DIM:  # a product without full rank has no root for scipy
            rivals["scipy sqrtm"] = scipys
        values: dict[str, float] = {}
        taken = seconds({name: keeping(values, name, rival) for name, rival in rivals.items()}, 3)
        for name in rivals:
            off = abs(values[name] / values["ours"] - 1)
            figures = [
                f"{median(taken[name]):.2f}",
                ratio(taken, name, "ours"),
                f"{values[name]:.10f}",
                f"{off:.0e}",
            ]
            lines.append([f"{name}, N = {n:,}", *figures])
    head = [f"Fréchet distance, {DIM}-d", "s", "times ours", "value", "relative difference"]
    keep(
        "Evaluation: Fréchet distance",
        "python -m benchmarks.evaluation distance",
        table(head, lines),
    )


def peak_mib() -> float:
    """Largest resident size of this process since it was started. (getrusage's also counts that of
    its parent before exec, which hides a small child.)"""
    return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def memory_of(path: Path, n: int) -> None:
    """Print MiB beyond the first batch, of 2048 features and moments of n images in a file."""
    torch.manual_seed(0)
    network = Classifier(8, DIM, 10).eval()
    moments, before = Moments.empty(DIM), 0.0
    with torch.no_grad():
        for batch in npz_batches(path, 100, n):
            moments.update(network.features(to_float(batch.images)))
            before = before or peak_mib()
    print(peak_mib() - before)


def memory() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "images.npz"
        np.savez(
            path,
            arr_0=np.random.default_rng(0).integers(
                0, 256, (max(COUNTS), 64, 64, 3), dtype=np.uint8
            ),
        )
        lines = []
        for n in COUNTS:
            mib = float(in_fresh_process("benchmarks.evaluation", "memory-of", str(path), str(n)))
            lines.append(
                [
                    f"{n:,} images of 64 px",
                    f"{mib:.0f}",
                    f"{n * 64 * 64 * 3 / 2**20:.0f}",
                    f"{n * DIM * 4 / 2**20:.0f}",
                ]
            )
    head = [
        "fresh process each",
        "MiB beyond the first batch",
        "MiB of the pixels",
        "MiB of all features",
    ]
    keep(
        "Evaluation: memory of moments",
        "python -m benchmarks.evaluation memory",
        table(head, lines),
    )


def noisy(images: Tensor, levels: float) -> Tensor:
    """Normal noise of this deviation, in levels of 255. (B, 3, H, W) uint8."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + levels * noise).round().clamp(0, 255).byte()


def blurred(images: Tensor, times: int) -> Tensor:
    """A mean over 3 x 3 pixels, so many times. (B, 3, H, W) uint8."""
    maps = images.float()
    for _ in range(times):
        maps = F.avg_pool2d(F.pad(maps, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return maps.round().byte()


def sensitivity(folder: Path) -> None:
    """Held-out images, harmed, against the whole train split."""
    extractor = InDomain(folder)
    train, held_out = (open_split(extractor.config.data, split) for split in ("train", "held_out"))

    def features(images: Tensor) -> Tensor:
        return torch.cat([extractor(part).features for part in images.split(250)])

    reference = Moments.empty(extractor.dim)
    for places in torch.arange(len(train)).split(250):
        reference.update(extractor(load(train, places)).features)
    target = Gaussian.of_moments(reference)
    images, labels = load(held_out, torch.arange(len(held_out))), held_out.labels
    n, classes = len(images), held_out.num_classes
    shuffled = torch.randperm(n, generator=torch.Generator().manual_seed(0))

    def without(dropped: int) -> Tensor:
        return images[labels >= dropped]

    def copies(times: int) -> Tensor:
        return images[shuffled[: n // times]].repeat(times, 1, 1, 1)

    harmed = {"as they are": images}
    harmed |= {f"noise of {levels} levels": noisy(images, levels) for levels in (4, 16, 64)}
    harmed |= {
        f"blur, {times} pass" + "es" * (times > 1): blurred(images, times) for times in (1, 2, 4)
    }
    harmed |= {f"{dropped} of {classes} classes dropped": without(dropped) for dropped in (1, 2, 5)}
    harmed |= {
        f"{n // times:,} images, {times} times each": copies(times) for times in (10, 40, 100)
    }
    lines, clean = [], None
    for name, pictures in harmed.items():
        found = frechet_distance(Gaussian.of_features(features(pictures)), target)
        clean = clean or found
        lines.append([name, f"{len(pictures):,}", f"{found:.3f}", f"{found / clean:.1f}"])
    head = [
        f"{held_out.name}, held-out images",
        "N",
        f"FD[{tag(extractor)}] to {len(train):,} train images",
        "times clean",
    ]
    keep(
        "Evaluation: sensitivity",
        f"python -m benchmarks.evaluation sensitivity {folder}",
        table(head, lines),
    )


PARTS = {"distance": distance, "memory": memory}


if __name__ == "__main__":
    if sys.argv[1:2] == ["memory-of"]:
        memory_of(Path(sys.argv[2]), int(sys.argv[3]))
    elif sys.argv[1:2] == ["sensitivity"] and len(sys.argv) == 3:
        sensitivity(Path(sys.argv[2]))
    else:
        run_parts(PARTS, sys.argv[1:])
