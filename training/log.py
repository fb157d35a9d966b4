"""What a run says while it trains: log.jsonl, TensorBoard events, one progress line."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training import distributed
from training.atomic import naming, replace_file

CLOCKS = (
    "seconds",
    "images_per_second",
    "data_wait",
    "save_seconds",
)  # figures that no two runs have alike


class Meter:
    """Weighted means of named scalars since the last reading; holds tensors, so that a step never
    waits for a device.

    Its state is part of a checkpoint: a resumed run logs the very means that an uninterrupted one
    does.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, float | Tensor] = {}  # the weights' sums

    def add(self, values: dict[str, Tensor], weight: float | Tensor = 1.0) -> None:
        """A weight that is a tensor may be 0: then it is as if nothing had been added."""
        for name, value in values.items():
            value = value.detach().double() * weight
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0.0) + weight

    def read(self) -> dict[str, float]:
        """Means over what was added and over ranks; starts anew. Call it on every rank."""
        names = list(self.sums)  # the same on every rank: phases insert them in order
        totals = (
            distributed.mean_(torch.stack([self.sums[name] for name in names])).tolist()
            if names
            else []
        )
        means = {
            name: total / count
            for name, total in zip(names, totals)
            if (count := float(self.counts[name]))
        }
        self.sums, self.counts = {}, {}
        return means

    def state_dict(self) -> dict[str, dict]:
        """Each sum of every rank, (world,). Call it on every rank."""
        counts = {name: count for name, weight in self.counts.items() if (count := float(weight))}
        sums_here = [self.sums[name] for name in counts]
        sums = distributed.gather_rows(torch.stack(sums_here)[None]).cpu() if sums_here else None
        return {
            "sums": {name: sums[:, i].clone() for i, name in enumerate(counts)},
            "counts": counts,
        }

    def load_state_dict(self, state: dict[str, dict]) -> None:
        """A rank goes on from its own sums, or from the mean of all where there were more or fewer
        of them."""
        rank, world = distributed.rank(), distributed.world()
        saved = {
            name: sums.flatten().to(distributed.device()) for name, sums in state["sums"].items()
        }
        self.sums = {
            name: sums[rank] if len(sums) == world else sums.mean() for name, sums in saved.items()
        }
        self.counts = dict(state["counts"])


class Log:
    """log.jsonl and TensorBoard events in a run folder. Lines after the step resumed from are
    dropped.

    `note` is told the name of a file before it is made.
    """

    def __init__(
        self, folder: Path, step: int, note: Callable[[str], object] = lambda name: None
    ) -> None:
        self.path = folder / "log.jsonl"
        self.kept: list[dict[str, Any]] = []  # what a resumed run had written
        if self.path.exists():
            lines = self.path.read_bytes().splitlines()
            damaged = sum(
                _step_of(line) is None for line in lines[:-1]
            )  # the last one is cut short by any crash
            if damaged:
                print(f"warning: {self.path}: {damaged} damaged lines are left out", flush=True)
            kept = [line for line in lines if (at := _step_of(line)) is not None and at <= step]
            replace_file(self.path, b"".join(line + b"\n" for line in kept))
            self.kept = [json.loads(line) for line in kept]
        self.events = Events(folder, step, note)

    def write(self, step: int, values: dict[str, float]) -> None:
        with naming(self.path), open(self.path, "a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        self.events.write(step, values)

    def warn(self, step: int, message: str) -> None:
        with naming(self.path), open(self.path, "a") as file:
            file.write(json.dumps({"step": step, "warning": message}) + "\n")

    def close(self) -> None:
        self.events.close()


class Events:
    """A TensorBoard event file. Written here and now: SummaryWriter's thread loses what a killed
    process had not written yet, and meets a full disk with a traceback.
    """

    def __init__(
        self, folder: Path, step: int, note: Callable[[str], object] = lambda name: None
    ) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        # TensorBoard reads files by name. A clock that was set back would bring this one before
        # those that it goes on from, and the start of theirs would hide its steps.
        earlier = [
            int(path.name.split(".")[3])
            for path in folder.glob("events.out.tfevents.[0-9]*.*")
            if path.name.split(".")[3].isdecimal()
        ]
        number = max([time.time_ns(), *(each + 1 for each in earlier)])
        self.path = folder / f"events.out.tfevents.{number:020d}.{os.getpid()}"
        note(self.path.name)
        with naming(self.path):
            self.records = RecordWriter(open(self.path, "wb"))
        self._add(Event(wall_time=time.time(), file_version="brain.Event:2"))
        start = SessionLog(status=SessionLog.START)  # hides what earlier files say of later steps
        self._add(Event(wall_time=time.time(), step=step + 1, session_log=start))

    def write(self, step: int, values: dict[str, float]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        scalars = [
            Summary.Value(tag=name.replace(".", "/"), simple_value=value)
            for name, value in values.items()
        ]
        self._add(Event(wall_time=time.time(), step=step, summary=Summary(value=scalars)))

    def _add(self, event: Any) -> None:
        with naming(self.path):
            self.records.write(event.SerializeToString())
            self.records.flush()

    def close(self) -> None:
        self.records.close()


def _step_of(line: bytes) -> float | None:
    """The step of a line of the log, None where it is damaged."""
    try:
        step = json.loads(line)["step"]
        return step if isinstance(step, int | float) else None
    except (ValueError, KeyError, TypeError):
        return None


class Progress:
    """One line that is rewritten on a terminal, and a plain line every `interval` seconds without
    one."""

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
        left = (
            (now - self.started) / progressed * (self.total - done) if progressed else float("nan")
        )
        line = f"{self.title} {done}/{self.total} | {_duration(left)} left | {note}"
        if self.terminal:
            line = line[: shutil.get_terminal_size().columns - 1]
            print(f"\r{line}\x1b[K", end="", flush=True)
        else:
            print(line, flush=True)

    def warn(self, message: str) -> None:
        """A line of its own, above the one that is rewritten."""
        end = "\r\x1b[K" if self.terminal else ""
        print(f"{end}warning: {message}", flush=True)

    def finish(self, note: str) -> None:
        end = "\r\x1b[K" if self.terminal else ""
        print(
            f"{end}{self.title}: {note} ({_duration(time.monotonic() - self.started)})", flush=True
        )


def _duration(seconds: float) -> str:
    if seconds != seconds:
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
