"""Extractors' names, records, and the whole of eval.run on a toy pipeline."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import html
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from toy_pipeline import evaluate, make_pipeline, tiny_extractor

from eval.extractors.in_domain import InDomain, rotate, train_extractor
from eval.extractors.interface import Extraction, banner, figure_name
from eval.record import Measurement, Record, share_interval
from eval.report.meaning import meaning, warnings
from eval.report.report import write_report
from eval.report.stages import Stage
from eval.report.tables import number, text_table
from training.errors import UserError


@dataclasses.dataclass(frozen=True)
class NamedExtractor:
    name: str
    sha256: str
    standard: bool
    dim: int = 4
    settings: dict = dataclasses.field(default_factory=dict)

    def __call__(self, images: Tensor) -> Extraction:
        raise NotImplementedError


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

    from eval.extractors.networks import Inception

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
    assert (
        extractor.sha256
        == hashlib.sha256((tmp_path / "weights/model.safetensors").read_bytes()).hexdigest()
    )
    images = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8)
    whole, parts = extractor(images), [extractor(part) for part in images.split(1)]
    torch.testing.assert_close(
        whole.features, torch.cat([part.features for part in parts]), rtol=0, atol=1e-4
    )
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
    assert (
        measurement().settings_hash
        == measurement(value=3.0, subject={"a": 1}, details={"b": 2}).settings_hash
    )
    assert (
        measurement(settings={"a": 1, "b": 2}).settings_hash
        == measurement(settings={"b": 2, "a": 1}).settings_hash
    )
    changed = [measurement(n=8), measurement(split="train"), measurement(settings={"a": 1})]
    assert len({each.settings_hash for each in [measurement(), *changed]}) == 4


def test_records_are_kept_until_their_settings_change(tmp_path: Path) -> None:
    figures = [measurement(value=float("inf")), measurement(name="SSIM", interval=(0.1, 0.2))]
    record = Record("reconstruction", {"tokenizer": "a"}, figures, {"x": np.arange(3)}, ["a note"])
    record.save(tmp_path)
    json.loads(
        (tmp_path / "reconstruction.json").read_text(), parse_constant=pytest.fail
    )  # strict JSON
    loaded = Record.load(tmp_path, "reconstruction", {"tokenizer": "a"})
    assert (
        loaded.measurements == figures
        and loaded.notes == record.notes
        and loaded.hash == record.hash
    )
    assert np.array_equal(loaded.arrays["x"], np.arange(3))
    assert Record.load(tmp_path, "reconstruction", {"tokenizer": "b"}) is None
    (tmp_path / "reconstruction.npz").write_bytes(b"PK torn")
    assert Record.load(tmp_path, "reconstruction", {"tokenizer": "a"}) is None


def test_the_interval_of_a_share_is_wilsons_and_stays_within_all() -> None:
    from scipy.stats import binomtest

    for n in range(1, 300):
        for hits in {0, 1, n // 2, n - 1, n}:
            low, high = share_interval(hits, n)
            assert 0 <= low <= 100 * hits / n <= high <= 100
            theirs = binomtest(hits, n).proportion_ci(method="wilson")
            assert (low / 100, high / 100) == pytest.approx((theirs.low, theirs.high), abs=1e-5)


def test_numbers_for_people() -> None:
    shown = [
        number(value) for value in (0.0, 1.0, 0.98765, 12345.6, 0.0012345, 1e-9, 1e9, float("inf"))
    ]
    assert shown == ["0", "1.000", "0.9877", "12,346", "0.001234", "1e-09", "1e+09", "∞"]
    assert text_table([measurement()]).splitlines()[1].split() == [
        "PSNR",
        "25.00",
        "dB",
        "9",
        "held-out",
    ]


def synthetic_records() -> list[Record]:
    pictures = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    arrays = {
        f"{which}_{side}": pictures
        for which in ("shown", "best", "worst")
        for side in ("originals", "images")
    }
    arrays |= {"best_psnr": np.arange(6.0), "worst_psnr": np.arange(6.0)}
    hostile = "<script>alert(1)</script>"
    settings = {"extractor": hostile, "extractor_sha256": "ab" * 32}
    figures = [
        measurement(),
        measurement(name=f"rFD[{hostile}]", settings=settings, interval=(1.0, 2.0)),
    ]
    generated = {"samples": pictures, "sample_labels": np.array([0, 0, 1, 1, 1, 2])}
    generated |= {"agreement_right": np.array([2, 1]), "agreement_total": np.array([2, 3])}
    generated |= {"nearest_samples": pictures, "nearest_train": np.stack([pictures] * 3)}
    generated |= {"nearest_percentiles": np.arange(6.0), "percentiles": np.arange(50.0)}
    codes = {"histogram_0": np.arange(32), "position_entropy_0": np.arange(6.0).reshape(2, 3)}
    rates = [
        measurement(name=name, value=value, unit=unit, settings={"rate": hostile})
        for name, value, unit in (
            ("rate, fixed", 80.0, "bits/image"),
            ("rate per pixel, fixed", 1.25, "bits/pixel"),
        )
    ]
    return [
        Record("reconstruction", {"a": 1}, figures, arrays, ["Not FID, not IS: in-domain."], {}),
        Record("codebook", {"c": 3}, [figures[0]], codes, [], {}),
        Record("rate", {"d": 4}, rates, {}, [], {}),
        Record(
            "generation",
            {"b": 2},
            [measurement(name="class agreement"), figures[1]],
            generated,
            [],
            {},
        ),
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
    assert not re.search(
        r"""(?:src|href)\s*=\s*["'](?!data:|#)|https?://|url\((?!#)|@import|<script>alert|<b>zero""",
        page,
    )
    assert page.count("<svg") == 5 and page.count('src="data:image/png;base64,') == 5
    assert "Not FID, not IS: in-domain." in page
    markdown = (tmp_path / "report.md").read_text()
    linked = re.findall(r"\]\((images/.*?)\)", markdown)
    assert len(linked) == 10 and all((tmp_path / path).is_file() for path in linked)
    content = json.loads((tmp_path / "report.json").read_text())
    assert len(content["figures"]) == 5  # the shared ones once
    needed = {"name", "value", "n", "split", "settings", "settings_hash"}
    assert all(needed <= set(figure) for figure in content["figures"])
    assert not write_report(tmp_path, "toy", synthetic_records(), stages, names)
    (tmp_path / "report.html").unlink()
    assert write_report(tmp_path, "toy", synthetic_records(), stages, names)


def test_a_page_runs_its_own_script_alone_and_reads_without_it(tmp_path: Path) -> None:
    write_report(tmp_path, "toy", synthetic_records(), [], ["zero", "one"])
    page = (tmp_path / "report.html").read_text()
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = re.search(r'http-equiv="Content-Security-Policy" content="(.*?)"', page)[1]
    assert policy.startswith("default-src 'none'") and f"script-src 'sha256-{digest}'" in policy
    assert all(word in script for word in ("aria-sort", "img[data-pairs]"))
    assert page.count('data-pairs="6"') == 3  # shown, best, worst
    targets = re.findall(r'href="#(.*?)"', page)
    assert targets and all(page.count(f'id="{target}"') == 1 for target in targets)
    static = page.replace(script, "")
    assert "<button" not in static and "<canvas" not in static and "hidden" not in static
    assert all(
        f"<h2>{title}</h2>" in static
        for title in ("Rate", "Codebook", "Nearest training images", "Samples")
    )


def test_plots_in_one_page_share_no_identifier(tmp_path: Path) -> None:
    curves = {"a.loss": [(1, 2.0), (2, 1.0)]}
    stages = [Stage("first", "", curves), Stage("second", "", curves)]
    write_report(tmp_path, "toy", synthetic_records(), stages, ["zero", "one"])
    page = (tmp_path / "report.html").read_text()
    names = re.findall(r' id="([^"]*)"', page)
    assert len(names) == len(set(names)) > 8
    assert set(re.findall(r"url\(#([^)]*)\)", page)) <= set(names)


def test_a_page_says_what_its_codes_are_and_which_commit_measured(tmp_path: Path) -> None:
    records = synthetic_records()
    records[0].environment = {"git_commit": "c0ffee" * 6 + "cafe+", "packages": {"torch": "2.99"}}
    write_report(tmp_path, "toy", records, [], ["zero", "one"])
    for name in ("report.html", "report.md"):
        page = (tmp_path / name).read_text().replace("\\", "")
        assert "An image is 6 codes of 32 (2 × 3): 80.00 bits." in page
        assert "commit c0ffeec0ff+ · torch 2.99" in page


WRONG = [
    ({"rate, prior (exact), bits/image": 250.0}, "more than even guessing"),
    ({"rate, prior (exact), bits/image": 190.0}, "nothing that generalises"),
    ({"codebook usage": 30.0}, "dead"),
    ({"class agreement": 40.0}, "most samples do not show"),
    ({"classifier accuracy on real images": 59.0}, "say little"),
    ({"nearer to train than held-out images[x]": 90.0}, "copies"),
]
HEALTHY = {
    "rate, fixed": 200.0,
    "rate, unigram entropy": 180.0,
    "rate, prior (exact), bits/image": 80.0,
    "codebook usage": 100.0,
    "class agreement": 97.0,
    "classifier accuracy on real images": 99.0,
    "nearer to train than held-out images[x]": 50.0,
}


def test_figures_that_say_that_something_is_wrong_are_called_out(tmp_path: Path) -> None:
    def warned(values: dict[str, float]) -> list[str]:
        return warnings([measurement(name=name, value=value) for name, value in values.items()])

    assert warned(HEALTHY) == [] and warned({}) == []
    for changed, text in WRONG:
        (line,) = warned(HEALTHY | changed)
        assert text in line
    record = Record("codebook", {}, [measurement(name="codebook usage", value=3.0)], {}, [], {})
    write_report(tmp_path, "toy", [record], [], [])
    assert (
        '<div class="warning" role="note">3.000 % of the codes'
        in (tmp_path / "report.html").read_text()
    )
    assert "dead" in (tmp_path / "report.md").read_text()


def test_every_figure_stands_once_with_its_settings(tmp_path: Path) -> None:
    write_report(tmp_path, "toy", synthetic_records(), [], ["zero", "one"])
    page = (tmp_path / "report.html").read_text()
    section = page[page.index('<section id="all-figures">') : page.index('<section id="settings">')]
    rows = re.findall(r"<tr><td(.*?)</tr>", section, re.S)
    content = json.loads((tmp_path / "report.json").read_text())
    assert len(rows) == len(content["figures"])
    for row, figure in zip(rows, content["figures"]):
        assert f"<code>{figure['settings_hash'][:8]}</code>" in row and row.count("<details>") == 1
        assert html.escape(figure["name"]) in row
        folded = json.loads(html.unescape(re.search(r"<pre>(.*?)</pre>", row, re.S)[1]))
        assert folded["settings"] == figure["settings"]
    table = page[page.index('<section id="rate">') : page.index('<section id="samples">')]
    assert "<td>fixed</td>" in table and "80.00" in table and "1.250" in table
    assert "| fixed |" in (tmp_path / "report.md").read_text()


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
    assert all(map(meaning, figures)), "each figure says what it means"
    expected = ["PSNR", "SSIM", "codebook usage", "perplexity", "rate, fixed", "class agreement"]
    expected += [
        f"FD{mark} to held-out",
        f"FD{mark} to train",
        f"FD{mark} of real images",
        f"IS{mark}",
    ]
    expected += [f"{figure}{mark}" for figure in ("precision", "recall", "density", "coverage")]
    expected += [f"FD∞{mark} to train", f"KD{mark} to held-out", f"KD{mark} of real images"]
    expected += [f"nearer to train than held-out images{mark}", "code entropy per position"]
    assert set(expected) <= set(figures)
    assert (
        figures["PSNR"]["n"] == figures[f"rFD{mark}"]["n"] > 300
        and figures["class agreement"]["n"] == 120
    )
    assert figures["rate, fixed"]["value"] == 64
    assert figures[f"FD{mark} of real images"]["value"] < figures[f"FD{mark} to train"]["value"]
    made = (root / "report" / "report.html").read_bytes()
    evaluate(monkeypatch, "report", root, "--batch-size", 64)
    assert "up to date" in capsys.readouterr().out
    assert (root / "report" / "report.html").read_bytes() == made
    record = json.loads((root / "report" / "generation.json").read_text())
    (root / "samples" / "samples.json").write_text(
        json.dumps({"made_from": {"tokenizer_sha256": "f" * 64}})
    )
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

    from eval.extractors.interface import Extraction
    from eval.generation import Origins, Samples, Seen, _agreement
    from eval.record import Origin

    labels = torch.tensor([0, 1] * 5)
    seen = Extraction(
        torch.zeros(10, 2), torch.eye(2)[labels if accuracy == 1 else torch.zeros_like(labels)]
    )
    judge = SimpleNamespace(
        task="classes", name="cnn", num_classes=2, settings={"extractor": "cnn"}
    )
    pipeline = SimpleNamespace(
        in_domain=judge,
        held_out=SimpleNamespace(labels=labels),
        places=lambda split: torch.arange(10),
        tokens=SimpleNamespace(class_names=["a", "b"]),
    )
    samples = Samples(np.zeros((10, 4, 4, 3), np.uint8), labels.numpy(), "", {})
    origins = Origins(*(Origin(name, {}, {}) for name in ("samples", "held-out", "train")))
    found = _agreement(
        pipeline,
        Seen(samples=seen, held_out=seen, train=seen, train_moments=None, train_features=None),
        samples,
        origins,
    )
    assert found.measurements[0].value == 100 * accuracy
    assert bool(found.notes) == (accuracy < 0.8) and all(
        "50 % of real" in note for note in found.notes
    )


def test_pages_do_not_replace_what_no_command_wrote(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for name in ("thesis.tex", "images/holiday.png"):
        (tmp_path / name).write_text("mine")
    write_report(tmp_path, "toy", synthetic_records(), [], ["zero", "one"])
    write_report(tmp_path, "another title", synthetic_records(), [], ["zero", "one"])
    assert all(
        (tmp_path / name).read_text() == "mine" for name in ("thesis.tex", "images/holiday.png")
    )
    for name in ("report.md", "images/samples.png"):
        folder = tmp_path / name.partition(".")[0]
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("mine")
        with pytest.raises(UserError, match=f"{name}: no command here wrote it.*move it away"):
            write_report(folder, "toy", synthetic_records(), [], ["zero", "one"])
        assert [
            path.read_text()
            for path in folder.rglob("*.*")
            if path.is_file() and path.name != ".lock"
        ] == ["mine"]
    (tmp_path / ".lock").unlink()  # of a report of before there were lists
    assert write_report(tmp_path, "a third", synthetic_records(), [], ["zero", "one"])
