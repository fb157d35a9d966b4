"""Tiers of rate, and tokenizers against image codecs on made images."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image, features

from eval.metrics.codec import TableModel
from eval.metrics.rate import find_rates
from eval.metrics.rate_distortion import (
    CODECS,
    Point,
    compare,
    jpeg_bare,
    measure_point,
    pareto,
    sweep,
    try_codec,
)
from eval.record import Origin
from eval.report.rate_distortion import markdown, plot
from priors.backbone import BackboneConfig
from priors.families.autoregressive import AutoregressiveConfig
from priors.families.masked import MaskedConfig
from tokenizer.interface import CodeLayout

LAYOUT = CodeLayout(((2, 4), (4, 4)), (8, 32))
SMALL = BackboneConfig(dim=16, depth=1, heads=2, dropout=0.0)
JPEG_ONLY = {"JPEG": dataclasses.replace(CODECS["JPEG"], qualities=(1, 10, 40, 80))}


def codes_and_labels(n: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    top = torch.randint(2, (n, 8), generator=generator)
    bottom = (torch.rand(n, 16, generator=generator) ** 2 * 32).long()
    return torch.cat([top, bottom], 1), torch.arange(n) % 3


class Distance:
    """Stands for LPIPS."""

    name = "LPIPS-made"

    def __call__(self, images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
        return (images.double() - references.double()).abs().flatten(1).mean(1)


def smooth_images(n: int = 3, size: int = 48, grey: bool = False) -> torch.Tensor:
    """(n, 3, size, size) uint8: blobs of colour with a little noise."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(n, 3, 6, 6, generator=generator)
    images = torch.nn.functional.interpolate(coarse, size, mode="bicubic") * 220 + 10
    images += 4 * torch.randn(images.shape, generator=generator)
    images = images[:, :1].repeat(1, 3, 1, 1) if grey else images
    return images.clamp(0, 255).round().to(torch.uint8)


def test_tiers_of_an_untrained_prior_and_known_tables():
    codes, labels = codes_and_labels()
    prior = (
        AutoregressiveConfig(backbone=SMALL).build(LAYOUT, 3).eval()
    )  # untrained: all codes are as likely
    counts = [np.array([9, 9, 0, 0, 0, 0, 0, 0]), np.ones(32)]
    table = TableModel.of_split(counts, LAYOUT)
    rates = find_rates(
        codes, LAYOUT, split_table=table, prior=prior, labels=labels, batch_size=7, num_single=3
    )
    found = {rate.name: rate for rate in rates.found}
    fixed = 8 * 3 + 16 * 5
    assert not rates.notes
    assert found["fixed"].bits == LAYOUT.bits == fixed
    shares = [
        (level.flatten().bincount() / level.numel()).double() for level in codes.split([8, 16], 1)
    ]
    entropy = -sum(
        n * float(torch.special.xlogy(p, p).sum()) / math.log(2) for n, p in zip((8, 16), shares)
    )
    assert found["unigram entropy"].bits == pytest.approx(entropy)
    assert found["unigram cross-entropy"].bits == pytest.approx(-8 * math.log2(9.5 / 22) + 16 * 5)
    assert found["prior cross-entropy"].bits == pytest.approx(fixed)
    assert found["prior cross-entropy"].settings["likelihood"] == "exact"

    for name, ideal in (
        ("a table in it", entropy * 24),
        ("another split's table", found["unigram cross-entropy"].bits * 24),
        ("the prior", (fixed + 2) * 24),  # 2 bits a label
    ):
        file = found[f"file, coded by {name}"]
        assert file.details["ideal_bytes"] == pytest.approx(ideal / 8)
        assert ideal / 8 - 1 <= file.details["payload_bytes"] <= 1.02 * ideal / 8 + 8
        assert file.bits == 8 * file.details["bytes"] / 24 and file.n == 24
        assert file.details["bytes"] > file.details["payload_bytes"]
    single = found["file per image, coded by the prior"]
    assert single.n == 3 and single.bits > found["file, coded by the prior"].bits
    assert "file per image, coded by a table in it" not in found


def test_measurements_come_per_image_and_per_pixel():
    codes, _ = codes_and_labels()
    rates = find_rates(codes, LAYOUT)
    found = {
        each.name: each
        for each in rates.measurements(Origin("held-out", {}, {"tokenizer": "a"}), 64)
    }
    assert found["rate, fixed"].value == LAYOUT.bits == 64 * found["rate per pixel, fixed"].value
    assert {each.n for each in found.values()} == {24} and {
        each.split for each in found.values()
    } == {"held-out"}
    assert {each.unit for each in found.values()} == {"bits/image", "bits/pixel"}
    assert len(rates.table(64).splitlines()) == 2 + len(rates.found)


def test_what_cannot_be_had_is_said():
    codes, labels = codes_and_labels()
    prior = MaskedConfig(backbone=SMALL).build(LAYOUT, 3).eval()
    rates = find_rates(codes, LAYOUT, prior=prior, labels=labels)
    found = {rate.name: rate for rate in rates.found}
    assert found["prior cross-entropy"].settings["likelihood"] == "bound"
    assert found["prior cross-entropy"].settings["rate"].startswith("upper bound")
    assert "file, coded by the prior" not in found
    assert len(rates.notes) == 1 and "MaskedPrior" in rates.notes[0]
    with pytest.raises(ValueError, match="no codes"):
        find_rates(codes[:0], LAYOUT)


def test_a_point_is_the_mean_over_images():
    images = smooth_images()
    point = measure_point(
        "a", "fixed", images, images // 2 * 2, bits=48 * 48, bare_bits=24 * 48, chunk=2
    )
    each = [
        measure_point("a", "fixed", i, i // 2 * 2, bits=0, bare_bits=0) for i in images.split(1)
    ]
    assert (point.bits, point.bare_bits) == (1, 0.5)
    assert point.psnr == pytest.approx(np.mean([one.psnr for one in each]))
    assert point.ssim == pytest.approx(np.mean([one.ssim for one in each])) and point.lpips is None
    tiny = images[..., :8, :8]
    assert measure_point("a", "", tiny, tiny // 2, 1, 1).ssim is None, "below the window"


@pytest.mark.parametrize("name", [name for name in CODECS if features.check(CODECS[name].feature)])
def test_codecs_trade_bits_for_distortion(name):
    codec, images = dataclasses.replace(CODECS[name], qualities=(5, 40, 90)), smooth_images(2)
    tried = [
        try_codec(name, codec, images, scale, quality)
        for scale in (1, 2, 4)
        for quality in codec.qualities
    ]
    assert [point.setting for point in tried[::3]] == [
        "quality 5",
        "quality 5, 1/2 size",
        "quality 5, 1/4 size",
    ]
    full = tried[:3]
    assert (
        sorted(full, key=lambda point: point.bits)
        == full
        == sorted(full, key=lambda point: point.psnr)
    )
    assert all(0 < point.bare_bits < point.bits for point in tried)
    assert full[2].psnr > 30 and full[2].ssim > 0.8
    front = pareto(tried)
    assert all(a.bits < b.bits and a.psnr < b.psnr for a, b in itertools.pairwise(front))
    assert all(any(f.bits <= p.bits and f.psnr >= p.psnr for f in front) for p in tried)
    swept = sweep(name, codec, images)
    assert set(front) | set(pareto(tried, bare=True)) == set(swept), "1/8 is too small"


def test_bits_are_those_of_files():
    images = smooth_images(2)
    one = dataclasses.replace(JPEG_ONLY["JPEG"], qualities=(40,), ways=({"optimize": True},))
    sizes = []
    for image in images.permute(0, 2, 3, 1).contiguous().numpy():
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=40, optimize=True)
        sizes.append(len(file.getvalue()))
    point = try_codec("JPEG", one, images, 1, 40)
    assert point.bits == pytest.approx(8 * np.mean(sizes) / 48**2)
    more = dataclasses.replace(JPEG_ONLY["JPEG"], qualities=(40,))
    assert try_codec("JPEG", more, images, 1, 40).bits <= point.bits
    grey = try_codec("JPEG", one, smooth_images(2, grey=True), 1, 40)
    assert grey.bits < point.bits, "grey images are coded without chroma"


def test_ways_of_jpeg_show_the_same_picture():
    picture = Image.fromarray(smooth_images(1)[0].permute(1, 2, 0).contiguous().numpy())
    files = CODECS["JPEG"].encode(picture, "JPEG", 30)
    shown = [np.asarray(Image.open(io.BytesIO(file))) for file in files]
    assert all(np.array_equal(shown[0], other) for other in shown[1:])
    # start, JFIF's segment, two tables of quantization, frame and end; and the Huffman tables that
    # all know
    repeated = 2 + 18 + 2 * 69 + 19 + 2
    assert [len(file) - jpeg_bare(file) for file in files] == [
        repeated + 2 * (33 + 183),
        repeated,
        repeated,
    ]


def test_matching_reads_a_curve_at_a_point():
    found = compare(smooth_images(), [], codecs=JPEG_ONLY)
    front = pareto(found.curves["JPEG"])
    middle = front[len(front) // 2]
    for bare in (False, True):
        for known in pareto(found.curves["JPEG"], bare):
            matched = found.matched(known, "JPEG", bare)
            assert matched.psnr == pytest.approx(known.psnr) and matched.ssim == pytest.approx(
                known.ssim
            )
    between = dataclasses.replace(front[0], bits=math.sqrt(front[0].bits * front[1].bits))
    assert found.matched(between, "JPEG").psnr == pytest.approx((front[0].psnr + front[1].psnr) / 2)
    assert found.matched(dataclasses.replace(middle, bits=front[0].bits / 2), "JPEG") is None
    assert found.matched(dataclasses.replace(middle, bits=front[-1].bits * 2), "JPEG") is None


def test_the_page_and_the_plot(monkeypatch):
    images = smooth_images()
    front = pareto(compare(images, [], codecs=JPEG_ONLY).curves["JPEG"])
    bits = (front[0].bits + front[-1].bits) / 2 * 48 * 48
    points = [
        measure_point("coarse", "fixed", images, images // 32 * 32, 3, 2),
        measure_point("fine", "file", images, images // 8 * 8, bits, bits / 2),
    ]
    found = compare(images, points, codecs=JPEG_ONLY)
    assert "LPIPS" not in markdown(found)
    distance = Distance()
    points = [
        dataclasses.replace(
            point, lpips=measure_point("", "", images, images // 32, 1, 1, distance).lpips
        )
        for point in points
    ]
    found = compare(images, points, distance, JPEG_ONLY)
    text = markdown(found)
    rows = [[cell.strip() for cell in line.split(" | ")] for line in text.splitlines()]
    coarse, fine = (
        next(i for i, row in enumerate(rows) if f"**{name}**" in row[0])
        for name in ("coarse", "fine")
    )
    assert "has" in rows[coarse + 1][1] and rows[coarse + 1][2] == "—"
    assert rows[fine + 1][1] == "the same" and float(rows[fine + 1][2]) > 10
    assert "3 images of 48 x 48" in text and rows[coarse - 2][-1] == "LPIPS-made |"
    assert json.loads(json.dumps(found.to_dict()))["points"][0]["name"] == "coarse"
    assert Image.open(io.BytesIO(plot(found))).width > 1000

    monkeypatch.setattr(features, "check", lambda feature: feature != "avif")
    codecs = JPEG_ONLY | {"AVIF": CODECS["AVIF"]}
    without = compare(images[:1], [Point("a", "", 1.0, 1.0, 20.0, 0.5, None)], codecs=codecs)
    assert list(without.curves) == ["JPEG"] and "AVIF is left out" in markdown(without)
