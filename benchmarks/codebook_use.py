"""How much of a codebook held-out images use, by metric, fit and dimension: of an encoder's
features alone.

python -m benchmarks.codebook_use RUN      a tokenizer's run with a frozen encoder and normalised latents
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import tokenizer
from benchmarks.measure import keep, table
from tokenizer.data.dataset import open_split
from tokenizer.quantizers import search
from tokenizer.quantizers.kmeans import common, kmeans
from tokenizer.run import load_config


@torch.no_grad()
def features_of(run: Path, split: str) -> Tensor:
    """(images, positions, C), what the quantizer is given before its projection."""
    model, images = tokenizer.load(run), open_split(load_config(run).data, split)
    parts = []
    for start in range(0, len(images), 40):
        keys = [(0, index) for index in range(start, min(start + 40, len(images)))]
        parts.append(model.normaliser(model.encoder(images.gather(keys)["images"])).flatten(2).mT)
    return torch.cat(parts)


def fitted(features: Tensor, num_codes: int, fit: str, cosine: bool) -> Tensor:
    """Codes (K, C) for features (images, positions, C)."""
    rows = features.flatten(0, 1)
    if fit == "k-means":
        return kmeans(rows, num_codes, seed=0, cosine=cosine)
    if fit == "common":
        images = torch.arange(len(features)).repeat_interleave(features.shape[1])
        return common(rows, num_codes, 0, images, cosine=cosine)
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:num_codes]]


def use(rows: Tensor, codes: Tensor) -> list[str]:
    """Percent of the codes that are met, and their perplexity."""
    share = torch.bincount(search.nearest(rows, codes), minlength=len(codes)).double() / len(rows)
    perplexity = torch.special.entr(share).sum().exp()
    return [f"{100 * float((share > 0).double().mean()):.1f}", f"{float(perplexity):,.0f}"]


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python -m benchmarks.codebook_use RUN")
    train, held_out = (features_of(Path(sys.argv[1]), split) for split in ("train", "held_out"))
    rows = train.flatten(0, 1)
    directions = torch.linalg.eigh(rows.T @ rows / len(rows)).eigenvectors.flip(1)
    lines = []
    for num_codes, cosine, fit, dim in (
        (4096, False, "at random", 0),
        (4096, False, "k-means", 0),
        (4096, False, "common", 0),
        (4096, True, "at random", 0),
        (4096, True, "k-means", 0),
        (4096, True, "common", 0),
        (16384, True, "at random", 0),
        (16384, True, "k-means", 0),
        (16384, True, "common", 0),
        (16384, True, "at random", 32),
        (16384, True, "at random", 16),
        (16384, True, "at random", 8),
    ):
        given, seen = (part @ directions[:, :dim] if dim else part for part in (train, held_out))
        if cosine:
            given, seen = F.normalize(given, dim=2), F.normalize(seen, dim=2)
        codes = fitted(given, num_codes, fit, cosine)
        what = f"{fit}, {'cosine' if cosine else 'L2'}, {dim or train.shape[2]} dimensions"
        lines.append([what, f"{num_codes:,}", *use(seen.flatten(0, 1), codes)])
    head = ["codes fitted to training features", "K", "used on held-out images, %", "perplexity"]
    keep(
        "Codebook: use on held-out images",
        "python -m benchmarks.codebook_use RUN",
        table(head, lines),
    )


if __name__ == "__main__":
    main()
