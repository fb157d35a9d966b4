"""Moments, Fréchet distance, Inception Score and manifolds against known answers and
torch-fidelity."""

from __future__ import annotations

import math
import types

import numpy as np
import pytest
import torch

from eval import generation
from eval.metrics.frechet import (
    Gaussian,
    extrapolate,
    frechet_distance,
    frechet_infinity,
    frechet_jackknife,
    jackknife,
    root_trace,
)
from eval.metrics.inception_score import inception_score
from eval.metrics.moments import Moments
from eval.metrics.precision_recall import manifold
from eval.record import Origin


def normal(n: int, dim: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_merged_shards_equal_one_pass() -> None:
    rows = normal(1000, 16, 0) * 3 + 5
    merged = Moments.empty(16)
    for shard in rows.split([7, 400, 1, 592]):
        merged = merged.merge(Moments.of(shard, chunk=100))
    assert merged.count == 1000
    torch.testing.assert_close(merged.mean, rows.mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(merged.covariance, torch.cov(rows.T), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(merged.reduced().scatter, merged.scatter, rtol=0, atol=0)
    for same in (Moments.empty(16).merge(merged), merged.merge(Moments.empty(16))):
        assert torch.equal(same.covariance, merged.covariance) and same.count == 1000


def test_rows_far_from_zero_keep_their_covariance() -> None:
    """Raw moments would lose 14 of 16 digits here."""
    rows = normal(1000, 8, 1)
    far = Moments.empty(8)
    for part in (rows + 1e7).split(13):
        far.update(part)
    torch.testing.assert_close(far.covariance, torch.cov(rows.T), rtol=0, atol=1e-8)


@pytest.mark.parametrize("n", [5, 63, 64, 65, 300])
def test_equal_statistics_are_at_distance_zero(n: int) -> None:
    rows = normal(n, 64, 1)
    a, b = Gaussian.of_features(rows), Gaussian.of_features(rows.clone())
    assert 0 <= frechet_distance(a, b) < 1e-9
    # and by the other route, on the singular covariance
    assert 0 <= frechet_distance(a, Gaussian.of_moments(Moments.of(rows))) < 1e-9


def test_distance_of_two_normal_samples_is_the_analytic_bias() -> None:
    n, dim = 4000, 8
    expected = 2 / n * (dim + (dim**2 + dim) / 4)
    pairs = [(normal(n, dim, 2 * i), normal(n, dim, 2 * i + 1)) for i in range(20)]
    found = [frechet_distance(Gaussian.of_features(a), Gaussian.of_features(b)) for a, b in pairs]
    assert np.mean(found) == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize("ranks", [(6, 6), (3, 6), (2, 4), (0, 6)])
def test_commuting_covariances(ranks: tuple[int, int]) -> None:
    basis = torch.linalg.qr(normal(6, 6, 3)).Q
    spectra = [
        torch.arange(1.0, 7).double() ** power * (torch.arange(6) < rank)
        for power, rank in zip((1, 2), ranks)
    ]
    means = normal(2, 6, 4)
    a, b = (Gaussian(m, basis @ torch.diag(s) @ basis.T) for m, s in zip(means, spectra))
    expected = (means[0] - means[1]).square().sum() + (
        spectra[0].sqrt() - spectra[1].sqrt()
    ).square().sum()
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-10)


@pytest.mark.parametrize(("n", "m"), [(200, 300), (30, 300), (20, 25)])
def test_frechet_is_torch_fidelitys(n: int, m: int) -> None:
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    a, b = normal(n, 48, 5) @ normal(48, 48, 6), normal(m, 48, 7) + 0.3
    theirs = fid_statistics_to_metric(*map(fid_features_to_statistics, (a, b)), verbose=False)
    ours = frechet_distance(Gaussian.of_features(a), Gaussian.of_features(b))
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)
    moments = frechet_distance(*(Gaussian.of_moments(Moments.of(rows)) for rows in (a, b)))
    assert ours == pytest.approx(moments, rel=1e-6)


@pytest.mark.parametrize("spread", [0.0, 1.0, 3.0, 6.0])
def test_eigenvalues_are_taken_only_where_they_are_as_good_as_singular_values(
    spread: float,
) -> None:
    scales = torch.logspace(0, -spread, 40, dtype=torch.float64)
    a, b = normal(40, 40, 1) * scales, normal(40, 40, 2) * scales
    found = root_trace(
        *(Gaussian(torch.zeros(40).double(), factor.T @ factor) for factor in (a, b))
    )
    assert float(found) == pytest.approx(float(torch.linalg.svdvals(a @ b.T).sum()), rel=1e-10)


def test_every_route_gives_one_distance() -> None:
    """Rank-deficient or not, by features or by moments."""
    wide = torch.linalg.qr(normal(64, 64, 3)).Q[:30]
    for n, m in ((500, 400), (40, 500), (20, 25)):
        a, b = normal(n, 30, 4) @ wide, (normal(m, 30, 5) + 0.1) @ wide  # 30 of 64 dimensions
        ways = [Gaussian.of_features, lambda rows: Gaussian.of_moments(Moments.of(rows))]
        found = [frechet_distance(first(a), second(b)) for first in ways for second in ways]
        assert found == pytest.approx([found[0]] * 4, rel=1e-9)
        low = [frechet_distance(*(way(rows @ wide.T) for rows in (a, b))) for way in ways]
        assert low == pytest.approx([found[0]] * 2, rel=1e-9)


def test_extrapolation_finds_the_line() -> None:
    counts = [50, 80, 200, 1000]
    assert extrapolate(counts, [3 + 40 / count for count in counts]) == pytest.approx((3, 40))


def test_infinity_has_less_bias_than_the_distance() -> None:
    truth = Gaussian(torch.zeros(16).double(), torch.eye(16).double())
    features = normal(3000, 16, 6)
    found = frechet_infinity(features, truth)
    plain = frechet_distance(Gaussian.of_features(features), truth)
    assert found.counts[0] == 300 and found.counts[-1] == 3000 and len(found.counts) == 15
    assert found.distances[-1] == pytest.approx(plain)
    assert abs(found.value) < 0.3 * plain
    assert found == frechet_infinity(features, truth)
    with pytest.raises(ValueError, match="too few"):
        frechet_infinity(features[:16], truth)


def test_jackknife_of_a_mean_is_the_standard_error() -> None:
    values = normal(400, 1, 8)[:, 0]
    found = jackknife(400, lambda kept: float(values[kept].mean()), blocks=400 // 2)
    assert found.deviation == pytest.approx(float(values.std()) / 20, rel=0.15)
    assert found.corrected == pytest.approx(float(values.mean()), abs=1e-9)


def test_a_jackknife_of_known_parts() -> None:
    """Of 0, 1 ... 19, whose variance about 9.5 is 33.25, 19 and 20 times around a whole of 10."""
    answers = iter([10.0, *range(20)])
    found = jackknife(40, lambda kept: next(answers))
    assert found.deviation == pytest.approx(math.sqrt(19 * 33.25))
    assert found.corrected == pytest.approx(20 * 10 - 19 * 9.5)
    reach = 2.0930240544 * found.deviation  # Student's t of 19 degrees of freedom, 0.975
    assert (found.low, found.high) == pytest.approx((10 - reach, 10 + reach))


def test_jackknife_removes_most_of_the_bias_and_covers() -> None:
    truth = Gaussian(torch.zeros(8).double(), torch.eye(8).double())
    features = normal(1000, 8, 9)
    found = frechet_jackknife(features, truth)
    assert abs(found.corrected) < 0.5 * frechet_distance(Gaussian.of_features(features), truth)
    paired = frechet_jackknife(features + 0.01 * normal(1000, 8, 10), features)
    assert 0 < paired.deviation < found.deviation
    with pytest.raises(ValueError, match="20 blocks"):
        frechet_jackknife(features[:39], truth)


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 rows"):
        Gaussian.of_features(normal(1, 4, 0))


def test_inception_score_known_answers() -> None:
    constant = torch.tensor([[0.2, 0.3, 0.5]]).expand(100, 3)
    assert inception_score(constant).mean == pytest.approx(1)
    balanced = torch.eye(10).repeat(20, 1)
    assert inception_score(balanced, splits=1).mean == pytest.approx(10)
    # sorted by class, contiguous chunks would score about 1: the shuffle prevents it
    by_class = torch.eye(10).repeat_interleave(100, 0)
    assert inception_score(by_class, splits=10).mean > 9
    assert inception_score(by_class) == inception_score(by_class)
    with pytest.raises(ValueError, match="splits"):
        inception_score(constant[:5], splits=10)


@pytest.mark.parametrize("splits", [1, 3, 10])
def test_inception_score_is_torch_fidelitys(splits: int) -> None:
    """Their order and their uneven splits too."""
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = normal(503, 10, 11).float() * 2
    theirs = isc_features_to_metric(logits, splits=splits, rng_seed=2020)
    ours = inception_score(logits.double().softmax(1).float(), splits)
    assert ours.mean == pytest.approx(theirs["inception_score_mean"], rel=1e-6)
    assert ours.deviation == pytest.approx(theirs["inception_score_std"], rel=1e-6, abs=1e-9)


def test_manifold_by_hand() -> None:
    # A line: real at 0, 1, 2, 3; with k = 1 every ball has radius 1.
    real = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    generated = torch.tensor([[0.5], [10.0], [10.5]])
    found = manifold(generated, real, k=1, k_density=1, chunk=2)
    assert found.precision == pytest.approx(1 / 3)  # 0.5 lies in a ball; 10 and 10.5 do not
    assert found.recall == 1.0  # the ball of 0.5 reaches 9.5 far
    assert found.density == pytest.approx(2 / 3)  # 0.5 lies in the balls of 0 and 1
    assert found.coverage == pytest.approx(2 / 4)


def test_manifold_of_equal_and_of_disjoint_sets() -> None:
    rows = normal(200, 8, 12)
    same = manifold(rows, rows.clone(), chunk=64)
    assert (same.precision, same.recall, same.coverage) == (1, 1, 1)
    assert same.density == pytest.approx(1 + 1 / 5, abs=0.02)  # own balls count, edges round
    far = manifold(rows, rows + 1000, chunk=64)
    assert (far.precision, far.recall, far.density, far.coverage) == (0, 0, 0, 0)
    with pytest.raises(ValueError, match="neighbours"):
        manifold(rows, rows[:3])


def test_precision_and_recall_are_torch_fidelitys() -> None:
    from torch_fidelity.metric_prc import calculate_precision_recall_part

    generated, real = normal(300, 16, 13) * 0.8, normal(400, 16, 14)
    precision, recall = calculate_precision_recall_part(generated, real)
    found = manifold(generated, real, chunk=77)
    assert found.precision == pytest.approx(precision, abs=1e-6)
    assert found.recall == pytest.approx(recall, abs=1e-6)
    assert not math.isclose(found.precision, found.recall)


def test_reported_manifolds_have_the_published_neighbours() -> None:
    """3 for precision and recall (Kynkäänniemi et al.), 5 for density and coverage (Naeem et al.),
    by plain loops."""
    real, samples, train = (
        normal(60, 3, 15).numpy(),
        0.7 * normal(50, 3, 16).numpy(),
        normal(70, 3, 17).numpy(),
    )

    def radius(points: np.ndarray, k: int) -> np.ndarray:
        return np.array(
            [sorted(np.linalg.norm(points - point, axis=1))[k] for point in points]
        )  # itself is the 0th

    def expected(rows: np.ndarray) -> dict[str, float]:
        distances = np.array([[np.linalg.norm(row - other) for other in real] for row in rows])
        inside, dense = distances <= radius(real, 3), distances <= radius(real, 5)
        return {
            "precision": inside.any(1).mean(),
            "recall": (distances <= radius(rows, 3)[:, None]).any(0).mean(),
            "density": dense.sum() / (5 * len(rows)),
            "coverage": dense.any(0).mean(),
        }

    sides = [
        types.SimpleNamespace(features=torch.from_numpy(rows)) for rows in (samples, real, train)
    ]
    seen = types.SimpleNamespace(samples=sides[0], held_out=sides[1], train=sides[2])
    origins = generation.Origins(
        *(Origin(name, {}, {}) for name in ("samples", "held-out", "train"))
    )
    extractor = types.SimpleNamespace(name="few", sha256="0" * 64, standard=False, settings={})
    enough = types.SimpleNamespace(suffice=lambda *_: True)
    found = {each.name: each for each in generation._manifolds(extractor, seen, origins, enough)}
    for suffix, rows in (("", samples), (" of real images", train)):
        for name, value in expected(rows).items():
            figure = found[f"{name}[few@00000000]{suffix}"]
            assert figure.value == pytest.approx(value, abs=1e-12)
            assert figure.settings["k"] == (3 if name in ("precision", "recall") else 5)
    assert len({figure.value for figure in found.values()}) == 8


@pytest.mark.parametrize("order", ["class after class", "classes in turn"])
def test_jackknife_does_not_depend_on_the_order_of_classes(order):
    """Far classes in a regular order: the interval is that of samples in no order, not that of
    losing classes."""
    generator = torch.Generator().manual_seed(3)
    centres = 10 * torch.randn(10, 4, generator=generator, dtype=torch.float64)
    labels = torch.arange(600) % 10 if order == "classes in turn" else torch.arange(600) // 60

    def draw():
        return centres[labels] + torch.randn(600, 4, generator=generator, dtype=torch.float64)

    reference = Gaussian.of_features(torch.cat([draw() for _ in range(20)]))
    among_draws = torch.tensor(
        [frechet_distance(Gaussian.of_features(draw()), reference) for _ in range(30)]
    ).std()
    shuffled = draw()[torch.randperm(600, generator=generator)]
    unordered = frechet_jackknife(shuffled, reference).deviation
    ordered = frechet_jackknife(draw(), reference).deviation
    assert 0.4 * unordered < ordered < 2.5 * unordered
    assert ordered > 0.5 * among_draws
