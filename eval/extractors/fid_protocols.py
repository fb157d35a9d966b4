"""The same images under each published protocol of FID and IS, and why its figures differ.

Sources: guided-diffusion's sampler and evaluator (Dhariwal and Nichol 2021, arXiv:2105.05233),
LlamaGen (Sun et al. 2024, arXiv:2406.06525), clean-fid (Parmar et al. 2022, arXiv:2104.11222),
torch-fidelity (Obukhov et al. 2020). Protocols differ in how floats become uint8, in the resize to
the network's input, and in the chunks of IS. All distances are computed alike here: `eval.metrics.frechet`,
where ADM and clean-fid take scipy's sqrtm and, when that fails, add 1e-6 to the diagonals.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from eval.extractors.interface import Extractor
from eval.extractors.resizing import resize_bicubic_float, resize_bilinear
from eval.metrics.frechet import Gaussian, frechet_distance
from eval.metrics.inception_score import inception_score
from eval.metrics.moments import Moments
from tokenizer.data.transforms import to_uint8
from training import distributed

ADM_CHUNK = 5000  # samples per chunk of ADM's IS


@dataclasses.dataclass(frozen=True)
class Protocol:
    quantise: Callable[[Tensor], Tensor]  # floats in [-1, 1] -> uint8
    resize: Callable[[Tensor, int], Tensor]  # (B, 3, H, W) uint8, S -> (B, 3, S, S) in [0, 255]
    score: (
        Callable[[Tensor], float] | None
    )  # (N, C) class probabilities in order -> IS; None: it has no IS
    fit: (
        Callable[[Tensor, int], Tensor] | None
    )  # floats to the references' size; None: they keep their own
    why: str
    crop: str = "lanczos"  # of tokenizer.data.transforms.CROPS, where originals are prepared anew


@dataclasses.dataclass(frozen=True)
class Figures:
    """What one protocol says of the images."""

    protocol: str
    distance: float  # Fréchet
    score: float | None  # Inception Score; None where protocol or extractor have none
    n: int
    reference_n: int
    why: str


def emulate(
    names: Sequence[str],
    extractor: Extractor,
    images: Callable[[], Iterable[Tensor]],
    references: Callable[[], Iterable[Tensor]],
) -> list[Figures]:
    """Figures under the protocols of these names.

    `images` and `references` give this rank's batches afresh at each call, dealt to ranks in turn;
    references are uint8, images uint8 or, so that quantisation shows, floats in [-1, 1]. Batches
    are extracted once for every different way in.
    """
    seen: dict[tuple[object, ...], _Seen] = {}

    def see(source: Callable[[], Iterable[Tensor]], protocol: Protocol, size: int | None) -> _Seen:
        floats = size is not None
        way = (
            source,
            protocol.resize,
            protocol.quantise if floats else None,
            protocol.fit if floats else None,
        )
        if way not in seen:
            seen[way] = _Seen.of(source(), protocol, extractor, size)
        return seen[way]

    found = []
    firsts = [
        next(iter(source()), None) for source in (references, images)
    ]  # None: a rank without a batch
    size = distributed.largest(0 if firsts[0] is None else firsts[0].shape[-1])
    floating = distributed.any_true(firsts[1] is not None and firsts[1].is_floating_point())
    for name in names:
        protocol = PROTOCOLS[name]
        ours, real = (
            see(images, protocol, size if floating else None),
            see(references, protocol, None),
        )
        distance = frechet_distance(*(Gaussian.of_moments(side.moments) for side in (ours, real)))
        scored = protocol.score is not None and ours.probabilities.shape[1] > 1
        score = protocol.score(ours.probabilities) if scored else None
        found.append(
            Figures(name, distance, score, ours.moments.count, real.moments.count, protocol.why)
        )
    return found


@dataclasses.dataclass(frozen=True)
class _Seen:
    """One set of images through one way in, over all ranks."""

    moments: Moments
    probabilities: Tensor  # (N, C), in order

    @staticmethod
    def of(
        batches: Iterable[Tensor], protocol: Protocol, extractor: Extractor, size: int | None
    ) -> _Seen:
        moments, numbers, probabilities = Moments.empty(extractor.dim), [], []
        for turn, batch in enumerate(batches):
            if size is not None:
                batch = protocol.fit(batch, size) if protocol.fit else batch
                batch = protocol.quantise(batch)
            extraction = extractor.see(protocol.resize(batch, extractor.input_size))
            moments.update(extraction.features)
            probabilities.append(extraction.probabilities)
            numbers.append(
                torch.full((len(batch),), turn * distributed.world() + distributed.rank())
            )
        order = distributed.gather_parts(numbers).argsort(stable=True)
        return _Seen(moments.reduced(), distributed.gather_parts(probabilities)[order])


# Floats to uint8


def truncate(images: Tensor) -> Tensor:
    """ADM's sampler: 63 of the 256 levels that float32 holds come out one too low."""
    return ((images + 1) * 127.5).clamp(0, 255).to(torch.uint8)


def round_up(images: Tensor) -> Tensor:
    """LlamaGen's: rounds, halves upwards."""
    return (127.5 * images + 128).clamp(0, 255).to(torch.uint8)


def fit_bicubic(images: Tensor, size: int) -> Tensor:
    """LlamaGen's, from 384 px to 256: bicubic without antialiasing, before quantisation."""
    return (
        images
        if images.shape[-1] == size
        else F.interpolate(images, size=(size, size), mode="bicubic")
    )


# Inception Scores


def score_in_order(probabilities: Tensor) -> float:
    """ADM's: the mean over runs of 5,000 samples as they lie."""
    parts = probabilities.split(ADM_CHUNK)
    return sum(inception_score(part, splits=1).mean for part in parts) / len(parts)


def score_shuffled(probabilities: Tensor) -> float:
    """torch-fidelity's: ten splits after a shuffle."""
    return inception_score(probabilities, splits=min(10, len(probabilities))).mean


PROTOCOLS = {
    "adm": Protocol(
        truncate,
        resize_bilinear,
        score_in_order,
        None,
        "floats are cut to uint8, not rounded (63 of 256 levels are lost); the resize has no antialiasing; IS over "
        "runs of 5,000 samples in file order",
        crop="adm",
    ),
    "llamagen": Protocol(
        round_up,
        resize_bilinear,
        score_in_order,
        fit_bicubic,
        "ADM's evaluator after rounding to uint8; images of another size than the references are first resized as "
        "floats, bicubic without antialiasing",
        crop="adm",
    ),
    "clean-fid": Protocol(
        to_uint8,
        resize_bicubic_float,
        None,
        None,
        "Pillow's antialiased bicubic to the network's input, in float32: clipped to [0, 255], not rounded; no IS",
    ),
    "torch-fidelity": Protocol(
        to_uint8,
        resize_bilinear,
        score_shuffled,
        None,
        "uint8 by rounding; TensorFlow 1's bilinear resize without antialiasing; IS over ten splits after a shuffle",
    ),
}
