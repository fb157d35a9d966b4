"""Laws of the priors: likelihoods, samplers, and randomness that belongs to samples."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from priors import train
from priors.backbone import BackboneConfig
from priors.families.autoregressive import AutoregressiveConfig
from priors.families.masked import MaskedConfig, MaskedPrior, _num_remasked, _num_waiting
from priors.families.pixelcnn import PixelCNNConfig
from priors.interface import Likelihood, SampleOptions
from priors.record import PriorRecord, read_record
from priors.run import PriorRun
from priors.sampling.guidance import filter_logits, guide
from priors.sampling.halton import halton_turns, rolled
from priors.sampling.noise import categorical, gumbel, uniform_noise
from priors.sampling.schedules import SCHEDULES, mean_share
from priors.train import PREVIEW_COLUMNS, Measure, Preview, TokenSequences
from tokenizer.interface import CodeLayout
from training.config import load
from training.errors import UserError

ONE_LEVEL = CodeLayout(((2, 3),), (7,))
TWO_LEVELS = CodeLayout(((1, 2), (2, 2)), (5, 9))
NUM_CLASSES = 3
RESIDUAL = CodeLayout(((2, 2),) * 3, (4,) * 3)
GIVEN = CodeLayout(((1, 2),), (6,))
LAYOUTS = pytest.mark.parametrize(
    "layout", [ONE_LEVEL, TWO_LEVELS, RESIDUAL], ids=["one_level", "two_levels", "residual"]
)
FAMILIES = {
    "raster": AutoregressiveConfig(),
    "random": AutoregressiveConfig(order="random"),
    "annealed": AutoregressiveConfig(order="annealed", anneal_end_step=100),
    "masked": MaskedConfig(),
    "halton": MaskedConfig(sampler="halton"),
    "pixelcnn": PixelCNNConfig(channels=32, depth=2, kernel=3, dropout=0.0),
}
EXACT = ("raster", "random", "annealed", "pixelcnn")
KINDS = pytest.mark.parametrize("kind", FAMILIES)


def make(
    kind: str, layout: CodeLayout, trained: bool = True, given: CodeLayout | None = None, **settings
):
    """A small prior; `trained` stands for weights that say something."""
    torch.manual_seed(0)
    if kind != "pixelcnn":
        settings["backbone"] = BackboneConfig(dim=32, depth=2, heads=2, dropout=0.0)
    prior = dataclasses.replace(FAMILIES[kind], **settings).build(layout, NUM_CLASSES, given)
    if trained:
        for parameter in prior.parameters():
            if not parameter.any():  # the last layers, and biases
                torch.nn.init.normal_(parameter, std=1.0 if kind == "pixelcnn" else 0.5)
    return prior.eval()


def random_codes(layout: CodeLayout, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    sizes = zip(layout.lengths, layout.num_codes)
    return torch.cat([torch.randint(k, (count, n), generator=generator) for n, k in sizes], 1)


@LAYOUTS
@KINDS
def test_untrained_prior_is_uniform_and_likelihood_is_known(kind, layout):
    likelihood = make(kind, layout, trained=False).nll(
        random_codes(layout, 4), torch.tensor([0, 1, 2, 3])
    )
    expected = layout.bits * math.log(2)
    assert likelihood.nats.dtype == torch.float64
    if kind in EXACT:
        assert likelihood.kind == "exact"
        torch.testing.assert_close(likelihood.nats, torch.full((4,), expected, dtype=torch.float64))
    else:  # a Monte Carlo bound, exact here only where all positions cost the same
        assert likelihood.kind == "bound"
        if layout is ONE_LEVEL:
            torch.testing.assert_close(
                likelihood.nats, torch.full((4,), expected, dtype=torch.float64)
            )


@pytest.mark.parametrize("kind", EXACT)
def test_exact_likelihood_sums_to_one_over_all_sequences(kind):
    layout = CodeLayout(((1, 1), (1, 2)), (2, 3))
    codes = torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(3))
    nats = make(kind, layout).nll(codes, torch.ones(len(codes), dtype=torch.int64)).nats
    assert float((-nats).exp().sum()) == pytest.approx(1, abs=1e-6)


@KINDS
def test_likelihood_does_not_depend_on_the_batch(kind):
    prior, codes, labels = (
        make(kind, ONE_LEVEL),
        random_codes(ONE_LEVEL, 6),
        torch.tensor([0, 1, 2, 0, 1, 3]),
    )
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    whole = prior.nll(codes, labels).nats
    torch.testing.assert_close(
        prior.nll(codes[order], labels[order]).nats, whole[order], atol=1e-5, rtol=0
    )
    torch.testing.assert_close(
        prior.nll(codes[2:3], labels[2:3]).nats, whole[2:3], atol=1e-5, rtol=0
    )


class ExactConditionals(torch.nn.Module):
    """p(code | known codes) of a joint distribution over 8 bits, by summing over all sequences."""

    layout = CodeLayout(((2, 4),), (2,))

    def __init__(self):
        super().__init__()
        self.sequences = torch.cartesian_prod(*[torch.arange(2)] * 8)
        self.joint = (
            2 * torch.randn(256, generator=torch.Generator().manual_seed(6)).double()
        ).softmax(0)

    def forward(self, codes, labels, *, given=None):
        agrees = ((codes[:, None] == self.sequences) | (codes[:, None] < 0)).all(-1)
        ones = (
            (agrees * self.joint)
            @ self.sequences.double()
            / (agrees * self.joint).sum(1, keepdim=True)
        )
        return [torch.stack([1 - ones, ones], -1).clamp_min(1e-30).log()]


def test_masked_bound_is_the_entropy_when_conditionals_are_exact():
    backbone = ExactConditionals()
    nats = (
        MaskedPrior(backbone, NUM_CLASSES)
        .nll(backbone.sequences, torch.zeros(256, dtype=torch.int64))
        .nats
    )
    entropy = -(backbone.joint * backbone.joint.log()).sum()
    assert float((backbone.joint * nats).sum()) == pytest.approx(float(entropy), rel=0.05)


@LAYOUTS
@pytest.mark.parametrize("order", ["raster", "random"])
def test_codes_have_no_say_in_what_comes_before_them(order, layout):
    """By gradients: a code's likelihood depends on the codes before it in the order, and on no
    other."""
    prior, codes = make(order, layout), random_codes(layout, 1)
    uniform = torch.rand(1, layout.length + 2, generator=torch.Generator().manual_seed(8))
    positions = prior.training_order(uniform)
    rank = torch.arange(layout.length) if positions is None else positions[0].argsort()
    before = prior.backbone(codes, torch.tensor([1]), order=positions)
    for position in range(layout.length):
        changed = codes.clone()
        changed[:, position] = (changed[:, position] + 1) % 4
        after = prior.backbone(changed, torch.tensor([1]), order=positions)
        for old, new, (span, _) in zip(before, after, layout.spans()):
            moved = (old - new)[0].abs().amax(1) > 1e-5
            assert torch.equal(moved, rank[span] > rank[position])


@LAYOUTS
@KINDS
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_samples_are_valid_codes(kind, layout, guidance):
    labels = torch.arange(64) % (NUM_CLASSES + 1)
    prior = make(kind, layout).train()
    codes = prior.sample(labels, SampleOptions(guidance=guidance), torch.arange(64))
    layout.check(codes)  # neither the mask nor a class is in the vocabulary
    assert prior.training  # the mode is put back


@LAYOUTS
@KINDS
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_sample_depends_on_its_own_id_and_label_only(kind, layout, guidance):
    prior, options = make(kind, layout), SampleOptions(guidance=guidance, seed=5)
    labels, ids = torch.tensor([0, 1, 2, 0, 1, 2, 0]), torch.arange(7)
    whole = prior.sample(labels, options, ids)
    order = torch.tensor([6, 2, 0, 4, 1, 3, 5])
    assert torch.equal(prior.sample(labels[order], options, ids[order]), whole[order])
    single = [prior.sample(labels[i : i + 1], options, ids[i : i + 1]) for i in range(7)]
    assert torch.equal(torch.cat(single), whole)
    assert not torch.equal(prior.sample(labels, options, ids + 7), whole)
    assert not torch.equal(prior.sample(labels, dataclasses.replace(options, seed=6), ids), whole)


@pytest.mark.parametrize("kind", ["raster", "pixelcnn"])
def test_autoregressive_samples_follow_the_distribution(kind):
    layout = CodeLayout(((1, 2),), (2,))
    prior, count = make(kind, layout), 4000
    pairs = torch.cartesian_prod(torch.arange(2), torch.arange(2))
    expected = (-prior.nll(pairs, torch.zeros(4, dtype=torch.int64)).nats).exp()
    drawn = prior.sample(
        torch.zeros(count, dtype=torch.int64), SampleOptions(), torch.arange(count)
    )
    observed = torch.bincount(drawn[:, 0] * 2 + drawn[:, 1], minlength=4) / count
    torch.testing.assert_close(observed.double(), expected, atol=0.03, rtol=0)


@LAYOUTS
@pytest.mark.parametrize("kind", ["masked", "halton"])
def test_masked_keeps_known_codes_exactly(kind, layout):
    prior, codes = make(kind, layout), random_codes(layout, 32)
    labels, ids = torch.zeros(32, dtype=torch.int64), torch.arange(32)
    known = torch.where(
        torch.rand(codes.shape, generator=torch.Generator().manual_seed(2)) < 0.5, codes, -1
    )
    known[0], known[1] = codes[0], -1  # all known, none known
    for steps in (1, 2, 8, 50):
        drawn = prior.sample(labels, SampleOptions(steps=steps), ids, known)
        layout.check(drawn)
        assert torch.equal(drawn[known >= 0], codes[known >= 0])
    unknown = prior.sample(labels, SampleOptions(), ids, torch.full_like(known, -1))
    assert torch.equal(unknown, prior.sample(labels, SampleOptions(), ids))


def test_remasking_counts_for_every_initial_hole():
    for initial in range(0, 20):
        start = torch.tensor([initial])
        unknown, steps = start.clone(), 8
        for step in range(steps - 1):
            share = float(
                SCHEDULES["cosine"](torch.tensor((step + 1) / steps, dtype=torch.float64))
            )
            count = _num_remasked(start, unknown, share)
            assert 0 <= count <= unknown
            assert count < unknown or unknown <= 1
            if 1 <= math.floor(initial * share) < int(unknown):
                assert int(count) == math.floor(initial * share)
            unknown = count
        assert (int(unknown) > 0) == (initial > 0)


def test_halton_turns_are_counted_for_every_initial_hole():
    for initial in range(20):
        unknown = initial
        for step in range(7):
            share = float(
                SCHEDULES["arc_cosine"](torch.tensor((step + 1) / 8, dtype=torch.float64))
            )
            waiting = int(_num_waiting(torch.tensor([initial]), step, share))
            done = max(step + 1, math.floor((1 - share) * initial + 1e-9))
            assert waiting == max(0, initial - done) <= unknown
            unknown = waiting


@pytest.mark.parametrize("grid", [(4, 9), (1, 1), (3, 5), (16,), (2, 3, 4), (32, 32), (7, 1)])
def test_halton_order_visits_every_cell(grid):
    turns = halton_turns(CodeLayout((grid,), (2,)))
    assert turns.sort().values.tolist() == list(range(math.prod(grid)))


def test_halton_order_is_the_sequences():
    """(1/2, 1/3), (1/4, 2/3), (3/4, 1/9), (1/8, 4/9), ... on 8 rows and 9 columns."""
    turns = halton_turns(CodeLayout(((8, 9),), (2,))).view(8, 9)
    visits = [(4, 3), (2, 6), (6, 1), (1, 4), (5, 7), (3, 2), (7, 5), (0, 8)]
    assert [int(turns[cell]) for cell in visits] == list(range(8))
    turns = halton_turns(CodeLayout(((16, 16),), (2,))).view(16, 16)
    early = (turns < 64).float()
    quarters = early.unflatten(0, (2, 8)).unflatten(2, (2, 8)).sum((1, 3))
    assert ((quarters - 16).abs() <= 2).all()  # any start of it is spread over the grid


def test_halton_order_starts_anywhere_and_goes_level_by_level():
    turns = halton_turns(TWO_LEVELS)
    order = rolled(TWO_LEVELS, turns, torch.tensor([[0.0, 0.0], [0.6, 0.99]], dtype=torch.float64))
    assert torch.equal(order[0], turns + torch.tensor([0, 0, 2, 2, 2, 2]))
    assert torch.equal(order[1], torch.cat([(turns[:2] + 1) % 2, 2 + (turns[2:] + 3) % 4]))


def test_annealing_makes_orders_raster():
    prior = make("annealed", RESIDUAL, anneal_start_step=10, anneal_end_step=30)
    uniform = torch.rand(4000, RESIDUAL.length + 2, generator=torch.Generator().manual_seed(9))
    raster = torch.arange(RESIDUAL.length)
    for step, share in ((0, 1.0), (10, 1.0), (15, 0.75), (25, 0.25), (30, 0.0), (99, 0.0)):
        prior.update(step - 1, True)  # of the step before
        orders = prior.training_order(uniform)
        assert torch.equal(orders.sort(1).values, raster.expand_as(orders))
        assert torch.equal(orders // 4, raster.expand_as(orders) // 4)  # levels stay in their order
        permuted = (orders != raster).any(1).float().mean()
        assert float(permuted) == pytest.approx(share, abs=0.03)
    assert int(prior.state_dict()["next_step"]) == 99  # a checkpoint goes on where it stopped


def test_only_annealed_orders_count_steps_and_only_those_taken():
    for kind in ("raster", "random"):
        prior = make(kind, ONE_LEVEL)
        prior.update(4, taken=True)
        assert not list(prior.buffers(recurse=False))
    prior = make("annealed", ONE_LEVEL)
    prior.update(4, taken=True)
    prior.update(9, taken=False)
    assert int(prior.next_step) == 5


@pytest.mark.parametrize("kind", ["raster", "annealed", "pixelcnn"])
def test_raster_order_continues_a_beginning_and_nothing_else(kind):
    prior, codes = make(kind, TWO_LEVELS), random_codes(TWO_LEVELS, 6)
    labels, ids = torch.zeros(6, dtype=torch.int64), torch.arange(6)
    known = torch.where(
        torch.arange(6)[None] < torch.arange(6)[:, None], codes, -1
    )  # row i knows i codes
    drawn = prior.sample(labels, SampleOptions(), ids, known)
    assert torch.equal(drawn[known >= 0], codes[known >= 0])
    assert torch.equal(drawn[0], prior.sample(labels[:1], SampleOptions(), ids[:1])[0])
    known[3, 0] = -1
    with pytest.raises(UserError, match="beginning"):
        prior.sample(labels, SampleOptions(), ids, known)


@LAYOUTS
def test_random_order_fills_any_hole_of_the_last_level_begun(layout):
    prior, codes = make("random", layout), random_codes(layout, 32)
    labels, ids = torch.zeros(32, dtype=torch.int64), torch.arange(32)
    last = torch.arange(layout.length) >= layout.length - layout.lengths[-1]
    hidden = last & (torch.rand(codes.shape, generator=torch.Generator().manual_seed(2)) < 0.5)
    drawn = prior.sample(labels, SampleOptions(), ids, codes.masked_fill(hidden, -1))
    layout.check(drawn)
    assert torch.equal(drawn[~hidden], codes[~hidden]) and not torch.equal(drawn, codes)


@KINDS
def test_given_codes_are_conditioned_on(kind):
    prior, codes = make(kind, ONE_LEVEL, given=GIVEN), random_codes(ONE_LEVEL, 8)
    labels, ids, uniform = torch.arange(8) % 3, torch.arange(8), torch.rand(8, ONE_LEVEL.length + 2)
    given, other = random_codes(GIVEN, 8), (random_codes(GIVEN, 8) + 1) % 6
    options = SampleOptions(guidance=2.0)
    assert not torch.equal(
        prior.nll(codes, labels, given=given).nats, prior.nll(codes, labels, given=other).nats
    )
    losses = [prior.loss(codes, labels, uniform, given=each).total for each in (given, other)]
    assert not torch.equal(*losses)
    drawn = prior.sample(labels, options, ids, given=given)
    ONE_LEVEL.check(drawn)
    assert not torch.equal(drawn, prior.sample(labels, options, ids, given=other))
    alone = prior.sample(labels[3:4], options, ids[3:4], given=given[3:4])
    assert torch.equal(alone, drawn[3:4])


@KINDS
def test_unknown_samplers_are_refused_by_name(kind):
    with pytest.raises(
        UserError, match=r"'ddim': this prior has (raster|random|confidence|halton)"
    ):
        make(kind, ONE_LEVEL).sample(
            torch.zeros(1, dtype=torch.int64), SampleOptions(sampler="ddim"), torch.arange(1)
        )


@pytest.mark.parametrize(
    ("kind", "layout", "repeats", "excess"),
    [
        ("raster", ONE_LEVEL, 1, 0.02),
        ("raster", RESIDUAL, 1, 0.02),
        ("random", TWO_LEVELS, 4, 0.05),
        ("pixelcnn", TWO_LEVELS, 1, 0.02),
        ("masked", TWO_LEVELS, 16, 0.3),
    ],
)
def test_training_reaches_the_entropy_of_four_sequences(kind, layout, repeats, excess, monkeypatch):
    codes, labels = random_codes(layout, 4), torch.zeros(4, dtype=torch.int64)
    prior = make(kind, layout, trained=False, label_dropout=0.0, label_smoothing=0.0).train()
    optimizer = torch.optim.AdamW(prior.parameters(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        prior.loss(codes.repeat(repeats, 1), labels.repeat(repeats)).total.backward()
        optimizer.step()
    assert all(parameter.grad is not None for parameter in prior.parameters())
    found = []
    for seed in range(
        20 if kind == "masked" else 1
    ):  # a bound's masks of one draw are off by as much as 0.3
        noise = functools.partial(uniform_noise, seed, torch.arange(4), 0)
        monkeypatch.setattr(
            "priors.families.any_order_bound.own_noise",
            lambda codes, shape, noise=noise: noise(shape),
        )
        found.append(float(prior.nll(codes, labels).nats.mean()))
    assert sum(found) / len(found) == pytest.approx(math.log(4), abs=excess)
    drawn = prior.sample(labels.repeat(16), SampleOptions(), torch.arange(64))
    share = (drawn[:, None] == codes[None]).all(-1).any(1).float().mean()
    assert share > (0.6 if kind == "masked" else 0.9)


@KINDS
def test_loss_draws_belong_to_samples(kind):
    prior, codes, labels = make(kind, ONE_LEVEL), random_codes(ONE_LEVEL, 8), torch.arange(8) % 3
    uniform = torch.rand(8, ONE_LEVEL.length + 2, generator=torch.Generator().manual_seed(3))
    whole = prior.loss(codes, labels, uniform).total
    halves = [
        prior.loss(codes[part], labels[part], uniform[part]).total
        for part in (slice(4), slice(4, 8))
    ]
    torch.testing.assert_close(sum(halves) / 2, whole)
    dropped = uniform.clone()
    dropped[:, 0] = 0  # below label_dropout: the label no longer matters
    assert torch.equal(
        prior.loss(codes, labels, dropped).total, prior.loss(codes, labels * 0, dropped).total
    )


def test_masked_loss_masks_what_the_schedule_says():
    prior, codes = make("masked", ONE_LEVEL, label_smoothing=0.0), random_codes(ONE_LEVEL, 1)
    uniform = torch.tensor([[0.9, 0.0, *([0.5] * ONE_LEVEL.length)]])  # r = 0 masks everything
    everything = prior.backbone(torch.full_like(codes, -1), torch.zeros(1, dtype=torch.int64))
    nats = torch.nn.functional.cross_entropy(everything[0][0], codes[0], reduction="mean")
    loss = prior.loss(codes, torch.zeros(1, dtype=torch.int64), uniform)
    torch.testing.assert_close(loss.parts["nats_per_masked_token"], nats)
    torch.testing.assert_close(
        loss.total, nats / mean_share(SCHEDULES["cosine"]), check_dtype=False
    )


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_fall_from_one_to_nothing(name):
    shares = SCHEDULES[name](torch.linspace(0, 1, 101, dtype=torch.float64))
    assert shares[0] == pytest.approx(1) and shares[-1] == pytest.approx(0, abs=1e-12)
    assert (shares.diff() < 0).all()
    assert mean_share(SCHEDULES["cosine"]) == pytest.approx(2 / math.pi, abs=1e-6)


def test_guidance():
    conditional, unconditional = torch.randn(
        2, 5, 7, generator=torch.Generator().manual_seed(4)
    ).double()
    assert torch.equal(guide(conditional, unconditional, 1.0), conditional)
    assert torch.equal(guide(conditional, unconditional, 0.0), unconditional)
    expected = unconditional + 3.5 * (conditional - unconditional)
    torch.testing.assert_close(guide(conditional, unconditional, 3.5), expected)


def test_filters_keep_the_top():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64).log()
    kept = lambda **options: torch.isfinite(filter_logits(logits, **options)).tolist()  # noqa: E731
    assert kept() == kept(top_k=4) == kept(top_k=9) == [True] * 4
    assert kept(top_k=2) == kept(top_p=0.7) == [True, True, False, False]
    assert kept(top_p=0.81) == [True, True, True, False]
    assert kept(top_p=1e-9) == kept(top_k=1) == [True, False, False, False]
    shuffled = logits[[2, 0, 3, 1]]
    assert torch.isfinite(filter_logits(shuffled, top_p=0.7)).tolist() == [False, True, False, True]


def test_gumbel_noise_is_the_samples_own_and_draws_the_right_law():
    ids = torch.tensor([3, 1, 2**40])
    noise = gumbel(7, ids, 2, (4, 5))
    assert noise.dtype == torch.float64 and noise.shape == (3, 4, 5)
    assert torch.equal(gumbel(7, ids[1:2], 2, (4, 5))[0], noise[1])
    assert not torch.equal(gumbel(7, ids, 3, (4, 5)), noise)
    assert not torch.equal(gumbel(7 + 2**32, ids, 2, (4, 5)), noise)
    probabilities = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    drawn = categorical(probabilities.log(), gumbel(0, torch.arange(5000), 0, (3,)))
    torch.testing.assert_close(
        torch.bincount(drawn) / 5000, probabilities.float(), atol=0.03, rtol=0
    )


@pytest.mark.parametrize(
    "option",
    [
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"top_k": -1},
        {"guidance": -1.0},
        {"steps": -1},
        {"seed": -1},
    ],
)
def test_sample_options_are_checked(option):
    with pytest.raises(UserError, match=next(iter(option)).replace("_", "-")):
        SampleOptions(**option)


def test_config_errors_are_one_line(tmp_path):
    path = tmp_path / "prior.yaml"
    path.write_text("prior: {kind: masked, schedule: cosin}\n")
    with pytest.raises(UserError, match="cosin"):
        load(PriorRun, path)
    wrong = [
        ("order", "order: spiral"),
        ("anneal_end_step", "order: annealed, anneal_start_step: 5"),
        ("label_dropout", "label_dropout: -1"),
        ("heads", "backbone: {dim: 30, heads: 4}"),
    ]
    for name, setting in wrong:
        path.write_text(f"prior: {{kind: autoregressive, {setting}}}\n")
        with pytest.raises(UserError, match=name):
            load(PriorRun, path)
    for name, setting in (
        ("sampler", "sampler: hilbert"),
        ("sampling_schedule", "sampling_schedule: x"),
    ):
        path.write_text(f"prior: {{kind: masked, {setting}}}\n")
        with pytest.raises(UserError, match=name):
            load(PriorRun, path)
    path.write_text("root: runs/a\n")
    assert load(PriorRun, path).tokens == "runs/a/tokens"


def test_token_sequences_take_every_view_and_depend_on_the_key_only():
    @dataclasses.dataclass
    class Split:
        codes: np.ndarray
        labels: torch.Tensor

    codes = np.arange(5 * 3 * 4, dtype=np.uint16).reshape(5, 3, 4)
    sequences = TokenSequences(Split(codes, torch.arange(5)), seed=1)
    keys = [(epoch, 2) for epoch in range(50)]
    batch = sequences.gather([*keys, (0, 4)])
    assert batch["codes"].dtype == batch["labels"].dtype == torch.int64
    assert batch["labels"].tolist() == [2] * 50 + [4]
    assert {tuple(row) for row in batch["codes"][:50].tolist()} == {
        tuple(row) for row in codes[2].tolist()
    }
    assert torch.equal(sequences.gather(keys[7:8])["codes"][0], batch["codes"][7])


def test_the_logs_likelihood_is_of_plain_images():
    """As `eval.run likelihood` measures it: no view but the first has a part in it."""
    codes = np.stack(
        [np.arange(600).reshape(300, 2), np.full((300, 2), 10**6)], 1
    )  # (images, views, N)

    class Summing:
        layout = CodeLayout(((1, 2),), (600,))

        def nll(self, codes, labels, given=None):
            assert torch.equal(codes[:, 0] // 2, labels)
            return Likelihood(codes.sum(1).double(), "exact")

    measured = Measure(SimpleNamespace(codes=codes, labels=np.arange(300)))(Summing())
    rows = np.linspace(0, 299, 256).astype(int)
    assert measured == {"nats_per_token": pytest.approx((4 * rows + 1).mean() / 2)}


def test_a_preview_is_a_class_a_row_of_one_tokenizer(tmp_path, monkeypatch):
    asked, loaded = [], []

    class Labelled(torch.nn.Module):
        def sample(self, labels, options, ids):
            asked.append((labels.tolist(), options, ids.tolist()))
            return torch.zeros(len(ids), 6, dtype=torch.int64)

    decoder = SimpleNamespace(decode=lambda codes: torch.zeros(len(codes), 3, 4, 4))
    monkeypatch.setattr("tokenizer.load", lambda folder: loaded.append(folder) or decoder)
    monkeypatch.setattr(PriorRecord, "tokenizer_folder", lambda record, folder: folder / "own")
    options = SampleOptions(guidance=2.0)
    record = PriorRecord(ONE_LEVEL, ["a", "b"], "tokens", "12", "tokenizer", "34", options)
    preview = Preview(record, tmp_path)
    for step in (1, 2):
        preview(Labelled(), tmp_path / f"{step}.png", step)
    assert loaded == [tmp_path / "own"]
    rows = [0] * PREVIEW_COLUMNS + [1] * PREVIEW_COLUMNS
    assert asked == [(rows, options, list(range(2 * PREVIEW_COLUMNS)))] * 2
    assert (tmp_path / "1.png").is_file() and (tmp_path / "2.png").is_file()


def test_damaged_tokens_are_found_before_anything_is_built(monkeypatch):
    class Damaged:
        def check_tokenizer(self):
            pass

        def verify(self):
            raise UserError("damaged")

    monkeypatch.setattr("tokenizer.cache.TokenCache.open", lambda folder: Damaged())
    with pytest.raises(UserError, match="damaged"):
        train.train_prior(PriorRun())


def test_the_command_trains_what_its_configuration_says(monkeypatch):
    given = []
    monkeypatch.setattr(train, "config_command", lambda *found: given.append(found))
    train.main()
    ((name, _, schema, run, estimate),) = given
    assert (name, schema, run, estimate) == (
        "priors.train",
        PriorRun,
        train.train_prior,
        train.dry_run,
    )


@pytest.mark.parametrize("names", [[], "ab", ["a", 3]])
def test_names_of_classes_are_a_list_of_words(tmp_path, names):
    record = PriorRecord(ONE_LEVEL, ["a", "b"], "tokens", "12", "tokenizer", "34", SampleOptions())
    record.write(tmp_path)
    path = tmp_path / "weights" / "prior.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "class_names": names}))
    with pytest.raises(UserError, match="damaged"):
        read_record(tmp_path)


def test_record_round_trip_and_damage(tmp_path):
    record = PriorRecord(
        TWO_LEVELS, ["a", "b"], "../tokens", "12", "../tokenizer", "34", SampleOptions(guidance=2.0)
    )
    record.write(tmp_path)
    assert read_record(tmp_path) == record
    (tmp_path / "weights" / "prior.json").write_text(json.dumps({"layout": 3}))
    with pytest.raises(UserError, match="damaged"):
        read_record(tmp_path)
    with pytest.raises(UserError, match=r"priors\.train"):
        read_record(tmp_path / "nowhere")


@KINDS
def test_priors_copy(kind):  # the loop averages a deep copy
    import copy

    prior = make(kind, ONE_LEVEL)
    assert list(copy.deepcopy(prior).state_dict()) == list(prior.state_dict())
