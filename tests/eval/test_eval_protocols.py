"""The protocols of published figures: what they do to images, and that it shows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from eval.extractors.fid_protocols import (
    PROTOCOLS,
    emulate,
    fit_bicubic,
    round_up,
    score_in_order,
    score_shuffled,
    truncate,
)
from eval.extractors.interface import Extraction
from eval.extractors.resizing import resize_bicubic, resize_bicubic_float, resize_bilinear
from eval.metrics.frechet import Gaussian, frechet_distance
from eval.metrics.inception_score import inception_score
from tokenizer.data.transforms import to_float, to_uint8


def pictures(n: int, size: int, seed: int) -> torch.Tensor:
    """Smooth ones with hard edges, uint8."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 5, 5, generator=generator)
    return (255 * F.interpolate(coarse, size=size)).byte()


class Patches:
    """Random projections of 4 x 4 patches, at 24 px."""

    name, sha256, standard, dim, input_size = "patches", "0" * 64, False, 6, 24

    def __init__(self) -> None:
        self.kernel = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0)) / 255
        self.seen = 0

    def __call__(self, images: torch.Tensor) -> Extraction:
        return self.see(resize_bilinear(images, 24))

    def see(self, inputs: torch.Tensor) -> Extraction:
        assert inputs.shape[2:] == (24, 24)
        self.seen += len(inputs)
        features = F.conv2d(inputs.float(), self.kernel, stride=2).relu().mean((2, 3))
        return Extraction(features, (4 * features).softmax(1))


def test_adm_loses_levels_and_the_others_do_not() -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    for keep in (round_up, to_uint8):
        assert torch.equal(keep(to_float(levels)), levels)
    cut = truncate(to_float(levels))
    assert int((cut != levels).sum()) == 63 and int((levels.int() - cut.int()).max()) == 1


def test_resizes() -> None:
    images = pictures(2, 40, 0)
    for resize in (resize_bilinear, resize_bicubic, resize_bicubic_float):
        assert torch.equal(resize(images, 40).float(), images.float())  # nothing to do
    small = resize_bicubic(images, 17)
    assert small.dtype == torch.uint8
    exact = resize_bicubic_float(images, 17)
    assert exact.dtype == torch.float32 and (exact - exact.round()).abs().max() > 0.1  # not rounded
    assert (small - exact).abs().mean() < 0.5  # it rounds and clips after each direction
    assert (resize_bilinear(images, 17) - exact).abs().max() > 20  # no antialiasing
    assert fit_bicubic(images, 40) is images and fit_bicubic(to_float(images), 20).shape[-1] == 20


@pytest.mark.parametrize("size", [17, 40, 60])
def test_the_resize_of_clean_fid_is_its_own(size: int) -> None:
    """Its make_resizer("PIL", False, "bicubic", ...), of version 0.1.35: channel by channel in
    floats, then clipped."""
    images = pictures(3, 40, 4)

    def channel(pixels: np.ndarray) -> np.ndarray:
        picture = Image.fromarray(pixels.astype(np.float32)).resize(
            (size, size), Image.Resampling.BICUBIC
        )
        return np.asarray(picture).reshape(size, size, 1)

    theirs = [np.concatenate([channel(part) for part in picture], 2) for picture in images.numpy()]
    assert size == 40 or (
        min(map(np.min, theirs)) < -5 and max(map(np.max, theirs)) > 260
    )  # clipping shows
    theirs = torch.from_numpy(np.stack(theirs).clip(0, 255)).permute(0, 3, 1, 2)
    assert torch.equal(resize_bicubic_float(images, size), theirs)


def test_scores_are_those_of_their_sources() -> None:
    """torch-fidelity's by its own function; ADM's by its evaluator's formula: runs of 5,000, the
    last one short."""
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = 3 * torch.randn(
        11_003, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    logits[:, 0] += torch.arange(len(logits)) / 2000  # order matters
    p = logits.softmax(1)
    assert score_shuffled(p) == pytest.approx(
        isc_features_to_metric(logits)["inception_score_mean"], rel=1e-12
    )
    scores = []
    for start in (0, 5000, 10_000):
        part = p[start : start + 5000].numpy()
        kl = part * (np.log(part) - np.log(part.mean(0, keepdims=True)))
        scores.append(np.exp(kl.sum(1).mean()))
    assert score_in_order(p) == pytest.approx(np.mean(scores), rel=1e-12)
    assert abs(score_in_order(p) - score_shuffled(p)) > 0.01


def test_order_matters_to_adms_score_alone() -> None:
    by_class = torch.eye(4).repeat_interleave(5000, 0) * 0.96 + 0.01
    assert score_in_order(by_class) == pytest.approx(1)
    assert score_shuffled(by_class) > 3
    assert score_in_order(by_class[:3000]) == pytest.approx(
        inception_score(by_class[:3000], 1).mean
    )


def test_protocols_differ_where_they_say() -> None:
    real, made = pictures(40, 33, 1), pictures(30, 33, 2)
    floats = (
        to_float(made) + torch.rand(made.shape, generator=torch.Generator().manual_seed(3)) / 127.5
    )

    def figures(images: torch.Tensor, extractor: Patches) -> dict:
        found = emulate(list(PROTOCOLS), extractor, lambda: images.split(7), lambda: real.split(9))
        return {each.protocol: each for each in found}

    extractor = Patches()
    found = figures(made, extractor)
    # Every image once by bilinear and once by bicubic: uint8 has nothing left to quantise.
    assert extractor.seen == 2 * (30 + 40)
    direct = frechet_distance(
        *(Gaussian.of_features(extractor(side).features) for side in (made, real))
    )
    assert found["torch-fidelity"].distance == pytest.approx(direct)
    assert found["adm"].distance == found["llamagen"].distance == found["torch-fidelity"].distance
    assert found["clean-fid"].distance != pytest.approx(direct, rel=1e-2)
    assert found["clean-fid"].score is None and found["torch-fidelity"].score != found["adm"].score
    assert {(each.n, each.reference_n) for each in found.values()} == {(30, 40)}

    from_floats = figures(floats, Patches())
    assert from_floats["adm"].distance != pytest.approx(from_floats["llamagen"].distance, rel=1e-6)
    assert from_floats["llamagen"].distance == pytest.approx(
        from_floats["torch-fidelity"].distance, rel=1e-3
    )
    large = F.interpolate(
        floats, size=66, mode="bilinear"
    )  # LlamaGen brings it to the references' 33 px
    other = figures(large, Patches())
    assert other["llamagen"].distance != pytest.approx(other["torch-fidelity"].distance, rel=1e-3)


def test_every_protocol_explains_itself_in_a_line_of_its_own() -> None:
    lines = [protocol.why for protocol in PROTOCOLS.values()]
    assert len(set(lines)) == 4 and not any("\n" in line for line in lines)
    assert list(PROTOCOLS) == ["adm", "llamagen", "clean-fid", "torch-fidelity"]
