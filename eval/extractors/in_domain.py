"""The in-domain extractor: a small residual network trained on the data at hand, kept once per data
set.

It stands in where the published networks' weights are absent; its figures carry its name and hash.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eval.extractors.interface import Extraction
from tokenizer.data.dataset import DataConfig, Images, open_split
from tokenizer.data.identity import changes, noted, open_run
from tokenizer.data.loader import feed
from tokenizer.data.transforms import to_float
from training import config as configuration
from training import distributed, randomness
from training.checkpoint import Run, load_weights, weights_hash, weights_path
from training.errors import UserError
from training.loop import Batch, LoopConfig, Loss, Phase, train
from training.optim import OptimizerConfig

TASKS = ("classes", "rotation")


@dataclasses.dataclass(frozen=True)
class ExtractorRun:
    """The run that trains an in-domain extractor; `extractor_run` fills it for a data set."""

    name: str = "digits-cnn"
    task: str = "classes"  # or "rotation": which of four right angles, for data without classes
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    width: int = 24  # channels of the first stage; the others have 2 and 4 times as many
    dim: int = 64  # D
    seed: int = 0
    loop: LoopConfig = dataclasses.field(
        default_factory=lambda: LoopConfig(
            steps=300, batch_size=128, precision="fp32", ema_decay=0.98, preview_every=100
        )
    )
    optimizer: OptimizerConfig = dataclasses.field(
        default_factory=lambda: OptimizerConfig(
            lr=2e-3, weight_decay=0.05, warmup_steps=40, final_lr_ratio=0.01
        )
    )

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"task={self.task!r} is not one of {', '.join(TASKS)}")


def extractor_run(data: DataConfig, images: Images) -> ExtractorRun:
    """The usual extractor for a train split: three passes, at least 300 and at most 1500 steps of
    128."""
    classes = images.num_classes >= 2
    name = re.sub(r"[^\w.-]+", "-", images.name)
    data = dataclasses.replace(data, augment="flip_shift" if "flip" in data.augment else "shift")
    default = ExtractorRun(data=data)
    steps = min(1500, max(default.loop.steps, 3 * len(images) // default.loop.batch_size))
    return dataclasses.replace(
        default,
        name=f"{name}-cnn" if classes else f"{name}-rotation-cnn",
        task="classes" if classes else "rotation",
        loop=dataclasses.replace(default.loop, steps=steps),
    )


class Classifier(nn.Module):
    """A small residual network: (B, 3, H, W) in [-1, 1] -> logits (B, C), through features (B,
    dim).

    Group normalisation: a row never depends on its batch.
    """

    def __init__(self, width: int, dim: int, num_classes: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(3, width, 3, stride=2, padding=1),
            Residual(width, width, stride=1),
            Residual(width, 2 * width, stride=2),
            Residual(2 * width, 4 * width, stride=2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4 * width, dim),
        )
        self.head = nn.Linear(dim, num_classes)

    def features(self, images: Tensor) -> Tensor:
        return self.trunk(images)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(F.relu(self.features(images)))


class Residual(nn.Module):
    def __init__(self, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, out_channels, 3, stride=stride, padding=1)
        self.second = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = (
            nn.Conv2d(channels, out_channels, 1, stride=stride) if stride > 1 else nn.Identity()
        )
        self.norms = nn.ModuleList([nn.GroupNorm(8, channels), nn.GroupNorm(8, out_channels)])

    def forward(self, maps: Tensor) -> Tensor:
        inner = self.first(F.relu(self.norms[0](maps)))
        return self.skip(maps) + self.second(F.relu(self.norms[1](inner)))


def train_extractor(config: ExtractorRun, folder: Path, fresh: bool = False) -> None:
    """Train on the train split, keeping the run in `folder`; goes on where it stopped."""
    images = open_split(config.data, "train", augment=True, seed=config.seed)
    run = open_run(folder, config, [images], fresh=fresh)
    held_out = open_split(config.data, "held_out")
    num_classes = 4 if config.task == "rotation" else images.num_classes
    torch.manual_seed(randomness.mix(config.seed))
    classifier = Classifier(config.width, config.dim, num_classes)

    def loss(batch: Batch, step: int) -> Loss:
        pictures, labels = batch["images"], batch["labels"]
        if config.task == "rotation":
            labels = (4 * randomness.draw((config.seed, step), batch.positions)).long()
            pictures = rotate(pictures, labels)
        logits = classifier(pictures)
        cross_entropy = F.cross_entropy(logits, labels)
        accuracy = (logits.argmax(1) == labels).float().mean()
        return Loss(cross_entropy, {"cross_entropy": cross_entropy, "accuracy": accuracy})

    train(
        config.loop,
        run,
        [Phase("classifier", classifier, loss, config.optimizer)],
        feed(
            images, config.loop.batch_size, config.seed, config.loop.accumulate, config.loop.workers
        ),
        seed=config.seed,
        published=classifier,
        measure=lambda averaged: {"accuracy": _accuracy(averaged, held_out, config.task)},
    )


def rotate(images: Tensor, quarters: Tensor) -> Tensor:
    """Turn each square image (B, 3, S, S) by its number of right angles, (B,) int64 in 0..3."""
    turned = torch.stack([torch.rot90(images, quarter, (2, 3)) for quarter in range(4)])
    return turned[quarters, torch.arange(len(images), device=images.device)]


@torch.no_grad()
def _accuracy(
    classifier: Classifier, images: Images, task: str, limit: int = 2000, chunk: int = 250
) -> float:
    """Share of held-out images recognised, over at most `limit` that lie evenly in the split."""
    chosen = torch.linspace(0, len(images) - 1, min(limit, len(images))).long()
    right = 0
    classifier.eval()
    for indices in chosen.split(chunk):
        batch = images.gather([(0, int(index)) for index in indices])
        pictures, labels = batch["images"], batch["labels"]
        if task == "rotation":
            labels = indices % 4
            pictures = rotate(pictures, labels)
        logits = classifier(pictures.to(distributed.device()))
        right += int((logits.argmax(1).cpu() == labels).sum())
    return right / len(chosen)


class InDomain:
    """A trained `ExtractorRun`, as an extractor."""

    standard = False

    def __init__(self, folder: Path) -> None:
        self.config = configuration.load(ExtractorRun, folder / "config.yaml")
        self.name, self.task, self.dim = self.config.name, self.config.task, self.config.dim
        self.sha256 = weights_hash(folder)
        weights = load_weights(folder)
        self.input_size = self.config.data.image_size
        self.num_classes = len(weights["head.bias"])
        self.network = Classifier(self.config.width, self.dim, self.num_classes)
        self.network.load_state_dict(weights)
        self.network.to(distributed.device()).eval()
        self.settings = {
            "extractor": self.name,
            "extractor_sha256": self.sha256,
            "extractor_seed": self.config.seed,
            "extractor_task": self.task,
        }

    def __call__(self, images: Tensor) -> Extraction:
        """Raises UserError for images of another size than it was trained on: it resizes none."""
        if images.shape[-2:] != (self.input_size, self.input_size):
            height, width = images.shape[-2:]
            raise UserError(
                f"{self.name} was trained on images of {self.input_size} px, and these are {height} x {width}: give it "
                "images of its size, or name another extractor with --extractor"
            )
        return self.see(images)

    @torch.no_grad()
    def see(self, inputs: Tensor) -> Extraction:
        features = self.network.features(to_float(inputs.to(distributed.device())))
        return Extraction(features, self.network.head(F.relu(features)).softmax(1))


def check_extractor(named: Path, trained_in: Sequence[Path]) -> None:
    """Raise UserError where a folder that was named holds no extractor: one is trained in these
    places alone."""
    if (named / "config.yaml").is_file() or named.resolve() in [
        place.resolve() for place in trained_in
    ]:
        return
    places = " or ".join(map(str, trained_in))
    remedy = (
        f"leave the option out and one is trained in {places}" if places else "name the run of one"
    )
    raise UserError(f"--extractor {named}: holds no extractor (there is no config.yaml): {remedy}")


def open_extractor(folder: Path, data: DataConfig, images: Images, workers: int = 0) -> InDomain:
    """The in-domain extractor kept in `folder`; where there is none, it is trained on `images`, the
    train split, first, which `workers` processes read.

    Where its weights are damaged, they are written again. Raises UserError when it was trained on
    other data.
    """
    kept, made_from = folder / "config.yaml", noted(folder, images.split)
    config = (
        configuration.load(ExtractorRun, kept) if kept.is_file() else extractor_run(data, images)
    )
    remedy = "remove it to train another, or name one with --extractor"
    for key in ("image_size", "held_out") if made_from else ("source", "image_size", "held_out"):
        was, wanted = getattr(config.data, key), getattr(data, key)
        if was != wanted:
            raise UserError(
                f"{folder}: this extractor was trained with data.{key}={was}, not {wanted}: {remedy}"
            )
    if made_from not in (None, images.inventory.sha256):
        what = changes(folder, [images.inventory])
        raise UserError(f"{folder}: this extractor was trained on other images: {what}; {remedy}")
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, source=data.source),  # they may move
        loop=dataclasses.replace(config.loop, workers=images.readers(workers)),
    )
    finished, reason = Run(folder, config).finished(config.loop.steps), ""
    if finished:
        try:
            load_weights(folder)
        except UserError as error:
            reason = str(error).partition(": remove it")[0]
    broken = distributed.any_true(bool(reason))
    if broken:

        def discard() -> None:
            print(f"warning: {reason}: it is written again from the last checkpoint", flush=True)
            weights_path(folder).unlink(missing_ok=True)

        distributed.on_main(discard)
    if broken or not finished:
        train_extractor(config, folder)
    elif made_from is None and distributed.is_main():
        print(
            f"warning: {folder} does not say which images this extractor was trained on: taken for these",
            flush=True,
        )
    return InDomain(folder)
