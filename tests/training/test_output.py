"""Output that cannot be written, a terminal that is closed, and who is asked to stop more than
once."""

from __future__ import annotations

import dataclasses
import errno
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest
import torch
import toy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from training.atomic import atomic_folder, replace_file
from training.command import run_command
from training.config import from_dict
from training.log import Log
from training.loop import LoopConfig

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
COMMAND = """
import sys, time
from pathlib import Path
from training.command import run_command

def main():
    {body}

run_command(main)
"""


def script(body: str) -> list[str]:
    return [sys.executable, "-c", COMMAND.format(body=body)]


def until(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.returncode
        time.sleep(0.02)


@pytest.fixture(scope="module", autouse=True)
def imported(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What training imports when it begins, so that no child has to."""
    toy.Toy(toy.ToyRun()).train(tmp_path_factory.mktemp("first") / "run")


def train_in_a_child(folder: Path, redirect: Callable[[], object]) -> int:
    """The process, forked, of a command that trains a toy: it waits in the middle of its steps for
    the file `go`."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.chdir(folder)
        os.setsid()
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        torch.set_num_threads(1)
        redirect()
        sys.stdout, sys.stderr = map(stream, (1, 2))
        run_command(train)
        code = 0
    except SystemExit as end:
        code = end.code
    finally:
        os._exit(code)


def stream(number: int) -> IO[str] | None:
    """As Python begins."""
    try:
        return open(number, "w", closefd=False)
    except OSError:
        return None


def train() -> None:
    made = toy.Toy(toy.ToyRun(loop=toy.loop(steps=6, save_every=3, preview_every=3)))
    move = made.turns[0].loss

    def loss(batch: toy.Batch, step: int) -> toy.Loss:
        Path("training").touch()
        while step == 2 and not Path("go").exists():
            time.sleep(0.01)
        print("step", step, flush=True)
        return move(batch, step)

    made.turns[0] = dataclasses.replace(made.turns[0], loss=loss)
    made.train(Path("run"))


def ends_well(folder: Path, pid: int) -> bool:
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return (
        code == 0 and (folder / "run" / "checkpoints" / "step-00000006" / "manifest.json").is_file()
    )


def test_training_outlives_its_terminal(tmp_path):
    """The window is closed: SIGHUP comes, and what is printed afterwards is an error (EIO)."""
    here, there = pty.openpty()
    pid = train_in_a_child(
        tmp_path, lambda: [os.dup2(there, number) for number in range(3)] + [os.close(here)]
    )
    os.close(there)
    while not (tmp_path / "training").exists():
        time.sleep(0.02)
    os.close(here)
    os.kill(pid, signal.SIGHUP)
    (tmp_path / "go").touch()
    assert ends_well(tmp_path, pid)


@pytest.mark.parametrize("where", ["nowhere", "full", "closed pipe"])
def test_training_goes_on_where_nothing_can_be_printed(tmp_path, where):
    def redirect() -> None:
        if where == "nowhere":
            os.closerange(0, 3)
            return
        reading, writing = os.pipe()
        os.close(reading)
        target = os.open("/dev/full", os.O_WRONLY) if where == "full" else writing
        os.dup2(target, 1), os.dup2(target, 2)

    (tmp_path / "go").touch()
    assert ends_well(tmp_path, train_in_a_child(tmp_path, redirect))


def test_files_do_not_become_the_output_of_a_process_without_one(tmp_path):
    body = 'file = open("file", "w"); print("printed"); print("told", file=sys.stderr); sys.stdout.flush()'
    command = ["bash", "-c", 'exec "$@" <&- >&- 2>&-', "bash", *script(body)]
    assert (
        subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, timeout=60, check=False).returncode
        == 0
    )
    assert (tmp_path / "file").read_text() == ""


def test_other_commands_say_that_it_was_their_output(tmp_path):
    """A report whose last line has no room, at once or when Python ends; a pipe that nobody
    reads."""
    for body in ('print("x", flush=True)', 'print("x" * 100)'):
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                script(body), env=ENVIRONMENT, stdout=full, stderr=subprocess.PIPE, text=True
            )
        assert done.returncode == 2
        assert done.stderr == f"error: cannot write standard output: {os.strerror(errno.ENOSPC)}\n"
    done = subprocess.run(
        [
            "bash",
            "-c",
            '"$@" | true; exit ${PIPESTATUS[0]}',
            "bash",
            *script("[print('x' * 999) for _ in range(999)]"),
        ],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 141 and done.stderr == ""


def test_an_output_of_ascii_takes_what_it_has_not(tmp_path):
    environment = ENVIRONMENT | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        script('print("caf\\u00e9 \\u2192 \\u2191")'),
        cwd=tmp_path,
        env=environment,
        capture_output=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"caf\\xe9 \\u2192 \\u2191\n", b"")


def test_a_process_that_is_asked_to_stop_again_and_again_ends_in_order(tmp_path):
    body = """import atexit, signal
    from training.signals import listening, Interrupted
    atexit.register(lambda: (time.sleep(0.5), Path("ended").touch()))
    try:
        with listening(signal.SIGTERM) as requests:
            Path("ready").touch()
            while not requests.number:
                time.sleep(0.01)
            raise Interrupted("stopped", requests.number)
    finally:
        time.sleep(0.5)
        Path("tidied").touch()"""
    process = subprocess.Popen(
        script(body), cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    until((tmp_path / "ready").exists, process)
    while process.poll() is None:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
    assert process.returncode == 75 and process.stderr.read() == b"stopped\n"
    assert (tmp_path / "tidied").exists() and (tmp_path / "ended").exists()


def full(*names: str) -> OSError:
    """What a full disk says; of two names the second is the one that is written."""
    return OSError(
        errno.ENOSPC,
        os.strerror(errno.ENOSPC),
        *(names[:1]),
        *([None, names[1]] if len(names) > 1 else []),
    )


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ((), "the folder"),
        (("inside",), "the folder/inside"),
        (("source", "inside"), "the folder/inside"),
        (("other",), "other"),
    ],
)
def test_a_full_disk_is_told_of_the_file_that_was_to_be_written(tmp_path, capsys, names, says):
    def main() -> None:
        with atomic_folder(tmp_path / "the folder") as temporary:
            raise full(
                *(
                    str(temporary / name) if name == "inside" else str(tmp_path / name)
                    for name in names
                )
            )

    with pytest.raises(SystemExit):
        run_command(main)
    assert (
        capsys.readouterr().err
        == f"error: cannot write {tmp_path / says}: {os.strerror(errno.ENOSPC)}\n"
    )
    assert os.listdir(tmp_path) == []


def test_and_by_no_temporary_name(tmp_path, capsys, monkeypatch):
    def replace(source: Path, target: Path) -> None:
        raise full(str(source), str(target))

    for broken in ({"replace": replace}, {"fsync": lambda number: (_ for _ in ()).throw(full())}):
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            for name, function in broken.items():
                patch.setattr(os, name, function)
            run_command(lambda: replace_file(tmp_path / "record.json", b"{}"))
        assert (
            capsys.readouterr().err
            == f"error: cannot write {tmp_path}/record.json: {os.strerror(errno.ENOSPC)}\n"
        )


def test_a_clock_that_was_set_back_hides_no_step(tmp_path, monkeypatch):
    first = Log(tmp_path, 0)
    for step in range(1, 6):
        first.write(step, {"loss": float(step)})
    first.close()
    monkeypatch.setattr(time, "time_ns", lambda: 10**18)
    for begun in (3, 7):
        again = Log(tmp_path, begun)
        for step in range(begun + 1, begun + 5):
            again.write(step, {"loss": 100.0 + step})
        again.close()
    seen = EventAccumulator(str(tmp_path)).Reload().Scalars("loss")
    assert [(each.step, each.value) for each in seen] == [
        (1, 1),
        (2, 2),
        (3, 3),
        *((s, 100 + s) for s in range(4, 12)),
    ]


def test_a_run_takes_at_least_one_bad_step():
    with pytest.raises(ValueError, match=r"loop.max_bad_steps=0 must be at least 1"):
        LoopConfig(max_bad_steps=0)
    assert from_dict(LoopConfig, {"max_bad_steps": 1}, "here").max_bad_steps == 1
    assert toy.loop().max_bad_steps >= 1


def test_what_is_shared_names_no_folder_of_this_machine(tmp_path):
    from eval.report.stages import Stage
    from tokenizer.run import TokenizerRun
    from tokenizer.sharing import _neutral
    from training.config import to_yaml

    raw = {
        "root": "/home/anna/runs",
        "data": {"source": "/home/anna/pics"},
        "objective": {"lpips_weights": "nets/a.pth"},
    }
    config = from_dict(TokenizerRun, raw, "here")
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    shown = Stage.read(tmp_path).config
    assert "anna" not in shown and "root: runs" in shown and "source: pics" in shown
    relative = dataclasses.replace(
        config, data=dataclasses.replace(config.data, source="anna/pics")
    )
    shared = _neutral(relative)
    assert (shared.data.source, shared.objective.lpips_weights) == ("pics", "a.pth")


def test_a_backend_of_matplotlib_that_it_does_not_know_stops_no_command():
    """It is there for windows; all that is drawn here becomes a file."""
    code = "from training.command import run_command; run_command(lambda: __import__('matplotlib.figure'))"
    environment = os.environ | {"MPLBACKEND": "nonsense", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
