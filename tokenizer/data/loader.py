"""Stateless order of training items: a function of (seed, step), shared evenly by ranks and
micro-batches.

Epochs of up to 2^24 items are drawn as a table, exactly uniform. Larger ones are enciphered: a
Feistel network (Luby & Rackoff 1988) over the next power of four, walked along its cycles until it
lands on an item (Black & Rogaway 2002), gives any place of the order without memory or a start, and
still each item once.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import signal
import threading
from collections.abc import Callable, Generator, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from tokenizer.data.skipped import Findings, Skipped
from training import distributed, randomness
from training.errors import UserError
from training.loop import Batch
from training.signals import WORKER_GRACE

Key = tuple[int, int]  # (epoch, index): what an item and its augmentation depend on
LARGEST_TABLE = 2**24  # items; 134 MB and about a second per epoch
FEISTEL_ROUNDS = 6
STOPS = (signal.SIGTERM, signal.SIGINT)


class Keyed(Protocol):
    """A map-style data set that gives whole batches. One of files has `skipped`, a
    `tokenizer.data.skipped.Skipped`."""

    def __len__(self) -> int: ...

    def gather(self, keys: list[Key]) -> dict[str, Tensor]: ...  # each (B, ...)


def order(num_items: int, seed: int, epoch: int, start: int, stop: int) -> list[int]:
    """Items at the places [start, stop) of an epoch's order."""
    if num_items <= LARGEST_TABLE:
        return permutation(num_items, seed, epoch)[start:stop].tolist()
    return encipher(
        np.arange(start, min(stop, num_items)), num_items, randomness.mix(seed, epoch)
    ).tolist()


@functools.lru_cache(maxsize=2)  # a batch may straddle two epochs
def permutation(num_items: int, seed: int, epoch: int) -> Tensor:
    """The order of one epoch, (num_items,) int64."""
    generator = torch.Generator().manual_seed(randomness.mix(seed, epoch))
    return torch.randperm(num_items, generator=generator)


def encipher(places: np.ndarray, num_items: int, seed: int) -> np.ndarray:
    """Places (n,) in [0, num_items) -> where a permutation that only the seed decides puts them,
    (n,) int64."""
    half = np.uint64(max(1, -(-(num_items - 1).bit_length() // 2)))  # bits
    mask = (np.uint64(1) << half) - np.uint64(1)
    rounds = np.array([randomness.mix(seed, number) for number in range(FEISTEL_ROUNDS)], np.uint64)
    values = places.astype(np.uint64)
    outside = np.ones(len(values), dtype=bool)
    while (
        outside.any()
    ):  # on average under four times: the domain is less than four times the items
        left, right = values[outside] >> half, values[outside] & mask
        for key in rounds:
            left, right = right, left ^ (_scramble(right ^ key) & mask)
        values[outside] = left << half | right
        outside = values >= num_items
    return values.astype(np.int64)


def _scramble(values: np.ndarray) -> np.ndarray:
    """uint64, of which nothing else holds the memory."""
    return randomness.scramble_(torch.from_numpy(values.view(np.int64))).numpy().view(np.uint64)


def keys_of_step(num_items: int, batch_size: int, seed: int, step: int) -> list[Key]:
    """The global batch of a step: places step·B … step·B + B - 1 of the endless stream of epochs.

    Each epoch holds each item once, also when the batch size does not divide the number of items.
    """
    keys: list[Key] = []
    while len(keys) < batch_size:
        epoch, start = divmod(step * batch_size + len(keys), num_items)
        stop = start + batch_size - len(keys)
        keys += [(epoch, index) for index in order(num_items, seed, epoch, start, stop)]
    return keys


def feed(
    dataset: Keyed, batch_size: int, seed: int, accumulate: int = 1, workers: int = 0
) -> Callable[[int], Iterator[list[Batch]]]:
    """The training loop's `batches`: from a step on, this rank's micro-batches of each step,
    without end.

    Rank r of W takes places [rB/W, (r+1)B/W) of the global batch of B, in `accumulate` equal parts.
    What a place holds depends on neither W nor `accumulate` nor `workers` (processes that read
    ahead; 0 reads in this one). Raises UserError when B cannot be shared evenly or the data set is
    empty.
    """
    micro = distributed.samples_each(batch_size, accumulate)
    if len(dataset) == 0:
        raise UserError("the data set has no items to train on")
    first = distributed.rank() * accumulate * micro
    shares = [
        torch.arange(start, start + micro)
        for start in range(first, first + accumulate * micro, micro)
    ]

    def keys_from(start_step: int) -> Iterator[list[Key]]:
        for step in itertools.count(start_step):
            keys = keys_of_step(len(dataset), batch_size, seed, step)
            yield from (keys[share[0] : share[-1] + 1] for share in shares)

    def batches(start_step: int) -> Iterator[list[Batch]]:
        with contextlib.closing(
            read(dataset, keys_from(start_step), workers, "loop.workers")
        ) as parts:
            while True:
                yield [Batch(next(parts), share) for share in shares]

    return batches


def read(
    dataset: Keyed, keys: Iterator[list[Key]], workers: int, setting: str = "workers"
) -> Generator[dict[str, Tensor]]:
    """What `dataset.gather` gives for each of the lists of keys, in order and to the bit, read
    ahead by `workers` processes, which end with this iterator; 0 reads in this one, when it is
    asked.

    Raises UserError where `gather` does, where one of the processes is gone (`setting` is what to
    lower then), and where all of them together meet too many items that cannot be read.
    """
    parts = _read_ahead(dataset, keys, workers) if workers else map(dataset.gather, keys)
    try:
        while True:
            try:
                batch = _next(parts, workers, setting)
            except StopIteration:
                return
            yield _checked(dataset, batch) if workers else batch
    finally:
        if workers:  # now: an error's traceback would keep them
            parts._shutdown_workers()


def _read_ahead(dataset: Keyed, keys: Iterator[list[Key]], workers: int) -> Iterator[Any]:
    """What `gather` gives, in order, from processes that end with this iterator."""
    loader = torch.utils.data.DataLoader(
        _Gathered(dataset),
        batch_sampler=keys,
        num_workers=workers,
        collate_fn=lambda batch: batch,
        pin_memory=distributed.gpu() is not None,
        generator=torch.Generator(),  # the loader must not draw from the loop's
        worker_init_fn=_leave_stopping_to_the_loop,
    )
    handler = signal.getsignal(signal.SIGCHLD) or signal.SIG_DFL
    before = signal.pthread_sigmask(
        signal.SIG_BLOCK, STOPS
    )  # of the processes, too, until they do not mind
    try:
        parts = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if threading.current_thread() is threading.main_thread():
        signal.signal(
            signal.SIGCHLD, handler
        )  # the loader's would raise in the middle of whatever runs, not in `next`
    return parts


def _leave_stopping_to_the_loop(worker: int) -> None:
    """A launcher signals all its processes, and the loop needs batches until its step is done and
    saved."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(WORKER_GRACE))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)


class _Gathered(torch.utils.data.Dataset):
    """`gather` under the name that DataLoader calls."""

    def __init__(self, dataset: Keyed):
        self.dataset = dataset

    def __getitems__(self, keys: list[Key]) -> tuple[Any, Findings | None]:
        skipped: Skipped | None = getattr(self.dataset, "skipped", None)
        if skipped is not None:
            skipped.tell_another()
        try:
            gathered: Any = self.dataset.gather(keys)
        except (
            UserError
        ) as error:  # travels as a value: DataLoader would bury the line in a traceback
            gathered = error
        return gathered, None if skipped is None else skipped.drain()


def _next(parts: Iterator[Any], workers: int, setting: str) -> Any:
    """What comes next; of a process that died, the UserError to raise where no traceback keeps the
    others."""
    try:
        return next(parts)
    except (RuntimeError, OSError, EOFError) as error:
        if not workers or str(error).startswith("Caught "):  # raised by `gather`, here or there
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return UserError(
            f"a process that reads images ahead is gone ({reason}): it may have lacked memory, "
            "also in /dev/shm; "
            f"lower {setting}, and run the same command again to go on"
        )


def _checked(dataset: Keyed, batch: Any) -> dict[str, Tensor]:
    if isinstance(batch, UserError):
        raise batch
    gathered, findings = batch
    if findings is not None:
        dataset.skipped.merge(findings)
    if isinstance(gathered, UserError):
        raise gathered
    return gathered
