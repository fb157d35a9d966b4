"""rFID and its like under a protocol: its cut, its uint8, its resize, and no mixing with others."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from test_eval_protocols import Patches
from test_published_imports import tiny_taming

from eval.compare import Figures, compare_records
from eval.pipeline import Options, Pipeline
from eval.reconstruction import measure_reconstruction
from eval.run import main
from tokenizer.data.transforms import decode
from tokenizer.published.imports import import_tokenizer
from tokenizer.run import load
from training.errors import UserError

SIZE = 24  # pixels: what Patches sees, so that no resize stands between


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tokenizer for pictures of several shapes, and the pictures."""
    folder = tmp_path_factory.mktemp("protocol")
    generator, pictures = np.random.default_rng(0), []
    for split, count in (("train", 2), ("validation", 9)):
        (folder / "images" / split / "a").mkdir(parents=True)
        for number in range(count):
            height, width = generator.integers(SIZE, 4 * SIZE, 2)
            coarse = generator.integers(0, 256, (3, 4, 3), dtype=np.uint8)
            picture = Image.fromarray(coarse).resize((int(width), int(height)), Image.BICUBIC)
            picture.save(folder / "images" / split / "a" / f"{number}.png")
            if split == "validation":
                pictures.append(picture)
    save_file(tiny_taming(), folder / "model.safetensors")
    data = {"source": str(folder / "images"), "image_size": SIZE}
    import_tokenizer(folder / "model.safetensors", folder / "runs" / "tiny", data)
    return folder / "runs" / "tiny", pictures


class Seen(Patches):
    @property
    def settings(self):
        return {"extractor": "patches", "resize": "none"}


def measured(folder, monkeypatch, protocol=None):
    monkeypatch.setattr(Pipeline, "extractors", [Seen()])
    return measure_reconstruction(Pipeline(Options(folder)), protocol)


def value(record, begin):
    (found,) = [
        figure
        for figure in record.measurements
        if figure.name in (begin, f"{begin}[patches@00000000]")
    ]
    return found


def adm_crop(picture, size):
    """guided-diffusion's center_crop_arr, restated over arrays."""
    while min(picture.size) >= 2 * size:
        picture = picture.resize(tuple(side // 2 for side in picture.size), Image.BOX)
    scale = size / min(picture.size)
    picture = picture.resize(tuple(round(side * scale) for side in picture.size), Image.BICUBIC)
    pixels = np.asarray(picture)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


def frechet(first, second):
    """By the definition, of (n, D) rows."""
    rows = [each.double().numpy() for each in (first, second)]
    means, covariances = [each.mean(0) for each in rows], [np.cov(each.T) for each in rows]
    product = np.linalg.eigvals(covariances[0] @ covariances[1])
    root = np.sqrt(product.real.clip(0)).sum()
    return ((means[0] - means[1]) ** 2).sum() + sum(map(np.trace, covariances)) - 2 * root


def test_adms_figures_are_of_its_cut_and_its_uint8(run, monkeypatch):
    folder, pictures = run
    record = measured(folder, monkeypatch, "adm")
    originals = torch.from_numpy(np.stack([adm_crop(each, SIZE) for each in pictures]))
    originals = originals.permute(0, 3, 1, 2)
    model = load(folder)
    inputs = originals.float() / 127.5 - 1
    images = model.decode(model.encode(inputs), model.layout_of(SIZE, SIZE))
    cut = ((images + 1) * 127.5).clamp(0, 255).to(torch.uint8)
    errors = (cut.double() - originals.double()).square().mean((1, 2, 3))
    expected = float((10 * (255**2 / errors).log10()).mean())
    assert value(record, "PSNR").value == pytest.approx(expected, abs=1e-3)
    sides = [Patches().see(side).features for side in (cut, originals)]
    assert value(record, "rFD").value == pytest.approx(frechet(*sides), rel=1e-3)
    told = value(record, "rFD").settings
    assert told["protocol"] == "adm" and told["data"]["crop"] == "adm"
    assert any(note.startswith("As adm: floats are cut") for note in record.notes)


def test_every_cut_is_a_square_of_the_size(run):
    import io

    for picture in run[1]:
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        pixels = decode(buffer.getvalue(), SIZE, 10**6, "adm")
        assert np.array_equal(pixels, adm_crop(picture, SIZE).transpose(2, 0, 1))
        assert decode(buffer.getvalue(), SIZE, 10**6).shape == (3, SIZE, SIZE)


def test_protocols_are_kept_apart_and_not_compared(run, monkeypatch):
    folder, _ = run
    plain, adm = measured(folder, monkeypatch), measured(folder, monkeypatch, "adm")
    llamagen = measured(folder, monkeypatch, "llamagen")
    values = {value(record, "PSNR").value for record in (plain, adm, llamagen)}
    assert len(values) == 3, "cut and rounding both show"
    files = {
        name: Figures.read(folder / "report" / f"reconstruction{name}.json")
        for name in ("", "-adm", "-llamagen")
    }
    for first, second in (("", "-adm"), ("-adm", "-llamagen"), ("", "-llamagen")):
        with pytest.raises(UserError, match=r"do not compare.*protocol"):
            compare_records(files[first], files[second])
    assert compare_records(files["-adm"], files["-adm"])


def test_the_command_names_the_protocol_and_remembers_the_images(run, monkeypatch, capsys):
    folder, _ = run
    monkeypatch.chdir(folder.parents[1])
    words = ["eval.run", "reconstruction", "published:tiny", "--num", "50000", "--protocol", "adm"]
    monkeypatch.setattr("sys.argv", words)
    main()
    assert "runs/tiny/report/reconstruction-adm.json" in capsys.readouterr().out
    kept = json.loads((folder / "report" / "reconstruction-adm.json").read_text())
    assert all(figure["settings"]["protocol"] == "adm" for figure in kept["measurements"])
    monkeypatch.setattr("sys.argv", [*words[:2], "published:maskgit-vqgan", *words[3:]])
    with pytest.raises(UserError, match=r"of which images\? name them with --data"):
        main()
