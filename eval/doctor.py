"""What evaluation finds on this machine: `python -m eval.doctor`.

Weights with their hashes, and how to fetch those that are missing; in-domain extractors; packages,
the pairing of torch and torchvision, the GPU, free space. Exit code 2 when something that is needed
is broken, else 0.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from training.command import Parser, run_command
from training.errors import UserError

PROJECT = "tessera"
LEAST_SPACE = 5 << 30  # bytes: a run and its checkpoints
OK, ABSENT, BROKEN = "ok", "absent", "BROKEN"


@dataclasses.dataclass(frozen=True)
class Finding:
    name: str
    state: str  # OK, ABSENT (and nobody needs it), BROKEN
    text: str


def examine_weights(name: str, given: Path | None = None) -> Finding:
    """Published weights by their key in WEIGHTS. Only a file that lies where they belong has to be
    the published one: any other gives figures that carry its hash."""
    from eval.extractors.weights import WEIGHTS
    from training.checkpoint import sha256

    weights = WEIGHTS[name]
    try:
        path = weights.find(given)
    except UserError as error:
        return Finding(name, BROKEN, str(error))
    if path is None:
        return Finding(name, ABSENT, weights.missing())
    file = _weights_file(path)
    if file is None:
        return Finding(name, BROKEN, f"{path}: no weights in this folder; {weights.missing()}")
    found = sha256(file)
    if weights.knows(found):
        return Finding(name, OK, f"{file}, SHA-256 {found}")
    if path == weights.place:
        text = f"{file}: SHA-256 {found}: damaged, or another file: remove it; {weights.missing()}"
        return Finding(name, BROKEN, text)
    return Finding(
        name, OK, f"{file}, SHA-256 {found}: not the published file, so that figures carry its hash"
    )


def _weights_file(path: Path) -> Path | None:
    if not path.is_dir():
        return path
    return next(
        (
            path / name
            for name in ("model.safetensors", "pytorch_model.bin")
            if (path / name).is_file()
        ),
        None,
    )


def examine_extractors(folder: Path) -> Iterator[Finding]:
    """In-domain extractors of the pipelines in a folder."""
    from eval.extractors.in_domain import InDomain
    from eval.extractors.interface import tag

    found = sorted(path.parent for path in folder.glob("*/extractor/weights"))
    if not found:
        yield Finding(
            "in-domain",
            ABSENT,
            f"none in {folder}/*/extractor: `eval.run report RUN` trains one for its data",
        )
    for path in found:
        try:
            extractor = InDomain(path)
        except (UserError, RuntimeError, KeyError) as error:
            yield Finding(
                "in-domain", BROKEN, f"{path}: {error}: remove it, and eval.run trains another"
            )
            continue
        data = extractor.config.data
        yield Finding(
            "in-domain", OK, f"{path}: {tag(extractor)}, {data.source} at {data.image_size} px"
        )


def examine_packages() -> Iterator[Finding]:
    """What the project requires, against what is installed."""
    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(line) for line in importlib.metadata.requires(PROJECT) or ()]
    except importlib.metadata.PackageNotFoundError:
        yield Finding("packages", BROKEN, f"{PROJECT} is not installed: make setup")
        return
    versions = []
    for requirement in wanted:
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue  # of development
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding("packages", BROKEN, f"{requirement} is not installed: make setup")
            continue
        versions.append(f"{requirement.name} {version}")
        if not requirement.specifier.contains(version, prereleases=True):
            yield Finding(
                "packages",
                BROKEN,
                f"{requirement.name} {version} is installed, not {requirement}: make setup",
            )
    yield Finding("packages", OK, ", ".join(versions))


def examine_pairing() -> Finding:
    """Whether torchvision works with this torch: in a process of its own, as a wrong one may
    crash."""
    try:
        torch, torchvision = (importlib.metadata.version(name) for name in ("torch", "torchvision"))
    except importlib.metadata.PackageNotFoundError as error:
        return Finding("torchvision", BROKEN, f"{error.name} is not installed: make setup")
    made_for = next(
        (
            line.split(";")[0].strip()
            for line in importlib.metadata.requires("torchvision") or ()
            if _is_torch(line)
        ),
        "",
    )
    script = "import torch, torchvision; torchvision.ops.nms(torch.eye(4), torch.ones(4), 0.5)"
    tried = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    text = f"torch {torch}, torchvision {torchvision} (made for {made_for or 'a torch that it does not name'})"
    if tried.returncode:
        reason = (tried.stderr.strip().splitlines() or [f"exit code {tried.returncode}"])[-1]
        return Finding(
            "torchvision", BROKEN, f"{text}: {reason}: install both from one index in one go"
        )
    return Finding("torchvision", OK, text)


def _is_torch(requirement: str) -> bool:
    from packaging.requirements import Requirement

    return Requirement(requirement).name == "torch"


def examine_formats() -> Finding:
    """Picture formats that tokenizers are compared with."""
    from PIL import features

    lacking = [name for name in ("jpg", "webp", "avif") if not features.check(name)]
    if lacking:
        return Finding(
            "formats",
            ABSENT,
            f"Pillow was built without {', '.join(lacking)}: left out of rate-distortion",
        )
    return Finding("formats", OK, "Pillow writes JPEG, WebP and AVIF")


def examine_machine() -> Iterator[Finding]:
    import torch

    yield Finding(
        "python",
        OK,
        f"{platform.python_version()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads",
    )
    from training import distributed

    kind = distributed.gpu()
    if kind is None:
        absent = "none that torch can use: everything runs on the CPU"
        yield Finding("gpu", ABSENT, distributed.unused_gpu() or absent)
    elif kind != "cuda":
        yield Finding("gpu", OK, f"{getattr(torch, kind).get_device_name()} ({kind})")
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        about = torch.cuda.get_device_properties(index)
        text = f"{about.name}, {about.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
        yield Finding("gpu", OK, f"{text}, compute capability {about.major}.{about.minor}")


def examine_space(folder: Path) -> Finding:
    """Free space where runs are kept."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    text = f"{free / 2**30:.0f} GiB free at {there}"
    if free < LEAST_SPACE:
        return Finding("disk", BROKEN, f"{text}: a run needs about {LEAST_SPACE / 2**30:.0f}")
    return Finding("disk", OK, text)


def examine(arguments: argparse.Namespace) -> Iterator[Finding]:
    yield from examine_packages()
    pairing = examine_pairing()
    yield pairing
    yield examine_space(arguments.runs)
    if pairing.state == BROKEN:
        return  # all that follows imports it
    from eval.extractors.weights import WEIGHTS

    yield from examine_machine()
    yield examine_formats()
    given = {
        "inception": arguments.inception_weights,
        "dinov2": arguments.dinov2,
        "clip": arguments.clip,
        f"lpips-{arguments.lpips_net}": arguments.lpips_weights,
    }
    for name in WEIGHTS:
        yield examine_weights(name, given.get(name))
    yield from examine_extractors(arguments.runs)


def main() -> None:
    parser = Parser(
        prog="python -m eval.doctor", description="What evaluation finds on this machine."
    )
    add = parser.add_argument
    add(
        "--runs",
        type=Path,
        default=Path("runs"),
        metavar="FOLDER",
        help="folder of pipelines (runs)",
    )
    add("--inception-weights", type=Path, metavar="PATH")
    add("--lpips-weights", type=Path, metavar="PATH")
    add("--lpips-net", default="squeeze", choices=("squeeze", "alex", "vgg"))
    add("--dinov2", type=Path, metavar="FOLDER")
    add("--clip", type=Path, metavar="FOLDER")
    broken = 0
    for finding in examine(parser.parse_args()):
        print(f"{finding.name:14}{finding.state:8}{' '.join(finding.text.split())}", flush=True)
        broken += finding.state == BROKEN
    if broken:
        raise UserError(
            f"{broken} of the above {'is' if broken == 1 else 'are'} broken, and needed"
        )


if __name__ == "__main__":
    run_command(main)
