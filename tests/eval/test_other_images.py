"""Evaluation of a pipeline whose images changed since: figures of other images are never shown as
its own."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import toy_pipeline
from PIL import Image
from toy_pipeline import evaluate, make_pipeline

from eval import pipeline as pipeline_module
from eval.pipeline import Options, Pipeline
from generate.edit import open_image
from tokenizer.data.dataset import DataConfig
from tokenizer.encode import TokensRun, encode_data
from training.errors import UserError


def draw(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(
        path
    )


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for number in range(160):
        draw(tmp_path / "images" / "ab"[number % 2] / f"{number}.png", number)
    monkeypatch.setattr(
        toy_pipeline, "DATA", DataConfig(source=str(tmp_path / "images"), image_size=16)
    )
    monkeypatch.setattr(
        pipeline_module, "_open_split", pipeline_module._open_split.__wrapped__
    )  # as a new process
    return make_pipeline(tmp_path / "run", monkeypatch)


def encode(root: Path, **options: str) -> None:
    encode_data(TokensRun(root=str(root), tokenizer=str(root / "tokenizer"), **options))


def test_tokens_and_figures_of_other_images(root, tmp_path, monkeypatch, capsys):
    evaluate(monkeypatch, "codebook", root)
    record = root / "report" / "codebook.json"
    before = record.read_bytes(), record.stat().st_mtime_ns
    evaluate(monkeypatch, "codebook", root)
    assert record.stat().st_mtime_ns == before[1]
    images = tmp_path / "images"

    def overwrite() -> None:
        for path in images.rglob("*.png"):
            draw(path, int(path.stem) + 1000)

    changes = (
        overwrite,
        lambda: shutil.copy(images / "a" / "0.png", images / "a" / "0000.png"),
        lambda: (images / "b" / "1.png").unlink(),
        lambda: (images / "b").rename(images / "c"),
    )
    for change in changes:
        change()
        both = change is overwrite  # of the others, some concern the train split alone
        for command in ("report", "generation", *(["codebook"] if both else [])):
            with pytest.raises(
                UserError, match=r"run/tokens: of other images \(.*\): run `make tokens` again"
            ):
                evaluate(monkeypatch, command, root)
        with pytest.raises(UserError, match=r"run/tokens: of other images"):
            data = DataConfig(source=str(images), image_size=16)
            (
                open_image("held_out:0", data, root / "tokens"),
                open_image("train:0", data, root / "tokens"),
            )
        assert record.read_bytes() == before[0]
        encode(root)
        evaluate(monkeypatch, "codebook", root)
        assert record.read_bytes() != before[0] or not both  # measured again
        before = record.read_bytes(), None
        with pytest.raises(
            UserError, match=r"extractor: this extractor was trained on other images: \d+ file"
        ):
            evaluate(monkeypatch, "reconstruction", root)


def test_images_that_moved_need_no_measuring(root, tmp_path, monkeypatch):
    evaluate(monkeypatch, "reconstruction", root)
    kept = {path: path.stat().st_mtime_ns for path in (root / "report").iterdir()}
    weights = (root / "extractor" / "weights" / "model.safetensors").stat().st_mtime_ns
    (tmp_path / "images").rename(tmp_path / "photos")
    encode(root, source=str(tmp_path / "photos"))
    evaluate(monkeypatch, "reconstruction", root)
    assert {path: path.stat().st_mtime_ns for path in (root / "report").iterdir()} == kept
    assert (root / "extractor" / "weights" / "model.safetensors").stat().st_mtime_ns == weights


def test_a_tokenizer_alone_is_measured_again(root, tmp_path, monkeypatch):
    shutil.rmtree(root / "tokens")
    evaluate(monkeypatch, "codebook", root / "tokenizer")
    record = root / "tokenizer" / "report" / "codebook.json"
    before = record.read_bytes()
    for path in (tmp_path / "images").rglob("*.png"):
        draw(path, int(path.stem) + 1000)
    evaluate(monkeypatch, "codebook", root / "tokenizer")
    assert record.read_bytes() != before


def test_an_extractor_of_an_earlier_version(root, tmp_path, capsys):
    (root / "extractor" / "inputs.json").write_text("{}")
    assert Pipeline(Options(run=root)).in_domain.dim == 16
    assert "does not say which images this extractor was trained on" in capsys.readouterr().out
    (tmp_path / "images").rename(tmp_path / "photos")
    encode(root, source=str(tmp_path / "photos"))
    with pytest.raises(UserError, match=r"extractor was trained with data\.source="):
        _ = Pipeline(Options(run=root)).in_domain
