"""The one training loop: phases in order, each forward, backward, clip, step; then average, log,
save.

Everything random in a step derives from (seed, step, place in the global batch), and data from
(seed, step), so a checkpoint needs no random state, running the same command again goes on exactly
where it stopped, and the number of processes and micro-batches does not matter.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import operator
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from training import distributed, randomness
from training.algorithms import lay_out, training_on
from training.checkpoint import Run, load_weights, weights_path
from training.ema import Ema
from training.errors import UserError
from training.log import CLOCKS, Log, Meter, Progress
from training.outcome import Outcomes, Taken, event, is_known_at_once
from training.output import outliving_the_terminal
from training.phase import Batch, Loss, Phase, PhaseRunner
from training.precision import autocast, decide
from training.saver import Saver, advice
from training.signals import Interrupted, Requests, listening

__all__ = ["Batch", "LoopConfig", "Loss", "Phase", "train"]

PRECISIONS = ("auto", "fp32", "bf16")  # of training.precision
SHARDINGS = ("none", "full")
FAILED = 1 << 16  # what a process says, in place of a signal's number, when it could not save


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    steps: int = 1000
    batch_size: int = 64  # samples per step, over all processes and micro-batches
    accumulate: int = 1  # micro-batches per step and process
    clip: float = 1.0  # largest gradient norm
    precision: str = "auto"  # bf16 autocast on a GPU that has it, else fp32; or "fp32", "bf16"
    sharding: str = "none"  # "full": each process keeps a part of every transformer block (FSDP2)
    deterministic: bool = (
        False  # on a GPU: the same bits from the same steps, as a CPU gives them; slower
    )
    compile: bool = False  # torch.compile, of each transformer block or of what has none
    ema_decay: float = 0.999
    log_every: int = 20
    save_every: int = 500
    preview_every: int = 500
    keep: int = 2  # checkpoints
    workers: int = 0  # processes that read data
    max_bad_steps: int = 10  # non-finite steps in a row before the run stops

    def __post_init__(self) -> None:
        for name, known in (("precision", PRECISIONS), ("sharding", SHARDINGS)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"loop.{name}={getattr(self, name)!r} is not one of {', '.join(known)}"
                )
        counts = (
            "steps",
            "batch_size",
            "accumulate",
            "log_every",
            "save_every",
            "preview_every",
            "keep",
        )
        for name in (*counts, "max_bad_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"loop.{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"loop.ema_decay={self.ema_decay} must be in [0, 1)")


def train(
    config: LoopConfig,
    run: Run,
    phases: list[Phase],
    batches: Callable[[int], Iterator[list[Batch]]],
    *,
    seed: int,
    published: nn.Module,
    begin: Callable[[], None] | None = None,
    preview: Callable[[nn.Module, Path, int], None] | None = None,
    measure: Callable[[nn.Module], dict[str, float]] | None = None,
    watch: Callable[[int, dict[str, float]], list[str]] | None = None,
) -> nn.Module:
    """Train to `config.steps`, resuming from the run's newest whole checkpoint; return the averaged
    `published`.

    `batches(step)` yields this rank's micro-batches of that step and all that follow. `begin()` is
    called, on every rank, where there is no checkpoint to resume, to start the modules from data.
    `preview(averaged, path, step)` draws a picture and `measure(averaged)` returns held-out
    figures; both are called every `preview_every` steps on rank 0, as is `watch(step, figures)`
    with whatever is logged: the warnings that it returns are logged and printed. Of a sharded run,
    ranks other than 0 get the parts that they have of the averaged module.

    Raises Interrupted after saving on SIGINT or SIGTERM (and leaves the run's marker), and
    UserError on every rank after `max_bad_steps` non-finite steps, or where a checkpoint cannot be
    written. What cannot be printed is no reason to stop, nor is a terminal that is closed (SIGHUP).
    """
    with (
        outliving_the_terminal(),
        listening(signal.SIGINT, signal.SIGTERM) as requests,
        run.marking(),
    ):
        with (
            training_on(distributed.device(), deterministic=config.deterministic),
            Saver(run) as saver,
        ):
            with requests.at_once():
                loop = _Loop(config, run, phases, published, seed, begin)
            loop.preview, loop.measure, loop.watch = preview, measure, watch
            return loop.train(batches, requests, saver)


class _Loop:
    """What `train` holds while it runs: the state of a checkpoint, and the log."""

    preview: Callable[[nn.Module, Path, int], None] | None = None
    measure: Callable[[nn.Module], dict[str, float]] | None = None
    watch: Callable[[int, dict[str, float]], list[str]] | None = None

    def __init__(
        self,
        config: LoopConfig,
        run: Run,
        phases: list[Phase],
        published: nn.Module,
        seed: int,
        begin: Callable[[], None] | None,
    ) -> None:
        self.config, self.run, self.seed, self.title = config, run, seed, str(run.folder)
        self.device, self.main = distributed.device(), distributed.is_main()
        published.to(self.device)
        state = run.latest()
        self.step: int = 0 if state is None else state["step"]
        if distributed.largest(self.step) != -distributed.largest(-self.step):
            raise UserError(
                f"{run.folder}: processes find other checkpoints here: it must be one folder to "
                "all of them"
            )
        if state is None and begin:
            begin()
        for phase in phases:
            distributed.equalise(phase.module.to(self.device))
        sharded = config.sharding == "full" and distributed.world() > 1
        if not sharded:  # what is shared out has to be contiguous
            for phase in phases:
                lay_out(phase.module, self.device)
        if sharded:
            published.cpu()  # nothing but parts will come back
        self.precision = decide(config.precision, self.device, "loop.precision", self.title)
        if self.main and config.deterministic and self.device.type != "cpu":
            slow = "convolutions, attention, resizing and sums by index are slower for it"
            print(
                f"{self.title}: loop.deterministic: the same steps give the same bits; {slow}",
                flush=True,
            )
        self.ema = Ema(published, config.ema_decay)
        self.runners = [
            PhaseRunner(
                phase,
                self.device,
                steps=config.steps,
                clip=config.clip,
                low=self.precision == "bf16",
                compiled=config.compile,
                sharded=sharded and phase.module is published,
            )
            for phase in phases
        ]
        if sharded:
            self.ema.share(self.device)
        self.meter = Meter()
        self.pending = (
            False  # whether the preview and the held-out figures of this step are still to be made
        )
        if state is not None:
            for runner in self.runners:
                runner.load(
                    state["modules"][runner.phase.name], state["optimizers"][runner.phase.name]
                )
            self.ema.load_state_dict(state["ema"])
            self.meter.load_state_dict(state["meter"])
            self.pending = state.get("pending", False)

    def train(
        self, batches: Callable[[int], Iterator[list[Batch]]], requests: Requests, saver: Saver
    ) -> nn.Module:
        """See the function `train`."""
        config = self.config
        if self.step >= config.steps and not self.pending:
            return self._finished()
        for runner in self.runners:
            runner.rest()
        self._open_log()
        number = self._show_what_is_pending(requests, saver)
        stream, window = batches(self.step), _Window(self.step, config.batch_size)
        outcomes = Outcomes(self.device, config.max_bad_steps)
        compiling = config.compile
        while self.step < config.steps and not number:
            with window.waiting():
                micro_batches = next(stream)
            # The first step compiles for minutes, in which a request to stop loses nothing.
            with requests.at_once() if compiling else contextlib.nullcontext():
                taken = self._move([batch.to(self.device) for batch in micro_batches])
            compiling = False
            outcomes.add(taken, self.step)
            number = self._after_step(outcomes, window, requests, saver)
        distributed.on_main(saver.wait)
        if number and (self.step < config.steps or self.pending):
            raise Interrupted(
                f"{self.title}: stopped at step {self.step} and saved: "
                "run the same command again to go on",
                number,
            )
        if self.log:
            self.log.close()
            self.progress.finish(f"{config.steps} steps done, {_note(self.latest)}")
        return self._averaged()

    def _open_log(self) -> None:
        self.log = Log(self.run.folder, self.step, self.run.files.note) if self.main else None
        self.progress = Progress(self.title, self.config.steps)
        self.latest: dict[str, float] = {}  # figures of the last line
        # Whoever watches is told what was logged before, so as not to warn of it again.
        for line in self.log.kept if self.log and self.watch else []:
            if "warning" not in line:
                figures = {name: value for name, value in line.items() if name != "step"}
                self.watch(line["step"], figures)

    def _show_what_is_pending(self, requests: Requests, saver: Saver) -> int:
        """Preview and figures that an earlier start was stopped before; the number of the signal
        that asks any process to stop, 0 for none."""
        if not self.pending:
            return 0
        number = self._show(requests)
        if self.step == self.config.steps and not self.pending:
            self._save(saver, self.config.keep)
        return number

    def _after_step(
        self, outcomes: Outcomes, window: _Window, requests: Requests, saver: Saver
    ) -> int:
        """Log, show and save what is due; the number of the signal that asks any process to stop, 0
        for none."""
        config, last = self.config, self.step == self.config.steps
        logs, saves, shows = (
            last or self.step % every == 0
            for every in (config.log_every, config.save_every, config.preview_every)
        )
        shows = shows and bool(self.preview or self.measure)
        if settles := logs or saves or shows:  # nowhere else is a GPU waited for
            outcomes.settle()
        if outcomes.end:
            distributed.on_main(lambda: self._give_up(saver, outcomes.end))
        if logs:
            self.latest = self.meter.read() | window.read(self.step)
        if self.main:
            if logs:
                self._report(self.latest)
            self.progress.show(self.step, _note(self.latest))
        number = outcomes.agree(FAILED if saver.failed else requests.number, now=settles)
        if number == FAILED:
            distributed.on_main(saver.wait)
        self.pending = shows
        if self.pending and not number:
            number = self._show(requests)
        if saves or number:
            outcomes.settle()
            # Also after bad steps, which moved nothing; but then no older checkpoint goes, for
            # `_give_up` points to one.
            with window.timing("save_seconds"):
                self._save(saver, None if outcomes.in_a_row else config.keep)
        return number

    def _move(self, micro_batches: list[Batch]) -> Taken:
        """One step of every phase; whether all of them were taken."""
        torch.manual_seed(randomness.mix(self.seed, self.step, distributed.rank()))
        moves = [runner for runner in self.runners if self.step >= runner.phase.start_step]
        every = [runner.move(micro_batches, self.step, self.meter, self.seed) for runner in moves]
        taken = functools.reduce(operator.and_, every)
        self.ema.update(self.step, taken)
        self.step += 1
        return taken

    def _show(self, requests: Requests) -> int:
        """Preview and held-out figures, until a request to stop comes; the signal's number, 0 for
        none."""
        drawn = False

        def draw() -> None:
            nonlocal drawn
            figures: dict[str, float] = {}
            with contextlib.suppress(Interrupted):
                with requests.at_once(), torch.no_grad(), autocast(self.precision, self.device):
                    if self.preview:
                        picture = self.run.previews / f"step-{self.step:08d}.png"
                        self.run.files.note(f"previews/{picture.name}")
                        picture.parent.mkdir(exist_ok=True)
                        self.preview(averaged, picture, self.step)
                    if self.measure:
                        figures = {
                            f"held_out.{name}": value
                            for name, value in self.measure(averaged).items()
                        }
                drawn = True
                if self.measure:
                    self._report(figures)

        with self.ema.whole(self.device) as averaged:
            distributed.on_main(draw)
        self.pending = distributed.any_true(self.main and not drawn)
        return distributed.largest(requests.number)

    def _save(self, saver: Saver, keep: int | None) -> None:
        state = {
            "step": self.step,
            "modules": {runner.phase.name: runner.module_state() for runner in self.runners},
            "optimizers": {runner.phase.name: runner.optimizer_state() for runner in self.runners},
            "ema": self.ema.state_dict(),
            "meter": self.meter.state_dict(),
            "pending": self.pending,
        }
        if self.main:
            saver.save(self.step, state, keep)

    def _report(self, figures: dict[str, float]) -> None:
        assert self.log is not None
        self.log.write(self.step, figures)
        for warning in self.watch(self.step, figures) if self.watch else []:
            self.log.warn(self.step, warning)
            self.progress.warn(f"{self.title} at step {self.step}: {warning}")

    def _give_up(self, saver: Saver, step: int) -> None:
        """Checkpoints from before the bad steps are still there: during them none was removed."""
        saver.wait()
        raise UserError(
            f"{self.title}: {self.config.max_bad_steps} steps in a row with non-finite gradients, "
            "the last at step "
            f"{step}: {advice(self.run)}"
        )

    def _finished(self) -> nn.Module:
        state = self.ema.state_dict()
        if self.main:
            path = weights_path(self.run.folder)
            try:
                load_weights(self.run.folder)
            except UserError:  # someone removed them, or they are not what was written
                if path.is_file():
                    print(
                        f"warning: {path}: damaged: it is written again from the last checkpoint",
                        flush=True,
                    )
                self.run.publish(state, self.step)
            print(
                f"{self.title}: finished at step {self.step}; start over with --fresh (make: "
                "FRESH=1)",
                flush=True,
            )
        return self._averaged()

    def _averaged(self) -> nn.Module:
        with self.ema.whole(self.device) as averaged:
            return averaged


class _Window:
    """Times since the log's last line."""

    def __init__(self, step: int, batch_size: int) -> None:
        self.step, self.batch_size = step, batch_size
        self.started, self.spent = time.monotonic(), {"data_wait": 0.0}
        self.gaps: list[tuple[Any, Any]] = []  # marks between which a GPU had nothing to do

    @contextlib.contextmanager
    def timing(self, name: str) -> Iterator[None]:
        """Add the time that the block takes."""
        started = time.monotonic()
        yield
        self.spent[name] = self.spent.get(name, 0.0) + time.monotonic() - started

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Add the time that a step waits for its data. A GPU may still be busy with steps before:
        it counts its own."""
        device = distributed.device()
        if is_known_at_once(device):
            with self.timing("data_wait"):
                yield
            return
        begin = event(device, enable_timing=True)
        yield
        self.gaps.append((begin, event(device, enable_timing=True)))

    def read(self, step: int) -> dict[str, float]:
        """The log's CLOCKS; starts anew. data_wait is a share of the time, all ranks' mean. Call it
        on every rank."""
        for begin, end in self.gaps:
            end.synchronize()
            self.spent["data_wait"] += begin.elapsed_time(end) / 1000
        seconds, steps = time.monotonic() - self.started, step - self.step
        waited = torch.tensor([self.spent.pop("data_wait") / seconds], device=distributed.device())
        figures = {
            "images_per_second": steps * self.batch_size / seconds,
            "seconds": seconds / steps,
            "data_wait": float(distributed.mean_(waited)),
            **self.spent,
        }
        self.__init__(step, self.batch_size)
        return figures


def _note(latest: dict[str, float]) -> str:
    """The figures of a progress line."""
    hidden = (*CLOCKS, "skipped", "gradient_norm")
    parts = [f"{latest['images_per_second']:.0f} images/s"] if "images_per_second" in latest else []
    parts += [
        f"{k.partition('.')[2]} {v:.4g}"
        for k, v in latest.items()
        if k.rpartition(".")[2] not in hidden
    ]
    return ", ".join(parts)
