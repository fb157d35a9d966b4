"""Philox4x64-10 in Triton: `training.philox.words` on a CUDA device, in one launch."""

from __future__ import annotations

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl

    jit = triton.jit(do_not_specialize=["seed", "stream", "count", "blocks"])
except ImportError:  # no Triton for this platform: AVAILABLE says so, and no kernel is called

    def jit(kernel):
        return kernel

    triton = tl = None

AVAILABLE = triton is not None
ROUNDS = 10  # as in training.philox
LARGEST = 256  # blocks of four words in the hands of a program


@torch.no_grad()
def words(ids: Tensor, seed: int, stream: int, count: int, first: Tensor | None) -> Tensor:
    """(N, count) int64, as `training.philox.words`."""
    out = ids.new_empty(len(ids), count)
    if not out.numel():
        return out
    size = min(LARGEST, triton.next_power_of_2(-(-count // 4) + 1))
    blocks = triton.cdiv(-(-count // 4) + (first is not None), size)  # programs for a row
    ids, starts = ids.contiguous(), ids if first is None else first.contiguous()
    with torch.cuda.device_of(ids):
        _fill[(len(ids) * blocks,)](
            out,
            ids,
            starts,
            seed,
            stream,
            count,
            blocks,
            FROM_ZERO=first is None,
            SIZE=size,
            ROUNDS=ROUNDS,
        )
    return out


@jit
def _fill(
    out,
    ids,
    starts,
    seed,
    stream,
    count,
    blocks,
    FROM_ZERO: tl.constexpr,
    SIZE: tl.constexpr,
    ROUNDS: tl.constexpr,
):
    row = tl.program_id(0) // blocks
    start = tl.zeros((), tl.int64) if FROM_ZERO else tl.load(starts + row)
    number = (tl.program_id(0) % blocks) * SIZE + tl.arange(0, SIZE).to(
        tl.int64
    )  # of a block, from the row's first
    zero = tl.zeros((SIZE,), tl.uint64)
    a = (start // 4 + 1 + number).to(tl.uint64)
    b, c, d = zero, zero, zero + stream.to(tl.uint64)
    key, other_key = zero + seed.to(tl.uint64), zero + tl.load(ids + row).to(tl.uint64)
    for _ in tl.static_range(ROUNDS):
        high_a, high_c = (
            tl.umulhi(a, zero + 0xD2E7470EE14C6C93),
            tl.umulhi(c, zero + 0xCA5A826395121157),
        )
        low_a, low_c = a * 0xD2E7470EE14C6C93, c * 0xCA5A826395121157
        a, b, c, d = high_c ^ b ^ key, low_c, high_a ^ d ^ other_key, low_a
        key += 0x9E3779B97F4A7C15
        other_key += 0xBB67AE8584CAA73B
    place = 4 * number - start % 4
    line = out + row.to(tl.int64) * count
    tl.store(line + place, a.to(tl.int64), mask=(place >= 0) & (place < count))
    tl.store(line + place + 1, b.to(tl.int64), mask=(place + 1 >= 0) & (place + 1 < count))
    tl.store(line + place + 2, c.to(tl.int64), mask=(place + 2 >= 0) & (place + 2 < count))
    tl.store(line + place + 3, d.to(tl.int64), mask=(place + 3 >= 0) & (place + 3 < count))
