"""Laws of the discrete diffusions: bounds meet closed forms, samplers draw the joint distribution."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from priors import absorbing
from priors.absorbing import AbsorbingConfig, AbsorbingPrior, mask_some
from priors.backbone import BackboneConfig
from priors.bounds import masked_nats
from priors.diffusion import antithetic, draws, inverse_cdf, share_and_rate
from priors.interface import SampleOptions
from priors.parallel import reading
from priors.schedules import SCHEDULES
from priors.uniform import LATEST, UniformConfig, UniformPrior, bound_rate, reverse
from tokenizer.interface import CodeLayout
from training.command import UserError

NUM_CLASSES = 3
LAYOUTS = pytest.mark.parametrize(
    "layout", [CodeLayout(((2, 3),), (7,)), CodeLayout(((1, 2), (2, 2)), (5, 9))], ids=["one_level", "two_levels"]
)
SMALL = BackboneConfig(dim=32, depth=2, heads=2, dropout=0.0)
PRIORS = {
    "absorbing": AbsorbingConfig(backbone=SMALL, steps=8),
    "uniform": UniformConfig(backbone=SMALL, steps=8),
    "hybrid": UniformConfig(backbone=SMALL, steps=8, mask_share=0.9, parameterisation="posterior", cross_entropy=0.01),
}
KINDS = pytest.mark.parametrize("kind", PRIORS)
COUNT = 100_000


class Toy(nn.Module):
    """The true network for a joint distribution over three codes on two grids, of 2 and 3 codes.

    Codes are independent draws of q(z | x) = alpha [z = x] + (1 - alpha) pi(z), linear in time, or, without time,
    clean and hidden by -1. The logits of position i are of p(x_i | z), or of p(x_i | z without z_i).
    """

    layout = CodeLayout(((1, 1), (1, 2)), (2, 3))
    sequences = torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(3))
    joint = (0.6 * torch.randn(18, generator=torch.Generator().manual_seed(6)).double()).softmax(0)
    entropy = float(-(joint * joint.log()).sum())

    def __init__(self, mask_share: float = 1.0, leave_one_out: bool = False) -> None:
        super().__init__()
        self.mask_share, self.leave_one_out, self.calls = mask_share, leave_one_out, 0
        self.sizes = self.sequences.amax(0) + 1
        self.grid = torch.cartesian_prod(*[torch.arange(-1, size) for size in self.sizes])

    def forward(self, codes: Tensor, labels: Tensor, *, given: None = None, time: Tensor | None = None) -> list[Tensor]:
        self.calls += 1
        if time is None or (time == time[0]).all():  # one table for all rows
            table = self.predict(self.grid, time if time is None else time[:1])
            row = index(codes + 1, self.sizes + 1)
            return [level[row] for level in table]
        return self.predict(codes, time)

    def predict(self, codes: Tensor, time: Tensor | None) -> list[Tensor]:
        evidence = self.noising(codes, torch.zeros(1) if time is None else time)
        own = torch.eye(len(self.sizes), dtype=bool)
        parts = [evidence.masked_fill(here, 1) if self.leave_one_out else evidence for here in own]
        weights = [self.joint * part.prod(-1) for part in parts]
        marginals = [w @ F.one_hot(self.sequences[:, i]).double() for i, w in enumerate(weights)]
        logits = [(m / m.sum(-1, keepdim=True)).clamp_min(1e-300).log() for m in marginals]
        return [logits[0][:, None], torch.stack(logits[1:], 1)]

    def noising(self, codes: Tensor, time: Tensor) -> Tensor:
        """q(code i | x_i), (rows, sequences, N), for codes (rows, N) at times (rows,) or (1,)."""
        hidden, same = (codes < 0)[:, None], codes[:, None] == self.sequences
        if self.mask_share == 1:  # absorbing, where the time plays no part
            return (same | hidden).double()
        alpha = 1 - time.double()[:, None, None]
        return alpha * same + (1 - alpha) * torch.where(hidden, self.mask_share, (1 - self.mask_share) / self.sizes)


class Pair(Toy):
    """Two codes."""

    layout = CodeLayout(((1, 1), (1, 1)), (2, 3))
    sequences = torch.cartesian_prod(torch.arange(2), torch.arange(3))
    joint = torch.tensor([0.22, 0.15, 0.13, 0.12, 0.16, 0.22], dtype=torch.float64)


def index(codes: Tensor, sizes: Tensor) -> Tensor:
    """Row of each code sequence among all sequences."""
    return (codes * sizes.flip(0).cumprod(0).flip(0) // sizes).sum(1)


def chi_square(codes: Tensor, toy: type[Toy], probabilities: Tensor | None = None) -> float:
    """Standard deviations above its mean of the statistic of draws from the toy's joint, or other `probabilities`."""
    probabilities = toy.joint if probabilities is None else probabilities
    counts = torch.bincount(index(codes, toy.sequences.amax(0) + 1), minlength=len(toy.joint)).double()
    possible = probabilities > 0
    assert counts[~possible].sum() == 0
    expected = probabilities[possible] * len(codes)
    freedom = len(expected) - 1
    return float((((counts[possible] - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom))


@pytest.fixture
def quick_noise(monkeypatch):
    """Noise of a batch at once: a generator per sample takes longer than all the rest."""

    def noise(seed: int, ids: Tensor, stream: int, shape: tuple[int, ...]) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * seed + stream)
        return torch.rand((len(ids), *shape), generator=generator, dtype=torch.float64).clamp_min(1e-300)

    monkeypatch.setattr("priors.absorbing.uniform_noise", noise)
    monkeypatch.setattr("priors.diffusion.uniform_noise", noise)
    monkeypatch.setattr("priors.bounds.uniform_noise", noise)


def draw_many(prior, options: SampleOptions, known: list[int] | None = None) -> Tensor:
    known = None if known is None else torch.tensor(known).expand(COUNT, -1)
    return prior.sample(torch.zeros(COUNT, dtype=torch.int64), options, torch.arange(COUNT), known)


def toy_batch(count: int) -> Tensor:
    """Sequences in the proportions of the joint, in random order."""
    points = (torch.arange(count).double() + 0.5) / count
    rows = torch.searchsorted(Toy.joint.cumsum(0), points * Toy.joint.sum())
    return Toy.sequences[rows][torch.randperm(count, generator=torch.Generator().manual_seed(3))]


def make(kind: str, layout: CodeLayout, trained: bool = True, **settings):
    """A small prior; `trained` stands for weights that say something."""
    torch.manual_seed(0)
    prior = dataclasses.replace(PRIORS[kind], **settings).build(layout, NUM_CLASSES)
    if trained:
        for head in prior.backbone.heads:
            nn.init.normal_(head.weight, std=0.2)
    return prior.eval()


def random_codes(layout: CodeLayout, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    sizes = zip(layout.lengths, layout.num_codes)
    return torch.cat([torch.randint(k, (count, n), generator=generator) for n, k in sizes], 1)


# -- the clock ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
def test_rate_is_the_slope_of_the_share_and_finite_at_the_ends(name):
    progress = torch.tensor([0.0, 0.3, 0.7, 1.0], dtype=torch.float64)
    with torch.no_grad():
        share, rate = share_and_rate(SCHEDULES[name], progress)
    difference = SCHEDULES[name](progress[1:3] - 1e-6) - SCHEDULES[name](progress[1:3] + 1e-6)
    torch.testing.assert_close(rate[1:3], difference / 2e-6)
    assert (rate > 0).all() and rate.isfinite().all() and (share > 0).all()


def test_antithetic_times_fill_the_batch_and_belong_to_places():
    uniform = torch.rand(64, 5, generator=torch.Generator().manual_seed(0))
    positions = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    uniform[positions == 63, 1] = 1 - 2**-24
    whole = antithetic(uniform, positions, 64)
    assert torch.equal((whole[:, 1] * 64).long().sort().values, torch.arange(64))
    assert whole[:, 1].max() < 1
    assert torch.equal(whole[:, [0, 2, 3, 4]], uniform[:, [0, 2, 3, 4]])
    assert torch.equal(
        torch.cat([antithetic(uniform[i : i + 16], positions[i : i + 16], 64) for i in (0, 16)]), whole[:32]
    )
    assert torch.equal((draws(None, torch.zeros(8, 3))[:, 1] * 8).long(), torch.arange(8))


def test_inverse_cdf_draws_the_law_and_never_the_impossible():
    probabilities = torch.tensor([0.0, 0.5, 0.0, 1.5, 0.0], dtype=torch.float64)
    noise = torch.tensor([5e-324, 0.249, 0.251, 1 - 2**-53], dtype=torch.float64)
    assert inverse_cdf(probabilities.expand(4, 5), noise).tolist() == [1, 1, 3, 3]


# -- absorbing ---------------------------------------------------------------------------------------------------


def test_absorbing_bound_is_the_entropy_when_conditionals_are_exact():
    total = 0.0
    for mask in itertools.product([False, True], repeat=3):
        if any(mask):
            nats = masked_nats(reading(Toy(), None), Toy().layout, Toy.sequences, torch.tensor(mask).expand(18, -1))
            total += float((Toy.joint * nats).sum()) / 3 / math.comb(3, sum(mask))
    assert total == pytest.approx(Toy.entropy, abs=1e-10)


def test_absorbing_likelihood_estimates_the_bound(quick_noise):
    codes = toy_batch(20_000)
    likelihood = AbsorbingPrior(Toy(), NUM_CLASSES).nll(codes, codes[:, 0])
    assert likelihood.kind == "bound" and likelihood.nats.dtype == torch.float64
    assert float(likelihood.nats.mean()) == pytest.approx(Toy.entropy, rel=3e-3)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_absorbing_loss_estimates_the_bound_under_every_schedule(schedule):
    torch.manual_seed(0)
    codes = toy_batch(COUNT)
    loss = AbsorbingPrior(Toy(), NUM_CLASSES, schedule=schedule).loss(codes, codes[:, 0])
    assert float(loss.total) == pytest.approx(Toy.entropy / 3, rel=2e-2)
    assert loss.parts["nats_per_token_bound"] == loss.total


@pytest.mark.parametrize("share", [1.0, 0.4, 1e-3, 6e-8])
def test_masks_are_independent_given_that_there_is_one(share):
    uniform = torch.rand(COUNT, 3, generator=torch.Generator().manual_seed(0))
    masked, chance = mask_some(uniform, torch.full((COUNT,), share, dtype=torch.float64))
    assert masked.any(1).all()
    torch.testing.assert_close(
        chance[0], torch.tensor(-math.expm1(3 * math.log1p(-min(share, 1 - 1e-16))), dtype=torch.float64)
    )
    sizes = torch.bincount(masked.sum(1), minlength=4)[1:] / COUNT
    expected = [math.comb(3, k) * share**k * (1 - share) ** (3 - k) / float(chance[0]) for k in (1, 2, 3)]
    torch.testing.assert_close(sizes.double(), torch.tensor(expected, dtype=torch.float64), atol=5e-3, rtol=0)
    torch.testing.assert_close(masked.double().mean(0), masked.double().mean().expand(3), atol=5e-3, rtol=0)


KNOWN = [-1, 2, -1]
CONDITIONAL = Toy.joint * (Toy.sequences[:, 1] == 2) / Toy.joint[Toy.sequences[:, 1] == 2].sum()


@pytest.mark.parametrize("name, steps", [("first_hitting", 0), ("ancestral", 100), ("remasking", 64)])
def test_absorbing_samplers_draw_the_joint_and_the_conditional(name, steps, quick_noise):
    prior = AbsorbingPrior(Toy(), NUM_CLASSES, schedule="linear", eta=0.01)
    options = SampleOptions(sampler=name, steps=steps)
    assert chi_square(draw_many(prior, options), Toy) < 4
    assert chi_square(draw_many(prior, options, KNOWN), Toy, CONDITIONAL) < 4


def test_one_step_draws_the_marginals_and_not_the_joint(quick_noise):
    drawn = draw_many(AbsorbingPrior(Toy(), NUM_CLASSES), SampleOptions(steps=1))
    marginals = [F.one_hot(Toy.sequences[:, i]).double().T @ Toy.joint for i in range(3)]
    product = torch.stack([m[Toy.sequences[:, i]] for i, m in enumerate(marginals)]).prod(0)
    assert chi_square(drawn, Toy, product) < 4 < chi_square(drawn, Toy)


@pytest.mark.parametrize("name", absorbing.SAMPLERS)
def test_plans_reveal_every_unknown_code_and_follow_the_schedule(name):
    prior, unknown = AbsorbingPrior(Toy(), NUM_CLASSES, steps=10, eta=0.3), torch.ones(500, 40) > 0
    unknown[:100, :20] = False
    masked = unknown
    for step, move in enumerate(absorbing.SAMPLERS[name](prior, SampleOptions(), torch.arange(500), unknown)):
        assert not (move.reveal & ~masked).any()
        again = torch.zeros_like(masked) if move.mask is None else move.mask
        assert not (again & (masked | ~unknown)).any()
        masked = masked & ~move.reveal | again
        if name != "first_hitting":
            share = float(masked.sum() / unknown.sum())
            assert share == pytest.approx(math.cos((step + 1) / 10 * math.pi / 2), abs=0.02)
        else:
            assert move.reveal[100:].sum(1).eq(1).all()
    assert not masked.any()


def test_first_hitting_reveals_equal_groups():
    prior, unknown = AbsorbingPrior(Toy(), NUM_CLASSES), torch.ones(3, 12) > 0
    unknown[0, :6], unknown[1] = False, False
    moves = absorbing.first_hitting(prior, SampleOptions(steps=3), torch.arange(3), unknown)
    assert [move.reveal.sum(1).tolist() for move in moves] == [[2, 0, 4]] * 3


def test_network_is_asked_only_when_a_code_is_revealed():
    prior = AbsorbingPrior(Toy(), NUM_CLASSES)
    prior.sample(torch.zeros(1, dtype=torch.int64), SampleOptions(steps=1000), torch.arange(1))
    assert prior.backbone.calls == 3


# -- uniform and hybrid ------------------------------------------------------------------------------------------


def integrate(integrand) -> float:
    """Over time from 0 to 1 by Gauss-Legendre, with more points where codes are almost clean."""
    import numpy as np

    points, weights = np.polynomial.legendre.leggauss(48)
    points = (points + 1) / 2
    return sum(
        w / 2 * 3 * x**2 * integrand(torch.tensor([[x**3]], dtype=torch.float64)) for x, w in zip(points, weights)
    )


def expected_bound(parameterisation: str, network_leaves_one_out: bool, mask_share: float) -> float:
    """The bound of a prior whose network is a true one of either kind, summed over all codes and all noise."""
    toy = Toy(mask_share, network_leaves_one_out)
    prior = UniformPrior(toy, NUM_CLASSES, mask_share=mask_share, parameterisation=parameterisation, timed=True)
    noisy = toy.grid if mask_share else toy.sequences

    rows, columns = len(noisy), len(Toy.sequences)
    z, x = noisy.repeat_interleave(columns, 0), Toy.sequences.repeat(rows, 1)

    def at(time: Tensor) -> float:
        logits = toy(noisy, None, time=time[0].expand(rows))
        if parameterisation == "leave_one_out":
            logits = prior._times_likelihood(logits, noisy, 1 - time)
        nats = 0.0
        for level, (span, _) in zip(logits, toy.layout.spans()):
            posterior = level.softmax(-1).repeat_interleave(columns, 0)
            rate = bound_rate(posterior, x[:, span], z[:, span], 1 - time, torch.ones_like(time), mask_share)
            nats = nats + rate.sum(1)
        weights = Toy.joint * toy.noising(noisy, time[0]).prod(-1)
        return float((weights.flatten() * nats).sum())

    return integrate(at)


@pytest.mark.parametrize("mask_share", [0.0, 0.9])
def test_uniform_bound_is_the_entropy_for_its_own_parameterisation_only(mask_share):
    own = expected_bound("leave_one_out", True, mask_share), expected_bound("posterior", False, mask_share)
    assert own == pytest.approx((Toy.entropy, Toy.entropy), abs=1e-6)
    assert expected_bound("leave_one_out", False, mask_share) > Toy.entropy + 0.1
    assert expected_bound("posterior", True, mask_share) > Toy.entropy + 0.1


def test_bounds_of_one_code_have_the_known_values():
    """One code of entropy 1.2080 nats: Duo's bound is tight for p(x), and 1.8415 for the true p(x | z); the
    generalised Kullback-Leibler loss of flow matching (Shaul et al. 2024, arXiv:2412.03487) is 1.5670 there."""
    p = torch.tensor([0.5, 0.25, 0.15, 0.1], dtype=torch.float64)
    prior = UniformPrior(OneCode(), NUM_CLASSES)

    def terms(time: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        forward = (1 - time) * torch.eye(4, dtype=torch.float64) + time / 4  # q(z | x), rows are x
        weights = p[:, None] * forward
        return weights, (weights / weights.sum(0)).T, *torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")

    def duo(network: str):
        def at(time: Tensor) -> float:
            weights, posterior, x, z = terms(time)
            logits = (p.expand(4, 4) if network == "leave_one_out" else posterior).log()
            evidence = prior._times_likelihood([logits[:, None]], torch.arange(4)[:, None], 1 - time)[0].softmax(-1)
            x, z = x.flatten(), z.flatten()
            nats = bound_rate(evidence[z], x[:, None], z[:, None], 1 - time, torch.ones_like(time), 0.0)
            return float((weights.flatten() * nats[:, 0]).sum())

        return at

    def flow(time: Tensor) -> float:
        weights, posterior, x, z = terms(time)
        same = (x == z).double()
        nats = (same - posterior[z, z] - (1 - same) * posterior[z, x].log()) / time
        return float((weights * nats).sum())

    assert integrate(duo("leave_one_out")) == pytest.approx(float(-(p * p.log()).sum()), abs=1e-6)
    assert integrate(duo("posterior")) == pytest.approx(1.8415, abs=1e-4)
    assert integrate(flow) == pytest.approx(1.5670, abs=1e-4)


class OneCode(nn.Module):
    layout = CodeLayout(((1,),), (4,))


@pytest.mark.parametrize("mask_share, parameterisation", [(0.0, "leave_one_out"), (0.9, "posterior")])
def test_uniform_loss_and_likelihood_estimate_the_bound(mask_share, parameterisation, quick_noise):
    toy = Toy(mask_share, parameterisation == "leave_one_out")
    prior = UniformPrior(toy, NUM_CLASSES, mask_share=mask_share, parameterisation=parameterisation, timed=True)
    torch.manual_seed(0)
    codes = toy_batch(50_000)
    loss = prior.loss(codes, codes[:, 0])
    assert float(loss.total) == pytest.approx(Toy.entropy / 3, rel=5e-2)
    likelihood = prior.nll(codes[:10_000], codes[:10_000, 0])
    assert likelihood.kind == "bound"
    assert float(likelihood.nats.mean()) == pytest.approx(Toy.entropy, rel=3e-2)


def test_cross_entropy_has_its_share():
    codes, labels = random_codes(Toy.layout, 16), torch.zeros(16, dtype=torch.int64)
    uniform = torch.rand(16, 5, generator=torch.Generator().manual_seed(0))
    make_toy = lambda share: UniformPrior(  # noqa: E731
        Toy(0.5), NUM_CLASSES, mask_share=0.5, parameterisation="posterior", cross_entropy=share, timed=True
    )
    plain, half, whole = (make_toy(share).loss(codes, labels, uniform) for share in (0.0, 0.5, 1.0))
    torch.testing.assert_close(half.total, (plain.total + whole.total) / 2)
    torch.testing.assert_close(whole.total, whole.parts["cross_entropy"].float())
    with pytest.raises(ValueError, match="posterior"):
        UniformConfig(cross_entropy=0.1)


@pytest.mark.parametrize("mask_share", [0.0, 0.6])
def test_reverse_step_is_bayes_rule(mask_share):
    """q(z_s | z_t, x) is q(z_t | z_s) q(z_s | x) / q(z_t | x)."""
    alpha, later, size = torch.tensor(0.3).double(), torch.tensor(0.7).double(), 3
    states = torch.arange(-1 if mask_share else 0, size)
    pi = torch.where(states < 0, mask_share, (1 - mask_share) / size).double()
    generator = torch.Generator().manual_seed(0)
    for noisy, clean in itertools.product(states, range(size)):
        if noisy >= 0 and clean > 1:
            continue
        onward = alpha / later * (states == noisy) + (1 - alpha / later) * pi[states == noisy]
        law = onward * (later * (states == clean) + (1 - later) * pi)
        numbers = torch.rand(2, COUNT, generator=generator, dtype=torch.float64)
        drawn = reverse(
            noisy.expand(COUNT), torch.full((COUNT,), clean), alpha, later, *numbers, torch.tensor(size), mask_share
        )
        observed = torch.bincount(drawn - states[0], minlength=len(states)) / COUNT
        torch.testing.assert_close(observed.double(), law / law.sum(), atol=7e-3, rtol=0)


@pytest.mark.parametrize("mask_share, parameterisation", [(0.0, "leave_one_out"), (0.9, "posterior")])
def test_uniform_samplers_draw_the_joint_and_the_conditional(mask_share, parameterisation, quick_noise):
    def prior(toy: type[Toy]) -> UniformPrior:
        network = toy(mask_share, parameterisation == "leave_one_out")
        return UniformPrior(network, NUM_CLASSES, mask_share=mask_share, parameterisation=parameterisation, timed=True)

    assert chi_square(draw_many(prior(Pair), SampleOptions(steps=48)), Pair) < 4
    assert chi_square(draw_many(prior(Toy), SampleOptions(steps=8), KNOWN), Toy, CONDITIONAL) < 4


def test_a_mismatched_sampler_is_off_and_refused(quick_noise):
    wrong = UniformPrior(Toy(0.0, leave_one_out=False), NUM_CLASSES, parameterisation="leave_one_out", timed=True)
    assert chi_square(draw_many(wrong, SampleOptions(steps=8)), Toy) > 100
    labels, ids = torch.zeros(2, dtype=torch.int64), torch.arange(2)
    with pytest.raises(UserError, match="sampler=plug_in"):
        wrong.sample(labels, SampleOptions(sampler="mixture"), ids)
    with pytest.raises(UserError, match=r"'ancestral'.*plug_in, mixture"):
        wrong.sample(labels, SampleOptions(sampler="ancestral"), ids)
    with pytest.raises(UserError, match="first_hitting"):
        AbsorbingPrior(Toy(), NUM_CLASSES).sample(labels, SampleOptions(sampler="confidence"), ids)


def test_weights_carry_their_parameterisation():
    layout = CodeLayout(((2, 2),), (5,))
    weights = make("uniform", layout).state_dict()
    make("uniform", layout, trained=False).load_state_dict(weights)
    with pytest.raises(UserError, match="trained with leave_one_out"):
        make("uniform", layout, parameterisation="posterior").load_state_dict(weights)


# -- with the transformer ----------------------------------------------------------------------------------------


def samplers(kind: str) -> list[str]:
    return list(absorbing.SAMPLERS) if kind == "absorbing" else [""]


@LAYOUTS
@pytest.mark.parametrize("kind", ["absorbing", "uniform"])  # for a posterior, indifference is no good start
def test_untrained_likelihood_is_that_of_uniform_codes(kind, layout):
    codes = random_codes(layout, 200)
    likelihood = make(kind, layout, trained=False).nll(codes, torch.arange(200) % 4)
    assert float(likelihood.nats.mean()) == pytest.approx(layout.bits * math.log(2), rel=0.05)


@LAYOUTS
@KINDS
def test_likelihood_does_not_depend_on_the_batch(kind, layout):
    prior, codes, labels = make(kind, layout), random_codes(layout, 6), torch.tensor([0, 1, 2, 0, 1, 3])
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    whole = prior.nll(codes, labels).nats
    torch.testing.assert_close(prior.nll(codes[order], labels[order]).nats, whole[order], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(prior.nll(codes[2:3], labels[2:3]).nats, whole[2:3], rtol=1e-4, atol=1e-4)


@LAYOUTS
@KINDS
def test_loss_draws_belong_to_samples(kind, layout):
    prior, codes, labels = make(kind, layout, label_dropout=0.1), random_codes(layout, 8), torch.arange(8) % 3
    uniform = torch.rand(8, layout.length + 2, generator=torch.Generator().manual_seed(3))
    whole = prior.loss(codes, labels, uniform).total
    halves = [prior.loss(codes[part], labels[part], uniform[part]).total for part in (slice(4), slice(4, 8))]
    torch.testing.assert_close(sum(halves) / 2, whole)
    for extreme in (0.0, 1 - 2**-24):  # no number of [0, 1) is a problem
        loss = prior.loss(codes, labels, torch.full_like(uniform, extreme)).total
        loss.backward()
        assert loss.isfinite() and all(p.grad.isfinite().all() for p in prior.parameters() if p.grad is not None)
    dropped = uniform.clone()
    dropped[:, 0] = 0  # below label_dropout: the label no longer matters
    assert torch.equal(prior.loss(codes, labels, dropped).total, prior.loss(codes, labels * 0, dropped).total)


@LAYOUTS
@KINDS
def test_a_sample_depends_on_its_own_id_label_and_known_codes_only(kind, layout):
    prior, codes = make(kind, layout), random_codes(layout, 7)
    labels, ids, order = torch.tensor([0, 1, 2, 0, 1, 2, 3]), torch.arange(7), torch.tensor([6, 2, 0, 4, 1, 3, 5])
    known = torch.where(torch.rand(codes.shape, generator=torch.Generator().manual_seed(2)) < 0.5, codes, -1)
    known[0], known[1] = codes[0], -1  # all known, none known
    for name in samplers(kind):
        options = SampleOptions(guidance=2.0, guidance_schedule="linear", seed=5, sampler=name, top_p=0.95)
        whole = prior.sample(labels, options, ids, known)
        layout.check(whole)
        assert torch.equal(whole[known >= 0], codes[known >= 0])
        assert torch.equal(prior.sample(labels[order], options, ids[order], known[order]), whole[order])
        single = [prior.sample(labels[i : i + 1], options, ids[i : i + 1], known[i : i + 1]) for i in (2, 4)]
        assert torch.equal(torch.cat(single), whole[[2, 4]])
        assert torch.equal(prior.sample(labels[1:2], options, ids[1:2]), whole[1:2])
        assert not torch.equal(prior.sample(labels, options, ids + 7, known), whole)


@KINDS
def test_guidance_of_one_is_none_and_the_unconditional_has_none(kind):
    layout = CodeLayout(((2, 3),), (7,))
    prior, labels, ids = make(kind, layout), torch.arange(32) % 3, torch.arange(32)
    for name in samplers(kind):
        plain, strong = SampleOptions(sampler=name), SampleOptions(sampler=name, guidance=9.0)
        one = SampleOptions(sampler=name, guidance=1.0, guidance_schedule="linear")
        assert torch.equal(prior.sample(labels, one, ids), prior.sample(labels, plain, ids))
        assert not torch.equal(prior.sample(labels, strong, ids), prior.sample(labels, plain, ids))
        nobody = torch.full_like(labels, NUM_CLASSES)
        assert torch.equal(prior.sample(nobody, strong, ids), prior.sample(nobody, plain, ids))


@KINDS
def test_priors_are_given_codes_of_other_levels(kind):
    layout, top = CodeLayout(((2, 4),), (5,)), CodeLayout(((1, 2),), (9,))
    prior = PRIORS[kind].build(layout, NUM_CLASSES, given=top)
    codes, labels, given = random_codes(layout, 4), torch.arange(4), random_codes(top, 4)
    for head in prior.backbone.heads:
        nn.init.normal_(head.weight, std=0.5)
    prior.loss(codes, labels, given=given).total.backward()
    assert prior.backbone.tokens.weight.grad.abs().sum() > 0
    nats = prior.eval().nll(codes, labels, given).nats
    assert not torch.equal(nats, prior.nll(codes, labels, (given + 1) % 9).nats)
    for name in samplers(kind):
        options = SampleOptions(guidance=2.0, sampler=name)
        layout.check(prior.sample(labels, options, torch.arange(4), given=given))


@KINDS
def test_training_learns_four_sequences(kind):
    layout = CodeLayout(((1, 2), (2, 2)), (5, 9))
    codes, labels = random_codes(layout, 4), torch.zeros(4, dtype=torch.int64)
    prior = make(kind, layout, trained=False, label_dropout=0.0).train()
    optimizer = torch.optim.AdamW(prior.parameters(), lr=5e-3)
    for _ in range(80):
        optimizer.zero_grad()
        prior.loss(codes.repeat(12, 1), labels.repeat(12)).total.backward()
        nn.utils.clip_grad_norm_(prior.parameters(), 1.0)
        optimizer.step()
    unused = [name for name, parameter in prior.named_parameters() if parameter.grad is None]
    assert not unused
    drawn = prior.sample(labels.repeat(16), SampleOptions(steps=32), torch.arange(64))
    share = (drawn[:, None] == codes[None]).all(-1).any(1).float().mean()
    assert share > 0.6


@pytest.mark.parametrize(
    "config, wrong, message",
    [
        (AbsorbingConfig, {"schedule": "cosin"}, "cosin"),
        (AbsorbingConfig, {"eta": 1.5}, "eta"),
        (AbsorbingConfig, {"steps": 0}, "steps"),
        (AbsorbingConfig, {"label_dropout": 1.0}, "label_dropout"),
        (UniformConfig, {"parameterisation": "both"}, "leave_one_out, posterior"),
        (UniformConfig, {"mask_share": 1.0}, "mask_share"),
        (UniformConfig, {"cross_entropy": -1.0}, "cross_entropy"),
        (UniformConfig, {"steps": 0}, "steps"),
    ],
)
def test_settings_are_checked(config, wrong, message):
    with pytest.raises(ValueError, match=message):
        config(**wrong)
    assert 0 < 1 - LATEST < 0.01
