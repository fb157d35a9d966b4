"""A token cache as a data set of torch's, for anybody's own prior."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tokenizer.cache import SPLITS, TokenCache


class TokenDataset(torch.utils.data.Dataset):
    """`dataset[i]` is (codes (N,) int64, label int) of an image; `layout` says what the N positions
    mean. Only the rows that are asked for are read from the disk.
    """

    def __init__(
        self, tokens: str | Path | TokenCache, split: str = "train", *, view: int = 0
    ) -> None:
        """`tokens`: a cache or its folder; `split`: "train" or "held_out"; `view`: 0 is the plain
        image, others are augmented ones, where the cache has any.

        Raises UserError where there is no finished cache, ValueError for another split or view.
        """
        self.cache = tokens if isinstance(tokens, TokenCache) else TokenCache.open(tokens)
        if split not in SPLITS or not 0 <= view < self.cache.manifest["views"]:
            raise ValueError(
                f"split={split!r}, view={view}: {self.cache.folder} has {' and '.join(SPLITS)}, and "
                f"{self.cache.manifest['views']} views, from 0"
            )
        self.layout, self.class_names = self.cache.layout, self.cache.class_names
        self.view, self._split = view, self.cache.split(split)
        self.targets = self._split.labels  # (n,) int64

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, int]]:
        """Several items at once, as DataLoader asks for a batch: one read of each shard."""
        rows = np.asarray(self._split.codes[list(indices)][:, self.view]).astype(np.int64)
        return list(zip(torch.from_numpy(rows), self.targets[list(indices)].tolist()))
