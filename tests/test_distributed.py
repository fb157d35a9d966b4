"""Several processes give what one gives; randomness belongs to samples, not to ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from toy import Rows, Toy, ToyRun, leaves, log_lines, loop

from tokenizer.data.sampler import feed
from tokenizer.quantizers.codebook import pick_rows
from training import distributed
from training.checkpoint import Run


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> Path:
    """The folder of one torchrun of toy.py: a run in fp64, a run in fp32, facts of each rank."""
    folder, root = tmp_path_factory.mktemp("ranks"), Path(__file__).parents[1]
    toy = str(Path(__file__).with_name("toy.py"))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", toy, "ranks", str(folder)]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, *launch], capture_output=True, text=True, cwd=root, env=environment)
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
        torch.testing.assert_close(theirs[name], value, rtol=0, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")
    for line, other in zip(log_lines(tmp_path / "run"), log_lines(two_ranks / str(dtype)), strict=True):
        assert line.keys() == other.keys()
        assert line == pytest.approx(other, abs=max(tolerance, 1e-9))


def test_ranks_agree(two_ranks):
    first, second = (json.loads((two_ranks / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert first["world"] == 2
    assert first["gathered"] == [0.0, 1.0, 1.0]  # in rank order, of different lengths
    assert first["any"] == [True, False]
    assert first["broadcast"] == 5.0


def test_one_process_needs_no_group():
    assert (distributed.rank(), distributed.world(), distributed.is_main()) == (0, 1, True)
    distributed.barrier()
    tensor = torch.tensor([1.0, 2.0])
    for same in (distributed.sum_, distributed.mean_, distributed.gather_rows, distributed.broadcast_):
        assert same(tensor) is tensor
    assert tensor.tolist() == [1.0, 2.0]
    assert distributed.any_true(True) and not distributed.any_true(False)


@pytest.mark.parametrize("shape", [(), (3,), (4, 5)])
def test_draws_belong_to_positions(shape):
    whole = distributed.draw((1, 2, 3), torch.arange(32), shape)
    assert whole.shape == (32, *shape) and whole.dtype == torch.float32
    assert 0 <= whole.min() and whole.max() < 1
    for parts in (torch.arange(32).chunk(2), torch.arange(32).chunk(7), torch.randperm(32).split(5)):
        for positions in parts:
            assert torch.equal(distributed.draw((1, 2, 3), positions, shape), whole[positions])
    assert not torch.equal(distributed.draw((1, 2, 4), torch.arange(32), shape), whole)
    assert distributed.draw((1,), torch.arange(0), shape).shape == (0, *shape)


def test_mix_known_values():
    """One number is SplitMix64's first output for that seed, without the sign bit."""
    assert distributed.mix(0) == 0xE220A8397B1DCDAF & (2**63 - 1)
    assert distributed.mix(1234567) == 6457827717110365317
    assert distributed.mix(-1) == distributed.mix(2**64 - 1)


def test_mix_spreads():
    numbers = {distributed.mix(seed, step, rank) for seed in range(10) for step in range(100) for rank in range(4)}
    assert len(numbers) == 4000 and all(0 <= number < 2**63 for number in numbers)
    assert distributed.mix(1, 2) != distributed.mix(2, 1) != distributed.mix(2, 1, 0)
    flips = [(distributed.mix(0, step) ^ distributed.mix(0, step + 1)).bit_count() for step in range(200)]
    assert 28 < sum(flips) / len(flips) < 35  # half of 63 bits


def test_picked_rows_are_rows_without_repetition():
    candidates = torch.arange(24.0).view(12, 2)
    picked = pick_rows(candidates, 12, step=3)
    assert torch.equal(picked[picked[:, 0].argsort()], candidates)
    assert torch.equal(pick_rows(candidates, 5, step=3), pick_rows(candidates, 5, step=3))
    assert not torch.equal(pick_rows(candidates, 12, step=4), picked)
    assert pick_rows(candidates[:2], 5, step=0).shape == (5, 2)  # more than there are
