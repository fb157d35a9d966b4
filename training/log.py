"""What a run says while it trains: log.jsonl, TensorBoard events, one progress line."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from torch import Tensor

from training.checkpoint import replace_file


class Meter:
    """Means of named scalars since the last reading; holds tensors, so that a step never waits for a device.

    Its state is part of a checkpoint: a resumed run logs the very means that an uninterrupted one does.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            value = value.detach().double()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1

    def read(self) -> dict[str, float]:
        means = {name: float(total) / self.counts[name] for name, total in self.sums.items()}
        self.sums, self.counts = {}, {}
        return means

    def state_dict(self) -> dict[str, dict]:
        return {"sums": {name: total.cpu() for name, total in self.sums.items()}, "counts": dict(self.counts)}

    def load_state_dict(self, state: dict[str, dict]) -> None:
        self.sums, self.counts = dict(state["sums"]), dict(state["counts"])


class Log:
    """log.jsonl and TensorBoard events in a run folder. Lines after the step resumed from are dropped."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / "log.jsonl"
        if self.path.exists():
            kept = [line for line in self.path.read_text().splitlines() if _step_of(line) <= step]
            replace_file(self.path, "".join(f"{line}\n" for line in kept).encode())
        self.events = SummaryWriter(str(folder), purge_step=step or None)

    def write(self, step: int, values: dict[str, float]) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self.events.add_scalar(name.replace(".", "/"), value, step)

    def close(self) -> None:
        self.events.close()


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a line cut short by a crash


class Progress:
    """One line that is rewritten on a terminal, and a plain line every `interval` seconds without one."""

    def __init__(self, title: str, total: int, interval: float = 10.0) -> None:
        self.title, self.total, self.interval = title, total, interval
        self.terminal = sys.stdout.isatty()
        self.started = self.last = time.monotonic()
        self.first: int | None = None

    def show(self, done: int, note: str, *, force: bool = False) -> None:
        """`done` of `total` and a note such as losses; also the time left."""
        now = time.monotonic()
        if self.first is None:
            self.first = done
        if not force and now - self.last < (0.1 if self.terminal else self.interval):
            return
        self.last = now
        progressed = done - self.first
        left = (now - self.started) / progressed * (self.total - done) if progressed else float("nan")
        line = f"{self.title} {done}/{self.total} | {_duration(left)} left | {note}"
        if self.terminal:
            line = line[: os.get_terminal_size().columns - 1]
            print(f"\r{line}\x1b[K", end="", flush=True)
        else:
            print(line, flush=True)

    def finish(self, note: str) -> None:
        end = "\r\x1b[K" if self.terminal else ""
        print(f"{end}{self.title}: {note} ({_duration(time.monotonic() - self.started)})", flush=True)


def _duration(seconds: float) -> str:
    if seconds != seconds:
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
