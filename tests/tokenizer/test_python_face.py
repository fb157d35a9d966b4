"""Tokenizers by any name, pictures to codes and back, and what is refused."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from test_cache import SIDE, save_images, save_tokenizer

import tokenizer
from tokenizer.sharing import save_pretrained
from training.errors import UserError


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A pipeline's root with two stages of a tokenizer, and images."""
    root = tmp_path_factory.mktemp("root")
    save_images(root / "images")
    for seed, stage in enumerate(("tokenizer-stage1", "tokenizer-stage2")):
        save_tokenizer(root / stage, root / "images", seed)
    return root


def same(one, other) -> bool:
    states = zip(one.state_dict().values(), other.state_dict().values())
    return all(torch.equal(a, b) for a, b in states)


def test_a_tokenizer_is_found_by_any_of_its_names(root, tmp_path):
    run = tokenizer.load(root / "tokenizer-stage2")
    assert same(tokenizer.load(str(root)), run)
    save_pretrained(root / "tokenizer-stage2", tmp_path / "shared")
    assert same(tokenizer.load(tmp_path / "shared"), run)
    moved = tmp_path / "root"
    shutil.copytree(root, moved)
    (moved / "tokens").mkdir()
    with pytest.raises(UserError, match="no tokenizer was trained here"):
        tokenizer.load(tmp_path / "root" / "images")
    with pytest.raises(UserError, match="no such folder"):
        tokenizer.load("nowhere")


def test_pictures_are_encoded_as_training_read_them(root):
    model = tokenizer.load(root)
    paths = sorted((root / "images").rglob("*.png"))[:5]
    codes = tokenizer.encode_images(model, paths)
    assert codes.shape == (5, model.layout.length) and codes.dtype == torch.int64
    pictures = [Image.open(path) for path in paths]
    assert torch.equal(tokenizer.encode_images(model, pictures), codes)
    assert torch.equal(tokenizer.encode_images(model, pictures[2]), codes[2:3])
    assert torch.equal(tokenizer.encode_images(model, paths, batch_size=2), codes)
    pixels = torch.randint(256, (4, 3, SIDE, SIDE), dtype=torch.uint8)
    expected = model.encode(pixels.float() / 127.5 - 1)
    assert torch.equal(tokenizer.encode_images(model, pixels), expected)
    assert torch.equal(
        tokenizer.encode_images(model, list(pixels.numpy().transpose(0, 2, 3, 1))), expected
    )


def test_codes_are_decoded_to_pictures(root):
    model = tokenizer.load(root)
    codes = torch.randint(16, (3, model.layout.length))
    pictures = tokenizer.decode_images(model, codes)
    pixels = tokenizer.decode_images(model, codes, as_tensor=True, batch_size=2)
    assert [picture.size for picture in pictures] == [(SIDE, SIDE)] * 3
    assert np.array_equal(np.stack(pictures), pixels.permute(0, 2, 3, 1).numpy())
    exact = ((model.decode(codes).clamp(-1, 1) + 1) * 127.5).round()
    assert torch.equal(pixels.float(), exact)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.zeros(1, 3, SIDE, SIDE, dtype=torch.uint8), "uint8"),
        (torch.rand(1, 3, SIDE, SIDE) * 255, "to 25"),
        (torch.full((1, 3, SIDE, SIDE), torch.nan), "not finite"),
        (torch.full((1, 3, SIDE, SIDE), torch.inf), "not finite"),
    ],
)
def test_encode_says_what_it_was_not_given(root, images, words):
    """It gave a code, and nothing was said."""
    model = tokenizer.load(root)
    with pytest.raises(ValueError, match=words) as caught:
        model.encode(images)
    assert "encode_images" in str(caught.value) and "[-1, 1]" in str(caught.value)


def test_what_is_no_picture_is_named(root, tmp_path):
    model = tokenizer.load(root)
    (tmp_path / "a.png").write_text("no picture")
    for images, words in (
        ([tmp_path / "a.png"], "a.png): is not an image"),
        ([torch.rand(3, 4, 4)], "float32, not of uint8"),
        ([], "there are none"),
    ):
        with pytest.raises(UserError) as caught:
            tokenizer.encode_images(model, images)
        assert words in str(caught.value) and str(caught.value).startswith("images")


def test_every_public_name_is_there_and_says_what_it_does():
    import eval
    import generate
    import priors
    import training
    from tokenizer import quantizers

    for package in (tokenizer, quantizers, priors, generate, eval, training):
        assert package.__all__ and json.dumps(package.__all__)
        for name in package.__all__:
            thing = getattr(package, name)
            assert not callable(thing) or len(thing.__doc__ or "") > 30, (
                f"{package.__name__}.{name}"
            )
        assert set(package.__all__) <= set(dir(package))


def test_importing_a_package_does_not_load_the_networks():
    import subprocess
    import sys

    code = "import sys, tokenizer, eval, generate, training; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
