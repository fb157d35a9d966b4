"""A phase: one optimizer's move within a step, and what makes it, on one process or on several."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from training import batch_means, distributed, randomness, sharding
from training.log import Meter
from training.optim import OptimizerConfig
from training.outcome import Taken, is_known_at_once, undone_unless

KERNELS = ("fused", "foreach", "capturable")  # of AdamW's settings


@dataclasses.dataclass
class Loss:
    """What a phase minimises, and the named terms of it for the log."""

    total: Tensor  # scalar
    parts: dict[str, Tensor]  # scalars


@dataclasses.dataclass
class Batch:
    """Tensors by name, one row per sample."""

    tensors: dict[str, Tensor]
    positions: Tensor  # (B,) int64, each sample's place in the global batch
    extras: dict[str, Any] = dataclasses.field(
        default_factory=dict
    )  # what one phase leaves for the next

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def to(self, device: torch.device) -> Batch:
        moved = {name: _sent(tensor, device) for name, tensor in self.tensors.items()}
        return Batch(moved, _sent(self.positions, device), self.extras)


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """On the device, without waiting for it: a copy from pageable memory would."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


@dataclasses.dataclass
class Phase:
    """One optimizer's move within a step: a prior has one, a GAN tokenizer two."""

    name: str
    module: nn.Module  # its trainable parameters are what the phase moves
    loss: Callable[[Batch, int], Loss]  # (micro-batch, step), averaged over its samples
    optimizer: OptimizerConfig
    start_step: int = 0
    # Told the step and whether it was taken. Where only the GPU knows it is told that it was; if it
    # was not, what a checkpoint holds of the module's buffers, and of the parameters of parts that
    # have `follow`, is put back.
    after_step: Callable[[int, bool], None] | None = None


class PhaseRunner:
    """A phase with its optimizer, wrapped for several processes."""

    def __init__(
        self,
        phase: Phase,
        device: torch.device,
        *,
        steps: int,
        clip: float,
        low: bool,
        sharded: bool,
        compiled: bool,
    ) -> None:
        """`low`: in bf16 autocast; `sharded`: the module's blocks over all processes."""
        self.phase, self.device, self.steps, self.clip, self.low = phase, device, steps, clip, low
        self.sharded, self.at_once = sharded, is_known_at_once(device)
        randomness.number_streams(phase.module)
        self.engine: nn.Module = _Step(phase)
        if sharded:
            sharding.shard_(self.engine, device)
        else:
            phase.module.to(device)
        if compiled:  # in place: names of parameters stay
            import torch._functorch.config

            # Losses that weigh their terms by gradients go backward several times, through buffers
            # that stay.
            torch._functorch.config.donated_buffer = False
            for module in units_of(phase.module):
                module.compile()
        self.optimizer = phase.optimizer.build(phase.module, fused=not self.at_once)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        # AdamW goes element by element, so it moves parts as it would move the whole.
        self.parts = [sharding.local(parameter) for parameter in self.parameters]
        parts = iter(self.parts)
        for group in self.optimizer.param_groups:
            group["params"] = [next(parts) for _ in group["params"]]
        self.updated = _updated(phase.module)
        if distributed.world() > 1 and not sharded:
            # Buffers are equal by construction: statistics are reduced where they are updated.
            ids = [device.index] if device.type == "cuda" else None
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore", FutureWarning
                )  # torch 2.15 renames what 2.11 does not know yet
                self.engine = DistributedDataParallel(
                    self.engine, device_ids=ids, broadcast_buffers=False
                )

    def move(self, micro_batches: list[Batch], step: int, meter: Meter, seed: int) -> Taken:
        """One optimizer step; False on every process, and nothing moved, where a loss or gradient
        is not finite."""
        self.phase.module.train()
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        whole = batch_means.WholeBatch(len(micro_batches))
        for index, batch in enumerate(micro_batches):
            final = index == len(micro_batches) - 1
            local = isinstance(self.engine, DistributedDataParallel) and not final
            sync = self.engine.no_sync() if local else contextlib.nullcontext()  # type: ignore[operator]
            with sync, randomness.samples((seed, step), batch.positions):
                loss = self._loss(batch, step, whole)
                if whole.lacking:
                    del loss  # and its graph
                    self._rehearse(micro_batches[1:], step, whole, seed)
                    loss = self._loss(batch, step, whole)
                (_spoilt(loss.total) / len(micro_batches)).backward()
            named = {f"{self.phase.name}.{name}": value for name, value in loss.parts.items()}
            meter.add(named, 1 / len(micro_batches))
        norm = self._clip()
        finite = torch.isfinite(norm)  # gradients are averaged, so every rank sees the same
        meter.add({f"{self.phase.name}.skipped": (~finite).float()})
        taken: Taken = bool(finite) if self.at_once else finite
        if taken is not False:
            factor = self.phase.optimizer.factor(
                step - self.phase.start_step, self.steps - self.phase.start_step
            )
            for group in self.optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor
            if not self.at_once:  # the fused AdamW then moves nothing, and does not count the step
                self.optimizer.found_inf = (~finite).float()
            self.optimizer.step()
            taken_steps = 1.0 if self.at_once else finite.double()
            meter.add({f"{self.phase.name}.gradient_norm": norm.where(finite, 0.0)}, taken_steps)
        for parameter, part in zip(self.parameters, self.parts):
            parameter.grad = part.grad = None
        self.rest()
        if self.phase.after_step and self.at_once:
            self.phase.after_step(step, bool(taken))
        elif self.phase.after_step:
            with undone_unless(taken, self.updated):
                self.phase.after_step(step, True)
        return taken

    def _loss(self, batch: Batch, step: int, whole: batch_means.WholeBatch) -> Loss:
        with whole.part(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.low):
            return self.engine(batch, step)

    def _rehearse(
        self, rest: list[Batch], step: int, whole: batch_means.WholeBatch, seed: int
    ) -> None:
        """Let the micro-batches after the first say, too, what the losses need to know of the whole
        batch."""
        for batch in rest:
            with randomness.samples((seed, step), batch.positions):
                self._loss(batch, step, whole)
        whole.rehearsed()
        if self.phase.after_step:
            self.phase.after_step(step, False)  # forget the statistics that were gathered

    def rest(self) -> None:
        """Take no gradients from other phases."""
        for parameter in self.parameters:
            parameter.requires_grad_(False)

    def module_state(self) -> dict[str, Tensor]:
        """The module's whole state dict: on rank 0 of a sharded one. Collective."""
        return {
            name: sharding.whole(sharding.local(t), t)
            for name, t in self.phase.module.state_dict().items()
        }

    def optimizer_state(self) -> dict[str, Any]:
        """As `module_state`; numbered as without sharding."""
        return self._map_state(self.optimizer.state_dict(), sharding.whole)

    def load(self, module_state: dict[str, Tensor], optimizer_state: dict[str, Any]) -> None:
        """Go on from whole states, which every process has."""
        own = self.phase.module.state_dict()
        self.phase.module.load_state_dict(
            {
                name: sharding.shared(t, own[name]) if name in own else t
                for name, t in module_state.items()
            }
        )
        state = self._map_state(
            optimizer_state, lambda moment, like: _laid_out(sharding.part(moment, like), like)
        )
        pairs = zip(
            state["param_groups"], self.optimizer.param_groups
        )  # which kernels move them is this device's
        groups = [saved | {name: own[name] for name in KERNELS} for saved, own in pairs]
        self.optimizer.load_state_dict(state | {"param_groups": groups})

    def _map_state(
        self, state: dict[str, Any], change: Callable[[Tensor, Tensor], Tensor]
    ) -> dict[str, Any]:
        """AdamW's moments, by `change(moment, parameter)`; step counts, which have no axes,
        stay."""
        return state | {
            "state": {
                number: {
                    n: change(v, self.parameters[number]) if v.ndim else v
                    for n, v in values.items()
                }
                for number, values in state["state"].items()
            }
        }

    def _clip(self) -> Tensor:
        """Scale the gradients down to the norm `clip`; what it was before."""
        if not self.sharded:
            return nn.utils.clip_grad_norm_(self.parameters, self.clip)
        sharding.reduce_gradients(self.parameters)
        norm = sharding.total_norm(self.parameters)
        for parameter, part in zip(self.parameters, self.parts):
            if parameter.grad is not None:
                part.grad = sharding.local(parameter.grad)
        nn.utils.clip_grads_with_norm_(self.parts, self.clip, norm)
        return norm


class _Step(nn.Module):
    """A phase's loss as a module's forward, as DistributedDataParallel and FSDP2 wrap it."""

    def __init__(self, phase: Phase) -> None:
        super().__init__()
        self.module, self.loss = phase.module, phase.loss

    def forward(self, batch: Batch, step: int) -> Loss:
        return self.loss(batch, step)


def _laid_out(tensor: Tensor, like: Tensor) -> Tensor:
    """In memory as `like` is on this device: a checkpoint of another may have its axes there in
    another order."""
    like = sharding.local(like)
    return tensor if tensor.stride() == like.stride() else torch.empty_like(like).copy_(tensor)


def _updated(module: nn.Module) -> list[Tensor]:
    """What `after_step` may change of the state that a checkpoint holds."""
    state = module.state_dict()
    buffers = [buffer for name, buffer in module.named_buffers() if name in state]
    codebooks = [
        p for part in module.modules() if hasattr(part, "follow") for p in part.parameters()
    ]
    return buffers + codebooks


def units_of(module: nn.Module) -> list[nn.Module]:
    """What is compiled as one: transformer blocks, which are alike, or, where these are not most of
    it, the whole.

    By the block it takes seconds rather than minutes.
    """
    blocks = sharding.blocks_of(module)
    return blocks if sharding.share_of(blocks, module) >= 0.5 else [module]


def _spoilt(total: Tensor) -> Tensor:
    """A loss times 1, or, where it is not finite, NaN. Its gradients are NaN then, and so is their
    mean over the processes: all of them see that the step is not to be taken."""
    return total * torch.where(total.detach().isfinite(), 1.0, torch.nan).to(total.dtype)
