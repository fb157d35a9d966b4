"""Extractors' names, records, and the whole of eval.run on a toy pipeline."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import rearrange, reduce, repeat
from torch import Tensor, nn

from eval import run as command
from eval.extractors import Extraction, ExtractorRun, InDomain, banner, figure_name, rotate, train_extractor
from eval.record import Measurement, Record
from eval.report import Stage, write_report
from eval.tables import number, text_table
from tokenizer.data.sources import DataConfig
from tokenizer.interface import CodeLayout
from training.checkpoint import write_weights
from training.command import UserError
from training.config import to_yaml
from training.loop import LoopConfig

DATA = DataConfig(source="digits", image_size=16)


@dataclasses.dataclass(frozen=True)
class NamedExtractor:
    name: str
    sha256: str
    standard: bool
    dim: int = 4
    settings: dict = dataclasses.field(default_factory=dict)

    def __call__(self, images: Tensor) -> Extraction:
        raise NotImplementedError


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
    """A root with tokens of BlockTokenizer, blurred digits as samples, and an extractor of a few steps."""
    from tokenizer import encode
    from tokenizer.data.sources import open_split
    from tokenizer.run import TokenizerRun

    model = BlockTokenizer()
    for module in ("tokenizer.encode.load", "eval.pipeline.load_tokenizer"):
        monkeypatch.setattr(module, lambda folder: model)
    write_weights(root / "tokenizer" / "weights" / "model.safetensors", {"none": torch.zeros(1)}, {})
    (root / "tokenizer" / "config.yaml").write_text(to_yaml(TokenizerRun(data=DATA)))
    encode.encode_data(encode.TokensRun(root=str(root), tokenizer=str(root / "tokenizer")))
    train = open_split(DATA, "train").gather([(0, index) for index in range(120)])
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


def test_only_the_known_network_may_use_the_standard_names() -> None:
    known = NamedExtractor("inception-2015-12-05", "6726825d" + "0" * 56, True)
    assert [figure_name(figure, known) for figure in ("FD", "rFD", "IS")] == ["FID", "rFID", "IS"]
    assert figure_name("precision", known) == "precision[inception-2015-12-05@6726825d]"
    assert banner(known) is None
    other = NamedExtractor("digits-cnn", "a1b2c3d4" + "0" * 56, False)
    assert [figure_name(figure, other) for figure in ("FD", "IS")] == [
        "FD[digits-cnn@a1b2c3d4]",
        "IS[digits-cnn@a1b2c3d4]",
    ]
    assert "digits-cnn@a1b2c3d4" in banner(other)


def test_inception_weights_of_another_hash_are_no_fid(tmp_path: Path) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    from eval.extractors import Inception

    monkey = FeatureExtractorInceptionV3.load_state_dict
    try:  # a network without weights of its own
        FeatureExtractorInceptionV3.load_state_dict = lambda self, state: None
        path = tmp_path / "weights-inception-2015-12-05-6726825d.pth"
        torch.save({"none": torch.zeros(1)}, path)
        inception = Inception(path)
    finally:
        FeatureExtractorInceptionV3.load_state_dict = monkey
    assert not inception.standard
    assert figure_name("FD", inception) == f"FD[inception@{inception.sha256[:8]}]"
    path.write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(UserError, match="not the Inception weights"):
        Inception(path)


def test_rotation_turns_by_right_angles() -> None:
    images = torch.rand(4, 3, 8, 8)
    turned = rotate(images, torch.arange(4))
    for quarter in range(4):
        assert torch.equal(turned[quarter], torch.rot90(images[quarter], quarter, (1, 2)))


def test_an_extractor_knows_its_rows_whatever_the_batch(tmp_path: Path) -> None:
    train_extractor(tiny_extractor("rotation"), tmp_path)
    extractor = InDomain(tmp_path)
    assert extractor.num_classes == 4
    assert extractor.sha256 == hashlib.sha256((tmp_path / "weights/model.safetensors").read_bytes()).hexdigest()
    images = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8)
    whole, parts = extractor(images), [extractor(part) for part in images.split(1)]
    torch.testing.assert_close(whole.features, torch.cat([part.features for part in parts]), rtol=0, atol=1e-4)
    torch.testing.assert_close(whole.probabilities.sum(1), torch.ones(6))


def measurement(**changes: object) -> Measurement:
    fields = {
        "name": "PSNR",
        "value": 25.0,
        "unit": "dB",
        "higher_is_better": True,
        "n": 9,
        "split": "held-out",
    }
    return Measurement(**fields | changes)


def test_settings_hash_depends_on_settings_and_not_on_values() -> None:
    assert measurement().settings_hash == measurement(value=3.0, subject={"a": 1}, details={"b": 2}).settings_hash
    assert measurement(settings={"a": 1, "b": 2}).settings_hash == measurement(settings={"b": 2, "a": 1}).settings_hash
    changed = [measurement(n=8), measurement(split="train"), measurement(settings={"a": 1})]
    assert len({each.settings_hash for each in [measurement(), *changed]}) == 4


def test_records_are_kept_until_their_settings_change(tmp_path: Path) -> None:
    figures = [measurement(value=float("inf")), measurement(name="SSIM", interval=(0.1, 0.2))]
    record = Record("reconstruction", {"tokenizer": "a"}, figures, {"x": np.arange(3)}, ["a note"])
    record.save(tmp_path)
    json.loads((tmp_path / "reconstruction.json").read_text(), parse_constant=pytest.fail)  # strict JSON
    loaded = Record.load(tmp_path, "reconstruction", {"tokenizer": "a"})
    assert loaded.measurements == figures and loaded.notes == record.notes and loaded.hash == record.hash
    assert np.array_equal(loaded.arrays["x"], np.arange(3))
    assert Record.load(tmp_path, "reconstruction", {"tokenizer": "b"}) is None
    (tmp_path / "reconstruction.npz").write_bytes(b"PK torn")
    assert Record.load(tmp_path, "reconstruction", {"tokenizer": "a"}) is None


def test_numbers_for_people() -> None:
    shown = [number(value) for value in (0.0, 1.0, 0.98765, 12345.6, 0.0012345, 1e-9, 1e9, float("inf"))]
    assert shown == ["0", "1.000", "0.9877", "12,346", "0.001234", "1e-09", "1e+09", "∞"]
    assert text_table([measurement()]).splitlines()[1].split() == ["PSNR", "25.00", "dB", "9", "held-out"]


def synthetic_records() -> list[Record]:
    pictures = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    arrays = {f"{which}_{side}": pictures for which in ("shown", "best", "worst") for side in ("originals", "images")}
    arrays |= {"best_psnr": np.arange(6.0), "worst_psnr": np.arange(6.0), "histogram_0": np.arange(32)}
    hostile = "<script>alert(1)</script>"
    settings = {"extractor": hostile, "extractor_sha256": "ab" * 32}
    figures = [measurement(), measurement(name=f"rFD[{hostile}]", settings=settings, interval=(1.0, 2.0))]
    generated = {"samples": pictures, "sample_labels": np.array([0, 0, 1, 1, 1, 2])}
    generated |= {"agreement_right": np.array([2, 1]), "agreement_total": np.array([2, 3])}
    return [
        Record("reconstruction", {"a": 1}, figures, arrays, ["Not FID, not IS: in-domain."], {}),
        Record("generation", {"b": 2}, [measurement(name="class agreement"), figures[1]], generated, [], {}),
    ]


def test_report_is_self_contained_and_a_no_op_when_current(tmp_path: Path) -> None:
    curves = {
        "prior.nats": [(1, 5.0), (2, 0.1)],
        "prior.flat": [(1, 2.0)],
        "a.long": [(i, i) for i in range(999)],
    }
    stages = [Stage("prior", "name: prior\n", curves)]
    names = ["<b>zero</b>", "one"]
    assert write_report(tmp_path, "toy", synthetic_records(), stages, names)
    page = (tmp_path / "report.html").read_text()
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!data:)|https?://|url\(|@import|<script|<b>zero""", page)
    assert page.count("<svg") == 3 and page.count("data:image/png;base64,") == 4
    assert "Not FID, not IS: in-domain." in page
    markdown = (tmp_path / "report.md").read_text()
    linked = re.findall(r"\]\((images/.*?)\)", markdown)
    assert len(linked) == 7 and all((tmp_path / path).is_file() for path in linked)
    content = json.loads((tmp_path / "report.json").read_text())
    assert len(content["figures"]) == 3  # the shared one once
    needed = {"name", "value", "n", "split", "settings", "settings_hash"}
    assert all(needed <= set(figure) for figure in content["figures"])
    assert not write_report(tmp_path, "toy", synthetic_records(), stages, names)
    (tmp_path / "report.html").unlink()
    assert write_report(tmp_path, "toy", synthetic_records(), stages, names)


def test_damaged_log_lines_are_passed_over(tmp_path: Path) -> None:
    lines = [
        '{"step": 1, "a.loss": 2.0, "seconds": 1}',
        '{"step": 2, "a.loss": NaN}',
        '{"step": 1, "held.x": 1}',
        '{"st',
    ]
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    assert Stage.read(tmp_path).curves == {"a.loss": [(1, 2.0)], "held.x": [(1, 1.0)]}


def test_the_command_from_tokens_to_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    root = make_pipeline(tmp_path / "toy", monkeypatch)
    evaluate(monkeypatch, "report", root, "--batch-size", 64)
    said = capsys.readouterr().out
    assert f"{root / 'report' / 'report.html'}: written" in said and "PSNR" in said
    content = json.loads((root / "report" / "report.json").read_text())
    figures = {figure["name"]: figure for figure in content["figures"]}
    assert not {"FID", "rFID", "IS"} & set(figures)
    mark = next(name for name in figures if name.startswith("rFD"))[3:]
    expected = ["PSNR", "SSIM", "codebook usage", "perplexity", "rate, fixed", "class agreement"]
    expected += [f"FD{mark} to held-out", f"FD{mark} to train", f"FD{mark} of real images", f"IS{mark}"]
    expected += [f"{figure}{mark}" for figure in ("precision", "recall", "density", "coverage")]
    assert set(expected) <= set(figures)
    assert figures["PSNR"]["n"] == figures[f"rFD{mark}"]["n"] > 300 and figures["class agreement"]["n"] == 120
    assert figures["rate, fixed"]["value"] == 64
    assert figures[f"FD{mark} of real images"]["value"] < figures[f"FD{mark} to train"]["value"]
    made = (root / "report" / "report.html").read_bytes()
    evaluate(monkeypatch, "report", root, "--batch-size", 64)
    assert "up to date" in capsys.readouterr().out
    assert (root / "report" / "report.html").read_bytes() == made
    record = json.loads((root / "report" / "generation.json").read_text())
    (root / "samples" / "samples.json").write_text(json.dumps({"made_from": {"tokenizer_sha256": "f" * 64}}))
    with pytest.raises(UserError, match="sample again"):
        evaluate(monkeypatch, "generation", root)
    (root / "samples" / "samples.json").unlink()
    np.savez(root / "samples" / "samples.npz", arr_0=np.zeros((50, 16, 16, 3), np.uint8))
    evaluate(monkeypatch, "generation", root, "--batch-size", 64, "--num", 40)
    assert "Class agreement is left out: samples.npz has no labels" in capsys.readouterr().out
    assert json.loads((root / "report" / "generation.json").read_text())["hash"] != record["hash"]


def test_user_mistakes_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="tokens"):
        evaluate(monkeypatch, "report", tmp_path)
    with pytest.raises(UserError, match="--num 0"):
        evaluate(monkeypatch, "report", tmp_path, "--num", 0)


@pytest.mark.parametrize("accuracy", [0.5, 1.0])
def test_a_judge_that_fails_on_real_images_is_called_out(accuracy):
    from types import SimpleNamespace

    from eval.extractors import Extraction
    from eval.generation import Origins, Samples, Seen, _agreement
    from eval.record import Origin

    labels = torch.tensor([0, 1] * 5)
    seen = Extraction(torch.zeros(10, 2), torch.eye(2)[labels if accuracy == 1 else torch.zeros_like(labels)])
    judge = SimpleNamespace(task="classes", name="cnn", num_classes=2, settings={"extractor": "cnn"})
    pipeline = SimpleNamespace(
        in_domain=judge,
        held_out=SimpleNamespace(labels=labels),
        places=lambda split: torch.arange(10),
        tokens=SimpleNamespace(class_names=["a", "b"]),
    )
    samples = Samples(np.zeros((10, 4, 4, 3), np.uint8), labels.numpy(), "", {})
    origins = Origins(*(Origin(name, {}, {}) for name in ("samples", "held-out", "train")))
    found = _agreement(pipeline, Seen(samples=seen, held_out=seen, train=seen, train_moments=None), samples, origins)
    assert found.measurements[0].value == 100 * accuracy
    assert bool(found.notes) == (accuracy < 0.8) and all("50 % of real" in note for note in found.notes)
