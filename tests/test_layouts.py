"""Codes of several levels go through cache, prior, sampler and report as those of one do."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import command

import tokenizer
from tokenizer.cache import TokenCache

CONFIGS = Path(__file__).parents[1] / "configs" / "digits_vqvae"
LOOP = [
    "loop.steps=4",
    "loop.batch_size=8",
    "loop.log_every=2",
    "loop.save_every=4",
    "loop.preview_every=4",
]
SMALL = "{kind: conv, channels: 16, stride: %d, residual_blocks: 1, residual_channels: 8}"
VECTOR = "{kind: vector, num_codes: 12, code_dim: 4}"
MODELS = {
    "residual": (f"{{kind: residual, depth: 3, level: {VECTOR}}}", (((4, 4),) * 3, (12,) * 3)),
    "product": (f"{{kind: product, heads: 2, level: {VECTOR}}}", (((4, 4),) * 2, (12,) * 2)),
    "vqvae2": (VECTOR, (((4, 4), (8, 8)), (12, 12))),
}


@pytest.mark.parametrize("prior", ["autoregressive", "masked"])
@pytest.mark.parametrize("name", MODELS)
def test_a_pipeline_of_several_levels(name, prior, tmp_path):
    quantizer, (grids, sizes) = MODELS[name]
    stride = 2 if name == "vqvae2" else 4
    where, decoder = (
        [f"root={tmp_path}"],
        "{kind: conv, channels: 16, residual_blocks: 1, residual_channels: 8}",
    )
    model = [f"model.encoder={SMALL % stride}", f"model.decoder={decoder}"]
    if name == "vqvae2":
        model += [
            "model.kind=vqvae2",
            f"model.top={quantizer}",
            f"model.bottom={quantizer}",
            "model.channels=16",
        ]
    else:
        model += [f"model.quantizer={quantizer}"]
    data = ["data.image_size=16", "calibration_images=32"]
    assert command("tokenizer.train", CONFIGS / "tokenizer.yaml", *where, *model, *data, *LOOP) == 0
    assert command("tokenizer.encode", CONFIGS / "tokens.yaml", *where) == 0
    cache = TokenCache.open(tmp_path / "tokens")
    assert (cache.layout.grids, cache.layout.num_codes) == (grids, sizes)
    sized = [f"prior={{kind: {prior}, backbone: {{dim: 32, depth: 1, heads: 2}}}}"]
    assert command("priors.train", CONFIGS / "prior.yaml", *where, *sized, *LOOP) == 0
    assert command("generate.sample", tmp_path, "--num", 10) == 0
    assert np.load(tmp_path / "samples" / "samples.npz")["arr_0"].shape == (10, 16, 16, 3)
    codes = torch.from_numpy(np.asarray(cache.split("held_out").codes[:4, 0]).astype(np.int64))
    assert tokenizer.load(cache.tokenizer_folder).decode(codes).shape == (4, 3, 16, 16)
    assert command("eval.run", "reconstruction", cache.tokenizer_folder, "--num", 40) == 0
    record = json.loads((cache.tokenizer_folder / "report" / "reconstruction.json").read_text())
    names = [measurement["name"] for measurement in record["measurements"]]
    assert sum("perplexity" in figure for figure in names) >= len(grids)
