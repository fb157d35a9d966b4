"""The whole pipeline on a data set that the code has never seen, through its commands, in
miniature."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import command

CONFIGS = Path(__file__).parents[1] / "configs" / "digits"
LOOP = [
    "loop.steps=6",
    "loop.batch_size=8",
    "loop.log_every=2",
    "loop.save_every=3",
    "loop.preview_every=3",
]
MODEL = [
    "model.quantizer.num_codes=16",
    "model.quantizer.code_dim=8",
    "model.decoder.dim=32",
    "model.decoder.depth=1",
    "model.decoder.heads=2",
    "calibration_images=24",
]
MAE = ["mae.dim=32", "mae.depth=1", "mae.heads=2", "mae.decoder_dim=16", "mae.decoder_heads=2"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of odd sizes and modes, and one file that is no image."""
    folder = tmp_path_factory.mktemp("shapes and colours")
    random = np.random.default_rng(0)
    for number, name in enumerate(["blue", "green tea", "red"]):
        (folder / name).mkdir()
        for index in range(14):
            height, width = random.integers(20, 70, 2)
            pixels = random.integers(0, 90, (height, width, 3), dtype=np.uint8)
            pixels[..., 2 - number] += 150
            mode = ["RGB", "RGBA", "P", "CMYK"][index % 4]
            suffix = "jpg" if mode == "CMYK" else "png"
            Image.fromarray(pixels).convert(mode).save(folder / name / f"{index}.{suffix}")
    (folder / "red" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing more")
    return folder


@pytest.fixture(scope="module")
def root(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished pipeline over `images`."""
    root = tmp_path_factory.mktemp("runs") / "unseen"
    where = [f"root={root}"]
    data = [f"data.source={images}", "data.held_out=0.3"]
    encoder = ["tokenizer.encoders.pretrain", CONFIGS / "encoder.yaml", *where, *data, *LOOP, *MAE]
    assert command(*encoder) == 0
    for stage in ("tokenizer-stage1", "tokenizer-stage2"):
        assert (
            command("tokenizer.train", CONFIGS / f"{stage}.yaml", *where, *data, *LOOP, *MODEL) == 0
        )
    assert command("tokenizer.encode", CONFIGS / "tokens.yaml", *where) == 0
    prior = ["prior.backbone.dim=32", "prior.backbone.depth=1", "prior.backbone.heads=2"]
    assert command("priors.train", CONFIGS / "prior.yaml", *where, *prior, *LOOP) == 0
    assert command("generate.sample", root, "--num", 12) == 0
    return root


def test_samples_are_what_the_adm_evaluator_reads(root: Path):
    samples = np.load(root / "samples" / "samples.npz")
    assert samples["arr_0"].shape == (12, 30, 30, 3) and samples["arr_0"].dtype == np.uint8
    assert sorted(set(samples["arr_1"].tolist())) == [0, 1, 2]


def test_the_broken_file_is_skipped_and_nothing_leaks(root: Path):
    splits = json.loads((root / "tokens" / "manifest.json").read_text())["splits"]
    assert splits["train"]["count"] + splits["held_out"]["count"] == 42
    from tokenizer.cache import TokenCache

    cache = TokenCache.open(root / "tokens")
    cache.verify()
    assert not set(cache.split("train").ids) & set(cache.split("held_out").ids)
    assert cache.class_names == ["blue", "green tea", "red"]


def test_codes_of_the_cache_are_the_tokenizers(root: Path):
    """View 0 of the cache, decoded, is the reconstruction; the averaged tokenizer's lookup is its
    forward."""
    import tokenizer
    from tokenizer.cache import TokenCache
    from tokenizer.data.dataset import open_split

    cache = TokenCache.open(root / "tokens")
    model = tokenizer.load(cache.tokenizer_folder)
    images = open_split(model.config.data, "held_out")
    batch = images.gather([(0, index) for index in range(8)])["images"]
    codes = torch.from_numpy(np.asarray(cache.split("held_out").codes[:8, 0]).astype(np.int64))
    assert (
        model.encode(batch) == codes
    ).float().mean() > 0.99  # another batch shape may round a tie
    output = model(batch)
    levels = torch.stack(model.layout.split(output.codes), 1)
    assert torch.equal(model.quantizer.lookup(levels), output.vectors)
    assert torch.equal(model.decode(model.encode(batch)), output.images)


def test_every_stage_is_a_no_op_when_current(
    root: Path, images: Path, capsys: pytest.CaptureFixture
):
    files = {path: path.stat().st_mtime_ns for path in root.rglob("*.safetensors")}
    files |= {
        path: path.stat().st_mtime_ns for path in [*root.rglob("*.npy"), *root.rglob("*.npz")]
    }
    assert command("tokenizer.encode", CONFIGS / "tokens.yaml", f"root={root}") == 0
    assert "up to date" in capsys.readouterr().out
    assert command("generate.sample", root, "--num", 12) == 0
    assert files == {path: path.stat().st_mtime_ns for path in files}


def test_a_run_with_other_settings_is_refused(
    root: Path, images: Path, capsys: pytest.CaptureFixture
):
    words = [f"root={root}", f"data.source={images}", "data.held_out=0.3", *LOOP, *MODEL]
    assert (
        command("tokenizer.train", CONFIGS / "tokenizer-stage1.yaml", *words, "optimizer.lr=0.5")
        == 2
    )
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "optimizer.lr" in error and "--fresh" in error


def test_report_is_one_offline_page(root: Path, capsys: pytest.CaptureFixture):
    import tokenizer
    from eval.extractors.in_domain import extractor_run, train_extractor
    from tokenizer.data.dataset import open_split

    data = tokenizer.load(root / "tokenizer-stage2").config.data
    usual = extractor_run(data, open_split(data, "train"))
    train_extractor(
        dataclasses.replace(usual, loop=dataclasses.replace(usual.loop, steps=4)),
        root / "extractor",
    )
    assert command("eval.run", "report", root, "--batch-size", 16) == 0
    assert str(root / "report" / "report.html") in capsys.readouterr().out
    page = (root / "report" / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)
    figures = json.loads((root / "report" / "report.json").read_text())
    assert "class agreement" in json.dumps(figures) and '"FID"' not in json.dumps(figures)
