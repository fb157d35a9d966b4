"""Laws of the discrete diffusions: bounds meet closed forms, samplers draw the joint
distribution."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from priors.backbone import BackboneConfig
from priors.decoding.parallel import reading
from priors.families import absorbing
from priors.families.absorbing import AbsorbingConfig, AbsorbingPrior, mask_some
from priors.families.any_order_bound import masked_nats
from priors.families.diffusion import antithetic, draws, inverse_cdf, share_and_rate
from priors.families.noising import bound_rate, gidd, mixture, transition
from priors.families.uniform import LATEST, UniformConfig, UniformPrior
from priors.interface import SampleOptions
from priors.sampling.schedules import SCHEDULES
from tokenizer.interface import CodeLayout
from training.errors import UserError

NUM_CLASSES = 3
LAYOUTS = pytest.mark.parametrize(
    "layout",
    [CodeLayout(((2, 3),), (7,)), CodeLayout(((1, 2), (2, 2)), (5, 9))],
    ids=["one_level", "two_levels"],
)
SMALL = BackboneConfig(dim=32, depth=2, heads=2, dropout=0.0)
PRIORS = {
    "absorbing": AbsorbingConfig(backbone=SMALL, steps=8),
    "uniform": UniformConfig(backbone=SMALL, steps=8),
    "gidd": UniformConfig(backbone=SMALL, steps=8, mask_share=0.8),
    "mixture": UniformConfig(
        backbone=SMALL,
        steps=8,
        mask_share=0.9,
        noise="mixture",
        parameterisation="posterior",
        cross_entropy=0.01,
    ),
}
KINDS = pytest.mark.parametrize("kind", PRIORS)
COUNT = 100_000


class Toy(nn.Module):
    """The true network for a joint distribution over three codes on two grids, of 2 and 3 codes.

    Codes are independent draws of q(z | x) as of `probabilities`, or, without time, clean and
    hidden by -1. The logits of position i are of p(x_i | z), or of p(x_i | z without z_i).
    """

    timed = True
    layout = CodeLayout(((1, 1), (1, 2)), (2, 3))
    sequences = torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(3))
    joint = (0.6 * torch.randn(18, generator=torch.Generator().manual_seed(6)).double()).softmax(0)
    entropy = float(-(joint * joint.log()).sum())

    def __init__(
        self, mask_share: float = 1.0, leave_one_out: bool = False, noise: str = "mixture"
    ) -> None:
        super().__init__()
        self.mask_share, self.leave_one_out, self.noise, self.calls = (
            mask_share,
            leave_one_out,
            noise,
            0,
        )
        self.sizes = self.sequences.amax(0) + 1
        self.grid = torch.cartesian_prod(*[torch.arange(-1, size) for size in self.sizes])

    def forward(
        self, codes: Tensor, labels: Tensor, *, given: None = None, time: Tensor | None = None
    ) -> list[Tensor]:
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
        alpha, mask, code = probabilities(self.noise, self.mask_share, time.double()[:, None, None])
        return alpha * same + torch.where(hidden, mask, code / self.sizes)


def probabilities(noise: str, mask_share: float, time: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """That a code stays, is masked, or is any code: D3PM's mixture, or GIDD's with p_u at t = 1/2
    (eq. 8 to 11)."""
    if noise == "mixture":
        return 1 - time, mask_share * time, (1 - mask_share) * time
    p_u = (1 - mask_share) / (1 + mask_share)
    code = 2 * p_u / (1 - p_u) * (time * (1 - time)).sqrt()  # N c_t
    return (1 - time) / (1 + code), time / (1 + code), code / (1 + code)


class Pair(Toy):
    """Two codes."""

    layout = CodeLayout(((1, 1), (1, 1)), (2, 3))
    sequences = torch.cartesian_prod(torch.arange(2), torch.arange(3))
    joint = torch.tensor([0.22, 0.15, 0.13, 0.12, 0.16, 0.22], dtype=torch.float64)


def index(codes: Tensor, sizes: Tensor) -> Tensor:
    """Row of each code sequence among all sequences."""
    return (codes * sizes.flip(0).cumprod(0).flip(0) // sizes).sum(1)


def chi_square(codes: Tensor, toy: type[Toy], probabilities: Tensor | None = None) -> float:
    """Standard deviations above its mean of the statistic of draws from the toy's joint, or other
    `probabilities`."""
    probabilities = toy.joint if probabilities is None else probabilities
    counts = torch.bincount(
        index(codes, toy.sequences.amax(0) + 1), minlength=len(toy.joint)
    ).double()
    possible = probabilities > 0
    assert counts[~possible].sum() == 0
    expected = probabilities[possible] * len(codes)
    freedom = len(expected) - 1
    return float(
        (((counts[possible] - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom)
    )


@pytest.fixture
def quick_noise(monkeypatch):
    """Noise of a batch at once: a generator per sample takes longer than all the rest."""

    def noise(seed: int, ids: Tensor, stream: int, shape: tuple[int, ...]) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * seed + stream)
        return torch.rand((len(ids), *shape), generator=generator, dtype=torch.float64).clamp_min(
            1e-300
        )

    monkeypatch.setattr("priors.families.absorbing.uniform_noise", noise)
    monkeypatch.setattr("priors.families.diffusion.uniform_noise", noise)
    monkeypatch.setattr("priors.families.any_order_bound.uniform_noise", noise)


def draw_many(
    prior, options: SampleOptions, known: list[int] | None = None, count: int = COUNT
) -> Tensor:
    known = None if known is None else torch.tensor(known).expand(count, -1)
    return prior.sample(torch.zeros(count, dtype=torch.int64), options, torch.arange(count), known)


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
        modulations = [
            block.modulation for block in prior.backbone.blocks if block.modulation is not None
        ]
        for layer in (*prior.backbone.heads, *modulations):
            nn.init.normal_(layer.weight, std=0.2)
    return prior.eval()


def random_codes(layout: CodeLayout, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    sizes = zip(layout.lengths, layout.num_codes)
    return torch.cat([torch.randint(k, (count, n), generator=generator) for n, k in sizes], 1)


# -- the clock
# ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
def test_rate_is_the_slope_of_the_share_and_finite_at_the_ends(name):
    progress = torch.tensor([0.0, 0.3, 0.7, 1.0], dtype=torch.float64)
    with torch.no_grad():
        share, rate = share_and_rate(SCHEDULES[name], progress)
    difference = SCHEDULES[name](progress[1:3] - 1e-6) - SCHEDULES[name](progress[1:3] + 1e-6)
    torch.testing.assert_close(rate[1:3], difference / 2e-6)
    assert (rate > 0).all() and rate.isfinite().all() and (share > 0).all()


def test_the_ends_of_the_clock_are_half_the_least_step_of_a_float32_away():
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    share, rate = share_and_rate(SCHEDULES["square_root"], ends)
    near = torch.tensor([2**-25, 1 - 2**-25], dtype=torch.float64)
    torch.testing.assert_close(share, 1 - near.sqrt(), rtol=1e-9, atol=0)
    torch.testing.assert_close(rate, 0.5 / near.sqrt())


def test_antithetic_times_fill_the_batch_and_belong_to_places():
    uniform = torch.rand(64, 5, generator=torch.Generator().manual_seed(0))
    positions = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    uniform[positions == 63, 1] = 1 - 2**-24
    whole = antithetic(uniform, positions, 64)
    assert torch.equal((whole[:, 1] * 64).long().sort().values, torch.arange(64))
    assert whole[:, 1].max() < 1
    torch.testing.assert_close(whole[:, 1], (positions + uniform[:, 1]) / 64)
    assert torch.equal(whole[:, [0, 2, 3, 4]], uniform[:, [0, 2, 3, 4]])
    assert torch.equal(
        torch.cat([antithetic(uniform[i : i + 16], positions[i : i + 16], 64) for i in (0, 16)]),
        whole[:32],
    )
    alone = draws(None, torch.zeros(8, 3))
    assert alone.shape == (8, 5) and torch.equal((alone[:, 1] * 8).long(), torch.arange(8))


def test_inverse_cdf_draws_the_law_and_never_the_impossible():
    probabilities = torch.tensor([0.0, 0.5, 0.0, 1.5, 0.0], dtype=torch.float64)
    noise = torch.tensor([5e-324, 0.249, 0.251, 1 - 2**-53], dtype=torch.float64)
    assert inverse_cdf(probabilities.expand(4, 5), noise).tolist() == [1, 1, 3, 3]


# -- absorbing
# ---------------------------------------------------------------------------------------------------


def test_absorbing_bound_is_the_entropy_when_conditionals_are_exact():
    total = 0.0
    for mask in itertools.product([False, True], repeat=3):
        if any(mask):
            nats = masked_nats(
                reading(Toy(), None), Toy().layout, Toy.sequences, torch.tensor(mask).expand(18, -1)
            )
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
        chance[0],
        torch.tensor(-math.expm1(3 * math.log1p(-min(share, 1 - 1e-16))), dtype=torch.float64),
    )
    sizes = torch.bincount(masked.sum(1), minlength=4)[1:] / COUNT
    expected = [
        math.comb(3, k) * share**k * (1 - share) ** (3 - k) / float(chance[0]) for k in (1, 2, 3)
    ]
    torch.testing.assert_close(
        sizes.double(), torch.tensor(expected, dtype=torch.float64), atol=5e-3, rtol=0
    )
    torch.testing.assert_close(
        masked.double().mean(0), masked.double().mean().expand(3), atol=5e-3, rtol=0
    )


KNOWN = [-1, 2, -1]
CONDITIONAL = Toy.joint * (Toy.sequences[:, 1] == 2) / Toy.joint[Toy.sequences[:, 1] == 2].sum()


@pytest.mark.parametrize(
    "name, steps", [("first_hitting", 0), ("ancestral", 100), ("remasking", 64)]
)
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
    for step, move in enumerate(
        absorbing.SAMPLERS[name](prior, SampleOptions(), torch.arange(500), unknown)
    ):
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


# -- uniform and hybrid
# ------------------------------------------------------------------------------------------


NOISES = pytest.mark.parametrize(
    "mask_share, noise", [(0.0, "mixture"), (0.9, "mixture"), (0.7, "gidd")]
)


def integrate(integrand) -> float:
    """Over time from 0 to 1 by Gauss-Legendre, with more points at both ends, where GIDD's noise is
    a root of time."""
    import numpy as np

    points, weights = np.polynomial.legendre.leggauss(64)
    total = 0.0
    for x, w in zip((points + 1) / 2, weights / 2):
        below, above = x**4, (1 - x) ** 4
        slope = 4 * (x * (1 - x)) ** 3 / (below + above) ** 2
        total += (
            w * slope * integrand(torch.tensor([[below / (below + above)]], dtype=torch.float64))
        )
    return total


def uniform_prior(network: nn.Module, **settings) -> UniformPrior:
    return UniformPrior(network, NUM_CLASSES, **{"noise": "mixture", **settings})


def expected_bound(
    parameterisation: str, network_leaves_one_out: bool, mask_share: float, noise: str
) -> float:
    """The bound of a prior whose network is a true one of either kind, summed over all codes and
    all noise."""
    toy = Toy(mask_share, network_leaves_one_out, noise)
    prior = uniform_prior(
        toy, mask_share=mask_share, noise=noise, parameterisation=parameterisation
    )
    noisy = toy.grid if mask_share else toy.sequences

    rows, columns = len(noisy), len(Toy.sequences)
    z, x = noisy.repeat_interleave(columns, 0), Toy.sequences.repeat(rows, 1)

    def at(time: Tensor) -> float:
        logits, level = toy(noisy, None, time=time[0].expand(rows)), prior.noise.at(time)
        if parameterisation == "leave_one_out":
            logits = prior._times_likelihood(logits, noisy, level)
        nats = 0.0
        for logit, (span, _) in zip(logits, toy.layout.spans()):
            posterior = logit.softmax(-1).repeat_interleave(columns, 0)
            speed = 1 / (time * (1 - time))
            nats = nats + bound_rate(
                posterior, x[:, span], z[:, span], level, speed, prior.noise.power
            ).sum(1)
        weights = Toy.joint * toy.noising(noisy, time[0]).prod(-1)
        return float((weights.flatten() * nats).sum())

    return integrate(at)


@NOISES
def test_uniform_bound_is_the_entropy_for_its_own_parameterisation_only(mask_share, noise):
    own = [
        expected_bound(*kind, mask_share, noise)
        for kind in (("leave_one_out", True), ("posterior", False))
    ]
    assert own == pytest.approx([Toy.entropy, Toy.entropy], abs=1e-6)
    assert expected_bound("leave_one_out", False, mask_share, noise) > Toy.entropy + 0.1
    assert expected_bound("posterior", True, mask_share, noise) > Toy.entropy + 0.1


@NOISES
def test_noise_is_what_the_papers_say(mask_share, noise):
    times = torch.tensor([0.0, 1e-6, 0.3, 0.5, 0.999, 1.0], dtype=torch.float64)
    prior = uniform_prior(Toy(mask_share, noise=noise), mask_share=mask_share, noise=noise)
    for found, expected in zip(prior.noise.at(times), probabilities(noise, mask_share, times)):
        torch.testing.assert_close(found, expected)
    if noise == "gidd":
        alpha, mask, code = prior.noise.at(torch.tensor([0.0, 0.5, 1.0]))
        assert code[0] == code[2] == 0 and mask[2] == 1
        assert float(mask[1] / (1 - alpha[1])) == pytest.approx(mask_share)


def test_bounds_of_one_code_have_the_known_values():
    """One code of entropy 1.2080 nats: Duo's bound is tight for p(x), and 1.8415 for the true p(x |
    z); the generalised Kullback-Leibler loss of flow matching (Shaul et al. 2024, arXiv:2412.03487)
    is 1.5670 there."""
    p = torch.tensor([0.5, 0.25, 0.15, 0.1], dtype=torch.float64)
    prior = uniform_prior(OneCode())

    def terms(time: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        forward = (1 - time) * torch.eye(4, dtype=torch.float64) + time / 4  # q(z | x), rows are x
        weights = p[:, None] * forward
        return (
            weights,
            (weights / weights.sum(0)).T,
            *torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij"),
        )

    def duo(network: str):
        def at(time: Tensor) -> float:
            weights, posterior, x, z = terms(time)
            logits = (p.expand(4, 4) if network == "leave_one_out" else posterior).log()
            level = prior.noise.at(time)
            evidence = prior._times_likelihood([logits[:, None]], torch.arange(4)[:, None], level)[
                0
            ].softmax(-1)
            x, z = x.flatten(), z.flatten()
            nats = bound_rate(evidence[z], x[:, None], z[:, None], level, 1 / (time * (1 - time)))
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
    layout, timed = CodeLayout(((1,),), (4,)), True


EXACT = pytest.mark.parametrize(
    "mask_share, noise, parameterisation",
    [
        (0.0, "mixture", "leave_one_out"),
        (0.9, "mixture", "posterior"),
        (0.7, "gidd", "leave_one_out"),
    ],
)


@EXACT
def test_uniform_loss_and_likelihood_estimate_the_bound(
    mask_share, noise, parameterisation, quick_noise
):
    toy = Toy(mask_share, parameterisation == "leave_one_out", noise)
    prior = uniform_prior(
        toy, mask_share=mask_share, noise=noise, parameterisation=parameterisation
    )
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
    make_toy = lambda share: uniform_prior(  # noqa: E731
        Toy(0.5), mask_share=0.5, parameterisation="posterior", cross_entropy=share
    )
    plain, half, whole = (make_toy(share).loss(codes, labels, uniform) for share in (0.0, 0.5, 1.0))
    torch.testing.assert_close(half.total, (plain.total + whole.total) / 2)
    torch.testing.assert_close(whole.total, whole.parts["cross_entropy"].float())
    with pytest.raises(ValueError, match="posterior"):
        UniformConfig(cross_entropy=0.1)


def bayes(
    posterior: Tensor, noisy: Tensor, q_now: Tensor, q_later: Tensor, onward: Tensor
) -> Tensor:
    """Mean over p(x | z_t), (K,), of q(z_s | z_t, x) = q(z_t | z_s) q(z_s | x) / q(z_t | x), for
    one z_t."""
    return sum(p * onward[:, noisy] * q_later[x] / q_now[x, noisy] for x, p in enumerate(posterior))


def tables(
    noise: str, mask_share: float, size: int, t: float, s: float
) -> tuple[Tensor, Tensor, Tensor]:
    """q(z_t | x), q(z_s | x), (K, K + 1), and q(z_t | z_s), (K + 1, K + 1), the mask last, by
    solving for the last."""

    def marginal(time: float) -> tuple[float, Tensor]:
        alpha, mask, code = probabilities(
            noise, mask_share, torch.tensor(time, dtype=torch.float64)
        )
        return alpha, torch.cat([(code / size).expand(size), mask[None]])

    eye = torch.eye(size + 1, dtype=torch.float64)
    (alpha_t, noise_t), (alpha_s, noise_s) = marginal(t), marginal(s)
    onward = alpha_t / alpha_s * eye + (noise_t - alpha_t / alpha_s * noise_s)
    now, later = alpha_t * eye[:size] + noise_t, alpha_s * eye[:size] + noise_s
    assert (onward >= 0).all()
    torch.testing.assert_close(later @ onward, now)  # Chapman and Kolmogorov
    return now, later, onward


@NOISES
@pytest.mark.parametrize("s", [0.0, 0.3])
def test_a_reverse_step_is_bayes_rule(s, mask_share, noise):
    t, size = 0.7, 3
    now, later, onward = tables(noise, mask_share, size, t, s)
    posteriors = torch.rand(
        size + 1, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    posteriors /= posteriors.sum(1, keepdim=True)
    schedule = (gidd if noise == "gidd" else mixture)(mask_share)
    levels = [schedule.at(torch.tensor(time, dtype=torch.float64)) for time in (t, s)]
    for noisy, posterior in enumerate(posteriors[: size + (mask_share > 0)]):
        code = torch.tensor([[-1 if noisy == size else noisy]])
        law = transition(posterior.log()[None, None], code, *levels)[0, 0].exp()
        torch.testing.assert_close(law, bayes(posterior, noisy, now, later, onward))
        assert float(law.sum()) == pytest.approx(1)


class Labelled(nn.Module):
    """The true network of two codes whose joint depends on the label: `Pair`, and another without a
    label."""

    layout, timed = CodeLayout(((1, 1), (1, 1)), (2, 3)), True

    def __init__(self, mask_share: float, noise: str, leave_one_out: bool) -> None:
        super().__init__()
        self.toys = [Pair(mask_share, leave_one_out, noise), Pair(mask_share, leave_one_out, noise)]
        self.toys[1].joint = torch.tensor([0.05, 0.25, 0.1, 0.3, 0.1, 0.2], dtype=torch.float64)

    def forward(
        self, codes: Tensor, labels: Tensor, *, given: None = None, time: Tensor
    ) -> list[Tensor]:
        both = [toy(codes, labels, time=time) for toy in self.toys]
        return [torch.where((labels < NUM_CLASSES)[:, None, None], *pair) for pair in zip(*both)]


def guided_step(network: Labelled, noisy: Tensor, t: float, s: float, scale: float) -> list[Tensor]:
    """q(z_s | z_t) of both codes of one z_t (2,), the mask last, by enumeration: a normalised
    product of powers.

    A mask stays one as often as without guidance.
    """
    laws = []
    for toy in network.toys:
        weights = toy.joint * toy.noising(noisy[None], torch.tensor([t])).prod(-1)[0]
        for position, size in enumerate((2, 3)):
            now, later, onward = tables(toy.noise, toy.mask_share, size, t, s)
            own = torch.stack(
                [weights[toy.sequences[:, position] == code].sum() for code in range(size)]
            )
            laws.append(
                bayes(own / own.sum(), int(noisy[position]) % (size + 1), now, later, onward)
            )
    steps = []
    for position, size in enumerate((2, 3)):
        conditional, unconditional = laws[position], laws[position + 2]
        product = conditional**scale * unconditional ** (1 - scale)
        product = torch.where(conditional > 0, product, 0)
        if noisy[position] < 0:
            product[size] = 0
            product = (1 - conditional[size]) * product / product.sum()
            product[size] = conditional[size]
        steps.append(product / product.sum())
    return steps


@EXACT
@pytest.mark.parametrize("t, s", [(1.0, 0.6), (0.6, 0.2), (0.2, 0.0)])
def test_guidance_mixes_reverse_steps_as_udlm_does(t, s, mask_share, noise, parameterisation):
    """Of every z_t; by x_0 the two-code toy is off by 0.02 and more in total variation."""
    network = Labelled(mask_share, noise, parameterisation == "leave_one_out")
    prior = uniform_prior(
        network, mask_share=mask_share, noise=noise, parameterisation=parameterisation
    )
    noisy = network.toys[0].grid if mask_share else network.toys[0].sequences
    noisy = noisy[(noisy < 0).all(1)] if noise == "gidd" and t == 1 else noisy
    options, labels = SampleOptions(guidance=2.5), torch.zeros(len(noisy), dtype=torch.int64)
    both = torch.cat([labels, labels + NUM_CLASSES])
    logits = network(noisy.repeat(2, 1), both, time=torch.full((2 * len(noisy),), t))
    levels = [prior.noise.at(torch.tensor(time, dtype=torch.float64)) for time in (t, s)]
    for scale in (2.5, 1.0):
        found = prior._transitions(logits, noisy, *levels, options, scale)
        for row, z in enumerate(noisy):
            for law, expected in zip(found, guided_step(network, z, t, s, scale)):
                torch.testing.assert_close(law[row, 0], expected, atol=1e-9, rtol=1e-6)


@EXACT
def test_guided_samples_follow_the_guided_steps(mask_share, noise, parameterisation, quick_noise):
    """Two steps with s = 1.5, then 2, by the products of their tables."""
    network = Labelled(mask_share, noise, parameterisation == "leave_one_out")
    prior = uniform_prior(
        network, mask_share=mask_share, noise=noise, parameterisation=parameterisation
    )
    grid = network.toys[0].grid
    law = (
        network.toys[0].noising(grid, torch.ones(1))[:, 0].prod(-1)
    )  # at t = 1, where x plays no part
    for t, s, scale in ((1.0, 0.5, 1.5), (0.5, 0.0, 2.0)):
        after = torch.zeros_like(law)
        for z, chance in zip(grid, law.tolist()):
            if chance > 0:
                first, second = guided_step(network, z, t, s, scale)
                after += (
                    chance * torch.outer(first.roll(1), second.roll(1)).flatten()
                )  # the mask first, as in the grid
        law = after
    assert (law[(grid < 0).any(1)] == 0).all()
    drawn = draw_many(prior, SampleOptions(guidance=2.0, guidance_schedule="linear", steps=2))
    assert chi_square(drawn, Pair, law[(grid >= 0).all(1)]) < 4


class Blind(Pair):
    """A network that does not see the time: what is true at t = 0.3."""

    timed = False

    def forward(self, codes: Tensor, labels: Tensor, *, given: None = None) -> list[Tensor]:
        return super().forward(codes, labels, time=torch.full((len(codes),), 0.3))


@EXACT
def test_a_bound_is_finite_and_above_the_likelihood_of_its_model(
    mask_share, noise, parameterisation, quick_noise
):
    """The model's own likelihood is that of its jump process from t = 1 to LATEST, solved for, and
    of the codes read off there. A network without time has an infinite bound down to t = 0; that of
    a true network is tight."""
    for kind in (Blind, Pair):
        network = kind(mask_share, parameterisation == "leave_one_out", noise)
        prior = uniform_prior(
            network, mask_share=mask_share, noise=noise, parameterisation=parameterisation
        )
        nats, bound = solve(prior, network)
        assert float((-nats).exp().sum()) == pytest.approx(1, abs=1e-9)
        assert (bound > nats - 2e-5).all() and bound.isfinite().all()
        excess = (Pair.joint * torch.stack([nats, bound])).sum(1) + float(
            (Pair.joint * Pair.joint.log()).sum()
        )
        if kind is Pair:
            assert float(excess[0]) < 1e-6 and float(excess[1].abs()) < 1e-4
            continue
        assert 1e-4 < excess[0] < excess[1] - 5e-4
        codes = Pair.sequences.repeat_interleave(3_000, 0)
        found = prior.nll(codes, torch.zeros(len(codes), dtype=torch.int64)).nats
        torch.testing.assert_close(found.view(6, -1).mean(1), bound, rtol=0.03, atol=0)


@EXACT
def test_what_is_lost_in_reading_codes_off_is_in_the_bound(
    mask_share, noise, parameterisation, quick_noise, monkeypatch
):
    """Read off at t = 0.3 it is a good part, in the likelihood and in the loss."""
    monkeypatch.setattr("priors.families.uniform.LATEST", 0.7)
    monkeypatch.setitem(globals(), "LATEST", 0.7)
    network = Blind(mask_share, parameterisation == "leave_one_out", noise)
    prior = uniform_prior(
        network, mask_share=mask_share, noise=noise, parameterisation=parameterisation
    )
    _, bound = solve(prior, network)
    codes = Pair.sequences.repeat_interleave(2_000, 0)
    found = prior.nll(codes, codes[:, 0]).nats.view(6, -1).mean(1)
    torch.testing.assert_close(found, bound, rtol=0.04, atol=0)
    torch.manual_seed(0)
    codes = Pair.sequences.repeat_interleave((Pair.joint * 60_000).long(), 0)
    codes = codes[torch.randperm(len(codes))]
    assert float(prior.loss(codes, codes[:, 0]).total) * 2 == pytest.approx(
        float((Pair.joint * bound).sum()), rel=0.03
    )


def solve(prior: UniformPrior, network: Pair) -> tuple[Tensor, Tensor]:
    """-log p(x) of the model and its bound, of all x, on a grid of log(t / (1 - t)), by the rates
    of Campbell et al."""
    sizes, grid, count = (2, 3), network.grid if network.mask_share else Pair.sequences, 250
    first, last = math.log((1 - LATEST) / LATEST), 14.0
    step = (last - first) / count
    middles = last - step * (torch.arange(count).double() + 0.5)
    law, bound = (
        network.noising(grid, torch.ones(1, dtype=torch.float64))[:, 0].prod(-1),
        torch.zeros(6),
    )

    def predicted(time: Tensor) -> list[Tensor]:
        logits = network(grid, None, **({"time": time.expand(len(grid))} if network.timed else {}))
        if prior.parameterisation == "posterior":
            return [level[:, 0].softmax(-1) for level in logits]
        alpha, mask, code = probabilities(network.noise, network.mask_share, time)
        levels = []
        for level, z, size in zip(logits, grid.T, sizes):
            likely = alpha * F.one_hot(z.clamp_min(0), size) + code / size
            weights = level[:, 0].softmax(-1) * torch.where(z[:, None] < 0, mask, likely)
            levels.append(weights / weights.sum(1, keepdim=True))
        return levels

    for middle in middles:
        time = torch.sigmoid(middle)
        posteriors = predicted(time)
        alpha, mask, code = probabilities(network.noise, network.mask_share, time)
        power = 0.5 if network.noise == "gidd" else 1.0
        model = torch.zeros(len(grid), len(grid), dtype=torch.float64)
        true = torch.zeros(6, len(grid), len(grid), dtype=torch.float64)
        for position, (size, posterior) in enumerate(zip(sizes, posteriors)):
            z, others = grid[:, position], grid[:, 1 - position]
            near = (others[:, None] == others) & (z[:, None] != z)
            chance = torch.where(z[:, None] < 0, mask, code / size).expand(-1, size)
            chance = chance + alpha * (z[:, None] == torch.arange(size))  # q(z | x)
            speed = torch.where(z < 0, mask, power * code / size)
            ratio = chance[None] / chance[:, None]  # q(j | x) / q(z | x) at [z, j]
            model += near * speed[:, None] * (ratio * posterior[:, None]).sum(-1)
            true += near * speed[:, None] * ratio[..., Pair.sequences[:, position]].permute(2, 0, 1)
        terms = torch.where(true > 0, model - true + true * (true / model).log(), model)
        weights = network.noising(grid, time[None]).prod(-1).T  # (x, z)
        bound = bound + step * (weights[:, :, None] * terms).sum((1, 2))
        law = law @ torch.matrix_exp(step * (model - torch.diag(model.sum(1))))
    first_code, second_code = predicted(torch.tensor(1 - LATEST, dtype=torch.float64))
    read = (
        first_code[:, Pair.sequences[:, 0]] * second_code[:, Pair.sequences[:, 1]]
    )  # p(x | z), (z, x)
    weights = network.noising(grid, torch.tensor([1 - LATEST], dtype=torch.float64)).prod(-1)
    return -(law @ read).log(), bound - (weights * read.log()).sum(0)


def test_time_conditioning_reaches_the_entropy_that_a_network_without_it_cannot():
    """Two equal codes of three, most of the time: the transformer is trained on the exact bound of
    all z and times."""
    layout = CodeLayout(((1, 2),), (3,))
    sequences = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    joint = torch.where(sequences[:, 0] == sequences[:, 1], 0.31, 0.07 / 6).double()
    entropy = float(-(joint * joint.log()).sum())
    odds = torch.linspace(-6.5, 6.5, 14, dtype=torch.float64)
    times = torch.sigmoid(odds).repeat_interleave(9)[:, None]
    noisy, step = sequences.repeat(14, 1), float(odds[1] - odds[0])
    z, x = noisy.repeat_interleave(9, 0), sequences.repeat(len(noisy), 1)
    chance = torch.where(
        z == x, 1 - times.repeat_interleave(9, 0) * 2 / 3, times.repeat_interleave(9, 0) / 3
    ).prod(1)
    found = {}
    for timed in (True, False):
        torch.manual_seed(0)
        config = UniformConfig(
            backbone=BackboneConfig(32, 1, 2, dropout=0.0), time_conditioning=timed
        )
        prior = config.build(layout, NUM_CLASSES)
        level = prior.noise.at(times)
        wide = type(level)(*(part.repeat_interleave(9, 0) for part in level))
        optimizer = torch.optim.Adam(prior.parameters(), lr=5e-3)
        labels = torch.zeros(len(noisy), dtype=torch.int64)
        for _ in range(100):
            optimizer.zero_grad()
            logits = [each.double() for each in prior._predict(labels, None, noisy, times[:, 0])]
            evidence = (
                prior._times_likelihood(logits, noisy, level)[0].softmax(-1).repeat_interleave(9, 0)
            )
            rates = bound_rate(evidence, x, z, wide, torch.ones_like(wide.alpha))
            bound = step * (joint.repeat(len(noisy)) * chance * rates.sum(1)).sum()
            bound.backward()
            optimizer.step()
        found[timed] = float(bound.detach()) / entropy
    assert found[True] == pytest.approx(1, abs=0.01) and found[False] > 1.05


@EXACT
def test_uniform_samplers_draw_the_joint_and_the_conditional(
    mask_share, noise, parameterisation, quick_noise
):
    def prior(toy: type[Toy]) -> UniformPrior:
        network = toy(mask_share, parameterisation == "leave_one_out", noise)
        return uniform_prior(
            network, mask_share=mask_share, noise=noise, parameterisation=parameterisation
        )

    assert chi_square(draw_many(prior(Pair), SampleOptions(steps=48), count=50_000), Pair) < 4
    assert (
        chi_square(draw_many(prior(Toy), SampleOptions(steps=8), KNOWN, 50_000), Toy, CONDITIONAL)
        < 4
    )


def test_a_mismatched_sampler_is_off_and_refused(quick_noise):
    wrong = uniform_prior(Toy(0.0, leave_one_out=False), parameterisation="leave_one_out")
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
    with pytest.raises(
        UserError, match=r"prior\.noise=mixture, but these weights were trained with gidd"
    ):
        make("gidd", layout, noise="mixture").load_state_dict(make("gidd", layout).state_dict())
    assert int(weights["meaning"]) == 0  # as of weights from before there was a choice of noise
    assert int(make("mixture", layout).state_dict()["meaning"]) == 1


def test_weights_trained_without_time_are_refused_by_a_prior_with_it():
    layout = CodeLayout(((2, 2),), (5,))
    blind, timed = make("uniform", layout, time_conditioning=False), make("uniform", layout)
    for prior, weights, value in ((timed, blind, "false"), (blind, timed, "true")):
        with pytest.raises(UserError, match=f"were trained with {value}: set that"):
            prior.load_state_dict(weights.state_dict())


# -- with the transformer
# ----------------------------------------------------------------------------------------


def samplers(kind: str) -> list[str]:
    return list(absorbing.SAMPLERS) if kind == "absorbing" else [""]


@LAYOUTS
@pytest.mark.parametrize(
    "kind", ["absorbing", "uniform"]
)  # for a posterior, indifference is no good start
def test_untrained_likelihood_is_that_of_uniform_codes(kind, layout):
    codes = random_codes(layout, 200)
    likelihood = make(kind, layout, trained=False).nll(codes, torch.arange(200) % 4)
    assert float(likelihood.nats.mean()) == pytest.approx(layout.bits * math.log(2), rel=0.05)


def test_the_time_of_a_bound_says_nothing_about_the_noise_of_its_codes(monkeypatch):
    """Of 400 sequences, in each of sixteen parts of the clock, and at its end."""
    layout = CodeLayout(((4,),), (9,))
    prior, drawn, estimate = make("uniform", layout), [], UniformPrior._estimate

    def kept(self, network, codes, progress, uniform):
        drawn.append((progress, uniform))
        return estimate(self, network, codes, progress, uniform)

    monkeypatch.setattr(UniformPrior, "_estimate", kept)
    codes = torch.cartesian_prod(*[torch.arange(9)] * 4)[:400]
    prior.nll(codes, torch.zeros(400, dtype=torch.int64))
    *strata, (last, uniform) = drawn
    assert (last == LATEST).all() and uniform.shape == (400, 4) and len(strata) == 16
    for progress, uniform in strata:
        both = torch.corrcoef(torch.cat([progress[None], uniform.T]))
        assert both.fill_diagonal_(0).abs().max() < 0.25  # 5 standard deviations
    places = torch.stack([progress for progress, _ in strata])
    assert torch.equal(
        places.flatten().sort().values, places.sort(0).values.sort(1).values.flatten()
    )


@pytest.mark.parametrize("known", [False, True])
def test_codes_are_settled_only_where_some_are_known(known, monkeypatch):
    layout = CodeLayout(((3,),), (5,))
    prior, asked, at = make("uniform", layout, steps=3), [], UniformPrior._at
    monkeypatch.setattr(
        UniformPrior, "_at", lambda self, *given: asked.append(0) or at(self, *given)
    )
    beginning = torch.tensor([[4, -1, -1]]) if known else None
    prior.sample(torch.tensor([1]), SampleOptions(), torch.tensor([7]), known=beginning)
    assert len(asked) == (6 if known else 3)


@LAYOUTS
@KINDS
def test_likelihood_does_not_depend_on_the_batch(kind, layout):
    prior, codes, labels = (
        make(kind, layout),
        random_codes(layout, 6),
        torch.tensor([0, 1, 2, 0, 1, 3]),
    )
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    whole = prior.nll(codes, labels).nats
    torch.testing.assert_close(
        prior.nll(codes[order], labels[order]).nats, whole[order], rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(
        prior.nll(codes[2:3], labels[2:3]).nats, whole[2:3], rtol=1e-4, atol=1e-4
    )


@LAYOUTS
@KINDS
def test_loss_draws_belong_to_samples(kind, layout):
    prior, codes, labels = (
        make(kind, layout, label_dropout=0.1),
        random_codes(layout, 8),
        torch.arange(8) % 3,
    )
    uniform = torch.rand(8, layout.length + 2, generator=torch.Generator().manual_seed(3))
    whole = prior.loss(codes, labels, uniform).total
    halves = [
        prior.loss(codes[part], labels[part], uniform[part]).total
        for part in (slice(4), slice(4, 8))
    ]
    torch.testing.assert_close(sum(halves) / 2, whole)
    for extreme in (0.0, 1 - 2**-24):  # no number of [0, 1) is a problem
        loss = prior.loss(codes, labels, torch.full_like(uniform, extreme)).total
        loss.backward()
        assert loss.isfinite() and all(
            p.grad.isfinite().all() for p in prior.parameters() if p.grad is not None
        )
    dropped = uniform.clone()
    dropped[:, 0] = 0  # below label_dropout: the label no longer matters
    assert torch.equal(
        prior.loss(codes, labels, dropped).total, prior.loss(codes, labels * 0, dropped).total
    )


@LAYOUTS
@KINDS
def test_a_sample_depends_on_its_own_id_label_and_known_codes_only(kind, layout):
    prior, codes = make(kind, layout), random_codes(layout, 7)
    labels, ids, order = (
        torch.tensor([0, 1, 2, 0, 1, 2, 3]),
        torch.arange(7),
        torch.tensor([6, 2, 0, 4, 1, 3, 5]),
    )
    known = torch.where(
        torch.rand(codes.shape, generator=torch.Generator().manual_seed(2)) < 0.5, codes, -1
    )
    known[0], known[1] = codes[0], -1  # all known, none known
    for name in samplers(kind):
        options = SampleOptions(
            guidance=2.0, guidance_schedule="linear", seed=5, sampler=name, top_p=0.95
        )
        whole = prior.sample(labels, options, ids, known)
        layout.check(whole)
        assert torch.equal(whole[known >= 0], codes[known >= 0])
        assert torch.equal(
            prior.sample(labels[order], options, ids[order], known[order]), whole[order]
        )
        single = [
            prior.sample(labels[i : i + 1], options, ids[i : i + 1], known[i : i + 1])
            for i in (2, 4)
        ]
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
    modulations = [
        block.modulation for block in prior.backbone.blocks if block.modulation is not None
    ]
    for layer in (*prior.backbone.heads, *modulations):
        nn.init.normal_(layer.weight, std=0.5)
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
        (UniformConfig, {"noise": "gaussian"}, "mixture, gidd"),
        (UniformConfig, {"cross_entropy": -1.0}, "cross_entropy"),
        (UniformConfig, {"steps": 0}, "steps"),
    ],
)
def test_settings_are_checked(config, wrong, message):
    with pytest.raises(ValueError, match=message):
        config(**wrong)
    assert 0 < 1 - LATEST < 0.01
