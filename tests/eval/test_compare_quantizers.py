"""Tokenizers' own run folders, `eval.run quantizers` over a folder of them, and the target that
makes one."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval import run as command
from eval.extractors.in_domain import ExtractorRun, train_extractor
from eval.quantizers import find_runs, of_levels
from eval.report.plots import named_points
from eval.report.tables import markdown_table
from tokenizer.data.dataset import DataConfig, open_split
from tokenizer.run import TokenizerRun, load
from tokenizer.train import train_tokenizer
from training.checkpoint import load_weights, weights_path, write_weights
from training.config import from_dict
from training.errors import UserError
from training.loop import LoopConfig

DATA = {"source": "digits", "image_size": 16}
CONV = {
    "encoder": {"kind": "conv", "channels": 16, "stride": 4},
    "decoder": {"kind": "conv", "channels": 16},
}
VECTOR = {"kind": "vector", "num_codes": 16, "code_dim": 8}
MODELS = {
    "plain": {"kind": "vqvae", **CONV, "quantizer": VECTOR},
    "larger": {"kind": "vqvae", **CONV, "quantizer": {**VECTOR, "num_codes": 64}},
    "two-grids": {
        "kind": "vqvae2",
        **CONV,
        "top": VECTOR,
        "bottom": VECTOR,
        "channels": 16,
        "residual_channels": 8,
    },
}
QUICK = ("--batch-size", 50, "--num", 60)


def train(root: Path, name: str, model: dict, **changes: object) -> None:
    loop = {"steps": 4, "batch_size": 8, "log_every": 2, "preview_every": 2, "ema_decay": 0.5}
    raw = {
        "name": name,
        "root": str(root),
        "calibration_images": 64,
        "data": DATA,
        "model": model,
        "loop": loop,
    }
    train_tokenizer(from_dict(TokenizerRun, raw | changes, "test"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    for name, model in MODELS.items():
        train(root, name, model)
    return root


@pytest.fixture
def root(trained: Path, tmp_path: Path) -> Path:
    """A folder of three runs that a test may change."""
    return shutil.copytree(trained, tmp_path / "quantizers")


def evaluate(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["eval.run", *map(str, arguments)])
    command.main()


def table(page: Path) -> list[dict[str, str]]:
    """The rows of the first table of a page, by its heads."""
    lines = [line for line in page.read_text().splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(cells[0], row)) for row in cells[2:]]


def record_times(root: Path) -> dict[str, int]:
    return {
        path.parts[-3]: path.stat().st_mtime_ns
        for path in root.glob("*/report/reconstruction.json")
    }


def test_a_tokenizers_own_folder_is_measured_on_its_own_split(root, monkeypatch, capsys):
    run = root / "plain"
    evaluate(monkeypatch, "reconstruction", run, "--batch-size", 50)
    said = capsys.readouterr().out
    assert "rFD is left out" in said and str(run / "report" / "reconstruction.json") in said
    record = json.loads((run / "report" / "reconstruction.json").read_text())
    figures = {figure["name"]: figure for figure in record["measurements"]}
    held_out = open_split(DataConfig(**DATA), "held_out")
    assert (
        figures["PSNR"]["n"] == len(held_out) and record["settings"]["data"] == held_out.identity()
    )
    model = load(run)
    images = held_out.gather([(0, index) for index in range(len(held_out))])["images"]
    pixels = [
        ((part.clamp(-1, 1) + 1) * 127.5).round()
        for part in (images, model.decode(model.encode(images)))
    ]
    error = (pixels[0] - pixels[1]).square().mean((1, 2, 3))
    assert figures["PSNR"]["value"] == pytest.approx(
        float((10 * (255**2 / error).log10()).mean()), abs=1e-3
    )
    for later in ("generation", "report"):
        with pytest.raises(UserError):
            evaluate(monkeypatch, later, run)
    shutil.rmtree(run / "weights")
    with pytest.raises(UserError, match="there are no weights here"):
        evaluate(monkeypatch, "reconstruction", run)


def test_a_row_for_each_run_with_its_records_figures(root, monkeypatch, capsys):
    evaluate(monkeypatch, "quantizers", root, *QUICK)
    assert f"{root / 'quantizers.md'}: written" in capsys.readouterr().out
    rows = {row["quantizer"]: row for row in table(root / "quantizers.md")}
    assert list(rows) == ["plain", "two-grids", "larger"]  # by bits
    assert [row["bits per image"] for row in rows.values()] == ["64", "80", "96"]
    assert rows["two-grids"]["codes per image"] == "4 + 16" and rows["two-grids"]["K"] == "2 × 16"
    assert rows["larger"]["codes per image"] == "16" and rows["larger"]["K"] == "64"
    content = {
        run["name"]: run for run in json.loads((root / "quantizers.json").read_text())["runs"]
    }
    for name, row in rows.items():
        record = json.loads((root / name / "report" / "reconstruction.json").read_text())
        figures = {figure["name"]: figure["value"] for figure in record["measurements"]}
        assert float(row["PSNR ↑"]) == pytest.approx(figures["PSNR"], abs=5e-3)
        assert float(row["SSIM ↑"]) == pytest.approx(figures["SSIM"], rel=1e-3)
        levels = [f", level {level}" for level in (1, 2)] if name == "two-grids" else [""]
        perplexities = [figures[f"perplexity{level}"] for level in levels]
        assert [level["perplexity"] for level in content[name]["levels"]] == perplexities
        assert content[name]["perplexity"] == pytest.approx(np.mean(perplexities))
        assert float(row["perplexity"]) == pytest.approx(np.mean(perplexities), rel=1e-3)
        assert float(row["usage, %"]) == pytest.approx(
            np.mean([figures[f"codebook usage{level}"] for level in levels]), abs=0.05
        )
        assert row["steps"] == "4" and float(row["s/step"]) > 0
        assert content[name]["images_per_second"] == pytest.approx(
            8 / content[name]["seconds_per_step"]
        )
        assert [step for step, _ in content[name]["held_out_psnr"]] == [2, 4]
    assert not {head for row in rows.values() for head in row if head.startswith(("LPIPS", "rF"))}
    page = (root / "quantizers.md").read_text()
    linked = re.findall(r"\]\((images/.*?)\)", page)
    assert len(linked) == 4 and all((root / path).is_file() for path in linked)
    grid = np.asarray(Image.open(root / "images" / "quantizers-reconstructions.png"))
    shown = np.load(root / "plain" / "report" / "reconstruction.npz")["shown_originals"]
    assert grid.shape[0] == 2 + 4 * (16 * 4 + 2) and len(shown) == 12
    first = grid[2:66, -66:-2][::4, ::4]
    assert np.array_equal(first, shown[11])
    assert "`model.quantizer.num_codes=64`" in page and "loop.steps=4`" not in page


def test_records_are_kept_and_stale_ones_are_measured_again(root, monkeypatch):
    evaluate(monkeypatch, "quantizers", root, *QUICK)
    before, page = record_times(root), (root / "quantizers.md").read_bytes()
    assert set(before) == set(MODELS)
    evaluate(monkeypatch, "quantizers", root, *QUICK)
    assert record_times(root) == before and (root / "quantizers.md").read_bytes() == page
    weights = load_weights(root / "larger")
    weights["quantizer.codebook"] = weights["quantizer.codebook"] * 3
    write_weights(weights_path(root / "larger"), weights, {"step": "4"})
    evaluate(monkeypatch, "quantizers", root, *QUICK)
    after = record_times(root)
    assert {name for name in MODELS if after[name] != before[name]} == {"larger"}


@pytest.mark.parametrize(
    ("field", "changes", "shown"),
    [
        ("seed", {"seed": 3}, "3"),
        ("data.image_size", {"data": {**DATA, "image_size": 8}}, "8"),
        ("data.augment", {"data": {**DATA, "augment": "flip"}}, "flip"),
        ("loop.batch_size", {"loop": {"steps": 4, "batch_size": 4}}, "4"),
        ("loop.steps", {"loop": {"steps": 2, "batch_size": 8}}, "2"),
    ],
)
def test_what_was_not_trained_alike_is_refused_or_shown(field, changes, shown, root, monkeypatch):
    shutil.rmtree(root / "two-grids")
    train(root, "other", MODELS["plain"], **changes)
    with pytest.raises(UserError, match=f"differ in {re.escape(field)} "):
        evaluate(monkeypatch, "quantizers", root, *QUICK)
    assert not record_times(root), "refused before anything is measured"
    evaluate(monkeypatch, "quantizers", root, *QUICK, "--allow-differences", field)
    rows = {row["quantizer"]: row for row in table(root / "quantizers.md")}
    column = "steps" if field == "loop.steps" else field
    assert rows["other"][column] == shown != rows["plain"][column]
    grids = list((root / "images").glob("*reconstructions*"))
    assert len(grids) == (2 if field == "data.image_size" else 1)


def test_another_held_out_split_is_another_condition(root, monkeypatch):
    train(root, "other", MODELS["plain"], data={**DATA, "held_out": 0.4})
    with pytest.raises(UserError, match=r"differ in data\.(source|held_out) "):
        evaluate(monkeypatch, "quantizers", root, *QUICK)
    evaluate(
        monkeypatch,
        "quantizers",
        root,
        *QUICK,
        "--allow-differences",
        "data.source",
        "data.held_out",
    )
    assert len(table(root / "quantizers.md")) == 4


def test_an_extractor_adds_a_column_and_no_row(root, monkeypatch):
    loop = LoopConfig(steps=3, batch_size=32, precision="fp32", ema_decay=0.5)
    extractor = ExtractorRun(name="digits-cnn", data=DataConfig(**DATA), width=8, dim=16, loop=loop)
    train_extractor(extractor, root / "extractor")
    assert {path.name for path in find_runs(root)} == set(MODELS)
    evaluate(monkeypatch, "quantizers", root, *QUICK, "--extractor", root / "extractor")
    rows = table(root / "quantizers.md")
    heads = [head for head in rows[0] if head.startswith("rFD[digits-cnn@")]
    assert (
        len(rows) == 3
        and len(heads) == 1
        and all(float(row[heads[0]].replace(",", "")) > 0 for row in rows)
    )
    assert "> Not FID" in (root / "quantizers.md").read_text()


def test_user_mistakes_are_one_line(root, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no folder in it is a tokenizer's run"):
        evaluate(monkeypatch, "quantizers", tmp_path / "empty")
    with pytest.raises(
        UserError, match=r"--allow-differences steps: is not one of data\.source, .*loop\.steps"
    ):
        evaluate(monkeypatch, "quantizers", root, "--allow-differences", "steps")


def test_counts_of_levels_and_tables():
    assert [of_levels(counts) for counts in ([1024], [256] * 4, [64, 256])] == [
        "1,024",
        "4 × 256",
        "64 + 256",
    ]
    assert markdown_table({"name": ["a", "long"], "x": ["1", "22"]}) == [
        "| name |  x |",
        "| ---- | -: |",
        "| a    |  1 |",
        "| long | 22 |",
    ]


def test_plots_are_the_same_bytes_every_time():
    points = (["a", "b", "c"], [576.0, 576.0, 2048.0], [25.0, 25.01, 27.0])
    points = (*points, "bits per image", "PSNR, dB")
    assert named_points(*points) == named_points(*points)
