"""A user's own map-style data set as a listing, so that splits, cropping, augmentation, order and
resuming are those of any other source.

An item is an image (see `pixels.contents`), or a pair (image, label). It must be the same each time
that it is asked for: augmentation is `data.augment`'s.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from tokenizer.data.dataset import DataConfig, Images
from tokenizer.data.digests import FileDigests
from tokenizer.data.pixels import contents
from tokenizer.data.splits_and_classes import number_classes
from tokenizer.data.transforms import BadImage
from training.errors import UserError


class MapDataset(Protocol):
    """What `torch.utils.data.Dataset` of the map style has."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


def open_given(
    config: DataConfig, images: MapDataset, held_out: MapDataset | None = None, seed: int = 0
) -> tuple[DataConfig, dict[str, Images]]:
    """(the configuration as a record is to have it, the training and held-out split) of data sets.

    Without `held_out`, `config.held_out` of each class are. Every item is read once here, to know
    the data again when a run is resumed. Raises UserError for items of another form.
    """
    listing = GivenListing(images, held_out)
    config = dataclasses.replace(config, source=listing.name)
    return config, {
        split: Images(listing, split, config, config.augment, seed)
        for split in ("train", "held_out")
    }


class GivenListing:
    """Every item of a training data set, then every item of a held-out one; see `Listing`."""

    refused: Mapping[int, str] = {}

    def __init__(self, images: MapDataset, held_out: MapDataset | None = None) -> None:
        self._datasets = {"images": images}
        if held_out is not None:
            self._datasets["held_out"] = held_out
        for name, dataset in self._datasets.items():
            if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
                raise UserError(
                    f"{name}={type(dataset).__name__}: give a data set of the map style: len(), [i]"
                )
        self.name, self.notes = f"given:{type(images).__name__}", []
        self._places = [  # of each item: which data set, and where in it
            (name, place) for name, each in self._datasets.items() for place in range(len(each))
        ]
        self.held_out = None
        if held_out is not None:
            self.held_out = np.array([name == "held_out" for name, _ in self._places])
        labels = []
        self._digests: list[bytes] = []
        for item in range(len(self._places)):
            image, label = self._pair(item)
            labels.append(label)
            self._digests.append(self._digest(item, image))
        if self._places and self._digest(0, self._pair(0)[0]) != self._digests[0]:
            raise UserError(
                "images: item 0 is another image each time that it is asked for: give the data set "
                "without random augmentation, and name one in data.augment"
            )
        numbers = all(isinstance(label, int) for label in labels)
        names = getattr(images, "classes", None) if numbers else None
        self.labels, self.class_names = number_classes(self.name, labels, names)

    def key(self, item: int) -> str:
        return str(item)

    def where(self, item: int) -> str:
        name, place = self._places[item]
        return f"{name}[{place}]"

    def read(self, item: int) -> bytes:
        return contents(self._pair(item)[0])

    def digests(self, items: np.ndarray) -> FileDigests:
        rows = (self._digests[item] for item in items.tolist())
        return FileDigests.of_rows(self.name, [], items, rows)

    def _pair(self, item: int) -> tuple[Any, int | str | None]:
        """An image and its label; None, without one."""
        name, place = self._places[item]
        found = self._datasets[name][place]
        if not isinstance(found, tuple | list):
            return found, None
        if len(found) != 2:
            raise UserError(f"{self.where(item)}: has {len(found)} parts: give (image, label)")
        image, label = found
        return image, label.item() if hasattr(label, "item") else label

    def _digest(self, item: int, image: Any) -> bytes:
        """Zeros for what is no image, of which reading says why."""
        try:
            return hashlib.sha256(contents(image)).digest()
        except BadImage as error:
            if item == 0:  # then all are, and their form is wrong
                raise UserError(f"{self.where(item)}: {error}") from None
            return bytes(32)
