"""Samples are drawn in shards: whatever ends a command, the same one goes on, to the same bytes."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from generate import drawing, images
from generate.drawing import Request, shard_size
from generate.npz import DAMAGES, Column, Rows, first_damage, write_arrays
from generate.shards import Shards, cut
from priors.interface import SampleOptions
from priors.sampling.noise import uniform_noise
from tokenizer.interface import CodeLayout
from training import distributed
from training.atomic import COMMITTED, is_settled
from training.errors import UserError

LAYOUT = CodeLayout(((2, 2),), (256,))
REQUEST = Request(num=23, classes=(0, 2, 1), options=SampleOptions(seed=4))


class Noise:
    """Codes that belong to the sample and its class; calls `before` with the ids of each batch."""

    layout, num_classes = LAYOUT, 3

    def __init__(self, before=lambda ids: None):
        self.before = before

    def sample(self, labels, options, ids, known=None, given=None):
        self.before(ids.tolist())
        return (
            uniform_noise(options.seed, ids, 0, (4,)).mul(64).long() + 64 * labels[:, None]
        ).clamp(0, 255)


class Painter:
    layout = LAYOUT

    def decode(self, codes):
        return codes.view(-1, 1, 2, 2).expand(-1, 3, -1, -1) / 127.5 - 1


class Stop(Exception):
    """Stands for whatever ends a command."""


@pytest.fixture(autouse=True)
def models(monkeypatch):
    monkeypatch.setattr(
        images, "maker", lambda folder, record: {"prior_sha256": "a", "tokenizer_sha256": "b"}
    )
    monkeypatch.setattr(images, "load_models", lambda folder, record: (record.prior, Painter()))


def sample(out, batch_size=4, prior=None, **changes):
    record = SimpleNamespace(
        class_names=["cat", "dog", "cow"], tokenizer="../tokenizer", prior=prior or Noise()
    )
    images.write_samples(
        Path("prior"), record, dataclasses.replace(REQUEST, **changes), out, batch_size
    )


def stopping(after):
    """A prior that is stopped as it begins another batch after so many."""
    seen = []

    def before(ids):
        if len(seen) == after:
            raise Stop
        seen.append(ids)

    return Noise(before)


def recording():
    drawn = []
    return Noise(drawn.append), drawn


def contents(out):
    """What a folder holds, but for times."""
    files = {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file()
    }
    files.pop(".lock")
    facts = json.loads(files.pop("samples.json"))
    return files | {
        "facts": {key: facts[key] for key in ("made_from", "class_names", "samples_sha256")}
    }


@pytest.fixture
def whole(tmp_path):
    """The folder of a command that nothing stopped."""
    sample(tmp_path / "whole")
    return contents(tmp_path / "whole")


# Files of arrays


def test_arrays_are_numpys_to_the_byte_and_read_as_numpy_reads_them(tmp_path):
    rows = np.random.default_rng(0).integers(0, 256, (21, 3, 5, 3), dtype=np.uint8)
    labels, empty = np.arange(21), np.zeros((0, 4), np.int64)
    np.savez(tmp_path / "theirs.npz", arr_0=rows, arr_1=labels, codes=empty)
    np.savez_compressed(tmp_path / "small.npz", arr_0=rows, arr_1=labels)
    write_arrays(
        tmp_path / "ours.npz",
        {
            "arr_0": Column(rows.shape, rows.dtype, np.array_split(rows, 4)),
            "arr_1": Column((21,), labels.dtype, [labels[:5], labels[5:]]),
            "codes": Column(empty.shape, empty.dtype, []),
        },
    )
    assert (tmp_path / "ours.npz").read_bytes() == (tmp_path / "theirs.npz").read_bytes()
    keys = [
        0,
        -1,
        slice(None),
        slice(3, 9),
        slice(20, 2, -3),
        [5, 5, 4],
        np.array([20, 0, 1, 2]),
        [],
    ]
    for name in ("ours.npz", "small.npz"):
        read = Rows(tmp_path / name, "arr_0")
        assert (
            read.shape == rows.shape and len(read) == 21 and first_damage(tmp_path / name) is None
        )
        for key in keys:
            wanted = rows[np.asarray(key, np.int64)] if isinstance(key, list) else rows[key]
            assert np.array_equal(read[key], wanted) and read[key].dtype == np.uint8
        assert np.array_equal(np.stack(list(read)), rows)
        with pytest.raises(IndexError):
            read[21]


def test_files_that_lie_are_found_out(tmp_path):
    path, rows = tmp_path / "a.npz", np.arange(40, dtype=np.uint8).reshape(10, 4)
    np.savez(path, arr_0=rows)
    data = path.read_bytes()
    for wrong in (
        data[:-40],  # no directory
        data.replace(b"(10, 4)", b"(11, 4)"),
        data.replace(b"(10, 4)", b"(-1, 4)"),
        data.replace(b"|u1", b"|O1"),
    ):
        path.write_bytes(wrong)
        with pytest.raises(DAMAGES):
            Rows(path, "arr_0")[:]
    path.write_bytes(data.replace(rows.tobytes(), rows[::-1].tobytes()))
    assert first_damage(path) == "arr_0.npy"
    with pytest.raises(KeyError):
        Rows(path, "codes")


# Shards


def test_pieces_cover_what_is_missing_and_end_at_whole_batches():
    assert cut([range(3, 25), range(30, 31)], 10) == [
        range(3, 10),
        range(10, 20),
        range(20, 25),
        range(30, 31),
    ]
    assert [
        shard_size(500, batch, world)
        for batch, world in ((50, 1), (50, 4), (1, 1), (1000, 1), (64, 2))
    ] == [
        100,
        100,
        64,
        1000,
        64,
    ]
    assert (
        shard_size(100, 50, 4) == 50 and shard_size(8, 1, 4) == 2
    )  # every process has something to do


@pytest.mark.parametrize("after", range(6))
def test_the_same_command_goes_on(after, tmp_path, whole, monkeypatch):
    monkeypatch.setattr("generate.shards.LEAST", 8)  # two batches
    out = tmp_path / "out"
    with pytest.raises(Stop):
        sample(out, prior=stopping(after))
    assert not (out / "samples.json").exists()
    prior, drawn = recording()
    sample(out, prior=prior)
    first = after // 2 * 8  # what was in no shard yet is drawn again
    assert [ids[0] for ids in drawn] == list(range(first, 23, 4))
    assert contents(out) == whole
    sample(out, prior=stopping(0))  # current


def test_another_batch_size_or_number_goes_on_too(tmp_path, whole, monkeypatch):
    monkeypatch.setattr("generate.shards.LEAST", 1)
    out = tmp_path / "out"
    with pytest.raises(Stop):
        sample(out, prior=stopping(2), num=60)  # 0 to 7
    with pytest.raises(Stop):
        sample(
            out, batch_size=3, prior=stopping(2)
        )  # 8, which ends a batch of the grid, and 9 to 11
    prior, drawn = recording()
    sample(out, batch_size=5, prior=prior)
    assert [ids[0] for ids in drawn] == [12, 15, 20]
    assert contents(out) == whole


def test_other_settings_are_drawn_anew_and_only_our_files_go(tmp_path, monkeypatch):
    monkeypatch.setattr("generate.shards.LEAST", 1)
    out = tmp_path / "out"
    sample(out, png=True)
    (out / "thesis.txt").write_text("precious")
    (out / "000099-mine.png").write_text("mine")
    before = contents(out)
    assert sum(name.endswith(".png") for name in before) == 23 + 2
    with pytest.raises(Stop):
        sample(out, prior=stopping(2), options=SampleOptions(seed=5))
    assert {
        name: data for name, data in contents(out).items() if "unfinished" not in name
    } == before  # until it is done
    prior, drawn = recording()
    sample(out, prior=prior, options=SampleOptions(seed=6))  # not the shards of seed 5
    assert drawn[0][0] == 0
    assert {path.name for path in out.iterdir()} == {
        ".lock",
        "samples.npz",
        "samples.json",
        "grid.png",
        "thesis.txt",
        "000099-mine.png",
    }
    assert contents(out)["samples.npz"] != before["samples.npz"]


def test_a_damaged_shard_is_one_line_and_drawn_again(tmp_path, whole, monkeypatch):
    monkeypatch.setattr("generate.shards.LEAST", 1)
    out = tmp_path / "out"
    with pytest.raises(Stop):
        sample(out, prior=stopping(4))
    path = sorted(out.glob("unfinished/*.npz"))[2]
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf"{path.name}: damaged .*run the same command again"):
        sample(out)
    sample(out)
    assert contents(out) == whole


def test_a_command_that_fails_at_once_leaves_nothing(tmp_path):
    with pytest.raises(Stop):
        sample(tmp_path / "new", prior=stopping(0))
    assert not (tmp_path / "new").exists()


def test_killed_at_every_touch_of_a_file(tmp_path, whole, monkeypatch):
    """kill -9 in a child as it renames its k-th file, until none is left to kill."""
    monkeypatch.setattr("generate.shards.LEAST", 8)
    for touch in range(100):
        out = tmp_path / f"out-{touch}"
        child = os.fork()
        if not child:
            killed_at(touch)
            sample(out)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        sample(out)
        assert contents(out) == whole and {path.name for path in out.iterdir()} == {
            *names(whole),
            ".lock",
        }
        if os.WIFEXITED(status):
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
    assert os.WEXITSTATUS(status) == 0 and touch > 8


def names(whole):
    return {*whole, "samples.json"} - {"facts"}


def killed_at(touch):
    """Let this process be killed as it is about to rename its file of this number, or the one
    after."""
    count, rename, replace = [0], os.rename, os.replace

    def counting(function):
        def touched(*arguments, **named):
            if count[0] == touch:
                os.kill(os.getpid(), signal.SIGKILL)
            count[0] += 1
            return function(*arguments, **named)

        return touched

    os.rename, os.replace = counting(rename), counting(replace)


def test_shards_are_dealt_to_processes(tmp_path, whole, monkeypatch):
    """Two processes, one after the other: each draws its own, and the first finds all of them."""
    monkeypatch.setattr("generate.shards.LEAST", 1)
    monkeypatch.setattr(distributed, "world", lambda: 2)
    out, drawn = tmp_path / "out", {0: [], 1: []}
    made, pieces = Shards(out), cut([range(23)], shard_size(23, 4, 2))
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    other = drawing.Drawing(Noise(drawn[1].append), Painter(), REQUEST)
    drawing.draw_shards(other, made, pieces, 4, "rank 1")
    kept = {path.name: path.read_bytes() for path in (out / "unfinished").iterdir()}
    assert len(kept) == 3

    def arriving():  # while the first waits
        for name, data in kept.items():
            (out / "unfinished" / name).write_bytes(data)

    monkeypatch.setattr(distributed, "rank", lambda: 0)
    monkeypatch.setattr(distributed, "barrier", arriving)
    for name in kept:
        (out / "unfinished" / name).unlink()
    (out / "unfinished").rmdir()
    out.rmdir()
    sample(out, prior=Noise(drawn[0].append))
    assert (
        contents(out)["samples.npz"] == whole["samples.npz"]
        and contents(out)["grid.png"] == whole["grid.png"]
    )
    assert [ids[0] for ids in drawn[0]] == [0, 8, 16] and [ids[0] for ids in drawn[1]] == [
        4,
        12,
        20,
    ]


def test_what_another_process_could_not_write_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "world", lambda: 2)
    with pytest.raises(
        UserError, match="sample 12 is not there: all processes have to write to one file system"
    ):
        sample(tmp_path / "out")


def test_a_link_to_a_folder_stays_a_link(tmp_path, whole):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk", target_is_directory=True)
    with pytest.raises(Stop):
        sample(tmp_path / "out", prior=stopping(2))
    sample(tmp_path / "out")
    assert (tmp_path / "out").is_symlink() and contents(tmp_path / "disk") == whole


def test_what_is_in_the_way_ends_the_command_before_its_work(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "theirs").mkdir()
    np.savez(tmp_path / "theirs" / "samples.npz", arr_0=np.zeros((1, 2, 2, 3), np.uint8))
    for name in ("file", "theirs"):
        with pytest.raises(UserError, match=rf"{name}: .*choose another --out"):
            sample(tmp_path / name, prior=stopping(0))
    assert (tmp_path / "theirs" / "samples.npz").is_file()


def test_two_commands_on_one_folder(tmp_path):
    out = tmp_path / "out"

    def second(ids):
        with pytest.raises(UserError, match="another process is writing"):
            sample(out, options=SampleOptions(seed=9))

    sample(out, prior=Noise(second))
    assert (out / "samples.json").is_file()


def test_what_is_unfinished_is_not_measured(tmp_path, monkeypatch):
    """Neither shards, nor files that a kill left half in place, whose record is not there yet."""
    from eval.generation import Samples

    out = tmp_path / "out"
    monkeypatch.setattr("generate.shards.LEAST", 1)
    with pytest.raises(UserError, match="no samples here"):
        Samples.open(out, 2)
    with pytest.raises(Stop):
        sample(out, prior=stopping(3))
    with pytest.raises(UserError, match=r"samples\.npz: unfinished: run the same command again"):
        Samples.open(out, 2)
    sample(out)
    assert Samples.open(out, 2).images.shape == (23, 2, 2, 3)
    (out / "samples.json").write_text(json.dumps({"made_from": {}, "samples_sha256": "0" * 64}))
    with pytest.raises(UserError, match=r"its SHA-256 is not that in samples\.json"):
        Samples.open(out, 2)
    child = os.fork()
    if not child:
        replace = os.replace
        os.replace = lambda *paths: (
            os.kill(os.getpid(), signal.SIGKILL) if COMMITTED in str(paths[0]) else replace(*paths)
        )
        sample(out)
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1]) and not is_settled(out)
    with pytest.raises(UserError, match="was ended as it put its files in place"):
        Samples.open(out, 2)
    sample(out)
    assert Samples.open(out, 2).made_from["options"]["seed"] == 4


SHARED = """
import sys
from pathlib import Path
from test_shards import REQUEST, Noise, Painter, SimpleNamespace, distributed, images
import torch
images.maker = lambda folder, record: {"prior_sha256": "a", "tokenizer_sha256": "b"}
images.load_models = lambda folder, record: (Noise(), Painter())
distributed.start()
record = SimpleNamespace(class_names=["cat", "dog", "cow"], tokenizer="../tokenizer")
images.write_samples(Path("prior"), record, REQUEST, Path(sys.argv[1]), 4)
images.write_samples(Path("prior"), record, REQUEST, Path(sys.argv[1]), 4)
distributed.finish()
"""


@pytest.mark.slow
def test_two_processes_write_the_same_bytes(tmp_path, whole):
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    (tmp_path / "shared.py").write_text(SHARED)
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    done = subprocess.run(
        [*launch, tmp_path / "shared.py", tmp_path / "out"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("current, 23 samples") == 1
    assert contents(tmp_path / "out") == whole


MEASURE = """
import resource, sys
from pathlib import Path
from test_shards import Noise, Painter, Request, SampleOptions, SimpleNamespace, images
import torch
from eval.generation import Samples
from eval.pipeline import share
class Big(Painter):
    def decode(self, codes):
        return super().decode(codes).repeat(1, 1, 16, 16)
images.maker = lambda folder, record: {}
images.load_models = lambda folder, record: (Noise(), Big())
record = SimpleNamespace(class_names=["a"] * 3, tokenizer="t")
request = Request(int(sys.argv[2]), (0, 1, 2), SampleOptions())
images.write_samples(Path("prior"), record, request, Path(sys.argv[1]), 100)
drawn = Samples.open(Path(sys.argv[1]), 32)
for batch in share(torch.arange(len(drawn.images)), 100, drawn.load, "measured"):
    assert batch.images.shape == (100, 3, 32, 32)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_samples(tmp_path):
    """Peak resident memory of a fresh process that draws them and reads them as the evaluation
    does.

    20,000 images of 32 px are 59 MiB, and were held thrice.
    """
    peaks = []
    for num in (2_000, 20_000):
        command = [sys.executable, "-c", MEASURE, tmp_path / str(num), str(num)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout.split()[-1]))
    print(f"peak MiB at 2,000 and 20,000 samples: {peaks}")
    assert peaks[1] - peaks[0] < 15
