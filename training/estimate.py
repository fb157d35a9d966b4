"""What a run takes of 1, 8 and 64 GPUs: memory, time and disk, from what its losses cost
(training/tracing.py).

Of each GPU, in bytes: parameters and buffers; 4 per parameter for gradients of the phase that has
more of them; 8 for AdamW's moments; the moving average of the first phase's parameters and buffers;
activations of one micro-batch at their peak; what nearest-neighbour search holds; the copy of the
gradients in DistributedDataParallel's buckets. With loop.sharding=full transformer blocks, their
gradients, moments and average are divided by the number of GPUs, and two blocks with the gradients
of one are whole for a moment. What CUDA, its libraries and fragments take comes on top.

Time is operations over an accelerator's peak and UTILISATION, without communication and waiting for
data.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from training import distributed
from training.config import load, to_yaml
from training.errors import UserError
from training.loop import LoopConfig
from training.precision import decide
from training.sharding import blocks_of, share_of
from training.tracing import Cost

T = TypeVar("T")
MIB, GIB = 2**20, 2**30
WORLDS = (1, 8, 64)
CONFIGS = Path(__file__).parents[1] / "configs"


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """Peak operations per second without sparsity: of bf16, of fp32 in convolutions (TF32) and in
    products."""

    name: str
    bf16: float
    tf32: float
    fp32: float
    memory: float  # bytes

    def seconds(self, flops: Mapping[str, float]) -> float:
        """At the full peak."""
        return sum(count / getattr(self, rate) for rate, count in flops.items())


# NVIDIA's data sheets of the H100 (SXM) and of the A100 (SXM, 80 GB).
ACCELERATORS = (
    Accelerator("H100", 989.4e12, 494.7e12, 66.9e12, 80e9),
    Accelerator("A100", 312e12, 156e12, 19.5e12, 80e9),
)
ROOM = 0.9 * 80e9  # of 80 GB, less what libraries and fragments take
UTILISATION = 0.35  # assumed, of those peaks
RATES = {"bf16": "bf16", "tf32": "fp32 convolutions", "fp32": "fp32 products"}
LONG = {
    "moments": "AdamW's moments",
    "average": "moving average",
    "search": "nearest-neighbour search",
    "buckets": "DDP's buckets",
    "fetched": "blocks fetched",
}


@dataclasses.dataclass(frozen=True)
class Move:
    """What one loss and its backward pass take in steps from `start_step` to `end_step`."""

    cost: Cost
    start_step: int = 0
    end_step: int | None = None

    def flops(self, samples: int, accumulate: int) -> Counter[str]:
        """Of one process in one step of micro-batches of so many samples."""
        count = self.cost.at(samples)
        forward = accumulate * (2 if count.rehearsed and accumulate > 1 else 1)
        return Counter(
            {
                rate: forward * count.forward[rate] + accumulate * count.backward[rate]
                for rate in sorted(count.forward | count.backward)
            }
        )


@dataclasses.dataclass(frozen=True)
class Network:
    """Parameters and bytes of what one phase moves: all of it, and the blocks that
    loop.sharding=full shares out."""

    trainable: int
    bytes: int  # of parameters and buffers
    shared_trainable: int
    shared_bytes: int
    largest_block: int  # bytes
    shareable: bool = True  # whether loop.sharding=full is taken

    @classmethod
    def of(cls, module: nn.Module) -> Network:
        """On any device. What the module hides from its parameters is not in it."""
        shareable = share_of(blocks_of(module), module) >= 0.5
        blocks = [list(block.parameters()) for block in blocks_of(module)]
        shared = [parameter for block in blocks for parameter in block]
        return cls(
            num_trainable(module.parameters()),
            num_bytes([*module.parameters(), *module.buffers()]),
            num_trainable(shared),
            num_bytes(shared),
            max(map(num_bytes, blocks), default=0),
            shareable,
        )


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a run takes, however many GPUs share it. Sizes are bytes."""

    loop: LoopConfig
    precision: str  # "fp32" or "bf16"
    tokens: int  # per sample
    networks: dict[str, Network]  # by phase; the first one's moving average is kept
    helpers: dict[str, int]  # weights of what does not learn
    moves: list[Move]
    again: (
        Cost | None
    )  # of the first move, where activations are computed again in the backward pass
    search: int  # what nearest-neighbour search holds beside its inputs
    checkpoint: int
    published: int

    def samples(self, world: int, accumulate: int | None = None) -> int | None:
        """Of a micro-batch; None where the batch cannot be shared evenly."""
        each, rest = divmod(self.loop.batch_size, world * (accumulate or self.loop.accumulate))
        return each if each and not rest else None

    def memory(
        self,
        world: int,
        accumulate: int | None = None,
        *,
        sharded: bool = False,
        again: bool = False,
    ) -> dict[str, int]:
        """Of one GPU, by what takes it; `again` computes activations again in the backward pass."""
        samples = self.samples(world, accumulate)
        assert samples is not None
        published, *others = self.networks.values()
        mine = 1 / world if sharded else 1.0  # of what is shared out: of the first network alone

        def held(each: int, whole: int, shared: int) -> int:
            return round(each * (whole - shared * (1 - mine)))

        costs = [
            move.cost for move in self.moves if move.end_step is None
        ]  # what ends is a part of what follows
        if again and self.again is not None:
            costs[0] = self.again
        weights = held(1, published.bytes, published.shared_bytes)
        learning = [
            (published.trainable, published.shared_trainable),
            *((other.trainable, 0) for other in others),
        ]
        in_buckets = (
            sum(whole for whole, _ in (learning[1:] if sharded else learning)) if world > 1 else 0
        )
        first, *rest = self.networks
        return {
            first: weights,
            **{name: self.networks[name].bytes for name in rest},
            **self.helpers,
            "gradients": max(held(4, *numbers) for numbers in learning),
            "moments": sum(held(8, *numbers) for numbers in learning),
            "average": weights,
            "activations": round(max(cost.at(samples).peak for cost in costs)),
            "search": self.search,
            "buckets": 4 * in_buckets,
            "fetched": 3 * published.largest_block if sharded else 0,
        }

    def fitting(self, world: int, room: float, **how: bool) -> int | None:
        """The least multiple of loop.accumulate with which a GPU of so many bytes has room."""
        most = self.loop.batch_size // world
        for accumulate in range(self.loop.accumulate, most + 1, self.loop.accumulate):
            if (
                self.samples(world, accumulate)
                and sum(self.memory(world, accumulate, **how).values()) <= room
            ):
                return accumulate
        return None

    def flops(self, world: int, step: int, accumulate: int | None = None) -> Counter[str]:
        """Operations of one process in that step."""
        samples, total = self.samples(world, accumulate), Counter()
        assert samples is not None
        for move in self.moves:
            if move.start_step <= step < (move.end_step or self.loop.steps):
                total += move.flops(samples, accumulate or self.loop.accumulate)
        return total

    def seconds(self, world: int, accelerator: Accelerator, accumulate: int | None = None) -> float:
        """Of the whole run at UTILISATION, computing alone."""
        edges = {0, self.loop.steps}
        for move in self.moves:
            edges |= {move.start_step, move.end_step or self.loop.steps}
        edges = sorted(min(edge, self.loop.steps) for edge in edges)
        spans = (
            (end - start) * accelerator.seconds(self.flops(world, start, accumulate))
            for start, end in pairwise(edges)
        )
        return sum(spans) / UTILISATION

    def disk(self) -> str:
        sizes = (
            f"{self.loop.keep} checkpoints of {self.checkpoint / MIB:,.1f}, weights of "
            f"{self.published / MIB:,.1f}"
        )
        return f"disk, MiB: {sizes}"

    def describe(self, num_images: int | None) -> Iterator[str]:
        """What the steps take of so many images, if they are at hand; tables for 1, 8 and 64
        GPUs."""
        images = self.loop.steps * self.loop.batch_size
        epochs = f", {images / num_images:.1f} epochs of {num_images:,}" if num_images else ""
        yield (
            f"images: {self.loop.batch_size} per step, {self.loop.steps} steps, {images:,} in "
            f"all{epochs}"
        )
        yield f"precision: {self.precision}{_reason(self.loop.precision, self.precision)}"
        yield ""
        worlds = sorted({*WORLDS, distributed.world()})
        able = [world for world in worlds if self.samples(world)]
        published = next(iter(self.networks.values()))
        shared = [
            world for world in able if world > 1 and published.shared_bytes and published.shareable
        ]
        columns = [(world, False) for world in able] + [(world, True) for world in shared]
        memories = [self.memory(world, sharded=sharded) for world, sharded in columns]
        heads = [f"{world} GPU{'s' * (world > 1)}" for world in able] + [
            f"{world} shared" for world in shared
        ]
        least = min(sum(memory.values()) for memory in memories)
        unit, size_of = ("GiB", GIB) if least >= GIB / 4 else ("MiB", MIB)
        yield _row(f"memory of a GPU, {unit} ({self.precision})", heads)
        yield _row("  samples in a micro-batch", [str(self.samples(world)) for world, _ in columns])
        for name in memories[0]:
            if any(memory[name] for memory in memories):
                yield _row(
                    f"  {LONG.get(name, name)}",
                    [_short(memory[name] / size_of) for memory in memories],
                )
        yield _row("  together", [_short(sum(memory.values()) / size_of) for memory in memories])
        for title, again in (
            ("  loop.accumulate that fits 80 GB", False),
            ("  loop.accumulate that then fits", True),
        ):
            if again and self.again is None:
                continue
            if again:
                sizes = [
                    self.memory(world, sharded=sharded, again=True) for world, sharded in columns
                ]
                yield _row(
                    "  activations computed again",
                    [_short(size["activations"] / size_of) for size in sizes],
                )
            fitting = [
                self.fitting(world, ROOM, sharded=sharded, again=again)
                for world, sharded in columns
            ]
            yield _row(title, [str(accumulate or "none") for accumulate in fitting])
        for world in worlds:
            if world not in able:
                each = world * self.loop.accumulate
                fitting = -(-self.loop.batch_size // each) * each
                yield (
                    f"  loop.batch_size={self.loop.batch_size} cannot be shared by {world} GPUs x "
                    "loop.accumulate="
                    f"{self.loop.accumulate}: {fitting} could"
                )
        yield ""
        yield from self._describe_time(able)

    def _describe_time(self, able: list[int]) -> Iterator[str]:
        loop, last = self.loop, self.loop.steps - 1
        yield _row(
            f"computing at {UTILISATION:.0%} of peak",
            [f"{world} GPU{'s' * (world > 1)}" for world in able],
        )
        fitting = {world: self.fitting(world, ROOM) or self.loop.accumulate for world in able}
        yield _row("  with loop.accumulate", [str(fitting[world]) for world in able])
        for accelerator in (*ACCELERATORS, this_cpu()):
            worlds = able if accelerator in ACCELERATORS else able[:1]
            steps = [
                accelerator.seconds(self.flops(world, last, fitting[world])) / UTILISATION
                for world in worlds
            ]
            yield _row(
                f"  {accelerator.name}: images/s",
                [_short(loop.batch_size / seconds) for seconds in steps],
            )
            hours = [self.seconds(world, accelerator, fitting[world]) / 3600 for world in worlds]
            yield _row(
                "  hours to the end",
                [_short(number) if number >= 0.01 else "< 0.01" for number in hours],
            )
        flops = self.flops(able[0], last)
        total, tokens = sum(flops.values()) * able[0], loop.batch_size * self.tokens
        shares = ", ".join(
            f"{flops[rate] / sum(flops.values()):.0%} {name}" for rate, name in RATES.items()
        )
        yield (
            "  without communication and waiting for data; the share of the peak is assumed: "
            "docs/scaling.md"
        )
        yield (
            f"a step: {tokens:,} tokens, {total:.3g} FLOPs ({shares}), "
            f"{total / loop.batch_size:.3g} per image; "
            f"the run: {loop.steps * tokens:,} tokens"
        )


def planned_precision(asked: str) -> str:
    """ "fp32" or "bf16", as loop.precision=`asked` trains: "auto" on this machine's GPU, or, where
    it has none, on ACCELERATORS, of which the tables are.
    """
    device = distributed.device()
    return "bf16" if asked == "auto" and device.type == "cpu" else decide(asked, device)


def _reason(asked: str, precision: str) -> str:
    if asked != "auto":
        return ""
    if precision == "bf16":
        return (
            ", as loop.precision=auto takes on GPUs that have it (from the A100 on); others, and "
            "CPUs, train in fp32"
        )
    return ", for this machine's GPU only emulates bf16 (loop.precision=bf16 asks for it)"


def this_cpu() -> Accelerator:
    """The rate of fp32 products on this process's threads, measured in a tenth of a second."""
    a, rounds = torch.randn(1024, 1024), []
    b = a.clone()
    while len(rounds) < 3 or sum(rounds) < 0.1:
        started = time.perf_counter()
        torch.mm(a, b)
        rounds.append(time.perf_counter() - started)
    peak = 2 * 1024**3 / min(rounds)
    return Accelerator(f"this CPU at {peak / 1e9:.0f} GFLOP/s", peak, peak, peak, math.inf)


def commented(config: Any, lines: Iterable[str]) -> str:
    """A resolved configuration as YAML with lines about it as comments: by itself a configuration
    file again."""
    return to_yaml(config) + "\n" + "\n".join(f"# {line}".rstrip() for line in lines)


def extremes(loop: LoopConfig) -> tuple[int, int]:
    """Samples of the smallest and the largest micro-batch on 1, 8 and 64 GPUs; of equal ones, the
    double of one."""
    each = [loop.batch_size // (world * loop.accumulate) or 1 for world in WORLDS]
    return min(each), max(max(each), 2 * min(each))


def num_trainable(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters if parameter.requires_grad)


def num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def with_activations_again(config: T) -> T:
    """A configuration in which every part that can compute its activations again does."""
    changes = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name == "gradient_checkpointing":
            changes[field.name] = True
        elif dataclasses.is_dataclass(value):
            changes[field.name] = with_activations_again(value)
    return dataclasses.replace(config, **changes)


def made_by(schema: type[T], folder: str | Path) -> T | None:
    """The configuration in configs/ of the run that makes this folder, root/name; None where there
    is none."""
    folder = Path(folder)
    for path in sorted(CONFIGS.glob("*/*.yaml")):
        if re.search(rf"^name: {re.escape(folder.name)}$", path.read_text(), re.MULTILINE):
            with contextlib.suppress(UserError):  # of a run of another kind
                config = load(schema, path)
                if Path(config.root) / config.name == folder:
                    return config
    return None


def _short(number: float) -> str:
    return f"{number:,.0f}" if 100 <= number < 1e6 else f"{number:.3g}"


def _row(title: str, values: Iterable[str]) -> str:
    return f"{title:<36}" + "".join(f"{value:>11}" for value in values)
