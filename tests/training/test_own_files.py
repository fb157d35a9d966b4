"""What runs remove: what they wrote and nothing else, whatever else lies in their folders, and
through links."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from test_checkpoint import Config, state_at, steps_in
from toy import Toy, ToyRun, loop

from training.checkpoint import Run
from training.errors import UserError
from training.log import Log


def started(folder: Path, steps: list[int], keep: int = 9) -> Path:
    """A run with checkpoints, that no process holds."""
    run = Run.open(folder, Config())
    for step in steps:
        run.save(step, state_at(step), keep)
    run.publish({"weight": torch.ones(3)}, 1)
    run._lock.close()
    return folder


def mine(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")


def kept(folder: Path, *names: str) -> bool:
    return all((folder / name).read_text() == "mine" for name in names)


# Starting over


@pytest.mark.parametrize("name", ["thesis.tmp", ".thesis.tmp", ".vimrc.7.tmp"])
@pytest.mark.parametrize("fresh", [False, True])
def test_a_folder_with_one_file_of_someone_is_no_run(tmp_path, name, fresh):
    mine(tmp_path / "run", name)
    with pytest.raises(UserError, match="it is no run"):
        Run.open(tmp_path / "run", Config(), fresh=fresh)
    assert kept(tmp_path / "run", name) and os.listdir(tmp_path / "run") == [name]


OTHERS = (
    "notes.md",
    "thesis.tmp",
    ".thesis.9.tmp",
    "previews/best.png",
    "checkpoints/step-notes.txt",
    "data/a/b.png",
)
OTHERS += (
    "checkpoints/step-00000001.bak/state.pt",
    "weights/model.safetensors.bak",
    "samples/samples.npz",
)


def test_fresh_leaves_what_no_run_wrote_and_says_so(tmp_path, capsys):
    folder = started(tmp_path / "run", [1, 2])
    mine(folder, *OTHERS)
    run = Run.open(folder, Config(seed=1), fresh=True)
    assert kept(folder, *OTHERS) and run.latest() is None
    said = capsys.readouterr().out
    assert "what no command here wrote stays" in said and "notes.md" in said
    assert not (folder / "weights" / "model.safetensors").exists() and steps_left(folder) == []


def steps_left(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder / "checkpoints") if name[5:].isdigit()]


@pytest.mark.parametrize(
    "name", ["checkpoints/step-00000007/state.pt", "checkpoints/step-00000001/notes.txt"]
)
def test_what_would_be_taken_for_a_checkpoint_ends_a_fresh_start_before_it(tmp_path, name):
    folder = started(tmp_path / "run", [1, 2])
    mine(folder, name)
    with pytest.raises(
        UserError, match="no command here wrote it, and it is in the way: move it away"
    ):
        Run.open(folder, Config(), fresh=True)
    assert kept(folder, name) and Run(folder, Config()).latest()["step"] == 2


@pytest.mark.parametrize("linked", ["", "checkpoints", "weights"])
def test_links_to_other_disks_work_and_stay(tmp_path, linked):
    disk = tmp_path / "disk"
    disk.mkdir()
    link = tmp_path / "run" / linked
    folder = tmp_path / "run"
    if linked:
        started(folder, [1])
        shutil.move(folder / linked, disk / "there")
        link.symlink_to(disk / "there")
    else:
        folder.symlink_to(disk)
    started(folder, [2, 3])
    assert link.is_symlink() and Run(folder, Config()).latest()["step"] == 3
    target = link.resolve()
    mine(target, "notes.txt")
    run = Run.open(folder, Config(seed=1), fresh=True)
    assert (
        link.is_symlink()
        and link.resolve() == target
        and kept(target, "notes.txt")
        and run.latest() is None
    )
    run.save(1, state_at(1), 1)
    assert steps_in_link(folder) == ["step-00000001"]


def steps_in_link(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder / "checkpoints") if name.startswith("step-"))


def test_runs_of_before_there_were_lists_go_on_and_start_over(tmp_path):
    folder = started(tmp_path / "run", [1, 2])
    (folder / ".lock").write_text("")
    mine(folder, *OTHERS)
    run = Run.open(folder, Config())
    assert run.latest()["step"] == 2
    run.save(3, state_at(3), 1)
    assert steps_left(folder) == ["step-00000003"]
    run._lock.close()
    assert Run.open(folder, Config(seed=1), fresh=True).latest() is None and kept(folder, *OTHERS)


def test_another_programs_configuration_is_not_overwritten(tmp_path):
    mine(tmp_path / "run", "config.yaml", "photo.png")
    with pytest.raises(UserError, match="no run"):
        Run.open(tmp_path / "run", Config())
    assert kept(tmp_path / "run", "config.yaml", "photo.png")


def test_a_run_copied_without_hidden_files_goes_on(tmp_path):
    folder = started(tmp_path / "run", [1, 2])
    (folder / ".lock").unlink()
    assert Run.open(folder, Config()).latest()["step"] == 2


# Names of checkpoints


def test_only_checkpoints_as_they_are_written_are_read(tmp_path, capsys):
    """docs/slurm.md: to go back further than the newest one, move that away."""
    folder = started(tmp_path / "run", [10, 20])
    os.rename(
        folder / "checkpoints" / "step-00000020", folder / "checkpoints" / "step-00000020.bak"
    )
    shutil.copytree(
        folder / "checkpoints" / "step-00000010",
        folder / "checkpoints" / "step-00000010-safety-copy",
    )
    shutil.copytree(folder / "checkpoints" / "step-00000010", folder / "checkpoints" / "step-99")
    mine(folder, "checkpoints/step-notes.txt", "checkpoints/step-")
    run = Run.open(folder, Config())
    assert run.latest()["step"] == 10 and run.newest() == "step-00000010"
    assert "damaged" not in capsys.readouterr().out
    run.save(30, state_at(30), keep=1)
    assert sorted(os.listdir(folder / "checkpoints")) == [
        "step-",
        "step-00000010-safety-copy",
        "step-00000020.bak",
        "step-00000030",
        "step-99",
        "step-notes.txt",
    ]
    with run.marking():
        pass


def test_a_checkpoint_with_a_file_of_someone_stays(tmp_path, capsys):
    folder = started(tmp_path / "run", [1])
    mine(folder, "checkpoints/step-00000001/notes.txt")
    run = Run.open(folder, Config())
    for step in (2, 3, 4):
        run.save(step, state_at(step), keep=1)
    assert steps_in(folder) == [1, 4] and kept(folder, "checkpoints/step-00000001/notes.txt")
    assert (
        capsys.readouterr().out.count("step-00000001 stays: no command here wrote notes.txt in it")
        == 1
    )


def test_a_damaged_checkpoint_is_replaced_around_a_file_of_someone(tmp_path):
    folder = started(tmp_path / "run", [1, 2])
    mine(folder, "checkpoints/step-00000002/notes.txt")
    os.truncate(folder / "checkpoints" / "step-00000002" / "state.pt", 10)
    run = Run.open(folder, Config())
    assert run.latest()["step"] == 1
    run.save(2, state_at(2), keep=9)
    assert run.latest()["step"] == 2 and kept(folder, "checkpoints/step-00000002/notes.txt")


def test_steps_of_nine_digits_come_after_those_of_eight(tmp_path):
    folder = started(tmp_path / "run", [99_999_999, 100_000_000])
    run = Run.open(folder, Config())
    assert run.newest() == "step-100000000" and run.latest()["step"] == 100_000_000
    run.save(100_000_001, state_at(1), keep=2)
    assert steps_in(folder) == [100_000_000, 100_000_001]


# Network file systems, and files that are damaged


@pytest.mark.parametrize("number", [errno.EBUSY, errno.ENOTEMPTY, errno.ESTALE])
@pytest.mark.parametrize("call", ["rename", "unlink", "rmdir"])
def test_an_old_checkpoint_that_is_still_open_elsewhere_is_no_end(
    tmp_path, monkeypatch, capsys, number, call
):
    folder = started(tmp_path / "run", [1])
    run, real = Run.open(folder, Config()), getattr(os, call)

    def busy(path, *rest, **keywords):
        if "step-00000001" in str(path):
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *rest, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, busy)
        run.save(2, state_at(2), keep=1)
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "step-00000001 stays" in said and os.strerror(number) in said
    assert run.latest()["step"] == 2
    run._lock.close()
    with monkeypatch.context() as patch:  # as long as it is open
        patch.setattr(os, call, busy)
        run = Run.open(folder, Config())
    assert run.latest()["step"] == 2
    run._lock.close()
    Run.open(folder, Config()).save(3, state_at(3), keep=1)
    assert os.listdir(folder / "checkpoints") == ["step-00000003"]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_a_run_goes_on_where_the_file_system_gives_no_locks(tmp_path, monkeypatch, capsys, number):
    monkeypatch.setattr(
        fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(number, os.strerror(number)))
    )
    assert Run.open(tmp_path / "run", Config()).latest() is None
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "gives no locks" in said and str(tmp_path / "run") in said


@pytest.mark.parametrize("text", ["[]", "3", '{"images": 5}', "{", "\x00"])
def test_damaged_inputs_are_said_and_not_compared(tmp_path, capsys, text):
    folder = started(tmp_path / "run", [1])
    (folder / "inputs.json").write_text(text)
    assert Run.open(folder, Config(), inputs={"images": "a" * 64}).latest()["step"] == 1
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "inputs.json" in said


def test_damaged_lines_of_a_log_are_said_and_left_out(tmp_path, capsys):
    lines = [
        b'{"step": 1, "a": 0.5}',
        b'{"step": 2, "a": \xff\xfe}',
        b'{"step": "x"}',
        b"[]",
        b'{"step": 3, "a": 1.0}',
    ]
    (tmp_path / "log.jsonl").write_bytes(b"\n".join(lines) + b'\n{"step": 4, "a')
    log = Log(tmp_path, 3)
    log.close()
    assert [line["step"] for line in log.kept] == [1, 3]
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "3 damaged lines" in said and "log.jsonl" in said
    assert [
        json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()
    ] == [1, 3]


def test_everything_that_a_training_run_writes_is_listed(tmp_path):
    """So that a fresh start leaves nothing of the one before."""
    folder = tmp_path / "run"
    config = ToyRun(loop=loop(steps=6, save_every=2, preview_every=3))
    Toy(config).train(folder)
    Run.open(folder, dataclasses.replace(config, dropout=0.1), fresh=True)
    assert sorted(os.listdir(folder)) == [".lock", "config.yaml", "inputs.json"]
