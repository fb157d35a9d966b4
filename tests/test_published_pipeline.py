"""A published tokenizer from its file to a report on samples of a prior, and trained on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import published_networks as published
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_published_imports import tiny_taming
from test_published_sizes import maskbit
from tiny import command
from toy_pipeline import DATA, tiny_extractor

import tokenizer as tessera
from eval.extractors.in_domain import train_extractor
from tokenizer.cache import TokenCache
from tokenizer.data.dataset import DataConfig, open_split
from tokenizer.published.imports import export_tokenizer, import_tokenizer

PRIOR = Path(__file__).parents[1] / "configs" / "digits_vqvae" / "prior.yaml"
LOOP = ["loop.steps=4", "loop.batch_size=8", "loop.log_every=2", "loop.save_every=4"]
SMALL = ["prior.backbone.dim=32", "prior.backbone.depth=1", "prior.backbone.heads=2"]


def test_from_a_published_file_to_a_report(tmp_path):
    """MaskBit's network with random weights: encode, cache, a prior, samples, report."""
    model, _, _, _ = maskbit(
        hidden_channels=32, channel_mult=[1, 1, 1], token_size=5, codebook_size=32
    )
    file, root = tmp_path / "maskbit.safetensors", tmp_path / "run"
    save_file(published.randomised(model).state_dict(), file)
    data = [f"data.source={DATA.source}", f"data.image_size={DATA.image_size}"]
    assert command("tokenizer.encode", f"published:{file}", *data, f"root={root}") == 0
    tokens = TokenCache.open(root / "tokens")
    held_out = open_split(DATA, "held_out").gather([(0, place) for place in range(5)])
    codes = model.search(model.features((held_out["images"] + 1) / 2))[0].flatten(1)
    kept = np.asarray(tokens.split("held_out").codes[:5, 0]).astype(np.int64)
    assert np.array_equal(kept, codes.numpy()), "the tokens are the authors' network's"
    assert command("priors.train", PRIOR, f"root={root}", *SMALL, *LOOP) == 0
    assert command("generate.sample", root, "--num", 24) == 0
    assert np.load(root / "samples" / "samples.npz")["arr_0"].shape == (24, 16, 16, 3)
    train_extractor(tiny_extractor(), root / "extractor")
    assert command("eval.run", "report", root, "--num", 24) == 0
    figures = json.loads((root / "report" / "report.json").read_text())["figures"]
    names = {figure["name"].split("[")[0] for figure in figures}
    assert {"PSNR", "codebook usage", "rFD", "FD"} <= names


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """A published VQGAN as a folder, for digits."""
    folder = tmp_path_factory.mktemp("tuned")
    save_file(tiny_taming(), folder / "model.safetensors")
    data = {"source": "digits", "image_size": 8}
    import_tokenizer(folder / "model.safetensors", folder / "tiny", data)
    return folder


@pytest.mark.parametrize("tune", ["decoder", "all"])
def test_training_goes_on_from_a_published_tokenizer(imported, tune):
    words = [f"root={imported}", f"name={tune}", f"start_from={imported / 'tiny'}", f"tune={tune}"]
    assert command("tokenizer.train", imported / "tiny" / "config.yaml", *words, *LOOP) == 0
    before, after = tessera.load(imported / "tiny"), tessera.load(imported / tune)
    changed = {
        name.split(".")[0]
        for name, tensor in after.state_dict().items()
        if not name.startswith("quantizer.statistics")
        and not torch.equal(tensor, before.state_dict()[name])
    }
    images = open_split(DataConfig("digits", 8), "held_out").gather([(0, n) for n in range(40)])[
        "images"
    ]
    same = torch.equal(before.encode(images), after.encode(images))
    if tune == "decoder":
        assert changed == {"project_out", "decoder"} and same
    else:
        assert {"encoder", "project_in", "decoder"} <= changed
    export_tokenizer(
        imported / tune, imported / "model.safetensors", imported / f"{tune}.safetensors"
    )
    written = load_file(imported / f"{tune}.safetensors")
    assert written.keys() == tiny_taming().keys()
    kept = torch.equal(written["encoder.conv_in.weight"], tiny_taming()["encoder.conv_in.weight"])
    assert kept == (tune == "decoder")


def test_a_decoder_alone_needs_a_beginning(imported, capsys):
    config = imported / "tiny" / "config.yaml"
    assert command("tokenizer.train", config, f"root={imported}", "tune=decoder") == 2
    assert (
        "tune=decoder keeps the codes of start_from, and there is no start_from"
        in capsys.readouterr().err
    )
    assert command("tokenizer.train", config, f"root={imported}", "tune=encoder") == 2
