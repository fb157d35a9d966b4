"""Random numbers that belong to samples, not to processes: functions of (seed, step, place in the
global batch).

So a training step is the same however its batch is shared by processes and micro-batches, and a
checkpoint holds no random state. All of them are words of `training.philox`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from training import philox

GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # SplitMix64's constants, as signed integers of 64 bits
ROUNDS = ((30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64)))


def draw(
    seed: tuple[int, ...],
    positions: Tensor,
    shape: tuple[int, ...] = (),
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Uniform numbers that belong to samples of the *global* batch, (len(positions), *shape) on
    their device.

    `positions` are places within the global batch. A sample's numbers depend on the seed and its
    place alone, so they are the same however the batch is split. float32 ones lie in [0, 1), with
    24 bits; float64 ones in (0, 1), with 53.
    """
    size = math.prod(shape)
    if dtype == torch.float64:
        drawn = philox.uniform(*_owner(seed, positions), 0, size, positions * size)
    else:
        drawn = philox.short_uniform(*_owner(seed, positions), 0, size, positions * -(-size // 2))
    return drawn.view(len(positions), *shape)


def normal(seed: tuple[int, ...], positions: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers that belong to samples as those of `draw` do, (len(positions),
    *shape) float32."""
    size = math.prod(shape)
    drawn = philox.normal(*_owner(seed, positions), 1, size, positions * -(-size // 2))
    return drawn.view(len(positions), *shape)


def _owner(seed: tuple[int, ...], positions: Tensor) -> tuple[int, Tensor]:
    """Samples of a batch have successive parts of one sequence: on the CPU that is one call for all
    of them."""
    return mix(*seed), torch.zeros_like(positions)


def mix(*numbers: int) -> int:
    """Several integers to one 63-bit seed (SplitMix64 over the sequence, Steele et al. 2014)."""
    state = 0
    for number in numbers:
        state = (state ^ (int(number) & 0xFFFFFFFFFFFFFFFF)) & 0xFFFFFFFFFFFFFFFF
        state = (state + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state = z ^ (z >> 31)
    return state & 0x7FFFFFFFFFFFFFFF


@contextlib.contextmanager
def samples(seed: tuple[int, ...], positions: Tensor) -> Iterator[None]:
    """Inside, what a `Stream` gives belongs to the samples at these places of the global batch,
    (B,) int64.

    It must span the backward pass too, where activations may be computed again.
    """
    global _samples
    outside, _samples = (
        _samples,
        torch.stack([torch.full_like(positions, mix(*seed)), positions], 1),
    )
    try:
        yield
    finally:
        _samples = outside


# (B, 2) int64: a number of the step, and each sample's place in the global batch
_samples: Tensor | None = None


class Stream(nn.Module):
    """Where a module's random numbers come from: functions of (seed, step, place in the global
    batch, stream).

    They depend neither on how the batch is split nor on what was drawn before, and are the same
    when activations are computed again. Outside `samples`, torch's global generator decides.
    """

    def __init__(self) -> None:
        super().__init__()
        # A tensor, so that a compiled network is one for all numbers.
        self.register_buffer("number", torch.zeros((), dtype=torch.int64), persistent=False)

    def keys(self, batch: int, count: int = 1) -> Tensor:
        """(batch * count, 2) int64: `count` for each of the samples, one after another. A key is a
        sequence of numbers, and which part of it."""
        if _samples is None:
            owner = torch.randint(1 << 62, (1,), device=self.number.device).expand(batch)
            places = torch.arange(batch, device=self.number.device)
        else:
            assert len(_samples) == batch, f"{batch} rows for {len(_samples)} samples"
            owner, places = scramble_(_samples[:, 0] + self.number * GOLDEN), _samples[:, 1]
        places = places[:, None] * count + torch.arange(count, device=places.device)
        return torch.stack([owner[:, None].expand(-1, count), places], -1).flatten(0, 1)


def number_streams(module: nn.Module) -> None:
    """Give each stream within a module a number of its own."""
    for number, stream in enumerate(part for part in module.modules() if isinstance(part, Stream)):
        stream.number.fill_(number + 1)


class Dropout(nn.Module):
    """Dropout (Srivastava et al. 2014) whose masks belong to samples, the first axis; shares are of
    1 / 65536."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.dropped = round(share * 65536)
        self.stream = Stream()

    def forward(self, features: Tensor) -> Tensor:
        """(B, ...)"""
        if not (self.training and self.dropped):
            return features
        size = math.prod(features.shape[1:])
        drawn = words(self.stream.keys(len(features)), -(-size // 4)).view(torch.int16)[:, :size]
        mask = (drawn >= self.dropped - 32768).view(features.shape)
        return torch.where(mask, features, 0.0) * (65536 / (65536 - self.dropped))


def uniform(keys: Tensor, count: int) -> Tensor:
    """(N, 2) keys of a `Stream` -> (N, count) float32 in (0, 1); a row depends on its key only."""
    owner, part = keys.unbind(1)
    first = part * -(-count // 2)  # two numbers are made of each word
    return philox.short_uniform(0, owner.contiguous(), 0, count, first, above_zero=True)


def words(keys: Tensor, count: int) -> Tensor:
    """(N, 2) keys of a `Stream` -> (N, count) int64, all bits random."""
    owner, part = keys.unbind(1)
    return philox.words(0, owner.contiguous(), 0, count, part * count)


def scramble_(z: Tensor) -> Tensor:
    """What SplitMix64 makes of its state: int64, in place."""
    for shift, factor in ROUNDS:
        z.bitwise_xor_((z >> shift).bitwise_and_((1 << 64 - shift) - 1)).mul_(factor)
    return z.bitwise_xor_((z >> 31).bitwise_and_((1 << 33) - 1))
