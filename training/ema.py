"""Exponential moving average of a module's parameters *and* buffers (an averaged codebook is a
buffer)."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from training import distributed, sharding
from training.outcome import Taken, undone_unless


class Ema:
    """A frozen copy of `source` that follows it with `decay`, faster at first: min(decay, (1 +
    t)/(10 + t)).

    Submodules with a method `follow(source)` are told of each update, to take at once what must not
    be averaged.
    """

    def __init__(self, source: nn.Module, decay: float) -> None:
        self.source, self.decay = source, decay
        self.module = copy.deepcopy(source).eval().requires_grad_(False)
        self._unshared: nn.Module | None = (
            None  # of a sharded source, where to put the whole average
        )
        trainable = [
            name for name, parameter in source.named_parameters() if parameter.requires_grad
        ]
        state = source.state_dict()
        self.buffers = [name for name, _ in source.named_buffers() if name in state]
        self.averaged = trainable + [
            name for name in self.buffers if state[name].is_floating_point()
        ]

    def share(self, device: torch.device) -> None:
        """After the source was sharded: keep only its parts. The average is to be on the CPU until
        now."""
        if distributed.is_main():
            self._unshared = copy.deepcopy(self.module)
        theirs = self.source.state_dict()
        for name, parameter in self.module.named_parameters():
            parameter.data = sharding.part(parameter.data, theirs[name])
        self.module.to(device)

    @torch.no_grad()
    def update(self, step: int, taken: Taken = True) -> None:
        """Move towards the source after optimizer step `step`, counted from 0, if it was taken."""
        if taken is False:
            return
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        ours = self.module.state_dict()
        theirs = {name: sharding.local(tensor) for name, tensor in self.source.state_dict().items()}
        _lerp_([ours[n] for n in self.averaged], [theirs[n] for n in self.averaged], weight, taken)
        counters = [
            name for name in self.buffers if not theirs[name].is_floating_point()
        ]  # and flags
        parts = [
            pair
            for pair in zip(self.module.modules(), self.source.modules())
            if hasattr(pair[0], "follow")
        ]
        followers = [tensor for part, _ in parts for tensor in part.state_dict().values()]
        with undone_unless(taken, [*(ours[name] for name in counters), *followers]):
            for name in counters:
                ours[name].copy_(theirs[name])
            for part, source in parts:
                part.follow(source)

    def state_dict(self) -> dict[str, Tensor]:
        """The whole average: on rank 0 alone where the source is sharded. Collective."""
        theirs = self.source.state_dict()
        return {
            name: sharding.whole(tensor, theirs[name])
            for name, tensor in self.module.state_dict().items()
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Of a whole average, which every process has."""
        theirs = self.source.state_dict()
        parts = {
            name: sharding.part(t, theirs[name]) if name in theirs else t
            for name, t in state.items()
        }
        self.module.load_state_dict(parts)

    @contextlib.contextmanager
    def whole(self, device: torch.device) -> Iterator[nn.Module]:
        """The averaged module, on a device: on rank 0, where the source is sharded; others get
        their parts. Collective.

        Sharded, it is as it was when the block began, and back on the CPU when it ends.
        """
        state = self.state_dict()
        if self._unshared is None:
            yield self.module
            return
        self._unshared.load_state_dict(state)
        try:
            yield self._unshared.to(device)
        finally:
            self._unshared.to("cpu")


def _lerp_(ours: list[Tensor], theirs: list[Tensor], weight: float, taken: Taken) -> None:
    """ours += weight * (theirs - ours), if `taken`."""
    if isinstance(taken, bool):
        torch._foreach_lerp_(ours, theirs, weight)
        return
    differences = torch._foreach_sub(theirs, ours)
    torch._foreach_mul_(differences, torch.where(taken, weight, 0.0))
    torch._foreach_add_(ours, differences)
