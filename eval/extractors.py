"""Feature extractors and what their figures may be called.

"FID" and "IS" belong to one network, the 2015-12-05 Inception, known by its SHA-256. Without it, figures come
from a small classifier trained on the data at hand; they carry its name and hash (`FD[digits-cnn@a1b2c3d4]`)
and compare with nothing else.
"""

from __future__ import annotations

import dataclasses
import io
import re
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eval.interface import Batch
from tokenizer.data.sampler import feed
from tokenizer.data.sources import DataConfig, Images, open_split
from tokenizer.data.transforms import to_float
from training import config as configuration
from training import distributed
from training.checkpoint import Run, load_weights, sha256, weights_hash
from training.command import UserError
from training.loop import Batch as TrainingBatch
from training.loop import LoopConfig, Loss, Turn, train
from training.optim import OptimizerConfig

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
KNOWN_INCEPTIONS = ("6726825d",)  # SHA-256 prefixes, as in the released file's name
STANDARD_NAMES = {"FD": "FID", "rFD": "rFID", "IS": "IS"}
TASKS = ("classes", "rotation")


@dataclasses.dataclass(frozen=True)
class Extraction:
    """What an extractor sees in n images."""

    features: Tensor  # (n, D) float32
    probabilities: Tensor  # (n, C) float32, of the extractor's own classes


class Extractor(Protocol):
    name: str
    sha256: str  # of its weights
    standard: bool  # whether the standard names may be used
    dim: int  # D
    settings: dict  # for measurements

    def __call__(self, images: Tensor) -> Extraction: ...  # (B, 3, H, W) uint8


def figure_name(figure: str, extractor: Extractor) -> str:
    """ "FD" -> "FID" for the standard network and "FD[name@hash]" for any other."""
    if extractor.standard and figure in STANDARD_NAMES:
        return STANDARD_NAMES[figure]
    return f"{figure}[{tag(extractor)}]"


def tag(extractor: Extractor) -> str:
    return f"{extractor.name}@{extractor.sha256[:8]}"


def banner(extractor: Extractor) -> str | None:
    """The line that every output with a non-standard extractor carries; None for the standard one."""
    if extractor.standard:
        return None
    return (
        f"Not FID, not IS: figures marked [{tag(extractor)}] come from the extractor of that name and hash, "
        "and compare only with figures of the same mark."
    )


class FeatureRows:
    """Collects an extractor's rows over batches, each once, in order of id."""

    def __init__(self, extractor: Extractor) -> None:
        self.extractor = extractor
        self.ids: list[Tensor] = []
        self.parts: list[Extraction] = []

    def update(self, batch: Batch) -> None:
        self.add(batch.ids, self.extractor(batch.images))

    def add(self, ids: Tensor, extraction: Extraction) -> None:
        """Rows that were already extracted."""
        self.ids.append(ids.cpu())
        self.parts.append(Extraction(extraction.features.cpu(), extraction.probabilities.cpu()))

    def gathered(self) -> Extraction:
        """All ranks' rows."""
        order = distributed.gather_rows(torch.cat(self.ids)).argsort()
        features = distributed.gather_rows(torch.cat([part.features for part in self.parts]))
        probabilities = distributed.gather_rows(torch.cat([part.probabilities for part in self.parts]))
        return Extraction(features[order], probabilities[order])


# The standard network


class Inception:
    """torch-fidelity's port of the 2015-12-05 Inception, with its resize: 2048 features, 1008 classes."""

    dim = 2048

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise UserError(f"--inception-weights {path}: no such file")
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        self.sha256 = sha256(path)
        self.standard = self.sha256.startswith(KNOWN_INCEPTIONS)
        self.name = "inception-2015-12-05" if self.standard else "inception"
        self.settings = {"extractor": self.name, "extractor_sha256": self.sha256, "resize": "torch-fidelity"}
        try:
            # torch-fidelity unpickles the file it is given: it gets a copy of the tensors alone.
            tensors = io.BytesIO()
            torch.save(torch.load(path, map_location="cpu", weights_only=True), tensors)
            tensors.seek(0)
            self.network = FeatureExtractorInceptionV3(self.name, ["2048", "logits_unbiased"], tensors)
        except Exception as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"--inception-weights {path}: not the Inception weights ({first[:120]})") from error
        self.network.to(distributed.device())

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Extraction:
        features, logits = self.network(images.to(distributed.device()))
        return Extraction(features.float(), logits.float().softmax(1))


def find_inception(given: Path | None) -> Path | None:
    """The path given, else the file in torch's cache ($TORCH_HOME/hub/checkpoints) if it is there."""
    if given is not None:
        return given
    kept = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    return kept if kept.is_file() else None


# The in-domain classifier


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
        default_factory=lambda: OptimizerConfig(lr=2e-3, weight_decay=0.05, warmup_steps=40, final_lr_ratio=0.01)
    )

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"task={self.task!r} is not one of {', '.join(TASKS)}")


def extractor_run(data: DataConfig, images: Images) -> ExtractorRun:
    """The usual extractor for a train split: three passes, at least 300 and at most 1500 steps of 128."""
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
    """A small residual network: (B, 3, H, W) in [-1, 1] -> logits (B, C), through features (B, dim).

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
        self.skip = nn.Conv2d(channels, out_channels, 1, stride=stride) if stride > 1 else nn.Identity()
        self.norms = nn.ModuleList([nn.GroupNorm(8, channels), nn.GroupNorm(8, out_channels)])

    def forward(self, maps: Tensor) -> Tensor:
        inner = self.first(F.relu(self.norms[0](maps)))
        return self.skip(maps) + self.second(F.relu(self.norms[1](inner)))


def train_extractor(config: ExtractorRun, folder: Path, fresh: bool = False) -> None:
    """Train on the train split, keeping the run in `folder`; goes on where it stopped."""
    run = Run.open(folder, config, fresh=fresh)
    images = open_split(config.data, "train", augment=True, seed=config.seed)
    held_out = open_split(config.data, "held_out")
    num_classes = 4 if config.task == "rotation" else images.num_classes
    torch.manual_seed(distributed.mix(config.seed))
    classifier = Classifier(config.width, config.dim, num_classes)

    def loss(batch: TrainingBatch, step: int) -> Loss:
        pictures, labels = batch["images"], batch["labels"]
        if config.task == "rotation":
            labels = (4 * distributed.draw((config.seed, step), batch.positions)).long()
            pictures = rotate(pictures, labels)
        logits = classifier(pictures)
        cross_entropy = F.cross_entropy(logits, labels)
        accuracy = (logits.argmax(1) == labels).float().mean()
        return Loss(cross_entropy, {"cross_entropy": cross_entropy, "accuracy": accuracy})

    train(
        config.loop,
        run,
        [Turn("classifier", classifier, loss, config.optimizer)],
        feed(images, config.loop.batch_size, config.seed, config.loop.accumulate, config.loop.workers),
        seed=config.seed,
        published=classifier,
        measure=lambda averaged: {"accuracy": _accuracy(averaged, held_out, config.task)},
    )


def rotate(images: Tensor, quarters: Tensor) -> Tensor:
    """Turn each square image (B, 3, S, S) by its number of right angles, (B,) int64 in 0..3."""
    turned = torch.stack([torch.rot90(images, quarter, (2, 3)) for quarter in range(4)])
    return turned[quarters, torch.arange(len(images), device=images.device)]


@torch.no_grad()
def _accuracy(classifier: Classifier, images: Images, task: str, limit: int = 2000, chunk: int = 250) -> float:
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

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Extraction:
        features = self.network.features(to_float(images.to(distributed.device())))
        return Extraction(features, self.network.head(F.relu(features)).softmax(1))


def open_extractor(folder: Path, data: DataConfig, images: Images) -> InDomain:
    """The in-domain extractor kept in `folder`; where there is none, it is trained on `images`' split first.

    Raises UserError when it was trained on other data.
    """
    kept = folder / "config.yaml"
    config = configuration.load(ExtractorRun, kept) if kept.is_file() else extractor_run(data, images)
    for key in ("source", "image_size", "held_out"):
        was, wanted = getattr(config.data, key), getattr(data, key)
        if was != wanted:
            raise UserError(
                f"{folder}: this extractor was trained with data.{key}={was}, not {wanted}: remove it "
                "to train another, or name one with --extractor"
            )
    if not Run(folder, config).finished(config.loop.steps):
        train_extractor(config, folder)
    return InDomain(folder)
