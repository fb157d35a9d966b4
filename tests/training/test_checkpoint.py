"""Run folders: whole or absent, never in between; damage is found; one configuration, one
writer."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import shutil
import signal
from pathlib import Path

import processes
import pytest
import torch
from safetensors.torch import save_file

from training.atomic import atomic_folder
from training.checkpoint import (
    FREE_KEYS,
    Run,
    digest,
    load_weights,
    replace_file,
    sha256,
    weights_hash,
    write_weights,
)
from training.errors import UserError
from training.loop import LoopConfig
from training.optim import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class Config:
    root: str = "runs"
    seed: int = 0
    size: int | None = None
    loop: LoopConfig = dataclasses.field(default_factory=LoopConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)


def state_at(step: int) -> dict:
    return {
        "step": step,
        "modules": {"a": {"weight": torch.full((100,), float(step))}},
        "list": [1, (2.5, None)],
    }


def saved(folder: Path, steps: list[int], keep: int = 9) -> Run:
    run = Run.open(folder, Config())
    for step in steps:
        run.save(step, state_at(step), keep)
    return run


def steps_in(folder: Path) -> list[int]:
    return sorted(
        int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").iterdir()
    )


def hidden_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob(".*") if path.name != ".lock"]


# Atomic writes


def test_replace_file_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "made" / "file"
    replace_file(path, b"old")
    monkeypatch.setattr(
        os,
        "fsync",
        lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")),
    )
    with pytest.raises(OSError) as caught:
        replace_file(path, b"new")
    assert caught.value.filename == str(path)
    assert path.read_bytes() == b"old" and os.listdir(path.parent) == ["file"]


def test_atomic_folder_appears_at_the_end_and_replaces(tmp_path):
    path = tmp_path / "made" / "folder"
    for content in ("first", "second"):
        with atomic_folder(path) as temporary:
            (temporary / "inner").mkdir()
            (temporary / "inner" / content).write_text(content)
            assert not (path / "inner" / content).exists()
        assert [p.name for p in path.rglob("*") if p.is_file()] == [content]
    assert os.listdir(path.parent) == ["folder"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_atomic_folder_vanishes_on_errors(tmp_path, error):
    path = tmp_path / "folder"
    with atomic_folder(path) as temporary:
        (temporary / "old").write_text("old")
    with pytest.raises(error), atomic_folder(path) as temporary:
        (temporary / "new").write_text("new")
        raise error
    assert os.listdir(tmp_path) == ["folder"] and os.listdir(path) == ["old"]


# Checkpoints


def test_a_checkpoint_round_trip(tmp_path):
    run = saved(tmp_path / "run", [3])
    state = run.latest()
    assert torch.equal(state["modules"]["a"]["weight"], torch.full((100,), 3.0))
    assert state["list"] == [1, (2.5, None)]
    assert run.finished(3) and not run.finished(4)
    assert Run(tmp_path / "empty", Config()).latest() is None


def test_only_the_newest_are_kept(tmp_path):
    saved(tmp_path / "run", [1, 2, 10, 100], keep=2)
    assert steps_in(tmp_path / "run") == [10, 100]


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


DAMAGE = {
    "bit flip": lambda folder: flip_bit(folder / "state.pt"),
    "truncated": lambda folder: os.truncate(folder / "state.pt", 100),
    "empty": lambda folder: os.truncate(folder / "state.pt", 0),
    "missing": lambda folder: (folder / "state.pt").unlink(),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "cut manifest": lambda folder: os.truncate(folder / "manifest.json", 20),
    "other manifest": lambda folder: (folder / "manifest.json").write_text("[]"),
    "empty manifest": lambda folder: (folder / "manifest.json").write_text(
        '{"files": {"state.pt": null}}'
    ),
    "empty folder": lambda folder: [path.unlink() for path in folder.iterdir()],
    "a file": lambda folder: (shutil.rmtree(folder), folder.write_text("")),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path, capsys, damage):
    run = saved(tmp_path / "run", [1, 2, 3])
    damage(run.checkpoints / "step-00000003")
    assert run.latest()["step"] == 2
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "step-00000003 is damaged" in said


def test_all_damaged_is_none(tmp_path):
    run = saved(tmp_path / "run", [1, 2])
    for folder in run.checkpoints.iterdir():
        flip_bit(folder / "state.pt")
    assert run.latest() is None


def test_a_damaged_checkpoint_never_displaces_a_whole_one(tmp_path):
    run = saved(tmp_path / "run", [4, 8], keep=1)
    flip_bit(run.checkpoints / "step-00000008" / "state.pt")
    run.save(6, state_at(6), keep=1)  # the run went on from an earlier step
    assert run.latest()["step"] == 6
    run.save(8, state_at(8), keep=1)
    assert run.latest()["step"] == 8 and steps_in(tmp_path / "run") == [8]


class Payload:
    """What a hostile pickle does when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_a_hostile_checkpoint_is_not_executed(tmp_path, capsys):
    """Also with a manifest that agrees with it."""
    run, trap = saved(tmp_path / "run", [1, 2]), tmp_path / "executed"
    for number, payload in enumerate([Payload(trap), {"step": 2, "modules": [Payload(trap)]}]):
        folder = run.checkpoints / "step-00000002"
        torch.save(payload, folder / "state.pt", _use_new_zipfile_serialization=number == 0)
        files = {
            "state.pt": {
                "sha256": sha256(folder / "state.pt"),
                "bytes": (folder / "state.pt").stat().st_size,
            }
        }
        (folder / "manifest.json").write_text(json.dumps({"step": 2, "files": files}))
        assert run.latest()["step"] == 1
        assert not trap.exists()
        assert "step-00000002 is damaged" in capsys.readouterr().out


# A full disk


FULL_DISK = """
import resource, sys
import torch
from pathlib import Path
from training.checkpoint import Run
from training.command import run_command
from test_checkpoint import Config
from toy import Toy, ToyRun, loop


def attempt(limit, write):
    # As a command whose files may have `limit` bytes; prints its exit code.
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    try:
        run_command(write)
    except SystemExit as error:
        print(error.code)


folder, tensors = Path(sys.argv[1]), {"weight": torch.zeros(1_000_000)}
run = Run.open(folder / "run", Config())
attempt(100_000, lambda: run.save(2, {"step": 2, **tensors}, 2))
attempt(100_000, lambda: run.publish(tensors, 2))
many = ToyRun(loop=loop(steps=400, log_every=1, save_every=100))
attempt(60_000, lambda: Toy(many).train(folder / "toy"))
"""


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path):
    """A limit on the size of files stands for the disk: a checkpoint, weights, and a log that
    grows."""
    folder = tmp_path / "run"
    run = saved(folder, [1])
    run.publish({"weight": torch.ones(3)}, 1)
    del run  # its lock
    done = processes.run("-c", FULL_DISK, tmp_path)
    codes = [
        line for line in done.stdout.splitlines() if line.isdigit()
    ]  # between lines of progress, if it is slow
    assert done.returncode == 0 and codes == ["2", "2", "2"], (done.stdout, done.stderr)
    save, publish, log = done.stderr.splitlines()
    for line, path in ((save, "step-00000002"), (publish, "model.safetensors")):
        assert path in line and "bytes cannot be written" in line and "intact" in line
    assert "cannot write" in log and str(tmp_path / "toy") in log
    assert Run(folder, Config()).latest()["step"] == 1
    assert torch.equal(load_weights(folder)["weight"], torch.ones(3))
    assert hidden_in(tmp_path) == [] and steps_in(folder) == [1]
    before = Run(tmp_path / "toy", None).latest()["step"]
    assert before >= 100 and before % 100 == 0


def test_a_full_disk_names_the_file_of_any_write(tmp_path):
    """RLIMIT_FSIZE stands for the disk; 0 bytes may be written."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        with pytest.raises(OSError) as caught:
            replace_file(tmp_path / "config.yaml", b"text")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.filename == str(tmp_path / "config.yaml") and os.listdir(tmp_path) == []


# Weights


def test_weights_round_trip_and_hash(tmp_path):
    tensors = {"a": torch.arange(6).view(2, 3), "b": torch.rand(4)[::2]}
    write_weights(tmp_path / "weights" / "model.safetensors", tensors, {"step": "1"})
    loaded = load_weights(tmp_path)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert weights_hash(tmp_path) == sha256(tmp_path / "weights" / "model.safetensors")


def test_absent_and_damaged_weights_are_named(tmp_path):
    path = tmp_path / "weights" / "model.safetensors"
    for function in (load_weights, weights_hash):
        with pytest.raises(UserError, match=r"model\.safetensors: there are no weights here"):
            function(tmp_path)
    write_weights(path, {"a": torch.zeros(100)}, {})
    for size in (200, 4, 0):
        os.truncate(path, size)
        with pytest.raises(UserError, match=r"model\.safetensors: damaged"):
            load_weights(tmp_path)


def test_a_flipped_bit_in_weights_is_found(tmp_path):
    path = tmp_path / "weights" / "model.safetensors"
    write_weights(
        path, {"a": torch.rand(100), "b": torch.arange(3, dtype=torch.bfloat16)}, {"step": "1"}
    )
    whole = path.read_bytes()
    for place in (len(whole) - 1, len(whole) - 200):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(
            UserError, match=r"model\.safetensors: damaged .*as written.*training command again"
        ):
            load_weights(tmp_path)
    save_file({"a": torch.ones(2)}, path)  # by another program, without a checksum
    assert load_weights(tmp_path)["a"].sum() == 2


def test_digest_is_canonical():
    assert (
        digest({"b": 1, "a": [1.5, None]})
        == digest({"a": [1.5, None], "b": 1})
        != digest({"a": [1.5], "b": 1})
    )


# One configuration, one writer


def test_a_run_reopens_with_its_own_configuration(tmp_path):
    for _ in range(2):
        run = Run.open(
            tmp_path / "run", Config(optimizer=OptimizerConfig(lr=1e-5, rates={"a.b": 3e-7}))
        )
        del run


@pytest.mark.parametrize(
    ("key", "other"),
    [
        ("seed", Config(seed=1)),
        ("size", Config(size=3)),
        ("optimizer.lr", Config(optimizer=OptimizerConfig(lr=1.0))),
        ("optimizer.betas", Config(optimizer=OptimizerConfig(betas=(0.5, 0.9)))),
        ("optimizer.rates.encoder", Config(optimizer=OptimizerConfig(rates={"encoder": 1.0}))),
        ("loop.steps", Config(loop=LoopConfig(steps=7))),
    ],
)
def test_another_configuration_is_refused_by_key(tmp_path, key, other):
    run = saved(tmp_path / "run", [1])
    del run
    kept = (tmp_path / "run" / "config.yaml").read_bytes()
    with pytest.raises(UserError) as caught:
        Run.open(tmp_path / "run", other)
    message = str(caught.value)
    assert (
        f"made with {key}=" in message and "--fresh" in message and str(tmp_path / "run") in message
    )
    assert (tmp_path / "run" / "config.yaml").read_bytes() == kept
    del caught
    assert Run.open(tmp_path / "run", other, fresh=True).latest() is None


def test_settings_that_move_no_weight_may_change(tmp_path):
    run = saved(tmp_path / "run", [1])
    del run
    changes = {"log_every": 1, "save_every": 2, "preview_every": 3, "keep": 4, "workers": 5}
    assert {"root", *changes} <= FREE_KEYS
    assert (
        Run.open(tmp_path / "run", Config(root="elsewhere", loop=LoopConfig(**changes))).latest()[
            "step"
        ]
        == 1
    )


def test_fresh_starts_over(tmp_path):
    folder = tmp_path / "run"
    run = saved(folder, [1])
    (folder / "log.jsonl").write_text("{}")
    del run
    run = Run.open(folder, Config(seed=1), fresh=True)
    assert run.latest() is None
    assert sorted(os.listdir(folder)) == [".lock", "config.yaml", "inputs.json"]


def test_a_run_has_one_writer(tmp_path):
    first = Run.open(tmp_path / "run", Config())
    for fresh in (False, True):
        with pytest.raises(UserError, match=r"run: another process is writing"):
            Run.open(tmp_path / "run", Config(), fresh=fresh)
    del first
    Run.open(tmp_path / "run", Config())


def test_a_process_that_reads_data_does_not_outlive_its_run_with_the_lock(tmp_path):
    """As when the one that forked it is killed: who starts the run again must not wait for it."""
    run = Run.open(tmp_path / "run", Config())
    ready, begun = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(begun, b".")
        signal.pause()
    os.read(ready, 1)
    del run
    try:
        Run.open(tmp_path / "run", Config())
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_the_newest_checkpoint_by_name(tmp_path):
    assert Run(tmp_path / "run", Config()).newest() == ""
    assert saved(tmp_path / "run", [2, 9, 10]).newest() == "step-00000010"


def test_without_a_number_to_keep_none_is_removed(tmp_path):
    run = saved(tmp_path / "run", [1, 2, 3], keep=9)
    run.save(4, state_at(4), None)
    assert steps_in(tmp_path / "run") == [1, 2, 3, 4]
    run.save(5, state_at(5), 1)
    assert steps_in(tmp_path / "run") == [5]


@pytest.mark.parametrize("fresh", [False, True])
def test_a_folder_of_something_else_is_left_alone(tmp_path, fresh):
    (tmp_path / "photo.png").write_text("mine")
    with pytest.raises(UserError, match="holds files but no config"):
        Run.open(tmp_path, Config(), fresh=fresh)
    assert os.listdir(tmp_path) == ["photo.png"]


def test_fresh_removes_only_what_a_run_here_made(tmp_path):
    """Another program's folder may hold a config.yaml too."""
    (tmp_path / "photo.png").write_text("mine")
    (tmp_path / "config.yaml").write_text("theirs: 1")
    with pytest.raises(UserError, match="remove it yourself"):
        Run.open(tmp_path, Config(), fresh=True)
    assert sorted(os.listdir(tmp_path)) == ["config.yaml", "photo.png"]


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (
        tmp_path / "file",
        tmp_path / "file" / "run",
        tmp_path / "file" / "deep" / "run",
    ):
        with pytest.raises(UserError, match="file"):
            Run.open(folder, Config())


@pytest.mark.parametrize("text", ["a: [1", "\x00", "- 1", "42"])
def test_a_damaged_configuration_is_named(tmp_path, text):
    run = saved(tmp_path / "run", [1])
    del run
    (tmp_path / "run" / "config.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        Run.open(tmp_path / "run", Config())
    assert str(tmp_path / "run") in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("config", [Config(), Config(seed=1)])
def test_a_run_that_lost_its_configuration_does_not_go_on_with_any_other(tmp_path, config):
    folder = tmp_path / "run"
    run = saved(folder, [1])
    del run
    text = (folder / "config.yaml").read_bytes()
    (folder / "config.yaml").unlink()
    with pytest.raises(
        UserError, match=r"config.yaml is not there, .*step-00000001 .*put it back, .*--fresh"
    ):
        Run.open(folder, config)
    assert not (folder / "config.yaml").exists()
    (folder / "config.yaml").write_bytes(text)
    assert Run.open(folder, Config()).latest()["step"] == 1


def test_left_overs_of_a_crash_are_removed(tmp_path):
    run = saved(tmp_path / "run", [1])
    del run
    for name in (".config.yaml.9.tmp", "weights/.model.safetensors.9.tmp"):
        (tmp_path / "run" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "run" / name).write_text("half")
    for name in (".step-00000002.9.tmp", ".step-00000001.9.old"):
        (tmp_path / "run" / "checkpoints" / name).mkdir()
        (tmp_path / "run" / "checkpoints" / name / "state.pt").write_text("half")
    assert Run.open(tmp_path / "run", Config()).latest()["step"] == 1
    assert hidden_in(tmp_path / "run") == []


def test_other_inputs_are_refused_once_something_was_trained(tmp_path):
    folder = tmp_path / "run"
    run = Run.open(folder, Config(), inputs={"tokens": "a" * 64})
    run._lock.close()
    run = Run.open(folder, Config(), inputs={"tokens": "b" * 64})  # nothing was trained yet
    run.save(1, {"step": 1}, keep=2)
    run._lock.close()
    with pytest.raises(
        UserError, match=r"made from tokens bbbbbbbb…, which is now cccccccc…: .*--fresh"
    ):
        Run.open(folder, Config(), inputs={"tokens": "c" * 64})
    assert Run.open(folder, Config(), inputs={"tokens": "b" * 64}).latest()["step"] == 1
