"""Laws of k-means, its seeds, sums by code and samples of streams."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tokenizer.quantizers import kmeans as module
from tokenizer.quantizers import search
from tokenizer.quantizers.kmeans import Reservoir, common, kmeans, rows_wanted, segment_sums


def squared_error(rows, centres):
    return float((rows - centres[search.nearest(rows, centres)]).square().sum(1).mean())


def seeds(rows, num_codes, seed):
    return module._seed_centres(rows, num_codes, torch.Generator().manual_seed(seed))


# sums by code


@pytest.mark.parametrize(
    ("num_rows", "dim", "num_codes"), [(500, 7, 30), (40, 3, 900), (0, 3, 4), (100, 0, 9)]
)
def test_sums_are_those_of_each_code(num_rows, dim, num_codes):
    rows, codes = torch.randn(num_rows, dim), torch.randint(-1, num_codes, (num_rows,))
    rows[codes < 0] = float("nan")
    counts, sums = segment_sums(rows, codes, num_codes)
    known = codes >= 0
    assert torch.equal(counts, torch.bincount(codes[known], minlength=num_codes).float())
    wanted = torch.zeros(num_codes, dim).index_add_(0, codes[known], rows[known])
    torch.testing.assert_close(sums, wanted, atol=1e-5, rtol=0)
    assert sums.shape == (num_codes, dim) and not sums[counts == 0].any()


def test_sums_take_strided_rows_and_repeat_to_the_last_bit():
    whole, codes = torch.randn(3000, 12), torch.randint(5, (3000,))
    first = segment_sums(whole[:, 3:9], codes, 5)
    again = segment_sums(whole[:, 3:9].contiguous(), codes, 5)
    assert all(torch.equal(one, other) for one, other in zip(first, again))


# k-means


def test_kmeans_finds_clusters():
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
    rows = centres.repeat(50, 1) + 0.01 * torch.randn(200, 2)
    found = kmeans(rows, 4, iterations=5, seed=3)
    assert torch.cdist(centres, found).min(1).values.max() < 0.02
    assert torch.equal(found, kmeans(rows, 4, iterations=5, seed=3))


@pytest.mark.parametrize("cosine", [False, True])
def test_centres_are_means_of_what_is_nearest_to_them(monkeypatch, cosine):
    monkeypatch.setattr(module, "CHUNK", 64)
    rows = torch.randn(150, 3) + 0.5
    centres = kmeans(rows, 6, seed=1, iterations=60, cosine=cosine)
    seen = F.normalize(rows, dim=1) if cosine else rows
    codes = torch.cdist(seen, centres).argmin(1)
    torch.testing.assert_close(
        centres, torch.stack([seen[codes == code].mean(0) for code in range(6)])
    )


@pytest.mark.parametrize("cosine", [False, True])
def test_kmeans_does_not_depend_on_chunks(monkeypatch, cosine):
    rows = torch.randn(500, 4)
    whole = kmeans(rows, 20, seed=0, cosine=cosine)
    sizes, nearest = [], search.nearest
    monkeypatch.setattr(search, "nearest", lambda z, book: sizes.append(len(z)) or nearest(z, book))
    monkeypatch.setattr(module, "CHUNK", 64)
    torch.testing.assert_close(kmeans(rows, 20, seed=0, cosine=cosine), whole)
    assert max(sizes) == 64


@pytest.mark.parametrize(("num_codes", "rounds"), [(8192, 10), (8193, 3)])
def test_lloyds_iterations_are_fewer_for_many_codes(monkeypatch, num_codes, rounds):
    rows = torch.zeros(num_codes, 1)
    found = (
        rows,
        torch.arange(num_codes),
        torch.zeros(num_codes),
    )  # centres, each row's code, its distance
    moves, sums = [], module.segment_sums
    monkeypatch.setattr(module, "CHUNK", num_codes)
    monkeypatch.setattr(module, "_seed_centres", lambda *_: found)
    monkeypatch.setattr(module, "_nearest", lambda *_: found[1:])
    monkeypatch.setattr(module, "segment_sums", lambda *given: moves.append(0) or sums(*given))
    kmeans(rows, num_codes, seed=0)
    assert len(moves) == rounds


def test_cosine_is_blind_to_length():
    rows, lengths = torch.randn(300, 5), torch.rand(300, 1) + 0.1
    one, other = (kmeans(given, 8, seed=0, cosine=True) for given in (rows, rows * lengths))
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    torch.testing.assert_close(one, kmeans(F.normalize(rows, dim=1), 8, seed=0))


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


def test_kmeans_refuses_rows_that_are_not_finite():
    rows = torch.randn(50, 3)
    rows[7, 1], rows[9] = float("inf"), float("nan")
    with pytest.raises(ValueError, match="2 of 50 features are not finite"):
        kmeans(rows, 4, seed=0)


@pytest.mark.parametrize("num_codes", [1, 65, 66, 500])
def test_seeds_are_different_rows_and_know_who_is_nearest(num_codes):
    rows = torch.randn(700, 3)
    centres, codes, squared = seeds(rows, num_codes, 1)
    assert len(centres.unique(dim=0)) == num_codes
    assert (centres[:, None] == rows).all(2).any(1).all()
    distances = torch.cdist(rows.double(), centres.double())
    own = distances.gather(1, codes[:, None])[:, 0]
    torch.testing.assert_close(own, distances.amin(1), atol=1e-6, rtol=0)
    torch.testing.assert_close(squared.double(), own.square(), atol=1e-6, rtol=1e-5)


def test_seeds_are_drawn_in_proportion_to_squared_distance():
    """From one centre at 0, rows at 1 and at 3 are second centres one time and nine times in
    ten."""
    rows = torch.tensor([[0.0], [0.0], [0.0], [0.0], [0.0], [0.0], [0.0], [0.0], [1.0], [3.0]])
    counts = torch.zeros(4)
    for seed in range(1000):
        centres = seeds(rows, 2, seed)[0]
        if centres[0] == 0:
            counts[int(centres[1])] += 1
    share = counts / counts.sum()
    assert counts[0] == 0 and abs(float(share[3]) - 0.9) < 0.035  # 3 standard deviations are 0.032


def test_kmeans_reads_no_more_rows_than_it_has_to(monkeypatch):
    monkeypatch.setattr(module, "ROWS", 100)
    monkeypatch.setattr(module, "ROWS_PER_CODE", 10)
    asked, nearest = [], search.nearest
    monkeypatch.setattr(
        search, "nearest", lambda rows, book: asked.append(len(rows)) or nearest(rows, book)
    )
    for num_rows, num_codes, read in ((90, 4, 90), (300, 4, 100), (300, 20, 200)):
        asked.clear()
        assert kmeans(torch.randn(num_rows, 2), num_codes, seed=0).shape == (num_codes, 2)
        assert set(asked) == {read} and rows_wanted(num_codes) == max(100, 10 * num_codes)


def test_kmeans_lowers_the_error_of_its_seeds():
    rows = torch.randn(3000, 8)
    assert squared_error(rows, kmeans(rows, 200, seed=0)) < 0.85 * squared_error(
        rows, seeds(rows, 200, 0)[0]
    )


# codes that many images have


def crowd(num_images=60):
    """Rows of images in turn: each has 20 where all have theirs, and 60 in a heap of its own."""
    own = 4 * torch.randn(num_images, 1, 12) + 0.05 * torch.randn(num_images, 60, 12)
    rows = torch.cat([torch.randn(num_images, 20, 4) @ torch.eye(4, 12), own], 1)
    return rows.flatten(0, 1), torch.arange(num_images).repeat_interleave(80)


@pytest.mark.parametrize("cosine", [False, True])
def test_few_common_codes_are_of_a_single_image(cosine):
    rows, images = crowd()
    seen = F.normalize(rows, dim=1) if cosine else rows

    def of_one_image(centres):
        met = torch.zeros(len(centres), 60)
        met[search.nearest(seen, centres), images] = 1
        return float((met.sum(1) <= 1).float().mean())

    assert of_one_image(common(rows, 100, 0, images, cosine=cosine)) < 0.1
    assert of_one_image(common(rows, 100, 0, cosine=cosine)) > 0.3  # each row an image of its own
    assert of_one_image(kmeans(rows, 100, 0, cosine=cosine)) > 0.3


def test_common_codes_of_rows_without_images_are_met_evenly():
    rows = torch.cat([torch.randn(4000, 3), 6 + torch.randn(40, 3)])
    counts = torch.bincount(search.nearest(rows, common(rows, 64, 0)), minlength=64)
    at_random = torch.bincount(
        search.nearest(rows, rows[torch.randperm(len(rows))[:64]]), minlength=64
    )
    assert counts.min() > 2 * at_random.min() and counts.min() > 0.4 * counts.float().mean()


def test_common_codes_are_the_same_for_the_same_seed_and_chunks(monkeypatch):
    rows, images = crowd()
    codes = common(rows, 30, 3, images, cosine=True)
    torch.testing.assert_close(codes.norm(dim=1), torch.ones(30))
    monkeypatch.setattr(module, "CHUNK", 77)
    torch.testing.assert_close(common(rows, 30, 3, images, cosine=True), codes)
    assert not torch.equal(common(rows, 30, 4, images, cosine=True), codes)


def test_common_codes_of_too_few_bad_or_equal_rows():
    few = torch.randn(3, 5)
    assert torch.cdist(few, common(few, 8, 0)).min(1).values.max() == 0
    assert len(common(few, 8, 0, torch.tensor([0, 0, 1])).unique(dim=0)) == 8
    with pytest.raises(ValueError, match="1 of 2 features are not finite"):
        common(torch.tensor([[1.0], [float("nan")]]), 2, 0)
    assert torch.equal(common(torch.ones(100, 2), 8, 0), torch.ones(8, 2))


# samples of a stream


def sample(stream, size, seed, cuts):
    reservoir = Reservoir(size, seed)
    for part in stream.tensor_split(cuts):
        reservoir.add(part)
    return reservoir


@pytest.mark.parametrize("length", [5, 40, 41, 1000])
def test_a_sample_does_not_depend_on_how_the_stream_is_cut(length):
    stream = torch.randn(length, 3)
    whole = sample(stream, 40, 7, [])
    assert len(whole.rows) == len(whole.places) == min(length, 40)
    assert torch.equal(whole.rows, stream[whole.places])
    assert len(whole.places.unique()) == len(whole.places)
    if length <= 40:
        assert torch.equal(whole.rows, stream)
    for cuts in ([1], [0, 3, 4], [39, 40], [41, 44, 300], list(range(1, length))):
        parts = sample(stream, 40, 7, cuts)
        assert torch.equal(parts.places, whole.places) and torch.equal(parts.rows, whole.rows)
    if length > 40:
        assert not torch.equal(sample(stream, 40, 8, []).places, whole.places)


def test_a_sample_is_uniform():
    stream, counts = torch.zeros(60, 1), torch.zeros(60)
    for seed in range(1000):
        counts[sample(stream, 15, seed, [7, 20, 23, 50]).places] += 1
    share = counts / 1000
    assert (share - 0.25).abs().max() < 4 * (0.25 * 0.75 / 1000) ** 0.5  # standard deviations


def test_a_sample_keeps_no_batch():
    reservoir = Reservoir(10, 0)
    reservoir.add(torch.randn(1000, 4, dtype=torch.float16))
    assert reservoir.rows.dtype == torch.float32
    assert reservoir.rows.untyped_storage().nbytes() == 10 * 4 * 4


@pytest.mark.parametrize("dim", [0, 1, 5])
@pytest.mark.parametrize(("num_rows", "num_codes"), [(7, 40), (40, 7), (1, 1), (8192, 16384)])
def test_segment_sums_of_more_codes_than_rows_and_of_no_columns(num_rows, num_codes, dim):
    rows, codes = torch.randn(num_rows, dim), torch.randint(num_codes, (num_rows,))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    counts, sums = segment_sums(rows, codes, num_codes)
    torch.set_num_threads(threads)
    assert torch.equal(counts, torch.bincount(codes, minlength=num_codes).float())
    torch.testing.assert_close(
        sums, torch.zeros(num_codes, dim).index_add_(0, codes, rows), atol=1e-5, rtol=1e-5
    )
