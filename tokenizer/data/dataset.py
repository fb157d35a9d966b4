"""Image data sets: one split of a source as pixels with labels, without the items that cannot be
read."""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import hashlib
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenizer.data import transforms
from tokenizer.data.columns import Choice
from tokenizer.data.identity import Inventory
from tokenizer.data.skipped import Skipped, first_of
from tokenizer.data.source import Listing, open_listing, unseen_classes
from tokenizer.data.transforms import BadImage
from training import distributed
from training.errors import UserError
from training.randomness import mix
from training.text import printable

SPLITS = ("train", "held_out")
ALL = "all"  # of both, for what is measured and not trained on
SPLIT_SEED = 1  # part of what "held out" means: changing it moves images between the splits
FEWEST_READS = 1000  # before a share of bad items among those read is judged
DECODE_THREADS = 2  # Pillow lets go of the interpreter only within decoding and resizing


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which images, at what size, split and augmented how; every field is a key of `data`."""

    source: str = "digits"  # an embedded name, a path, or hub:owner/name
    image_size: int = 32  # pixels, square
    held_out: float = (
        0.2  # share per class, where the source has no test or validation split of its own
    )
    augment: str = "none"  # of transforms.AUGMENTATIONS, in training only
    max_bad: float = (
        0.05  # largest share of unreadable items, of a split or of what was read, that is skipped
    )
    max_pixels: int = 64_000_000  # larger images are refused before they are decoded
    memory_mib: int = 1024  # for decoded pixels; larger sets are decoded each time
    image_column: str | None = (
        None  # of a table (parquet, Arrow, Hub), where not "image" or the only one
    )
    label_column: str | None = (
        None  # of a table or metadata.csv, where several may be; "none": without classes
    )
    hub_config: str | None = None  # of a data set of the Hub that has several
    hub_revision: str | None = None  # branch, tag or commit of a data set of the Hub

    def __post_init__(self) -> None:
        if not self.source.strip():
            raise UserError(
                f"data.source={self.source}: nothing is named; the working folder is data.source=."
            )
        if self.augment not in transforms.AUGMENTATIONS:
            known = ", ".join(transforms.AUGMENTATIONS)
            raise UserError(f"data.augment={self.augment}: choose one of {known}")
        if self.image_size < 1:
            raise UserError(f"data.image_size={self.image_size}: must be at least 1 pixel")
        if not 0 < self.held_out < 1:
            raise UserError(f"data.held_out={self.held_out}: must be a share above 0 and below 1")
        if not 0 <= self.max_bad <= 1:
            raise UserError(f"data.max_bad={self.max_bad}: must be a share from 0 to 1")
        if self.max_pixels < 1:
            raise UserError(f"data.max_pixels={self.max_pixels}: must be at least 1")

    @property
    def choice(self) -> Choice:
        """What is said of the source."""
        return Choice(self.image_column, self.label_column, self.hub_config, self.hub_revision)


def open_split(
    config: DataConfig, split: str, augment: bool = False, seed: int = 0, crop: str = "lanczos"
) -> Images:
    """One split, "train" or "held_out", of the configured source, or "all" of it; images are cut
    by one of transforms.CROPS.

    Raises UserError when the source cannot be found or read, has too many unreadable items, or
    leaves the split without items.
    """
    assert split in (*SPLITS, ALL), split
    listing = open_listing(config.source, config.memory_mib * 2**20, config.choice)
    return Images(listing, split, config, config.augment if augment else "none", seed, crop)


def take_inventories(config: DataConfig) -> dict[str, Inventory]:
    """What each split of the configured source is made of; nothing is decoded. Call it on every
    rank."""
    listing = open_listing(config.source, 0, config.choice)
    return {
        split: Inventory.take(listing, split_items(listing, split, config.held_out))
        for split in SPLITS
    }


class Images:
    """A map-style data set of square RGB images with class labels.

    Where the decoded split fits in `memory_mib`, it is decoded once, here, and unreadable items are
    left out: the same ones in every process and run. A larger split is decoded as it is read, and
    an unreadable item then gives the next readable item of its class, so length and labels hold but
    `gather` may give another id than `ids`. Either way what was skipped is in `bad`.
    """

    def __init__(
        self,
        listing: Listing,
        split: str,
        config: DataConfig,
        augmentation: str,
        seed: int,
        crop: str = "lanczos",
    ):
        self.name = printable(listing.name)
        self.split = split
        self.class_names = listing.class_names
        self.notes = [*listing.notes, *unseen_classes(listing)]  # on the whole source, for people
        self._config = config
        self._augmentation = augmentation
        self._seed = seed
        self._crop = crop
        items = split_items(listing, split, config.held_out)
        if not len(items):
            raise UserError(
                f"{config.source} has no images for the {split} split: add images, or give it "
                "folders "
                "or files named train and validation"
            )
        self.inventory = Inventory.take(listing, items)  # of what is listed, readable or not
        self.skipped = Skipped(config.source, split, len(items), config.max_bad, FEWEST_READS)
        unlabelled = listing.labels[items] < 0
        bad = {
            item: listing.refused.get(item, "has no class, unlike others")
            for item in items[unlabelled].tolist()
        }
        items = items[~unlabelled]
        pixels = None
        if len(items) * 3 * config.image_size**2 <= config.memory_mib * 2**20:
            pixels, unreadable = decode_all(listing, items, config, crop)
            bad |= unreadable
            readable = ~np.isin(items, list(unreadable))
            items, pixels = (
                items[readable],
                pixels if readable.all() else pixels[torch.from_numpy(readable)],
            )
        self.skipped.lines += [
            f"{listing.where(item)}: {reason}" for item, reason in sorted(bad.items())
        ]
        self.skipped.judge(len(bad), self.skipped.listed)
        self._pixels = pixels  # (n, 3, S, S) uint8, or None
        self._listing = listing if pixels is None else None
        self.ids = torch.from_numpy(
            items
        )  # (n,) int64, places in the whole source: the same in every split
        self.labels = torch.from_numpy(listing.labels[items])  # (n,) int64

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def image_size(self) -> int:
        return self._config.image_size

    @property
    def bad(self) -> list[str]:
        """What cannot be read, as far as it is known: "item: reason"."""
        return self.skipped.lines

    def readers(self, workers: int) -> int:
        """How many of so many processes are worth starting to read: none where the pixels are in
        memory already."""
        return workers if self._pixels is None else 0

    def gather(self, keys: list[tuple[int, int]]) -> dict[str, Tensor]:
        """(epoch, index) keys -> images (B, 3, S, S) float32 in [-1, 1], labels (B,) and ids (B,)
        int64.

        Augmentation depends on (seed, epoch, index) only.
        """
        places = torch.tensor([index for _, index in keys], dtype=torch.int64)
        if self._pixels is not None:
            images = self._pixels[places]
        else:
            loaded = [self._load(place) for place in places.tolist()]
            images = torch.stack([pixels for pixels, _ in loaded])
            places = torch.tensor([place for _, place in loaded])
        if transforms.AUGMENTATIONS[self._augmentation]:
            seeds = [mix(self._seed, epoch, index) for epoch, index in keys]
            images = torch.stack(
                [
                    transforms.augment(image, self._augmentation, seed)
                    for image, seed in zip(images, seeds)
                ]
            )
        return {
            "images": transforms.to_float(images),
            "labels": self.labels[places],
            "ids": self.ids[places],
        }

    def identity(self) -> dict[str, Any]:
        """What this split is, for records."""
        return {
            "source": self.name,
            "split": self.split,
            "n": len(self),
            "image_size": self.image_size,
            "ids_sha256": self.inventory.sha256,
            **({} if self._crop == "lanczos" else {"crop": self._crop}),
        }

    def plain(self) -> Images:
        """The same images without augmentation."""
        other = copy.copy(self)
        other._augmentation = "none"
        return other

    def announce(self) -> None:
        """Tell people on standard output what this is and what was skipped, once per run; of the
        training split, too, what of the source was passed over.
        """
        if distributed.is_main():
            print(self.summary(), flush=True)
            for note in self.notes if self.split == "train" else ():
                print(f"{self.name}: {printable(note)}", flush=True)

    def summary(self) -> str:
        """One line for people: what this is and what was skipped."""
        skipped = f"; skipped {first_of(self.bad)}" if self.bad else ""
        what = f"{len(self)} images, {self.num_classes} classes, {self.image_size} px"
        return f"{self.name} ({self.split}): {what}{skipped}"

    def _load(self, place: int) -> tuple[Tensor, int]:
        """Pixels (3, S, S) uint8 of an item, or of the next readable one of its class, and which it
        was."""
        for candidate in self._candidates(place):
            self.skipped.reads += 1
            try:
                data = self._listing.read(int(self.ids[candidate]))
                with _without_warnings():
                    limit = self._config.max_pixels
                    pixels = transforms.decode(data, self.image_size, limit, self._crop)
                return torch.from_numpy(pixels.copy()), candidate
            except BadImage as error:
                self.skipped.add(
                    candidate, f"{self._listing.where(int(self.ids[candidate]))}: {error}"
                )
        name = self.class_names[self.labels[place]]
        raise UserError(f"{self._config.source}: class {name} has no readable {self.split} image")

    def _candidates(self, place: int) -> Iterator[int]:
        """The item, then those of its class that follow it, around the end; without the known
        unreadable."""
        if place not in self.skipped:
            yield place
        same = torch.nonzero(self.labels == self.labels[place]).flatten()
        for candidate in torch.cat([same[same > place], same[same < place]]).tolist():
            if candidate not in self.skipped:
                yield candidate


def decode_all(
    listing: Listing,
    items: np.ndarray,
    config: DataConfig,
    crop: str = "lanczos",
    block: int = 256,
) -> tuple[Tensor, dict[int, str]]:
    """Every item's pixels, (n, 3, S, S) uint8, and the reason of each that cannot be read, by
    item."""
    pixels = np.zeros((len(items), 3, config.image_size, config.image_size), dtype=np.uint8)
    bad: dict[int, str] = {}

    def decode_block(start: int, encoded: list[bytes | BadImage]) -> None:
        for place, data in enumerate(encoded, start):
            try:
                if isinstance(data, BadImage):
                    raise data
                pixels[place] = transforms.decode(data, config.image_size, config.max_pixels, crop)
            except BadImage as error:
                bad[int(items[place])] = str(error)

    def read(item: int) -> bytes | BadImage:
        try:
            return listing.read(item)
        except BadImage as error:
            return error

    with (
        _without_warnings(),
        ThreadPoolExecutor(DECODE_THREADS) as pool,
    ):  # this thread reads, the pool decodes
        pending: collections.deque = collections.deque()
        for start in range(0, len(items), block):
            encoded = [read(item) for item in items[start : start + block].tolist()]
            pending.append(pool.submit(decode_block, start, encoded))
            if len(pending) > 2 * DECODE_THREADS:
                pending.popleft().result()
        for future in pending:
            future.result()
    return torch.from_numpy(pixels), bad


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Pillow's, of damage that it reads over: lines without the name of a file, as many as there
    are images."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def split_items(listing: Listing, split: str, share: float) -> np.ndarray:
    """Items of a split, (n,) int64 ascending: the source's own split, else `share` of each class
    held out; all of them for "all".

    The stratified split ranks each class by a hash of its items' keys, so it needs no state and
    little moves when images are added. A class of two or more gives at least one item to either
    side.
    """
    held_out = listing.held_out
    if split == ALL:
        return np.arange(len(listing.labels))
    if held_out is None:
        held_out = np.zeros(len(listing.labels), dtype=bool)
        rank = np.fromiter(
            (_hash(listing.key(item)) for item in range(len(held_out))), np.uint64, len(held_out)
        )
        for label in np.unique(listing.labels):
            members = np.flatnonzero(listing.labels == label)
            members = members[np.argsort(rank[members], kind="stable")]
            count = max(1, int(share * len(members) + 0.5))
            held_out[members[: min(count, len(members) - 1)]] = True
    return np.flatnonzero(held_out if split == "held_out" else ~held_out)


def _hash(key: str) -> int:
    data = f"{SPLIT_SEED}:{key}".encode(errors="surrogatepass")  # names of files need not be UTF-8
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest())
