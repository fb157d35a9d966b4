"""Stateless order of training items: a function of (seed, step), shared evenly by ranks and micro-batches."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from training import distributed
from training.command import UserError
from training.loop import Batch

Key = tuple[int, int]  # (epoch, index): what an item and its augmentation depend on


class Keyed(Protocol):
    """A map-style data set that gives whole batches."""

    def __len__(self) -> int: ...

    def gather(self, keys: list[Key]) -> dict[str, Tensor]: ...  # each (B, ...)


@functools.lru_cache(maxsize=2)  # a batch may straddle two epochs
def permutation(num_items: int, seed: int, epoch: int) -> Tensor:
    """The order of one epoch, (num_items,) int64."""
    generator = torch.Generator().manual_seed(distributed.mix(seed, epoch))
    return torch.randperm(num_items, generator=generator)


def keys_of_step(num_items: int, batch_size: int, seed: int, step: int) -> list[Key]:
    """The global batch of a step: places step·B … step·B + B - 1 of the endless stream of epochs.

    Each epoch holds each item once, also when the batch size does not divide the number of items.
    """
    keys: list[Key] = []
    while len(keys) < batch_size:
        epoch, start = divmod(step * batch_size + len(keys), num_items)
        stop = start + batch_size - len(keys)
        keys += [(epoch, index) for index in permutation(num_items, seed, epoch)[start:stop].tolist()]
    return keys


def feed(
    dataset: Keyed, batch_size: int, seed: int, accumulate: int = 1, workers: int = 0
) -> Callable[[int], Iterator[list[Batch]]]:
    """The training loop's `batches`: from a step on, this rank's micro-batches of each step, without end.

    Rank r of W takes places [rB/W, (r+1)B/W) of the global batch of B, in `accumulate` equal parts. What a
    place holds depends on neither W nor `accumulate` nor `workers` (processes that read ahead; 0 reads in
    this one). Raises UserError when B cannot be shared evenly or the data set is empty.
    """
    world, rank = distributed.world(), distributed.rank()
    micro, rest = divmod(batch_size, world * accumulate)
    if rest or micro == 0:
        raise UserError(
            f"loop.batch_size={batch_size} cannot be shared evenly by {world} processes x "
            f"loop.accumulate={accumulate}: make it a multiple of {world * accumulate}"
        )
    if len(dataset) == 0:
        raise UserError("the data set has no items to train on")
    first = rank * accumulate * micro
    shares = [torch.arange(start, start + micro) for start in range(first, first + accumulate * micro, micro)]

    def keys_from(start_step: int) -> Iterator[list[Key]]:
        for step in itertools.count(start_step):
            keys = keys_of_step(len(dataset), batch_size, seed, step)
            yield from (keys[share[0] : share[-1] + 1] for share in shares)

    def batches(start_step: int) -> Iterator[list[Batch]]:
        if workers:
            parts = iter(_loader(dataset, keys_from(start_step), workers))
        else:
            parts = map(dataset.gather, keys_from(start_step))
        try:
            while True:
                yield [Batch(_checked(next(parts)), share) for share in shares]
        finally:
            del parts  # ends the workers now: an error's traceback would keep them

    return batches


def _loader(dataset: Keyed, keys: Iterator[list[Key]], workers: int) -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(
        _Gathered(dataset),
        batch_sampler=keys,
        num_workers=workers,
        collate_fn=lambda batch: batch,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # the loader must not draw from the loop's
    )


class _Gathered(torch.utils.data.Dataset):
    """`gather` under the name that DataLoader calls."""

    def __init__(self, dataset: Keyed):
        self.dataset = dataset

    def __getitems__(self, keys: list[Key]) -> Any:
        try:
            return self.dataset.gather(keys)
        except UserError as error:  # travels as a value: DataLoader would bury the line in a traceback
            return error


def _checked(gathered: Any) -> dict[str, Tensor]:
    if isinstance(gathered, UserError):
        raise gathered
    return gathered
