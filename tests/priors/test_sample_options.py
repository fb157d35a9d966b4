"""Sampling options: their ranges, written down here a second time, and temperature 0, which is
greedy."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from priors.backbone import BackboneConfig
from priors.families.absorbing import AbsorbingConfig
from priors.families.autoregressive import AutoregressiveConfig
from priors.families.hierarchical import HierarchicalConfig
from priors.families.masked import MaskedConfig
from priors.families.pixelcnn import PixelCNNConfig
from priors.families.published_masked import HaltonConfig, MaskBitConfig, TiTokConfig
from priors.families.uniform import UniformConfig
from priors.interface import SampleOptions
from priors.networks.bert import MaskBitNetworkConfig, TiTokNetworkConfig
from priors.networks.halton_maskgit import HaltonNetworkConfig
from tokenizer.interface import CodeLayout
from training.errors import UserError

LAYOUT, TWO = CodeLayout(((2, 3),), (7,)), CodeLayout(((1, 2), (2, 2)), (5, 7))
BITS = CodeLayout(((2, 3),), (16,))
LAYOUTS = {"hierarchical": TWO, "maskbit": BITS}
BACKBONE = BackboneConfig(dim=16, depth=1, heads=2, dropout=0.0)
FAMILIES = {
    "autoregressive": (AutoregressiveConfig(backbone=BACKBONE), ("raster",)),
    "random order": (AutoregressiveConfig(order="random", backbone=BACKBONE), ("random", "raster")),
    "pixelcnn": (PixelCNNConfig(channels=8, depth=1, kernel=3, dropout=0.0), ("raster",)),
    "masked": (MaskedConfig(backbone=BACKBONE), ("confidence", "halton", "annealed")),
    "halton_maskgit": (HaltonConfig(backbone=HaltonNetworkConfig(16, 1, 2, 16)), ("halton",)),
    "titok": (TiTokConfig(backbone=TiTokNetworkConfig(16, 1, 2, 16)), ("annealed",)),
    "maskbit": (MaskBitConfig(backbone=MaskBitNetworkConfig(16, 1, 2, 16)), ("confidence",)),
    "absorbing": (AbsorbingConfig(backbone=BACKBONE), ("ancestral", "first_hitting", "remasking")),
    "leave_one_out": (UniformConfig(backbone=BACKBONE), ("plug_in",)),
    "posterior": (UniformConfig(backbone=BACKBONE, parameterisation="posterior"), ("mixture",)),
    "hybrid": (UniformConfig(backbone=BACKBONE, mask_share=0.5), ("plug_in",)),
    "hierarchical": (
        HierarchicalConfig(
            top=AutoregressiveConfig(backbone=BACKBONE), bottom=MaskedConfig(backbone=BACKBONE)
        ),
        ("raster/confidence", "raster/halton"),
    ),
}
SAMPLERS = [(family, sampler) for family, (_, samplers) in FAMILIES.items() for sampler in samplers]
# Samplers that draw nothing but codes: at temperature 0 neither seed nor id has a part in them.
SEEDLESS = {"raster", "confidence", "annealed", "raster/confidence"}

NAN, INF = float("nan"), float("inf")
ALLOWED = {
    "guidance": (0, 0.0, 0.5, 1, 1000.0),
    "guidance_schedule": ("constant", "linear", "power_cosine"),
    "guidance_power": (5e-324, 1, 1e308),
    "temperature": (0, 0.0, 5e-324, 1, 1e308),
    "top_k": (0, 1, 10**30),
    "top_p": (5e-324, 0.5, 1, 1.0),
    "steps": (0, 1, 100_000),
    "sampler": ("", "anything"),
    "seed": (0, 2**63 - 1),
}
REFUSED = {
    "guidance": (-5e-324, 1000.1, INF, NAN, "2", True, None),
    "guidance_schedule": ("", "Linear", 1),
    "guidance_power": (0, -1, INF, NAN, "1"),
    "temperature": (-5e-324, INF, NAN, "1", False),
    "top_k": (-1, 1.0, True, "5"),
    "top_p": (0, 0.0, -1, 1.0000001, NAN, "0.5"),
    "steps": (-1, 100_001, 2.0, True),
    "sampler": (None, 1),
    "seed": (-1, 2**63, 0.0, True),
}


def build(family):
    """A small prior that says something."""
    torch.manual_seed(0)
    prior = FAMILIES[family][0].build(LAYOUTS.get(family, LAYOUT), 3)
    for parameter in prior.parameters():
        if not parameter.any() or 0 < parameter.std() < 0.05:  # BERT's are small
            torch.nn.init.normal_(parameter, std=0.4)
    return prior.eval()


def draw(prior, ids=(0, 1, 2, 3, 4, 5), **options):
    ids = torch.tensor(ids)
    return prior.sample(ids % 2, SampleOptions(**options), ids)


def test_every_option_has_a_range():
    names = [field.name for field in dataclasses.fields(SampleOptions)]
    assert list(ALLOWED) == list(REFUSED) == names


@pytest.mark.parametrize("name", ALLOWED)
def test_ranges_end_where_they_say(name):
    for value in ALLOWED[name]:
        assert getattr(SampleOptions(**{name: value}), name) == value
    for value in REFUSED[name]:
        with pytest.raises(
            UserError, match=rf"^{name.replace('_', '-')} is .*: it must be"
        ) as refused:
            SampleOptions(**{name: value})
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("family", "sampler"), SAMPLERS)
def test_the_ends_of_the_ranges_give_codes(family, sampler):
    """No overflow and no NaN chooses a code that does not exist."""
    prior = build(family)
    ends = [
        {name: value}
        for name in ("guidance", "guidance_power", "temperature", "top_k", "top_p")
        for value in ALLOWED[name]
    ]
    ends += [
        {"guidance": 1000.0, "temperature": 5e-324},
        {"guidance": 1000.0, "guidance_power": 1e308},
        {"seed": 2**63 - 1},
    ]
    for end in ends:
        prior.layout.check(draw(prior, sampler=sampler, **{"guidance": 2.0, "steps": 3, **end}))


@pytest.mark.parametrize(("family", "sampler"), SAMPLERS)
def test_greedy_is_the_limit_of_low_temperatures(family, sampler):
    """But for the order of confidences, all of which are 1 in the limit."""
    prior = build(family)
    for guidance in (1.0, 3.0):
        greedy = draw(prior, sampler=sampler, temperature=0.0, guidance=guidance, steps=3)
        again = draw(
            prior,
            (3, 0),
            sampler=sampler,
            temperature=0.0,
            guidance=guidance,
            steps=3,
            top_k=2,
            top_p=0.3,
        )
        assert torch.equal(greedy[:1], again[1:])  # filters keep the likeliest code
        if "confidence" in sampler:
            continue
        cold = draw(prior, sampler=sampler, temperature=1e-12, guidance=guidance, steps=3)
        assert torch.equal(greedy, cold)
    assert not torch.equal(greedy, draw(prior, sampler=sampler, guidance=guidance, steps=3))


@pytest.mark.parametrize(("family", "sampler"), SAMPLERS)
def test_the_seed_has_a_part_only_in_what_is_no_code(family, sampler):
    made = draw(build(family), sampler=sampler, temperature=0.0, steps=3)
    other = draw(build(family), sampler=sampler, temperature=0.0, steps=3, seed=8)
    if sampler in SEEDLESS:
        assert torch.equal(made, other)
        # One for each class, which may have the same likeliest codes.
        assert sampler == "annealed" or len(made.unique(dim=0)) == 2


def test_greedy_takes_the_likeliest_code_of_the_guided_logits():
    prior, labels = build("autoregressive"), torch.tensor([0, 1])
    codes = torch.zeros(2, LAYOUT.length, dtype=torch.int64)
    for slot in range(LAYOUT.length):
        with torch.no_grad():
            conditional, unconditional = (
                prior.backbone(codes, each)[0][:, slot].double()
                for each in (labels, torch.full_like(labels, 3))
            )
        codes[:, slot] = (unconditional + 3.0 * (conditional - unconditional)).argmax(1)
    drawn = prior.sample(labels, SampleOptions(guidance=3.0, temperature=0.0), torch.arange(2))
    assert torch.equal(drawn, codes)


def test_greedy_keeps_the_most_confident_codes_first():
    """By hand: MaskGIT's steps of the cosine schedule, without noise."""
    prior, label, steps = build("masked"), torch.tensor([1]), 4
    codes, length = torch.full((1, LAYOUT.length), -1), LAYOUT.length
    for step in range(1, steps + 1):
        with torch.no_grad():
            chances = prior.backbone(codes, label)[0][0].double().softmax(-1)
        best, unknown = chances.max(-1), codes[0] < 0
        codes[0, unknown] = best.indices[unknown]
        keep_out = int(
            length * torch.tensor(torch.pi / 2 * step / steps, dtype=torch.float64).cos()
        )
        keep_out = max(1, min(keep_out, int(unknown.sum()) - 1))
        if step < steps:
            codes[0, best.values.masked_fill(~unknown, torch.inf).argsort()[:keep_out]] = -1
    drawn = prior.sample(label, SampleOptions(temperature=0.0, steps=steps), torch.tensor([9]))
    assert torch.equal(drawn, codes)
