"""Priors around the true conditionals of a toy joint: likelihoods meet closed forms, samplers draw
from it."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

import priors.families.absorbing
import priors.families.autoregressive
import priors.families.diffusion
import priors.families.masked
import priors.sampling.noise
from priors.families.absorbing import AbsorbingPrior
from priors.families.autoregressive import AutoregressivePrior
from priors.families.hierarchical import HierarchicalPrior
from priors.families.masked import MaskedPrior
from priors.interface import SampleOptions
from tokenizer.interface import CodeLayout
from training.errors import UserError

COUNT = 100_000
LAYOUTS = {
    "one_grid": CodeLayout(((1, 3),), (3,)),
    "square": CodeLayout(((2, 2),), (2,)),
    "residual": CodeLayout(((1, 2), (1, 2)), (2, 3)),
    "two_grids": CodeLayout(((1, 1), (1, 3)), (3, 2)),
}
OVER_LAYOUTS = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


class Toy(nn.Module):
    """A joint over all sequences for each (label, given code), and every conditional of it."""

    def __init__(self, layout: CodeLayout, num_classes: int = 2, num_given: int = 1):
        super().__init__()
        self.layout, self.num_classes, self.num_given = layout, num_classes, num_given
        self.sizes = [size for span, size in layout.spans() for _ in range(span.stop - span.start)]
        self.sequences = torch.tensor(list(itertools.product(*map(range, self.sizes))))  # (S, N)
        generator = torch.Generator().manual_seed(7)
        shape = ((num_classes + 1) * num_given, len(self.sequences))
        self.joints = torch.randn(shape, generator=generator, dtype=torch.float64).softmax(1)
        partial = torch.tensor(
            list(itertools.product(*(range(-1, size) for size in self.sizes)))
        )  # (P, N)
        agrees = ((partial[:, None] == self.sequences) | (partial[:, None] < 0)).all(-1).double()
        masses = [
            (agrees * joint)
            @ nn.functional.one_hot(self.sequences, max(self.sizes)).double().flatten(1)
            for joint in self.joints
        ]
        table = torch.stack(masses).unflatten(-1, (len(self.sizes), -1))
        self.table = (table / table.sum(-1, keepdim=True)).log()  # (conditions, P, N, K)
        self.partial_strides, self.strides = (
            strides([size + 1 for size in self.sizes]),
            strides(self.sizes),
        )

    def conditionals(self, codes, labels, given):
        """(B, N, K) log p(code i | the codes that are not negative)."""
        conditions = labels * self.num_given + (0 if given is None else given[:, 0])
        return self.table[conditions, ((codes + 1) * self.partial_strides).sum(1)]

    def levels(self, logits):
        return [logits[:, span, :size] for span, size in self.layout.spans()]


def strides(sizes):
    """What each place of a number with these many digits counts."""
    return torch.tensor([math.prod(sizes[i + 1 :]) for i in range(len(sizes))])


class AnyOrder(Toy):
    """What a masked prior learns."""

    def forward(self, codes, labels, *, given=None):
        return self.levels(self.conditionals(codes, labels, given))


class Causal(Toy):
    """What an autoregressive prior learns."""

    def forward(self, codes, labels, *, order=None, given=None):
        order = torch.arange(self.layout.length).expand_as(codes) if order is None else order
        logits, seen = (
            torch.zeros(*codes.shape, max(self.sizes), dtype=torch.float64),
            torch.full_like(codes, -1),
        )
        rows = torch.arange(len(codes))
        for here in order.T:
            logits[rows, here] = self.conditionals(seen, labels, given)[rows, here]
            seen[rows, here] = codes[rows, here]
        return self.levels(logits)

    def decoding(self, labels, *, order=None, given=None):
        return Decoding(self, labels, order, given)


class Decoding:
    def __init__(self, toy, labels, order, given):
        self.toy, self.labels, self.given, self.rows = toy, labels, given, torch.arange(len(labels))
        length = toy.layout.length
        self.order = torch.arange(length).expand(len(labels), -1) if order is None else order
        self.seen = torch.full((len(labels), length), -1)

    def step(self, slot, previous):
        if slot:
            self.seen[self.rows, self.order[:, slot - 1]] = previous
        logits = self.toy.conditionals(self.seen, self.labels, self.given)
        return logits[self.rows, self.order[:, slot], : self.toy.sizes[slot]]


@pytest.fixture(autouse=True)
def fast_noise(monkeypatch):
    """Independent rows as of `uniform_noise`, whose own laws are in test_priors.py, but drawn all
    at once."""

    def noise(seed, sample_ids, stream, shape):
        generator = torch.Generator().manual_seed((1000 * seed + stream) % 2**63)
        return torch.rand(
            (len(sample_ids), *shape), generator=generator, dtype=torch.float64
        ).clamp_min(1e-300)

    for module in (
        priors.sampling.noise,
        priors.families.autoregressive,
        priors.families.masked,
        priors.families.absorbing,
        priors.families.diffusion,
    ):
        monkeypatch.setattr(module, "uniform_noise", noise)


def draw(prior, options=None, known=None, given=None, label=0, count=COUNT):
    labels, ids = torch.full((count,), label), torch.arange(count)
    repeat = lambda row: None if row is None else torch.tensor(row).expand(count, -1)  # noqa: E731
    return prior.sample(labels, options or SampleOptions(), ids, repeat(known), given=repeat(given))


def p_value(toy, codes, expected):
    """Of a chi-square test that sequences follow `expected` (S,)."""
    from scipy.stats import chi2

    observed = torch.bincount((codes * toy.strides).sum(1), minlength=len(expected)).double()
    assert (observed[expected == 0] == 0).all()
    kept, mean = expected > 0, expected * len(codes)
    assert float(mean[kept].min()) >= 5, "too rare for the test"
    statistic = ((observed - mean).square() / mean)[kept].sum()
    return float(chi2.sf(float(statistic), int(kept.sum()) - 1))


def conditional(toy, known, joint):
    """(S,) the joint given codes that are not -1."""
    known = torch.tensor(known)
    kept = joint * ((toy.sequences == known) | (known < 0)).all(1)
    return kept / kept.sum()


def one_by_one(layout, **settings):
    """MaskGIT with a code a step in an order that ignores the codes: the noise on confidences is
    all."""
    return MaskedPrior(
        AnyOrder(layout), 2, steps=layout.length, choice_temperature=1e12, **settings
    )


SAMPLERS = {
    "raster": lambda layout: AutoregressivePrior(Causal(layout), 2),
    "random": lambda layout: AutoregressivePrior(Causal(layout), 2, order="random"),
    "annealed": lambda layout: AutoregressivePrior(
        Causal(layout), 2, order="annealed", anneal_steps=(0, 1)
    ),
    "halton": lambda layout: MaskedPrior(
        AnyOrder(layout), 2, sampler="halton", steps=layout.length
    ),
    "confidence": one_by_one,
}


@OVER_LAYOUTS
@pytest.mark.parametrize("order", ["raster", "random", "annealed"])
def test_exact_likelihood_is_the_joints(order, layout):
    toy = Causal(layout)
    prior = AutoregressivePrior(toy, 2, order=order, anneal_steps=(0, 1))
    for label in range(3):
        likelihood = prior.nll(toy.sequences, torch.full((len(toy.sequences),), label))
        assert likelihood.kind == "exact"
        torch.testing.assert_close(likelihood.nats, -toy.joints[label].log(), atol=1e-9, rtol=0)


@OVER_LAYOUTS
@pytest.mark.parametrize("order", ["raster", "random", "annealed"])
def test_the_loss_in_any_order_is_the_joints(order, layout):
    toy = Causal(layout)
    prior = AutoregressivePrior(toy, 2, order=order, anneal_steps=(0, 10))
    uniform = torch.rand(
        len(toy.sequences), layout.length + 2, generator=torch.Generator().manual_seed(3)
    )
    for row in range(len(uniform)):
        this = slice(row, row + 1)
        loss = prior.loss(toy.sequences[this], torch.ones(1, dtype=torch.int64), uniform[this])
        torch.testing.assert_close(
            loss.total * layout.length, -toy.joints[1, row].log(), atol=1e-9, rtol=0
        )


@OVER_LAYOUTS
@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_draw_from_the_joint(name, layout):
    prior = SAMPLERS[name](layout)
    assert p_value(prior.backbone, draw(prior, label=1), prior.backbone.joints[1]) > 1e-3


@pytest.mark.parametrize("name", SAMPLERS)
def test_given_codes_choose_the_joint(name):
    prior = SAMPLERS[name](LAYOUTS["one_grid"])
    prior.backbone = type(prior.backbone)(prior.layout, 2, num_given=3)
    drawn = draw(
        prior, SampleOptions(guidance=2.0), given=[2], label=2
    )  # guidance away from itself changes nothing
    assert p_value(prior.backbone, drawn, prior.backbone.joints[2 * 3 + 2]) > 1e-3
    assert p_value(prior.backbone, drawn, prior.backbone.joints[2 * 3]) < 1e-9


PAIR = CodeLayout(((1, 2),), (3,))
# s = 1.5 of each of three steps, by hand: linear 1 + k / 6, power_cosine 1 + (1 - cos(pi (k /
# 3)^2)) / 4
SCALES = {
    "constant": (1.5, 1.5, 1.5),
    "linear": (7 / 6, 8 / 6, 1.5),
    "power_cosine": (
        1 + 0.25 * (1 - math.cos(math.pi / 9)),
        1 + 0.25 * (1 - math.cos(math.pi * 4 / 9)),
        1.5,
    ),
}
SCALES_OF_TWO = {
    "constant": (1.5, 1.5),
    "linear": (1.25, 1.5),
    "power_cosine": (1.25 - 0.25 * math.sqrt(0.5), 1.5),
}
OVER_SCHEDULES = pytest.mark.parametrize("schedule", SCALES)
ONE_BY_ONE = {**SAMPLERS, "first_hitting": lambda layout: AbsorbingPrior(AnyOrder(layout), 2)}
FEWER = 30_000  # draws


def guided(schedule, **changes):
    return SampleOptions(guidance=1.5, guidance_schedule=schedule, guidance_power=2.0, **changes)


def guided_law(toy, scales, known=None, temperature=1.0, orders=None):
    """(S,) the law of codes drawn one by one, each from u + s (c - u) with the s of its step, over
    equal orders."""
    law = torch.zeros(len(toy.sequences), dtype=torch.float64)
    known = torch.full_like(toy.sequences[:1], -1) if known is None else torch.tensor([known])
    seen = known.expand_as(toy.sequences)
    holes = [position for position, code in enumerate(known[0].tolist()) if code < 0]
    orders = orders or list(itertools.permutations(holes))
    labels = torch.zeros(len(toy.sequences), dtype=torch.int64)
    for order in orders:
        codes, nats = seen.clone(), torch.zeros_like(law)
        for position, scale in zip(order, scales, strict=True):
            conditional, unconditional = (
                toy.conditionals(codes, label, None)[:, position, : toy.sizes[position]]
                for label in (labels, labels + toy.num_classes)
            )
            logits = (unconditional + scale * (conditional - unconditional)) / temperature
            codes[:, position] = toy.sequences[:, position]
            nats -= logits.log_softmax(-1).gather(1, codes[:, position, None])[:, 0]
        law += (-nats).exp() / len(orders)
    return law * ((toy.sequences == known) | (known < 0)).all(1)


@OVER_SCHEDULES
def test_guidance_in_raster_order_has_the_schedules_scales(schedule):
    prior = SAMPLERS["raster"](LAYOUTS["one_grid"])
    law = guided_law(prior.backbone, SCALES[schedule], temperature=1.2, orders=[(0, 1, 2)])
    assert p_value(prior.backbone, draw(prior, guided(schedule, temperature=1.2)), law) > 1e-3
    assert (
        p_value(
            prior.backbone, draw(prior, guided(schedule, temperature=1.2)), prior.backbone.joints[0]
        )
        < 1e-9
    )


@OVER_SCHEDULES
@pytest.mark.parametrize("name", ["random", "halton", "confidence", "first_hitting"])
def test_guidance_in_any_order_has_the_schedules_scales(name, schedule):
    prior = ONE_BY_ONE[name](PAIR)
    law = guided_law(prior.backbone, SCALES_OF_TWO[schedule])
    options = guided(schedule, sampler="first_hitting" if name == "first_hitting" else "")
    assert p_value(prior.backbone, draw(prior, options, count=FEWER), law) > 1e-3


@pytest.mark.parametrize("name", ONE_BY_ONE)
def test_the_last_code_of_a_hole_has_the_whole_guidance(name):
    prior = ONE_BY_ONE[name](LAYOUTS["one_grid"])
    options = SampleOptions(
        3.0, "linear", sampler="first_hitting" if name == "first_hitting" else ""
    )
    law = guided_law(prior.backbone, [3.0], [2, 0, -1])
    assert p_value(prior.backbone, draw(prior, options, [2, 0, -1], count=FEWER), law) > 1e-3


@pytest.mark.parametrize("schedule", ["linear", "power_cosine"])
@pytest.mark.parametrize(
    "sampler", ["halton", "confidence", "ancestral", "first_hitting", "remasking"]
)
def test_one_step_has_the_whole_guidance(sampler, schedule):
    family = MaskedPrior if sampler in priors.families.masked.SAMPLERS else AbsorbingPrior
    drawn = [
        draw(
            family(AnyOrder(PAIR), 2),
            SampleOptions(4.0, each, steps=1, sampler=sampler),
            count=1000,
        )
        for each in ("constant", schedule)
    ]
    assert torch.equal(*drawn)


@pytest.mark.parametrize("sampler", priors.families.absorbing.SAMPLERS)
def test_absorbing_steps_have_the_scales_of_the_linear_schedule(sampler, monkeypatch):
    prior, scales = AbsorbingPrior(AnyOrder(LAYOUTS["square"]), 2, eta=0.3), []
    shape = priors.families.absorbing.shape_logits
    monkeypatch.setattr(
        priors.families.absorbing,
        "shape_logits",
        lambda logits, options, scale: scales.append(scale) or shape(logits, options, scale),
    )
    draw(prior, SampleOptions(3.0, "linear", steps=4, sampler=sampler), count=1000)
    assert scales == [1.5, 2.0, 2.5, 3.0]


def test_only_guided_samples_ask_twice():
    class Counting(AnyOrder):
        def forward(self, codes, labels, *, given=None):
            self.rows.append(len(codes))
            return super().forward(codes, labels, given=given)

    for family, calls in ((MaskedPrior, 2), (AbsorbingPrior, 2)):
        network = Counting(PAIR)
        prior, ids = family(network, 2), torch.arange(5)
        for scale, rows in ((1.0, 5), (2.0, 10)):
            network.rows = []
            prior.sample(ids * 0, SampleOptions(scale, "linear", steps=2), ids)
            assert network.rows == [rows] * calls


@OVER_LAYOUTS
@pytest.mark.parametrize("sampler", ["confidence", "halton"])
def test_one_step_draws_each_code_from_its_marginal(sampler, layout):
    prior = MaskedPrior(AnyOrder(layout), 2, sampler=sampler)
    toy, joint = prior.backbone, prior.backbone.joints[0]
    marginals = torch.ones_like(joint)
    for position, size in enumerate(toy.sizes):
        shares = torch.stack(
            [joint[toy.sequences[:, position] == code].sum() for code in range(size)]
        )
        marginals *= shares[toy.sequences[:, position]]
    drawn = draw(prior, SampleOptions(steps=1))
    assert p_value(toy, drawn, marginals) > 1e-3
    assert p_value(toy, drawn, joint) < 1e-9  # few steps are not the joint


def test_confidence_without_noise_keeps_the_likelier_code():
    """The law of two codes in two steps, by counting: both are drawn from their marginals, the
    likelier one is kept, the other is drawn again given it. It is not the joint."""
    toy = AnyOrder(CodeLayout(((1, 2),), (3,)))
    joint = toy.joints[0].view(3, 3)
    first, second, law = joint.sum(1), joint.sum(0), torch.zeros(3, 3, dtype=torch.float64)
    for a, b in itertools.product(range(3), repeat=2):
        if first[a] > second[b]:
            law[a] += first[a] * second[b] * joint[a] / first[a]
        else:
            law[:, b] += first[a] * second[b] * joint[:, b] / second[b]
    drawn = draw(MaskedPrior(toy, 2, steps=2, choice_temperature=0.0))
    assert p_value(toy, drawn, law.flatten()) > 1e-3
    assert p_value(toy, drawn, joint.flatten()) < 1e-9


def test_noise_on_confidences_fades_to_half_in_the_first_of_two_steps():
    """As above, but with noise of temperature 3 / 2, which keeps the first with odds (p(a) /
    p(b))^(2 / 3)."""
    toy = AnyOrder(PAIR)
    joint = toy.joints[0].view(3, 3)
    first, second, law = joint.sum(1), joint.sum(0), torch.zeros(3, 3, dtype=torch.float64)
    for a, b in itertools.product(range(3), repeat=2):
        odds = (first[a] / second[b]) ** (2 / 3)
        law[a] += first[a] * second[b] * odds / (1 + odds) * joint[a] / first[a]
        law[:, b] += first[a] * second[b] / (1 + odds) * joint[:, b] / second[b]
    drawn = draw(MaskedPrior(toy, 2, steps=2, choice_temperature=3.0))
    assert p_value(toy, drawn, law.flatten()) > 1e-3


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_annealed_draws_are_of_falling_temperatures(temperature):
    """Two codes in two steps, by counting, noise of 3: draws and confidences have temperature 3 / 2
    in the first, and the second takes the likeliest code."""
    toy = AnyOrder(PAIR)
    joint = toy.joints[0].view(3, 3)
    logits = [
        each[0, 0] for each in toy(torch.tensor([[-1, -1]]), torch.tensor([0]))[0].split(1, 1)
    ]
    first, second = ((each / (1.5 * temperature)).softmax(-1) for each in logits)
    law = torch.zeros(3, 3, dtype=torch.float64)
    for a, b in itertools.product(range(3), repeat=2):
        kept = torch.sigmoid((logits[0][a] - logits[1][b]) / (1.5 * temperature))
        law[a, joint[a].argmax()] += first[a] * second[b] * kept
        law[joint[:, b].argmax(), b] += first[a] * second[b] * (1 - kept)
    prior = MaskedPrior(toy, 2, steps=2, sampler="annealed", choice_temperature=3.0)
    drawn = draw(prior, SampleOptions(temperature=temperature))
    assert p_value(toy, drawn, law.flatten()) > 1e-3


def test_softmax_temperatures_are_of_steps():
    """Of one step: the last one's, without noise; of two, 0.9 and noise of 1.5 at first."""
    toy = AnyOrder(PAIR)
    joint = toy.joints[0].view(3, 3)
    prior = MaskedPrior(toy, 2, steps=2, sampler="annealed", choice_temperature=3.0)
    prior.softmax_temperatures = (1.3, 0.5)
    logits = [
        each[0, 0] for each in toy(torch.tensor([[-1, -1]]), torch.tensor([0]))[0].split(1, 1)
    ]
    first, second = ((each / 0.9 / 1.5).softmax(-1) for each in logits)
    law = torch.zeros(3, 3, dtype=torch.float64)
    for a, b in itertools.product(range(3), repeat=2):
        kept = torch.sigmoid((logits[0][a] - logits[1][b]) / 0.9 / 1.5)
        law[a, joint[a].argmax()] += first[a] * second[b] * kept
        law[joint[:, b].argmax(), b] += first[a] * second[b] * (1 - kept)
    assert p_value(toy, draw(prior), law.flatten()) > 1e-3


def test_late_guidance_is_by_the_steps_before():
    """By hand: of three steps s - 1 is 0, a third and two thirds of what it is in the end."""
    options, prior = SampleOptions(4.0, "linear"), MaskedPrior(AnyOrder(PAIR), 2)
    assert [prior._guidance(options, step, 3) for step in range(3)] == [2.0, 3.0, 4.0]
    prior.guided_late = True
    assert [prior._guidance(options, step, 3) for step in range(3)] == [1.0, 2.0, 3.0]


class Seeing(nn.Module):
    """Remembers how many codes are unknown, in each step."""

    layout = CodeLayout(((8, 8),), (4,))

    def __init__(self):
        super().__init__()
        self.unknown = []

    def forward(self, codes, labels, *, given=None):
        self.unknown += (codes < 0).sum(1).tolist()
        return [torch.zeros(*codes.shape, 4)]


def test_samplers_have_the_schedules_of_their_papers():
    """Known before step k of 4: MaskGIT 64 - floor(64 cos(pi k / 8)), Halton floor(64 - 64 arccos(k
    / 4) 2 / pi)."""
    known = {
        "confidence": [64 - math.floor(64 * math.cos(math.pi * k / 8)) for k in range(4)],
        "halton": [math.floor(64 * (1 - math.acos(k / 4) / (math.pi / 2))) for k in range(4)],
    }
    assert known["halton"] == [0, 10, 21, 34]
    for sampler, expected in known.items():
        network = Seeing()
        MaskedPrior(network, 2, sampler=sampler).sample(
            torch.zeros(1, dtype=torch.int64), SampleOptions(steps=4), torch.arange(1)
        )
        assert [64 - count for count in network.unknown] == expected


def test_the_grids_of_a_hierarchy_draw_with_noise_of_their_own():
    """Top and bottom begin with a code of as many values: of the same noise they would fall
    together."""
    top, bottom = (
        Causal(CodeLayout(((1, 1),), (3,))),
        Causal(CodeLayout(((1, 2),), (3,)), num_given=3),
    )
    prior = HierarchicalPrior(AutoregressivePrior(top, 2), AutoregressivePrior(bottom, 2))
    codes = draw(prior, count=FEWER)
    observed = torch.bincount(
        codes[:, 0] * 9 + codes[:, 1] * 3 + codes[:, 2], minlength=27
    ).double()
    expected = (top.joints[0][:, None] * bottom.joints[:3]).flatten() * FEWER
    from scipy.stats import chi2

    assert chi2.sf(float(((observed - expected).square() / expected).sum()), 26) > 1e-3


BEGINNING, ANYWHERE, LEVELWISE = (
    ("raster",),
    ("random", "halton", "confidence"),
    ("halton", "confidence"),
)
HOLES = [
    *((name, "one_grid", [2, -1, -1]) for name in (*BEGINNING, *ANYWHERE)),
    *((name, "one_grid", [-1, 1, -1]) for name in ANYWHERE),
    *((name, "square", [-1, 1, 0, -1]) for name in ANYWHERE),
    *((name, "residual", [0, 1, -1, 2]) for name in ANYWHERE),
    *((name, "residual", [-1, 1, -1, 2]) for name in LEVELWISE),
    *((name, "two_grids", [2, -1, 1, -1]) for name in ANYWHERE),
    *((name, "two_grids", [-1, 0, 1, -1]) for name in LEVELWISE),
]


@pytest.mark.parametrize(("name", "layout", "known"), HOLES)
def test_inpainting_draws_the_true_conditional(name, layout, known):
    prior = SAMPLERS[name](LAYOUTS[layout])
    drawn, kept = draw(prior, known=known), torch.tensor(known)
    assert (drawn[:, kept >= 0] == kept[kept >= 0]).all()
    assert (
        p_value(prior.backbone, drawn, conditional(prior.backbone, known, prior.backbone.joints[0]))
        > 1e-3
    )


@pytest.mark.parametrize(
    ("name", "layout", "known", "message"),
    [
        ("raster", "one_grid", [-1, 1, -1], "beginning"),
        ("annealed", "one_grid", [-1, 1, -1], "beginning"),
        ("random", "residual", [-1, 1, 2, -1], "level to level"),
    ],
)
def test_holes_that_an_order_cannot_fill_are_refused(name, layout, known, message):
    with pytest.raises(UserError, match=message):
        draw(SAMPLERS[name](LAYOUTS[layout]), known=known)


def test_a_prior_of_random_order_samples_in_raster_order_too():
    prior = SAMPLERS["random"](LAYOUTS["square"])
    raster = SAMPLERS["raster"](LAYOUTS["square"])
    drawn = draw(prior, SampleOptions(sampler="raster"))
    assert torch.equal(drawn, draw(raster)) and not torch.equal(drawn, draw(prior))
    with pytest.raises(UserError, match="beginning"):
        draw(prior, SampleOptions(sampler="raster"), known=[-1, 1, 1, -1])
