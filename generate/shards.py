"""Numbered samples in shards, while they are drawn: in any order, by any number of processes, and
gone on with.

unfinished/plan.json                    what the samples depend on, but for their numbers
unfinished/000000050-000000100.npz      images, codes and times of samples 50 to 99, whole as soon as it is there
"""

from __future__ import annotations

import io
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from generate.npz import DAMAGES
from training.atomic import replace_file
from training.errors import UserError
from training.folder import Folder

UNFINISHED, PLAN = "unfinished", "plan.json"
NAME = re.compile(r"(\d{9,})-(\d{9,})\.npz")
SHARD = rf"{UNFINISHED}/({NAME.pattern}|{re.escape(PLAN)})"  # what is listed of a folder
LEAST = 64  # samples of a shard, where batches are smaller


def shard_name(numbers: range) -> str:
    """Within the folder that the samples are for."""
    return f"{UNFINISHED}/{numbers.start:09d}-{numbers.stop:09d}.npz"


class Shards:
    """Of the folder that the samples are for."""

    def __init__(self, out: Path) -> None:
        self.out, self.folder = out, out / UNFINISHED

    def of_others(self, plan: dict[str, Any]) -> bool:
        """Whether `begin` would remove shards."""
        return any(self.folder.glob("*.npz")) and _read(self.folder / PLAN) != plan

    def begin(self, folder: Folder, plan: dict[str, Any]) -> None:
        """Keep the shards of this plan, and remove those of another. For the process that has taken
        the folder."""
        kept = self.folder / PLAN
        if not (kept.is_file() and _read(kept) == plan):
            folder.remove([name for name in folder.listed if name.startswith(f"{UNFINISHED}/")])
            folder.note(f"{UNFINISHED}/{PLAN}")
            replace_file(kept, json.dumps(plan, indent=1).encode())

    def missing(self, num: int) -> list[range]:
        """Those of the samples 0 to num - 1 that are in no shard."""
        gaps, done = [], 0
        for numbers, _ in self._listed():
            if numbers.start > done:
                gaps.append(range(done, min(num, numbers.start)))
            done = max(done, numbers.stop)
        return [gap for gap in [*gaps, range(done, num)] if gap]

    def write(self, first: int, images: np.ndarray, codes: np.ndarray, times: np.ndarray) -> None:
        """(n, H, W, 3) uint8 and (n, N) int64 of the samples from `first` on; `times`: see
        `total`."""
        content = io.BytesIO()
        np.savez(content, images=images, codes=codes, times=times)
        replace_file(self.out / shard_name(range(first, first + len(images))), content.getvalue())

    def parts(self, name: str, num: int) -> Iterator[np.ndarray]:
        """The rows of the samples 0 to num - 1, shard by shard.

        Raises UserError where some are lacking, and for a damaged shard, which then is removed.
        """
        done = 0
        for numbers, path in self._listed():
            if numbers.start <= done < min(num, numbers.stop):
                yield self._load(path, name)[done - numbers.start : num - numbers.start]
                done = min(num, numbers.stop)
        if done < num:
            raise UserError(
                f"{self.folder}: sample {done} is not there: all processes have to write to one file system; then run "
                "the same command again"
            )

    def total(self, name: str) -> np.ndarray:
        """The sum over all shards of an array that each has alike."""
        return sum(self._load(path, name) for _, path in self._listed())

    def _listed(self) -> list[tuple[range, Path]]:
        found = [(NAME.fullmatch(path.name), path) for path in self.folder.iterdir()]
        found = [(range(int(match[1]), int(match[2])), path) for match, path in found if match]
        return sorted(found, key=lambda each: (each[0].start, -each[0].stop))

    def _load(self, path: Path, name: str) -> np.ndarray:
        try:
            with np.load(path, allow_pickle=False) as stored:
                return stored[name]
        except DAMAGES as error:
            path.unlink()
            raise UserError(
                f"{path}: damaged ({error}), and removed: run the same command again"
            ) from None


def cut(gaps: list[range], size: int) -> list[range]:
    """Pieces of at most `size` numbers that end at its multiples."""
    pieces = []
    for gap in gaps:
        edges = [gap.start, *range((gap.start // size + 1) * size, gap.stop, size), gap.stop]
        pieces += [range(first, last) for first, last in itertools.pairwise(edges)]
    return pieces


def shard_size(num: int, batch_size: int, world: int) -> int:
    """Whole batches, LEAST samples or more, unless then some process would have nothing to do."""
    batches = max(1, min(-(-LEAST // batch_size), -(-num // (batch_size * world))))
    return batches * batch_size


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None
