"""Where random numbers come from: Philox4x64-10 (Salmon et al. 2011, "Parallel Random Numbers: As
Easy as 1, 2, 3").

A number has no history: it is a function of a key, here (seed, id), and of a counter, here (place,
stream). So a row of a batch meets the same numbers in any batch, at any place in it, on any device.
Words and uniform numbers are the same to the bit on every device; what goes through a logarithm,
sine or cosine may differ by a rounding.

A row of `words` is what `numpy.random.Philox(key=[seed, id], counter=[0, 0, 0, stream])` gives: on
the CPU numpy makes it, on a CUDA device a Triton kernel (training.philox_kernel), anywhere else
torch's integer operations.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

LOW = (1 << 32) - 1
FACTORS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)  # of the rounds
RAISES = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)  # of the key, from round to round
ROUNDS = 10
PIECE = 1 << 18  # words that `normal` has in hand at a time, or one row of them
# the state of numpy's generator when it has drawn nothing, without its counter and key
EMPTY = {
    "bit_generator": "Philox",
    "buffer": np.zeros(4, np.uint64),
    "buffer_pos": 4,
    "has_uint32": 0,
    "uinteger": 0,
}


def words(seed: int, ids: Tensor, stream: int, count: int, first: Tensor | None = None) -> Tensor:
    """(N, count) int64, all bits random, on the device of `ids` (N,) int64; a row depends on its
    own id only.

    `first` (N,) int64 from 0 says from which place on a row's numbers are wanted; 0 without it.
    Seed and stream lie from 0 to 2^63 - 1.
    """
    # As an operator where it may be traced, by torch.compile or with fake tensors, which no kernel
    # can be given.
    traced = torch.compiler.is_compiling() or ids.device.type == "cuda"
    make = torch.ops.tessera.philox if traced else _words
    return make(ids, seed, stream, count, first)


def uniform(seed: int, ids: Tensor, stream: int, count: int, first: Tensor | None = None) -> Tensor:
    """(N, count) float64 in (0, 1): the upper 53 bits of `words`, where 0 becomes the smallest
    normal number."""
    if ids.device.type == "cpu":
        rows = np.empty((len(ids), count))
        for span in _runs(seed, ids, stream, count, first):
            HOST.generator.random(out=rows[span].reshape(-1))
        numbers = torch.from_numpy(rows)
    else:
        drawn = words(seed, ids, stream, count, first)
        numbers = drawn.bitwise_right_shift_(11).bitwise_and_((1 << 53) - 1).double().mul_(2.0**-53)
    return numbers.clamp_min_(torch.finfo(torch.float64).tiny)


def short_uniform(
    seed: int,
    ids: Tensor,
    stream: int,
    count: int,
    first: Tensor | None = None,
    *,
    above_zero: bool = False,
) -> Tensor:
    """(N, count) float32 in [0, 1), multiples of 2^-24: two numbers of each of `words`. `first`
    counts words.

    `above_zero`: in (0, 1), odd multiples of 2^-24, for what takes their logarithm.
    """
    halves = words(seed, ids, stream, -(-count // 2), first).view(torch.int32)[:, :count]
    if above_zero:
        return ((halves & 0x7FFFFF).float() + 0.5) * 2**-23
    return ((halves >> 8) & 0xFFFFFF).float() * 2.0**-24


def normal(seed: int, ids: Tensor, stream: int, count: int, first: Tensor | None = None) -> Tensor:
    """(N, count) float32 from the standard normal distribution, two from each of `words`. `first`
    counts words.

    By the inverse of its distribution function, from 32 bits: half of them for each side, which
    reach 5.4 deviations.
    """
    out, num_words = torch.empty(len(ids), count, device=ids.device), -(-count // 2)
    starts, height = (
        torch.zeros_like(ids) if first is None else first,
        max(1, PIECE // max(1, num_words)),
    )
    for rows in (slice(row, row + height) for row in range(0, len(ids), height)):
        drawn = words(seed, ids[rows], stream, num_words, starts[rows]).view(torch.int32)[:, :count]
        torch.mul(drawn, 2.0**-31 * (1 - 2.0**-24), out=out[rows])  # in (-1, 1)
        out[rows].erfinv_().mul_(math.sqrt(2))
    return out


def _words(ids: Tensor, seed: int, stream: int, count: int, first: Tensor | None) -> Tensor:
    if not (len(ids) and count):
        return ids.new_empty(len(ids), count)
    if ids.device.type == "cpu":
        rows = np.empty((len(ids), count), np.uint64)
        for span in _runs(seed, ids, stream, count, first):
            drawn = HOST.philox.random_raw((span.stop - span.start) * count).reshape(-1, count)
            if len(drawn) == len(rows):
                return torch.from_numpy(drawn.view(np.int64))
            rows[span] = drawn
        return torch.from_numpy(rows.view(np.int64))
    if ids.device.type == "cuda":
        from training import philox_kernel

        if philox_kernel.AVAILABLE:
            return philox_kernel.words(ids, seed, stream, count, first)
    return in_torch(ids, seed, stream, count, first)


_philox = torch.library.custom_op(
    "tessera::philox", _words, mutates_args=()
)  # opaque to torch.compile


@_philox.register_fake
def _(ids: Tensor, seed: int, stream: int, count: int, first: Tensor | None) -> Tensor:
    return ids.new_empty(len(ids), count)


class _Host(threading.local):
    """numpy's generator, of each thread: making one reads the system's entropy."""

    def __init__(self) -> None:
        self.philox = np.random.Philox(0)
        self.generator = np.random.Generator(self.philox)


HOST = _Host()


def _runs(seed: int, ids: Tensor, stream: int, count: int, first: Tensor | None) -> Iterator[slice]:
    """Rows that follow one another in one sequence, with the thread's generator set to where they
    begin."""
    owners, starts = (
        ids.numpy().view(np.uint64),
        np.zeros(len(ids), np.int64) if first is None else first.numpy(),
    )
    begins = np.ones(len(ids) + 1, bool)
    begins[1:-1] = (owners[1:] != owners[:-1]) | (starts[1:] != starts[:-1] + count)
    edges = begins.nonzero()[0].tolist()
    counter, key = np.array([0, 0, 0, stream], np.uint64), np.array([seed, 0], np.uint64)
    state = {**EMPTY, "state": {"counter": counter, "key": key}}
    for begin, end in itertools.pairwise(edges):
        counter[0], key[1] = starts[begin] // 4, owners[begin]  # four words for each count
        HOST.philox.state = state
        if starts[begin] % 4:
            HOST.philox.random_raw(int(starts[begin] % 4), output=False)
        yield slice(begin, end)


def in_torch(ids: Tensor, seed: int, stream: int, count: int, first: Tensor | None) -> Tensor:
    """`words` on any device: unsigned integers of 64 bits in signed ones, whose sums and products
    wrap alike."""
    num_blocks = -(-count // 4) + (first is not None)  # of four words
    places = torch.arange(
        1, num_blocks + 1, device=ids.device
    )  # numpy's generator counts before it draws
    counters = places.expand(len(ids), -1) if first is None else (first // 4)[:, None] + places
    out = block(seed, ids[:, None], (counters, 0, 0, stream)).flatten(1)
    if first is not None:
        out = out.gather(1, (first % 4)[:, None] + torch.arange(count, device=ids.device))
    return out[:, :count].contiguous()


def block(seed: int, ids: Tensor, counter: tuple[Tensor | int, ...]) -> Tensor:
    """(..., 4) int64, Philox4x64-10 of the key (seed, ids) and the four words of the counter, which
    broadcast."""
    a, b, c, d = (
        torch.full((), _signed(word), device=ids.device) if isinstance(word, int) else word
        for word in counter
    )  # filled there: nothing is copied from the host
    for turn in range(ROUNDS):
        high_a, low_a = _product(FACTORS[0], a)
        high_c, low_c = _product(FACTORS[1], c)
        a, c = (
            high_c ^ b ^ _signed(seed + turn * RAISES[0]),
            high_a ^ d ^ (ids + _signed(turn * RAISES[1])),
        )
        b, d = low_c, low_a
    return torch.stack(torch.broadcast_tensors(a, b, c, d), -1)


def _product(factor: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """The upper and the lower 64 bits of a product of unsigned integers, by halves of 32 bits."""
    low, high = x & LOW, (x >> 32) & LOW
    factor_low, factor_high = factor & LOW, factor >> 32
    middle = high * factor_low + ((low * factor_low >> 32) & LOW)  # below 2^64
    other = low * factor_high + (middle & LOW)
    return high * factor_high + ((middle >> 32) & LOW) + ((other >> 32) & LOW), x * _signed(factor)


def _signed(number: int) -> int:
    """An integer modulo 2^64, as a signed one."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)
