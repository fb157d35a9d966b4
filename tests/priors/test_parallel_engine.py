"""Laws of reading all positions at once: its logits are the backbone's, and so are samples and
bounds made of them."""

from __future__ import annotations

import pytest
import torch
from test_backbone import (
    GIVEN,
    LAYOUTS,
    NUM_CLASSES,
    ONE_LEVEL,
    OPTIONS,
    TWO_LEVELS,
    make,
    random_codes,
)
from torch import nn

import priors.decoding.parallel
import priors.sampling.noise
from priors.decoding.parallel import BackboneReading, reading
from priors.families.absorbing import SAMPLERS, AbsorbingPrior
from priors.families.masked import MaskedPrior
from priors.families.uniform import UniformPrior
from priors.interface import SampleOptions
from priors.sampling.guidance import begin
from priors.sampling.noise import chosen_gumbel, chosen_noise, gumbel, uniform_noise

KNOWN = pytest.mark.parametrize("given", [None, GIVEN], ids=["alone", "given"])
LABELS = torch.tensor([0, 1, 2, 3, 0])  # 3 is the unconditional one
NOBODY = torch.full((5,), NUM_CLASSES)


def masked_codes(layout) -> torch.Tensor:
    """Five rows: the first all masked, the third all known, the others about half."""
    hidden = torch.rand(5, layout.length, generator=torch.Generator().manual_seed(4)) < 0.5
    hidden[0], hidden[2] = True, False
    return random_codes(layout, 5).masked_fill(hidden, -1)


@LAYOUTS
@KNOWN
@OPTIONS
@pytest.mark.parametrize("copies", [1, 2], ids=["plain", "guided"])
def test_logits_are_those_of_the_backbone(copies, positions, conditioning, given, layout):
    backbone = make(
        layout, causal=False, given=given, positions=positions, conditioning=conditioning
    )
    codes, labels = masked_codes(layout), torch.cat([LABELS, NOBODY][:copies])
    known = None if given is None else random_codes(given, 5).repeat(copies, 1)
    read, asked = BackboneReading(backbone, labels, known, copies), codes < 0
    with torch.no_grad():
        full = backbone(codes.repeat(copies, 1), labels, given=known)
    found, whole = read(codes, asked), read(codes)
    for (span, size), expected, all_of_it, some in zip(layout.spans(), full, whole, found):
        torch.testing.assert_close(all_of_it, expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(
            some, expected[asked[:, span].repeat(copies, 1)], atol=1e-4, rtol=0
        )
        assert some.dtype == torch.float32 and some.shape[1] == size and float(expected.std()) > 0.1
    once_more = read((codes + 1).clamp_max(4))  # codes change, the rest stays
    with torch.no_grad():
        expected = backbone((codes + 1).clamp_max(4).repeat(copies, 1), labels, given=known)
    torch.testing.assert_close(once_more, expected, atol=1e-4, rtol=0)


class Plain(nn.Module):
    """A backbone behind a face that no engine knows."""

    def __init__(self, backbone) -> None:
        super().__init__()
        self.backbone, self.layout, self.timed = backbone, backbone.layout, backbone.timed

    def forward(self, codes, labels, *, given=None, **time):
        return self.backbone(codes, labels, given=given, **time)


PRIORS = {
    "confidence": lambda network: MaskedPrior(network, NUM_CLASSES),
    "halton": lambda network: MaskedPrior(network, NUM_CLASSES, sampler="halton"),
    "absorbing": lambda network: AbsorbingPrior(network, NUM_CLASSES, steps=8, eta=0.3),
    "uniform": lambda network: UniformPrior(network, NUM_CLASSES, steps=8),
    "gidd": lambda network: UniformPrior(network, NUM_CLASSES, steps=8, mask_share=0.8),
    "mixture": lambda network: UniformPrior(
        network, NUM_CLASSES, steps=8, mask_share=0.9, noise="mixture", parameterisation="posterior"
    ),
}
TIMED = pytest.mark.parametrize("conditioning", ["prefix", "adaln"])


@LAYOUTS
@pytest.mark.parametrize("kind", PRIORS)
def test_samples_and_bounds_are_those_of_the_backbone(kind, layout):
    timed = kind in ("gidd", "uniform")
    backbone = make(
        layout, causal=False, given=GIVEN, conditioning="adaln", dropout=0.5, timed=timed
    ).train()
    ours, plain = PRIORS[kind](backbone), PRIORS[kind](Plain(backbone)).train()
    given, ids = random_codes(GIVEN, 5), torch.arange(5)
    for sampler in SAMPLERS if kind == "absorbing" else [""]:
        for known in (None, masked_codes(layout)):
            options = SampleOptions(guidance=2.0, seed=3, top_p=0.9, sampler=sampler)
            drawn = ours.sample(LABELS, options, ids, known, given)
            assert torch.equal(drawn, plain.sample(LABELS, options, ids, known, given))
            layout.check(drawn)
    codes = random_codes(layout, 5)
    bounds = [prior.nll(codes, LABELS, given).nats for prior in (ours, plain)]
    torch.testing.assert_close(*bounds, atol=1e-3, rtol=1e-5)
    assert ours.training and plain.training


@TIMED
@pytest.mark.parametrize("copies", [1, 2], ids=["plain", "guided"])
def test_logits_at_a_time_are_those_of_the_backbone(copies, conditioning):
    backbone = make(TWO_LEVELS, causal=False, conditioning=conditioning, timed=True)
    codes, labels = masked_codes(TWO_LEVELS), torch.cat([LABELS, NOBODY][:copies])
    read, asked = BackboneReading(backbone, labels, None, copies), codes < 0
    for times in ([0.5] * 5, [0.0, 1.0, 0.2, 0.9, 1e-3]):  # row 2 is all known, and is not asked
        time = torch.tensor(times, dtype=torch.float64)
        with torch.no_grad():
            full = backbone(codes.repeat(copies, 1), labels, time=time.repeat(copies))
        for (span, _), expected, some in zip(TWO_LEVELS.spans(), full, read(codes, asked, time)):
            torch.testing.assert_close(
                some, expected[asked[:, span].repeat(copies, 1)], atol=1e-4, rtol=0
            )
    assert not torch.allclose(
        read(codes, None, time)[0], read(codes, None, time.roll(1))[0], atol=1e-3
    )


def test_rows_of_which_nothing_is_asked_take_no_time(monkeypatch):
    backbone, rows = make(ONE_LEVEL, causal=False, conditioning="adaln"), []
    project = priors.decoding.parallel.project

    def counting(block, features, turn, batch, count):
        rows.append(batch)
        return project(block, features, turn, batch, count)

    monkeypatch.setattr(priors.decoding.parallel, "project", counting)
    codes = masked_codes(ONE_LEVEL)
    read = BackboneReading(backbone, torch.cat([LABELS, NOBODY]), copies=2)
    read(codes, codes < 0)  # one row of five is all known
    assert rows == [8] * 2
    (logits,) = read(codes, torch.zeros_like(codes, dtype=torch.bool))
    assert logits.shape == (0, 7) and rows == [8] * 2


def test_no_rows_give_no_rows():
    for conditioning in ("prefix", "adaln"):
        read = BackboneReading(
            make(TWO_LEVELS, causal=False, conditioning=conditioning), LABELS[:0]
        )
        codes = random_codes(TWO_LEVELS, 0)
        assert [level.shape for level in read(codes)] == [(0, 2, 5), (0, 8, 9)]
        assert [level.shape for level in read(codes, codes < 0)] == [(0, 5), (0, 9)]


def test_weights_are_read_at_construction_and_are_left_as_they_were():
    backbone, codes = make(TWO_LEVELS, causal=False, dropout=0.5).train(), masked_codes(TWO_LEVELS)
    state = {name: value.clone() for name, value in backbone.state_dict().items()}
    read = reading(backbone, LABELS)
    first = read(codes)
    assert all(torch.equal(a, b) for a, b in zip(first, read(codes)))  # no dropout
    assert backbone.training and not any(level.requires_grad for level in first)
    assert all(torch.equal(value, state[name]) for name, value in backbone.state_dict().items())
    with torch.no_grad():
        backbone.blocks[0].attention.to_v.weight.mul_(2)
    assert all(torch.equal(a, b) for a, b in zip(first, read(codes)))
    assert not torch.allclose(first[0], reading(backbone, LABELS)(codes)[0])


def test_a_causal_backbone_is_refused():
    with pytest.raises(AssertionError, match="decoding"):
        reading(make(ONE_LEVEL, causal=True), LABELS)


@OPTIONS
def test_autocast_sets_the_precision(positions, conditioning):
    backbone = make(
        TWO_LEVELS, causal=False, given=GIVEN, positions=positions, conditioning=conditioning
    )
    codes, known = masked_codes(TWO_LEVELS), random_codes(GIVEN, 5)
    exact = reading(backbone, LABELS, known)(codes)
    with torch.autocast("cpu", torch.bfloat16):
        low = reading(backbone, LABELS, known)(codes)
    for a, b in zip(exact, low):
        assert b.dtype == torch.float32 and 0 < float((a - b).abs().max()) < 0.15


@pytest.mark.parametrize("size", [1, 6, 8, 1023, 1024, 1025])
def test_noise_of_chosen_positions_is_that_of_the_table(size, monkeypatch):
    ids, chosen = (
        torch.tensor([3, 0, 2**40, 7]),
        torch.rand(4, 9, generator=torch.Generator().manual_seed(5)) < 0.6,
    )
    chosen[1], chosen[2] = True, False
    table = uniform_noise(7, ids, 2, (9, size))[chosen]
    assert torch.equal(chosen_noise(7, ids, 2, chosen, size), table)
    monkeypatch.setattr(priors.sampling.noise, "JUMP", 1)
    assert torch.equal(chosen_noise(7, ids, 2, chosen, size), table)
    assert torch.equal(chosen_gumbel(7, ids, 2, chosen, size), gumbel(7, ids, 2, (9, size))[chosen])
    assert chosen_noise(7, ids, 2, torch.zeros_like(chosen), size).shape == (0, size)


def test_samplers_begin_alike():
    prior = MaskedPrior(make(ONE_LEVEL, causal=False, given=GIVEN), NUM_CLASSES)
    given = random_codes(GIVEN, 5)
    plain = begin(prior, LABELS, SampleOptions(), None, given)
    assert plain.copies == 1 and plain.labels is LABELS and torch.equal(plain.given, given)
    assert torch.equal(plain.known, torch.full((5, ONE_LEVEL.length), -1))
    guided = begin(prior, LABELS, SampleOptions(guidance=2.0), plain.known, None)
    assert guided.copies == 2 and guided.given is None and guided.known is plain.known
    assert torch.equal(guided.labels, torch.cat([LABELS, NOBODY]))


@pytest.mark.gpu
@OPTIONS
def test_on_a_gpu_logits_are_those_of_the_backbone(positions, conditioning):
    backbone = make(TWO_LEVELS, causal=False, positions=positions, conditioning=conditioning).to(
        "cuda"
    )
    codes = masked_codes(TWO_LEVELS).to("cuda")
    with torch.no_grad():
        expected = backbone(codes, LABELS.to("cuda"))
    torch.testing.assert_close(
        reading(backbone, LABELS.to("cuda"))(codes), expected, atol=1e-4, rtol=0
    )
