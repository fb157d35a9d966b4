"""What this project knows of one published model: its names, its sizes, its quirks and its
published files.

A peer's file holds one `Peer`, the one source of truth: the loader, the check and docs/published.md
are made from it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from tokenizer.published.files import Hyperparameters

Shapes = Mapping[str, tuple[int, ...]]  # of tensors, by their published names

# Of our tensors those that only training fills: published files have none of them.
OURS_ALONE = re.compile(
    r"(.*\.)?(statistics\.usage|mean_counts|mean_sums|assignment\.warmth|temperature|boost|next_step)"
)


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What tells a file's kind."""

    shapes: Shapes
    target: str = ""  # the class that its configuration names
    shadowed: bool = False  # whether it has averages under names without dots


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a published file keeps one of our tensors."""

    name: str
    transposed: bool = False  # rows there are columns here

    def to_ours(self, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The tensor in our shape, to the bit. Raises ValueError when it is not the same
        numbers."""
        tensor = _turned(tensor) if self.transposed else tensor
        if _without_ones(tensor.shape) != _without_ones(shape):
            raise ValueError
        return tensor.reshape(shape)

    def to_theirs(self, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        return (_turned(tensor) if self.transposed else tensor).reshape(shape)


def _turned(tensor: Tensor) -> Tensor:
    """A matrix, or a 1x1 convolution, with rows for columns."""
    return tensor.reshape(tensor.shape[:2]).T


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A 1x1 convolution (out, in, 1, 1) is a linear map (out, in)."""
    return tuple(side for side in shape if side != 1)


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A published model as one of ours."""

    model: Any  # configuration of a kind in tokenizer.run.AUTOENCODERS
    image_size: int
    names: Mapping[str, str | Place]  # of modules or tensors: ours -> the published file's

    def places(self, model: nn.Module) -> Iterator[tuple[str, Place]]:
        """(our name, place in the file) of every tensor of the model that such a file has."""
        return places(model, self.names)


def places(model: nn.Module, names: Mapping[str, str | Place]) -> Iterator[tuple[str, Place]]:
    """(our name, place in the file) of every tensor of a model; `names` are of tensors or
    modules."""
    for name in model.state_dict():
        if name in names:
            place = names[name]
            yield name, place if isinstance(place, Place) else Place(place)
            continue
        module, _, leaf = name.rpartition(".")
        if module in names:
            yield name, Place(f"{names[module]}.{leaf}")
        elif not OURS_ALONE.fullmatch(name):
            raise AssertionError(f"{name} has no published name")


@dataclasses.dataclass(frozen=True)
class PublishedFile:
    """A file that its authors published, and what they say that it reaches."""

    name: str  # for published:NAME
    where: str  # repository of the Hub (owner/name), or an address
    file: str
    about: str  # hyperparameters
    figures: str = ""  # with protocol and reference set
    sha256: str = ""  # where known
    config: str = ""  # beside the file, where the sizes do not tell all
    hyperparameters: Mapping[str, Any] = dataclasses.field(
        default_factory=dict
    )  # likewise, where no file says them

    @property
    def on_hub(self) -> bool:
        return "://" not in self.where and "/" in self.where


@dataclasses.dataclass(frozen=True)
class Peer:
    """One published architecture."""

    kind: str
    title: str
    licence: str
    recognises: Callable[[Evidence], bool]
    architecture: Callable[[Shapes, Hyperparameters], Architecture]
    # Of what is no autoencoder with a quantizer: the module, and its names in the file.
    build: Callable[[Shapes, Hyperparameters], tuple[nn.Module, Mapping[str, str]]] | None = None
    ignored: tuple[str, ...] = ()  # patterns of tensors that are no part of the model
    unit_range: bool = False  # its images are in [0, 1], not in [-1, 1]
    clamped: bool = False  # whether its `reconstruction` is clamped to that range
    quirks: tuple[str, ...] = ()
    files: tuple[PublishedFile, ...] = ()
    # More that a case may hold, of a model, what its quantizer was given and what that made of it.
    outputs: Callable[[nn.Module, Tensor, Tensor], dict[str, Tensor]] | None = None

    def ignores(self, name: str) -> bool:
        return any(re.fullmatch(pattern, name) for pattern in self.ignored)


def count(shapes: Shapes, pattern: str) -> int:
    """How many there are of names such as `encoder.down.{}.`, from 0 on."""
    number = 0
    while any(name.startswith(pattern.format(number)) for name in shapes):
        number += 1
    return number


def has(*patterns: str, without: tuple[str, ...] = ()) -> Callable[[Evidence], bool]:
    """Whether the names hold each of these (regular expressions, whole names), and none of
    those."""

    def recognise(evidence: Evidence) -> bool:
        def found(pattern: str) -> bool:
            return any(re.fullmatch(pattern, name) for name in evidence.shapes)

        return all(map(found, patterns)) and not any(map(found, without))

    return recognise
