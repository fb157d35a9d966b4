"""The one training loop: turns in order, each forward, backward, clip, step; then average, log, save.

Everything random in a step derives from (seed, step, rank), and data from (seed, step), so a checkpoint needs
no random state and running the same command again goes on exactly where it stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from training import distributed
from training.checkpoint import Run, weights_path
from training.command import Interrupted, UserError
from training.ema import Ema
from training.log import Log, Meter, Progress
from training.optim import OptimizerConfig

PRECISIONS = ("auto", "fp32", "bf16")


@dataclasses.dataclass
class Loss:
    """What a turn minimises, and the named terms of it for the log."""

    total: Tensor  # scalar
    parts: dict[str, Tensor]  # scalars


@dataclasses.dataclass
class Batch:
    """Tensors by name, one row per sample."""

    tensors: dict[str, Tensor]
    positions: Tensor  # (B,) int64, each sample's place in the global batch
    extras: dict[str, Any] = dataclasses.field(default_factory=dict)  # what one turn leaves for the next

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def to(self, device: torch.device) -> Batch:
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in self.tensors.items()}
        return Batch(moved, self.positions.to(device, non_blocking=True), self.extras)


@dataclasses.dataclass
class Turn:
    """One optimizer's move within a step: a prior has one, a GAN tokenizer two."""

    name: str
    module: nn.Module  # its trainable parameters are what the turn moves
    loss: Callable[[Batch, int], Loss]  # (micro-batch, step), averaged over its samples
    optimizer: OptimizerConfig
    start_step: int = 0
    after_step: Callable[[int, bool], None] | None = None  # told the step and whether it was taken


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    steps: int = 1000
    batch_size: int = 64  # samples per step, over all processes and micro-batches
    accumulate: int = 1  # micro-batches per step and process
    clip: float = 1.0  # largest gradient norm
    precision: str = "auto"  # bf16 autocast on a GPU, fp32 on a CPU; or "fp32", "bf16"
    ema_decay: float = 0.999
    log_every: int = 20
    save_every: int = 500
    preview_every: int = 500
    keep: int = 2  # checkpoints
    workers: int = 0  # processes that read data
    max_bad_steps: int = 10  # non-finite steps in a row before the run stops

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"loop.precision={self.precision!r} is not one of {', '.join(PRECISIONS)}")
        for name in ("steps", "batch_size", "accumulate", "log_every", "save_every", "preview_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"loop.{name}={getattr(self, name)} must be at least 1")


def train(
    config: LoopConfig,
    run: Run,
    turns: list[Turn],
    batches: Callable[[int], Iterator[list[Batch]]],
    *,
    seed: int,
    published: nn.Module,
    begin: Callable[[], None] | None = None,
    preview: Callable[[nn.Module, Path, int], None] | None = None,
    measure: Callable[[nn.Module], dict[str, float]] | None = None,
    watch: Callable[[int, dict[str, float]], list[str]] | None = None,
) -> nn.Module:
    """Train to `config.steps`, resuming from the run's newest whole checkpoint; return the averaged `published`.

    `batches(step)` yields this rank's micro-batches of that step and all that follow. `begin()` is called, on every
    rank, where there is no checkpoint to resume, to start the modules from data. `preview(averaged, path, step)`
    draws a picture and `measure(averaged)` returns held-out figures; both are called every `preview_every` steps on
    rank 0, as is `watch(step, figures)` with whatever is logged: the warnings that it returns are logged and printed.

    Raises Interrupted after saving on SIGINT or SIGTERM, and UserError after `max_bad_steps` non-finite steps.
    """
    device = distributed.device()
    published.to(device)
    state = run.latest()
    if state is None and begin:
        begin()
    movers = [_Mover(turn, config, device) for turn in turns]
    ema, meter = Ema(published, config.ema_decay), Meter()
    step = 0
    if state is not None:
        step = state["step"]
        _restore(state, movers, ema, meter)
    title = str(run.folder)
    if step >= config.steps:
        if distributed.is_main():
            if not weights_path(run.folder).is_file():  # someone removed them
                run.publish(ema.module.state_dict(), step)
            print(f"{title}: finished at step {step}; start over with --fresh (make: FRESH=1)", flush=True)
        return ema.module
    for mover in movers:
        mover.rest()
    main = distributed.is_main()
    log = Log(run.folder, step) if main else None
    progress = Progress(title, config.steps)
    for kept in log.kept if log and watch else []:  # what was warned of is not warned of again
        if "warning" not in kept:
            watch(kept["step"], {name: value for name, value in kept.items() if name != "step"})
    stream, bad_steps, latest = batches(step), 0, {}
    window_start, window_step = time.monotonic(), step

    def report(figures: dict[str, float]) -> None:
        log.write(step, figures)
        for warning in watch(step, figures) if watch else []:
            log.warn(step, warning)
            progress.warn(f"{title} at step {step}: {warning}")

    def save() -> None:
        state = {
            "step": step,
            "modules": {mover.turn.name: mover.turn.module.state_dict() for mover in movers},
            "optimizers": {mover.turn.name: mover.optimizer.state_dict() for mover in movers},
            "ema": ema.module.state_dict(),
            "meter": meter.state_dict(),
        }
        run.publish(ema.module.state_dict(), step)  # first: whoever finds the last checkpoint finds its weights
        run.save(step, state, config.keep)

    with _stop_requests() as stop_requested:
        while step < config.steps:
            micro_batches = [batch.to(device) for batch in next(stream)]
            torch.manual_seed(distributed.mix(seed, step, distributed.rank()))
            taken = True
            for mover in movers:
                if step >= mover.turn.start_step:
                    taken &= mover.move(micro_batches, step, meter)
            if taken:
                ema.update(step)
            bad_steps = 0 if taken else bad_steps + 1
            step += 1
            if bad_steps >= config.max_bad_steps:
                raise UserError(
                    f"{title}: {bad_steps} steps in a row with non-finite gradients, the last at step "
                    f"{step}: the last good checkpoint is kept; lower optimizer.lr or loop.clip, or set "
                    "loop.precision=fp32, and run again"
                )
            last, stopping = step == config.steps, distributed.any_true(stop_requested())
            if step % config.log_every == 0 or last:
                seconds = time.monotonic() - window_start
                latest = meter.read()
                latest["images_per_second"] = (step - window_step) * config.batch_size / seconds
                latest["seconds"] = seconds / (step - window_step)
                window_start, window_step = time.monotonic(), step
            if main:
                if step % config.log_every == 0 or last:
                    report(latest)
                progress.show(step, _note(latest))
                if step % config.preview_every == 0 or last:
                    with torch.no_grad():
                        if preview:
                            run.previews.mkdir(exist_ok=True)
                            preview(ema.module, run.previews / f"step-{step:08d}.png", step)
                        if measure:
                            report({f"held_out.{k}": v for k, v in measure(ema.module).items()})
            if step % config.save_every == 0 or last or stopping:
                save()  # whole even after bad steps: they moved nothing
                distributed.barrier()
            if stopping and not last:
                raise Interrupted(f"{title}: stopped at step {step} and saved: run the same command again to go on")
    if main:
        log.close()
        progress.finish(f"{config.steps} steps done, {_note(latest)}")
    return ema.module


class _Mover:
    """A turn with its optimizer, wrapped for several processes."""

    def __init__(self, turn: Turn, config: LoopConfig, device: torch.device) -> None:
        self.turn, self.config, self.device = turn, config, device
        turn.module.to(device)
        self.optimizer = turn.optimizer.build(turn.module)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.engine: nn.Module = _Step(turn)
        if distributed.world() > 1:
            # Buffers are equal by construction: statistics are reduced where they are updated.
            ids = [device.index] if device.type == "cuda" else None
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # torch 2.15 renames what 2.11 does not know yet
                self.engine = DistributedDataParallel(self.engine, device_ids=ids, broadcast_buffers=False)

    def move(self, micro_batches: list[Batch], step: int, meter: Meter) -> bool:
        """One optimizer step; False, and nothing moved, when the gradient is not finite."""
        self.turn.module.train()
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        low = self.config.precision == "bf16" or (self.config.precision == "auto" and self.device.type == "cuda")
        for index, batch in enumerate(micro_batches):
            final = index == len(micro_batches) - 1
            local = distributed.world() > 1 and not final
            with self.engine.no_sync() if local else contextlib.nullcontext():  # type: ignore[operator]
                with torch.autocast(self.device.type, torch.bfloat16, enabled=low):
                    loss = self.engine(batch, step)
                (loss.total / len(micro_batches)).backward()
            meter.add({f"{self.turn.name}.{name}": value for name, value in loss.parts.items()})
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.clip)
        finite = bool(torch.isfinite(norm))  # gradients are averaged, so every rank sees the same
        meter.add({f"{self.turn.name}.skipped": torch.tensor(float(not finite), device=self.device)})
        if finite:
            factor = self.turn.optimizer.factor(step - self.turn.start_step, self.config.steps - self.turn.start_step)
            for group in self.optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor
            self.optimizer.step()
            meter.add({f"{self.turn.name}.gradient_norm": norm})
        self.optimizer.zero_grad(set_to_none=True)
        self.rest()
        if self.turn.after_step:
            self.turn.after_step(step, finite)
        return finite

    def rest(self) -> None:
        """Take no gradients from other turns."""
        for parameter in self.parameters:
            parameter.requires_grad_(False)


class _Step(nn.Module):
    """A turn's loss as a module's forward, which is what DistributedDataParallel wraps."""

    def __init__(self, turn: Turn) -> None:
        super().__init__()
        self.module, self.loss = turn.module, turn.loss

    def forward(self, batch: Batch, step: int) -> Loss:
        return self.loss(batch, step)


def _restore(state: dict[str, Any], movers: list[_Mover], ema: Ema, meter: Meter) -> None:
    for mover in movers:
        mover.turn.module.load_state_dict(state["modules"][mover.turn.name])
        mover.optimizer.load_state_dict(state["optimizers"][mover.turn.name])
    ema.module.load_state_dict(state["ema"])
    meter.load_state_dict(state["meter"])


def _note(latest: dict[str, float]) -> str:
    """The figures of a progress line."""
    hidden = ("seconds", "images_per_second", "skipped", "gradient_norm")
    parts = [f"{latest['images_per_second']:.0f} images/s"] if "images_per_second" in latest else []
    parts += [f"{k.partition('.')[2]} {v:.4g}" for k, v in latest.items() if k.rpartition(".")[2] not in hidden]
    return ", ".join(parts)


@contextlib.contextmanager
def _stop_requests() -> Iterator[Callable[[], bool]]:
    """Turn SIGINT and SIGTERM into a flag that is read between steps; a second SIGINT stops at once."""
    requested = False

    def request(number: int, frame: Any) -> None:
        nonlocal requested
        if requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        requested = True

    kept = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: requested
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
