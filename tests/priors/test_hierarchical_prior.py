"""Laws of the hierarchical prior: the chain rule over grids, and families mixed freely."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import nn

from priors.families.hierarchical import (
    FAMILIES,
    HierarchicalConfig,
    HierarchicalPrior,
    grids_apart,
)
from priors.interface import Likelihood, SampleOptions
from priors.sampling.noise import categorical
from tokenizer.interface import CodeLayout
from training.config import from_dict, one_of, to_dict
from training.errors import UserError
from training.loop import Loss

TOP, BOTTOM = CodeLayout(((1, 1),), (3,)), CodeLayout(((1, 2),), (2,))
WHOLE = CodeLayout(TOP.grids + BOTTOM.grids, TOP.num_codes + BOTTOM.num_codes)
REAL = CodeLayout(((2, 2), (4, 4)), (5, 7))
NUM_CLASSES = 3


class Table(nn.Module):
    """Sequences by their probabilities, in a row for every sequence of the grid before; remembers
    what it was told."""

    num_classes = NUM_CLASSES

    def __init__(self, layout, rows, kind="exact"):
        super().__init__()
        self.layout, self.kind, self.told = layout, kind, {}
        sizes = [torch.arange(size) for _, size in layout.spans() for _ in range(layout.length)]
        self.sequences = torch.cartesian_prod(*sizes).view(-1, layout.length)
        generator = torch.Generator().manual_seed(len(self.sequences))
        self.table = (
            1.5 * torch.randn(rows, len(self.sequences), generator=generator).double()
        ).log_softmax(-1)

    def rows(self, count, given):
        return self.table[torch.zeros(count, dtype=torch.int64) if given is None else given[:, 0]]

    def nll(self, codes, labels, given=None):
        index = (codes[:, None] == self.sequences).all(-1).double().argmax(1)
        return Likelihood(-self.rows(len(codes), given).gather(1, index[:, None])[:, 0], self.kind)

    def loss(self, codes, labels, uniform=None, given=None):
        self.told = {"uniform": uniform, "given": given}
        nats = self.nll(codes, labels, given).nats.mean() / self.layout.length
        return Loss(nats, {"nats_per_token": nats})

    def sample(self, labels, options, sample_ids, known=None, given=None):
        self.told = {"options": options, "known": known}
        if options.sampler not in ("", "slow"):
            raise UserError(f"sampler is {options.sampler!r}: this prior has slow")
        logits = self.rows(len(labels), given)
        if known is not None:
            agrees = ((known[:, None] == self.sequences) | (known[:, None] < 0)).all(-1)
            logits = logits.masked_fill(~agrees, -torch.inf)
        generator = torch.Generator().manual_seed(
            options.seed
        )  # rows by seed and id alone, all at once
        noise = torch.rand(
            int(sample_ids.max()) + 1, logits.shape[1], generator=generator, dtype=torch.float64
        )
        return self.sequences[categorical(logits, -torch.log(-torch.log(noise[sample_ids])))]


def toy(kinds=("exact", "exact")):
    return HierarchicalPrior(Table(TOP, 1, kinds[0]), Table(BOTTOM, 3, kinds[1]))


def joint(prior):
    """All 12 sequences and their true probabilities."""
    sequences = torch.cartesian_prod(torch.arange(3), torch.arange(2), torch.arange(2))
    first, second = prior.top.table, prior.bottom.table
    return sequences, (
        first[0, sequences[:, 0]] + second[sequences[:, 0], 2 * sequences[:, 1] + sequences[:, 2]]
    ).exp()


def chi_square(drawn, sequences, probabilities):
    """Of samples against probabilities, and what it exceeds once in 10^4."""
    from scipy.stats import chi2

    counts = (drawn[:, None] == sequences).all(-1).double().sum(0)
    assert counts.sum() == len(drawn)
    expected = len(drawn) * probabilities
    return float(((counts - expected) ** 2 / expected).sum()), chi2.ppf(
        1 - 1e-4, len(sequences) - 1
    )


def test_likelihood_is_the_chain_rule():
    prior = toy()
    sequences, probabilities = joint(prior)
    likelihood = prior.nll(sequences, torch.zeros(12, dtype=torch.int64))
    torch.testing.assert_close((-likelihood.nats).exp(), probabilities)
    assert float(probabilities.sum()) == pytest.approx(1) and likelihood.kind == "exact"


@pytest.mark.parametrize(
    ("kinds", "whole"),
    [(("exact", "bound"), "bound"), (("bound", "exact"), "bound"), (("none", "bound"), "none")],
)
def test_a_likelihood_is_as_exact_as_its_parts(kinds, whole):
    assert toy(kinds).nll(joint(toy())[0], torch.zeros(12, dtype=torch.int64)).kind == whole


def test_samples_follow_the_joint_although_both_levels_draw_with_the_same_ids():
    prior, count = toy(), 100_000
    labels, ids = torch.zeros(count, dtype=torch.int64), torch.arange(count)
    found, limit = chi_square(prior.sample(labels, SampleOptions(), ids), *joint(prior))
    assert found < limit


def test_known_codes_are_split_by_level_and_kept():
    prior, count = toy(), 40_000
    labels, ids = torch.zeros(count, dtype=torch.int64), torch.arange(count)
    drawn = prior.sample(
        labels, SampleOptions(seed=3), ids, torch.tensor([[1, -1, 0]]).expand(count, -1)
    )
    assert (drawn[:, 0] == 1).all() and (drawn[:, 2] == 0).all()
    sequences, probabilities = joint(prior)
    allowed = (sequences[:, 0] == 1) & (sequences[:, 2] == 0)
    found, limit = chi_square(
        drawn, sequences[allowed], probabilities[allowed] / probabilities[allowed].sum()
    )
    assert found < limit


def test_loss_is_per_token_and_its_draws_are_dealt_out():
    prior = toy()
    codes, labels = joint(prior)[0], torch.zeros(12, dtype=torch.int64)
    uniform = torch.rand(12, 5, generator=torch.Generator().manual_seed(1))
    loss = prior.loss(codes, labels, uniform)
    torch.testing.assert_close(loss.total, prior.nll(codes, labels).nats.mean() / 3)
    assert set(loss.parts) == {"top_nats_per_token", "bottom_nats_per_token"}
    top, bottom = prior.top.told, prior.bottom.told
    assert top["given"] is None and torch.equal(bottom["given"], codes[:, :1])  # the true top
    assert torch.equal(top["uniform"], uniform[:, :3]) and torch.equal(
        bottom["uniform"][:, 2:], uniform[:, 3:]
    )
    assert torch.equal(bottom["uniform"][:, 0], uniform[:, 0])  # a label is dropped for both
    times = bottom["uniform"][:, 1]
    assert ((times >= 0) & (times < 1)).all() and not torch.equal(times, uniform[:, 1])


def test_each_level_has_its_own_sampler():
    prior, one = toy(), torch.zeros(1, dtype=torch.int64)
    prior.sample(one, SampleOptions(sampler="/slow", steps=3), one)
    assert (
        prior.top.told["options"].sampler == "" and prior.bottom.told["options"].sampler == "slow"
    )
    assert prior.top.told["options"].steps == prior.bottom.told["options"].steps == 3
    with pytest.raises(
        UserError, match="bottom grid's prior: sampler is 'quick': this prior has slow"
    ):
        prior.sample(one, SampleOptions(sampler="slow/quick"), one)
    with pytest.raises(UserError, match="TOP/BOTTOM"):
        prior.sample(one, SampleOptions(sampler="slow"), one)


def test_grids_are_told_apart_and_depths_are_not():
    levels = CodeLayout(((2, 2), (2, 2), (4, 4)), (5, 6, 7))
    assert grids_apart(levels) == [
        CodeLayout(((2, 2), (2, 2)), (5, 6)),
        CodeLayout(((4, 4),), (7,)),
    ]
    for grids in (((4, 4),), ((4, 4), (4, 4)), ((1, 1), (2, 2), (4, 4))):
        with pytest.raises(
            UserError, match=r"coarse grid and a fine one.*choose another prior\.kind"
        ):
            HierarchicalConfig().build(CodeLayout(grids, (5,) * len(grids)), NUM_CLASSES)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    prior: Any = one_of({"hierarchical": HierarchicalConfig}, "hierarchical")


def test_families_are_named_in_the_file():
    raw = {"prior": {"top": {"backbone": {"dim": 32}}, "bottom": {"kind": "absorbing", "steps": 5}}}
    config = from_dict(RunConfig, raw, "prior.yaml").prior
    assert (config.top.kind, config.top.backbone.dim) == ("autoregressive", 32)
    assert (config.bottom.kind, config.bottom.steps) == ("absorbing", 5)
    assert from_dict(RunConfig, {"prior": to_dict(config)}, "again").prior == config
    with pytest.raises(
        UserError, match=r"prior\.bottom\.kind: unknown kind 'hierarchical'.*one of autoregressive"
    ):
        from_dict(RunConfig, {"prior": {"bottom": {"kind": "hierarchical"}}}, "prior.yaml")


def build(top, bottom, layout=REAL):
    """A small prior of two families, with weights that say something."""

    def small(kind):
        sizes = (
            {"channels": 8, "depth": 2}
            if kind == "pixelcnn"
            else {"backbone": {"dim": 16, "depth": 1, "heads": 2}}
        )
        return {"kind": kind, **sizes}

    torch.manual_seed(0)
    raw = {"prior": {"top": small(top), "bottom": small(bottom)}}
    prior = from_dict(RunConfig, raw, "test").prior.build(layout, NUM_CLASSES)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return prior


def random_codes(count):
    generator = torch.Generator().manual_seed(1)
    sizes = zip(REAL.lengths, REAL.num_codes)
    return torch.cat([torch.randint(k, (count, n), generator=generator) for n, k in sizes], 1)


PAIRS = [
    (kind, other)
    for kind in FAMILIES
    for other in FAMILIES
    if "masked" in (kind, other) or kind == other
]


@pytest.mark.parametrize(("top", "bottom"), PAIRS)
def test_any_two_families_go_together(top, bottom):
    prior, codes, labels, ids = (
        build(top, bottom),
        random_codes(6),
        torch.arange(6) % 4,
        torch.arange(6),
    )
    uniform = torch.rand(6, REAL.length + 2, generator=torch.Generator().manual_seed(2))
    prior.loss(codes, labels, uniform).total.backward()
    assert all(parameter.grad is not None for parameter in prior.parameters())
    nats = prior.nll(codes, labels).nats
    assert nats.shape == (6,) and nats.dtype == torch.float64 and nats.isfinite().all()
    options = SampleOptions(guidance=2.0, steps=3)
    drawn = prior.sample(labels, options, ids)
    REAL.check(drawn)
    assert torch.equal(prior.sample(labels[2:4], options, ids[2:4]), drawn[2:4])


@pytest.mark.parametrize("bottom", FAMILIES)
def test_the_bottom_hangs_on_the_top(bottom):
    prior, codes, labels = (
        build("masked", bottom),
        random_codes(4),
        torch.zeros(4, dtype=torch.int64),
    )
    changed = codes.clone()
    changed[:, :4] = (changed[:, :4] + 1) % 5
    given, other = (
        prior.bottom.nll(codes[:, 4:], labels, given=each[:, :4]).nats for each in (codes, changed)
    )
    assert not torch.allclose(given, other)


def test_exact_families_sum_to_one():
    layout = CodeLayout(((1, 1), (1, 2)), (2, 3))
    codes = torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(3))
    likelihood = build("autoregressive", "pixelcnn", layout).nll(
        codes, torch.ones(18, dtype=torch.int64)
    )
    assert likelihood.kind == "exact" and float((-likelihood.nats).exp().sum()) == pytest.approx(
        1, abs=1e-5
    )


def test_holes_are_filled_as_far_as_both_families_can():
    codes, labels, ids = random_codes(5), torch.zeros(5, dtype=torch.int64), torch.arange(5)
    known = codes.masked_fill(
        torch.rand(codes.shape, generator=torch.Generator().manual_seed(3)) < 0.5, -1
    )
    drawn = build("masked", "absorbing").sample(labels, SampleOptions(steps=3), ids, known)
    assert torch.equal(drawn[known >= 0], codes[known >= 0])
    raster = build("autoregressive", "masked")
    with pytest.raises(UserError, match=r"top grid's prior: .*beginning"):
        raster.sample(labels, SampleOptions(), ids, known)
    known[:, :4] = codes[:, :4]  # a whole top is a beginning too: only the bottom is drawn
    drawn = raster.sample(labels, SampleOptions(), ids, known)
    assert torch.equal(drawn[known >= 0], codes[known >= 0])


def test_schedules_of_the_families_go_on():
    config = HierarchicalConfig(
        top=FAMILIES["autoregressive"](order="annealed", anneal_end_step=10)
    )
    prior = config.build(REAL, NUM_CLASSES)
    prior.update(4, True)
    assert int(prior.top.next_step) == 5


def test_four_sequences_are_learned():
    codes, labels = random_codes(4), torch.zeros(4, dtype=torch.int64)
    prior = build("autoregressive", "autoregressive").train()
    for part in (prior.top, prior.bottom):
        part.label_dropout = 0.0
    optimizer = torch.optim.AdamW(prior.parameters(), lr=6e-3)
    for _ in range(150):
        optimizer.zero_grad()
        prior.loss(codes, labels).total.backward()
        optimizer.step()
    assert float(prior.nll(codes, labels).nats.mean()) == pytest.approx(math.log(4), abs=0.2)
    drawn = prior.sample(labels.repeat(8), SampleOptions(), torch.arange(32))
    assert (drawn[:, None] == codes).all(-1).any(1).float().mean() > 0.8
