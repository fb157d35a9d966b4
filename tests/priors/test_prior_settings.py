"""What priors and samplers are where nothing is set, which values they take, and what they
count."""

from __future__ import annotations

import dataclasses
import inspect
import math
import types
from fractions import Fraction

import pytest
import torch

from priors import PRIORS
from priors.backbone import BackboneConfig
from priors.families import any_order_bound as bounds
from priors.interface import MOST_GUIDANCE, MOST_STEPS, SampleOptions
from priors.sampling.guidance import shape_branches, shape_logits
from priors.sampling.halton import halton_turns
from priors.sampling.noise import JUMP, chosen_gumbel, chosen_noise, uniform_noise
from priors.sampling.schedules import SCHEDULES, mean_share
from tokenizer.interface import CodeLayout
from training.errors import UserError

BACKBONE = {
    "dim": 128,
    "depth": 4,
    "heads": 4,
    "dropout": 0.1,
    "positions": "rotary",
    "conditioning": "prefix",
    "gradient_checkpointing": False,
}
AUTOREGRESSIVE = {
    "order": "raster",
    "anneal_start_step": 0,
    "anneal_end_step": 0,
    "label_dropout": 0.1,
    "label_smoothing": 0.0,
    "backbone": BACKBONE,
}
MASKED = {
    "label_dropout": 0.1,
    "label_smoothing": 0.1,
    "schedule": "cosine",
    "sampler": "confidence",
    "sampling_schedule": "",
    "steps": 8,
    "choice_temperature": 4.5,
    "backbone": BACKBONE,
}
GPT = {
    "dim": 128,
    "depth": 4,
    "heads": 4,
    "feedforward": 0,
    "dropout": 0.1,
    "label_dropout": 0.1,
    "label_smoothing": 0.0,
    "gradient_checkpointing": False,
}
BERT = {
    "dim": 128,
    "depth": 4,
    "heads": 4,
    "feedforward": 0,
    "dropout": 0.1,
    "gradient_checkpointing": False,
}
DEFAULTS = {
    "llama": {
        **GPT,
        "kv_heads": 0,
        "conditioning": "prefix",
        "rotary_base": 10_000.0,
        "norm_eps": 1e-5,
    },
    "mingpt": {**GPT, "positions": 0},
    "rar": {
        **GPT,
        "positions": 0,
        "steps": 0,
        "order": "raster",
        "anneal_start_step": 0,
        "anneal_end_step": 0,
    },
    "autoregressive": AUTOREGRESSIVE,
    "masked": MASKED,
    "hierarchical": {
        "top": {"kind": "autoregressive", **AUTOREGRESSIVE},
        "bottom": {"kind": "masked", **MASKED},
    },
    "absorbing": {
        "label_dropout": 0.1,
        "schedule": "cosine",
        "steps": 32,
        "eta": 0.02,
        "backbone": BACKBONE,
    },
    "uniform": {
        "label_dropout": 0.1,
        "time_conditioning": True,
        "mask_share": 0.0,
        "noise": "gidd",
        "parameterisation": "leave_one_out",
        "cross_entropy": 0.0,
        "schedule": "linear",
        "steps": 64,
        "backbone": BACKBONE,
    },
    "pixelcnn": {
        "channels": 64,
        "depth": 6,
        "kernel": 5,
        "dropout": 0.1,
        "label_dropout": 0.1,
        "label_smoothing": 0.0,
    },
    "halton_maskgit": {
        **MASKED,
        "schedule": "arc_cosine",
        "sampler": "halton",
        "steps": 32,
        "backbone": {**BERT, "registers": 1},
    },
    "titok": {
        **MASKED,
        "schedule": "arc_cosine",
        "sampler": "annealed",
        "choice_temperature": 9.5,
        "backbone": {**BERT, "long_skips": False},
    },
    "maskbit": {
        **MASKED,
        "schedule": "arc_cosine",
        "sampling_schedule": "arc_cosine",
        "steps": 64,
        "choice_temperature": 7.8,
        "backbone": {**BERT, "splits": 2, "prenorm": False},
    },
}
OWN_NETWORKS = {  # of kinds whose network is not the backbone
    "halton_maskgit": {"dim": 8, "depth": 1, "heads": 1, "feedforward": 8},
    "titok": {"dim": 8, "depth": 1, "heads": 1, "feedforward": 8},
    "maskbit": {"dim": 8, "depth": 1, "heads": 1, "feedforward": 8},
}


@pytest.mark.parametrize("kind", PRIORS)
def test_defaults_of_priors(kind):
    assert dataclasses.asdict(PRIORS[kind]()) == {"kind": kind, **DEFAULTS[kind]}


@pytest.mark.parametrize("kind", [kind for kind in PRIORS if kind != "hierarchical"])
def test_shares_of_labels_are_below_one(kind):
    names = {"label_dropout", "label_smoothing", "dropout"} & {
        each.name for each in dataclasses.fields(PRIORS[kind])
    }
    for name in names:
        for share in (0.0, 0.999):
            assert getattr(PRIORS[kind](**{name: share}), name) == share
        for share in (-0.001, 1.0, math.nan):
            with pytest.raises(ValueError, match=rf"prior\.{name}={share} must be in \[0, 1\)"):
                PRIORS[kind](**{name: share})


@pytest.mark.parametrize(
    ("kind", "name", "taken", "refused"),
    [
        ("masked", "choice_temperature", (0.0, 1e9), (-0.1, math.inf, math.nan)),
        ("masked", "steps", (1,), (0, -1)),
        ("absorbing", "steps", (1,), (0,)),
        ("absorbing", "eta", (0.0, 1.0), (-0.1, 1.1, math.nan)),
        ("uniform", "steps", (1,), (0,)),
        ("pixelcnn", "kernel", (3, 7), (1, 2, 4)),
        ("pixelcnn", "channels", (1,), (0,)),
        ("pixelcnn", "depth", (1,), (0,)),
    ],
)
def test_settings_are_taken_to_their_ends(kind, name, taken, refused):
    for value in taken:
        assert getattr(PRIORS[kind](**{name: value}), name) == value
    for value in refused:
        with pytest.raises(ValueError, match=f"{name}={value}"):
            PRIORS[kind](**{name: value})


def small(kind, **settings):
    backbone = BackboneConfig(dim=8, depth=1, heads=1)
    config = PRIORS[kind](**settings)
    if kind == "hierarchical":
        parts = {
            name: dataclasses.replace(getattr(config, name), backbone=backbone)
            for name in ("top", "bottom")
        }
        config, layout = dataclasses.replace(config, **parts), CodeLayout(((1, 2), (2, 2)), (3, 3))
    else:
        own = {"channels": 2, "depth": 1} if kind == "pixelcnn" else {"backbone": backbone}
        if kind in ("llama", "mingpt", "rar"):
            own = {"dim": 8, "depth": 1, "heads": 1}
        elif kind in OWN_NETWORKS:
            own = {"backbone": dataclasses.replace(config.backbone, **OWN_NETWORKS[kind])}
        config, layout = dataclasses.replace(config, **own), CodeLayout(((2, 3),), (4,))
    return config.build(layout, 2)


@pytest.mark.parametrize("kind", PRIORS)
def test_a_loss_draws_for_itself_where_it_is_given_nothing(kind):
    prior = small(kind)
    loss = prior.loss(
        torch.zeros(2, prior.layout.length, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    )
    assert loss.total.isfinite()


@pytest.mark.parametrize("kind", ["autoregressive", "masked", "absorbing", "uniform"])
def test_a_prior_made_around_a_network_has_the_configurations_settings(kind):
    """But for what is of training alone, which it leaves out."""
    config = PRIORS[kind](backbone=BackboneConfig(dim=8, depth=1, heads=1))
    prior = config.build(CodeLayout(((2,),), (3,)), 1)
    given = {
        each.name: each.default
        for each in inspect.signature(type(prior).__init__).parameters.values()
    }
    given = {name: value for name, value in given.items() if value is not inspect.Parameter.empty}
    assert [
        given.pop(name) for name in ("label_dropout", "label_smoothing") if name in given
    ].count(0.0) >= 1
    assert given.pop("anneal_steps", (0, 0)) == (0, 0)
    assert given == {name: getattr(config, name) for name in given}


def test_samples_are_plain_where_nothing_is_asked_for():
    assert dataclasses.asdict(SampleOptions()) == {
        "guidance": 1.0,
        "guidance_schedule": "constant",
        "guidance_power": 2.75,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "steps": 0,
        "sampler": "",
        "seed": 0,
    }


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
        return [
            SampleOptions(guidance=3.0, **settings).guidance_at(progress)
            for progress in (0.25, 0.5, 1.0)
        ]

    assert scales() == [3, 3, 3] and scales(guidance_schedule="linear") == [1.5, 2, 3]
    cosine = [math.cos(math.pi / 16), math.cos(math.pi / 4), -1]  # of pi r^2
    found = scales(guidance_schedule="power_cosine", guidance_power=2.0)
    assert found == pytest.approx([1 + 2 * (1 - each) / 2 for each in cosine])


def test_both_branches_of_guidance_lose_what_the_guided_codes_lose():
    logits = torch.tensor([[3.0, 1.0, 2.0], [0.0, 2.0, 1.0]])  # with a label, and without
    colder = (logits.double() - logits.amax(1, keepdim=True)) / 0.5
    plain = shape_branches(logits, SampleOptions(guidance=2.0, temperature=0.5), 2.0)
    assert torch.equal(plain, colder)
    for options in (
        SampleOptions(guidance=2.0, temperature=0.5, top_k=2),
        SampleOptions(guidance=2.0, top_p=0.97),
    ):
        found = shape_branches(logits, options, 2.0)  # guided they are 6, 0, 3
        assert found.isfinite().tolist() == [[True, False, True]] * 2
    assert torch.equal(found[:, [0, 2]], logits.double()[:, [0, 2]])
    alone = SampleOptions(top_k=1)
    assert torch.equal(shape_branches(logits, alone, 1.0), shape_logits(logits, alone, 1.0))
    assert shape_branches(logits, alone, 1.0).isfinite().tolist() == [
        [True, False, False],
        [False, True, False],
    ]


def test_each_row_is_tempered_about_its_own_highest():
    logits = torch.tensor([[1.0, 3.0, 2.0], [7.0, 5.0, 9.0], [-1.0, -4.0, -2.0]])
    found = shape_logits(logits, SampleOptions(temperature=0.5), 1.0)
    torch.testing.assert_close(found.softmax(1), (2 * logits.double()).softmax(1))
    assert found.amax(1).tolist() == [0, 0, 0]


@pytest.mark.parametrize("size", [5, JUMP - 1, JUMP, JUMP + 44])
def test_noise_of_chosen_places_is_that_of_all_places(size):
    ids, chosen = torch.tensor([3, 9]), torch.tensor([[True, False, True], [False, True, True]])
    whole = uniform_noise(4, ids, 7, (3, size))
    assert torch.equal(chosen_noise(4, ids, 7, chosen, size), whole[chosen])
    torch.testing.assert_close(
        chosen_gumbel(4, ids, 7, chosen, size), -(-whole[chosen].log()).log()
    )


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("cosine", 2 / math.pi),
        ("linear", 1 / 2),
        ("square", 2 / 3),
        ("cubic", 3 / 4),
        ("square_root", 1 / 3),
        ("arc_cosine", 2 / math.pi),
    ],
)
def test_mean_shares_are_integrals(schedule, expected):
    assert set(SCHEDULES) == {"cosine", "linear", "square", "cubic", "square_root", "arc_cosine"}
    assert mean_share(SCHEDULES[schedule]) == pytest.approx(expected, abs=1e-6)


def reversed_digits(number, base):
    """0.d1 d2 d3 ... for the digits ... d3 d2 d1."""
    found, unit = Fraction(0), Fraction(1, base)
    while number:
        number, digit = divmod(number, base)
        found, unit = found + digit * unit, unit / base
    return found


@pytest.mark.parametrize("grid", [(4, 4), (10, 4), (15, 12), (31, 8), (1, 5)])
def test_halton_turns_are_those_of_first_visits(grid):
    """However many points it takes: of these grids some have a cell that is visited late."""
    rows, columns = grid
    order, number = {}, 0
    while len(order) < rows * columns:
        number += 1
        cell = int(rows * reversed_digits(number, 2)), int(columns * reversed_digits(number, 3))
        order.setdefault(cell, len(order))
    turns = halton_turns(CodeLayout((grid,), (2,))).view(grid)
    assert turns.tolist() == [
        [order[row, column] for column in range(columns)] for row in range(rows)
    ]


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
    torch.testing.assert_close(
        found.nats, torch.full((6,), length * math.log(5), dtype=torch.float64)
    )
    strata = (torch.stack(counts, 1) - 1) // (length // 8)
    assert torch.equal(strata, torch.arange(8).expand(6, 8))  # from 1 to all of them


def test_how_many_codes_a_bound_masks_says_nothing_about_which(monkeypatch):
    """Of 16 codes the first two counts are 1 and 2: each code is masked by 1/16, and by 2/16."""
    masks = []
    monkeypatch.setattr(bounds, "reading", lambda *_: None)
    monkeypatch.setattr(
        bounds, "masked_nats", lambda *given: masks.append(given[-1]) or torch.zeros(4000)
    )
    network = types.SimpleNamespace(layout=CodeLayout(((16,),), (5,)))
    codes = torch.randint(5, (4000, 16), generator=torch.Generator().manual_seed(0))
    bounds.order_agnostic_bound(network, codes, torch.zeros(4000, dtype=torch.int64))
    masked, counts = masks[0], masks[0].sum(1)
    for count in (1, 2):
        share = masked[counts == count].double().mean(0)
        assert (share - count / 16).abs().max() < 4.5 * (count / 16 / 2000) ** 0.5
        assert float((counts == count).double().mean()) == pytest.approx(0.5, abs=0.04)


@pytest.mark.parametrize("kind", PRIORS)
def test_files_of_weights_hold_what_was_learned_and_what_it_means(kind):
    """And the step that an annealed order has come to: all else follows from the configuration."""
    extra = {"uniform": {"meaning"}, "autoregressive": {"next_step"}}.get(kind, set())
    prior = small(
        kind, **({"order": "annealed", "anneal_end_step": 9} if "next_step" in extra else {})
    )
    learned = {name for name, _ in prior.named_parameters()}
    assert set(prior.state_dict()) == learned | extra


def test_the_lowest_are_as_many_as_asked_for():
    values = torch.tensor([[0.3, 0.1, 0.2, 0.1], [4.0, 3.0, 2.0, 1.0]])
    found = bounds.lowest(values, torch.tensor([2, 3]))
    assert found.tolist() == [[False, True, False, True], [False, True, True, True]]
    assert bounds.lowest(values, torch.tensor([1, 4])).tolist() == [
        [False, True, False, False],
        [True] * 4,
    ]
