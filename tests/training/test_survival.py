"""Runs survive: preemption in every phase, a killed rank, values that are not finite on one rank,
failing saves."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from torch import Tensor, nn
from toy import OPTIMIZER, Rows, Toy, ToyRun, fingerprint, leaves, log_lines, loop

from tokenizer.data.loader import feed
from tokenizer.quantizers.vector import VectorConfig
from training import distributed
from training.checkpoint import Run, load_weights
from training.command import run_command
from training.errors import UserError
from training.log import CLOCKS
from training.loop import Batch, Loss, Phase, train
from training.saver import Saver, is_finite
from training.signals import Interrupted, listening

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
BAD_STEPS = {2, 3, 6, 7, 8}


def train_toy(folder: Path, config: ToyRun = ToyRun(), **hooks: Callable) -> Toy:  # noqa: B008
    """As Toy.train, with what a command gives the loop: begin, preview, measure."""
    toy = Toy(config)
    train(
        config.loop,
        Run.open(folder, config),
        toy.turns,
        feed(Rows(), config.loop.batch_size, seed=5, accumulate=config.loop.accumulate),
        seed=7,
        published=toy.generator,
        **{"measure": lambda averaged: {"mean": float(averaged.mean.sum())}, **hooks},
    )
    return toy


def stop_me(number: int = signal.SIGTERM) -> None:
    """Ask this process to stop, and then take very long."""
    os.kill(os.getpid(), number)
    for _ in range(600):
        time.sleep(0.1)
    raise AssertionError("the request was not heard")


def ending(function: Callable[[], object]) -> tuple[int, str]:
    """Exit code and message of what ends by a request; its traceback, which would keep the run's
    lock, is let go."""
    try:
        function()
    except Interrupted as interrupted:
        return interrupted.code, str(interrupted)
    raise AssertionError("nothing was asked")


def marker(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "requeue").read_text())


# Preemption


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("straight") / "run"
    train_toy(folder)
    return folder


@pytest.mark.parametrize("step", [5, 9])
@pytest.mark.parametrize("hook", ["preview", "measure"])
def test_sigterm_while_looking_at_the_model_saves_and_ends(tmp_path, straight, hook, step):
    """What was not looked at to its end is looked at when the run goes on, at its last step too."""
    shown = []

    def interrupted(
        averaged: nn.Module, path: Path | None = None, at: int | None = None
    ) -> dict[str, float]:
        shown.append(at)
        if len(shown) == (5, 9).index(step) + 1:
            stop_me()
        return {"mean": float(averaged.mean.sum())}

    code, message = ending(lambda: train_toy(tmp_path / "run", **{hook: interrupted}))
    assert code == 75 and f"step {step} " in message
    assert Run(tmp_path / "run", None).latest()["step"] == step == marker(tmp_path / "run")["step"]
    train_toy(tmp_path / "run")
    assert fingerprint(tmp_path / "run") == fingerprint(straight)
    assert not (tmp_path / "run" / "requeue").exists()
    train_toy(tmp_path / "run")  # says that it is finished
    assert fingerprint(tmp_path / "run") == fingerprint(straight)


def test_sigterm_before_the_first_step_ends_at_once(tmp_path, straight):
    assert ending(lambda: train_toy(tmp_path / "run", begin=stop_me))[0] == 75
    assert marker(tmp_path / "run").items() >= {"step": 0, "signal": "SIGTERM"}.items()
    train_toy(tmp_path / "run")
    assert fingerprint(tmp_path / "run") == fingerprint(straight)


def test_only_sigterm_leaves_a_marker(tmp_path):
    code, _ = ending(lambda: train_toy(tmp_path / "run", begin=lambda: stop_me(signal.SIGINT)))
    assert code == 130 and not (tmp_path / "run" / "requeue").exists()


def test_a_second_interrupt_does_not_wait(tmp_path):
    def impatient(averaged: nn.Module) -> dict[str, float]:
        with contextlib.suppress(Interrupted):
            stop_me(signal.SIGINT)
        stop_me(signal.SIGINT)
        return {}

    with pytest.raises(KeyboardInterrupt):
        train_toy(tmp_path / "run", measure=impatient)


def test_nothing_that_passes_over_errors_passes_over_a_request():
    assert not issubclass(Interrupted, Exception)
    with listening(signal.SIGTERM, at_once=True), pytest.raises(Interrupted):
        try:
            stop_me()
        except Exception:
            raise AssertionError("swallowed") from None


def test_a_request_is_heard_once():
    """A launcher and its scheduler may both send SIGTERM: the second must not break into the
    cleaning up."""
    cleaned = []
    with listening(signal.SIGTERM, at_once=True), pytest.raises(Interrupted):
        try:
            stop_me()
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            cleaned.append(True)
    assert cleaned


def test_processes_that_were_forked_end_by_the_signal():
    """Not by what it raises here, which would clean up their parent's things; in a loop only after
    a while."""
    ended, going_on = [], []
    for at_once, seen in ((True, ended), (False, going_on)):
        with listening(signal.SIGTERM, at_once=at_once):
            child = os.fork()
            if child == 0:
                try:
                    time.sleep(60)
                finally:
                    os._exit(0)
            time.sleep(0.1)
            os.kill(child, signal.SIGTERM)
            for _ in range(100 if at_once else 3):
                time.sleep(0.05)
                seen.append(os.waitpid(child, os.WNOHANG))
                if seen[-1][0]:
                    break
    assert ended[-1][1] == signal.SIGALRM
    assert going_on[-1] == (0, 0)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_any_command_ends_in_order_on_sigterm(capsys):
    """And is not ended by asking again while Python ends."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as caught:
            run_command(stop_me)
        assert caught.value.code == 75 and signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
    assert capsys.readouterr().err == "interrupted: run the same command again to go on\n"


def test_a_preempted_process_exits_with_75(tmp_path):
    done = processes.run(__file__, "preempted", tmp_path / "run", timeout=60)
    assert (
        done.returncode == 75
        and done.stderr.count("\n") == 1
        and "stopped at step 3 and saved" in done.stderr
    )
    assert marker(tmp_path / "run")["step"] == 3


def test_sigterm_to_torchrun_saves_and_leaves_the_marker(tmp_path):
    process = processes.Process(processes.TORCHRUN, 2, 0, __file__, "endless", tmp_path)
    try:
        while not any(tmp_path.glob("run/checkpoints/step-*")):
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)  # what torchrun kills after 30 s writes no file below
    finally:
        process.kill()
    step = Run(tmp_path / "run", None).latest()["step"]
    assert marker(tmp_path / "run")["step"] == step
    assert [(tmp_path / f"rank-{rank}").read_text() for rank in (0, 1)] == [f"75 {step}"] * 2


@pytest.mark.parametrize(
    ("srun", "requeued", "code"),
    [
        ("mkdir -p $RUNS/a; echo marked > $RUNS/a/requeue; exit 1", True, 0),  # preempted
        ("exit 1", False, 1),  # failed
        ("exit 0", False, 0),  # done
        ("kill -TERM $PPID; sleep 0.2; exit 1", True, 0),  # preempted before it had a folder
        ("kill -TERM $PPID; sleep 0.2; exit 0", False, 0),  # done all the same
    ],
)
def test_the_job_script_requeues_what_asks_for_it(tmp_path, srun, requeued, code):
    for name, body in {"srun": srun, "scontrol": 'echo "$*" >> $RUNS/scontrol'}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "requeue").write_text("of an earlier start")
    slurm = {
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_JOB_NODELIST": "n1",
        "RUNS": str(tmp_path),
    }
    command = [
        "bash",
        str(ROOT / "docs/slurm/tessera.sbatch"),
        "priors.train",
        "x.yaml",
        f"root={tmp_path}",
        "name=a",
    ]
    environment = ENVIRONMENT | slurm | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    assert ("requeue 17" in (tmp_path / "scontrol").read_text()) == requeued


# Two ranks: one is killed, one fails, one meets values that are not finite


class Coder(nn.Module):
    """A layer before a codebook that follows averages, with restarts from the data."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        config = VectorConfig(
            num_codes=8, code_dim=4, decay=0.5, restart="data", init="normal", restart_below=0.5
        )
        self.quantizer = config.build()

    def loss(self, batch: Batch, step: int) -> Loss:
        rows = self.layer(batch["rows"].float())
        output = self.quantizer(rows[:, :, None, None])
        error = (output.vectors.flatten(1) - batch["rows"]).square().mean()
        return Loss(error.float() + output.loss, {"error": error})


def broken(loss: Callable, kind: str, steps: set[int], rank: int) -> Callable:
    """A turn's loss that one rank finds not finite at some steps: by its data, its value or its
    gradient."""

    def broken_loss(batch: Batch, step: int) -> Loss:
        if step not in steps or distributed.rank() != rank:
            return loss(batch, step)
        if kind == "data":
            return loss(
                dataclasses.replace(batch, tensors={"rows": batch["rows"] * math.nan}), step
            )
        made = loss(batch, step)
        return Loss(made.total + math.inf if kind == "value" else made.total * math.nan, made.parts)

    return broken_loss


def state_of(*modules: nn.Module) -> list[Tensor]:
    return [tensor.clone() for module in modules for tensor in module.state_dict().values()]


def train_broken(folder: Path, kind: str, turn: str, rank: int) -> dict[str, Any]:
    """Meet values that are not finite twice, then until the run stops; what this rank saw of it."""
    config = ToyRun(
        dropout=0.0, discriminator_start_step=0, loop=loop(save_every=2, max_bad_steps=3, keep=1)
    )
    toy, coder = Toy(config), Coder()
    turns = [
        *toy.turns,
        Phase("coder", coder, coder.loss, OPTIMIZER, after_step=coder.quantizer.update),
    ]
    index = ["generator", "discriminator", "coder"].index(turn)
    states: list[list[Tensor]] = []

    def watched(batch: Batch, step: int, inner: Callable = turns[0].loss) -> Loss:
        states.append(state_of(coder) if turn == "coder" else state_of(turns[index].module))
        return inner(batch, step)

    turns[0] = dataclasses.replace(turns[0], loss=watched)
    turns[index] = dataclasses.replace(
        turns[index], loss=broken(turns[index].loss, kind, BAD_STEPS, rank)
    )
    taken = []
    after = turns[index].after_step
    turns[index].after_step = lambda step, was: (taken.append(was), after and after(step, was))
    facts: dict[str, Any] = {}
    try:
        batches = feed(Rows(), config.loop.batch_size, seed=5)
        train(
            config.loop,
            Run.open(folder, config),
            turns,
            batches,
            seed=7,
            published=turns[index].module,
        )
    except UserError as error:
        facts = {"error": str(error), "told": error.told}
    states.append(state_of(coder) if turn == "coder" else state_of(turns[index].module))
    facts["unmoved"] = [all(map(torch.equal, *pair)) for pair in itertools.pairwise(states)]
    facts["finite"] = all(is_finite(tensor) for tensor in states[-1])
    facts["sums"] = [float(tensor.double().sum()) for tensor in states[-1]]
    return facts | {
        "taken": taken,
        "kept": sorted(path.name for path in folder.glob("checkpoints/step-*")),
    }


def fill_the_disk() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


CASES = [
    (kind, turn)
    for turn in ("generator", "discriminator", "coder")
    for kind in ("data", "value", "gradient")
]


def on_two_ranks(folder: Path) -> None:
    """What each rank does; rank 0 is killed in the middle of its last run, and all are started
    again."""
    torch.set_num_threads(1)
    distributed.start()
    rank = distributed.rank()
    train_toy(folder / "straight")
    again = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if not again:
        facts = {
            f"{kind} {turn}": train_broken(folder / f"{kind}-{turn}", kind, turn, 1)
            for kind, turn in CASES
        }
        (folder / "in the way").write_text("")
        for name, attempt in {
            "open": lambda: Run.open(folder / "in the way", ToyRun()),
            "disk": lambda: distributed.on_main(fill_the_disk),
        }.items():
            try:
                run_command(attempt)
            except SystemExit as error:
                facts[name] = error.code
        (folder / f"rank-{rank}.json").write_text(json.dumps(facts))

    def deadly(averaged: nn.Module) -> dict[str, float]:
        if not again:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"mean": float(averaged.mean.sum())}

    train_toy(folder / "killed", measure=deadly)
    distributed.finish()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    done = processes.torchrun(2, __file__, "ranks", folder, max_restarts=1)
    assert done.returncode == 0, done.stderr
    (folder / "stderr").write_text(done.stderr)
    return folder


def facts_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


def test_a_killed_rank_is_restarted_to_the_same_bits(two_ranks):
    assert fingerprint(two_ranks / "killed") == fingerprint(two_ranks / "straight")


@pytest.mark.parametrize(("kind", "turn"), CASES)
def test_what_one_rank_finds_not_finite_moves_nothing_on_any(two_ranks, kind, turn):
    first, second = (facts[f"{kind} {turn}"] for facts in facts_of(two_ranks))
    expected = [step not in BAD_STEPS for step in range(9)]
    for facts in (first, second):
        assert facts["taken"] == expected and facts["unmoved"] == [not moved for moved in expected]
        assert (
            facts["finite"] and facts["sums"] == first["sums"] and facts["error"] == first["error"]
        )
    assert (first["told"], second["told"]) == (False, True)  # one line for all of them
    assert (
        "3 steps in a row" in first["error"]
        and "step-00000008 is kept; lower optimizer.lr" in first["error"]
    )
    # `keep` is 1: at step 6 the last good one took the place of all before, and stays during the
    # bad ones
    assert first["kept"] == ["step-00000006", "step-00000008"]


def test_what_rank_0_cannot_do_ends_all_ranks_in_order(two_ranks):
    for facts in facts_of(two_ranks):
        assert (facts["open"], facts["disk"]) == (2, 2)
    said = (two_ranks / "stderr").read_text()
    assert said.count("in the way: a run needs a folder") == 1


# Saving beside training


def test_a_state_is_saved_as_it_was(tmp_path):
    tensor = torch.zeros(1000)
    state = {"modules": {"a": {"w": tensor}}, "optimizers": {}, "ema": {"w": tensor}}
    with Saver(Run.open(tmp_path / "run", ToyRun())) as saver:
        saver.save(1, state, 1)
        tensor.fill_(1)
    saved = Run(tmp_path / "run", None).latest()
    assert not saved["modules"]["a"]["w"].any() and not load_weights(tmp_path / "run")["w"].any()


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    written, moved, save = threading.Event(), threading.Event(), Run.save

    def slow(run: Run, step: int, state: dict[str, Any], keep: int | None) -> None:
        if step == 4:
            assert moved.wait(60)
        save(run, step, state, keep)
        written.set()

    class Watched(Rows):
        def gather(self, keys: list[tuple[int, int]]) -> dict[str, Tensor]:
            counted.append(written.is_set())
            if len(counted) == 6:
                moved.set()
            return super().gather(keys)

    counted: list[bool] = []
    monkeypatch.setattr(Run, "save", slow)
    Toy(ToyRun()).train(tmp_path / "run", feed(Watched(), 8, seed=5))
    assert not any(counted[:6])
    assert Run(tmp_path / "run", None).latest()["step"] == 9


def test_a_save_that_fails_ends_the_run_at_the_next_step(tmp_path, monkeypatch):
    save = Run.save

    def full(run: Run, step: int, state: dict[str, Any], keep: int | None) -> None:
        if step == 8:
            raise UserError("the disk is full")
        save(run, step, state, keep)

    monkeypatch.setattr(Run, "save", full)
    with pytest.raises(UserError, match="the disk is full"):
        train_toy(tmp_path / "run", ToyRun(loop=loop(steps=10_000)))
    assert Run(tmp_path / "run", None).latest()["step"] == 4


@pytest.mark.parametrize("of", ["module", "average", "optimizer"])
def test_weights_that_are_not_finite_are_not_saved(tmp_path, monkeypatch, of):
    """As after a step of the optimizer that was too large: nothing bad takes the place of the last
    good checkpoint."""
    module = nn.Linear(4, 1)

    def spoil(step: int, taken: bool) -> None:
        if step == 6:
            with torch.no_grad():
                module.bias.fill_(math.inf)

    def loss(batch: Batch, step: int) -> Loss:
        return Loss(module(batch["rows"].float()).square().mean(), {})

    config = ToyRun(loop=loop(steps=20, keep=1))
    turn = Phase("module", module, loss, OPTIMIZER, after_step=spoil)
    run = Run.open(tmp_path / "run", config)
    with pytest.raises(
        UserError, match=r"not finite.*step-00000004 is kept; lower optimizer\.lr"
    ) as caught:
        train(config.loop, run, [turn], feed(Rows(), 8, seed=5), seed=0, published=module)
    assert "at step 8 modules.module.bias" in str(caught.value)
    assert Run(tmp_path / "run", None).latest()["step"] == 4
    assert all(map(is_finite, load_weights(tmp_path / "run").values()))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_element_is_found(bad):
    tensor = torch.randn(1000)
    assert is_finite(tensor) and is_finite(torch.zeros(0)) and is_finite(torch.arange(3))
    tensor[517] = bad
    assert not is_finite(tensor)


# The clock


def test_the_log_says_how_long_training_waits(tmp_path):
    class Slow(Rows):
        def gather(self, keys: list[tuple[int, int]]) -> dict[str, Tensor]:
            time.sleep(0.2)
            return super().gather(keys)

    Toy(ToyRun(loop=loop(steps=3, log_every=1, save_every=1))).train(
        tmp_path / "run", feed(Slow(), 8, seed=5)
    )
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "seconds" in line]
    assert len(lines) == 3 and set(CLOCKS) - {"save_seconds"} < lines[0].keys()
    assert (
        all(0 < line["data_wait"] <= 1 for line in lines)
        and lines[2]["data_wait"] * lines[2]["seconds"] > 0.15
    )
    assert "save_seconds" not in lines[0] and all(line["save_seconds"] > 0 for line in lines[1:])


# Elastic


@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_share_of_the_batch_may_change_between_starts(tmp_path, accumulate):
    """As on another number of processes, which test_sharded.py does: the same global batches, the
    same figures."""
    config = ToyRun(dropout=0.0, loop=loop(accumulate=2))
    ending(lambda: train_toy(tmp_path / "run", config, measure=lambda averaged: stop_me()))
    train_toy(tmp_path / "run", ToyRun(dropout=0.0, loop=loop(accumulate=accumulate)))
    train_toy(tmp_path / "straight", config)
    one, two = (leaves(Run(tmp_path / name, None).latest()) for name in ("run", "straight"))
    for name, value in one.items():
        torch.testing.assert_close(
            two[name], value, rtol=0, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}"
        )
    for line, other in zip(
        log_lines(tmp_path / "run"), log_lines(tmp_path / "straight"), strict=True
    ):
        assert line == pytest.approx(other, abs=1e-12)


def endless(folder: Path) -> None:
    """Train until a signal comes, on any number of ranks."""
    torch.set_num_threads(1)
    distributed.start()

    def main() -> None:
        try:
            train_toy(
                folder / "run",
                ToyRun(loop=loop(steps=1_000_000, preview_every=1_000_000, save_every=20)),
            )
        except Interrupted as interrupted:
            step = str(interrupted).partition("step ")[2].split()[0]
            (folder / f"rank-{distributed.rank()}").write_text(f"{interrupted.code} {step}")
            raise

    run_command(main)


def preempted(folder: Path) -> None:
    from toy import stop_at

    def main() -> None:
        raise Interrupted(stop_at(folder, 2, signal.SIGTERM), signal.SIGTERM)

    run_command(main)


if __name__ == "__main__":
    {"ranks": on_two_ranks, "endless": endless, "preempted": preempted}[sys.argv[1]](
        Path(sys.argv[2])
    )
