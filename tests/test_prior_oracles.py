"""Priors around the true conditionals of a toy joint: likelihoods meet closed forms, samplers draw from it."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

import priors.autoregressive
import priors.masked
import priors.sampling
from priors.autoregressive import AutoregressivePrior
from priors.interface import SampleOptions
from priors.masked import MaskedPrior
from priors.sampling import guide
from tokenizer.interface import CodeLayout
from training.command import UserError

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
        partial = torch.tensor(list(itertools.product(*(range(-1, size) for size in self.sizes))))  # (P, N)
        agrees = ((partial[:, None] == self.sequences) | (partial[:, None] < 0)).all(-1).double()
        masses = [(agrees * joint) @ nn.functional.one_hot(self.sequences, max(self.sizes)).double().flatten(1)
                  for joint in self.joints]  # fmt: skip
        table = torch.stack(masses).unflatten(-1, (len(self.sizes), -1))
        self.table = (table / table.sum(-1, keepdim=True)).log()  # (conditions, P, N, K)
        self.partial_strides, self.strides = strides([size + 1 for size in self.sizes]), strides(self.sizes)

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
        logits, seen = torch.zeros(*codes.shape, max(self.sizes), dtype=torch.float64), torch.full_like(codes, -1)
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
    """Independent rows as of `uniform_noise`, whose own laws are in test_priors.py, but drawn all at once."""

    def noise(seed, sample_ids, stream, shape):
        generator = torch.Generator().manual_seed(1000 * seed + stream)
        return torch.rand((len(sample_ids), *shape), generator=generator, dtype=torch.float64).clamp_min(1e-300)

    for module in (priors.sampling, priors.autoregressive, priors.masked):
        monkeypatch.setattr(module, "uniform_noise", noise)


def draw(prior, options=None, known=None, given=None, label=0):
    labels, ids = torch.full((COUNT,), label), torch.arange(COUNT)
    repeat = lambda row: None if row is None else torch.tensor(row).expand(COUNT, -1)  # noqa: E731
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
    """MaskGIT with a code a step in an order that ignores the codes: the noise on confidences is all."""
    return MaskedPrior(AnyOrder(layout), 2, steps=layout.length, choice_temperature=1e12, **settings)


SAMPLERS = {
    "raster": lambda layout: AutoregressivePrior(Causal(layout), 2),
    "random": lambda layout: AutoregressivePrior(Causal(layout), 2, order="random"),
    "annealed": lambda layout: AutoregressivePrior(Causal(layout), 2, order="annealed", anneal_steps=(0, 1)),
    "halton": lambda layout: MaskedPrior(AnyOrder(layout), 2, sampler="halton", steps=layout.length),
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
    uniform = torch.rand(len(toy.sequences), layout.length + 2, generator=torch.Generator().manual_seed(3))
    for row in range(len(uniform)):
        this = slice(row, row + 1)
        loss = prior.loss(toy.sequences[this], torch.ones(1, dtype=torch.int64), uniform[this])
        torch.testing.assert_close(loss.total * layout.length, -toy.joints[1, row].log(), atol=1e-9, rtol=0)


@OVER_LAYOUTS
@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_draw_from_the_joint(name, layout):
    prior = SAMPLERS[name](layout)
    assert p_value(prior.backbone, draw(prior, label=1), prior.backbone.joints[1]) > 1e-3


@pytest.mark.parametrize("name", SAMPLERS)
def test_given_codes_choose_the_joint(name):
    prior = SAMPLERS[name](LAYOUTS["one_grid"])
    prior.backbone = type(prior.backbone)(prior.layout, 2, num_given=3)
    drawn = draw(prior, SampleOptions(guidance=2.0), given=[2], label=2)  # guidance away from itself changes nothing
    assert p_value(prior.backbone, drawn, prior.backbone.joints[2 * 3 + 2]) > 1e-3
    assert p_value(prior.backbone, drawn, prior.backbone.joints[2 * 3]) < 1e-9


@pytest.mark.parametrize("schedule", ["constant", "linear", "power_cosine"])
def test_guided_samples_follow_the_guided_conditionals(schedule):
    toy, options = Causal(LAYOUTS["one_grid"]), SampleOptions(guidance=1.5, guidance_schedule=schedule, temperature=1.2)
    guided = torch.zeros(len(toy.sequences), dtype=torch.float64)
    both = [toy(toy.sequences, torch.full((len(toy.sequences),), label))[0] for label in (0, toy.num_classes)]
    for slot in range(3):
        logits = guide(both[0][:, slot], both[1][:, slot], options.guidance_at(slot / 3)) / options.temperature
        guided += logits.log_softmax(-1).gather(1, toy.sequences[:, slot : slot + 1])[:, 0]
    assert p_value(toy, draw(AutoregressivePrior(toy, 2), options), guided.exp()) > 1e-3
    assert p_value(toy, draw(AutoregressivePrior(toy, 2), options), toy.joints[0]) < 1e-9


@OVER_LAYOUTS
@pytest.mark.parametrize("sampler", ["confidence", "halton"])
def test_one_step_draws_each_code_from_its_marginal(sampler, layout):
    prior = MaskedPrior(AnyOrder(layout), 2, sampler=sampler)
    toy, joint = prior.backbone, prior.backbone.joints[0]
    marginals = torch.ones_like(joint)
    for position, size in enumerate(toy.sizes):
        shares = torch.stack([joint[toy.sequences[:, position] == code].sum() for code in range(size)])
        marginals *= shares[toy.sequences[:, position]]
    drawn = draw(prior, SampleOptions(steps=1))
    assert p_value(toy, drawn, marginals) > 1e-3
    assert p_value(toy, drawn, joint) < 1e-9  # few steps are not the joint


def test_confidence_without_noise_keeps_the_likelier_code():
    """The law of two codes in two steps, by counting: both are drawn from their marginals, the likelier one is kept,
    the other is drawn again given it. It is not the joint."""
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


BEGINNING, ANYWHERE, LEVELWISE = ("raster",), ("random", "halton", "confidence"), ("halton", "confidence")
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
    assert p_value(prior.backbone, drawn, conditional(prior.backbone, known, prior.backbone.joints[0])) > 1e-3


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
