"""A toy GAN in a few milliseconds per step, in fp64: two turns, dropout, a frozen layer, buffers of
both kinds.

As a program it is what test_loop.py kills and what test_distributed.py puts under torchrun.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tokenizer.data.loader import feed
from tokenizer.quantizers.codebook import pick_rows
from training import distributed, randomness
from training.checkpoint import Run
from training.log import CLOCKS
from training.loop import Batch, LoopConfig, Loss, Phase, train
from training.optim import OptimizerConfig
from training.signals import Interrupted

OPTIMIZER = OptimizerConfig(lr=1e-2, warmup_steps=3, weight_decay=0.1)
LOOP = LoopConfig(steps=9, batch_size=8, log_every=3, save_every=4, preview_every=5, ema_decay=0.9)


@dataclasses.dataclass(frozen=True)
class ToyRun:
    dropout: float = 0.2
    discriminator_start_step: int = 2
    loop: LoopConfig = LOOP
    optimizer: OptimizerConfig = OPTIMIZER


class Generator(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.frozen = nn.Linear(4, 8).requires_grad_(False)
        self.dropout = nn.Dropout(dropout)
        self.last = nn.Linear(8, 4)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("picked", torch.zeros(3, 4))
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))
        self.seen: list[Tensor] = []

    def forward(self, rows: Tensor) -> Tensor:
        self.seen.append(rows.detach())
        return self.last(self.dropout(self.frozen(rows).tanh()))

    @torch.no_grad()
    def update(self, step: int, taken: bool) -> None:
        """Follow the mean of the global batch."""
        seen, self.seen = torch.cat(self.seen), []
        if taken:
            self.mean.lerp_(distributed.mean_(seen.mean(0)), 0.5)
            self.picked.copy_(pick_rows(seen, 3, step))
            self.num_updates += 1


class Rows:
    """A map-style data set of 20 rows."""

    def __init__(self) -> None:
        self.rows = torch.randn(
            (20, 4), generator=torch.Generator().manual_seed(1), dtype=torch.float64
        )

    def __len__(self) -> int:
        return len(self.rows)

    def gather(self, keys: list[tuple[int, int]]) -> dict[str, Tensor]:
        return {"rows": self.rows[[index for _, index in keys]]}


class Toy:
    """Both networks and their turns."""

    def __init__(self, config: ToyRun) -> None:
        torch.manual_seed(0)
        self.config = config
        self.generator = Generator(config.dropout).double()
        self.discriminator = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()
        self.turns = [
            Phase(
                "generator",
                self.generator,
                self.generator_loss,
                config.optimizer,
                after_step=self.generator.update,
            ),
            Phase(
                "discriminator",
                self.discriminator,
                self.discriminator_loss,
                config.optimizer,
                config.discriminator_start_step,
            ),
        ]

    def generator_loss(self, batch: Batch, step: int) -> Loss:
        noise = randomness.draw((0, step), batch.positions, (4,)).to(batch["rows"])
        made = self.generator(batch["rows"] + 0.1 * noise)
        batch.extras["made"] = made.detach()
        error = (made - batch["rows"]).square().mean()
        fooling = -self.discriminator(made).mean()
        return Loss(error + 0.1 * fooling, {"error": error, "fooling": fooling})

    def discriminator_loss(self, batch: Batch, step: int) -> Loss:
        real, made = self.discriminator(batch["rows"]), self.discriminator(batch.extras["made"])
        total = 0.5 * (torch.relu(1 - real) + torch.relu(1 + made)).mean()
        return Loss(total, {"hinge": total})

    def train(self, folder: Path, batches: Any = None) -> nn.Module:
        """Train as configured, in a run folder."""
        loop = self.config.loop
        return train(
            loop,
            Run.open(folder, self.config),
            self.turns,
            batches or feed(Rows(), loop.batch_size, seed=5, accumulate=loop.accumulate),
            seed=7,
            published=self.generator,
            measure=lambda averaged: {"mean": float(averaged.mean.sum())},
        )


def loop(**changes: Any) -> LoopConfig:
    return dataclasses.replace(LOOP, **changes)


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Nested containers as {path: tensor or scalar}."""
    if isinstance(value, dict):
        return {
            k: v for key, inner in value.items() for k, v in leaves(inner, f"{path}/{key}").items()
        }
    if isinstance(value, list | tuple):
        return leaves(dict(enumerate(value)), path)
    return {path: value}


def log_lines(folder: Path) -> list[dict[str, float]]:
    """log.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in CLOCKS} for line in lines]


def fingerprint(folder: Path) -> str:
    """Hash of all that a finished run must reproduce: state to the last bit, log, published
    weights."""
    found = hashlib.sha256((folder / "weights" / "model.safetensors").read_bytes())
    state = Run(folder, None).latest()
    assert state is not None
    for name, value in sorted(leaves(state).items()):
        found.update(
            f"{name} {value.numpy().tobytes() if isinstance(value, Tensor) else value}".encode()
        )
    found.update(json.dumps(log_lines(folder)).encode())
    return found.hexdigest()


def kill_everywhere(folder: Path, stride: int) -> None:
    """Kill -9 a run at every `stride`-th touch of its files, resume it, and print those that came
    out otherwise."""
    import safetensors.torch  # noqa: F401  slow imports of a run, once for all forks
    import torch._dynamo  # noqa: F401
    from tensorboard.compat.proto import event_pb2  # noqa: F401
    from tensorboard.summary.writer import record_writer  # noqa: F401

    straight = folder / "straight"
    touches = folder / "touches"
    _forked(lambda: _train_counting(straight, None, touches))
    failed = {}
    points = range(0, int(touches.read_text()), stride)
    for point in points:
        run = folder / f"run-{point:04d}"
        killed = _forked(lambda: _train_counting(run, point, touches))  # noqa: B023
        resumed = _forked(lambda: Toy(ToyRun()).train(run))  # noqa: B023
        left_over = [str(path) for path in run.rglob(".*") if path.name != ".lock"]
        outcome = (killed, resumed, fingerprint(run) == fingerprint(straight), left_over)
        if outcome != (signal.SIGKILL, 0, True, []):
            failed[point] = str(outcome)
    print(json.dumps({"points": len(points), "failed": failed}))


def _forked(function: Any) -> int:
    """Run in a child process; the signal that ended it, or its exit status."""
    child = os.fork()
    if child == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            function()
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def _train_counting(folder: Path, kill_at: int | None, touches: Path) -> None:
    count = 0

    def watch(event: str, arguments: tuple) -> None:
        nonlocal count
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "shutil.rmtree", "os.rmdir"):
            if str(arguments[0]).startswith(str(folder)):
                if count == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1

    sys.addaudithook(watch)
    Toy(ToyRun()).train(folder)
    if kill_at is None:
        touches.write_text(str(count))


def train_on_all_ranks(folder: Path) -> None:
    """What one rank does of test_distributed.py's run."""
    torch.set_num_threads(1)
    distributed.start()
    for dtype in (torch.float64, torch.float32):
        toy = Toy(ToyRun(dropout=0.0, loop=loop(accumulate=2)))
        toy.generator.to(dtype), toy.discriminator.to(dtype)
        rows = Rows()
        rows.rows = rows.rows.to(dtype)
        toy.train(folder / str(dtype), feed(rows, 8, seed=5, accumulate=2))
    rank = distributed.rank()
    gathered = distributed.gather_rows(torch.full((rank + 1, 2), float(rank)))
    facts = {
        "world": distributed.world(),
        "gathered": gathered[:, 0].tolist(),
        "any": [distributed.any_true(rank == 1), distributed.any_true(False)],
        "parameters": [p.sum().item() for p in toy.generator.parameters()],
        "buffers": [b.sum().item() for b in toy.generator.buffers()],
        "broadcast": distributed.broadcast_(torch.tensor([rank + 5.0])).item(),
        "kept": kept_when_others_go_on(folder),
        "drawn": drawn_samples(),
    }
    (folder / f"rank-{rank}.json").write_text(json.dumps(facts))
    distributed.finish()


def drawn_samples() -> dict[str, Any] | None:
    """Samples of stand-ins, which say of what sample they are, as this rank gets them."""
    from generate.drawing import Request, draw_samples
    from priors.interface import SampleOptions

    prior = SimpleNamespace(
        sample=lambda labels, options, ids, known: ids[:, None] * 10 + labels[:, None]
    )
    decoder = SimpleNamespace(
        decode=lambda codes: (codes[:, :, None, None] / 255 - 1).expand(-1, 3, 2, 2).double()
    )
    samples = draw_samples(prior, decoder, Request(301, (0, 1, 2), SampleOptions()), batch_size=7)
    if samples is None:
        return None
    return {
        "codes": samples.codes[:, 0].tolist(),
        "shape": list(samples.images.shape),
        "timed": samples.seconds_per_image > 0,
    }


def kept_when_others_go_on(folder: Path) -> bool:
    """Whether a record is there on every rank once it was kept: what is measured next looks for
    it."""
    from eval.pipeline import Pipeline

    def save(report_folder: Path) -> None:
        time.sleep(0.5)
        (report_folder / "record.json").touch()

    Pipeline.keep(SimpleNamespace(report_folder=folder), SimpleNamespace(save=save))
    return (folder / "record.json").exists()


def stop_at(folder: Path, step: int, number: int) -> str:
    """Train until this process gets a signal in the middle of `step`; the message that it stopped
    with."""
    toy = Toy(ToyRun())
    move = toy.turns[0].loss

    def loss(batch: Batch, at: int) -> Loss:
        if at == step:
            os.kill(os.getpid(), number)
        return move(batch, at)

    toy.turns[0] = dataclasses.replace(toy.turns[0], loss=loss)
    try:
        toy.train(folder)
    except Interrupted as interrupted:
        return str(interrupted)
    raise AssertionError("the signal did not stop the run")


if __name__ == "__main__":
    if sys.argv[1] == "kill":
        torch.set_num_threads(1)
        kill_everywhere(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        train_on_all_ranks(Path(sys.argv[2]))
