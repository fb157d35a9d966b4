"""What a run keeps and where it writes: randomness in checkpoints, memory and handles over time,
nothing outside.

Catalogue rows 1, 8, 9, 18, 19 and 20 (docs/reliability.md).
"""

from __future__ import annotations

import gc
import json
import os
import random
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import reduce, repeat
from test_cache import save_images, save_tokenizer
from test_reliability_kill import COMMANDS, ROOT, prepare
from tiny import command
from torch import Tensor, nn
from toy import Rows, Toy, ToyRun, fingerprint, leaves, loop

from priors import PRIORS
from tokenizer.data.loader import feed
from tokenizer.interface import CodeLayout
from training.checkpoint import Run

PAGE = resource.getpagesize()


def memory() -> int:
    """Bytes that this process holds in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def handles() -> set[str]:
    """What the open descriptors of this process lead to."""
    found = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            found.add(f"{descriptor.name} {os.readlink(descriptor)}")
        except OSError:  # the one that lists them
            continue
    return found


def children() -> list[str]:
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


# row 1: every prior goes on to the same bits (tokenizers: test_tokenizer_train.py, at random:
# test_reliability_kill.py)


class TwoGrids(nn.Module):
    """Grey levels of halves and quarters of an 8 px image's sides."""

    layout = CodeLayout(grids=((2, 2), (4, 4)), num_codes=(8, 8))

    def encode(self, images: Tensor) -> Tensor:
        levels = [reduce(images, "b c (h p) (w q) -> b (h w)", "mean", p=p, q=p) for p in (4, 2)]
        return ((torch.cat(levels, 1) + 1) / 2 * 7).round().long()

    def decode(self, codes: Tensor) -> Tensor:
        return repeat(
            codes[:, 4:].float() / 3.5 - 1, "b (h w) -> b c (h p) (w q)", c=3, h=4, p=2, q=2
        )


SMALL = [f"backbone.{key}" for key in ("dim=16", "depth=1", "heads=2")]
PRIOR_SIZES = {
    "autoregressive": [*SMALL, "order=annealed", "anneal_start_step=2", "anneal_end_step=5"],
    "masked": SMALL,
    "absorbing": SMALL,
    "uniform": SMALL,
    "halton_maskgit": [*SMALL, "backbone.feedforward=16"],
    "titok": [*SMALL, "backbone.feedforward=16"],
    "maskbit": [*SMALL, "backbone.feedforward=16", "backbone.splits=3"],
    "pixelcnn": ["channels=8", "depth=1", "kernel=3"],
    "llama": ["dim=16", "depth=1", "heads=2"],
    "mingpt": ["dim=16", "depth=1", "heads=2"],
    "rar": [
        *("dim=16", "depth=1", "heads=2"),
        *("order=annealed", "anneal_start_step=2", "anneal_end_step=5"),
    ],
    "hierarchical": [f"{level}.{size}" for level in ("top", "bottom") for size in SMALL],
}


@pytest.fixture
def two_grids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root with tokens on two grids."""
    save_images(tmp_path / "images")
    root = tmp_path / "runs"
    prepare(root, tmp_path / "images")
    save_tokenizer(root / "tokenizer", tmp_path / "images")
    for place in ("tokenizer.encode.load", "tokenizer.load"):
        monkeypatch.setattr(place, lambda folder: TwoGrids())
    assert command("tokenizer.encode", root / "tokens.yaml") == 0
    return root


@pytest.mark.parametrize("kind", PRIORS)
def test_every_prior_goes_on_to_the_same_bits(two_grids, kind):
    """From the first of three checkpoints, as after a kill when it was the last."""
    loop = [
        f"loop.{key}"
        for key in ("steps=6", "batch_size=8", "log_every=1", "save_every=2", "preview_every=3")
    ]
    sizes = [f"prior.{size}" for size in PRIOR_SIZES[kind]]
    words = [
        "priors.train",
        two_grids / "prior.yaml",
        f"prior.kind={kind}",
        *sizes,
        *loop,
        "loop.keep=9",
    ]
    assert command(*words) == 0
    run = two_grids / "prior"
    straight = fingerprint(run)
    for step in (4, 6):
        shutil.rmtree(run / "checkpoints" / f"step-0000000{step}")
    assert command(*words) == 0
    assert fingerprint(run) == straight


# row 19


def soak(
    folder: Path, steps: int, workers: int = 0, looks: int = 60
) -> tuple[float, dict[str, int]]:
    """Train the toy GAN and look at its memory, which takes a collection of all garbage each time;
    (bytes of memory per 1,000 steps over the second half, surplus handles by kind)."""
    Toy(ToyRun(loop=loop(steps=30, save_every=10, preview_every=10))).train(folder / "warm")
    gc.collect()
    before = (len(handles()), len(children()), threads())
    held: list[tuple[int, int]] = []

    def batches(step: int):
        for micro_batches in feed(Rows(), 8, seed=5, workers=workers)(step):
            step += 1
            if step % (steps // looks) == 0:
                gc.collect()
                held.append((step, memory()))
            yield micro_batches

    config = ToyRun(
        loop=loop(steps=steps, save_every=50, log_every=20, preview_every=100, workers=workers)
    )
    Toy(config).train(folder / "long", batches)
    gc.collect()
    after = (len(handles()), len(children()), threads())
    half = np.array(held[len(held) // 2 :], dtype=float)
    slope = np.polyfit(half[:, 0], half[:, 1], 1)[0] * 1000
    return slope, dict(
        zip(("descriptors", "processes", "threads"), np.subtract(after, before).tolist())
    )


def test_a_run_leaves_no_handles(tmp_path):
    _, surplus = soak(tmp_path, 60, workers=2, looks=4)
    assert surplus == {"descriptors": 0, "processes": 0, "threads": 0}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_long_run_does_not_grow(tmp_path):
    slope, surplus = soak(tmp_path, 6000)
    print(f"soak: {slope / 2**20:.3f} MiB per 1,000 steps, {surplus}")
    assert slope < 2**20
    assert surplus == {"descriptors": 0, "processes": 0, "threads": 0}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_commands_again_and_again_do_not_grow(tmp_path):
    """Twenty runs of every command in one process: whatever one of them leaves behind, all do."""
    save_images(tmp_path / "images")
    straight = tmp_path / "straight"
    prepare(straight, tmp_path / "images")

    def everything() -> None:
        for module, words in COMMANDS.items():
            assert command(module, *(word.format(root=straight) for word in words), "--fresh") == 0
        assert command("generate.sample", straight, "--num", 4) == 0
        gc.collect()

    for _ in range(4):
        everything()
    held, before = [], (len(handles()), len(children()), threads())
    for _ in range(16):
        everything()
        held.append(memory())
    slope = np.polyfit(np.arange(8), held[8:], 1)[0]
    print(
        f"commands: {slope / 2**20:.3f} MiB per round of 16 steps, {(len(handles()), len(children()), threads())}"
    )
    assert slope < 2**20 and (len(handles()), len(children()), threads()) == before


# row 18


def test_randomness_is_in_the_seed_and_the_step(tmp_path):
    """A checkpoint loads with weights_only=True and holds no generator's state, because a step
    needs none."""
    Toy(ToyRun()).train(tmp_path / "run")
    state = Run(tmp_path / "run", None).latest()
    assert not [
        path
        for path in leaves(state)
        if "rng" in path or "random" in path or "generator_state" in path
    ]
    other = tmp_path / "other"
    torch.manual_seed(999)
    np.random.seed(999)  # noqa: NPY002
    Toy(ToyRun(loop=loop(steps=5))).train(other)
    torch.rand(1000), torch.manual_seed(5)
    (other / "config.yaml").write_text(
        (other / "config.yaml").read_text().replace("steps: 5", "steps: 9")
    )
    straight = tmp_path / "five"
    Toy(ToyRun(loop=loop(steps=5))).train(straight)
    assert fingerprint(other) == fingerprint(straight)


def test_generator_states_load_as_tensors(tmp_path):
    """What a checkpoint may hold of randomness, should a step ever need it: torch's states, not
    numpy's legacy one."""
    states = {
        "torch": torch.get_rng_state(),
        "generator": torch.Generator().manual_seed(3).get_state(),
    }
    torch.save(states, tmp_path / "a")
    loaded = torch.load(tmp_path / "a", weights_only=True)
    generator = torch.Generator()
    generator.set_state(loaded["generator"])
    assert torch.equal(
        torch.rand(3, generator=generator),
        torch.rand(3, generator=torch.Generator().manual_seed(3)),
    )


# row 8: a full disk, for which a limit on the size of files stands


@pytest.mark.parametrize("module", COMMANDS)
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(tmp_path, capsys, module):
    save_images(tmp_path / "images")
    root = tmp_path / "runs"
    prepare(root, tmp_path / "images")
    save_tokenizer(root / "tokenizer", tmp_path / "images")
    if module == "priors.train":
        assert (
            command(
                "tokenizer.encode",
                *(word.format(root=root) for word in COMMANDS["tokenizer.encode"]),
            )
            == 0
        )
    words = [word.format(root=root) for word in COMMANDS[module]]
    if module == "tokenizer.train":
        words.append("name=another")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (0, 200, 400):
        capsys.readouterr()
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            code = command(module, *words)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        printed = capsys.readouterr().err
        assert code == 2 and printed.count("\n") == 1 and str(root) in printed, (
            limit,
            code,
            printed,
        )
        assert not list(root.rglob(".*.tmp"))
    assert command(module, *words) == 0


# row 9: damage


def test_any_damage_to_a_checkpoint_is_found(tmp_path, capsys):
    """Bytes changed, cut off, put on, or whole files away, anywhere: the checkpoint before is
    taken."""
    Toy(ToyRun()).train(tmp_path / "run")
    run, generator = Run(tmp_path / "run", None), random.Random(0)
    newest = run.checkpoints / "step-00000009"
    whole = {path.name: path.read_bytes() for path in newest.iterdir()}
    for _ in range(80):
        name = generator.choice(sorted(whole))
        data = bytearray(whole[name])
        place = generator.randrange(len(data))
        match generator.randrange(4):
            case 0:
                data[place] ^= 1 << generator.randrange(8)
            case 1:
                del data[place:]
            case 2:
                data[place:place] = b"\0"
            case _:
                data[place : place + 512] = bytes(512)
        if bytes(data) == whole[name]:
            continue
        (newest / name).write_bytes(data)
        found = run.latest()["step"]
        harmless = name == "manifest.json" and found == 9 and same_claim(data, whole[name])
        assert found == 8 or harmless, (name, place)
        (newest / name).write_bytes(whole[name])
    assert run.latest()["step"] == 9
    capsys.readouterr()


def same_claim(data: bytes, whole: bytes) -> bool:
    """Whether a damaged manifest still says the same of the files: white space, or the step that it
    repeats."""
    try:
        return json.loads(data)["files"] == json.loads(whole)["files"]
    except ValueError:
        return False


# row 20: offline, in a folder that is read only


OFFLINE = """
import os, sys
written = []
def watch(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, bytes)):
        path, mode, flags = arguments
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            written.append(os.path.abspath(os.fsdecode(path)))
    elif event in ("os.mkdir", "os.rename", "os.link", "os.symlink"):
        written.append(os.path.abspath(os.fsdecode(arguments[event != "os.mkdir"])))
    elif event.startswith("socket.connect") and not isinstance(arguments[1], str):
        written.append(f"network {arguments[1]}")
sys.addaudithook(watch)
import importlib
module, allowed = sys.argv[1], sys.argv[2].split(":")
sys.argv = [module, *sys.argv[3:]]
from training.command import run_command
try:
    run_command(importlib.import_module(module).main)
finally:
    outside = sorted({path for path in written if not path.startswith((*allowed, "/dev/", "/proc/"))})
    print("outside:", outside)
"""


@pytest.mark.slow
@pytest.mark.parametrize("module", [*COMMANDS, "generate.sample"])
def test_offline_from_a_read_only_folder(tmp_path, module):
    """Writes go to the run's folder alone, with a working directory, a home and caches that take
    none."""
    save_images(tmp_path / "images")
    prepare(tmp_path / "runs", tmp_path / "images")
    for earlier, words in COMMANDS.items():
        if earlier != module or module == "generate.sample":
            assert command(earlier, *(word.format(root=tmp_path / "runs") for word in words)) == 0
        if earlier == module:
            break
    here, temporary = (
        tmp_path / "here",
        tmp_path / "temporary",
    )  # where torch makes an empty folder at its import
    here.mkdir(), temporary.mkdir()
    (here / "caches").write_text("a file: nothing can be kept below it, not even by root")
    here.chmod(0o555)
    words = COMMANDS.get(module, ["{root}", "--num", "4"])
    environment = {
        "PATH": os.environ["PATH"],
        "HF_HUB_OFFLINE": "1",
        "HOME": str(here),
        "TMPDIR": str(temporary),
        "XDG_CACHE_HOME": str(here / "caches"),
        "HF_HOME": str(here / "hf"),
        "TORCH_HOME": str(here / "torch"),
        "MPLCONFIGDIR": str(here / "mpl"),
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    before = {
        path
        for path in tmp_path.rglob("*")
        if tmp_path / "runs" not in path.parents and path.is_file()
    }
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            OFFLINE,
            module,
            f"{tmp_path / 'runs'}:{temporary}",
            *(word.format(root=tmp_path / "runs") for word in words),
        ],
        capture_output=True,
        text=True,
        cwd=here,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "outside: []", done.stdout
    after = {
        path
        for path in tmp_path.rglob("*")
        if tmp_path / "runs" not in path.parents and path.is_file()
    }
    assert after == before
