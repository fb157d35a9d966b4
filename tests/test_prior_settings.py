"""What priors and samplers are where nothing is set, which values they take, and what they count."""

from __future__ import annotations

import dataclasses
import inspect
import math
import types

import pytest
import torch

from priors import PRIORS, bounds
from priors.backbone import BackboneConfig
from priors.interface import MOST_GUIDANCE, MOST_STEPS, SampleOptions
from priors.schedules import SCHEDULES, mean_share
from tokenizer.interface import CodeLayout
from training.command import UserError

BACKBONE = {
    "dim": 128, "depth": 4, "heads": 4, "dropout": 0.1, "positions": "rotary", "conditioning": "prefix",
    "gradient_checkpointing": False,
}  # fmt: skip
AUTOREGRESSIVE = {
    "order": "raster", "anneal_start_step": 0, "anneal_end_step": 0, "label_dropout": 0.1, "label_smoothing": 0.0,
    "backbone": BACKBONE,
}  # fmt: skip
MASKED = {
    "label_dropout": 0.1, "label_smoothing": 0.1, "schedule": "cosine", "sampler": "confidence",
    "sampling_schedule": "", "steps": 8, "choice_temperature": 4.5, "backbone": BACKBONE,
}  # fmt: skip
DEFAULTS = {
    "autoregressive": AUTOREGRESSIVE,
    "masked": MASKED,
    "hierarchical": {
        "top": {"kind": "autoregressive", **AUTOREGRESSIVE},
        "bottom": {"kind": "masked", **MASKED},
    },
    "absorbing": {"label_dropout": 0.1, "schedule": "cosine", "steps": 32, "eta": 0.02, "backbone": BACKBONE},
    "uniform": {
        "label_dropout": 0.1, "time_conditioning": True, "mask_share": 0.0, "noise": "gidd",
        "parameterisation": "leave_one_out", "cross_entropy": 0.0, "schedule": "linear", "steps": 64,
        "backbone": BACKBONE,
    },
    "pixelcnn": {
        "channels": 64, "depth": 6, "kernel": 5, "dropout": 0.1, "label_dropout": 0.1, "label_smoothing": 0.0,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", PRIORS)
def test_defaults_of_priors(kind):
    assert dataclasses.asdict(PRIORS[kind]()) == {"kind": kind, **DEFAULTS[kind]}


@pytest.mark.parametrize("kind", ["autoregressive", "masked", "absorbing", "uniform"])
def test_a_prior_made_around_a_network_has_the_configurations_settings(kind):
    """But for what is of training alone, which it leaves out."""
    config = PRIORS[kind](backbone=BackboneConfig(dim=8, depth=1, heads=1))
    prior = config.build(CodeLayout(((2,),), (3,)), 1)
    given = {each.name: each.default for each in inspect.signature(type(prior).__init__).parameters.values()}
    given = {name: value for name, value in given.items() if value is not inspect.Parameter.empty}
    assert [given.pop(name) for name in ("label_dropout", "label_smoothing") if name in given].count(0.0) >= 1
    assert given.pop("anneal_steps", (0, 0)) == (0, 0)
    assert given == {name: getattr(config, name) for name in given}


def test_samples_are_plain_where_nothing_is_asked_for():
    assert dataclasses.asdict(SampleOptions()) == {
        "guidance": 1.0, "guidance_schedule": "constant", "guidance_power": 2.75, "temperature": 1.0, "top_k": 0,
        "top_p": 1.0, "steps": 0, "sampler": "", "seed": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "taken", "refused"),
    [
        ("guidance", (0.0, MOST_GUIDANCE), (-0.01, MOST_GUIDANCE + 0.01, math.nan)),
        ("guidance_schedule", ("constant", "linear", "power_cosine"), ("cosine",)),
        ("guidance_power", (1e-9, 9.0), (0.0, math.inf, math.nan)),
        ("temperature", (0.0, 1e9), (-1e-9, math.inf, math.nan)),
        ("top_k", (0, 1), (-1,)),
        ("top_p", (1e-9, 1.0), (0.0, 1.0001)),
        ("steps", (0, MOST_STEPS), (-1, MOST_STEPS + 1)),
        ("seed", (0, 2**63 - 1), (-1, 2**63)),
    ],
)
def test_sample_options_are_taken_to_their_ends(name, taken, refused):
    for value in taken:
        assert getattr(SampleOptions(**{name: value}), name) == value
    for value in refused:
        with pytest.raises(UserError, match=f"{name.replace('_', '-')} is .*: it must be"):
            SampleOptions(**{name: value})


def test_guidance_grows_from_one_to_its_scale():
    def scales(**settings):
        return [SampleOptions(guidance=3.0, **settings).guidance_at(progress) for progress in (0.25, 0.5, 1.0)]

    assert scales() == [3, 3, 3] and scales(guidance_schedule="linear") == [1.5, 2, 3]
    cosine = [math.cos(math.pi / 16), math.cos(math.pi / 4), -1]  # of pi r^2
    found = scales(guidance_schedule="power_cosine", guidance_power=2.0)
    assert found == pytest.approx([1 + 2 * (1 - each) / 2 for each in cosine])


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("cosine", 2 / math.pi), ("linear", 1 / 2), ("square", 2 / 3), ("cubic", 3 / 4), ("square_root", 1 / 3),
        ("arc_cosine", 2 / math.pi),
    ],
)  # fmt: skip
def test_mean_shares_are_integrals(schedule, expected):
    assert set(SCHEDULES) == {"cosine", "linear", "square", "cubic", "square_root", "arc_cosine"}
    assert mean_share(SCHEDULES[schedule]) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("length", [8, 24])
def test_a_bound_masks_each_eighth_of_the_counts_once(length, monkeypatch):
    """Eight masks a sequence: of eight codes one of each count, of 24 one of each three."""
    codes = torch.arange(6 * length).view(6, length) % 5
    network, counts = types.SimpleNamespace(layout=CodeLayout(((length,),), (5,))), []

    def read(codes, masked, time=None):
        counts.append((codes < 0).sum(1))
        assert torch.equal(codes < 0, masked)
        return [torch.zeros(int(masked.sum()), 5)]

    monkeypatch.setattr(bounds, "reading", lambda *_: read)
    found = bounds.order_agnostic_bound(network, codes, torch.zeros(6, dtype=torch.int64))
    assert found.kind == "bound"
    torch.testing.assert_close(found.nats, torch.full((6,), length * math.log(5), dtype=torch.float64))
    strata = (torch.stack(counts, 1) - 1) // (length // 8)
    assert torch.equal(strata, torch.arange(8).expand(6, 8))  # from 1 to all of them


def test_the_lowest_are_as_many_as_asked_for():
    values = torch.tensor([[0.3, 0.1, 0.2, 0.1], [4.0, 3.0, 2.0, 1.0]])
    found = bounds.lowest(values, torch.tensor([2, 3]))
    assert found.tolist() == [[False, True, False, True], [False, True, True, True]]
    assert bounds.lowest(values, torch.tensor([1, 4])).tolist() == [[False, True, False, False], [True] * 4]
