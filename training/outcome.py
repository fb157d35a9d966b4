"""What became of a step, which the host need not wait for: whether it was taken, and who asks to
stop.

A GPU works off what the host gave it, and the host is to be ahead of it. So on a GPU a step that is
not finite is undone there, and the host reads of it when it is known: where it logs or saves, or a
step later.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from training import distributed

Taken = bool | Tensor  # of a step: a scalar on the device where the host is not to wait for it


def is_known_at_once(device: torch.device) -> bool:
    """Whether reading a number from the device costs nothing. (AdamW on Apple's has no steps that
    undo themselves.)"""
    return device.type in ("cpu", "mps")


def event(device: torch.device, **options: Any) -> Any:
    """A mark in what a GPU was given to do, just behind the last of it."""
    made = torch.get_device_module(device).Event(**options)
    made.record()
    return made


@contextlib.contextmanager
def undone_unless(taken: Taken, tensors: Sequence[Tensor]) -> Iterator[None]:
    """Around changes of tensors, in place, that are to hold only where the step was taken."""
    if isinstance(taken, bool):
        assert taken, "the host knows that there is nothing to do"
        yield
        return
    before = [tensor.detach().clone() for tensor in tensors]
    yield
    with torch.no_grad():
        for tensor, old in zip(tensors, before):
            tensor.copy_(torch.where(taken, tensor, old))


class Reading:
    """A small tensor on its way from a GPU to the host."""

    def __init__(self, tensor: Tensor) -> None:
        self.there = tensor.to("cpu", non_blocking=True)  # into pinned memory
        self.event = event(tensor.device)

    def has_come(self) -> bool:
        return self.event.query()

    def values(self) -> list[int]:
        """Waits for it."""
        self.event.synchronize()
        return self.there.tolist()


class Outcomes:
    """Steps in a row that were not taken, and what number any process asks to stop with, by all
    processes' reckoning.

    All processes call the same methods after the same steps and get the same answers: gradients are
    averaged, so that what is not finite is so for all of them. On a GPU answers are of the step
    before, unless `now`, which waits.
    """

    def __init__(self, device: torch.device, most: int) -> None:
        """`most` steps in a row that are not taken are too many."""
        self.device, self.most, self.at_once = device, most, is_known_at_once(device)
        self.in_a_row, self.end = (
            0,
            0,
        )  # as far as is known; the step that made them too many, 0 for none
        self.counts = torch.zeros(2, dtype=torch.int64, device=device)  # the same on a GPU
        self.coming: Reading | None = None

    def add(self, taken: Taken, step: int) -> None:
        """Step number `step`, counted from 1, was taken or not."""
        if isinstance(taken, bool):
            self.in_a_row = 0 if taken else self.in_a_row + 1
            self.end = self.end or step * (self.in_a_row >= self.most)
        else:
            in_a_row, end = self.counts
            in_a_row = torch.where(taken, 0, in_a_row + 1)
            end = torch.where((in_a_row >= self.most) & (end == 0), step, end)
            self.counts = torch.stack([in_a_row, end])

    def settle(self) -> None:
        """Wait until all of it is known."""
        if not self.at_once:
            self.coming = None
            self.in_a_row, self.end = self.counts.tolist()

    def agree(self, number: int, *, now: bool) -> int:
        """The largest number of any process, which is 0 where none asks to stop."""
        if self.at_once:
            return distributed.largest(number)
        if distributed.world() > 1:
            told = distributed.largest_(torch.full((1,), number, device=self.device))
            before, self.coming = self.coming, Reading(torch.cat([told, self.counts]))
            reading = self.coming if now else before
            if reading is None:
                return 0
            number, self.in_a_row, self.end = reading.values()
            return number
        if self.coming is not None and self.coming.has_come():
            (self.in_a_row, self.end), self.coming = self.coming.values(), None
        if self.coming is None:
            self.coming = Reading(self.counts)
        return number
