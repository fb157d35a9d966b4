"""Exponential moving average of a module's parameters *and* buffers (an averaged codebook is a buffer)."""

from __future__ import annotations

import copy

import torch
from torch import nn


class Ema:
    """A frozen copy of `source` that follows it with `decay`, faster at first: min(decay, (1 + t)/(10 + t)).

    Submodules with a method `follow(source)` are told of each update, to take at once what must not be averaged.
    """

    def __init__(self, source: nn.Module, decay: float) -> None:
        self.source, self.decay = source, decay
        self.module = copy.deepcopy(source).eval().requires_grad_(False)
        trainable = [name for name, parameter in source.named_parameters() if parameter.requires_grad]
        state = source.state_dict()
        self.buffers = [name for name, _ in source.named_buffers() if name in state]
        self.averaged = trainable + [name for name in self.buffers if state[name].is_floating_point()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the source after optimizer step `step`, counted from 0."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        ours, theirs = self.module.state_dict(), self.source.state_dict()
        torch._foreach_lerp_([ours[n] for n in self.averaged], [theirs[n] for n in self.averaged], weight)
        for name in self.buffers:
            if not theirs[name].is_floating_point():  # flags and counters
                ours[name].copy_(theirs[name])
        for ours, theirs in zip(self.module.modules(), self.source.modules()):
            if hasattr(theirs, "follow"):
                ours.follow(theirs)
