"""What this project knows of one published prior, as tokenizer.published.peer of a tokenizer.

A peer's file holds one `PriorPeer`, the one source of truth: the loader, the check and
docs/published.md are made from it.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from tokenizer.interface import CodeLayout
from tokenizer.published.files import Hyperparameters
from tokenizer.published.peer import Evidence, Place, PublishedFile, Shapes

Outputs = Mapping[str, Tensor]


@dataclasses.dataclass(frozen=True)
class PriorArchitecture:
    """A published prior as one of ours."""

    prior: Any  # configuration of a kind in priors.PRIORS
    layout: CodeLayout
    num_classes: int
    names: Mapping[str, str | Place]  # of modules or tensors: ours -> the published file's
    sampling: Mapping[str, Any] | None = None  # of SampleOptions, where its configuration says it


@dataclasses.dataclass(frozen=True)
class PublishedPrior(PublishedFile):
    """A file of a prior, the tokenizer whose codes it is of, and how its authors sample from it."""

    tokenizer: str = ""  # its name in tokenizer.published, or an address
    sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of SampleOptions


@dataclasses.dataclass(frozen=True)
class PriorPeer:
    """One published architecture."""

    kind: str
    title: str
    licence: str
    recognises: Callable[[Evidence], bool]
    architecture: Callable[[Shapes, Hyperparameters], PriorArchitecture]
    # All that a case may hold, by its names, from its tensors: ids are in both.
    outputs: Callable[[nn.Module, Mapping[str, Tensor]], dict[str, Tensor]]
    recipe: str  # how its authors sample, in words
    sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of no known file
    ignored: tuple[str, ...] = ()  # patterns of tensors that are no part of the model
    tied: Mapping[str, str] = dataclasses.field(
        default_factory=dict
    )  # saved again: name -> of what
    quirks: tuple[str, ...] = ()
    files: tuple[PublishedPrior, ...] = ()

    def ignores(self, name: str) -> bool:
        return any(re.fullmatch(pattern, name) for pattern in self.ignored)

    def file_of(self, name: str) -> PublishedPrior | None:
        """The one published file that is called so: by its name here, its own, or its
        repository's."""
        named = [file for file in self.files if name == file.name]
        found = named or [file for file in self.files if name in (file.file, file.where)]
        return found[0] if len(found) == 1 else None


def square(length: int) -> tuple[int, ...]:
    """The grid of so many codes: as many rows as columns, or one that is no image's."""
    side = math.isqrt(length)
    return (side, side) if side * side == length else (length,)
