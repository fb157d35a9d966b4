"""A user's own code sequences in place of a token cache, for training a prior."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from tokenizer.cache import TokenSplit
from tokenizer.interface import CodeLayout
from training.errors import UserError
from training.randomness import mix

HELD_OUT_SEED, HELD_OUT_PART = 1, 5  # a fifth is held out where no data set of its own is given


class GivenTokens:
    """What training needs of a token cache: `layout`, `class_names`, splits and their identity.

    Items of the data sets are codes (N,), or (codes, label), with whole numbers in the ranges of
    the layout. They are read once, into memory.
    """

    def __init__(self, tokens: Any, held_out: Any = None, layout: CodeLayout | None = None) -> None:
        """`layout`: of the codes, where the data set has none of its own, as TokenDataset has.

        Raises UserError for items of another form or range.
        """
        layout = layout or getattr(tokens, "layout", None)
        if layout is None:
            raise UserError(
                "tokens: say what the codes mean: layout=CodeLayout(grids=((8, 8),), num_codes=(512,))"
            )
        self.layout: CodeLayout = layout
        self.name = f"given:{type(tokens).__name__}"
        codes, labels = _read(tokens, "tokens", layout)
        if held_out is None:
            chosen = [mix(HELD_OUT_SEED, item) % HELD_OUT_PART == 0 for item in range(len(codes))]
            out = np.array(chosen, bool)
            if out.all() or not out.any():
                raise UserError(
                    f"tokens: {len(codes)} items are too few to hold a fifth of them out"
                )
            parts = [(codes[~out], labels[~out]), (codes[out], labels[out])]
        else:
            parts = [(codes, labels), _read(held_out, "held_out", layout)]
        self._splits = {
            name: TokenSplit(codes[:, None], labels, np.arange(len(codes)))
            for name, (codes, labels) in zip(("train", "held_out"), parts)
        }
        count = 1 + max(int(labels.max()) for _, labels in parts)
        names = [str(name) for name in getattr(tokens, "class_names", ())]
        self.class_names = names if len(names) >= count else [str(n) for n in range(count)]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def sha256(self) -> str:
        """Of all codes and labels, and what they mean."""
        whole = hashlib.sha256(repr((self.layout, self.class_names)).encode())
        for split in self._splits.values():
            for array in (split.codes, split.labels):
                whole.update(np.ascontiguousarray(array).tobytes())
        return whole.hexdigest()

    def split(self, name: str) -> TokenSplit:
        """ "train" or "held_out"."""
        return self._splits[name]


def _read(tokens: Any, name: str, layout: CodeLayout) -> tuple[np.ndarray, np.ndarray]:
    """(n, N) int32 and (n,) int64."""
    if not hasattr(tokens, "__len__") or not hasattr(tokens, "__getitem__") or not len(tokens):
        raise UserError(f"{name}: give a data set of the map style that is not empty: len(), [i]")
    codes = np.empty((len(tokens), layout.length), np.int32)
    labels = np.zeros(len(tokens), np.int64)
    for item in range(len(tokens)):
        found = tokens[item]
        row, label = found if isinstance(found, tuple | list) and len(found) == 2 else (found, 0)
        row = np.asarray(row)
        if row.shape != (layout.length,) or row.dtype.kind not in "iu":
            raise UserError(
                f"{name}[{item}]: is {row.dtype} {row.shape}, not {layout.length} whole numbers"
            )
        codes[item], labels[item] = row, int(label)
    for span, size in layout.spans():
        low, high = int(codes[:, span].min()), int(codes[:, span].max())
        if not 0 <= low <= high < size:
            raise UserError(f"{name}: holds codes {low}..{high}, outside [0, {size})")
    if labels.min() < 0:
        raise UserError(f"{name}: a label is {labels.min()}: give whole numbers from 0")
    return codes, labels
