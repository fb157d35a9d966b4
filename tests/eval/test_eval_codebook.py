"""Entropy by position and information between neighbours, against known answers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from eval.interface import Batch
from eval.metrics.codebook import (
    CodebookUsage,
    code_statistics,
    measure_codes,
    neighbour_information,
    position_entropy,
    usage,
)
from eval.record import Origin
from tokenizer.interface import CodeLayout

ORIGIN = Origin("held-out", {}, {})


def uniform(num_codes: int, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(num_codes, size=shape)


@pytest.mark.parametrize("num_codes", [2, 16, 300])
def test_independent_neighbours_inform_of_nothing(num_codes):
    horizontal, vertical = neighbour_information(uniform(num_codes, (400, 6, 6)))
    assert horizontal.pairs == vertical.pairs == 400 * 30
    for found in (horizontal, vertical):
        assert abs(found.bits) < 0.02
        assert found.plug_in > 0
    if num_codes == 300:
        assert horizontal.plug_in > 2  # bits that are not there: 12,000 pairs for 90,000 cells


def test_bias_of_the_plug_in_is_millers():
    n, num_codes = 400 * 30, 16
    found = [neighbour_information(uniform(num_codes, (400, 6, 6), seed))[0] for seed in range(10)]
    expected = (num_codes - 1) ** 2 / (2 * n * math.log(2))
    assert np.mean([each.plug_in for each in found]) == pytest.approx(expected, rel=0.15)
    assert np.mean([each.shuffled for each in found]) == pytest.approx(expected, rel=0.15)


def test_equal_neighbours_inform_of_everything_in_their_direction():
    rows = np.repeat(uniform(8, (2000, 5, 1)), 5, axis=2)  # codes are equal along a row
    horizontal, vertical = neighbour_information(rows)
    bias = 49 / (2 * horizontal.pairs * math.log(2))
    assert horizontal.bits == pytest.approx(3 - bias, abs=2e-3)
    assert abs(vertical.bits) < 5e-3
    turned = neighbour_information(rows.transpose(0, 2, 1))
    assert turned[1].plug_in == horizontal.plug_in and turned[0].plug_in == vertical.plug_in


@pytest.mark.parametrize("flips", [0.05, 0.25, 0.5])
def test_information_of_a_markov_chain(flips):
    generator = np.random.default_rng(1)
    turns = generator.random((3000, 2, 8)) < flips
    turns[..., 0] = generator.random((3000, 2)) < 0.5
    codes = np.cumsum(turns, axis=-1) % 2
    entropy = -sum(p * math.log2(p) for p in (flips, 1 - flips))
    horizontal, _ = neighbour_information(codes)
    assert horizontal.bits == pytest.approx(1 - entropy, abs=0.01)
    renamed, _ = neighbour_information(np.array([977, 3])[codes])
    assert renamed.plug_in == pytest.approx(horizontal.plug_in, abs=1e-12)


@pytest.mark.parametrize(
    ("grid", "missing"), [((6,), "vertical"), ((1, 6), "vertical"), ((6, 1), "horizontal")]
)
def test_a_line_of_codes_has_one_direction(grid, missing):
    statistics = code_statistics(uniform(4, (50, 6)), CodeLayout((grid,), (4,)))[0]
    assert getattr(statistics, missing) is None
    kept = {"vertical": statistics.horizontal, "horizontal": statistics.vertical}[missing]
    assert kept.pairs == 250
    assert statistics.position_entropy.shape == (math.prod(grid[:-1]), grid[-1])


def test_entropy_belongs_to_places():
    codes = np.stack([np.full(4096, 5), np.arange(4096) % 8, np.arange(4096) % 2 * 7], axis=1)
    assert position_entropy(codes, 8) == pytest.approx([0, 3, 1], abs=1e-3)
    few = uniform(64, (200, 20))
    plug_in = np.array(
        [
            math.log2(200) - (c[c > 0] * np.log2(c[c > 0])).sum() / 200
            for c in map(np.bincount, few.T)
        ]
    )
    corrected = position_entropy(few, 64)
    assert (plug_in < corrected).all() and (corrected <= 6 + 1e-12).all()
    assert abs(corrected.mean() - 6) < abs(plug_in.mean() - 6) / 2


def test_figures_of_levels_are_those_of_the_metric():
    layout = CodeLayout(((2, 3), (4, 3)), (5, 9))
    codes = np.concatenate(
        [uniform(5, (300, 6)), np.sort(uniform(9, (300, 12), 1), axis=1)], axis=1
    )
    found = {
        measurement.name: measurement
        for measurement in measure_codes(codes.astype(np.uint16), layout, ORIGIN)
    }
    metric = CodebookUsage(layout, ORIGIN)
    metric.update(Batch(torch.empty(0), torch.arange(300), codes=torch.from_numpy(codes)))
    for name, measurement in metric.compute().items():
        if not name.startswith("rate"):
            assert found.pop(name) == measurement
    names = (
        "code entropy per position",
        "information, horizontal neighbours",
        "information, vertical neighbours",
    )
    assert set(found) == {f"{name}, level {level}" for name in names for level in (1, 2)}
    assert abs(found["information, horizontal neighbours, level 1"].value) < 0.1
    assert found["information, horizontal neighbours, level 2"].value > 0.5
    details = found["information, vertical neighbours, level 2"].details
    assert details["pairs"] == 300 * 9 and details["plug_in"] > details["shuffled"] > 0
    statistics = code_statistics(codes, layout)
    assert [level.histogram.sum() for level in statistics] == [300 * 6, 300 * 12]
    assert (
        statistics[1].position_entropy.mean() == found["code entropy per position, level 2"].value
    )


def test_usage_and_rates_of_known_codes():
    """Of 5 codes two in turn, of 9 always the last: 1 bit a code on 6 places, and none on 12."""
    layout = CodeLayout(((2, 3), (4, 3)), (5, 9))
    codes = torch.cat([torch.arange(60).view(10, 6) % 2, torch.full((10, 12), 8)], 1)
    metric = CodebookUsage(layout, ORIGIN)
    for part in codes.split(4):
        metric.update(Batch(torch.empty(0), torch.arange(len(part)), codes=part))
    found = metric.compute()
    assert {name: each.value for name, each in found.items() if "corrected" not in name} == {
        "codebook usage, level 1": pytest.approx(40),
        "perplexity, level 1": pytest.approx(2),
        "code entropy, level 1": pytest.approx(1),
        "codebook usage, level 2": pytest.approx(100 / 9),
        "perplexity, level 2": pytest.approx(1),
        "code entropy, level 2": pytest.approx(0),
        "rate, fixed": pytest.approx(6 * math.log2(5) + 12 * math.log2(9)),
        "rate, unigram entropy": pytest.approx(6),
    }
    assert found["codebook usage, level 2"].details["dead"] == list(range(8))
    assert {each.n for each in found.values()} == {10}


def test_one_code_is_enough():
    found = usage(torch.tensor([0, 1, 0]))
    assert (found.active, found.dead, found.entropy, found.perplexity) == (1, [0, 2], 0, 1)
    with pytest.raises(ValueError, match="empty"):
        usage(torch.zeros(3))


def test_no_codes_are_refused():
    with pytest.raises(ValueError, match="empty"):
        code_statistics(np.zeros((0, 6), np.uint16), CodeLayout(((2, 3),), (4,)))
