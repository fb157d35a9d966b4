"""eval.run's commands over codes, references and protocols, and who lies nearest to the training
images."""

from __future__ import annotations

import json
import multiprocessing
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_eval_reference import Means
from tiny import command
from toy_pipeline import BlockTokenizer, evaluate, make_pipeline

from eval import run
from eval.extractors.fid_protocols import PROTOCOLS
from eval.extractors.in_domain import InDomain
from eval.metrics.memorisation import find_copying, nearest
from eval.pipeline import share_images
from eval.record import Record
from eval.reference import write_reference
from eval.token_records import read_rate_distortion
from tokenizer.cache import TokenCache
from tokenizer.data.dataset import DataConfig, Images, open_split
from training.errors import UserError


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        yield make_pipeline(tmp_path_factory.mktemp("runs") / "toy", patch)


def figures_of(root: Path, kind: str) -> dict[str, dict]:
    record = json.loads((root / "report" / f"{kind}.json").read_text())
    return {figure["name"]: figure for figure in record["measurements"]}


def test_codebook_counts_the_held_out_codes(root, monkeypatch, capsys):
    evaluate(monkeypatch, "codebook", root)
    assert str(root / "report" / "codebook.json") in capsys.readouterr().out
    codes = np.asarray(TokenCache.open(root / "tokens").split("held_out").codes[:, 0]).astype(
        np.int64
    )
    record = Record.read(root / "report", "codebook")
    assert np.array_equal(record.arrays["histogram_0"], np.bincount(codes.ravel(), minlength=16))
    assert record.arrays["position_entropy_0"].shape == (4, 4)
    figures = figures_of(root, "codebook")
    shares = np.bincount(codes.ravel()) / codes.size
    entropy = -float((shares[shares > 0] * np.log2(shares[shares > 0])).sum())
    assert figures["code entropy"]["value"] == pytest.approx(entropy)
    assert figures["perplexity"]["value"] == pytest.approx(2**entropy) and figures["perplexity"][
        "n"
    ] == len(codes)
    assert figures["information, vertical neighbours"]["value"] > 0
    before = (root / "report" / "codebook.json").stat().st_mtime_ns
    evaluate(monkeypatch, "codebook", root)
    assert (root / "report" / "codebook.json").stat().st_mtime_ns == before
    evaluate(monkeypatch, "codebook", root, "--num", 40)
    assert {figure["split"] for figure in figures_of(root, "codebook").values()} == {
        f"held-out, 40 of {len(codes)}"
    }


def test_rate_and_distortion_on_the_same_images(root, monkeypatch, capsys):
    evaluate(monkeypatch, "rate", root, "--num", 6, "--rate-distortion", 6)
    said = capsys.readouterr().out
    assert (
        "At the bits of each tokenizer" in said
        and (root / "report" / "rate_distortion.png").is_file()
    )
    figures = figures_of(root, "rate")
    assert (
        figures["rate, fixed"]["value"] == 64
        and figures["rate per pixel, fixed"]["value"] == 64 / 256
    )
    table = figures["rate, unigram cross-entropy"]["value"]
    file = figures["rate, file, coded by another split's table"]
    assert table <= 8 * file["details"]["payload_bytes"] / 6 <= 1.02 * table + 64 / 6
    found = read_rate_distortion(Record.read(root / "report", "rate_distortion"))
    (point,) = found.points
    assert found.num_images == 6 and found.size == (16, 16) and set(found.curves) >= {"JPEG"}
    single = figures["rate, file per image, coded by another split's table"]
    assert point.bits == pytest.approx(single["value"] / 256)
    assert point.bare_bits == pytest.approx(8 * single["details"]["payload_bytes"] / 256)
    traded = figures_of(root, "rate_distortion")
    assert (
        traded["rate of a file per image, coded by another split's table, whole files"]["value"]
        == point.bits
    )


def test_a_tokenizers_folder_is_encoded_for_its_codes(root, monkeypatch):
    codes = TokenCache.open(root / "tokens").split("held_out").codes
    monkeypatch.setattr("eval.pipeline.load_tokenizer", lambda folder: BlockTokenizer())
    evaluate(monkeypatch, "codebook", root / "tokenizer")
    histogram = Record.read(root / "tokenizer" / "report", "codebook").arrays["histogram_0"]
    assert np.array_equal(
        histogram, np.bincount(np.asarray(codes[:, 0]).ravel().astype(np.int64), minlength=16)
    )
    evaluate(monkeypatch, "rate", root / "tokenizer", "--num", 20)
    evaluate(monkeypatch, "rate", root, "--num", 20)
    values = [
        {name: figure["value"] for name, figure in figures_of(folder, "rate").items()}
        for folder in (root, root / "tokenizer")
    ]
    assert values[0] == values[1], "the same codes, tables and places"


def test_statistics_of_the_train_split_serve_as_a_reference(root, tmp_path, monkeypatch, capsys):
    out = tmp_path / "train.npz"
    words = ["digits", "--out", out, "--extractor", root / "extractor", "--batch-size", 64]
    evaluate(monkeypatch, "reference-stats", *words)
    assert f"{out}: 1,797 images by digits-cnn@" in capsys.readouterr().out  # all there are
    evaluate(monkeypatch, "reference-stats", *words, "--split", "train")
    assert f"{out}: 1,438 images by digits-cnn@" in capsys.readouterr().out
    monkeypatch.setattr("eval.pipeline.load_tokenizer", lambda folder: BlockTokenizer())
    evaluate(monkeypatch, "generation", root, "--reference", out, "--batch-size", 64)
    found = {
        re.sub(r"\[.*\]", "", name): figure
        for name, figure in figures_of(root, "generation").items()
    }
    to_file, to_train = found["FD to train.npz"], found["FD to train"]
    assert to_file["value"] == pytest.approx(to_train["value"], rel=1e-5)
    assert (
        to_file["settings"]["reference_n"] == 1438
        and len(to_file["settings"]["reference_sha256"]) == 64
    )
    with pytest.raises(UserError, match=r"--reference .*nothing\.npz: no such file"):
        evaluate(monkeypatch, "generation", root, "--reference", tmp_path / "nothing.npz")


def test_protocols_see_the_same_samples(root, monkeypatch, capsys):
    monkeypatch.setattr("eval.pipeline.load_tokenizer", lambda folder: BlockTokenizer())
    evaluate(
        monkeypatch,
        "generation",
        root,
        "--protocol",
        "adm",
        "clean-fid",
        "torch-fidelity",
        "--num",
        100,
    )
    assert "adm: floats are cut to uint8" in capsys.readouterr().out
    figures = figures_of(root, "protocols")
    distances = {
        name.split(" as ")[1]: figure for name, figure in figures.items() if name.startswith("FD[")
    }
    assert set(distances) == {"adm", "clean-fid", "torch-fidelity"}
    values = [figure["value"] for figure in distances.values()]
    assert values == pytest.approx([values[0]] * 3, rel=1e-5), (
        "images of the network's own size are not resized"
    )
    assert all(figure["settings"]["protocol"] == name for name, figure in distances.items())
    assert run.PROTOCOLS == tuple(PROTOCOLS)


def test_a_mistyped_extractor_is_refused_and_none_is_trained(root, tmp_path, capsys):
    typo = root / "extracter"
    for words in (
        ["generation", root, "--extractor", typo],
        ["report", root, "--extractor", typo],
        ["reconstruction", root / "tokenizer", "--extractor", typo],
        ["reference-stats", "digits", "--out", tmp_path / "x.npz", "--extractor", typo],
    ):
        assert command("eval.run", *words) == 2, words
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and f"--extractor {typo}: holds no extractor" in error, words
    assert not typo.exists()
    assert (
        command("eval.sweep", swept(root, tmp_path), "--extractor", typo) == 2 and not typo.exists()
    )
    for words in (["--image-size", 32], []):  # an extractor knows its size, and resizes nothing
        path = tmp_path / "images.npz"
        np.savez(path, arr_0=np.zeros((4, 32, 32, 3), np.uint8))
        made = [
            "reference-stats",
            path,
            "--out",
            tmp_path / "x.npz",
            "--extractor",
            root / "extractor",
            *words,
        ]
        assert command("eval.run", *made) == 2
        assert (
            "16 px" in capsys.readouterr().err.splitlines()[-1]
            and not (tmp_path / "x.npz").exists()
        )
    with pytest.raises(UserError, match="trained on images of 16 px, and these are 32 x 32"):
        InDomain(root / "extractor")(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def swept(root, folder):
    """A sweep's folder with a plan alone."""
    plan = {"pipeline": str(root), "varied": [], "combinations": []}
    (folder / "sweep.json").write_text(json.dumps(plan))
    return folder


def test_mistakes_end_with_2_in_one_line(root, tmp_path, capsys):
    for words in (
        ["nonsense", root],
        ["rate", tmp_path],
        ["codebook", root, "--num", 1],
        ["rate", root, "--rate-distortion", 0],
        ["rate", root, "--prior", tmp_path / "none"],
        ["generation", root, "--protocol", "fid"],
        ["reference-stats", "digits"],
        [
            "reference-stats",
            "digits",
            "--out",
            tmp_path / "x.txt",
            "--extractor",
            root / "extractor",
        ],
        ["likelihood", root],
    ):
        assert command("eval.run", *words) == 2, words
        assert capsys.readouterr().err.count("\n") == 1, words


# Neighbours


def test_nearest_finds_what_a_full_table_of_distances_finds():
    generator = torch.Generator().manual_seed(0)
    points, others = (
        torch.randn(30, 5, generator=generator),
        torch.randn(40, 5, generator=generator),
    )
    table = torch.stack([(others - point).double().square().sum(1).sqrt() for point in points])
    distances, rows = nearest(points, others, 3, table=100)
    assert torch.equal(rows, table.argsort(1)[:, :3])
    torch.testing.assert_close(distances, table.sort(1).values[:, :3], rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="neighbours"):
        nearest(points, others[:2], 3)


def test_copies_and_strangers_and_honest_draws_are_told_apart():
    generator = torch.Generator().manual_seed(0)
    train, held_out, fresh = (torch.randn(n, 4, generator=generator) for n in (500, 200, 200))
    copies = find_copying(train[:100], held_out, train)
    assert copies.nearer == pytest.approx(100) and float(copies.percentiles.max()) == 0
    assert torch.equal(copies.neighbours[:, 0], torch.arange(100))
    strangers = find_copying(fresh + 50, held_out, train)
    assert (
        strangers.nearer == 0
        and strangers.interval is None
        and float(strangers.percentiles.min()) == 100
    )
    honest = find_copying(fresh, held_out, train)
    assert (
        honest.interval[0] < 50 < honest.interval[1]
        and honest.interval[1] - honest.interval[0] < 15
    )
    itself = find_copying(held_out, held_out, train)
    assert itself.nearer == pytest.approx(50), "ties count half"
    wins = (honest.distances[:, :1] < nearest(held_out, train, 1)[0].T).double().mean()
    assert honest.nearer == pytest.approx(100 * float(wins))


def test_figures_say_in_which_precision_the_tokenizer_computed(root, tmp_path, monkeypatch, capsys):
    def figures(*words):
        evaluate(monkeypatch, "reconstruction", root, "--num", "20", *words)
        return figures_of(root, "reconstruction")

    full, low = figures(), figures("--precision", "bf16")
    assert low["PSNR"]["settings"].pop("precision") == "bf16"
    assert low["PSNR"]["settings"] == full["PSNR"]["settings"]
    assert low["PSNR"]["settings_hash"] != full["PSNR"]["settings_hash"]
    assert command("eval.run", "reconstruction", root, "--precision", "fp8") == 2
    assert command("eval.run", "reconstruction", root, "--workers", "-1") == 2
    assert "--workers -1: must be at least 0" in capsys.readouterr().err


@pytest.fixture
def unreadable(tmp_path):
    """A folder of 30 pictures, two of which cannot be read."""
    for index in range(30):
        path = tmp_path / "images" / "train" / "ab"[index % 2] / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 8 * index, np.uint8)).save(path)
    path.write_bytes(b"damaged")
    (tmp_path / "images" / "train" / "a" / "04.png").write_bytes(b"")
    return tmp_path / "images"


def test_processes_read_for_evaluation_what_it_reads_itself(unreadable):
    places, batches, lines = torch.arange(30).flip(0), [], []
    for workers in (0, 2):
        images = open_split(DataConfig(str(unreadable), 8, memory_mib=0, max_bad=0.5), "train")
        with pytest.warns(UserWarning, match="skipped"):
            batches.append(
                list(share_images(images, places[: len(images)] % len(images), 4, "", workers))
            )
            assert sum(len(batch.ids) for batch in batches[-1]) == len(images)
        lines.append(sorted(images.bad))
    for one, other in zip(*batches, strict=True):
        assert torch.equal(one.images, other.images) and torch.equal(one.ids, other.ids)
    assert lines[0] == lines[1] and not multiprocessing.active_children()


def test_statistics_of_a_folder_may_be_read_by_processes(unreadable, tmp_path, monkeypatch):
    found = []
    for path in unreadable.rglob("*.png"):
        if path.stat().st_size < 10:
            path.unlink()
    monkeypatch.setattr(
        Images, "readers", lambda self, asked: asked
    )  # though the pixels are in memory
    for workers in (0, 2):
        write_reference(
            str(unreadable),
            tmp_path / f"{workers}.npz",
            Means(),
            image_size=8,
            num=11,
            workers=workers,
        )
        with np.load(tmp_path / f"{workers}.npz") as stored:
            found.append({name: stored[name].tobytes() for name in stored})
    assert found[0] == found[1]
