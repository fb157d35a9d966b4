"""PSNR, SSIM, LPIPS and codebook figures against known answers."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from eval.interface import Batch
from eval.metrics.codebook import CodebookUsage, usage
from eval.metrics.image_similarity import C1, LPIPS, Paired, psnr, squared_error, ssim
from eval.record import Origin
from tokenizer.data.transforms import to_float, to_uint8
from tokenizer.interface import CodeLayout
from training.errors import UserError

SQUEEZE = Path(__file__).parents[3] / "shared" / "weights" / "lpips-squeeze"


def random_images(n: int, size: int = 16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, size, size), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("offset", [1, 10, 200])
def test_psnr_of_a_constant_offset(offset: int) -> None:
    images = torch.full((2, 3, 8, 8), 20, dtype=torch.uint8)
    found = psnr(squared_error(images + offset, images))
    assert found.tolist() == pytest.approx([20 * math.log10(255 / offset)] * 2)
    assert torch.equal(
        squared_error(images, images + offset), squared_error(images + offset, images)
    )


def test_ssim_known_answers() -> None:
    images = random_images(3)
    torch.testing.assert_close(ssim(images, images), torch.ones(3).double(), rtol=0, atol=1e-12)
    a, b = (
        torch.full((1, 3, 16, 16), 51, dtype=torch.uint8),
        torch.full((1, 3, 16, 16), 204, dtype=torch.uint8),
    )
    expected = (2 * 0.2 * 0.8 + C1) / (0.2**2 + 0.8**2 + C1)
    assert float(ssim(a, b)) == pytest.approx(expected, rel=1e-9)
    with pytest.raises(ValueError, match="11 px"):
        ssim(images[..., :10], images[..., :10])


def test_ssim_is_the_definition() -> None:
    """One window: an 11x11 image gives the formula on Gaussian-weighted moments."""
    x, y = random_images(1, 11, 1), random_images(1, 11, 2)
    line = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    weights = np.outer(line, line) / line.sum() ** 2
    values = []
    for a, b in zip(x[0].numpy() / 255, y[0].numpy() / 255):
        mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
        variance_a, variance_b = (
            (weights * c**2).sum() - m**2 for c, m in ((a, mean_a), (b, mean_b))
        )
        covariance = (weights * a * b).sum() - mean_a * mean_b
        top = (2 * mean_a * mean_b + 1e-4) * (2 * covariance + 9e-4)
        values.append(top / ((mean_a**2 + mean_b**2 + 1e-4) * (variance_a + variance_b + 9e-4)))
    assert float(ssim(x, y)) == pytest.approx(np.mean(values), rel=1e-9)


def test_paired_measures_means_and_keeps_order() -> None:
    originals = random_images(5)
    images = originals.clone()
    images[3] = 255 - images[3]
    paired = Paired(Origin("held-out", {}, {}))
    for ids in (torch.tensor([4, 2]), torch.tensor([0, 3, 1])):
        paired.update(Batch(images[ids], ids, references=originals[ids]))
    rows = paired.per_image()
    assert torch.equal(rows["error"], squared_error(images, originals))
    found = paired.compute()
    assert set(found) == {"PSNR", "PSNR, pooled", "SSIM"}
    assert (
        found["PSNR"].value == math.inf and found["PSNR"].interval is None
    )  # four images are exact
    assert found["PSNR, pooled"].value == pytest.approx(float(psnr(rows["error"].mean())))
    assert {measurement.n for measurement in found.values()} == {5}


def test_all_levels_survive_the_way_through_floats() -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert torch.equal(to_uint8(to_float(levels)), levels)


@pytest.mark.skipif(not SQUEEZE.is_dir(), reason="the SqueezeNet trunk is not here")
def test_lpips_known_answers() -> None:
    from PIL import Image

    def read(name: str) -> torch.Tensor:
        return torch.from_numpy(
            np.asarray(Image.open(SQUEEZE / name).convert("RGB")).copy()
        ).permute(2, 0, 1)[None]

    lpips = LPIPS("squeeze", SQUEEZE / "squeeze.backbone.pth")
    assert lpips.name == "LPIPS-squeeze"
    reference = read("ex_ref.png")
    found = [
        float(lpips(read(name), reference)) for name in ("ex_p0.png", "ex_p1.png", "ex_ref.png")
    ]
    assert found == pytest.approx([0.7110, 0.1479, 0], abs=5e-5)


def test_lpips_of_an_unknown_trunk_is_named_by_hash(tmp_path: Path) -> None:
    from torchvision.models import squeezenet1_1

    torch.manual_seed(0)
    path = tmp_path / "trunk.pth"
    torch.save(squeezenet1_1(weights=None).state_dict(), path)
    lpips = LPIPS("squeeze", path)
    assert lpips.name == f"LPIPS-squeeze@{lpips.sha256[:8]}"
    images = random_images(1, 32)
    assert float(lpips(images, images)) == 0
    assert lpips.fits(32) and not lpips.fits(16)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match=r"trunk\.pth"):
        LPIPS("squeeze", path)


@pytest.mark.parametrize("net", ["alex", "vgg", "squeeze"])
def test_lpips_is_the_packages(net: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, on a trunk in torchvision's format; the classifiers, which neither uses, are
    left unset."""
    import lpips as package

    for name in (
        "kaiming_uniform_",
        "kaiming_normal_",
        "xavier_uniform_",
        "normal_",
        "trunc_normal_",
    ):
        monkeypatch.setattr(torch.nn.init, name, lambda tensor, *_, **__: tensor)
    theirs = package.LPIPS(net=net, pretrained=True, pnet_rand=True, verbose=False).eval()
    generator = torch.Generator().manual_seed(0)
    state = {}
    for (
        name,
        parameter,
    ) in theirs.net.named_parameters():  # slice2.3.weight is torchvision's features.3.weight
        spread = (2 / parameter[0].numel()) ** 0.5 if parameter.ndim > 1 else 0.1
        parameter.data = spread * torch.randn(parameter.shape, generator=generator)
        state["features." + name.partition(".")[2]] = parameter.data
    torch.save(state, tmp_path / "trunk.pth")
    ours = LPIPS(net, tmp_path / "trunk.pth")
    x, y = random_images(2, 40, 1), random_images(2, 40, 2)
    with torch.no_grad():
        expected = theirs(to_float(x), to_float(y)).flatten()
    assert torch.equal(ours(x, y).float(), expected) and expected.min() > 0
    assert ours(x, x).tolist() == [0, 0]
    ours.network.train()
    assert torch.equal(
        ours(x, y).float(), expected
    )  # no dropout in the heads, whatever a parent asks


def test_usage_known_answers() -> None:
    even = usage(torch.full((64,), 1000))
    assert even.perplexity == pytest.approx(64)
    assert even.perplexity_corrected == 64  # never above K
    assert even.entropy == pytest.approx(6)
    assert (even.active, even.dead) == (64, [])
    one = usage(torch.tensor([0, 7, 0]))
    assert (one.perplexity, one.perplexity_corrected, one.active, one.dead) == (1, 1, 1, [0, 2])
    with pytest.raises(ValueError, match="empty"):
        usage(torch.zeros(4))


def test_correction_undoes_small_samples() -> None:
    codes = torch.randint(1024, (1024,), generator=torch.Generator().manual_seed(0))
    found = usage(codes.bincount(minlength=1024))
    assert found.perplexity < found.perplexity_corrected < 1024
    assert found.perplexity < 700  # the plug-in estimate of an even code is far below 1024


def test_codebook_levels_and_rate() -> None:
    layout = CodeLayout(grids=((1, 2), (2, 2)), num_codes=(4, 16))
    metric = CodebookUsage(layout, Origin("held-out", {}, {}))
    ids = torch.arange(8)
    codes = torch.cat(
        [(ids[:, None] * 2 + torch.arange(2)) % 4, torch.zeros(8, 4, dtype=torch.int64)], 1
    )
    for part in codes.split(3):
        metric.update(Batch(torch.empty(0), torch.arange(len(part)), codes=part))
    assert [counts.tolist() for counts in metric.histograms()] == [[4] * 4, [32] + [0] * 15]
    found = metric.compute()
    assert found["codebook usage, level 1"].value == 100
    assert found["codebook usage, level 2"].value == pytest.approx(100 / 16)
    assert found["codebook usage, level 2"].details["dead"] == list(range(1, 16))
    assert found["perplexity, level 1"].value == pytest.approx(4)
    assert found["rate, fixed"].value == pytest.approx(2 * 2 + 4 * 4)
    assert found["rate, unigram entropy"].value == pytest.approx(2 * 2)
    with pytest.raises(ValueError, match="outside"):
        metric.update(Batch(torch.empty(0), ids, codes=codes + 3))
