"""WebDataset shards (Aizman et al. 2019, arXiv:2001.01858) as a source, in any order by an index of
places."""

from __future__ import annotations

import collections
import itertools
import json
import math
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from tokenizer.data import tar_index
from tokenizer.data.columns import NO_CHOICE, NO_LABELS, Choice
from tokenizer.data.digests import FileDigests, file_digests
from tokenizer.data.splits_and_classes import number_classes, own_split, some
from tokenizer.data.transforms import BadImage
from training import distributed
from training.errors import UserError
from training.text import printable

MAX_SHARDS = 10**6  # that a pattern may name
READERS = 8  # threads that read the headers of shards, which wait for disks


class TarListing:
    """WebDataset shards: tars of NAME.jpg (.jpeg, .png, .webp) with NAME.cls, NAME.json or a folder
    as the class.

    An item is a place in a shard, so any order costs one positioned read per image. 32 bytes of
    memory per item, and its name.
    """

    def __init__(self, source: Path, shards: list[Path], choice: Choice = NO_CHOICE) -> None:
        """`source` is a folder, a .tar or a pattern of them; `shards` are its tars."""
        without_labels = choice.label_column == NO_LABELS
        used = ("label_column",) if without_labels else ()
        choice.refuse(str(source), *(field for field in choice._fields if field not in used))
        self.name = source.name.removesuffix(".tar")
        root = source if source.is_dir() else Path(str(source).partition("{")[0] + "x").parent
        split = own_split([path.relative_to(root).as_posix() for path in shards])
        if split is not None:
            shards = [root / name for name in sorted(split.train + split.held_out)]
        if missing := [path for path in shards if not path.exists()]:
            raise UserError(
                f"data.source={source}: {len(missing)} of {len(shards)} shards are missing: "
                f"{missing[0]}"
            )
        self._root, self._shards = root, shards
        self._stamps = [tar_index.stamp(path) for path in shards]
        indexes = _indexes(shards)
        counts = [len(index.offsets) for index in indexes]
        self._starts = np.cumsum(
            [0, *counts]
        )  # the first item of each shard, and the number of items
        if not self._starts[-1]:
            raise UserError(
                f"data.source={source} holds no samples: give tars of NAME.jpg and NAME.cls"
            )
        self._names = [path.relative_to(root).as_posix().removesuffix(".tar") for path in shards]
        self._offsets = np.concatenate([index.offsets for index in indexes])
        self._sizes = np.concatenate([index.sizes for index in indexes])
        self._keys = np.concatenate([index.keys for index in indexes])
        first_bytes = np.cumsum([0, *(len(index.keys) for index in indexes)])
        self._key_ends = np.concatenate(
            [index.key_ends + first for index, first in zip(indexes, first_bytes)]
        )
        self.labels, self.class_names = _merge_labels(str(source), indexes)
        if without_labels:
            self.labels, self.class_names = np.where(self._offsets < 0, -1, 0), ["all"]
        self.notes = [*(split.notes() if split else []), *_notes(indexes)]
        problems = np.flatnonzero(self._offsets < 0).tolist()
        self.refused = {item: tar_index.PROBLEMS[-1 - self._offsets[item]] for item in problems}
        in_held_out = [
            split is not None and f"{name}.tar" in split.held_out for name in self._names
        ]
        self.held_out = None if split is None else np.repeat(in_held_out, counts)

    def key(self, item: int) -> str:
        start = self._key_ends[item - 1] if item else 0
        name = self._keys[start : self._key_ends[item]].tobytes()
        return f"{self._names[self._shard(item)]}/{name.decode('utf-8', 'replace')}"

    def where(self, item: int) -> str:
        return printable(self.key(item)[:200])

    def read(self, item: int) -> bytes:
        if item in self.refused:
            raise BadImage(self.refused[item])
        shard, size = self._shard(item), int(self._sizes[item])
        try:
            descriptor = os.open(self._shards[shard], os.O_RDONLY)
            try:
                if not tar_index.stamp(descriptor).same_contents(self._stamps[shard]):
                    raise BadImage("its shard has changed since this run began")
                return os.pread(descriptor, size, int(self._offsets[item]))
            finally:
                os.close(descriptor)
        except OSError as error:
            raise BadImage(f"its shard cannot be read ({error.strerror})") from error

    def digests(self, items: np.ndarray) -> FileDigests:
        shards = np.unique(np.searchsorted(self._starts, items, "right") - 1)
        return file_digests(self._root, [f"{self._names[shard]}.tar" for shard in shards.tolist()])

    def _shard(self, item: int) -> int:
        return int(np.searchsorted(self._starts, item, "right")) - 1


def _indexes(shards: list[Path]) -> list[tar_index.TarIndex]:
    """Of each shard. Each process begins elsewhere, so that several find most of them made by the
    others."""
    if (
        new := sum(not tar_index.kept_at(path).exists() for path in shards)
    ) and distributed.is_main():
        print(f"reading the headers of {new} shards, once", flush=True)
    first = distributed.rank() * len(shards) // distributed.world()
    with ThreadPoolExecutor(READERS) as pool:
        indexes = list(pool.map(tar_index.index_of, [*shards[first:], *shards[:first]]))
    return [*indexes[len(shards) - first :], *indexes[: len(shards) - first]]


def _notes(indexes: list[tar_index.TarIndex]) -> list[str]:
    """What shards hold beside their items, for people."""
    kinds: collections.Counter[str] = collections.Counter()
    counts, names = [0, 0, 0], [[], [], []]
    for index in indexes:
        seen = tar_index.Seen(*json.loads(str(index.seen)))
        kinds.update(seen.kinds)
        for place, (count, *first) in enumerate((seen.beside, seen.several, seen.repeated)):
            counts[place] += count
            names[place] += first[: 3 - len(names[place])]
    notes = []
    if counts[0]:
        notes.append(
            f"passed over {counts[0]:,} images beside the one of their sample "
            f"({', '.join(names[0])}, …)"
        )
    if counts[1]:
        shown = ", ".join(names[1])
        notes.append(
            f"{counts[1]:,} samples hold several images ({shown}, …): each image is an item of its "
            "own"
        )
    if counts[2]:
        shown = ", ".join(names[2])
        notes.append(
            f"{counts[2]:,} items have the name of an earlier one in their shard ({shown}): both "
            "count"
        )
    if kinds:
        shown = [
            f"{f'.{kind}' if kind else 'without a name or an ending'} {n:,}"
            for kind, n in kinds.most_common()
        ]
        notes.append(f"passed over {kinds.total():,} members of other kinds ({some(shown, 6)})")
    return notes


def _merge_labels(source: str, indexes: list[tar_index.TarIndex]) -> tuple[np.ndarray, list[str]]:
    """Shards' labels as labels of the whole source, (n,) int64, and the names of its classes.

    Folders are classes only where no sample has one of its own.
    """
    places: dict[str, int] = {}  # of classes among those of all shards
    parts = []
    for index in indexes:
        own = [places.setdefault(text, len(places)) for text in json.loads(str(index.classes))]
        parts.append(np.array([*own, -1])[index.labels])  # the last is what -1, no class, is
    if not places:
        offsets = np.concatenate([index.offsets for index in indexes])
        return np.where(offsets < 0, -1, 0), ["all"]
    values = [json.loads(text) for text in places]
    folders = [value[0] if isinstance(value, list) else None for value in values]
    own = [None if isinstance(value, list) else value for value in values]
    numbers, class_names = number_classes(source, folders if None not in folders else own)
    if set(own) <= {None, -1} and None in folders:  # nothing but marks that there is no class
        return np.where(
            np.concatenate([index.offsets for index in indexes]) < 0, -1, 0
        ), class_names
    return np.append(numbers, -1)[np.concatenate(parts)], class_names


def is_pattern(source: str) -> bool:
    """Whether a source names shards by braces. An address with a scheme, such as pipe:, never
    does."""
    return source.endswith(".tar") and "{" in source and not re.match(r"[a-z]+:", source)


def expand_braces(pattern: str) -> list[str]:
    """Shards that a pattern names: {000..099} counts with its digits, {a,b} lists. In order, each
    once."""
    parts: list[list[str]] = []
    for text in re.split(r"(\{[^{}]*\})", pattern):
        span = re.fullmatch(r"\{(\d+)\.\.(\d+)\}", text)
        if span is None:
            parts.append(
                text[1:-1].split(",") if text.startswith("{") and text.endswith("}") else [text]
            )
            continue
        first, last = int(span[1]), int(span[2])
        if not first <= last < first + MAX_SHARDS:
            raise UserError(
                f"data.source={pattern}: {text} does not count up to at most {MAX_SHARDS} shards"
            )
        parts.append([str(number).zfill(len(span[1])) for number in range(first, last + 1)])
    if math.prod(map(len, parts)) > MAX_SHARDS:
        raise UserError(f"data.source={pattern} names more than {MAX_SHARDS} shards")
    return list(dict.fromkeys(map("".join, itertools.product(*parts))))
