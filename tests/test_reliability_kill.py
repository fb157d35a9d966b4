"""kill -9 at random instants of the commands that train and cache: running the same command again
gives the same bits.

Catalogue rows 1 and 2 (docs/reliability.md). As a program this file does the killing: it imports
everything once, and each attempt is a fork that is killed either after a random time or at a random
touch of the files of its run.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import processes
import pytest

ROOT = Path(__file__).parents[1]
TOUCHES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")
LOOP = [
    f"loop.{key}"
    for key in ("steps=8", "batch_size=8", "save_every=2", "log_every=1", "preview_every=4")
]
NETWORKS = """\
model:
  kind: vqvae
  encoder: {channels: 8, residual_blocks: 1, residual_channels: 4}
  quantizer: {kind: vector, num_codes: 16, code_dim: 2, init: kmeans, restart: data, restart_below: 0.1}
  decoder: {channels: 8, residual_blocks: 1, residual_channels: 4}
objective:
  adversarial: 0.1
  adversarial_start_step: 3
  discriminator_start_step: 1
  discriminator: {channels: 4, layers: 1}
calibration_images: 16
data: {image_size: 8, augment: shift}
"""
COMMANDS = {
    "tokenizer.train": ["{root}/tokenizer.yaml", *LOOP],
    "tokenizer.encode": ["{root}/tokens.yaml", "views=2"],
    "priors.train": [
        "{root}/prior.yaml",
        "prior.backbone.dim=16",
        "prior.backbone.depth=1",
        "prior.backbone.heads=2",
        *LOOP,
    ],
}


def torture(folder: Path, points: dict[str, int], seed: int) -> dict[str, object]:
    """Make a pipeline undisturbed, then each of its stages again and again, killed; what came out
    otherwise."""
    import tiny
    import torch
    from test_cache import save_images

    from tokenizer import encode

    for module in (
        *COMMANDS,
        "torch._dynamo",
        "tensorboard.summary.writer.record_writer",
        "safetensors.torch",
    ):
        __import__(module)  # slow imports of a run, once for all forks
    torch.set_num_threads(1)
    encode.IMAGES_PER_SHARD = 5
    generator = random.Random(seed)
    straight = folder / "straight"
    save_images(folder / "images")
    prepare(straight, folder / "images")
    report: dict[str, object] = {"kills": 0, "in_a_row": 0, "failed": {}}
    for module, count in points.items():
        words = [word.format(root=straight) for word in COMMANDS[module]]
        out = (
            straight
            / {
                "tokenizer.train": "tokenizer",
                "tokenizer.encode": "tokens",
                "priors.train": "prior",
            }[module]
        )
        touches, started = folder / "touches", time.monotonic()
        ended = forked(lambda: watched(tiny.command, module, words, out, None, touches))  # noqa: B023
        seconds = time.monotonic() - started
        assert ended == 0, (module, ended)
        wanted = content(out)
        for number in range(count):
            root = folder / f"{module}-{number}"
            prepare(root, folder / "images", straight)
            mine = [word.format(root=root) for word in COMMANDS[module]]
            killed = root / out.name
            done = 0
            for _ in range(generator.choice((1, 1, 2, 3))):
                if number % 2:
                    point = generator.randrange(int(touches.read_text()))
                    ended = forked(lambda: watched(tiny.command, module, mine, killed, point, None))  # noqa: B023
                else:
                    moment = generator.uniform(0, seconds)
                    ended = forked(lambda: tiny.command(module, *mine), moment)  # noqa: B023
                done += ended == -signal.SIGKILL
            report["kills"] += done  # type: ignore[operator]
            report["in_a_row"] = max(report["in_a_row"], done)  # type: ignore[type-var]
            ended = forked(lambda: tiny.command(module, *mine))  # noqa: B023
            left = [
                path.name
                for path in killed.rglob("*")
                if path.name.startswith(".") and path.name != ".lock"
            ]
            if ended or left or content(killed) != wanted:
                report["failed"][killed.parent.name] = f"ended {ended}, left {left}"  # type: ignore[index]
    return report


def prepare(root: Path, images: Path, straight: Path | None = None) -> None:
    """A root with the configurations of all stages, and links to what `straight` has made for
    them."""
    root.mkdir()
    (root / "tokenizer.yaml").write_text(
        f"root: {root}\n{NETWORKS.rstrip()[:-1]}, source: {images}}}\n"
    )
    (root / "tokens.yaml").write_text(f"root: {root}\ntokenizer: {straight or root}/tokenizer\n")
    (root / "prior.yaml").write_text(f"root: {root}\ntokens: {straight or root}/tokens\n")


def content(out: Path) -> object:
    """All that a finished stage must reproduce."""
    if (out / "log.jsonl").is_file():
        from toy import fingerprint

        return fingerprint(out)
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["tokenizer"].pop("folder"), manifest.pop("plan_sha256")
    arrays = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.glob("*.npy"))
    }
    return manifest, arrays


def watched(
    run: Callable[..., int],
    module: str,
    words: list[str],
    out: Path,
    kill_at: int | None,
    touches: Path | None,
) -> int:
    """Run a command; kill this process at that touch of `out`, or write down how many there are."""
    count = 0

    def watch(event: str, arguments: tuple) -> None:
        nonlocal count
        if event in TOUCHES and str(arguments[0]).startswith(str(out)):
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

    sys.addaudithook(watch)
    code = run(module, *words)
    if touches is not None:
        touches.write_text(str(count))
    return code


def forked(work: Callable[[], int], seconds: float | None = None) -> int:
    """Exit status of `work` in a child that is killed after `seconds`; minus the signal, if one
    ended it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            code = work()
        finally:
            os._exit(code)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)  # it may have ended: it is not waited for yet
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed(folder: Path, seed: int, **points: int) -> dict:
    named = dict(zip(COMMANDS, points.values(), strict=True))
    done = processes.run(__file__, folder, json.dumps(named), seed)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    print(f"killed: {report}")
    assert report["failed"] == {}, done.stderr[-3000:]
    return report


def test_a_kill_of_each_command_changes_nothing(tmp_path):
    assert killed(tmp_path, 0, tokenizer=2, tokens=2, prior=2)["kills"] >= 4


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_kill_at_every_file_boundary_changes_nothing(tmp_path):
    """Of a toy run with three checkpoints; test_loop.py takes every third."""
    done = processes.run(processes.TESTS / "toy.py", "kill", tmp_path, 1)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    print(f"file boundaries: {report}")
    assert report["failed"] == {} and report["points"] >= 45


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_kills_at_random_instants_change_nothing(tmp_path):
    report = killed(tmp_path, 1, tokenizer=24, tokens=16, prior=16)
    assert report["kills"] >= 50 and report["in_a_row"] > 1


if __name__ == "__main__":
    print(json.dumps(torture(Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3]))))
