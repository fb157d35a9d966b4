"""A published tokenizer against a case: inputs, and what its authors' code makes of them.

A case is a folder with the weights under published names, the configuration (config.json) and
case.safetensors: `images` and what is computed of them (`features`, which the quantizer is given,
`codes`, `quantized`, `reconstruction`, ...), further images with their own prefix (`wide.images`,
`wide.codes`), codes to be decoded (`free.codes`, `free.reconstruction`), and under `raw.` what the
weights give that are no averages.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from tokenizer.hierarchical import Hierarchical
from tokenizer.published.load import from_pretrained
from tokenizer.published.peer import Peer
from training.errors import UserError

TOLERANCE = 1e-4  # greatest absolute difference of anything but codes, which are equal
LEVELS = ("top", "bottom")  # of two grids of codes
PICTURES = ("reconstruction", "reconstruction_clamped")
FREE, RAW = "free", "raw"  # parts of prefixes: what is given is codes; weights that are no averages


@dataclasses.dataclass
class Difference:
    """How far one tensor is from what it should be."""

    name: str
    value: float  # greatest absolute difference; of codes, how many differ
    exact: bool  # whether it must be equal
    problem: str = ""  # why it cannot be compared

    @property
    def within(self) -> bool:
        return not self.problem and self.value <= (0 if self.exact else TOLERANCE)


@torch.no_grad()
def check(folder: Path, kind: str | None = None) -> tuple[list[Difference], dict[str, Tensor]]:
    """All that a case holds against what is computed here, and the latter under the case's names.

    Raises UserError when the folder holds no case, or its weights cannot be loaded.
    """
    case = read_case(folder)
    load = functools.cache(lambda averaged: from_pretrained(folder, as_=kind, averaged=averaged))
    computed: dict[str, Tensor] = {}
    for prefix in prefixes(case):
        model = load(RAW not in prefix.split("."))
        computed |= {
            f"{prefix}{name}": value for name, value in compute(model, case, prefix).items()
        }
    return compared(case, computed, is_input)


def compared(
    case: Mapping[str, Tensor], computed: Mapping[str, Tensor], is_input: Callable[[str], bool]
) -> tuple[list[Difference], dict[str, Tensor]]:
    """What a case holds, but for its inputs, against what was computed, in the case's layout."""
    found = {
        name: fitted(computed[name], tuple(case[name].shape)) for name in case if name in computed
    }
    asked = [name for name in case if not is_input(name)]
    return [difference(name, case[name], found.get(name)) for name in asked], found


def read_case(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder's case.safetensors."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = folder / "case.safetensors"
    if not file.is_file():
        raise UserError(f"{file}: there is no such file: give the folder of a case")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise UserError(f"{file}: damaged ({error}): copy it again") from None


def prefixes(case: Mapping[str, Tensor]) -> Iterator[str]:
    """What stands before the names of each group of tensors: "", "wide.", "free.", ..."""
    seen = set()
    for name in case:
        prefix = split_name(name)[0]
        if prefix not in seen:
            seen.add(prefix)
            yield prefix


def split_name(name: str) -> tuple[str, str]:
    """(prefix, name within its group); levels belong to the name."""
    *before, last = name.split(".")
    if last in LEVELS and before:
        last = f"{before.pop()}.{last}"
    return "".join(f"{part}." for part in before), last


def is_input(name: str) -> bool:
    prefix, last = split_name(name)
    given = ("codes", "latents") if FREE in prefix.split(".") else ("images",)
    return last.split(".")[0] in given


def compute(model: nn.Module, case: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """All that a model makes of the inputs of one group, in the range of its authors' images."""
    peer: Peer = model.published.peer
    own = getattr(model, "check_outputs", None)  # of what is no autoencoder with a quantizer
    if FREE in prefix.split("."):
        given = {
            split_name(n)[1]: value
            for n, value in case.items()
            if n.startswith(prefix) and is_input(n)
        }
        outputs = own(**given) if own else decoded(model, given)
    else:
        images = case.get(f"{prefix}images", case.get(f"{prefix.replace(f'{RAW}.', '')}images"))
        if images is None:
            return {}
        images = images * 2 - 1 if peer.unit_range else images
        outputs = own(images=images) if own else encoded(model, images)
    pictures = outputs["reconstruction"]
    if peer.unit_range:
        pictures = (pictures + 1) / 2
    clamped = pictures.clamp(0 if peer.unit_range else -1, 1)
    outputs["reconstruction"] = clamped if peer.clamped else pictures
    return outputs | {"reconstruction_clamped": clamped}


def encoded(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Of images (B, 3, H, W) in [-1, 1]."""
    features = model.encoder(images)
    if isinstance(model, Hierarchical):
        top_latents = model.project_top(model.top_encoder(features))
        top = model.top_quantizer(top_latents)
        latents = model.project_in(torch.cat([model.top_decoder(top.vectors), features], 1))
        bottom = model.quantizer(latents)
        return {
            "features.top": top_latents,
            "features.bottom": latents,
            "codes.top": top.codes,
            "codes.bottom": bottom.codes,
            "quantized.top": top.vectors,
            "quantized.bottom": bottom.vectors,
            "reconstruction": model._to_images(top.vectors, bottom.vectors),
        }
    latents, quantized = model.quantize(features)
    outputs = {
        "features": latents,
        "codes": quantized.codes,
        "quantized": quantized.vectors,
        "reconstruction": model.from_vectors(quantized.vectors),
    }
    more = model.published.peer.outputs
    return outputs | (more(model, latents, quantized.vectors) if more else {})


def decoded(model: nn.Module, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of codes (B, h, w), or (B, N) where they have no grid; of two levels by their names."""
    if isinstance(model, Hierarchical):
        top, bottom = (given[f"codes.{level}"][:, None] for level in LEVELS)
        vectors = model.top_quantizer.lookup(top), model.quantizer.lookup(bottom)
        quantized = {f"quantized.{level}": each for level, each in zip(LEVELS, vectors)}
        return quantized | {"reconstruction": model._to_images(*vectors)}
    codes = given["codes"]
    vectors = model.quantizer.lookup(codes[:, None] if codes.ndim == 3 else codes[:, None, None])
    return {"quantized": vectors, "reconstruction": model.from_vectors(vectors)}


def fitted(value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """In the case's layout: codes on its grid, features as (B, C, h, w) or as tokens (B, N, C)."""
    if not value.is_floating_point() and value.numel() == torch.Size(shape).numel():
        return value.reshape(shape)
    if value.ndim == 4 and len(shape) == 3:
        value = value.flatten(2).transpose(1, 2)
    return value.contiguous()


def difference(name: str, expected: Tensor, found: Tensor | None) -> Difference:
    exact = not expected.is_floating_point()
    if found is None:
        return Difference(name, float("inf"), exact, "not computed here")
    if found.shape != expected.shape:
        return Difference(
            name, float("inf"), exact, f"{tuple(found.shape)} for {tuple(expected.shape)}"
        )
    found = found.cpu()
    if exact:
        return Difference(name, float((found != expected).sum()), exact)
    return Difference(name, float((found.double() - expected.double()).abs().max()), exact)


def told(differences: list[Difference]) -> str:
    """A line for each."""
    width = max((len(each.name) for each in differences), default=0)
    lines = []
    for each in differences:
        figure = each.problem or (f"{each.value:.0f} differ" if each.exact else f"{each.value:.2e}")
        lines.append(f"{each.name:<{width}}  {figure}{'' if each.within else '  TOO FAR'}")
    return "\n".join(lines)
