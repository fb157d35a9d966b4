"""One image, or two: what can be measured is, and a note says of what N is too few."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import toy_pipeline
from PIL import Image
from tiny import command
from toy_pipeline import evaluate

from eval.counts import LEAST, Counts
from eval.extractors.interface import Extraction
from eval.generation import IS_SPLITS, NEIGHBOURS
from eval.metrics.frechet import Gaussian, frechet_distance, frechet_infinity
from eval.metrics.inception_score import inception_score
from eval.metrics.kid import kernel_distance
from eval.metrics.memorisation import find_copying
from eval.metrics.precision_recall import manifold
from eval.reference import read_reference, write_reference
from tokenizer.data.dataset import DataConfig
from training.errors import UserError

SCORES = {
    "a Fréchet distance": lambda rows: frechet_distance(
        Gaussian.of_features(rows), Gaussian.of_features(rows + 1)
    ),
    "a distance at endless N": lambda rows: (
        frechet_infinity(rows, Gaussian.of_features(normal(30)), 15, len(rows) // 10).value
    ),
    "a kernel distance": lambda rows: kernel_distance(rows, normal(30), 3, len(rows) // 2).mean,
    "a score of class probabilities": lambda rows: (
        inception_score(rows.softmax(1), IS_SPLITS).mean - 1
    ),
    "precision, recall, density and coverage": lambda rows: manifold(rows, rows + 0.1).coverage,
}


def normal(n, seed=0):
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("figure", SCORES)
def test_each_figure_is_one_from_its_least_number_on(figure):
    score, least = SCORES[figure], LEAST[figure]
    assert np.isfinite(score(normal(least))) and score(normal(least)) != 0
    if (
        figure == "a score of class probabilities"
    ):  # some splits are of one image, whose score is 1 whatever it is
        parts = [inception_score(normal(1, seed).softmax(1), 1).mean for seed in range(3)]
        assert parts == pytest.approx([1, 1, 1])
    else:
        with pytest.raises(ValueError, match=r"\d"):
            score(normal(least - 1))


def test_one_sample_has_no_variance_to_tell_copies_by():
    rows = normal(LEAST["nearer to train than held-out images"])
    assert np.isfinite(find_copying(rows, rows, normal(30)).interval).all()
    with pytest.warns(UserWarning, match="degrees of freedom"):
        assert find_copying(rows[:1], rows, normal(30)).interval == (0, 100)  # which says nothing


def test_notes_name_the_set_its_number_and_the_figures():
    counts = Counts({"samples": 1, "held-out images": 30})
    assert counts.suffice("a Fréchet distance", "held-out images") and counts.notes == []
    for figure in ("a Fréchet distance", "a kernel distance", "a Fréchet distance"):
        assert not counts.suffice(figure, "samples", "held-out images")
    assert counts.notes == [
        "N = 1 (samples) is too few for a Fréchet distance (at least 2); a kernel distance (at least 4): left out."
    ]
    assert NEIGHBOURS < LEAST["precision, recall, density and coverage"]


def few(root, num_samples):
    """Put so many samples in the place of a pipeline's."""
    path = root / "samples" / "samples.npz"
    images = np.random.default_rng(0).integers(0, 256, (num_samples, 16, 16, 3), dtype=np.uint8)
    np.savez(path, arr_0=images, arr_1=np.zeros(num_samples, np.int64))


@pytest.fixture(scope="module", params=[120, 2], ids=["pictures", "two pictures"])
def root(request, tmp_path_factory):
    """Pictures of two classes, a fifth of each held out, or a picture to train on and one held
    out."""
    folder = tmp_path_factory.mktemp("few")
    for index in range(request.param):
        pixels = np.random.default_rng(index).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        path = folder / "data" / ("" if request.param == 2 else "ab"[index % 2]) / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy_pipeline, "DATA", DataConfig(source=str(folder / "data"), image_size=16))
        patch.setattr(toy_pipeline, "NUM_SAMPLES", 1)
        yield toy_pipeline.make_pipeline(folder / "toy", patch), request.param


@pytest.mark.parametrize("num_samples", [1, 2, 5, 20])
def test_a_report_of_few_images_gives_what_can_be_given(root, num_samples, monkeypatch, capsys):
    root, num = root
    real = json.loads((root / "tokens" / "manifest.json").read_text())["splits"]["held_out"][
        "count"
    ]
    assert real == 1 if num == 2 else real > 20
    few(root, num_samples)
    evaluate(monkeypatch, "report", root, "--batch-size", 200)
    said = capsys.readouterr().out
    content = json.loads((root / "report" / "report.json").read_text(), parse_constant=pytest.fail)
    figures = {figure["name"].partition("[")[0]: figure for figure in content["figures"]}
    assert {"PSNR", "codebook usage", "perplexity" if num == 2 else "class agreement"} <= set(
        figures
    )
    pair = {"FD": 2, "KD": 4, "precision": 6, "nearer to train than held-out images": 2}
    wanted = {name for name, least in pair.items() if min(num_samples, real) >= least}
    wanted |= {"IS"} if num_samples >= 20 or real >= 20 else set()
    names = {name for name in [*pair, "IS"] if name in figures}
    assert names == wanted | (
        {"FD", "KD", "precision"} if real > 20 else set()
    )  # of real images beside
    for name, figure in figures.items():
        assert np.isfinite(float(figure["value"])) or name == "PSNR", figure
    assert (f"N = {num_samples} (samples) is too few for" in said) == (num_samples < 20)
    assert ("N = 1 (held-out images) is too few for a Fréchet distance (at least 2)" in said) == (
        real == 1
    )
    page = (root / "report" / "report.md").read_text()
    assert (f"N = {num_samples} (samples) is too few" in page) == (num_samples < 20)


def test_every_other_command_takes_few_images(root, monkeypatch, capsys):
    root, num = root
    few(root, 2)
    for words in (
        ["reconstruction"],
        ["codebook"],
        ["rate"],
        ["generation", "--protocol", "adm", "torch-fidelity"],
    ):
        evaluate(monkeypatch, words[0], root, *words[1:])
    figures = json.loads((root / "report" / "protocols.json").read_text())["measurements"]
    assert len(figures) == (0 if num == 2 else 2) and all(
        f["name"].startswith("FD") for f in figures
    )
    said = capsys.readouterr().out
    assert (
        "N = 2 (samples) is too few for a score" in said
        or "N = 1 (train images) is too few for a Fréchet" in said
    )


class Means:
    name, sha256, standard, dim, input_size = "means", "a" * 64, False, 3, 8
    settings = {"extractor": "means", "extractor_sha256": "a" * 64}  # noqa: RUF012

    def __call__(self, images):
        return Extraction(images.float().mean((2, 3)), torch.zeros(len(images), 0))


def test_statistics_of_one_image_are_refused_in_a_line(tmp_path, capsys):
    one = tmp_path / "one.npz"
    np.savez(one, arr_0=np.zeros((1, 8, 8, 3), np.uint8))
    for make in (
        lambda: write_reference(str(one), tmp_path / "out.npz", Means()),
        lambda: write_reference("digits", tmp_path / "out.npz", Means(), image_size=8, num=1),
        lambda: read_reference(one, Means()),
    ):
        with pytest.raises(UserError, match=r"N = 1 is too few for .*at least 2 are needed"):
            make()
    assert not (tmp_path / "out.npz").exists()
    assert (
        command("eval.run", "reference-stats", one, "--out", tmp_path / "out.npz", "--num", 1) == 2
    )
    assert capsys.readouterr().err.count("\n") == 1
    np.savez(one, arr_0=np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8))
    assert write_reference(str(one), tmp_path / "out.npz", Means()).settings["reference_n"] == 2
