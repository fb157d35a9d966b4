"""The fused search against float64: in Triton's interpreter, which needs a process of its own, and
on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import processes
import pytest
import torch

from tokenizer.quantizers import fused
from tokenizer.quantizers.fused import Tiles, nearest_fused, search

INTERPRETED = (
    os.environ.get("TRITON_INTERPRET") == "1"
)  # read as Triton's own functions are made: not to be set here
devices = pytest.mark.parametrize(
    "device", ["cpu"] if INTERPRETED else [pytest.param("cuda", marks=pytest.mark.gpu)]
)
every_coarse = pytest.mark.parametrize("coarse", ["fp16", "bf16", "tf32", "ieee"])
SMALL = Tiles(rows=32, codes=32, depth=16, warps=4, stages=2, resident=2)


@pytest.fixture(autouse=True)
def large_groups(monkeypatch):
    if INTERPRETED:
        monkeypatch.setattr(fused, "GROUP", 32)


def interpreted(*files: Path) -> subprocess.CompletedProcess[str]:
    """Those tests of some files that call kernels, in one process with Triton's interpreter."""
    command = [sys.executable, "-m", "pytest", *files, "-vv", "-m", "not gpu"]
    command += ["-k", "fused_search or Triton", "-p", "no:cacheprovider"]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    return subprocess.run(
        command, cwd=processes.TESTS.parent, env=env, capture_output=True, text=True
    )


@pytest.mark.skipif(INTERPRETED, reason="is this process")
def test_laws_hold_in_the_interpreter():
    triton = pytest.importorskip("triton")
    triton_version, numpy_version = (
        tuple(map(int, m.__version__.split(".")[:2])) for m in (triton, np)
    )
    philox, files = next(processes.TESTS.rglob("test_philox.py")), [Path(__file__)]
    # The interpreter of Triton before 3.7 makes numbers of arrays as numpy does no longer.
    files *= triton_version >= (3, 7) or numpy_version < (2, 4)
    run = interpreted(philox, *files)
    assert run.returncode == 0, run.stdout[-10000:] + run.stderr[-2000:]
    passed = [line for line in run.stdout.splitlines() if " PASSED" in line]
    assert sum("test_philox" in line and "in Triton" in line for line in passed) == 8
    assert sum("test_fused_search" in line for line in passed) > 15 * len(files)
    if not files:
        pytest.skip("but for the generator of random numbers, which passed: Triton is too old")


@pytest.mark.skipif(INTERPRETED, reason="anything is available to the interpreter")
def test_a_processor_without_the_interpreter_is_refused():
    assert not fused.available(torch.device("cpu"))


def half_norms(codebook):
    return codebook.square().sum(1) / 2


def oracle(features, codebook, offsets=None):
    """Lowest index of the least score in float64; equal codes are summed in one order, so that they
    tie."""
    valid = codebook.isfinite().all(1)
    codes = codebook.double().where(valid[:, None], 0)
    if offsets is None:
        scores = (codes * (codes / 2 - features.double()[:, None])).sum(2)
    else:
        valid = valid & offsets.isfinite()
        scores = offsets.double() - (features.double()[:, None] * codes).sum(2)
    return scores.where(valid, float("inf")).argmin(1).where(features.isfinite().all(1), -1)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def on(device, *tensors):
    return [tensor.to(device) for tensor in tensors]


@devices
@every_coarse
def test_shapes_that_fill_no_tile(coarse, device):
    features, codebook = on(device, normal(37, 19), normal(101, 19, seed=1))
    found = search(features, codebook, None, coarse, SMALL)
    assert torch.equal(found.codes, oracle(features, codebook))
    assert found.rechecked == (37 if coarse == "ieee" else 0)


def adversarial():
    """Rows and codes at the ends of fp32, equal codes in different tiles, near ties, what is not
    finite; offsets."""
    codes = normal(90, 24)
    codes[[33, 70]] = codes[5].clone()  # in three tiles of 32
    codes[80] = codes[6].nextafter(torch.tensor(torch.inf))
    codes[50] = codes[6]
    codes[50, 3] = codes[6, 3].nextafter(torch.tensor(-torch.inf))
    codes[[40, 41]] = 0
    codes[60] *= 1e-40
    codes[61] *= 1e6
    codes[62] *= 1e25  # its square is not finite in fp32
    codes[20, 3], codes[21, 0], codes[22, 5] = torch.nan, torch.inf, -torch.inf
    offsets = half_norms(codes)
    offsets[23:26] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    special = torch.cat(
        [codes[[5, 33, 6, 80, 50, 40, 60, 61, 62]], codes[[5, 6]] + 1e-3, codes[23:26]]
    )
    scales = torch.tensor([1e-45, 1e-40, 1e-20, 1, 1e10, 1e20, 1e30, 1e37])
    broken = normal(3, 24, seed=4)
    broken[0, 0], broken[1, 7], broken[2, 23] = torch.nan, torch.inf, -torch.inf
    largest = torch.finfo(torch.float32).max * normal(2, 24, seed=5).sign()
    return (
        torch.cat([special, scales[:, None] * normal(8, 24, seed=3), largest, broken]),
        codes,
        offsets,
    )


@devices
@every_coarse
def test_adversarial_rows_and_codes(coarse, device):
    features, codebook, _ = on(device, *adversarial())
    expected = oracle(features, codebook)
    assert (
        expected[:5].tolist() == [5, 5, 6, 80, 50]
        and expected[8] == 62
        and expected[-3:].tolist() == [-1, -1, -1]
    )
    assert torch.equal(search(features, codebook, None, coarse, SMALL).codes, expected)


@devices
def test_offsets_and_any_tiling(device):
    features, codebook, offsets = on(device, *adversarial())
    expected = oracle(features, codebook, offsets)
    for tiles, chunk in [
        (SMALL._replace(rows=16, codes=64, depth=32), 0),
        (SMALL._replace(codes=16, resident=8), 14),
    ]:
        assert torch.equal(
            search(features, codebook, offsets, "fp16", tiles, chunk).codes, expected
        )


@devices
@pytest.mark.parametrize("coarse", ["fp16", "bf16", "tf32"])
def test_rows_that_the_short_list_cannot_decide_are_searched_in_fp32(coarse, device):
    """Twenty codes lie within the rounding of halves of each other, far beyond that of fp32."""
    codebook = normal(70, 24)
    cluster = torch.arange(0, 60, 3)
    codebook[cluster] = 3 * normal(1, 24, seed=1) + 0.02 * normal(20, 24, seed=2)
    features = torch.cat([codebook[cluster] + 0.002 * normal(20, 24, seed=3), codebook[1::3]])
    features, codebook = on(device, features, codebook)
    found = search(features, codebook, None, coarse, SMALL)
    assert torch.equal(found.codes, oracle(features, codebook))
    assert found.codes[:20].unique().numel() > 5
    assert found.rechecked == 20


@devices
def test_a_large_common_mean_is_taken_off(device):
    features, codebook = on(device, normal(20, 24) + 300, normal(40, 24, seed=1) + 300)
    found = search(features, codebook, None, "fp16", SMALL)
    assert torch.equal(found.codes, oracle(features, codebook)) and found.rechecked == 0
    given = search(features, codebook, half_norms(codebook), "fp16", SMALL)
    assert (
        torch.equal(given.codes, oracle(features, codebook, half_norms(codebook)))
        and given.rechecked > 0
    )


@devices
def test_an_outlier_costs_no_precision(device):
    features, codebook = on(device, normal(20, 24), normal(40, 24, seed=1))
    codebook[7] *= 1e15
    assert torch.equal(
        search(features, codebook, None, "fp16", SMALL).codes, oracle(features, codebook)
    )


@devices
def test_more_equal_codes_than_are_kept_give_the_lowest(device):
    features, codebook = on(
        device, normal(20, 24).round(), normal(1, 24, seed=1).round().repeat(70, 1)
    )
    codebook[0] += 100  # far
    found = search(features, codebook, None, "fp16", SMALL)
    assert found.codes.eq(1).all() and found.rechecked == 20


@devices
def test_the_least_sizes_and_no_code_to_choose(device):
    features, codebook = on(device, normal(4, 1), normal(3, 1, seed=1))
    assert torch.equal(nearest_fused(features, codebook), oracle(features, codebook))
    assert nearest_fused(features[:0], codebook).shape == (0,)
    assert (
        search(features, torch.full_like(codebook, torch.nan), None, "fp16", SMALL)
        .codes.eq(-1)
        .all()
    )
    with pytest.raises(ValueError, match="half"):
        nearest_fused(features, codebook, coarse="half")
    with pytest.raises(ValueError, match=r"\(K,\)"):
        nearest_fused(features, codebook, half_norms(features))


@devices
def test_compiles_into_one_graph_and_ignores_autocast(device):
    features, codebook = on(device, normal(20, 8), normal(40, 8, seed=1))
    features.requires_grad_()
    expected = oracle(features.detach(), codebook)

    def double(features, codebook):
        return 2 * nearest_fused(features, codebook)

    compiled = torch.compile(
        double, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager"
    )
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(compiled(features, codebook), 2 * expected)


# What only a GPU can show.


def mismatch(features, codebook, codes):
    """Largest excess of the chosen codes' scores over the least, of |x| |c|, in float64; by
    chunks."""
    worst = 0.0
    offsets = half_norms(codebook.double())
    for rows, chosen in zip(features.double().split(1024), codes.split(1024)):
        scores = offsets - rows @ codebook.double().T
        excess = scores.gather(1, chosen[:, None])[:, 0] - scores.amin(1)
        worst = max(
            worst, float((excess / (rows.norm(dim=1) * codebook.double().norm(dim=1).max())).max())
        )
    return worst


@pytest.mark.gpu
@every_coarse
@pytest.mark.parametrize(
    "shape",
    [
        (8192, 16384, 1536),
        (8192, 16384, 768),
        (65536, 1024, 64),
        (32768, 16384, 8),
        (257, 8193, 100),
    ],
)
def test_real_sizes(shape, coarse):
    rows, num_codes, depth = shape
    torch.manual_seed(0)
    features = torch.randn(rows, depth, device="cuda")
    codebook = torch.randn(num_codes, depth, device="cuda")
    features[::2] = (
        codebook[torch.randint(num_codes, (len(features[::2]),), device="cuda")]
        + 0.1 * features[::2]
    )
    codes = nearest_fused(features, codebook, coarse=coarse)
    assert mismatch(features, codebook, codes) < 1e-12


@pytest.mark.gpu
def test_no_matrix_of_all_scores():
    features, codebook = (
        torch.randn(32768, 768, device="cuda"),
        torch.randn(16384, 768, device="cuda"),
    )
    nearest_fused(features, codebook)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    nearest_fused(features, codebook)
    assert torch.cuda.max_memory_allocated() - before < 0.15 * 4 * 32768 * 16384


@pytest.mark.gpu
@every_coarse
def test_the_host_is_not_synchronised(coarse):
    features, codebook = on("cuda", normal(300, 64), normal(500, 64, seed=1))
    nearest_fused(features, codebook, coarse=coarse)
    torch.cuda.set_sync_debug_mode("error")
    try:
        nearest_fused(features, codebook, coarse=coarse)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_captured_graph_follows_its_input():
    features, codebook = on("cuda", normal(300, 64), normal(500, 64, seed=1))
    nearest_fused(features, codebook)  # compiles the kernels
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        codes = nearest_fused(features, codebook)
    features.copy_(normal(300, 64, seed=2))
    features[7] = torch.nan
    features[8:200] = codebook[:192]
    graph.replay()
    assert torch.equal(codes, oracle(features, codebook))
