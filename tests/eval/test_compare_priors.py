"""Priors side by side: `eval.run priors` over a pipeline's folder, and the likelihoods in its
table."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import command

import priors
from eval.extractors.in_domain import ExtractorRun, train_extractor
from tokenizer.cache import TokenCache
from tokenizer.data.dataset import DataConfig
from training.loop import LoopConfig

CONFIGS = Path(__file__).parents[2] / "configs" / "digits_vqvae"
LOOP = [
    "loop.steps=4",
    "loop.batch_size=8",
    "loop.log_every=2",
    "loop.save_every=4",
    "loop.preview_every=4",
]
SMALL = "{kind: conv, channels: 16, residual_blocks: 1, residual_channels: 8%s}"
BACKBONE = "backbone: {dim: 16, depth: 1, heads: 2}"
PRIORS = {
    "exact": f"{{kind: autoregressive, {BACKBONE}}}",
    "bounded": f"{{kind: absorbing, steps: 3, {BACKBONE}}}",
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pipeline")
    where, data = [f"root={root}"], ["data.image_size=16", "calibration_images=32"]
    model = [f"model.encoder={SMALL % ', stride: 4'}", f"model.decoder={SMALL % ''}"]
    model += ["model.quantizer={kind: vector, num_codes: 12, code_dim: 4}"]
    assert command("tokenizer.train", CONFIGS / "tokenizer.yaml", *where, *model, *data, *LOOP) == 0
    assert command("tokenizer.encode", CONFIGS / "tokens.yaml", *where) == 0
    for name, prior in PRIORS.items():
        assert (
            command(
                "priors.train",
                CONFIGS / "prior.yaml",
                *where,
                f"name={name}",
                f"prior={prior}",
                *LOOP,
            )
            == 0
        )
        assert (
            command("generate.sample", root / name, "--num", 30, "--out", root / name / "samples")
            == 0
        )
    loop = LoopConfig(steps=2, batch_size=16, log_every=1, save_every=2, preview_every=2)
    data = DataConfig(source="digits", image_size=16)
    train_extractor(
        ExtractorRun(name="digits-cnn", data=data, width=8, dim=16, loop=loop), root / "extractor"
    )
    return root


@pytest.fixture
def root(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "pipeline")


def test_a_row_for_each_prior_with_its_likelihood(root, capfd):
    assert command("eval.run", "priors", root, "--num", 40) == 0
    printed = capfd.readouterr().out
    content = {run["name"]: run for run in json.loads((root / "priors.json").read_text())["runs"]}
    assert set(content) == set(PRIORS) and all(name in printed for name in PRIORS)
    split = TokenCache.open(root / "tokens").split("held_out")
    places = torch.linspace(0, len(split.labels) - 1, 40).long()
    codes = torch.from_numpy(np.asarray(split.codes[places.tolist(), 0]).astype(np.int64))
    for name, kind in (("exact", "exact"), ("bounded", "bound")):
        figures = {figure["name"]: figure for figure in content[name]["figures"]}
        nll = figures[f"NLL ({kind}), nats/token"]
        found = priors.load(root / name).nll(codes, torch.as_tensor(split.labels)[places])
        assert nll["n"] == 40 and nll["value"] == pytest.approx(
            float(found.nats.mean()) / 16, rel=1e-6
        )
        bits = figures[f"rate, prior ({kind}), bits/image"]["value"]
        assert bits == pytest.approx(nll["value"] * 16 / np.log(2), rel=1e-9)
        assert figures[f"rate, prior ({kind}), bits/pixel"]["value"] == pytest.approx(
            bits / 256, rel=1e-9
        )
        assert content[name]["parameters"] == sum(
            p.numel() for p in priors.load(root / name).parameters()
        )
    page = (root / "priors.md").read_text()
    assert "(exact)" in page and "(bound)" in page
    for picture in ("priors-seconds.svg", "priors-samples.png"):
        assert (root / "images" / picture).is_file() and picture in page
    before = {path: path.stat().st_mtime_ns for path in (root / "report").glob("*.json")}
    assert command("eval.run", "priors", root, "--num", 40) == 0
    assert before == {
        path: path.stat().st_mtime_ns for path in (root / "report").glob("*.json")
    }  # nothing again


def test_priors_that_were_not_trained_or_sampled_alike_do_not_compare(root, capfd):
    config = root / "exact" / "config.yaml"
    config.write_text(config.read_text().replace("batch_size: 8", "batch_size: 16"))
    assert command("eval.run", "priors", root) == 2
    assert "differ in loop.batch_size" in capfd.readouterr().err
    shutil.rmtree(root / "exact")
    shutil.rmtree(root / "bounded")
    assert command("eval.run", "priors", root) == 2
    assert "make compare-priors" in capfd.readouterr().err


@pytest.mark.parametrize("text", ["{}", '{"made_from": {"num"', "[]"])
def test_damaged_facts_of_samples_are_one_line_before_the_work(text, root, capfd):
    (root / "exact" / "samples" / "samples.json").write_text(text)
    assert command("eval.run", "priors", root, "--num", 40) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and "samples.json" in error and "sample again" in error
    assert not (root / "report").exists()


def test_a_prior_that_was_named_and_is_not_there_is_one_line_before_the_work(root, capfd):
    assert command("eval.run", "report", root, "--prior", root / "absent") == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and "absent: holds no trained prior" in error
    assert not (root / "report").exists()


def test_a_manifest_without_its_data_is_one_line(root, capfd):
    path = root / "tokens" / "manifest.json"
    path.write_text(
        json.dumps(
            {key: value for key, value in json.loads(path.read_text()).items() if key != "data"}
        )
    )
    for words in (
        ["eval.run", "codebook", root],
        ["generate.inpaint", root / "bounded", "held_out:0", "--border", 1],
        ["tokenizer.encode", CONFIGS / "tokens.yaml", f"root={root}"],
    ):
        assert command(*words) == 2
        error = capfd.readouterr().err
        assert error.count("\n") == 1 and "manifest.json: damaged ('data')" in error
