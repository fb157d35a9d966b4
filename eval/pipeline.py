"""What evaluation finds in a pipeline's folder, or in a tokenizer's: its data, the tokenizer, the
extractors."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval.extractors.in_domain import InDomain, check_extractor, open_extractor
from eval.extractors.interface import Extractor
from eval.extractors.networks import Inception, Tower, find_inception
from eval.extractors.weights import WEIGHTS
from eval.interface import Batch
from eval.metrics.image_similarity import LPIPS
from eval.record import Record
from tokenizer.batch_encoder import LowPrecision
from tokenizer.cache import TokenCache
from tokenizer.data.dataset import DataConfig, Images, open_split
from tokenizer.data.loader import read
from tokenizer.data.transforms import to_uint8
from tokenizer.interface import Tokenizer
from tokenizer.run import load as load_tokenizer
from tokenizer.run import load_config
from training import distributed
from training.checkpoint import weights_hash
from training.config import from_dict
from training.log import Progress
from training.precision import decide


@dataclasses.dataclass(frozen=True)
class Options:
    """How to measure; the command line of eval.run."""

    run: Path
    extractor: Path | None = None  # folder of an in-domain extractor; a pipeline's is run/extractor
    lpips_weights: Path | None = None
    lpips_net: str = "squeeze"
    inception_weights: Path | None = None
    dinov2: Path | None = None  # folders of published towers
    clip: Path | None = None
    reference: Path | None = None  # .npz of statistics or images, for samples
    protocol: tuple[str, ...] = ()  # of extractors.fid_protocols; of reconstructions one at most
    prior: Path | None = None  # that codes tokens; a pipeline's is run/prior
    rate_distortion: int | None = None  # so many images beside picture formats
    num: int | None = None  # at most so many images of each set
    batch_size: int = 100
    fresh: bool = False
    encoder: str | None = None  # of probes: the pretrained encoder that the tokenizer began with
    allow_differences: tuple[str, ...] = ()  # of comparisons: settings that may differ between runs
    precision: str = (
        "auto"  # of tokenizers and priors; extractors and LPIPS are fp32, as published figures are
    )
    workers: int | None = (
        None  # processes that read images; as many as the tokenizer was trained with
    )


class Pipeline:
    """A pipeline's folder, which holds tokens/, or the run folder of a tokenizer alone.

    Its parts are opened when first asked for.
    """

    def __init__(self, options: Options) -> None:
        """Raises UserError when the folder is neither, its tokens are not of the tokenizer's
        present weights, or a folder that was named for an extractor holds none.
        """
        self.options, self.folder = options, options.run
        self.alone = (self.folder / "config.yaml").is_file() and not (
            self.folder / "tokens"
        ).is_dir()
        self.extractor_folder = options.extractor or self.folder / "extractor"
        if options.extractor:  # of several tokenizers one extractor lies beside them
            beside = [self.folder.parent / "extractor"] if self.alone else []
            check_extractor(options.extractor, [self.folder / "extractor", *beside])
        self.tokenizer_folder = self.folder if self.alone else self.tokens.tokenizer_folder

    @property
    def report_folder(self) -> Path:
        return self.folder / "report"

    @functools.cached_property
    def tokens(self) -> TokenCache:
        tokens = TokenCache.open(self.folder / "tokens")
        tokens.check_tokenizer()
        return tokens

    @functools.cached_property
    def precision(self) -> str:
        """ "fp32", "bf16" or "fp16". Ask for it on every rank."""
        asked, device, title = self.options.precision, distributed.device(), str(self.folder)
        return distributed.on_main(lambda: decide(asked, device, "--precision", title))

    @property
    def how(self) -> dict[str, str]:
        """The precision among a record's settings; fp32 is not told: earlier versions knew no
        other."""
        return {} if self.precision == "fp32" else {"precision": self.precision}

    @property
    def how_encoded(self) -> dict[str, str]:
        """As `how`, of codes: a token cache's were computed before."""
        if self.alone:
            return self.how
        return {} if self.tokens.precision == "fp32" else {"precision": self.tokens.precision}

    @functools.cached_property
    def workers(self) -> int:
        """Processes that read images."""
        given = self.options.workers
        return load_config(self.tokenizer_folder).loop.workers if given is None else given

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        return LowPrecision(load_tokenizer(self.tokenizer_folder), self.precision)

    @functools.cached_property
    def tokenizer_hash(self) -> str:
        return weights_hash(self.tokenizer_folder)

    @functools.cached_property
    def data(self) -> DataConfig:
        """The data that was encoded, and that the prior learned; of a tokenizer alone, what it was
        trained on."""
        if self.alone:
            return load_config(self.folder).data
        return from_dict(
            DataConfig, self.tokens.manifest["data"], str(self.tokens.folder / "manifest.json")
        )

    @functools.cached_property
    def train(self) -> Images:
        return self._split("train")

    @functools.cached_property
    def held_out(self) -> Images:
        return self._split("held_out")

    def held_out_as(self, crop: str) -> Images:
        """The held-out images, cut by one of tokenizer.data.transforms.CROPS."""
        return self._split("held_out", crop) if crop != "lanczos" else self.held_out

    def _split(self, name: str, crop: str = "lanczos") -> Images:
        """Raises UserError when the tokens are of other images."""
        images = _open_split(self.data, name, crop)
        if not self.alone:
            self.tokens.check_images(images)
        return images

    @functools.cached_property
    def in_domain(self) -> InDomain:
        return open_extractor(self.extractor_folder, self.data, self.train, self.workers)

    @functools.cached_property
    def extractors(self) -> list[Extractor]:
        """The in-domain one (of a tokenizer alone, if it was named), Inception and DINOv2 where
        their weights are."""
        inception, dinov2 = (
            find_inception(self.options.inception_weights),
            WEIGHTS["dinov2"].find(self.options.dinov2),
        )
        found: list[Extractor] = (
            [self.in_domain] if self.options.extractor or not self.alone else []
        )
        found += [Inception(inception)] if inception else []
        return found + ([Tower("dinov2", dinov2)] if dinov2 else [])

    @property
    def judge(self) -> Extractor:
        """The Inception where its weights are, else the in-domain extractor: for figures of one
        extractor alone."""
        return next(
            (each for each in self.extractors if isinstance(each, Inception)), self.in_domain
        )

    @functools.cached_property
    def clip(self) -> Tower | None:
        """Of CMMD; None without weights."""
        path = WEIGHTS["clip"].find(self.options.clip)
        return Tower("clip", path) if path else None

    @functools.cached_property
    def lpips(self) -> LPIPS | None:
        """None without weights, and where the images are too small for it."""
        path = WEIGHTS[f"lpips-{self.options.lpips_net}"].find(self.options.lpips_weights)
        lpips = LPIPS(self.options.lpips_net, path) if path else None
        return lpips if lpips and lpips.fits(self.data.image_size) else None

    def keep(self, record: Record) -> Record:
        """Write it into the report's folder, once for all ranks: each finds it there when this
        returns."""
        distributed.on_main(lambda: record.save(self.report_folder))
        return record

    def places(self, images: Images, most: int | None = None) -> Tensor:
        """The items of a split that are measured, (n,) int64: all, or `most` (else `num`) that lie
        evenly in it."""
        n, limit = len(images), most or self.options.num
        return (
            torch.arange(n)
            if limit is None or limit >= n
            else torch.linspace(0, n - 1, limit).long()
        )

    def split_name(self, images: Images, places: Tensor) -> str:
        """What figures over these places say that they are of."""
        name, n = images.split.replace("_", "-"), len(places)
        return name if n == len(images) else f"{name}, {n} of {len(images)}"

    def batches(self, images: Images, title: str) -> Iterator[Batch]:
        """This rank's share of a split."""
        return self.read(images, self.places(images), title)

    def read(self, images: Images, places: Tensor, title: str) -> Iterator[Batch]:
        """This rank's share of the items of a split at places (n,), which are the ids."""
        return share_images(images, places, self.options.batch_size, title, self.workers)


@functools.lru_cache(maxsize=2)
def _open_split(data: DataConfig, split: str, crop: str) -> Images:
    """Pipelines on the same data share its images."""
    return open_split(data, split, crop=crop)


def share(
    places: Tensor, batch_size: int, load_batch: Callable[[Tensor], Tensor], title: str
) -> Iterator[Batch]:
    """Batches of the places (n,), dealt to ranks in turn. `load_batch(places)` gives (B, 3, H, W)
    uint8."""
    return _deal(places, batch_size, lambda parts: (load_batch(part) for part in parts), title)


def share_images(
    images: Images,
    places: Tensor,
    batch_size: int,
    title: str,
    workers: int,
    ids: Tensor | None = None,
) -> Iterator[Batch]:
    """As `share`, of the items of a split at these places, read by `workers` processes.

    `ids` (n,) int64, rising: what the items are called, the places themselves without them.
    """

    def load_all(parts: Sequence[Tensor]) -> Generator[Tensor]:
        keys = (
            [(0, place) for place in (part if ids is None else places[part]).tolist()]
            for part in parts
        )
        with contextlib.closing(
            read(images, keys, images.readers(workers), "--workers")
        ) as batches:
            for batch in batches:
                yield to_uint8(batch["images"])

    return _deal(places if ids is None else ids, batch_size, load_all, title)


def _deal(
    ids: Tensor,
    batch_size: int,
    load_all: Callable[[Sequence[Tensor]], Generator[Tensor]],
    title: str,
) -> Iterator[Batch]:
    """This rank's batches of ids (n,): `load_all` gives (B, 3, H, W) uint8 for each part of
    them."""
    progress, done = Progress(title, len(ids)), 0
    device = distributed.device()
    parts = ids.split(batch_size)[distributed.rank() :: distributed.world()]
    with contextlib.closing(load_all(parts)) as loaded:
        for part, images in zip(parts, loaded, strict=True):
            yield Batch(images.to(device), part)
            done += len(part) * distributed.world()
            if distributed.is_main():
                progress.show(min(done, len(ids)), "")


def load(images: Images, places: Tensor) -> Tensor:
    """Items of a split, (B, 3, H, W) uint8."""
    return to_uint8(images.gather([(0, place) for place in places.tolist()])["images"])


def pixels(images: Tensor) -> Any:
    """(N, 3, H, W) uint8 -> (N, H, W, 3) numpy, as picture files hold it."""
    return images.permute(0, 2, 3, 1).contiguous().cpu().numpy()
