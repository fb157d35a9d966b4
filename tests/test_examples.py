"""What README shows runs, and is what the examples are."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_cache import save_images, save_tokenizer

from priors.backbone import BackboneConfig
from priors.families.autoregressive import AutoregressiveConfig
from priors.train import PriorRun, train_prior
from tokenizer.encode import TokensRun, encode_data
from training.loop import LoopConfig

ROOT = next(path for path in Path(__file__).parents if (path / "pyproject.toml").is_file())
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def code_of(file: Path) -> str:
    """An example without its first line, which README says in words."""
    return re.sub(r'\A""".*?"""\n+', "", file.read_text(), count=1, flags=re.S).strip()


def test_readme_shows_the_examples():
    section = re.search(r"^## From Python$(.*?)^## ", (ROOT / "README.md").read_text(), re.M | re.S)
    shown = [code.strip() for code in re.findall(r"```python\n(.*?)```", section[1], re.S)]
    codes = {file.name: code_of(file) for file in EXAMPLES}
    assert len(shown) > 5 and all(code in codes.values() for code in shown)
    named = set(re.findall(r"examples/(\w+\.py)", section[1]))
    assert named == set(codes), "each example is shown or named"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny pipeline in runs/digits, and what else the examples name."""
    place = tmp_path_factory.mktemp("examples")
    root = place / "runs" / "digits"
    save_images(place / "images")
    save_tokenizer(root / "tokenizer", place / "images")
    encode_data(TokensRun(root=str(root)))
    prior = AutoregressiveConfig(backbone=BackboneConfig(dim=16, depth=1, heads=2))
    loop = LoopConfig(steps=1, batch_size=4, preview_every=9)
    train_prior(PriorRun(root=str(root), prior=prior, loop=loop))
    Image.effect_mandelbrot((40, 30), (-2, -1.5, 1, 1.5), 9).save(place / "cat.png")
    for name in ("samples", "photos"):
        (place / name).mkdir()
        for number in range(4):
            pixels = torch.randint(256, (16, 16, 3), dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(place / name / f"{number}.png")
    return place


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.name)
def test_an_example_runs(file, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    runpy.run_path(str(file), run_name="__main__")
    assert capsys.readouterr().out.strip()
