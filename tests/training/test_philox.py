"""The generator of random numbers: published answers, numpy's own, the same words from each of its
implementations."""

from __future__ import annotations

import math
import os

import numpy as np
import pytest
import torch

from training import philox, philox_kernel

INTERPRETED = (
    os.environ.get("TRITON_INTERPRET") == "1"
)  # read as Triton's own functions are made: not to be set here
PI = (
    0x243F6A8885A308D3,
    0x13198A2E03707344,
    0xA4093822299F31D0,
    0x082EFA98EC4E6C89,
    0x452821E638D01377,
)
ONES = 2**64 - 1
# counter, key and words of philox4x64_10 among the vectors published with Random123
PUBLISHED = {
    "zeros": (
        (0,) * 4,
        (0, 0),
        "16554d9eca36314c db20fe9d672d0fdc d7e772cee186176b 7e68b68aec7ba23b",
    ),
    "ones": (
        (ONES,) * 4,
        (ONES,) * 2,
        "87b092c3013fe90b 438c3c67be8d0224 9cc7d7c69cd777b6 a09caebf594f0ba0",
    ),
    "pi": (
        PI[:4],
        (PI[4], 0xBE5466CF34E90C6C),
        "a528f45403e61d95 38c72dbd566e9788 a5a1610e72fd18b5 57bd43b5e52b7fe6",
    ),
}
IDS = torch.tensor([5, -3, 7, 7, 7, 2**62, 0])
FIRST = torch.tensor([3, 0, 2, 12, 22, 2**40 + 1, 7])  # of which three follow one another


def in_kernel(ids, seed, stream, count, first):
    """In the interpreter's memory, which is the CPU's."""
    return philox_kernel.words(ids, seed, stream, count, first)


def numpys(seed, owner, stream, count, first=0):
    """From numpy's generator, set to a counter and not advanced by drawing."""
    key, counter = (
        np.array([seed, owner % 2**64], np.uint64),
        np.array([0, 0, 0, stream], np.uint64),
    )
    generator = np.random.Philox(key=key, counter=counter)
    generator.advance(first // 4)
    return generator.random_raw(first % 4 + count)[first % 4 :].tolist()


def expected(seed, stream, count, first=None):
    places = [0] * len(IDS) if first is None else first.tolist()
    return [numpys(seed, owner, stream, count, place) for owner, place in zip(IDS.tolist(), places)]


def unsigned(words):
    return [[word % 2**64 for word in row] for row in words.tolist()]


@pytest.mark.parametrize("case", PUBLISHED)
def test_published_answers(case):
    counter, (seed, owner), answer = PUBLISHED[case]
    words = philox.block(seed, torch.tensor([philox._signed(owner)]), counter)
    assert " ".join(f"{word:016x}" for word in unsigned(words)[0]) == answer


IMPLEMENTATIONS = {
    "as on the CPU": lambda ids, *rest: philox._words(ids, *rest),
    "in torch": philox.in_torch,
    "in Triton": in_kernel,
}


@pytest.mark.parametrize("count", [1, 2, 10, 67])
@pytest.mark.parametrize("first", [None, FIRST], ids=["whole", "part"])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_every_implementation_gives_numpys_words(name, first, count, monkeypatch):
    if name == "in Triton" and not INTERPRETED:
        pytest.skip("is run in the interpreter, by test_fused_search.py")
    monkeypatch.setattr(philox_kernel, "LARGEST", 8)  # several programs for a row
    for seed, stream in ((0, 0), (1, 1), (2**63 - 1, 2**40)):
        words = IMPLEMENTATIONS[name](IDS, seed, stream, count, first)
        assert words.is_contiguous() and unsigned(words) == expected(seed, stream, count, first)


@pytest.mark.gpu
@pytest.mark.parametrize("first", [None, FIRST], ids=["whole", "part"])
def test_a_gpu_gives_the_same_numbers(first):
    there = None if first is None else first.cuda()
    for count in (1, 7, 5000):
        for make in (philox.words, philox.uniform, philox.short_uniform):
            assert torch.equal(
                make(3, IDS.cuda(), 2, count, there).cpu(), make(3, IDS, 2, count, first)
            )
        ours, theirs = (
            philox.normal(3, IDS, 2, count, first),
            philox.normal(3, IDS.cuda(), 2, count, there),
        )
        torch.testing.assert_close(theirs.cpu(), ours, rtol=1e-5, atol=1e-6)


def test_rows_do_not_depend_on_their_batch():
    for make in (philox.words, philox.uniform, philox.short_uniform, philox.normal):
        whole = make(3, IDS, 2, 67, FIRST)
        for order in (torch.tensor([6]), torch.tensor([4, 2]), torch.arange(6, -1, -1)):
            assert torch.equal(make(3, IDS[order], 2, 67, FIRST[order]), whole[order])
        assert make(3, IDS[:0], 2, 67, FIRST[:0]).shape == (0, 67) and make(3, IDS, 2, 0).shape == (
            7,
            0,
        )


def test_uniform_numbers_are_the_upper_bits_of_words(monkeypatch):
    words = unsigned(philox.words(3, IDS, 2, 41, FIRST))
    long, short = philox.uniform(3, IDS, 2, 41, FIRST), philox.short_uniform(3, IDS, 2, 81, FIRST)
    assert long.dtype == torch.float64 and short.dtype == torch.float32
    assert long.tolist() == [[(word >> 11) * 2.0**-53 for word in row] for row in words]
    halves = [
        [half >> 8 for word in row for half in (word % 2**32, word >> 32)][:81] for row in words
    ]
    assert short.tolist() == [[half * 2.0**-24 for half in row] for row in halves]
    # as on a device
    monkeypatch.setattr(philox, "words", lambda *given: torch.tensor([[0, -1, 2047, 2048]]))
    made = philox.uniform(0, torch.zeros(1, dtype=torch.int64, device="meta"), 0, 4)
    assert made.tolist() == [
        [torch.finfo(torch.float64).tiny, 1 - 2.0**-53, torch.finfo(torch.float64).tiny, 2.0**-53]
    ]


def test_uniform_numbers_are_uniform_and_independent():
    """Chi-squared of 256 bins; correlations among ids, places, streams and seeds are those of
    chance."""
    drawn = philox.uniform(0, torch.arange(200), 0, 4096)
    counts = (drawn.flatten() * 256).long().bincount(minlength=256).double()
    assert (
        160 < ((counts - drawn.numel() / 256) ** 2 / (drawn.numel() / 256)).sum() < 360
    )  # of 255 degrees of freedom
    streams = torch.cat(
        [philox.uniform(0, torch.tensor([1]), stream, 4096) for stream in range(100)]
    )
    seeds = torch.cat([philox.uniform(seed, torch.tensor([1]), 0, 4096) for seed in range(100)])
    for rows in (drawn, drawn[:, :200].T, streams, seeds):
        correlation = torch.corrcoef(rows).fill_diagonal_(0) * math.sqrt(rows.shape[1])
        assert correlation.abs().max() < 5.5 and 0.95 < correlation.std() < 1.05
    pairs = (drawn[:, :-1] * 16).long() * 16 + (drawn[:, 1:] * 16).long()  # one number and the next
    counts = pairs.flatten().bincount(minlength=256).double()
    assert 150 < ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 370


def test_normal_numbers_are_normal():
    """The distribution function within chance (Kolmogorov), tails, and independence of the two of a
    pair."""
    drawn = philox.normal(1, torch.arange(40), 0, 10_001)
    flat = drawn.double().flatten().sort().values
    below = torch.special.ndtr(flat)
    steps = torch.arange(1, len(flat) + 1, dtype=torch.float64) / len(flat)
    assert (below - steps).abs().max() * math.sqrt(len(flat)) < 1.8
    for bound, share in ((3.0, 0.0026998), (4.0, 6.334e-5)):
        assert (
            abs(int((flat.abs() > bound).sum()) - share * len(flat))
            < 4 * math.sqrt(share * len(flat)) + 1
        )
    first, second = (
        drawn[:, 0:10_000:2].double().flatten(),
        drawn[:, 1:10_000:2].double().flatten(),
    )  # of one word
    for power in (1, 2):
        pair = torch.stack([first**power, second**power])
        assert abs(torch.corrcoef(pair)[0, 1]) * math.sqrt(len(first)) < 4


def test_the_most_extreme_normal_numbers_are_finite(monkeypatch):
    ends = torch.tensor([[-1 << 31, (1 << 31) - 1, 0]], dtype=torch.int64)
    monkeypatch.setattr(philox, "words", lambda *given: ends)
    made = philox.normal(0, IDS[:1], 0, 6)[0].tolist()
    assert -5.5 < made[0] < -5.3 and 5.3 < made[2] < 5.5 and made[4:] == [0, 0]


def test_normal_numbers_do_not_depend_on_how_many_are_in_hand(monkeypatch):
    whole = philox.normal(1, torch.arange(5), 0, 1001)
    monkeypatch.setattr(philox, "PIECE", 1500)
    torch.testing.assert_close(philox.normal(1, torch.arange(5), 0, 1001), whole, rtol=1e-6, atol=0)


def test_a_compiled_function_draws_the_same():
    def drawn(ids):
        return philox.words(3, ids, 2, 9) * 2

    compiled = torch.compile(drawn, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(IDS), drawn(IDS))
