"""Training speed: waiting for data, stored features beside images, and saving.

    python -m benchmarks.training [wait|features|saving ...] [encoder=FOLDER] [data=FOLDER]

All three, on the GPU where there is one. Stages 1 and 2 are those of configs/imagenette at
224 px, with the pretrained ViT-Tiny and the images given; without them a random ViT of that shape,
and digits. Every figure is of the training loop itself (average, log and all), without the k-means
that starts a run. Results go to RESULTS.md beside this file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.measure import keep, median, ratio, synchronise, table
from tokenizer.data.dataset import Images, open_split
from tokenizer.data.loader import Keyed, feed
from tokenizer.features import FeaturesConfig, StoredFeatures
from tokenizer.objective import Objective
from tokenizer.run import TokenizerRun
from tokenizer.train import phases_of, teacher_of
from training.checkpoint import Run
from training.config import load
from training.loop import Batch, LoopConfig, Phase, train

STAGES = {stage: f"configs/imagenette/tokenizer-stage{stage}.yaml" for stage in (1, 2)}
NEVER = 10**9
SAVE_EVERY = LoopConfig().save_every
FEW = 16  # images with stored features: making them is not what is measured

Batches = Callable[[int], Iterator[list[Batch]]]  # what the loop reads


class Watch:
    """A run's batches, and the clock beside them: seconds that each step waited for its batch, and
    that it took."""

    def __init__(self, batches: Batches) -> None:
        self.batches, self.waits, self.works = batches, [], []

    def __call__(self, step: int) -> Iterator[list[Batch]]:
        stream, asked = self.batches(step), time.perf_counter()
        while True:
            parts = next(stream)
            given = time.perf_counter()
            self.waits.append(given - asked)
            yield parts
            synchronise()
            asked = time.perf_counter()
            self.works.append(asked - given)

    def steps(self, warm_up: int = 1) -> list[float]:
        """Seconds of each whole step after the first; the last, which nothing follows, is not
        known."""
        return [wait + work for wait, work in zip(self.waits, self.works)][warm_up:]

    def share(self, warm_up: int = 1) -> float:
        return sum(self.waits[warm_up : len(self.works)]) / sum(self.steps(warm_up))


def watch(
    phases: list[Phase], published: nn.Module, batches: Batches, loop: LoopConfig, **changes: Any
) -> Watch:
    """Train a few steps by the project's loop, which neither saves nor previews unless `changes` to
    `loop` say so."""
    quiet = {"save_every": NEVER, "preview_every": NEVER, "log_every": NEVER}
    loop, seen = dataclasses.replace(loop, **quiet | changes), Watch(batches)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        train(loop, Run.open(Path(folder, "run"), loop), phases, seen, seed=0, published=published)
    return seen


class Stage:
    """A tokenizer in training as its configuration says, but from a random codebook on."""

    def __init__(self, config: TokenizerRun, weights: bool) -> None:
        self.config = dataclasses.replace(config, start_from=None)
        torch.manual_seed(0)
        self.autoencoder = config.model.build(config.data.image_size, weights=weights)
        teacher = teacher_of(self.config, self.autoencoder)
        self.objective = Objective(config.objective, self.autoencoder, teacher)
        self.trainable = [
            p
            for phase in phases_of(self.config, self.objective)
            for p in phase.module.parameters()
            if p.requires_grad
        ]

    def watch(self, images: Keyed, **changes: Any) -> Watch:
        loop = self.config.loop
        for parameter in self.trainable:  # the loop leaves them at rest
            parameter.requires_grad_(True)
        batches = feed(images, loop.batch_size, 0, loop.accumulate, changes.get("workers", 0))
        return watch(
            phases_of(self.config, self.objective), self.autoencoder, batches, loop, **changes
        )


class Few:
    """The first images of many."""

    def __init__(self, images: Images) -> None:
        self.gather, self.identity, self.image_size = (
            images.gather,
            images.identity,
            images.image_size,
        )

    def __len__(self) -> int:
        return FEW


class Given:
    """What the command line names, or what stands in for it."""

    def __init__(self, encoder: str | None, data: str | None, folder: Path) -> None:
        self.folder, self.weights = folder, encoder is not None
        if encoder is None or data is None:
            print("without encoder=FOLDER and data=FOLDER: a random ViT-Tiny, and digits\n")
        self.overrides = [
            f"model.encoder.name={encoder or random_vit(folder / 'tiny', 192, 3)}",
            f"data.source={data or 'digits'}",
        ]
        self.about = "pretrained" if self.weights else "random"

    def command(self, part: str) -> str:
        return f"python -m benchmarks.training {part}{' encoder=FOLDER data=FOLDER' * self.weights}"

    def config(self, stage: int, *overrides: str) -> TokenizerRun:
        return load(TokenizerRun, STAGES[stage], [*self.overrides, *overrides])

    def stage(self, stage: int, *overrides: str) -> Stage:
        return Stage(self.config(stage, *overrides), self.weights)

    @functools.cached_property
    def images(self) -> Images:
        return open_split(self.config(1).data, "train", augment=True)

    @functools.cached_property
    def undecoded(self) -> Images:
        """The same, each decoded whenever it is read."""
        return open_split(self.config(1, "data.memory_mib=0").data, "train", augment=True)

    def stored(self, stage: Stage, images: Images) -> tuple[Keyed, Keyed]:
        """A few images, and the same with float16 features beside them."""
        few, features, encoder = Few(images), FeaturesConfig(views=1), stage.autoencoder.encoder
        augment = stage.config.data.augment
        stored = StoredFeatures(few, encoder, features, augment=augment, seed=0, root=self.folder)
        with contextlib.redirect_stdout(io.StringIO()):
            stored.make(encoder)
        return few, stored


def random_vit(folder: Path, dim: int, heads: int) -> str:
    """A folder that describes a ViT of 12 layers for patches of 16 px; its path."""
    import transformers

    transformers.ViTConfig(
        hidden_size=dim, num_hidden_layers=12, num_attention_heads=heads, intermediate_size=4 * dim
    ).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3})
    )
    return str(folder)


def in_turn(rivals: dict[str, Callable[[], Watch]], rounds: int) -> dict[str, list[Watch]]:
    """A B C, A B C, …, so that a machine's moods meet all alike."""
    seen: dict[str, list[Watch]] = {name: [] for name in rivals}
    for _ in range(rounds):
        for name, run in rivals.items():
            seen[name].append(run())
    return seen


def per_second(seen: list[Watch], batch_size: int) -> str:
    return f"{batch_size / median([second for each in seen for second in each.steps()]):.1f}"


def wait(given: Given) -> None:
    first, second = given.stage(1), given.stage(2)
    in_memory, decoded = given.images, given.undecoded
    _, stored = given.stored(first, in_memory)
    rivals = {
        "stage 1, images in memory": lambda: first.watch(in_memory, steps=5),
        "stage 1, decoded as they are read": lambda: first.watch(decoded, steps=5),
        "stage 1, decoded by another process": lambda: first.watch(decoded, steps=5, workers=1),
        "stage 1, from stored features": lambda: first.watch(stored, steps=5),
        "stage 2, images in memory": lambda: second.watch(in_memory, steps=5),
        "stage 2, decoded as they are read": lambda: second.watch(decoded, steps=5),
    }
    seen, batch_size = in_turn(rivals, 2), first.config.loop.batch_size
    shares = {name: [100 * each.share() for each in found] for name, found in seen.items()}
    lines = [
        [
            name,
            per_second(found, batch_size),
            f"{median(shares[name]):.1f} ({min(shares[name]):.1f} to {max(shares[name]):.1f})",
        ]
        for name, found in seen.items()
    ]
    head = [
        f"{given.about} ViT-Tiny, 224 px, batch {batch_size}",
        "images/s",
        "of it waiting for data, %",
    ]
    keep("Training: waiting for data", given.command("wait"), table(head, lines))


SMALL_CODES = ("model.quantizer.code_dim=64",)


def features(given: Given) -> None:
    base = random_vit(given.folder / "base", 768, 12)
    cases: list[tuple[str, Sequence[str], bool]] = [
        ("ViT-Tiny, decoder of 2 layers, codes of 1536 numbers", (), given.weights),
        ("the same, codes of 64 numbers", SMALL_CODES, given.weights),
        ("the same, decoder of 1 layer", (*SMALL_CODES, "model.decoder.depth=1"), given.weights),
        (
            "ViT-B (random), decoder of 2 layers, codes of 1536",
            (f"model.encoder.name={base}",),
            False,
        ),
    ]
    lines = []
    for name, overrides, weights in cases:
        stage = Stage(given.config(1, *overrides), weights)
        few, stored = given.stored(stage, given.images)
        rivals = {
            "images": functools.partial(stage.watch, few, steps=5),
            "features": functools.partial(stage.watch, stored, steps=5),
        }
        seen, batch_size = in_turn(rivals, 2), stage.config.loop.batch_size
        taken = {name: [median(each.steps()) for each in found] for name, found in seen.items()}
        rates = [per_second(seen[kind], batch_size) for kind in rivals]
        lines.append(
            [name, *rates, ratio(taken, "images", "features"), f"{stored.bytes_per_image:,}"]
        )
    head = [
        f"stage 1, 224 px, batch {batch_size}",
        "images, images/s",
        "features, images/s",
        "features / images",
        "bytes per image and view",
    ]
    keep("Training: stored features", given.command("features"), table(head, lines))


def saving(given: Given) -> None:
    lines, every, steps = [], 2, 7
    for number in STAGES:
        stage = given.stage(number)
        rivals = {
            "without": functools.partial(stage.watch, given.images, steps=steps),
            "with": functools.partial(stage.watch, given.images, steps=steps, save_every=every),
        }
        seen = in_turn(rivals, 2)
        means = {
            name: median([statistics.mean(each.steps()) for each in found])
            for name, found in seen.items()
        }
        cost = every * (means["with"] - means["without"])
        share = 100 * cost / (SAVE_EVERY * means["without"] + cost)
        lines.append([f"stage {number}", f"{means['without']:.2f}", f"{cost:.2f}", f"{share:.2f}"])
    head = [
        "ViT-Tiny, 224 px, batch 8",
        "step, s",
        "a save costs, s",
        f"of training, every {SAVE_EVERY} steps, %",
    ]
    keep("Training: saving", given.command("saving"), table(head, lines))


PARTS = {"wait": wait, "features": features, "saving": saving}


def main() -> None:
    words = sys.argv[1:]
    options = dict(word.split("=", 1) for word in words if "=" in word)
    asked = [word for word in words if "=" not in word] or list(PARTS)
    unknown = [word for word in [*options, *asked] if word not in (*PARTS, "encoder", "data")]
    if unknown:
        sys.exit(
            f"error: {unknown[0]}: the parts are {', '.join(PARTS)}, the options encoder= and data="
        )
    with tempfile.TemporaryDirectory() as folder:
        given = Given(options.get("encoder"), options.get("data"), Path(folder))
        for name in asked:
            PARTS[name](given)


if __name__ == "__main__":
    main()
