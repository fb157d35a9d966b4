"""Linear probes: their rows, the classifier, and `eval.run probe` on tokenizers of a few steps."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import save_encoder

from eval import run as command
from eval.metrics.probe import STRENGTHS, Views, fit_probe, histograms, stratified
from tokenizer.interface import CodeLayout
from tokenizer.run import TokenizerRun, load
from tokenizer.train import train_tokenizer
from training.config import from_dict
from training.errors import UserError

CONV = {
    "encoder": {"kind": "conv", "channels": 16, "stride": 4},
    "decoder": {"kind": "conv", "channels": 16},
}
VECTOR = {"kind": "vector", "num_codes": 16, "code_dim": 8}
MODELS = {
    "vqvae": {"kind": "vqvae", **CONV, "quantizer": VECTOR},
    "vqvae2": {
        "kind": "vqvae2",
        **CONV,
        "top": VECTOR,
        "bottom": VECTOR,
        "channels": 16,
        "residual_channels": 8,
    },
}
TRAINED = ["continuous features", "quantized features", "code histograms"]


def clusters(n: int, seed: int, dim: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Three Gaussian clusters far apart: (n, dim) rows and their labels."""
    generator = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    return 10 * np.eye(3, dim)[labels] + generator.normal(size=(n, dim)), labels


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes that only their colour tells apart."""
    folder = tmp_path_factory.mktemp("colours")
    random = np.random.default_rng(0)
    for number, name in enumerate(["blue", "green", "red"]):
        (folder / name).mkdir()
        for index in range(30):
            pixels = random.integers(0, 100, (16, 16, 3), dtype=np.uint8)
            pixels[..., 2 - number] += 130
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
    return folder


def train(root: Path, data: Path, model: dict, **settings: object) -> Path:
    loop = {"steps": 3, "batch_size": 8, "log_every": 1, "preview_every": 3, "ema_decay": 0.5}
    raw = {
        "name": model["kind"],
        "root": str(root),
        "calibration_images": 32,
        "model": model,
        "loop": loop,
        **settings,
    }
    raw["data"] = {"source": str(data), "image_size": 16, "held_out": 0.3}
    train_tokenizer(from_dict(TokenizerRun, raw, "test"))
    return root / raw["name"]


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    return {name: train(root, data, model) for name, model in MODELS.items()}


def evaluate(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["eval.run", *map(str, arguments)])
    command.main()


def figures_of(run: Path) -> dict[str, dict]:
    record = json.loads((run / "report" / "probe.json").read_text())
    return {figure["name"]: figure for figure in record["measurements"]}


def test_a_share_of_each_class_and_never_all_of_it():
    labels = np.repeat([0, 1, 2, 3], [100, 10, 2, 1])
    chosen = stratified(labels, 0.2, seed=3)
    assert np.bincount(labels[chosen], minlength=4).tolist() == [20, 2, 1, 0]
    assert np.array_equal(chosen, stratified(labels, 0.2, seed=3))
    assert not np.array_equal(chosen, stratified(labels, 0.2, seed=4))


def test_histograms_are_square_roots_of_shares_per_level():
    layout = CodeLayout(((1, 2), (2, 2)), (3, 5))
    codes = np.array([[2, 2, 0, 0, 0, 4], [0, 1, 1, 2, 3, 4]])
    expected = np.zeros((2, 8))
    expected[0, [2, 3, 7]] = 1, 0.75**0.5, 0.5
    expected[1, [0, 1, 4, 5, 6, 7]] = [0.5**0.5] * 2 + [0.5] * 4
    np.testing.assert_allclose(histograms(codes, layout).toarray(), expected)


def test_the_probe_separates_what_is_linear_and_nothing_else():
    (train_rows, labels), (rows, truth) = clusters(150, 0), clusters(60, 1)
    found = fit_probe(train_rows, labels, rows)
    assert (found.predictions == truth).all()
    assert found.details["C"] in STRENGTHS and found.details["converged"]
    assert max(found.details["accuracy_by_C"].values()) == 100
    generator = np.random.default_rng(2)
    noise = fit_probe(generator.normal(size=(150, 6)), labels, generator.normal(size=(600, 6)))
    assert 0.2 < (noise.predictions == np.arange(600) % 3).mean() < 0.47
    plane = generator.normal(size=(400, 2))
    corners = (plane.prod(1) > 0).astype(int)  # opposite quadrants: no line parts them
    assert (fit_probe(plane, corners, plane).predictions == corners).mean() < 0.7


def test_units_do_not_matter_and_sparse_rows_are_as_dense_ones():
    from scipy.sparse import csr_matrix

    (train_rows, labels), (rows, _) = clusters(90, 0), clusters(300, 1)
    train_rows, rows = (
        train_rows + 8 * rows[:90],
        0.4 * rows,
    )  # overlapping, so that there is something to get wrong
    units, shift = np.array([1e-3, 1, 1e3, 1, 5, 1]), 100.0
    found = fit_probe(train_rows, labels, rows)
    moved = fit_probe(train_rows * units + shift, labels, rows * units + shift)
    sparse = fit_probe(csr_matrix(train_rows), labels, csr_matrix(rows))
    assert found.details["C"] == moved.details["C"] == sparse.details["C"]
    for other in (moved, sparse):
        assert (found.predictions == other.predictions).mean() > 0.98


def test_too_few_images_are_refused():
    with pytest.raises(UserError, match="--num"):
        fit_probe(np.eye(3), np.arange(3), np.eye(3))


@pytest.mark.parametrize("name", MODELS)
def test_the_quantized_view_is_what_the_decoder_is_given(name, runs):
    model, views = load(runs[name]), Views(runs[name])
    given = []
    model.decoder.register_forward_pre_hook(lambda module, arguments: given.append(arguments[0]))
    images = torch.rand(5, 3, 16, 16) * 2 - 1
    output, rows = model(images), views(images)
    assert torch.equal(rows["quantized features"], given[0].mean((2, 3)))
    assert torch.equal(rows["continuous features"], output.features.mean((2, 3)))
    assert torch.equal(rows["code histograms"], model.encode(images))
    if name == "vqvae":
        assert torch.equal(given[0], model.project_out(output.vectors))
    assert rows["random encoder"].shape == rows["continuous features"].shape
    assert not torch.equal(rows["random encoder"], rows["continuous features"])
    assert torch.equal(rows["random encoder"], Views(runs[name])(images)["random encoder"])


@pytest.mark.parametrize("name", MODELS)
def test_the_command_probes_every_view_once(name, runs, monkeypatch, capsys):
    run = runs[name]
    evaluate(monkeypatch, "probe", run, "--batch-size", 7)
    assert "the pretrained encoder's probe is left out" in capsys.readouterr().out.lower()
    figures = figures_of(run)
    assert set(figures) == {
        f"probe accuracy, {view}" for view in [*TRAINED, "random encoder", "pixels"]
    }
    assert all(
        figure["n"] == 27 and figure["settings"]["train_n"] == 63 for figure in figures.values()
    )
    assert all(low <= f["value"] <= high for f in figures.values() for low, high in [f["interval"]])
    for view in ("continuous features", "pixels"):
        assert figures[f"probe accuracy, {view}"]["value"] == 100  # colours survive a mean
    kept = (run / "report" / "probe.npz").stat().st_mtime_ns
    evaluate(monkeypatch, "probe", run, "--batch-size", 7)
    assert (run / "report" / "probe.npz").stat().st_mtime_ns == kept
    evaluate(monkeypatch, "probe", run, "--batch-size", 7, "--num", 15)
    assert {
        (figure["n"], figure["settings"]["train_n"]) for figure in figures_of(run).values()
    } == {(15, 15)}


def test_a_frozen_encoder_keeps_all_of_its_accuracy(data, tmp_path, monkeypatch):
    encoder = save_encoder(tmp_path / "encoder")
    model = {
        "kind": "vqrae",
        "encoder": {"kind": "foundation", "name": encoder, "frozen": True},
        "quantizer": {"kind": "simvq", "num_codes": 16, "code_dim": 8},
        "decoder": {"kind": "vit", "dim": 32, "depth": 1, "heads": 2},
    }
    run = train(tmp_path, data, model)
    evaluate(monkeypatch, "probe", run, "--encoder", encoder)
    figures = figures_of(run)
    assert figures["pretrained accuracy kept, continuous features"]["value"] == 100
    arrays = np.load(run / "report" / "probe.npz")
    assert np.array_equal(
        arrays["predictions, continuous features"], arrays["predictions, pretrained encoder"]
    )
    whole, part = (
        figures[f"probe accuracy, {view}"]["value"]
        for view in ("pretrained encoder", "code histograms")
    )
    assert figures["pretrained accuracy kept, code histograms"]["value"] == pytest.approx(
        100 * part / whole
    )
    other = save_encoder(tmp_path / "other", hidden_size=24)
    with pytest.raises(UserError, match="other dimensions"):
        evaluate(monkeypatch, "probe", run, "--encoder", other)


def test_user_mistakes_are_one_line(runs, monkeypatch, tmp_path):
    with pytest.raises(UserError, match="began with no pretrained encoder"):
        evaluate(monkeypatch, "probe", runs["vqvae"], "--encoder", "facebook/dinov2-base")
    with pytest.raises(UserError, match="tokens"):
        evaluate(monkeypatch, "probe", tmp_path)
    images = tmp_path / "unsorted"
    images.mkdir()
    for name in range(6):
        Image.fromarray(np.full((16, 16, 3), 40 * name, np.uint8)).save(images / f"{name}.png")
    run = train(tmp_path / "runs", images, MODELS["vqvae"])
    with pytest.raises(UserError, match="labels of two or more classes"):
        evaluate(monkeypatch, "probe", run)
