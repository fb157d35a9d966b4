"""What a GPU has to show, within 12 minutes, for the day that one is there.

    python -m benchmarks.gpu_day OUT [--toy]      make gpu-day OUT=DIR

Each part runs in a process of its own, cheapest first, and what it finds goes to OUT/results.jsonl
as it comes, and to OUT/table.md. A part that fails, lacks something or takes too long is noted with
its message, and the next one follows. The same command goes on: parts that are done stay. `--toy`
runs every part at toy size on the CPU, whose figures say nothing. Networks are random, but for the
tokenizer whose codes are compared, which is trained first.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

LIMIT = 12 * 60  # seconds of all parts
WARM_UP, MEASURED = 5, 20  # steps of training
LACKING = 3  # exit status of a part for which something is not installed
# Dense bf16 operations per second by the makers' data sheets.
PEAKS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}

Found = dict[
    str, Any
]  # one result: what, value, unit, and where there is a target, `target` and whether it is `met`


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How large everything is."""

    search: tuple[int, int, int] = (8192, 1536, 16384)  # features, their width, codes
    rounds: int = 10
    engines: tuple[tuple[int, int, int], ...] = (
        (768, 12, 12),
        (1024, 20, 16),
    )  # width, depth, heads
    batch: int = 128  # of samples
    steps: int = 300  # of the tokenizer whose codes are compared
    train_batch: int = 64
    measured: int = MEASURED
    toy: bool = False


TOY = Sizes(
    search=(64, 16, 32),
    rounds=2,
    engines=((16, 2, 2), (32, 2, 2)),
    batch=2,
    steps=2,
    train_batch=2,
    measured=2,
    toy=True,
)


def found(what: str, value: float | str, unit: str = "", at_least: float | None = None) -> Found:
    made: Found = {"what": what, "value": value, "unit": unit}
    return (
        made
        if at_least is None
        else made | {"target": f">= {at_least:g}", "met": value >= at_least}
    )


def gpu_tests(sizes: Sizes) -> Iterator[Found]:
    """pytest -m gpu. At toy size they are only collected: they cannot run."""
    words = ["--collect-only", "tests/training/test_philox.py"] if sizes.toy else ["--durations=5"]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
    print(done.stdout)
    counts = re.findall(
        r"(\d+)(?:/\d+)? (?:tests? )?(passed|failed|errors?|skipped|collected)", done.stdout
    )
    yield from (found(outcome, int(count), "tests") for count, outcome in counts)
    if done.returncode:
        failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.M)
        raise RuntimeError(
            f"pytest -m gpu: {', '.join(failed) or done.stdout.strip().splitlines()[-1]}"
        )


def search_speed(sizes: Sizes) -> Iterator[Found]:
    """The exact search beside bare products of its shape, and a training step beside
    vector-quantize-pytorch's."""
    import torch

    from benchmarks import codebook
    from benchmarks.measure import median, seconds
    from tokenizer.quantizers import search

    (num_rows, dim, num_codes), about = sizes.search, "{} x {}, K {}".format(*sizes.search)
    rows, codes = (
        torch.randn(count, dim, device=codebook.DEVICE) for count in (num_rows, num_codes)
    )
    rivals = {name: codebook.product_of(rows, codes, name) for name in ("bf16", "tf32")}
    taken = {
        name: median(each)
        for name, each in seconds(
            {"search": lambda: search.nearest(rows, codes), **rivals}, sizes.rounds
        ).items()
    }
    yield found(f"search of {about}", 1e3 * taken["search"], "ms")
    for name in rivals:
        yield found(
            f"search of {about}, rate of the {name} product",
            taken[name] / taken["search"],
            "x",
            0.6,
        )
    torch.backends.cuda.matmul.fp32_precision = (
        "ieee"  # torch's default, which the products changed
    )

    side = 16 if num_rows % 256 == 0 else 8
    for kind, config in (("vector", codebook.VectorConfig), ("simvq", codebook.SimVQConfig)):
        features = codebook.images(num_rows // side**2, side, dim)
        mine = config(num_codes=num_codes, code_dim=dim, init="normal")
        rivals = {
            "ours": codebook.ours(mine, features),
            "theirs": codebook.peer(kind, dim, num_codes, features),
        }
        taken = {name: median(each) for name, each in seconds(rivals, sizes.rounds).items()}
        yield found(f"step of {kind}, {about}", 1e3 * taken["ours"], "ms")
        yield found(
            f"vector-quantize-pytorch's step of {kind} over it",
            taken["theirs"] / taken["ours"],
            "x",
            5,
        )


def precision_of_codes(sizes: Sizes) -> Iterator[Found]:
    """The share of codes that bf16 changes, of held-out images of a tokenizer that was trained on
    the digits."""
    import torch

    from tokenizer import load
    from tokenizer.data.dataset import open_split
    from tokenizer.run import TokenizerRun
    from tokenizer.train import train_tokenizer
    from training import distributed
    from training.config import load as read

    with tempfile.TemporaryDirectory() as folder:
        words = [f"root={folder}", f"loop.steps={sizes.steps}", "loop.precision=auto"]
        config = read(TokenizerRun, configured("digits_vqvae/tokenizer.yaml"), words)
        with contextlib.redirect_stdout(io.StringIO()):
            train_tokenizer(config)
        tokenizer = load(Path(folder) / config.name)
    held_out = open_split(config.data, "held_out")
    batch = held_out.gather([(0, index) for index in range(min(512, len(held_out)))])["images"]
    codes, device = {}, distributed.device()
    for name, low in (("fp32", False), ("bf16", True)):
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=low):
            codes[name] = tokenizer.encode(batch.to(device)).cpu()
    share = (codes["fp32"] != codes["bf16"]).double().mean().item()
    yield found(
        f"codes that bf16 changes, of {codes['fp32'].numel():,} ({config.loop.steps} steps)",
        100 * share,
        "%",
    )


def decode_engine(sizes: Sizes) -> Iterator[Found]:
    """Guided samples of 256 codes in bf16, of an autoregressive prior."""
    import torch

    from benchmarks import sampling
    from benchmarks.measure import median, seconds
    from priors.interface import SampleOptions

    for dim, depth, heads in sizes.engines:
        prior = sampling.autoregressive(dim, depth, heads)
        million = sum(p.numel() for p in prior.parameters()) / 1e6
        with torch.autocast(sampling.DEVICE, torch.bfloat16):
            draw = sampling.sampler(prior, sizes.batch, SampleOptions(guidance=2.0))
            taken = median(seconds({"draw": draw}, 3)["draw"])
        target = 150 if (dim, depth) == (1024, 20) else None
        yield found(
            f"{million:.0f} M, batch {sizes.batch}, guidance, bf16",
            sizes.batch / taken,
            "images/s",
            target,
        )


def train_prior(sizes: Sizes, *, compiled: bool) -> Iterator[Found]:
    """The 300M preset's steps."""
    import torch

    from priors import dry_run
    from priors.run import PriorRun
    from training import randomness
    from training.config import load
    from training.loop import Batch, Loss, Phase

    words = ["tokens=/nowhere", *loop_of(sizes, compiled)]
    if sizes.toy:
        words += ["prior.backbone.dim=16", "prior.backbone.depth=2", "prior.backbone.heads=2"]
    config = load(PriorRun, configured("imagenet/prior-300M.yaml"), words)
    codes = dry_run.codes_of(config)
    torch.manual_seed(0)
    prior = config.prior.build(codes.layout, codes.num_classes)

    def loss(batch: Batch, step: int) -> Loss:
        uniform = randomness.draw(
            (0, step), batch.positions, (codes.layout.length + 2,), torch.float64
        )
        return prior.loss(batch["codes"], batch["labels"], uniform)

    batch = {
        "codes": torch.randint(
            min(codes.layout.num_codes), (sizes.train_batch, codes.layout.length)
        ),
        "labels": torch.randint(codes.num_classes, (sizes.train_batch,)),
    }
    turns = [
        Phase("prior", prior, loss, config.optimizer, after_step=getattr(prior, "update", None))
    ]
    yield from trained(sizes, config, turns, prior, batch, lambda: dry_run.plan(config).estimate)


def train_tokenizer_xl(sizes: Sizes, *, compiled: bool) -> Iterator[Found]:
    """The decXL preset's steps with all its losses, the GAN from the first step on."""
    import torch

    from tokenizer import dry_run
    from tokenizer.discriminators.dino import DinoConfig
    from tokenizer.objective import Objective
    from tokenizer.run import TokenizerRun
    from tokenizer.train import phases_of
    from training.config import load

    class RandomDino(DinoConfig):
        def build(self, image_size: int, weights: bool = False) -> Any:
            return super().build(image_size, weights=False)

    with tempfile.TemporaryDirectory() as folder:
        words = [
            "objective.discriminator_start_step=0",
            "objective.adversarial_start_step=0",
            "objective.adversarial_ramp_steps=1",
            *loop_of(sizes, compiled),
        ]
        if importlib.util.find_spec("lpips") is None:
            words += ["objective.perceptual=0"]
            yield found("LPIPS", "left out: the package lpips is not installed")
        else:
            words += [f"objective.lpips_weights={random_vgg(Path(folder))}"]
        if sizes.toy:
            words += toy_tokenizer(Path(folder))
        config = load(TokenizerRun, configured("imagenet/VQRAE-DINOv2-B_decXL.yaml"), words)
        torch.manual_seed(0)
        model = config.model.build(config.data.image_size, weights=False)
        losses = dataclasses.replace(
            config.objective, discriminator=RandomDino(**vars(config.objective.discriminator))
        )
        turns = phases_of(config, Objective(losses, model, None))
        images = (
            torch.rand(sizes.train_batch, 3, config.data.image_size, config.data.image_size) * 2 - 1
        )
        yield from trained(
            sizes, config, turns, model, {"images": images}, lambda: dry_run.plan(config).estimate
        )


def trained(
    sizes: Sizes,
    config: Any,
    turns: list,
    published: Any,
    batch: Mapping[str, Any],
    estimated: Callable[[], Any],
) -> Iterator[Found]:
    """Steps of one batch through the project's loop; what they took beside what the dry run
    calculates."""
    import torch
    from torch._dynamo.utils import counters

    from benchmarks.measure import peak_mib, synchronise
    from training.checkpoint import Run
    from training.loop import Batch, train

    compiled, marks = config.loop.compile, []
    if compiled and sizes.toy:  # inductor takes minutes for what shows nothing here
        torch.nn.Module.compile = functools.partialmethod(
            torch.nn.Module.compile, backend="aot_eager"
        )
    positions = torch.arange(sizes.train_batch)

    def batches(step: int) -> Iterator[list[Batch]]:
        for index in itertools.count(step):
            if index in (0, WARM_UP, WARM_UP + sizes.measured):
                synchronise()
                marks.append(time.perf_counter())
            yield [Batch(dict(batch), positions)]

    before = peak_mib()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        train(
            config.loop,
            Run.open(Path(folder, "run"), config),
            turns,
            batches,
            seed=0,
            published=published,
        )
    on_gpu = torch.cuda.is_available()
    held = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else peak_mib() - before

    started, warm, ended = marks
    million = sum(p.numel() for p in published.parameters()) / 1e6
    taken, about = (ended - warm) / sizes.measured, f"{million:.0f} M, batch {sizes.train_batch}"
    yield found(about, sizes.train_batch / taken, "images/s")
    if compiled:
        yield found(f"first {WARM_UP} steps, which compile", warm - started, "s")
        print(*counters["graph_break"].items(), sep="\n")
        yield found("graph breaks", sum(counters["graph_break"].values()))
    estimate = estimated()
    rate = sum(estimate.flops(1, config.loop.steps - 1).values()) / taken
    yield found("calculated operations over seconds", rate / 1e12, "TFLOP/s")
    peak = peak_of_device()
    if peak:
        yield found("of the bf16 peak (MFU)", 100 * rate / peak, "%")
    calculated = sum(estimate.memory(1).values()) / 2**20
    yield found("memory", held, "MiB")
    yield found("memory, measured over calculated by --dry-run", held / calculated, "x")


def loop_of(sizes: Sizes, compiled: bool) -> list[str]:
    """What a configuration's loop is told: to do nothing but steps."""
    never = 10**9
    return [
        f"loop.steps={WARM_UP + sizes.measured + 1}",
        f"loop.batch_size={sizes.train_batch}",
        "loop.accumulate=1",
        f"loop.compile={str(compiled).lower()}",
        "loop.workers=0",
        *(f"loop.{name}={never}" for name in ("log_every", "save_every", "preview_every")),
    ]


def configured(name: str) -> Path:
    return Path(__file__).parents[1] / "configs" / name


def random_vgg(folder: Path) -> Path:
    """A file as torchvision's of VGG-16's features, of random numbers."""
    import torch
    import torchvision

    path = folder / "vgg16.pth"
    torch.save(torchvision.models.vgg16(weights=None).features.state_dict(), path)
    return path


def toy_tokenizer(folder: Path) -> list[str]:
    """Overrides of the decXL preset: its parts, of a few thousand numbers each."""
    import transformers

    vit = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    transformers.ViTConfig(**vit, image_size=32, patch_size=8).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3})
    )
    return [
        f"model.encoder.name={folder}",
        "model.encoder.input_size=32",
        "data.image_size=32",
        "model.quantizer.num_codes=32",
        "model.quantizer.code_dim=16",
        "model.decoder.preset=mirror",
        f"objective.discriminator.name={folder}",
        "objective.discriminator.layers=[0,1]",
        "objective.discriminator.kernel=3",
    ]


def peak_of_device() -> float | None:
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((peak for part, peak in PEAKS.items() if part in name), None)


@dataclasses.dataclass(frozen=True)
class Part:
    run: Callable[[Sizes], Iterator[Found]]
    limit: float  # seconds, after which it is ended


PARTS = {  # cheapest first
    "search": Part(search_speed, 90),
    "prior": Part(functools.partial(train_prior, compiled=False), 90),
    "codes": Part(precision_of_codes, 90),
    "tokenizer": Part(functools.partial(train_tokenizer_xl, compiled=False), 120),
    "engine": Part(decode_engine, 120),
    "tests": Part(gpu_tests, 180),
    "prior, compiled": Part(functools.partial(train_prior, compiled=True), 180),
    "tokenizer, compiled": Part(functools.partial(train_tokenizer_xl, compiled=True), 300),
}


class Results:
    """OUT/results.jsonl: lines `{"part", "status"}` where a part begins and ends, and between them
    what it found."""

    def __init__(self, out: Path) -> None:
        self.out, self.file = out, out / "results.jsonl"

    def write(self, part: str, line: Mapping[str, Any]) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps({"part": part, **line}) + "\n")
        (self.out / "table.md").write_text(self.table())

    def of(self, part: str) -> list[dict[str, Any]]:
        """What the last try of a part wrote."""
        lines: list[dict[str, Any]] = []
        for text in self.file.read_text().splitlines() if self.file.exists() else ():
            with contextlib.suppress(ValueError):  # a line that a kill cut short
                line = json.loads(text)
                if line["part"] == part:
                    lines = [line] if line.get("status") == "begun" else [*lines, line]
        return lines

    def status(self, part: str) -> str:
        return next(
            (line["status"] for line in reversed(self.of(part)) if "status" in line), "not run"
        )

    def table(self) -> str:
        lines = [
            "| part | what | value | | target | met |",
            "| --- | --- | ---: | --- | --- | --- |",
        ]
        for part in PARTS:
            for line in self.of(part):
                if "what" in line:
                    value = (
                        line["value"] if isinstance(line["value"], str) else f"{line['value']:.4g}"
                    )
                    met = {True: "yes", False: "no"}.get(line.get("met"), "")
                    cells = [part, line["what"], value, line["unit"], line.get("target", ""), met]
                    lines.append("| " + " | ".join(cells) + " |")
                elif line["status"] not in ("begun", "done"):
                    lines.append(
                        f"| {part} | {line['status']}: {line['message'].replace('|', '/')} | | | | |"
                    )
        about = "".join(line["machine"] for line in self.of("machine")[:1])
        return f"{about}\n\n" + "\n".join(lines) + "\n"


def run_part(name: str, out: Path, sizes: Sizes) -> int:
    """In this process; the exit status."""
    results = Results(out)
    try:
        for line in PARTS[name].run(sizes):
            if sizes.toy:  # no figure is what it will be
                line = {key: value for key, value in line.items() if key not in ("target", "met")}
            results.write(name, line)
            print(line, flush=True)
    except ModuleNotFoundError as error:
        print(f"{error.name} is not installed", flush=True)
        return LACKING
    except Exception as error:
        traceback.print_exc()
        print(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}", flush=True)
        return 1
    return 0


def command_of(name: str, out: Path, toy: bool) -> list[str]:
    words = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu_day", "--part", name]
    return [*words, *["--toy"] * toy, "--", str(out)]


def run_all(out: Path, toy: bool, limit: float = LIMIT) -> bool:
    """Every part that is not done, each in a process of its own; whether all are done then."""
    from benchmarks.measure import commit

    patience = 10 if toy else 1  # a CPU may be anyone's
    results, deadline = Results(out), time.monotonic() + patience * limit
    for name, part in PARTS.items():
        if results.status(name) == "done":
            print(f"{name}: done before", flush=True)
            continue
        left = min(patience * part.limit, deadline - time.monotonic())
        if left <= 0:
            results.write(
                name, {"status": "not run", "message": f"{patience * limit:.0f} s were over"}
            )
            continue
        results.write(name, {"status": "begun", "commit": commit()})
        started, log = time.monotonic(), out / f"{name.replace(', ', '-')}.log"
        status = _run(command_of(name, out, toy), log, left)
        seconds = round(time.monotonic() - started, 1)
        said = log.read_text(errors="replace").strip().splitlines() or ["without a word"]
        ended = {0: "done", LACKING: "lacking", None: "timed out"}.get(status, "failed")
        message = f"after {left:.0f} s, see {log.name}" if status is None else said[-1]
        results.write(
            name,
            {"status": ended, "message": message if ended != "done" else "", "seconds": seconds},
        )
        print(
            f"{name}: {ended} in {seconds:.0f} s" + f", {message}" * (ended != "done"), flush=True
        )
    print("\n" + results.table())
    return all(results.status(name) == "done" for name in PARTS)


def _run(command: list[str], log: Path, limit: float) -> int | None:
    """The exit status of a command, or None where it was ended with all that it started."""
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu_day", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for results")
    parser.add_argument("--toy", action="store_true", help="every part at toy size, on the CPU")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part:
        sys.exit(run_part(given.part, given.out, TOY if given.toy else Sizes()))

    if given.toy:
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ["HIP_VISIBLE_DEVICES"] = ""
    import torch

    from benchmarks.measure import machine

    if not given.toy and not torch.cuda.is_available():
        sys.exit(
            "error: there is no GPU here that torch can use: --toy runs every part at toy size on the CPU"
        )
    given.out.mkdir(parents=True, exist_ok=True)
    results, about = Results(given.out), machine() + ", toy sizes" * given.toy
    earlier = next((line["machine"] for line in results.of("machine")), about)
    if earlier != about:
        sys.exit(
            f"error: {given.out} holds results of another machine ({earlier}): name another folder"
        )
    results.write("machine", {"machine": about})
    if not run_all(given.out, given.toy):
        sys.exit("error: not every part is done: the same command goes on with those that are not")


if __name__ == "__main__":
    main()
