"""Laws of every quantizer of the table, and of what they share."""

from __future__ import annotations

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from tokenizer.quantizers import QUANTIZERS, codebook, product, search, search_on_cpu
from tokenizer.quantizers.codebook import (
    Statistics,
    Usage,
    entropy_loss,
    pick_rows,
    revive,
    rotate,
    start_from,
    straight_through,
    to_grid,
    to_rows,
)
from tokenizer.quantizers.kmeans import common, kmeans
from tokenizer.quantizers.product import ProductConfig
from tokenizer.quantizers.residual import ResidualConfig
from tokenizer.quantizers.search import LowRank
from tokenizer.quantizers.simvq import SimVQConfig, SimVQQuantizer
from tokenizer.quantizers.vector import VectorConfig
from training import config as configuration
from training import distributed
from training.ema import Ema

CODES, DIM = 12, 4
SIZES, HALF = {"num_codes": CODES, "code_dim": DIM}, {"num_codes": CODES, "code_dim": DIM // 2}
SMALL = {  # a kind that is not here is tested as it comes
    "vector": SIZES,
    "simvq": SIZES,
    "residual": {"depth": 3, "level": VectorConfig(**SIZES)},
    "product": {"heads": 2, "level": VectorConfig(**HALF)},
    "ibq": SIZES,
    "gumbel": SIZES,
}
CODEBOOKS = {
    "vector": VectorConfig(**SIZES),
    "vector-gradient": VectorConfig(**SIZES, codebook="gradient"),
    "vector-cosine": VectorConfig(**SIZES, metric="cosine"),
    "vector-gradient-cosine": VectorConfig(**SIZES, codebook="gradient", metric="cosine"),
    "simvq": SimVQConfig(**SIZES),
    "simvq-cosine": SimVQConfig(**SIZES, metric="cosine"),
}
LEVELLED = {
    "residual-gradient": ResidualConfig(depth=2, level=VectorConfig(**SIZES, codebook="gradient")),
    "residual-shared": ResidualConfig(depth=3, shared=True, level=VectorConfig(**SIZES)),
    "residual-simvq": ResidualConfig(depth=2, level=SimVQConfig(**SIZES)),
    "product-cosine": ProductConfig(heads=2, level=VectorConfig(**HALF, metric="cosine")),
    "product-gradient": ProductConfig(
        heads=2, level=VectorConfig(**HALF, codebook="gradient", restart="data")
    ),
    "product-simvq": ProductConfig(heads=2, level=SimVQConfig(**HALF)),
}
CASES = (
    {kind: config(**SMALL.get(kind, {})) for kind, config in QUANTIZERS.items()}
    | CODEBOOKS
    | LEVELLED
)


@pytest.fixture(params=CASES)
def config(request):
    return CASES[request.param]


@pytest.fixture(params=CODEBOOKS)
def book_config(request):
    return CODEBOOKS[request.param]


def build(config, **changes):
    torch.manual_seed(0)
    return dataclasses.replace(config, **changes).build()


def features(seed=1, batch=6, scale=0.5, dim=DIM):
    return scale * torch.randn(batch, dim, 3, 2, generator=torch.Generator().manual_seed(seed))


def train_step(quantizer, step, given, taken=True):
    """Everything random in a step derives from its number, as in the training loop."""
    torch.manual_seed(step)
    output = quantizer(given)
    quantizer.update(step, taken)
    return output


def state(quantizer):
    return {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}


def same_state(one, other):
    return all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in state(one).items())


# What a kind is where nothing is set: the values of its source, or this project's own where there
# is none.
COMMON = {
    "commitment": 0.25,
    "commitment_warmup_steps": 0,
    "entropy": 0.0,
    "entropy_temperature": 1.0,
    "rotation": False,
    "restart": "none",
    "restart_below": 0.1,
    "restart_until": 0,
}
VECTOR = {
    "num_codes": 512,
    "code_dim": 64,
    "codebook": "ema",
    "metric": "l2",
    "decay": 0.99,
    "epsilon": 1e-5,
    "init": "kmeans",
    **COMMON,
}
DEFAULTS = {
    "vector": VECTOR,
    "simvq": {
        "num_codes": 8192,
        "code_dim": 256,
        "metric": "l2",
        "init": "normal",
        "restart_every": 50,
        **COMMON,
    },
    "residual": {
        "depth": 4,
        "shared": False,
        "quantizer_dropout": 0.0,
        "level": {"kind": "vector", **VECTOR},
    },
    "product": {
        "heads": 4,
        "level": {"kind": "vector", **VECTOR, "num_codes": 256, "code_dim": 16},
    },
    "gumbel": {
        "num_codes": 8192,
        "code_dim": 256,
        "temperature_start": 1.0,
        "temperature_end": 1 / 16,
        "anneal_steps": 10000,
        "hard": False,
        "kl": 5e-4,
        "vector_dim": None,
    },
    "fsq": {"levels": (8, 5, 5, 5)},
    "lookup_free": {
        "bits": 10,
        "spherical": False,
        "lowest_first": False,
        "commitment": 0.25,
        "entropy": 0.1,
        "diversity": 1.0,
        "temperature": 0.01,
    },
    "bsq": {
        "bits": 10,
        "commitment": 0.0,
        "entropy": 0.1,
        "entropy_boost": 3.0,
        "entropy_boost_steps": 2000,
        "diversity": 1.0,
        "temperature": 1.0,
    },
    "ibq": {
        "num_codes": 16384,
        "code_dim": 256,
        "commitment": 1.0,
        "attraction": 0.25,
        "temperature": 1.0,
        "entropy": 0.05,
        "entropy_temperature": 0.01,
        "init": "normal",
    },
}


def test_every_kind_of_this_project_has_its_sources_defaults_told():
    own = {kind for kind, each in QUANTIZERS.items() if each.__module__.startswith("tokenizer.")}
    assert own == DEFAULTS.keys()


@pytest.mark.parametrize("kind", DEFAULTS)
def test_defaults_are_those_of_their_sources(kind):
    assert dataclasses.asdict(QUANTIZERS[kind]()) == {"kind": kind, **DEFAULTS[kind]}
    started = QUANTIZERS[kind](**SMALL.get(kind, {})).build().starts_from_data
    assert started == (
        kind in ("vector", "residual", "product")
    )  # by k-means, which others would wait for in vain


def test_what_follows_from_the_configuration_is_in_no_file(config):
    """A file of weights holds what was learned, counted or scheduled."""
    quantizer = build(config)
    kept = {name.rpartition(".")[2] for name in quantizer.state_dict()}
    learned = {name.rpartition(".")[2] for name, _ in quantizer.named_parameters()}
    assert kept <= learned | {
        "usage",
        "mean_counts",
        "mean_sums",
        "codebook",
        "frozen",
        "temperature",
        "boost",
    }


# features that were projected from fewer channels


def projected(rank=5, dim=DIM * 4, count=400):
    weight = torch.linalg.qr(torch.randn(dim, rank))[0]
    low_rank = LowRank(torch.randn(count, rank), weight, 0.1 * torch.randn(dim))
    return low_rank, low_rank.rows @ weight.T + low_rank.bias


def clear_choices(rows, book):
    """Rows whose two nearest codes are further apart than fp32 rounds."""
    two = torch.cdist(rows.double(), book.double()).square().topk(2, largest=False).values
    return two[:, 1] - two[:, 0] > 1e-4


@pytest.mark.parametrize("name", CODEBOOKS)
@pytest.mark.parametrize("low", [False, True])
def test_a_search_before_the_projection_finds_the_same_codes(name, low):
    low_rank, rows = projected()
    quantizer = build(CODEBOOKS[name], num_codes=300, code_dim=rows.shape[1]).eval()
    assert quantizer.takes_low_rank
    grid = rows[:, :, None, None]
    plain = quantizer(grid)
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        fast = quantizer(grid, low_rank)
    seen = F.normalize(rows, dim=1) if CODEBOOKS[name].metric == "cosine" else rows
    clear = clear_choices(seen, quantizer.vectors.detach())
    assert clear.float().mean() > 0.95
    assert torch.equal(fast.codes[clear], plain.codes[clear])
    assert torch.equal(quantizer.lookup(fast.codes), fast.vectors)


@pytest.mark.parametrize("name", CODEBOOKS)
def test_data_given_before_the_projection_start_the_same_codebook(name):
    low_rank, rows = projected()
    rows = rows - low_rank.bias
    whole, fast = (build(CODEBOOKS[name], code_dim=rows.shape[1], init="kmeans") for _ in range(2))
    whole.initialise(rows, seed=3)
    fast.initialise(low_rank.rows, 3, lambda part: part @ low_rank.weight.T)
    torch.testing.assert_close(fast.vectors, whole.vectors, atol=1e-5, rtol=0)


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
    for shape in ((6, 3, 2), (6, 1, 3, 2), grid.shape):
        assert torch.equal(to_grid(rows, shape), grid)


def test_figures():
    statistics, usage = Statistics(8, 2), Usage(8)
    assert statistics.figures()["usage"] == 0
    codes = torch.arange(4).repeat(10)
    statistics.gather(torch.randn(40, 2), codes)
    usage.gather(codes.view(4, 2, 5))
    counts, sums, candidates = statistics.reduce()
    assert torch.equal(usage.reduce(), counts) and usage.figures() == statistics.figures()
    assert counts.tolist() == [10, 10, 10, 10, 0, 0, 0, 0] and candidates.shape == (40, 2)
    torch.testing.assert_close(sums[:4], candidates.unflatten(0, (10, 4)).sum(0))
    assert statistics.figures()["usage"] == 0.5
    assert float(statistics.figures()["perplexity"]) == pytest.approx(4)
    assert not statistics.counts.any() and not statistics.candidates


def test_use_is_forgotten_and_codes_below_a_thousandth_of_the_mean_are_out_of_it():
    usage = Usage(4, window=5)
    for codes in ([0, 0, 1, -1], [1], []):
        usage.gather(torch.tensor(codes, dtype=torch.int64))
        usage.reduce()
    torch.testing.assert_close(usage.usage, torch.tensor([2 * 0.8**2, 0.8**2 + 0.8, 0.0, 0.0]))
    assert Usage(4).window == 100
    usage.usage = torch.tensor([3997.0, 1.1, 0.9, 1.0])
    assert usage.figures()["usage"] == 0.5


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
    places = torch.tensor([4, 0, -1])
    assert torch.equal(pick_rows(rows, 5, 2, places), pick_rows(rows, 5, 2)[places])


def test_the_rotation_trick_is_a_rotation_and_a_scale_held_constant():
    rows = torch.randn(20, 7, dtype=torch.float64, requires_grad=True)
    vectors = torch.randn(20, 7, dtype=torch.float64)
    passed = rotate(rows, vectors)
    assert torch.equal(passed, vectors)
    upstream = torch.randn(20, 7, dtype=torch.float64)
    passed.backward(upstream)
    for z, e, gradient, got in zip(rows.detach(), vectors, upstream, rows.grad):
        z_hat, e_hat = z / z.norm(), e / e.norm()
        # Rodrigues: by the angle between z and e, in their plane
        cosine = z_hat @ e_hat
        side = e_hat - cosine * z_hat
        side = side / side.norm()
        sine = e_hat @ side
        plane = torch.stack([z_hat, side], dim=1)
        turn = torch.stack([torch.stack([cosine, -sine]), torch.stack([sine, cosine])])
        rotation = (
            torch.eye(7, dtype=torch.float64)
            + plane @ (turn - torch.eye(2, dtype=torch.float64)) @ plane.T
        )
        scale = e.norm() / z.norm()
        torch.testing.assert_close(scale * rotation @ z, e)
        torch.testing.assert_close(got, scale * rotation.T @ gradient)


@pytest.mark.parametrize("budget", [1, 60, search_on_cpu.BUDGET])
def test_entropy_is_that_of_the_whole_matrix(monkeypatch, budget):
    monkeypatch.setattr(search_on_cpu, "BUDGET", budget)
    rows, book = (
        torch.randn(30, DIM, requires_grad=True),
        torch.randn(CODES, DIM, requires_grad=True),
    )
    p = (-torch.cdist(rows, book).square() / 0.7).softmax(1)
    mean = p.mean(0)
    whole = -(p * p.log()).sum(1).mean() + (mean * mean.log()).sum()
    loss = entropy_loss(rows, book, 0.7)
    torch.testing.assert_close(loss, whole)
    expected = torch.autograd.grad(whole, (rows, book))
    for got, wanted in zip(torch.autograd.grad(loss, (rows, book)), expected):
        torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-4)


def test_entropy_keeps_no_matrix(monkeypatch):
    monkeypatch.setattr(search_on_cpu, "BUDGET", 10 * 64)
    rows, book = torch.randn(200, DIM, requires_grad=True), torch.randn(64, DIM)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.numel()) or tensor, lambda t: t
    ):
        entropy_loss(rows, book, 1.0)
    assert max(kept) < 200 * 64 / 4


def test_split_codes_share_their_counts():
    book, counts = torch.randn(6, 3), torch.tensor([0.01, 8.0, 1.0, 0.0, 2.0, 1.0])
    before = book.clone()
    changed = revive(book, counts, None, 0, below=0.1, split=True)
    assert changed.tolist() == [True, True, False, True, True, False]
    assert counts.tolist() == [4.0, 4.0, 1.0, 1.0, 1.0, 1.0]
    distances = (book[[0, 3]] - before[[1, 4]]).norm(dim=1)
    assert (distances > 0).all() and (distances < 0.1).all()
    assert torch.equal(book[[1, 2, 4, 5]], before[[1, 2, 4, 5]])
    again, counts = before.clone(), torch.tensor([0.01, 8.0, 1.0, 0.0, 2.0, 1.0])
    revive(again, counts, None, 0, below=0.1, split=True)
    assert torch.equal(again, book)


def test_at_most_one_copy_is_made_of_each_code():
    book, counts = torch.randn(6, 3), torch.tensor([6.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    changed = revive(book, counts, None, 0, below=0.1, split=True)
    assert changed.tolist() == [True, True] + 4 * [False] and counts.tolist() == [
        3.0,
        3.0,
        0.0,
        0.0,
        0.0,
        0.0,
    ]


# every quantizer


def test_forward_is_of_one_shape_and_lookup_gives_it_back(config):
    quantizer = build(config).eval()
    output = quantizer(features(dim=quantizer.dim))
    assert (
        output.codes.shape == (6, len(quantizer.num_codes), 3, 2)
        and output.codes.dtype == torch.int64
    )
    assert (
        output.vectors.shape == (6, quantizer.dim, 3, 2) and output.vectors.dtype == torch.float32
    )
    assert output.loss.shape == () and {"usage", "perplexity"} <= output.parts.keys()
    for level, num_codes in zip(output.codes.unbind(1), quantizer.num_codes, strict=True):
        assert 0 <= level.min() and level.max() < num_codes
    assert torch.equal(quantizer.lookup(output.codes), output.vectors)


def test_training_gives_the_vectors_of_its_codes(config):
    if config.kind == "gumbel":
        pytest.skip("mixes vectors in training")
    quantizer = build(config).train()
    output = quantizer(features(dim=quantizer.dim))
    assert torch.equal(quantizer.lookup(output.codes), output.vectors)


def test_autocast_changes_nothing(config):
    quantizer = build(config).eval()
    given = features(dim=quantizer.dim).bfloat16()
    plain = quantizer(given)
    with torch.autocast("cpu", torch.bfloat16):
        low = quantizer(given)
        assert torch.equal(quantizer.lookup(low.codes), plain.vectors)
    assert torch.equal(low.codes, plain.codes) and torch.equal(low.vectors, plain.vectors)
    assert torch.equal(low.loss, plain.loss)


def test_gradients_reach_the_features_and_all_that_learns(config):
    quantizer = build(config).train()
    given = features(dim=quantizer.dim).requires_grad_()
    output = quantizer(given)
    (output.vectors.sin().sum() + output.loss).backward()
    assert given.grad.isfinite().all() and (given.grad.abs() > 0).float().mean() > 0.99
    for name, parameter in quantizer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert all(not buffer.requires_grad for buffer in quantizer.buffers())


def test_update_adds_up_micro_batches(config):
    if config.kind == "gumbel":
        pytest.skip("draws noise for each micro-batch")
    whole, parts = (build(config) for _ in range(2))
    given = features(batch=8, dim=whole.dim)
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
    train_step(skipped, 0, features(seed=5, dim=skipped.dim), taken=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(skipped).items())
    for quantizer in (skipped, plain):
        train_step(quantizer, 1, features(dim=quantizer.dim))
    assert same_state(skipped, plain)


def test_evaluation_gathers_nothing(config):
    quantizer = build(config).eval()
    untouched = build(config)
    quantizer(features(dim=quantizer.dim))
    for each in (quantizer, untouched):
        each.update(0, True)
    assert same_state(quantizer, untouched)


def test_state_goes_on_where_it_stopped(config):
    first, second = build(config).train(), config.build().train()
    for step in range(3):
        train_step(first, step, features(seed=step, dim=first.dim))
    second.load_state_dict(state(first))
    outputs = [
        train_step(quantizer, 3, features(seed=9, dim=first.dim)) for quantizer in (first, second)
    ]
    assert torch.equal(outputs[0].loss, outputs[1].loss)
    assert same_state(first, second)


def test_data_start_it_alike_each_time(config):
    rows = 5 + torch.randn(200, config.build().dim)
    first, second = (build(config) for _ in range(2))
    first.initialise(rows, seed=0)
    second.initialise(rows, 0, lambda part: part)
    assert same_state(first, second)


def test_what_is_written_is_read_back(config):
    @dataclasses.dataclass(frozen=True)
    class Holder:
        quantizer: object = configuration.one_of(QUANTIZERS, "vector")

    assert (
        configuration.from_dict(
            Holder, {"quantizer": configuration.to_dict(config)}, "test"
        ).quantizer
        == config
    )


# two ranks


@pytest.fixture
def two_ranks(monkeypatch):
    """Call a function as two ranks do, in two threads that meet in each reduction: f(rank) ->
    [result, result]."""
    meeting, slots, local = threading.Barrier(2, timeout=30), [None, None], threading.local()

    def sum_(tensor):
        slots[local.rank] = tensor.clone()
        meeting.wait()
        total = slots[0] + slots[1]
        meeting.wait()
        return tensor.copy_(total)

    def call(function):
        monkeypatch.setattr(distributed, "sum_", sum_)
        monkeypatch.setattr(distributed, "world", lambda: 2)
        monkeypatch.setattr(distributed, "rank", lambda: local.rank)

        def run(rank):
            local.rank = rank
            return function(rank)

        try:
            with ThreadPoolExecutor(2) as pool:
                return list(pool.map(run, range(2)))
        finally:
            monkeypatch.undo()

    return call


def check_ranks(config, two_ranks, steps=(0, 1)):
    """Each rank with half of the batch: the same state as one process, and the mean of the
    gradients."""
    whole, *halves = (build(config).train() for _ in range(3))
    for step in steps:
        given = features(batch=8, seed=step, dim=whole.dim)

        def turn(quantizer, part, step=step):
            part = part.clone().requires_grad_()
            quantizer.zero_grad()
            output = quantizer(part)
            output.loss.backward() if output.loss.requires_grad else None
            quantizer.update(step, True)
            return output.codes, [parameter.grad.clone() for parameter in quantizer.parameters()]

        codes, gradients = turn(whole, given)
        results = two_ranks(
            lambda rank, turn=turn, given=given: turn(halves[rank], given.chunk(2)[rank])
        )
        assert torch.equal(torch.cat([each for each, _ in results]), codes)
        for gradient, *each in zip(gradients, *(part for _, part in results)):
            torch.testing.assert_close(sum(each) / 2, gradient, atol=1e-6, rtol=1e-4)
        assert same_state(*halves)
        for name, tensor in state(whole).items():
            torch.testing.assert_close(
                halves[0].state_dict()[name], tensor, atol=1e-5, rtol=1e-5, msg=name
            )


def test_two_ranks_do_as_one(config, two_ranks):
    if config.kind == "gumbel":
        pytest.skip("draws noise on each rank")
    check_ranks(config, two_ranks)


@pytest.mark.parametrize("restart", ["data", "split"])
def test_two_ranks_restart_and_measure_entropy_as_one(book_config, two_ranks, restart):
    changes = {
        "restart": restart,
        "restart_below": 0.99,
        "entropy": 0.3,
        "entropy_temperature": 0.5,
    }
    check_ranks(dataclasses.replace(book_config, **changes), two_ranks, steps=(49, 99))


@pytest.mark.parametrize(
    ("name", "columns"), [("product", DIM), ("residual", 3 * DIM), ("residual-simvq", 0)]
)
def test_levels_are_summed_over_ranks_at_once(monkeypatch, name, columns):
    quantizer, asked = build(CASES[name]).train(), []
    quantizer(features())
    quantizer.levels[0].statistics.clear()  # a level that met nothing takes part
    monkeypatch.setattr(distributed, "world", lambda: 2)
    monkeypatch.setattr(distributed, "sum_", lambda tensor: asked.append(tensor.numel()) or tensor)
    quantizer.update(0, True)
    assert asked == [CODES * (len(quantizer.levels) + columns)]


# a GPU is not waited for: shapes that depend on data, and values that the host asks for, are errors
# below

ON_A_GPU = {
    **{
        f"{name}-{restart}": dataclasses.replace(config, restart=restart, restart_below=0.5)
        for name, config in CODEBOOKS.items()
        for restart in ("data", "split")
    },
    "entropy": VectorConfig(**SIZES, entropy=0.1, commitment_warmup_steps=5),
    "rotation": VectorConfig(**SIZES, codebook="gradient", rotation=True),
    "residual": ResidualConfig(
        depth=2, quantizer_dropout=0.5, level=VectorConfig(**SIZES, restart="data")
    ),
    "product": ProductConfig(heads=2, level=VectorConfig(**SIZES, restart="split")),
}


@pytest.mark.parametrize("name", [name for name in ON_A_GPU if "simvq" not in name])
def test_no_shape_of_a_step_depends_on_data(monkeypatch, name):
    def anywhere(rows, book, **_):
        return torch.empty(rows.shape[:-1], dtype=torch.int64, device=rows.device)

    monkeypatch.setattr(codebook, "_generator", lambda *_: torch.Generator())
    for module in (codebook, product):
        monkeypatch.setattr(module, "nearest", anywhere)
    with FakeTensorMode(), torch.device("cuda"):
        quantizer = build(ON_A_GPU[name]).train()
        output = quantizer(torch.randn(6, quantizer.dim, 3, 2))
        quantizer.update(49, True)
        if hasattr(quantizer, "follow"):
            quantizer.follow(quantizer)
        assert output.codes.device.type == "cuda"


@pytest.mark.parametrize("name", [name for name in ON_A_GPU if "-data" in name or "-split" in name])
def test_restarts_are_the_same_where_the_device_is_not_asked_for_dead_codes(monkeypatch, name):
    asked, silent = (build(ON_A_GPU[name]).train() for _ in range(2))
    for step in (49, 99):
        for quantizer in (asked, silent):
            with torch.no_grad():
                quantizer.mean_counts[1:8:3] = -0.5
        train_step(asked, step, features(seed=step))
        with monkeypatch.context() as patch:
            patch.setattr(codebook, "_numbers_of", lambda mask: torch.arange(len(mask)))
            train_step(silent, step, features(seed=step))
        assert torch.equal(asked.changed, silent.changed) and asked.changed[1:8:3].all()
        for one, other in zip(state(asked).values(), state(silent).values(), strict=True):
            torch.testing.assert_close(
                one, other, atol=1e-6, rtol=1e-5
            )  # to the last bit but for lstsq


@pytest.mark.gpu
@pytest.mark.parametrize("name", ON_A_GPU)
def test_a_step_waits_for_no_gpu(name):
    with torch.device("cuda"):
        quantizer, given = build(ON_A_GPU[name]).train(), torch.randn(6, DIM, 3, 2)
        quantizer(given)  # compiles what has to be
        quantizer.update(0, True)
        torch.cuda.set_sync_debug_mode("error")
        try:
            quantizer(given.requires_grad_()).loss.backward()
            quantizer.update(49, True)
        finally:
            torch.cuda.set_sync_debug_mode("default")


# features that are not finite


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("alone", [False, True])
def test_features_that_are_not_finite_are_flagged_and_leave_no_trace(config, value, alone):
    """Each of their levels, or the one that has them, gets -1; the others are what they would
    be."""
    hurt, plain = build(config).train(), build(config).train()
    given = features(dim=hurt.dim)
    hale = plain.eval()(given)
    given[1, 0 if alone else slice(None), 2, 1] = value
    output = train_step(hurt, 0, given, taken=False)
    assert not output.loss.isfinite()
    own = 0 if alone and config.kind == "product" else slice(None)  # a head has channels of its own
    flagged = torch.zeros_like(output.codes, dtype=torch.bool)
    flagged[1, own, 2, 1] = True
    assert torch.equal(output.codes == -1, flagged)
    assert hurt.lookup(output.codes).isfinite().all()
    hurt.eval()
    found = hurt(given)
    assert (
        torch.equal(found.codes, hale.codes.masked_fill(flagged, -1)) and not found.loss.isfinite()
    )
    assert torch.equal(found.vectors, hurt.lookup(found.codes))
    plain.train(), hurt.train()
    for quantizer in (hurt, plain):
        train_step(quantizer, 1, features(seed=2, dim=hurt.dim))
    assert same_state(hurt, plain)


def test_features_that_are_not_finite_do_not_reach_statistics():
    statistics, usage = Statistics(4, 2), Usage(4)
    rows, codes = torch.randn(6, 2), torch.tensor([0, -1, 3, 3, -1, 0])
    rows[1], rows[4, 0] = float("nan"), float("inf")
    statistics.gather(rows, codes)
    usage.gather(codes)
    counts, sums, _ = statistics.reduce()
    assert counts.tolist() == usage.reduce().tolist() == [2, 0, 0, 2]
    torch.testing.assert_close(
        sums, torch.stack([rows[0] + rows[5], 0 * rows[0], 0 * rows[0], rows[2] + rows[3]])
    )


# those with a codebook


@pytest.mark.parametrize("restart", ["data", "split"])
def test_restarts_add_up_micro_batches_and_go_on_where_they_stopped(book_config, restart):
    changes = {"restart": restart, "restart_below": 0.5}
    whole, parts = (build(book_config, **changes).train() for _ in range(2))
    for step in (49, 99):
        given = features(batch=8, seed=step)
        whole(given)
        for part in given.split(2):
            parts(part)
        whole.update(step, True)
        parts.update(step, True)
    for name, tensor in state(whole).items():
        torch.testing.assert_close(parts.state_dict()[name], tensor, atol=1e-5, rtol=1e-5, msg=name)
    again = build(book_config, **changes).train()
    again.load_state_dict(state(whole))
    for quantizer in (whole, again):
        train_step(quantizer, 149, features(seed=3))
    assert same_state(whole, again)


def test_vectors_carry_no_gradient_to_the_codebook(book_config):
    quantizer = build(book_config).train()
    given = features().requires_grad_()
    quantizer(given).vectors.mul(3).sum().backward()
    if book_config.metric == "l2":
        assert torch.equal(given.grad, torch.full_like(given, 3))
    else:  # through the change of length, which leaves no gradient along the feature
        torch.testing.assert_close(
            (given.grad * given).sum(1), torch.zeros(6, 3, 2), atol=1e-5, rtol=0
        )
    assert all(parameter.grad is None for parameter in quantizer.parameters())


def test_a_vector_is_its_own_nearest(book_config):
    quantizer = build(book_config).eval()
    output = quantizer(features())
    assert torch.equal(quantizer(output.vectors.detach()).codes, output.codes)


def test_cosine_is_blind_to_length_and_gives_unit_vectors():
    for name in ("vector-cosine", "vector-gradient-cosine", "simvq-cosine"):
        quantizer = build(CODEBOOKS[name], restart="data", restart_below=0.5).train()
        for step in range(3):
            output = train_step(quantizer, step, features(seed=step))
            torch.testing.assert_close(output.vectors.norm(dim=1), torch.ones(6, 3, 2))
            longer = quantizer(features(seed=9) * torch.rand(6, 1, 3, 2).add(0.1))
            assert torch.equal(longer.codes, quantizer(features(seed=9)).codes)
            cosines = F.normalize(to_rows(features(seed=9)), dim=1) @ quantizer.vectors.detach().T
            assert torch.equal(longer.codes.flatten(), cosines.argmax(1))


@pytest.mark.parametrize("name", ["vector-cosine", "vector-gradient-cosine", "simvq-cosine"])
def test_averaged_weights_are_cosine_codebooks_too(name):
    """A mean of unit vectors is shorter than one."""
    quantizer = (
        build(CODEBOOKS[name], decay=0.5) if name == "vector-cosine" else build(CODEBOOKS[name])
    )
    average = Ema(quantizer.train(), 0.9)
    with torch.no_grad():
        for step in range(4):
            book = quantizer.codebook if "vector" in name else quantizer.frozen
            book.copy_(F.normalize(torch.randn_like(book), dim=1))
            average.update(1000 + step)
    given = features(seed=9, batch=40)
    output = average.module.eval()(given)
    torch.testing.assert_close(average.module.vectors.norm(dim=1), torch.ones(CODES))
    assert torch.equal(average.module(given * torch.rand(40, 1, 3, 2).add(0.1)).codes, output.codes)
    cosines = F.normalize(to_rows(given), dim=1) @ average.module.vectors.T
    assert torch.equal(output.codes.flatten(), cosines.argmax(1))


def test_restart_puts_rows_of_the_data_in_place_of_dead_codes(book_config):
    changes = {"restart_every": 1} if isinstance(book_config, SimVQConfig) else {}
    quantizer = build(book_config, restart="data", **changes).train()
    dead = torch.arange(CODES) % 3 == 0
    with torch.no_grad():
        quantizer.mean_counts[dead] = -0.5  # longer out of use than one batch can mend
    before = quantizer.vectors.detach().clone()
    given = features()
    quantizer(given)
    quantizer.update(0, True)
    rows = to_rows(given)
    distances = torch.cdist(
        quantizer.vectors.detach()[dead], F.normalize(rows) if "cos" in book_config.metric else rows
    )
    assert distances.min(1).values.max() < 1e-3
    assert len(distances.argmin(1).unique()) == int(dead.sum())
    assert (quantizer.mean_counts[dead] > 0).all()
    if not getattr(quantizer, "ema", False):
        torch.testing.assert_close(quantizer.vectors[~dead], before[~dead], atol=0, rtol=0)
    else:
        torch.testing.assert_close(
            quantizer.mean_sums[dead] / quantizer.mean_counts[dead, None], quantizer.vectors[dead]
        )


@pytest.mark.parametrize(("restart", "steps"), [("data", 12), ("split", 25)])
def test_restart_brings_a_collapsed_codebook_back(restart, steps):
    quantizer = (
        VectorConfig(num_codes=8, code_dim=DIM, decay=0.5, restart=restart, init="normal")
        .build()
        .train()
    )
    collapsed = 100 + torch.arange(8.0)[:, None].expand(-1, DIM)
    quantizer.codebook.copy_(collapsed)
    quantizer.mean_sums.copy_(collapsed)
    for step in range(steps):
        train_step(quantizer, step, features(seed=step, batch=32))
    assert len(quantizer(features(seed=99, batch=32)).codes.unique()) == 8


def test_initialise_starts_from_data(book_config):
    quantizer = build(book_config, init="kmeans")
    rows = 5 + torch.randn(200, DIM)
    quantizer.initialise(rows, seed=0)
    cosine = book_config.metric == "cosine"
    torch.testing.assert_close(quantizer.vectors, start_from(rows, CODES, 0, None, cosine))
    if not cosine:
        torch.testing.assert_close(quantizer.vectors, kmeans(rows, CODES, seed=0))
    if book_config.kind == "vector":
        images, shared = torch.arange(200) // 10, build(book_config, init="common")
        shared.initialise(rows, seed=0, images=images)
        torch.testing.assert_close(shared.vectors, common(rows, CODES, 0, images, cosine=cosine))
    untouched = build(book_config, init="normal")
    before = state(untouched)
    untouched.initialise(rows, seed=0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(untouched).items())


def test_uniform_codes_fill_their_cube():
    book = VectorConfig(num_codes=500, code_dim=8, init="uniform").build().vectors
    assert 0.99 / 500 < book.abs().max() <= 1 / 500


def test_commitment_warms_up(book_config):
    given = features()
    warm, plain = (
        build(book_config, commitment_warmup_steps=4).train(),
        build(book_config, commitment=1.0).train(),
    )
    no_commitment = build(book_config, commitment=0.0).train()
    for step, share in enumerate((0.0, 0.25, 0.5, 0.75, 1.0, 1.0)):
        outputs = [train_step(quantizer, step, given) for quantizer in (warm, plain, no_commitment)]
        warmed, whole, none = (output.loss for output in outputs)
        torch.testing.assert_close(
            warmed - none, 0.25 * share * (whole - none), atol=1e-6, rtol=1e-5
        )
    resumed = build(book_config, commitment_warmup_steps=4).train()
    resumed.load_state_dict(state(warm))
    assert torch.equal(resumed(given).loss, warm(given).loss)


def test_entropy_is_weighed_in(book_config):
    plain, weighted = (
        build(book_config).train(),
        build(book_config, entropy=0.3, entropy_temperature=0.5).train(),
    )
    given = features().requires_grad_()
    output = weighted(given)
    torch.testing.assert_close(output.loss - plain(given).loss, 0.3 * output.parts["entropy"])
    rows = F.normalize(to_rows(given), dim=1) if book_config.metric == "cosine" else to_rows(given)
    torch.testing.assert_close(output.parts["entropy"], entropy_loss(rows, weighted.vectors, 0.5))
    before = output.parts["entropy"]
    (gradient,) = torch.autograd.grad(before, given)
    assert weighted((given - 0.05 * gradient / gradient.norm()).detach()).parts["entropy"] < before
    assert "entropy" not in weighted.eval()(given).parts


def test_rotation_replaces_straight_through(book_config):
    plain, turned = build(book_config).train(), build(book_config, rotation=True).train()
    given, same = features().requires_grad_(), features().requires_grad_()
    ours, theirs = turned(given), plain(same)
    assert torch.equal(ours.vectors, theirs.vectors) and torch.equal(ours.loss, theirs.loss)
    ours.vectors.sin().sum().backward()
    theirs.vectors.sin().sum().backward()
    assert given.grad.isfinite().all() and not torch.allclose(given.grad, same.grad)


@pytest.mark.parametrize(
    "wrong", [{"init": "zeros"}, {"codebook": "sum"}, {"metric": "l1"}, {"restart": "never"}]
)
def test_unknown_choices_are_refused(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"quantizer.{name}='{value}' is not one of"):
        VectorConfig(**wrong)


# one by one


def test_moving_averages_are_equations_6_to_8():
    quantizer = VectorConfig(**SIZES, decay=0.9, epsilon=1e-3).build().train()
    book = quantizer.vectors.double().numpy().copy()
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
        np.testing.assert_allclose(quantizer.vectors.numpy(), book, atol=1e-5)


def test_losses_are_those_of_the_paper():
    given = features()
    for kind, terms in (("ema", 0.5), ("gradient", 1.5)):
        quantizer = VectorConfig(**SIZES, codebook=kind, commitment=0.5).build()
        output = quantizer(given)
        torch.testing.assert_close(output.loss, terms * F.mse_loss(given, output.vectors))


def test_simvq_learns_the_transform_and_freezes_the_codebook():
    quantizer = SimVQConfig(**SIZES).build().train()
    weight, bias = quantizer.transform.weight, quantizer.transform.bias
    assert [name for name, _ in quantizer.named_parameters()] == [
        "transform.weight",
        "transform.bias",
    ]
    assert "frozen" in quantizer.state_dict() and bias.abs().min() > 0
    quantizer(features()).loss.backward()
    assert (
        weight.grad.abs().min() > 0 and bias.grad.abs().min() > 0 and quantizer.frozen.grad is None
    )
    torch.testing.assert_close(quantizer.vectors, quantizer.frozen @ weight.T + bias)


def test_a_simvq_from_before_its_map_had_a_bias_means_what_it_meant():
    quantizer, before = build(CASES["simvq"]), build(CASES["simvq"], num_codes=CODES)
    saved = state(before)
    del saved["transform.bias"]
    quantizer.load_state_dict(saved)
    torch.testing.assert_close(quantizer.vectors, before.frozen @ before.transform.weight.T)
    assert "transform.bias" not in saved
    with pytest.raises(RuntimeError, match=r"transform\.weight"):
        quantizer.load_state_dict(
            {name: tensor for name, tensor in saved.items() if name != "transform.weight"}
        )


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("num_codes", [8, 500])
def test_the_gradient_of_chosen_codes_is_that_of_the_whole_codebook(num_codes, metric):
    """More features than codes, and fewer; and the losses' gradients are those of two mean squared
    distances."""
    quantizer = (
        SimVQConfig(num_codes=num_codes, code_dim=DIM, metric=metric, commitment=0.3)
        .build()
        .train()
    )
    given, same = features().requires_grad_(), features().requires_grad_()
    output = quantizer(given)
    (output.vectors.sin().sum() + 7 * output.loss).backward()
    rows, vectors = quantizer.assignment.rows_of(same), quantizer.vectors[output.codes.flatten()]
    passed = to_grid(straight_through(rows, vectors.detach()), same.shape)
    loss = 0.3 * F.mse_loss(rows, vectors.detach()) + F.mse_loss(vectors, rows.detach())
    learned = list(quantizer.transform.parameters())
    wanted = torch.autograd.grad(passed.sin().sum() + 7 * loss, [same, *learned])
    torch.testing.assert_close(output.loss, loss)
    for found, gradient in zip(
        [given.grad, *(parameter.grad for parameter in learned)], wanted, strict=True
    ):
        torch.testing.assert_close(found, gradient, atol=1e-6, rtol=1e-5)


def test_the_frozen_codebook_is_the_papers():
    frozen = SimVQConfig(num_codes=2000, code_dim=64).build().frozen
    assert float(frozen.mean()) == pytest.approx(0, abs=2e-3) and float(
        frozen.std()
    ) == pytest.approx(64**-0.5, 0.02)


def test_simvq_maps_every_code_for_the_gradient_only_where_entropies_ask(monkeypatch):
    """Of 2**18 codes the map of all, and its gradient, would cost more than the rest of the
    step."""
    plain, weighted = build(CASES["simvq"]), build(CASES["simvq"], entropy=0.1)
    asked = []
    monkeypatch.setattr(SimVQQuantizer, "vectors", property(lambda self: asked.append(self)))
    plain.train()(features()), plain.eval()(features()), weighted.eval()(features())
    assert not asked
    with pytest.raises(AttributeError):  # of the codebook that is not there
        weighted.train()(features())
    assert asked == [weighted]


def test_a_uniform_start_is_the_authors():
    """From -1 / K to 1 / K (van den Oord et al. 2017, in their code), both ends nearly reached."""
    book = VectorConfig(num_codes=50, code_dim=64, init="uniform").build().codebook
    assert book.abs().max() <= 1 / 50 and float(book.mean()) == pytest.approx(0, abs=1e-3)
    assert book.min() < -0.99 / 50 and book.max() > 0.99 / 50


@pytest.mark.parametrize("name", ["product", "residual", "residual-shared"])
def test_levels_start_from_what_a_projection_makes_of_the_data(name):
    rows, weight = torch.randn(200, DIM - 1), torch.randn(DIM, DIM - 1)
    projected, plain = build(CASES[name]), build(CASES[name])
    projected.initialise(rows, 3, lambda part: part @ weight.T)
    plain.initialise(rows @ weight.T, 3)
    for found, expected in zip(projected.levels, plain.levels):
        torch.testing.assert_close(found.codebook, expected.codebook, atol=1e-5, rtol=0)


def test_one_head_is_its_level():
    alone, product = build(CASES["vector"]).eval(), build(CASES["product"], heads=1).eval()
    assert product.dim == DIM // 2 and product.num_codes == (CODES,)
    with torch.no_grad():
        product.levels[0].codebook.copy_(alone.codebook[:, : DIM // 2])
    given = features(dim=DIM // 2)
    output, expected = product(given), product.levels[0](given)
    assert torch.equal(output.vectors, expected.vectors)
    assert output.parts == expected.parts and torch.equal(output.loss, expected.loss)
    with pytest.raises(ValueError, match=r"quantizer\.heads=0"):
        ProductConfig(heads=0)


def test_no_code_is_restarted_from_the_last_step_for_it_on(book_config):
    changes = {"restart_every": 1} if isinstance(book_config, SimVQConfig) else {}
    quantizer = build(book_config, restart="split", restart_until=2, **changes).train()
    for step in range(4):
        with torch.no_grad():
            quantizer.mean_counts[:2] = -0.5
        train_step(quantizer, step, features(seed=step))
        assert (quantizer.changed is not None and bool(quantizer.changed.any())) == (step < 2)


def test_simvq_restarts_only_when_it_is_time():
    quantizer = build(CASES["simvq"], restart="data", restart_below=0.5, restart_every=4).train()
    frozen = quantizer.frozen.clone()
    for step in range(4):
        quantizer.mean_counts[:6] = -0.5
        train_step(quantizer, step, features(seed=step))
        assert torch.equal(quantizer.frozen, frozen) == (step < 3)
    assert codebook.nearest is search.nearest  # one search for all


# levels


@pytest.mark.parametrize(
    "name", ["residual", "residual-gradient", "residual-shared", "residual-simvq"]
)
def test_each_level_quantizes_what_the_others_left(name):
    config = CASES[name]
    quantizer = build(config).eval()
    quantizer.initialise(to_rows(features(seed=2, batch=40)), seed=0)
    given = features().requires_grad_()
    output, rest = quantizer(given), to_rows(given.detach())
    loss = 0.0
    for index, codes in enumerate(output.codes.unbind(1)):
        level = quantizer.levels[0 if config.shared else index]
        assert torch.equal(codes.flatten(), search.nearest(rest, level.vectors))
        left = rest - level.vectors.detach()[codes.flatten()]
        loss = loss + left.square().mean() * (0.25 if getattr(level, "ema", False) else 1.25)
        assert left.square().mean() < rest.square().mean()
        rest = left
    torch.testing.assert_close(output.loss, loss)
    torch.testing.assert_close(to_rows(output.vectors), to_rows(given) - rest)
    output.vectors.mul(3).sum().backward()
    assert torch.equal(given.grad, torch.full_like(given, 3))


@pytest.mark.parametrize(
    "config", [ResidualConfig(depth=3), ResidualConfig(depth=3, shared=True), ProductConfig()]
)
def test_every_level_is_told_of_which_image_its_rows_are(config, monkeypatch):
    quantizer, told = config.build(), []
    monkeypatch.setattr(
        type(quantizer.levels[0]),
        "initialise",
        lambda *given, images: told.append((given[1], images)),
    )
    rows, images = torch.randn(6, quantizer.dim), torch.arange(6) // 2
    quantizer.initialise(rows, 0, images=images)
    for of_level, of_image in told:
        assert torch.equal(of_image, images.repeat(len(of_level) // 6))
    assert [len(of_level) for of_level, _ in told] == (
        [6, 12, 18] if getattr(config, "shared", 0) else [6] * len(told)
    )


def test_a_shared_codebook_learns_from_all_levels():
    quantizer = build(CASES["residual-shared"]).train()
    assert len(quantizer.levels) == 1 and quantizer.num_codes == (CODES,) * 3
    quantizer(features())
    assert quantizer.levels[0].statistics.counts.sum() == 3 * 6 * 3 * 2


def test_dropped_levels_leave_sums_of_the_first():
    quantizer = build(CASES["residual"], quantizer_dropout=0.7)
    given = features(batch=200)
    output = quantizer.train()(given)
    sums, matches = torch.zeros_like(given), []
    for level, codes in zip(quantizer.levels, output.codes.split(1, dim=1)):
        sums = sums + level.lookup(codes)
        matches.append((output.vectors == sums).flatten(1).all(1))
    matches = torch.stack(matches)  # (depth, B)
    assert matches.any(0).all()
    share = matches.float().mean(1)  # 0.7 / 3 each, and 0.3 at full depth
    assert (share - torch.tensor([0.233, 0.233, 0.533])).abs().max() < 0.11  # 3 standard deviations
    assert torch.equal(quantizer.eval()(given).vectors, sums)


@pytest.mark.parametrize("name", ["product", "product-cosine", "product-simvq", "product-gradient"])
def test_heads_are_searched_at_once_and_are_what_each_would_be_alone(monkeypatch, name):
    quantizer, alone = (build(LEVELLED.get(name, CASES["product"])).train() for _ in range(2))
    assert quantizer.dim == DIM and quantizer.num_codes == (CODES, CODES)
    for each in (quantizer, alone):
        each.initialise(to_rows(features(seed=2, batch=40)), seed=0)
    searches, nearest = [], search.nearest
    monkeypatch.setattr(
        product, "nearest", lambda rows, book: searches.append(rows.shape) or nearest(rows, book)
    )
    for step in range(3):
        given, same = features(seed=step).requires_grad_(), features(seed=step).requires_grad_()
        output = quantizer(given)
        parts = [level(part) for level, part in zip(alone.levels, same.chunk(2, dim=1))]
        assert torch.equal(output.vectors, torch.cat([each.vectors for each in parts], dim=1))
        assert torch.equal(output.codes, torch.cat([each.codes for each in parts], dim=1))
        loss = torch.stack([each.loss for each in parts]).mean()
        assert torch.equal(output.loss, loss)
        for name in ("commitment", "perplexity"):
            terms = torch.stack([each.parts[name] for each in parts])
            torch.testing.assert_close(output.parts[name], terms.mean())
        (output.vectors.sin().sum() + output.loss).backward()
        (torch.cat([each.vectors for each in parts], dim=1).sin().sum() + loss).backward()
        assert torch.equal(given.grad, same.grad)
        quantizer.update(step, True)
        for level in alone.levels:
            level.update(step, True)
        assert same_state(quantizer, alone)
    assert searches == [(2, 36, DIM // 2)] * 3


def test_levels_are_configured_in_place():
    @dataclasses.dataclass(frozen=True)
    class Holder:
        quantizer: object = configuration.one_of(QUANTIZERS, "vector")

    given = {
        "kind": "residual",
        "depth": 2,
        "level": {"kind": "simvq", "num_codes": 32, "code_dim": 8},
    }
    quantizer = configuration.from_dict(Holder, {"quantizer": given}, "test").quantizer.build()
    assert quantizer.num_codes == (32, 32) and quantizer.dim == 8


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"depth": 0}, "quantizer.depth=0 must be at least 1"),
        ({"quantizer_dropout": 2.0}, r"quantizer_dropout=2.0 must be in \[0, 1\]"),
        ({"level": VectorConfig(metric="cosine")}, "level.metric=cosine"),
        ({"level": VectorConfig(rotation=True)}, "level.rotation=true"),
    ],
)
def test_residuals_that_make_no_sense_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        ResidualConfig(**wrong)


@pytest.mark.parametrize("shared", [True, False])
def test_restarts_of_levels_do_not_depend_on_micro_batches(shared):
    """Their new codes are drawn from features and from what levels left of them."""

    def trained(parts):
        torch.manual_seed(0)
        level = VectorConfig(
            num_codes=64, code_dim=DIM, restart="data", restart_below=0.999, init="normal"
        )
        quantizer = ResidualConfig(depth=2, shared=shared, level=level).build().train()
        for part in features(batch=4).chunk(parts):
            quantizer(part)
        quantizer.update(0, True)
        assert 10 < int(quantizer.levels[0].changed.sum()) < 64
        return quantizer.levels[0].codebook

    torch.testing.assert_close(trained(1), trained(2))
    torch.testing.assert_close(trained(1), trained(4))


@pytest.mark.parametrize("config", [VectorConfig, SimVQConfig])
def test_settings_that_would_divide_by_zero_are_refused(config):
    with pytest.raises(ValueError, match=r"quantizer\.entropy_temperature=0 must be above 0"):
        config(entropy_temperature=0)
    with pytest.raises(ValueError, match=r"quantizer\.restart_every=0 must be at least 1"):
        SimVQConfig(restart_every=0)


@pytest.mark.parametrize("kind", ["vector", "simvq"])
@pytest.mark.parametrize("restart", ["data", "split"])
def test_the_average_takes_restarted_codes_at_once(kind, restart):
    changes = {"restart_every": 1} if kind == "simvq" else {}
    torch.manual_seed(0)
    quantizer = QUANTIZERS[kind](
        num_codes=CODES, code_dim=DIM, restart=restart, restart_below=0.1, **changes
    ).build()
    averaged = Ema(quantizer.train(), 0.99)
    with torch.no_grad():
        quantizer.mean_counts[:3] = -0.5
    quantizer(features())
    quantizer.update(1000, True)
    before = {name: tensor.clone() for name, tensor in averaged.module.state_dict().items()}
    averaged.update(1000)
    ours, theirs = averaged.module.state_dict(), quantizer.state_dict()
    name = "codebook" if kind == "vector" else "frozen"
    changed = quantizer.changed
    assert changed.shape == (CODES,) and changed[:3].all() and not changed.all()
    assert torch.equal(ours[name][changed], theirs[name][changed])
    if kind == "vector":  # the others are averaged
        torch.testing.assert_close(
            ours[name][~changed], before[name][~changed].lerp(theirs[name][~changed], 0.01)
        )
