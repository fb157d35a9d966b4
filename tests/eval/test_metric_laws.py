"""Metrics against what their definitions give by enumeration, and the values that published figures
were taken with."""

from __future__ import annotations

import inspect
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from eval.counts import LEAST, Counts
from eval.metrics import likelihood
from eval.metrics.codebook import measure_usage, usage
from eval.metrics.frechet import Gaussian, frechet_infinity, frechet_jackknife, jackknife
from eval.metrics.image_similarity import Paired, squared_error, ssim
from eval.metrics.inception_score import inception_score
from eval.metrics.kid import kernel_distance
from eval.metrics.likelihood import figures
from eval.metrics.memorisation import find_copying, nearest
from eval.metrics.moments import Moments
from eval.metrics.precision_recall import manifold, neighbour_distances
from eval.metrics.rate import Rate, find_rates
from eval.record import Origin
from priors.interface import Likelihood
from tokenizer.interface import CodeLayout
from training.errors import UserError

ORIGIN = Origin("held-out", {}, {})


def normal(n: int, dim: int, seed: int) -> torch.Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def defaults(function) -> dict[str, object]:
    parameters = inspect.signature(function).parameters.values()
    return {each.name: each.default for each in parameters if each.default is not each.empty}


def test_published_settings_are_the_defaults():
    """torch-fidelity's for IS, KID, precision and recall; Naeem et al. count density among 5."""
    assert defaults(inception_score) == {"splits": 10, "seed": 2020}
    assert defaults(kernel_distance) == {"subsets": 100, "subset_size": 1000, "seed": 2020}
    balls, line = defaults(manifold), defaults(frechet_infinity)
    assert (balls["k"], balls["k_density"]) == (3, 5)
    assert (line["points"], line["seed"]) == (15, 0)
    assert defaults(jackknife)["blocks"] == defaults(frechet_jackknife)["blocks"] == 20


def test_the_least_counts_are_those_at_which_figures_exist():
    assert LEAST == {
        "a Fréchet distance": 2,
        "a distance at endless N": 20,
        "a kernel distance": 4,
        "a score of class probabilities": 20,
        "precision, recall, density and coverage": 6,
        "CMMD": 2,
        "nearer to train than held-out images": 2,
    }
    counts = Counts({"samples": 6, "train images": 5})
    figure = "precision, recall, density and coverage"
    assert counts.suffice(figure, "samples") and counts.notes == []
    assert not counts.suffice(figure, "samples", "train images") and not counts.suffice(
        figure, "train images"
    )
    assert not counts.suffice("a distance at endless N", "train images")
    assert counts.notes == [
        "N = 5 (train images) is too few for precision, recall, density and coverage (at least 6); "
        "a distance at endless N (at least 20): left out."
    ]


# memorisation


def test_copying_is_the_share_of_pairs_and_its_interval_delongs():
    """Every sample against every held-out image; distances are whole numbers, so that ties
    occur."""
    generator = torch.Generator().manual_seed(0)
    samples, held_out, train = (
        torch.randint(6, (count, 2), generator=generator).double() for count in (13, 11, 9)
    )
    found = find_copying(samples, held_out, train)
    table = (samples[:, None] - train).square().sum(2).sqrt()
    own, real = table.amin(1), (held_out[:, None] - train).square().sum(2).sqrt().amin(1)
    pairs = (own[:, None] < real).double() + (own[:, None] == real).double() / 2  # who is nearer
    assert 0 < int((own[:, None] == real).sum()) < pairs.numel()
    assert found.nearer == pytest.approx(100 * float(pairs.mean()))
    torch.testing.assert_close(found.percentiles, 100 * (1 - pairs.mean(1)))
    spread = pairs.mean(1).var() / 13 + pairs.mean(0).var() / 11
    reach = 196 * math.sqrt(float(spread))
    assert found.interval == pytest.approx((found.nearer - reach, found.nearer + reach))
    assert found.distances.shape == found.neighbours.shape == (13, 3)
    torch.testing.assert_close(found.distances, table.sort(1).values[:, :3])
    torch.testing.assert_close(table.gather(1, found.neighbours), found.distances)


def test_copies_are_nearer_than_all_others():
    train, held_out = normal(20, 3, 0), normal(10, 3, 1)
    found = find_copying(train[:7], held_out, train)
    assert found.nearer == 100 and found.interval is None and not found.percentiles.any()
    assert found.neighbours[:, 0].tolist() == list(range(7))
    origin = torch.zeros(1, 1)  # the one training image: distances are the numbers
    far, near = (
        find_copying(torch.tensor(samples)[:, None], torch.arange(1.0, 5)[:, None], origin)
        for samples in ([9.0, 9.0, 9.0, 3.5], [0.5, 0.5, 0.5, 1.5])
    )
    reach = 196 * math.sqrt(
        2 * 0.25**2 / 4 / 4
    )  # one of four wins over one of four; an interval keeps to percents
    assert far.nearer == pytest.approx(6.25) and far.interval == pytest.approx((0, 6.25 + reach))
    assert near.nearer == pytest.approx(93.75) and near.interval == pytest.approx(
        (93.75 - reach, 100)
    )
    assert find_copying(train[:4], held_out, train[:2]).distances.shape == (
        4,
        2,
    )  # there are no three


def test_nearest_of_few_and_in_parts(monkeypatch):
    points, others = normal(7, 2, 3), normal(5, 2, 4)
    cdist, held = torch.cdist, []
    monkeypatch.setattr(torch, "cdist", lambda a, b: held.append(len(a) * len(b)) or cdist(a, b))
    table = (points[:, None] - others).square().sum(2).sqrt()
    for size in (1, 4, 12, 1 << 24):
        distances, places = nearest(points, others, 5, table=size)
        torch.testing.assert_close(distances, table.sort(1).values)
        assert torch.equal(places, table.sort(1).indices)
        assert max(held) <= max(5, size) and sum(held) == 7 * 5
        held.clear()
    with pytest.raises(ValueError, match="6 neighbours among 5"):
        nearest(points, others, 6)


# moments and distances


def test_merged_moments_leave_their_parts_as_they_are():
    parts = [Moments.of(normal(20, 3, seed) + seed) for seed in (1, 2)]
    before = [(part.count, part.mean.clone(), part.scatter.clone()) for part in parts]
    parts[0].merge(parts[1])
    for part, (count, mean, scatter) in zip(parts, before):
        assert part.count == count
        assert torch.equal(part.mean, mean) and torch.equal(part.scatter, scatter)


def test_a_covariance_of_two_rows_and_of_none():
    two = Moments.of(torch.tensor([[1.0, 2.0], [3.0, 8.0]]))
    assert two.covariance.tolist() == [[2, 6], [6, 18]]
    four = two.merge(Moments.of(torch.tensor([[5.0, 0.0], [7.0, 2.0]])))
    assert (four.count, four.mean.tolist()) == (4, [4, 3])
    torch.testing.assert_close(four.covariance, torch.tensor([[20.0, -8], [-8, 36]]).double() / 3)
    one = Moments.of(torch.ones(1, 2))
    none = Moments.empty(2)
    for few in (one, none):
        with pytest.raises(ValueError, match=f"at least 2 rows, not {few.count}"):
            _ = few.covariance
    assert (none.count, none.mean.tolist(), none.scatter.tolist()) == (0, [0, 0], [[0, 0], [0, 0]])
    none.update(torch.empty(0, 2))
    assert none.count == none.reduced().count == 0 and not none.reduced().mean.any()
    same = two.reduced()
    assert (
        same.count == 2
        and torch.equal(same.mean, two.mean)
        and torch.equal(same.covariance, two.covariance)
    )
    assert two.mean.dtype == two.scatter.dtype == torch.float64
    large = torch.tensor([[0.0], [2.0], [6.0]]) + 2**24  # whose mean is no float32
    assert Moments.of(large).covariance.item() == pytest.approx(28 / 3)


def test_gaussians_of_fewer_rows_than_columns_have_the_unbiased_covariance():
    rows = normal(5, 9, 0) + 3
    few = Gaussian.of_features(rows)
    assert few.covariance is None
    torch.testing.assert_close(few.rows.T @ few.rows, torch.cov(rows.T))
    torch.testing.assert_close(few.mean, rows.mean(0))
    assert float(few.trace) == pytest.approx(float(torch.cov(rows.T).trace()))
    assert Gaussian.of_features(normal(2, 9, 0)).rows.shape == (2, 9)


def test_a_statistic_that_is_linear_in_one_over_n_is_corrected_exactly():
    found = jackknife(60, lambda kept: 3 + 40 / len(kept), blocks=20)
    assert found.corrected == pytest.approx(3, abs=1e-12)
    assert found.deviation == pytest.approx(0, abs=1e-9)
    assert (found.low, found.high) == pytest.approx((3 + 40 / 60,) * 2)


def test_the_jackknifes_interval_is_students():
    """Blocks of two at random: the deviation of their means, and t = 2.262 of nine degrees of
    freedom."""
    values = normal(20, 1, 5)[:, 0]
    kept_means = []

    def mean(kept):
        kept_means.append(float(values[kept].mean()))
        return kept_means[-1]

    found = jackknife(20, mean, blocks=10)
    parts = torch.tensor(kept_means[1:], dtype=torch.float64)
    assert len(parts) == 10 and kept_means[0] == float(values.mean())
    deviation = math.sqrt(9 / 10 * float((parts - parts.mean()).square().sum()))
    assert found.deviation == pytest.approx(deviation)
    assert found.corrected == pytest.approx(float(values.mean()))  # a mean has no bias
    assert found.high - found.low == pytest.approx(2 * 2.262157 * deviation, rel=1e-6)
    assert (found.low + found.high) / 2 == pytest.approx(float(values.mean()))
    with pytest.raises(ValueError, match="10 blocks need at least 20 rows, not 19"):
        jackknife(19, mean, blocks=10)


def test_the_counts_of_a_distance_at_endless_n():
    features, truth = normal(40, 2, 6), Gaussian(torch.zeros(2).double(), torch.eye(2).double())
    assert frechet_infinity(features, truth, points=3, least=2).counts == (2, 21, 40)
    assert frechet_infinity(features, truth, points=3).counts[0] == 4  # a tenth
    assert frechet_infinity(features[:8], truth, points=3).counts[0] == 2  # a covariance needs two
    assert frechet_infinity(features[:12], truth, points=10, least=2).counts == (
        *range(2, 7),
        *range(8, 13),
    )
    for n, least in ((40, 1), (11, 2)):
        with pytest.raises(ValueError, match=f"10 counts from {least} to {n}: too few"):
            frechet_infinity(features[:n], truth, points=10, least=least)


def test_subsets_of_a_kernel_distance_are_within_the_counts():
    a, b = normal(6, 3, 7), normal(9, 3, 8)
    for size in (2, 6):
        assert kernel_distance(a, b, subsets=2, subset_size=size).subset_size == size
    for size in (1, 7):
        with pytest.raises(
            ValueError, match=f"subsets of {size}: must be from 2 to the smaller count, 6"
        ):
            kernel_distance(a, b, subsets=2, subset_size=size)


def test_kernel_distances_are_sums_over_pairs_of_different_rows():
    a, b = normal(3, 2, 12), normal(3, 2, 13) + 1
    within = sum(
        float((x @ y / 2 + 1) ** 3)
        for s in (a, b)
        for i, x in enumerate(s)
        for j, y in enumerate(s)
        if i != j
    )
    across = sum(float((x @ y / 2 + 1) ** 3) for x in a for y in b)
    found = kernel_distance(a, b, subsets=2, subset_size=3)
    assert found.mean == pytest.approx(
        within / 6 - 2 * across / 9
    ) and found.deviation == pytest.approx(0, abs=1e-12)
    assert (found.subsets, found.subset_size) == (2, 3)


def test_a_score_of_one_split_or_of_one_row_each():
    rows = normal(6, 4, 9).softmax(1)
    kl = (rows * (rows / rows.mean(0)).log()).sum(1)
    whole = inception_score(rows, splits=1)
    assert (whole.mean, whole.deviation, whole.splits) == (
        pytest.approx(float(kl.mean().exp())),
        0,
        1,
    )
    each = inception_score(rows, splits=6)
    assert (each.mean, each.deviation) == (pytest.approx(1), pytest.approx(0, abs=1e-12))
    order = np.random.RandomState(2020).permutation(6)  # torch-fidelity's
    halves = [rows[order[:3].tolist()], rows[order[3:].tolist()]]
    scores = [float((half * (half / half.mean(0)).log()).sum(1).mean().exp()) for half in halves]
    two = inception_score(rows, splits=2)
    assert (two.mean, two.deviation) == (
        pytest.approx(np.mean(scores)),
        pytest.approx(np.std(scores)),
    )
    for splits in (0, 7):
        with pytest.raises(ValueError, match=f"{splits} splits of 6 rows"):
            inception_score(rows, splits=splits)


def test_balls_of_more_points_than_one_chunk():
    """Against all pairs at once: two kinds of radius, two sets of different size, chunks that cut
    both."""
    made, real = normal(11, 2, 10).float(), normal(9, 2, 11).float() + 1.5
    made[0] = -90  # in no ball
    real[:4] += 90  # near each other, with nothing in their balls
    table = (made.double()[:, None] - real.double()).square().sum(2).sqrt()

    def radii(points, k):
        own = (points.double()[:, None] - points.double()).square().sum(2).sqrt()
        return own.sort(1).values[:, k]  # the first is the point itself

    found = manifold(made, real, k=2, k_density=3, chunk=4)
    assert found.precision == pytest.approx(float((table <= radii(real, 2)).any(1).double().mean()))
    assert found.recall == pytest.approx(
        float((table <= radii(made, 2)[:, None]).any(0).double().mean())
    )
    inside = table <= radii(real, 3)
    assert found.density == pytest.approx(float(inside.sum()) / (3 * 11))
    assert found.coverage == pytest.approx(float(inside.any(0).double().mean()))
    assert 0 < found.precision < 1 and 0 < found.coverage < 1
    torch.testing.assert_close(neighbour_distances(real.double(), 3, 4)[:, 2], radii(real, 3))
    assert neighbour_distances(real[:4], 3).shape == (4, 3)
    with pytest.raises(ValueError, match="3 neighbours need more than 3 points, not 3"):
        neighbour_distances(real[:3], 3)


def test_balls_far_from_zero_are_those_at_zero():
    made, real = (
        1000 + torch.randn(40, 3, generator=torch.Generator().manual_seed(seed)) / 100
        for seed in (1, 2)
    )
    near = manifold(made.double() - 1000, real.double() - 1000)
    assert manifold(made, real) == near and 0.5 < near.precision < 1


# codes, rates and pairs


def test_usage_of_a_skewed_histogram():
    found = usage(torch.tensor([6, 3, 0, 1]))
    nats = -(0.6 * math.log(0.6) + 0.3 * math.log(0.3) + 0.1 * math.log(0.1))
    assert found.perplexity == pytest.approx(math.exp(nats)) and found.entropy == pytest.approx(
        nats / math.log(2)
    )
    assert found.perplexity_corrected == pytest.approx(
        math.exp(nats + 2 / 20)
    )  # Miller and Madow: (K - 1) / 2n
    assert (found.active, found.dead) == (3, [2])


def test_more_codes_in_use_are_better_and_their_entropy_is_neither():
    found = measure_usage(torch.tensor([3, 0, 1]), ORIGIN, ", level 2", 2)
    assert [(each.name, each.unit, each.higher_is_better) for each in found] == [
        ("codebook usage, level 2", "%", True),
        ("perplexity, level 2", "codes", True),
        ("corrected perplexity, level 2", "codes", True),
        ("code entropy, level 2", "bits/token", None),
    ]
    assert all(
        each.n == 2 and each.settings["tokens"] == 4 and each.settings["num_codes"] == 3
        for each in found
    )


def test_likelihoods_are_in_three_units():
    pipeline = SimpleNamespace(held_out=SimpleNamespace(image_size=4))
    nats = math.log(2) * torch.tensor([8.0, 16.0, 12.0], dtype=torch.float64)
    found = figures(nats, ORIGIN, "bound", 4, pipeline)
    assert [(each.name, each.unit) for each in found] == [
        ("NLL (bound), nats/token", "nats/token"),
        ("rate, prior (bound), bits/image", "bits/image"),
        ("rate, prior (bound), bits/pixel", "bits/pixel"),
    ]
    assert [each.value for each in found] == pytest.approx([3 * math.log(2), 12, 12 / 16])
    reach = 1.96 * 4 / math.sqrt(3)
    for each, bits in zip(found, (math.log(2) / 4, 1, 1 / 16), strict=True):
        assert each.interval == pytest.approx(((12 - reach) * bits, (12 + reach) * bits))
        assert (
            each.n == 3
            and each.settings["tokens_per_image"] == 4
            and each.higher_is_better is False
        )
    assert figures(nats, ORIGIN, "none", 4, pipeline) == []


class Bound(torch.nn.Module):
    """A prior whose images cost as many bits as their label says, and no label 7."""

    layout, num_classes = CodeLayout(((2,),), (4,)), 7

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.place = kind, torch.nn.Parameter(torch.zeros(()))

    def nll(self, codes, labels):
        return Likelihood(labels.double() * math.log(2), self.kind)


def test_a_likelihood_is_measured_once_for_the_tokens_that_its_prior_knows(tmp_path, monkeypatch):
    """Of four images that cost 1, 5, 2 and 4 bits, the three at these places: 1, 2 and 4; of their
    two views the plain one."""
    loaded = []
    views = np.stack([np.zeros((4, 2), np.uint16), np.full((4, 2), 3, np.uint16)], axis=1)
    tokens = SimpleNamespace(codes=views, labels=np.array([1, 5, 2, 4]))

    class Plain(Bound):
        def nll(self, codes, labels):
            assert not codes.any()
            return super().nll(codes, labels)

    def keep(record):
        record.save(tmp_path / "report")
        return record

    pipeline = SimpleNamespace(
        options=SimpleNamespace(batch_size=2, fresh=False),
        how={},
        precision="fp32",
        tokenizer_hash="t" * 64,
        folder=tmp_path,
        keep=keep,
        tokens=SimpleNamespace(split=lambda name: {"held_out": tokens}[name]),
        report_folder=tmp_path / "report",
        held_out=SimpleNamespace(image_size=1, identity=lambda: {"source": "made"}),
        places=lambda data: torch.tensor([3, 0, 2]),
    )
    about = SimpleNamespace(tokenizer_sha256="t" * 64, tokens_sha256="k" * 64)
    shown = []
    progress = SimpleNamespace(show=lambda done, text: shown.append(done))
    monkeypatch.setattr(likelihood, "Progress", lambda name, total: progress)
    monkeypatch.setattr(likelihood, "read_record", lambda folder: about)
    monkeypatch.setattr(likelihood, "weights_hash", lambda folder: "p" * 64)
    monkeypatch.setattr(
        likelihood.priors, "load", lambda folder: loaded.append(folder) or Plain("exact")
    )

    def values():
        found = likelihood.measure_likelihood(pipeline, tmp_path)
        return found, {each.unit: each.value for each in found.measurements}

    record, found = values()
    assert shown == [2, 3]
    assert found == pytest.approx(
        {"nats/token": 7 / 6 * math.log(2), "bits/image": 7 / 3, "bits/pixel": 7 / 3}
    )
    assert record.settings["n"] == 3 and record.measurements[0].settings["kind"] == "exact"
    assert record.measurements[0].subject == {
        "prior_sha256": "p" * 64,
        "tokenizer_sha256": "t" * 64,
    }
    tokens.labels[:] = 9
    assert values()[1] == found and len(loaded) == 1  # kept
    pipeline.options.fresh = True
    assert values()[1]["bits/image"] == pytest.approx(9) and len(loaded) == 2
    pipeline.options.fresh, pipeline.options.batch_size = False, 3
    assert values()[1]["bits/image"] == pytest.approx(9) and len(loaded) == 3  # other settings
    about.tokenizer_sha256 = "u" * 64
    with pytest.raises(UserError, match=r"uuuuuuuu….*tttttttt….*train the prior on these tokens"):
        values()


def test_a_priors_rate_is_given_the_labels_or_none():
    codes, labels = torch.tensor([[0, 1], [2, 3], [0, 0]]), torch.tensor([1, 2, 6])

    def rates(kind, **given):
        found = find_rates(
            codes, Bound.layout, prior=Bound(kind), batch_size=2, num_single=0, **given
        )
        return {rate.name: rate for rate in found.found}, found.notes

    found, notes = rates("bound", labels=labels)
    rate = found["prior cross-entropy"]
    assert rate.bits == pytest.approx(3) and rate.n == 3 and len(notes) == 1
    assert (
        rate.settings["rate"]
        == "upper bound of -log2 p of the prior, given the class label, which is not counted"
    )
    rate = rates("exact")[0]["prior cross-entropy"]
    assert rate.bits == pytest.approx(7) and rate.interval == pytest.approx((7, 7))
    assert rate.settings["rate"] == "-log2 p of the prior, given no label"
    found, notes = rates("none", labels=labels)
    assert "prior cross-entropy" not in found and "no likelihood" in notes[0]
    shares = torch.tensor([3, 1, 1, 1]) / 6
    with pytest.raises(ValueError, match="no codes"):
        find_rates(codes[:0], Bound.layout)
    assert found["unigram entropy"].bits == pytest.approx(
        -2 * float((shares * shares.log2()).sum()), rel=1e-6
    )


def test_rates_and_their_intervals_are_per_image_and_per_pixel():
    rate = Rate("made", 8.0, 3, {"rate": "how"}, interval=(4.0, 12.0))
    image, pixel = rate.measurements(ORIGIN, 4)
    assert (image.name, image.value, image.interval) == ("rate, made", 8, (4, 12))
    assert (pixel.name, pixel.value, pixel.interval) == ("rate per pixel, made", 2, (1, 3))
    assert Rate("made", 8.0, 3, {"rate": "how"}).measurements(ORIGIN, 4)[1].interval is None


def test_files_of_single_images_are_bytes_of_eight_bits():
    from eval.metrics.codec import TableModel, TokenFile, encode_tokens

    layout = CodeLayout(((2, 2),), (4,))
    codes = torch.randint(4, (5, 4), generator=torch.Generator().manual_seed(0))
    table = TableModel.of_codes(codes, layout)
    rates = find_rates(codes, layout, split_table=table, num_single=2)
    found = {rate.name: rate for rate in rates.found}
    single, whole = (
        found["file per image, coded by another split's table"],
        found["file, coded by another split's table"],
    )
    files = [encode_tokens(codes[i : i + 1], layout, table, None) for i in (0, 4)]
    assert single.n == 2 and single.bits == pytest.approx(8 * (len(files[0]) + len(files[1])) / 2)
    assert single.details["bytes"] == pytest.approx(single.bits / 8)
    payload = sum(len(TokenFile.from_bytes(file).payload) for file in files) / 2
    assert (
        single.details["payload_bytes"] == payload
        and "file per image, coded by a table in it" not in found
    )
    assert whole.details["ideal_bytes"] == pytest.approx(float(table.ideal_bits(codes).sum()) / 8)
    line = rates.table(4).splitlines()[2].split(" | ")
    assert line[0] == "| fixed" and [float(line[1]), float(line[3])] == [8, 2] and line[4] == "5"


def test_figures_of_pairs_have_the_mean_and_the_interval_of_images():
    from eval.interface import Batch

    references = torch.randint(
        0, 250, (3, 3, 16, 16), generator=torch.Generator().manual_seed(1), dtype=torch.uint8
    )
    images = references + torch.tensor([1, 2, 4], dtype=torch.uint8)[:, None, None, None]
    assert squared_error(images, references).tolist() == [1, 4, 16]
    paired = Paired(ORIGIN)
    paired.update(Batch(images, torch.arange(3), references=references))
    found = paired.compute()
    each = 20 * torch.log10(255 / torch.tensor([1.0, 2, 4], dtype=torch.float64))
    reach = 1.96 * float(each.std()) / math.sqrt(3)
    assert found["PSNR"].value == pytest.approx(float(each.mean()))
    assert found["PSNR"].interval == pytest.approx(
        (float(each.mean()) - reach, float(each.mean()) + reach)
    )
    assert found["PSNR, pooled"].value == pytest.approx(20 * math.log10(255) - 10 * math.log10(7))
    assert found["SSIM"].value == pytest.approx(float(ssim(images, references).mean()))
    assert found["PSNR"].settings == {"mean": "over images", "peak": 255}
    assert found["PSNR, pooled"].settings == {"mean": "of squared errors", "peak": 255}
    assert found["SSIM"].settings == {
        "window": "Gaussian 11x11, sigma 1.5",
        "range": 1,
        "padding": "none",
    }
    small = Paired(ORIGIN)
    small.update(Batch(images[..., :10], torch.arange(3), references=references[..., :10]))
    assert set(small.compute()) == {"PSNR", "PSNR, pooled"}  # SSIM's window is larger
