"""Exact nearest codes on a device without the fused kernel, in plain torch operations: a short list
in fp32.

For GPUs before NVIDIA's Ampere, ROCm, XPU, MPS, and Windows. What fp32 may be wrong by has the
CPU's bound, of `search_on_cpu.Book`: codes within it of a row's lowest score can be the nearest.
Mostly that is one code. Several are compared in float64; where more than KEPT can be, or fp32
cannot hold the numbers, the row is searched in float64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tokenizer.quantizers import search_on_cpu
from tokenizer.quantizers.search_on_cpu import TILE, Book

KEPT = 8  # codes of a row that are compared in float64
SEVERAL, MANY, DECIDED = 0, 1, 2  # how many codes of a row can be the nearest; in the order of work


class ShortList(NamedTuple):
    # (n, KEPT) int64, of the lowest scores in fp32, ascending; -1 for a row that is not finite
    codes: Tensor
    listed: Tensor  # (n, KEPT) bool, whether it can be the nearest
    state: Tensor  # (n,) int64


def has_float64(device: torch.device) -> bool:
    """Apple's GPUs have none, and of Intel's not all do."""
    if device.type == "xpu":
        return torch.xpu.get_device_properties(device).has_fp64
    return device.type != "mps"


def nearest_listed(features: Tensor, codebook: Tensor, offsets: Tensor | None) -> Tensor:
    """One search in fp32 as of `search.nearest`, (N, D), (K, D), (K,) -> (N,). The host waits once:
    how many are open?

    What a device without float64 leaves open is decided on the CPU. Beyond its inputs it holds a
    copy of the codebook and BUDGET scores.
    """
    if not len(features):
        return features.new_empty(0, dtype=torch.int64)
    book = Book.of(codebook, offsets)
    centred = codebook.new_zeros(len(book.offsets), codebook.shape[1])
    for places, part in book.parts():
        centred[places] = part
    at_once = max(1, search_on_cpu.BUDGET // len(book.offsets))
    with search_on_cpu.full_precision():
        parts = [_short_list(rows, book, centred) for rows in features.split(at_once)]
    del centred
    short = ShortList(*map(torch.cat, zip(*parts)))
    order = short.state.argsort()
    several, many = torch.stack([(short.state == kind).sum() for kind in (SEVERAL, MANY)]).tolist()

    codes, here = short.codes[:, 0].clone(), features.device
    there = here if has_float64(here) else torch.device("cpu")
    for rows in order[:several].split(
        max(1, search_on_cpu.BUDGET // (4 * KEPT * features.shape[1]))
    ):
        pairs = short.codes[rows], short.listed[rows]
        those = pairs[0].clamp(max=len(codebook) - 1)
        offset = None if offsets is None else offsets[those].to(there)
        inputs = (part.to(there) for part in (features[rows], codebook[those], *pairs))
        codes[rows] = _decide(*inputs, offset).to(here)
    if many:
        rows = order[several : several + many]
        offset = None if offsets is None else offsets.to(there)
        whole = search_on_cpu.in_float64 if there == here else search_on_cpu.on_cpu
        codes[rows] = whole(features[rows].to(there), codebook.to(there), offset).to(here)
    return codes


def _short_list(rows: Tensor, book: Book, centred: Tensor) -> ShortList:
    """rows (n, D), centred (K', D) codes, of which what fills up the last tile is 0."""
    z = book.centre(rows)
    limits = 2 * book.rounding(torch.linalg.vector_norm(z, dim=1))
    tiles = torch.addmm(book.offsets, z, centred.T, alpha=-1).unflatten(1, (-1, TILE))
    # The KEPT + 1 lowest scores lie in those tiles, of as many, whose lowest are lowest.
    tile = tiles.amin(2).topk(min(KEPT + 1, tiles.shape[1]), largest=False).indices
    near = tiles.gather(1, tile[..., None].expand(-1, -1, TILE)).flatten(1)
    scores, place = near.topk(KEPT + 1, largest=False)
    codes = tile.gather(1, place // TILE) * TILE + place % TILE
    limits = (scores[:, 0] + limits)[:, None]
    listed = scores <= limits
    count, finite = listed.sum(1), rows.isfinite().all(1)
    short = (count <= KEPT) & limits[
        :, 0
    ].isfinite()  # it is not where fp32 cannot hold the numbers
    state = torch.where(count > 1, SEVERAL, DECIDED).where(short, MANY).where(finite, DECIDED).int()
    return ShortList(codes.where(finite[:, None], -1)[:, :KEPT], listed[:, :KEPT], state)


def _decide(
    rows: Tensor, near: Tensor, codes: Tensor, listed: Tensor, offsets: Tensor | None
) -> Tensor:
    """The lowest listed code of the least score in float64: (n, D), (n, KEPT, D), (n, KEPT) thrice
    -> (n,)."""
    z, e = rows.double()[:, None], near.double()
    scores = (z - e).square_().sum(2) / 2 if offsets is None else offsets.double() - (z * e).sum(2)
    scores = scores.where(listed, torch.inf)
    return codes.where(scores == scores.amin(1, keepdim=True), torch.iinfo(torch.int64).max).amin(1)
