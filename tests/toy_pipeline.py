"""A finished pipeline in a second or two: grey blocks as tokens, blurred digits as samples, a hasty
extractor."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import rearrange, reduce, repeat
from torch import Tensor, nn

from eval import run as command
from eval.extractors.in_domain import ExtractorRun, train_extractor
from tokenizer.data.dataset import DataConfig
from tokenizer.interface import CodeLayout
from training.checkpoint import write_weights
from training.config import to_yaml
from training.loop import LoopConfig

DATA = DataConfig(source="digits", image_size=16)
NUM_SAMPLES = 120


class BlockTokenizer(nn.Module):
    """4x4 blocks to 16 grey levels."""

    layout = CodeLayout(grids=((4, 4),), num_codes=(16,))

    def encode(self, images: Tensor) -> Tensor:
        grey = reduce(images, "b c (h p) (w q) -> b (h w)", "mean", p=4, q=4)
        return ((grey + 1) / 2 * 15).round().long()

    def decode(self, codes: Tensor) -> Tensor:
        blocks = rearrange(codes.float() / 15 * 2 - 1, "b (h w) -> b h w", h=4)
        return repeat(blocks, "b h w -> b c (h p) (w q)", c=3, p=4, q=4)


def make_pipeline(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root with tokens of BlockTokenizer, blurred digits as samples, and an extractor of a few
    steps."""
    from tokenizer import encode
    from tokenizer.data.dataset import open_split
    from tokenizer.run import TokenizerRun

    model = BlockTokenizer()
    for module in ("tokenizer.encode.load", "eval.pipeline.load_tokenizer"):
        monkeypatch.setattr(module, lambda folder: model)
    write_weights(
        root / "tokenizer" / "weights" / "model.safetensors", {"none": torch.zeros(1)}, {}
    )
    (root / "tokenizer" / "config.yaml").write_text(to_yaml(TokenizerRun(data=DATA)))
    encode.encode_data(encode.TokensRun(root=str(root), tokenizer=str(root / "tokenizer")))
    train = open_split(DATA, "train").gather([(0, index) for index in range(NUM_SAMPLES)])
    images = (model.decode(model.encode(train["images"])) + 1) * 127.5
    (root / "samples").mkdir()
    pixels = images.round().byte().permute(0, 2, 3, 1).numpy()
    np.savez(root / "samples" / "samples.npz", arr_0=pixels, arr_1=train["labels"].numpy())
    train_extractor(tiny_extractor(), root / "extractor")
    return root


def tiny_extractor(task: str = "classes") -> ExtractorRun:
    loop = LoopConfig(steps=30, batch_size=64, precision="fp32", ema_decay=0.8)
    return ExtractorRun(name="digits-cnn", task=task, data=DATA, width=8, dim=16, loop=loop)


def evaluate(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["eval.run", *map(str, arguments)])
    command.main()
