"""Several processes give what one gives; randomness belongs to samples, not to ranks."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import processes
import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint
from toy import Rows, Toy, ToyRun, leaves, log_lines, loop

from tokenizer.data.loader import feed
from tokenizer.quantizers.codebook import pick_rows
from training import batch_means, distributed, randomness
from training.checkpoint import Run
from training.errors import UserError
from training.loop import Batch, Loss, Phase, train


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> Path:
    """The folder of one torchrun of toy.py: a run in fp64, a run in fp32, facts of each rank."""
    folder = tmp_path_factory.mktemp("ranks")
    done = processes.torchrun(2, processes.TESTS / "toy.py", "ranks", folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_two_ranks_train_as_one_does(two_ranks, tmp_path, dtype, tolerance):
    """Two turns, accumulation, averaged buffers, rows picked for restarts, the log."""
    toy, rows = Toy(ToyRun(dropout=0.0, loop=loop(accumulate=2))), Rows()
    rows.rows = rows.rows.to(dtype)
    toy.generator.to(dtype), toy.discriminator.to(dtype)
    toy.train(tmp_path / "run", feed(rows, 8, seed=5, accumulate=2))
    one, two = Run(tmp_path / "run", None).latest(), Run(two_ranks / str(dtype), None).latest()
    one.pop("meter"), two.pop("meter")
    ours, theirs = leaves(one), leaves(two)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(
            theirs[name], value, rtol=0, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )
    for line, other in zip(
        log_lines(tmp_path / "run"), log_lines(two_ranks / str(dtype)), strict=True
    ):
        assert line.keys() == other.keys()
        assert line == pytest.approx(other, abs=max(tolerance, 1e-9))


def test_ranks_agree(two_ranks):
    first, second = (json.loads((two_ranks / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    codes = [10 * i + i % 3 for i in range(301)]  # rank 0 alone has them, in order
    assert first.pop("drawn") == {"codes": codes, "shape": [301, 2, 2, 3], "timed": True}
    assert second.pop("drawn") is None
    assert first == second
    assert first["world"] == 2
    assert first["gathered"] == [0.0, 1.0, 1.0]  # in rank order, of different lengths
    assert first["any"] == [True, False]
    assert first["broadcast"] == 5.0
    assert first["kept"]


def test_one_process_needs_no_group():
    assert (distributed.rank(), distributed.world(), distributed.is_main()) == (0, 1, True)
    distributed.barrier()
    tensor = torch.tensor([1.0, 2.0])
    for same in (
        distributed.sum_,
        distributed.mean_,
        distributed.gather_rows,
        distributed.broadcast_,
    ):
        assert same(tensor) is tensor
    assert tensor.tolist() == [1.0, 2.0]
    assert distributed.gather_parts([tensor, tensor + 2]).tolist() == [1.0, 2.0, 3.0, 4.0]
    assert distributed.any_true(True) and not distributed.any_true(False)


@pytest.fixture
def machine(monkeypatch):
    """Sets the GPUs of each kind that torch finds, and gives the groups that are made, as (backend,
    device)."""
    groups = []

    def set_up(
        cuda: int = 0, xpu: int = 0, mps: bool = False, has_fp64: bool = True, backends: bool = True
    ) -> list:
        for module, count in ((torch.cuda, cuda), (torch.xpu, xpu)):
            current = [0]
            monkeypatch.setattr(module, "is_available", lambda count=count: count > 0)
            monkeypatch.setattr(module, "device_count", lambda count=count: count)
            monkeypatch.setattr(
                module, "set_device", lambda index, current=current: current.__setitem__(0, index)
            )
            monkeypatch.setattr(module, "current_device", lambda current=current: current[0])
        monkeypatch.setattr(
            torch.xpu, "get_device_properties", lambda index: SimpleNamespace(has_fp64=has_fp64)
        )
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setattr(dist, "is_backend_available", lambda name: backends)
        monkeypatch.setattr(dist, "rendezvous", lambda url: iter([("store", 1, 2)]))

        def make(backend, device_id, **_):
            groups.append((backend, device_id and str(device_id)))

        monkeypatch.setattr(dist, "init_process_group", make)
        for name, value in {
            "WORLD_SIZE": 2,
            "RANK": 0,
            "LOCAL_RANK": 1,
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": 1,
        }.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.delenv("GROUP_WORLD_SIZE", raising=False)
        return groups

    return set_up


@pytest.mark.parametrize(
    ("there", "group"),
    [
        ({"cuda": 2}, ("nccl", "cuda:1")),
        ({"cuda": 2, "xpu": 2}, ("nccl", "cuda:1")),
        ({"xpu": 2}, ("xccl", "xpu:1")),
        ({"xpu": 2, "has_fp64": False}, ("gloo", None)),
        ({"mps": True}, ("gloo", None)),
        ({}, ("gloo", None)),
    ],
)
def test_processes_compute_on_the_gpus_there_are_and_join_in_their_way(
    machine, capsys, there, group
):
    groups = machine(**there)
    distributed.start()
    assert groups == [group] and str(distributed.device()) == (group[1] or "cpu")
    said = capsys.readouterr().err
    unused = {"has_fp64", "mps"} & there.keys()
    assert said.count("\n") == len(unused) and ("has no float64" in said) == bool(unused)


def test_too_few_gpus_and_a_torch_without_their_group_are_one_line(machine):
    machine(xpu=1)
    with pytest.raises(
        UserError, match="process 1 of this machine has no GPU, of which there are 1"
    ):
        distributed.start()
    machine(xpu=2, backends=False)
    with pytest.raises(UserError, match="without xccl"):
        distributed.start()


@pytest.mark.parametrize("shape", [(), (3,), (4, 5)])
def test_draws_belong_to_positions(shape):
    whole = randomness.draw((1, 2, 3), torch.arange(32), shape)
    assert whole.shape == (32, *shape) and whole.dtype == torch.float32
    assert 0 <= whole.min() and whole.max() < 1
    for parts in (
        torch.arange(32).chunk(2),
        torch.arange(32).chunk(7),
        torch.randperm(32).split(5),
    ):
        for positions in parts:
            assert torch.equal(randomness.draw((1, 2, 3), positions, shape), whole[positions])
    assert not torch.equal(randomness.draw((1, 2, 4), torch.arange(32), shape), whole)
    assert randomness.draw((1,), torch.arange(0), shape).shape == (0, *shape)
    exact = randomness.draw((1, 2, 3), torch.arange(32), shape, torch.float64)
    assert exact.dtype == torch.float64 and 0 < exact.min() and exact.max() < 1
    assert torch.equal(
        randomness.draw((1, 2, 3), torch.tensor([9, 4]), shape, torch.float64), exact[[9, 4]]
    )


def test_mix_known_values():
    """One number is SplitMix64's first output for that seed, without the sign bit."""
    assert randomness.mix(0) == 0xE220A8397B1DCDAF & (2**63 - 1)
    assert randomness.mix(1234567) == 6457827717110365317
    assert randomness.mix(-1) == randomness.mix(2**64 - 1)


def test_mix_spreads():
    numbers = {
        randomness.mix(seed, step, rank)
        for seed in range(10)
        for step in range(100)
        for rank in range(4)
    }
    assert len(numbers) == 4000 and all(0 <= number < 2**63 for number in numbers)
    assert randomness.mix(1, 2) != randomness.mix(2, 1) != randomness.mix(2, 1, 0)
    flips = [
        (randomness.mix(0, step) ^ randomness.mix(0, step + 1)).bit_count() for step in range(200)
    ]
    assert 28 < sum(flips) / len(flips) < 35  # half of 63 bits


def test_picked_rows_are_rows_without_repetition():
    candidates = torch.arange(24.0).view(12, 2)
    picked = pick_rows(candidates, 12, step=3)
    assert torch.equal(picked[picked[:, 0].argsort()], candidates)
    assert torch.equal(pick_rows(candidates, 5, step=3), pick_rows(candidates, 5, step=3))
    assert not torch.equal(pick_rows(candidates, 12, step=4), picked)
    assert pick_rows(candidates[:2], 5, step=0).shape == (5, 2)  # more than there are


def test_words_are_those_of_numpys_philox():
    """A key says whose sequence it is and which part of it."""
    known = np.random.Philox(key=[0, 1234567]).random_raw(12).tolist()
    drawn = randomness.words(torch.tensor([[0, 0], [1234567, 3], [1234567, 0]]), 3)
    assert [word % 2**64 for word in drawn[1].tolist()] == known[9:]
    assert [word % 2**64 for word in drawn[2].tolist()] == known[:3]


def test_uniform_numbers_are_uniform_and_of_their_rows():
    keys = torch.tensor([[owner, part] for owner in range(16) for part in range(16)])
    drawn = randomness.uniform(keys, 1001).double()
    assert drawn.shape == (256, 1001) and 0 < drawn.min() and drawn.max() < 1
    counts = drawn.flatten().mul(64).long().bincount(minlength=64)
    expected = drawn.numel() / 64
    assert (
        25 < ((counts - expected).square() / expected).sum() < 115
    )  # chi-squared with 63 degrees of freedom
    for across in (drawn, drawn.T[:256]):
        correlation = torch.corrcoef(across).fill_diagonal_(0) * across.shape[1] ** 0.5
        assert correlation.abs().max() < 6 and 0.95 < correlation.std() < 1.05
    assert torch.equal(randomness.uniform(torch.tensor([[0, 0]]), 5)[0].double(), drawn[0, :5])
    assert torch.equal(randomness.uniform(torch.tensor([[1, 3]]), 1001)[0].double(), drawn[19])


@pytest.fixture
def dropouts() -> torch.nn.Sequential:
    network = torch.nn.Sequential(randomness.Dropout(0.25), randomness.Dropout(0.25))
    randomness.number_streams(network)
    return network


def test_dropout_belongs_to_samples(dropouts):
    """Masks are the same however the batch is split, and others for other streams, samples, steps
    and seeds."""
    positions, ones = torch.arange(16), torch.ones(16, 30, 7)

    def masks(seed, part, layer=0):
        with randomness.samples(seed, part):
            return dropouts[layer](ones[part])

    whole = masks((1, 2), positions)
    for parts in (positions.chunk(4), positions.flip(0).split(5)):
        for part in parts:
            assert torch.equal(masks((1, 2), part), whole[part])
    others = [
        masks((1, 3), positions),
        masks((2, 2), positions),
        masks((1, 2), positions, 1),
        whole.roll(1, 0),
    ]
    for other in others:  # independent masks agree on 10 of 16 elements
        assert 0.58 < (other == whole).double().mean() < 0.67
    assert whole.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    assert 0.23 < (whole == 0).double().mean() < 0.27


def test_dropout_outside_of_training(dropouts):
    ones = torch.ones(4, 50)
    assert dropouts.eval()(ones) is ones and randomness.Dropout(0.0)(ones) is ones
    dropouts.train()
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(dropouts(ones))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert dropouts.state_dict() == {}


@pytest.mark.parametrize("inside", [True, False])
def test_activations_computed_again_meet_the_same_masks(dropouts, inside):
    rows, layer = torch.randn(4, 20, requires_grad=True), torch.nn.Linear(20, 20)

    def gradient(again):
        torch.manual_seed(3)
        context = randomness.samples((5,), torch.arange(4)) if inside else contextlib.nullcontext()
        with context:
            run = torch.nn.Sequential(dropouts[0], layer, torch.nn.Tanh(), dropouts[1])
            made = checkpoint(run, rows, use_reentrant=False) if again else run(rows)
            return torch.autograd.grad(made.square().sum(), [rows, *layer.parameters()])

    for ours, theirs in zip(gradient(False), gradient(True)):
        assert torch.equal(ours, theirs)


@pytest.mark.slow
def test_one_compiled_dropout_serves_all_layers_and_steps():
    """In one graph, compiled once, with the masks that it has uncompiled."""
    import torch._dynamo

    layers = [
        torch.nn.Sequential(torch.nn.Linear(8, 8), randomness.Dropout(0.25)) for _ in range(3)
    ]
    network, rows = torch.nn.Sequential(*layers), torch.randn(4, 6, 8, requires_grad=True)
    randomness.number_streams(network)
    compiled = [torch.compile(layer, backend="aot_eager", fullgraph=True) for layer in layers]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(3):
            with randomness.samples((1, step), torch.arange(4)):
                made = rows
                for layer in compiled:
                    made = layer(made)
                assert torch.equal(made, network(rows))


class Clusters(torch.nn.Module):
    """Shares of three clusters, to be used evenly: a loss that is no mean over samples, and one
    beside it that is."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3))
        self.dropout = randomness.Dropout(0.3)
        self.gathered, self.steps = [], []

    def loss(self, batch: Batch, step: int) -> Loss:
        shares = (self.dropout(batch["rows"]) @ self.weight).softmax(1)
        self.gathered.append(batch.positions)
        mean = batch_means.batch_mean(shares.mean(0))
        skew = batch_means.batch_mean((shares[:, 0] ** 2).mean())  # asks twice
        entropy_gradient = (shares.mean(0) * (mean.log() + 1 + skew)).sum()
        return Loss(entropy_gradient + shares.amax(1).mean(), {"mean": mean.max()})

    def update(self, step: int, taken: bool) -> None:
        if taken:
            self.steps.append(torch.cat(self.gathered).tolist())
        self.gathered = []


@pytest.mark.parametrize("accumulate", [2, 8])
def test_means_over_the_batch_do_not_depend_on_micro_batches(tmp_path, accumulate):
    """Weights after 9 steps, with dropout; statistics of a rehearsal are forgotten."""
    found = []
    for parts in (1, accumulate):
        module, settings = Clusters(), loop(accumulate=parts)
        turn = Phase("clusters", module, module.loss, ToyRun().optimizer, after_step=module.update)
        config = ToyRun(loop=settings)
        run = Run.open(tmp_path / str(parts), config)
        train(
            settings,
            run,
            [turn],
            feed(Rows(), 8, seed=5, accumulate=parts),
            seed=7,
            published=module,
        )
        assert module.steps == [list(range(8))] * 9
        found.append(module.weight.detach())
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-12)


def test_no_rehearsal_where_nothing_is_asked(tmp_path):
    toy = Toy(ToyRun(loop=loop(steps=3, accumulate=4), discriminator_start_step=0))
    seen, losses = [], toy.turns[0].loss
    toy.turns[0].loss = lambda batch, step: seen.append(step) or losses(batch, step)
    toy.train(tmp_path / "run")
    assert seen == [step for step in range(3) for _ in range(4)]


TORCHRUN = {
    "WORLD_SIZE": "2",
    "RANK": "0",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29512",
}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, None) for name in ("RANK", "MASTER_ADDR", "MASTER_PORT")),
        *(
            (name, text)
            for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT")
            for text in ("abc", "-1", "")
        ),
        ("WORLD_SIZE", "0"),
        ("RANK", "2"),
        ("MASTER_PORT", "65536"),
        ("MASTER_ADDR", ""),
    ],
)
def test_an_environment_that_torchrun_did_not_make_is_one_line(monkeypatch, name, value):
    """Schedulers and images set WORLD_SIZE, too."""
    for key, text in {**TORCHRUN, name: value}.items():
        monkeypatch.delenv(key, raising=False) if text is None else monkeypatch.setenv(key, text)
    with pytest.raises(
        UserError,
        match=rf"WORLD_SIZE=.* {name} is .*: start them with torchrun, or unset WORLD_SIZE",
    ):
        distributed.start()
