"""Distances of two folders or tensors, in Python and by one command."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import command

from eval import frechet_distance, psnr
from eval.extractors import EXTRACTORS
from eval.extractors.interface import Extraction
from training.errors import UserError


def means(images):
    """(B, 3, H, W) uint8 -> (B, 3)."""
    return images.double().mean(dim=(2, 3))


@pytest.fixture
def folders(tmp_path):
    """Two folders of the same names, and their pixels."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (2, 6, 3, 12, 12), generator=generator, dtype=torch.uint8)
    for name, images in zip("ab", pixels):
        (tmp_path / name).mkdir()
        for number, image in enumerate(images):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / name / f"{number}.png")
    return tmp_path, pixels


def test_frechet_is_that_of_two_gaussians(folders):
    """By scipy's matrix root, as pytorch-fid takes it."""
    from scipy.linalg import sqrtm

    place, pixels = folders
    rows = [means(each).numpy() for each in pixels]
    (m, c), (n, d) = ((each.mean(0), np.cov(each, rowvar=False)) for each in rows)
    expected = ((m - n) ** 2).sum() + np.trace(c + d - 2 * sqrtm(c @ d).real)
    for one, other in ((place / "a", place / "b"), (str(place / "a"), pixels[1])):
        assert math.isclose(frechet_distance(one, other, extractor=means), expected, rel_tol=1e-9)
    assert frechet_distance(place / "a", pixels[0], extractor=means) == 0


def test_psnr_is_of_pairs_by_name(folders):
    place, pixels = folders
    error = (pixels[0].double() - pixels[1].double()).square().mean(dim=(1, 2, 3))
    expected = float((10 * (255**2 / error).log10()).mean())
    assert math.isclose(psnr(place / "a", place / "b"), expected)
    assert math.isclose(psnr(*pixels), expected)
    assert psnr(place / "a", place / "a") == math.inf
    (place / "b" / "3.png").rename(place / "b" / "other.png")
    with pytest.raises(UserError, match=r"3 has no file of its name"):
        psnr(place / "a", place / "b")
    with pytest.raises(UserError, match="pairs are needed"):
        psnr(pixels[0], pixels[1, :4])


def test_what_is_no_set_of_images_is_said(folders):
    _, pixels = folders
    with pytest.raises(UserError, match="uint8"):
        psnr(pixels[0].float(), pixels[1])
    with pytest.raises(UserError, match="at least two"):
        frechet_distance(pixels[0, :1], pixels[1], extractor=means)


class Means:
    """An extractor of somebody's own."""

    name, sha256, standard, dim, input_size = "means", "0" * 64, False, 3, 12
    settings: ClassVar[dict] = {}

    def __call__(self, images):
        return Extraction(means(images), images.new_zeros(len(images), 0))


def test_the_command_shows_what_there_is(folders, capsys, monkeypatch):
    place, _ = folders
    assert command("eval.run", "distance", place / "a", place / "b") == 0
    shown = capsys.readouterr().out
    assert "PSNR: " in shown and "no Fréchet distance: " in shown and "at 12 px" in shown
    monkeypatch.setitem(EXTRACTORS, "means", Means)
    words = [place / "a", place / "b", "--extractor", "means"]
    assert command("eval.run", "distance", *words) == 0
    expected = frechet_distance(place / "a", place / "b", extractor=means)
    assert f"FD[means@00000000]: {expected:.4f}" in capsys.readouterr().out
    (place / "b" / "5.png").unlink()
    assert command("eval.run", "distance", place / "a", place / "b") == 2
    assert command("eval.run", "distance", place / "a", place / "nowhere") == 2
