"""The search of devices without the fused kernel is a float64 search: on the CPU, and on a
pretended GPU."""

from __future__ import annotations

import contextlib

import pytest
import torch
from pretend import Pretended, pretended_gpu
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tokenizer.quantizers import search, search_on_cpu, shortlist
from training import distributed

NAN, INF = float("nan"), float("inf")


class Float64(TorchDispatchMode):
    """Counts the float64 numbers that are made; none may be on a GPU that `has_none`."""

    def __init__(self, has_none: bool = False) -> None:
        super().__init__()
        self.has_none, self.made = has_none, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float64:
                assert not (self.has_none and isinstance(tensor, Pretended)), (
                    f"{func} makes float64 on the GPU"
                )
                self.made += tensor.numel()
        return made


def on_cpu(features, codebook, offsets=None):
    return shortlist.nearest_listed(features, codebook, offsets)


def on_gpu(features, codebook, offsets=None, float64=True):
    with pytest.MonkeyPatch.context() as patch, pretended_gpu() as waits:
        if not float64:
            patch.setattr(shortlist, "has_float64", lambda device: False)
        given = [
            None if part is None else part.to(distributed.device())
            for part in (features, codebook, offsets)
        ]
        waits.clear()
        with Float64(has_none=not float64):
            codes = shortlist.nearest_listed(*given)
        copies = sum(count for (what, _), count in waits.items() if what == "copy between devices")
        assert codes.device == given[0].device and sum(waits.values()) - copies <= 1, waits
        assert not (float64 and copies), waits
        return codes.cpu()


def without_float64(features, codebook, offsets=None):
    return on_gpu(features, codebook, offsets, float64=False)


@pytest.fixture(params=[on_cpu, on_gpu, without_float64], ids=lambda where: where.__name__)
def nearest(request):
    return request.param


def oracle(features, codebook, offsets=None):
    """The first of the least scores in float64, each summed alike."""
    valid = codebook.isfinite().all(1)
    scores = []
    for z in features.double():
        if offsets is None:
            scores.append((z - codebook.double()).square().sum(1) / 2)
        else:
            scores.append(offsets.double() - (z * codebook.double()).sum(1))
    return torch.stack(scores).where(valid, INF).argmin(1).where(features.isfinite().all(1), -1)


@pytest.mark.parametrize(
    ("num_rows", "num_codes", "dim", "budget"),
    [
        (60, 1, 3, search_on_cpu.BUDGET),
        (60, 7, 1, search_on_cpu.BUDGET),
        (7, 37, 8, 1),
        (101, 700, 33, 30_000),
    ],
)
def test_it_is_the_search_in_float64(monkeypatch, nearest, num_rows, num_codes, dim, budget):
    monkeypatch.setattr(search_on_cpu, "BUDGET", budget)
    features, codebook = torch.randn(num_rows, dim), torch.randn(num_codes, dim)
    codes = nearest(features, codebook)
    assert codes.dtype == torch.int64 and torch.equal(codes, oracle(features, codebook))
    offsets = torch.randn(num_codes)
    assert torch.equal(nearest(features, codebook, offsets), oracle(features, codebook, offsets))
    assert nearest(features[:0], codebook).shape == (0,)


@pytest.mark.parametrize("copies", [2, shortlist.KEPT, shortlist.KEPT + 1, 40])
def test_near_ties_and_equal_codes(nearest, copies):
    """Copies of each code, of which half differ by one unit of the last place in one channel."""
    order = torch.randperm(30 * copies)
    codebook = torch.randn(30, 40).repeat(copies, 1)
    codebook[len(codebook) // 2 :, 7] = torch.nextafter(
        codebook[len(codebook) // 2 :, 7], torch.tensor(INF)
    )
    codebook = codebook[order]
    features = 0.1 * torch.randn(200, 40) + codebook[torch.randint(len(codebook), (200,))]
    features[:, 7] += 1
    assert torch.equal(nearest(features, codebook), oracle(features, codebook))


def test_equal_distances_go_to_the_lowest_index(nearest):
    codebook = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    assert nearest(torch.tensor([[0.0, 0.0], [0.0, 3.0], [3.0, 3.0]]), codebook).tolist() == [
        1,
        1,
        0,
    ]
    assert nearest(torch.randn(50, 5), torch.ones(900, 5)).tolist() == [0] * 50


@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1e-20, 1e-12, 1e-6, 1e12, 1e18, 3e37])
def test_lengths_near_the_ends_of_fp32(nearest, scale):
    features, codebook = torch.randn(60, 20) * scale, torch.randn(90, 20) * scale
    assert torch.equal(nearest(features, codebook), oracle(features, codebook))


def test_rows_and_codes_of_very_different_lengths(nearest):
    features = torch.randn(200, 16) * torch.logspace(-30, 30, 200)[:, None]
    codebook = torch.randn(300, 16) * torch.logspace(-20, 15, 300)[:, None]
    norms = codebook.double().square().sum(1) / 2  # a distance would drown in |z|^2
    expected = (norms - features.double() @ codebook.double().T).argmin(1)
    assert torch.equal(nearest(features, codebook), expected)
    assert (
        nearest(torch.zeros(3, 16), codebook).tolist()
        == oracle(torch.zeros(3, 16), codebook).tolist()
    )


def test_what_is_not_finite_is_flagged_never_chosen_and_changes_no_other(nearest):
    features, codebook = torch.randn(100, 24), torch.randn(80, 24)
    features[3, 5], features[40], features[41, 0] = NAN, INF, -INF
    assert torch.equal(nearest(features, codebook), oracle(features, codebook))
    codebook[2, 3], codebook[50], codebook[79, 0] = NAN, INF, -INF
    assert torch.equal(nearest(features, codebook), oracle(features, codebook))
    assert nearest(features[:4], torch.full((5, 24), NAN)).tolist() == [-1] * 4
    offsets = torch.zeros(80)
    assert nearest(
        features[:1] * 0, torch.randn(80, 24), offsets.index_fill(0, torch.tensor([0]), INF)
    ).tolist() == [1]


def test_a_large_common_mean_costs_no_precision(nearest):
    features, codebook = torch.randn(100, 64) + 300, torch.randn(400, 64) + 300
    assert torch.equal(nearest(features, codebook), oracle(features, codebook))


def test_a_processor_that_flushes_small_numbers_to_zero():
    cases = [
        (torch.randn(60, 20) * a, torch.randn(90, 20) * b)
        for a in (1e-20, 1e-13, 1)
        for b in (1e-12, 1e-9, 1)
    ]
    expected = [oracle(*case) for case in cases]
    try:
        if not torch.set_flush_denormal(True):
            pytest.skip("this processor does not")
        found = [on_cpu(*case) for case in cases]
    finally:
        torch.set_flush_denormal(False)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected))


def test_little_is_left_to_float64():
    """Random features are the hardest there are; a float64 search makes three times as many numbers
    as scores."""
    features, codebook = torch.randn(256, 64), torch.randn(4096, 64)
    with Float64() as whole:
        search_on_cpu.in_float64(features, codebook, None)
    with Float64() as listed:
        codes = shortlist.nearest_listed(features, codebook, None)
    assert torch.equal(codes, oracle(features, codebook))
    assert listed.made < 0.01 * whole.made and whole.made > 3 * 256 * 4096


def test_reduced_precision_elsewhere_does_not_reach_it():
    features, codebook = torch.randn(200, 96), torch.randn(300, 96)
    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        torch.set_float32_matmul_precision("medium")
        assert torch.equal(on_cpu(features, codebook), oracle(features, codebook))


def test_a_device_without_the_kernel_takes_it():
    features, codebook = torch.randn(50, 24), torch.randn(80, 24)
    with pretended_gpu() as waits:
        given = features.to(distributed.device()), codebook.to(distributed.device())
        waits.clear()
        with Float64() as made:
            codes = search.on_device(*given, None)
        assert sum(waits.values()) == 1 and made.made < 80 * 50
        assert torch.equal(codes.cpu(), oracle(features, codebook))
