"""Laws of nearest-neighbour search, k-means and every quantizer of the table."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tokenizer.quantizers import QUANTIZERS, codebook, search
from tokenizer.quantizers.codebook import Statistics, kmeans, pick_rows, straight_through, to_grid, to_rows
from tokenizer.quantizers.simvq import SimVQConfig
from tokenizer.quantizers.vector import VectorConfig
from training import distributed

CODES, DIM = 12, 4
CASES = {
    **{kind: config(num_codes=CODES, code_dim=DIM) for kind, config in QUANTIZERS.items()},
    "vector-gradient": VectorConfig(num_codes=CODES, code_dim=DIM, codebook="gradient"),
}


@pytest.fixture(params=CASES)
def config(request):
    return CASES[request.param]


def build(config, **changes):
    torch.manual_seed(0)
    return dataclasses.replace(config, **changes).build()


def features(seed=1, batch=6, scale=0.5):
    return scale * torch.randn(batch, DIM, 3, 2, generator=torch.Generator().manual_seed(seed))


def state(quantizer):
    return {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}


# nearest


@pytest.mark.parametrize("budget", [1, 200, search.BUDGET])
@pytest.mark.parametrize(("num_codes", "dim"), [(1, 3), (37, 8), (130, 33)])
def test_nearest_is_the_oracle_in_float64(monkeypatch, budget, num_codes, dim):
    monkeypatch.setattr(search, "BUDGET", budget)
    rows, book = torch.randn(301, dim), torch.randn(num_codes, dim)
    distances = torch.cdist(rows.double(), book.double())
    order = distances.sort(dim=1)
    clear = torch.ones(301, dtype=torch.bool)
    if num_codes > 1:
        clear = order.values[:, 1] - order.values[:, 0] > 1e-5
        assert clear.float().mean() > 0.99
    codes = search.nearest(rows, book)
    assert codes.dtype == torch.int64
    assert torch.equal(codes[clear], order.indices[clear, 0])


@pytest.mark.parametrize("num_codes", [3, 5, 17, 37, 129, 500])
@pytest.mark.parametrize("num_rows", [1, 7, 64, 501])
def test_equal_codes_go_to_the_lowest_index(num_codes, num_rows):
    order = torch.randperm(2 * num_codes, generator=torch.Generator().manual_seed(num_codes))
    book = torch.randn(num_codes, 33).repeat(2, 1)[order]
    first = torch.stack([(order % num_codes == o % num_codes).nonzero().min() for o in order])
    codes = search.nearest(torch.randn(num_rows, 33), book)
    assert torch.equal(codes, first[codes])


def test_equal_distances_go_to_the_lowest_index():
    book = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    assert search.nearest(torch.tensor([[0.0, 0.0], [0.0, 3.0], [3.0, 3.0]]), book).tolist() == [1, 1, 0]


def test_autocast_does_not_reach_the_search():
    rows, book = torch.randn(500, 16), torch.randn(300, 16)
    with torch.autocast("cpu", torch.bfloat16):
        codes = search.nearest(rows, book)
    assert torch.equal(codes, search.nearest(rows, book))
    assert search.nearest(rows[:0], book).shape == (0,)


# k-means


def test_kmeans_finds_clusters():
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
    rows = centres.repeat(50, 1) + 0.01 * torch.randn(200, 2)
    found = kmeans(rows, 4, iterations=5, seed=3)
    assert torch.cdist(centres, found).min(1).values.max() < 0.02
    assert torch.equal(found, kmeans(rows, 4, iterations=5, seed=3))


@pytest.mark.parametrize("num_rows", [1, 3])
def test_kmeans_with_fewer_rows_than_codes(num_rows):
    rows = torch.randn(num_rows, 5)
    found = kmeans(rows, 8, iterations=3, seed=0)
    assert found.shape == (8, 5) and found.isfinite().all()
    assert torch.cdist(rows, found).min(1).values.max() < 0.2


def test_kmeans_with_fewer_values_than_codes():
    rows = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).repeat(40, 1)
    found = kmeans(rows, 5, iterations=3, seed=0)
    assert found.isfinite().all()
    assert torch.cdist(rows, found).min(1).values.max() == 0


# shared parts


def test_straight_through_is_the_vectors_and_the_identity():
    given, vectors = torch.randn(50, 7, requires_grad=True), torch.randn(50, 7) * 1e-3
    passed = straight_through(given, vectors)
    assert torch.equal(passed, vectors)
    gradient = torch.randn(50, 7)
    passed.backward(gradient)
    assert torch.equal(given.grad, gradient)


def test_rows_and_grid_are_inverse():
    grid = features()
    rows = to_rows(grid)
    assert torch.equal(rows[7], grid[1, :, 0, 1])
    assert torch.equal(to_grid(rows, torch.zeros(6, 3, 2)), grid)


def test_figures():
    statistics = Statistics(8, 2)
    assert statistics.figures()["usage"] == 0
    codes = torch.arange(4).repeat(10)
    statistics.gather(torch.randn(40, 2), codes)
    counts, sums, candidates = statistics.reduce()
    assert counts.tolist() == [10, 10, 10, 10, 0, 0, 0, 0] and candidates.shape == (40, 2)
    torch.testing.assert_close(sums[:4], candidates.unflatten(0, (10, 4)).sum(0))
    assert statistics.figures()["usage"] == 0.5
    assert float(statistics.figures()["perplexity"]) == pytest.approx(4)
    assert not statistics.counts.any() and not statistics.candidates


def test_picked_rows_do_not_depend_on_the_number_of_ranks(monkeypatch):
    rows = torch.randn(24, 3)
    for count in (5, 24, 60):
        whole = pick_rows(rows, count, step=2)
        assert (whole[:, None] == rows).all(2).any(1).all()
        parts = []
        monkeypatch.setattr(distributed, "world", lambda: 3)
        for rank in range(3):
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            parts.append(pick_rows(rows[8 * rank : 8 * rank + 8], count, step=2))
        monkeypatch.undo()
        assert torch.equal(sum(parts), whole)


# every quantizer


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_lookup_gives_what_forward_gave(config, mode):
    quantizer = getattr(build(config), mode)()
    output = quantizer(features())
    assert output.codes.shape == (6, 3, 2) and output.codes.dtype == torch.int64
    assert torch.equal(quantizer.lookup(output.codes), output.vectors)
    again = quantizer(output.vectors.detach())
    assert torch.equal(again.codes, output.codes)


def test_autocast_changes_nothing(config):
    quantizer = build(config).eval()
    given = features().bfloat16()
    plain = quantizer(given)
    with torch.autocast("cpu", torch.bfloat16):
        low = quantizer(given)
        assert torch.equal(quantizer.lookup(low.codes), plain.vectors)
    assert torch.equal(low.codes, plain.codes) and torch.equal(low.vectors, plain.vectors)
    assert torch.equal(low.loss, plain.loss)


def test_gradients_reach_the_features_and_all_that_learns(config):
    quantizer = build(config).train()
    given = features().requires_grad_()
    output = quantizer(given)
    (output.vectors.sum() + output.loss).backward()
    assert given.grad.abs().min() > 0
    for name, parameter in quantizer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_vectors_carry_no_gradient_to_the_codebook(config):
    quantizer = build(config).train()
    given = features().requires_grad_()
    quantizer(given).vectors.mul(3).sum().backward()
    assert torch.equal(given.grad, torch.full_like(given, 3))
    assert all(parameter.grad is None for parameter in quantizer.parameters())


def test_update_adds_up_micro_batches(config):
    whole, parts = (build(config, restart_below=0.5) for _ in range(2))
    given = features(batch=8)
    whole.train()(given)
    for part in given.split(2):
        parts.train()(part)
    whole.update(49, True)
    parts.update(49, True)
    for name, tensor in state(whole).items():
        torch.testing.assert_close(parts.state_dict()[name], tensor, atol=1e-6, rtol=0, msg=name)


def test_a_skipped_step_leaves_no_trace(config):
    skipped, plain = build(config).train(), build(config).train()
    before = state(skipped)
    skipped(features(seed=5))
    skipped.update(0, False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(skipped).items())
    for quantizer in (skipped, plain):
        quantizer(features())
        quantizer.update(1, True)
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in state(skipped).items())


def test_evaluation_gathers_nothing(config):
    quantizer = build(config).eval()
    quantizer(features())
    assert not quantizer.statistics.counts.any() and not quantizer.statistics.candidates


def test_restart_puts_rows_of_the_data_in_place_of_dead_codes(config):
    changes = {"restart_every": 1} if isinstance(config, SimVQConfig) else {}
    quantizer = build(config, restart_below=0.1, **changes).train()
    dead = torch.arange(CODES) % 3 == 0
    with torch.no_grad():
        quantizer.mean_counts[dead] = -0.5  # longer out of use than one batch can mend
    before = quantizer.codebook.detach().clone()
    given = features()
    quantizer(given)
    quantizer.update(0, True)
    distances = torch.cdist(quantizer.codebook.detach()[dead], to_rows(given))
    assert distances.min(1).values.max() < 1e-3
    assert len(distances.argmin(1).unique()) == int(dead.sum())
    assert (quantizer.mean_counts[dead] > 0).all()
    if not getattr(quantizer, "ema", False):
        torch.testing.assert_close(quantizer.codebook[~dead], before[~dead], atol=0, rtol=0)
    else:
        torch.testing.assert_close(
            quantizer.mean_sums[dead] / quantizer.mean_counts[dead, None], quantizer.codebook[dead]
        )


def test_restart_brings_a_collapsed_codebook_back():
    quantizer = VectorConfig(num_codes=8, code_dim=DIM, decay=0.5, restart_below=0.1).build().train()
    quantizer._set(100 + torch.arange(8.0)[:, None].expand(-1, DIM))
    for step in range(12):
        quantizer(features(seed=step, batch=32))
        quantizer.update(step, True)
    assert len(quantizer(features(seed=99, batch=32)).codes.unique()) == 8


def test_state_goes_on_where_it_stopped(config):
    first, second = build(config, restart_below=0.2).train(), dataclasses.replace(config, restart_below=0.2).build()
    for step in range(3):
        first(features(seed=step))
        first.update(step, True)
    second.load_state_dict(state(first))
    for quantizer in (first, second.train()):
        quantizer(features(seed=9))
        quantizer.update(3, True)
    assert all(torch.equal(tensor, second.state_dict()[name]) for name, tensor in state(first).items())


def test_initialise_starts_from_data(config):
    quantizer = build(config, init="kmeans")
    rows = 5 + torch.randn(200, DIM)
    quantizer.initialise(rows, seed=0)
    torch.testing.assert_close(quantizer.codebook, kmeans(rows, CODES, iterations=10, seed=0))
    untouched = build(config, init="normal")
    before = state(untouched)
    untouched.initialise(rows, seed=0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(untouched).items())


@pytest.mark.parametrize("wrong", [{"init": "zeros"}, {"codebook": "sum"}])
def test_unknown_choices_are_refused(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"quantizer.{name}='{value}' is not one of"):
        VectorConfig(**wrong)


# one by one


def test_moving_averages_are_equations_6_to_8():
    quantizer = VectorConfig(num_codes=CODES, code_dim=DIM, decay=0.9, epsilon=1e-3).build().train()
    book = quantizer.codebook.double().numpy().copy()
    means, sums = np.ones(CODES), book.copy()
    for step in range(4):
        given = features(seed=step)
        rows = to_rows(given).double().numpy()
        codes = ((rows[:, None] - book[None]) ** 2).sum(-1).argmin(1)
        assert quantizer(given).codes.flatten().tolist() == codes.tolist()
        quantizer.update(step, True)
        for k in range(CODES):
            means[k] = 0.9 * means[k] + 0.1 * (codes == k).sum()
            sums[k] = 0.9 * sums[k] + 0.1 * rows[codes == k].sum(0)
        smoothed = (means + 1e-3) / (means.sum() + CODES * 1e-3) * means.sum()
        book = sums / smoothed[:, None]
        np.testing.assert_allclose(quantizer.codebook.numpy(), book, atol=1e-5)


def test_losses_are_those_of_the_paper():
    given = features()
    for kind, terms in (("ema", 0.5), ("gradient", 1.5)):
        quantizer = VectorConfig(num_codes=CODES, code_dim=DIM, codebook=kind, commitment=0.5).build()
        output = quantizer(given)
        torch.testing.assert_close(output.loss, terms * F.mse_loss(given, output.vectors))


def test_simvq_learns_the_transform_and_freezes_the_codebook():
    quantizer = SimVQConfig(num_codes=CODES, code_dim=DIM).build().train()
    assert [name for name, _ in quantizer.named_parameters()] == ["transform.weight"]
    assert "frozen" in quantizer.state_dict()
    quantizer(features()).loss.backward()
    assert quantizer.transform.weight.grad.abs().min() > 0 and quantizer.frozen.grad is None
    torch.testing.assert_close(quantizer.codebook, quantizer.frozen @ quantizer.transform.weight.T)


def test_simvq_restarts_only_when_it_is_time():
    quantizer = build(CASES["simvq"], restart_below=0.5, restart_every=4).train()
    frozen = quantizer.frozen.clone()
    for step in range(4):
        quantizer.mean_counts[:6] = -0.5
        quantizer(features(seed=step))
        quantizer.update(step, True)
        assert torch.equal(quantizer.frozen, frozen) == (step < 3)
    assert codebook.nearest is search.nearest  # one search for all
