"""How much of a codebook held-out images use, by metric, fitting and dimension: of an encoder's features alone.

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
from tokenizer.data.sources import open_split
from tokenizer.quantizers import search
from tokenizer.quantizers.codebook import to_rows
from tokenizer.quantizers.kmeans import segment_sums
from tokenizer.run import load_config

SMALL = 0.3  # of the mean: clusters that become halves of large ones


@torch.no_grad()
def features_of(run: Path, split: str) -> Tensor:
    """(N, C), what the quantizer is given before its projection."""
    model, images = tokenizer.load(run), open_split(load_config(run).data, split)
    parts = []
    for start in range(0, len(images), 40):
        keys = [(0, index) for index in range(start, min(start + 40, len(images)))]
        parts.append(to_rows(model.normaliser(model.encoder(images.gather(keys)["images"]))))
    return torch.cat(parts)


def lloyd(rows: Tensor, codes: Tensor, iterations: int, cosine: bool) -> Tensor:
    """Lloyd's iterations; clusters below SMALL become moved copies of the largest, but not after the last two."""
    generator = torch.Generator().manual_seed(1)
    for iteration in range(iterations):
        counts, sums = segment_sums(rows, search.nearest(rows, codes), len(codes))
        codes = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], codes)
        small = (counts < SMALL * counts.mean()).nonzero()[:, 0]
        if iteration < iterations - 2 and len(small):
            noise = torch.randn((len(small), codes.shape[1]), generator=generator)
            codes[small] = codes[counts.topk(len(small)).indices] + 0.01 * codes.std(0).mean() * noise
        codes = F.normalize(codes, dim=1) if cosine else codes
    return codes


def use(rows: Tensor, codes: Tensor) -> list[str]:
    """Percent of the codes that are met, and their perplexity."""
    share = torch.bincount(search.nearest(rows, codes), minlength=len(codes)).double() / len(rows)
    perplexity = torch.special.entr(share).sum().exp()
    return [f"{100 * float((share > 0).double().mean()):.1f}", f"{float(perplexity):,.0f}"]


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python -m benchmarks.codebook_use RUN")
    train, held_out = (features_of(Path(sys.argv[1]), split) for split in ("train", "held_out"))
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    directions = torch.linalg.eigh(train.T @ train / len(train)).eigenvectors.flip(1)
    lines = []
    for num_codes, cosine, iterations, dim in (
        (4096, False, 0, 0), (4096, False, 5, 0), (4096, True, 0, 0), (4096, True, 3, 0),
        (16384, True, 0, 0), (16384, True, 2, 0), (16384, True, 0, 32), (16384, True, 0, 16), (16384, True, 0, 8),
    ):  # fmt: skip
        rows, seen = (part @ directions[:, :dim] if dim else part for part in (train, held_out))
        if cosine:
            rows, seen = F.normalize(rows, dim=1), F.normalize(seen, dim=1)
        codes = lloyd(rows, rows[order[:num_codes]].clone(), iterations, cosine)
        what = f"{'cosine' if cosine else 'L2'}, {iterations} iterations, {dim or train.shape[1]} dimensions"
        lines.append([what, f"{num_codes:,}", *use(seen, codes)])
    head = ["codes fitted to training features", "K", "used on held-out images, %", "perplexity"]
    keep("Codebook: use on held-out images", "python -m benchmarks.codebook_use RUN", table(head, lines))


if __name__ == "__main__":
    main()
