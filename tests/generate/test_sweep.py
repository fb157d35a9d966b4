"""Sweeps: every combination once, figures that belong to their samples, and the front of quality
and seconds."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from test_editing import digits_root
from tiny import command

from eval.extractors.in_domain import ExtractorRun, train_extractor
from eval.metrics.frechet import Gaussian, frechet_distance
from eval.metrics.front import pareto
from eval.record import Measurement
from eval.sweep import Combination, _read_lines, table
from generate.sweep import combinations
from priors.interface import SampleOptions
from tokenizer.data.dataset import DataConfig, open_split
from tokenizer.data.transforms import to_uint8
from training.errors import UserError
from training.loop import LoopConfig

WORDS = ["--temperature", "0.9,1", "--steps", "1,2", "--num", 60, "--batch-size", 30]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        root = digits_root(tmp_path_factory.mktemp("root"), patch)
        loop = LoopConfig(steps=3, batch_size=16, precision="fp32", ema_decay=0.5)
        data = DataConfig(source="digits", image_size=16)
        train_extractor(ExtractorRun(width=8, dim=8, data=data, loop=loop), root / "extractor")
        yield root


@pytest.fixture(scope="module")
def swept(root):
    """A whole sweep, with the measuring in a process of its own."""
    assert command("generate.sweep", root, *WORDS) == 0
    return root / "sweep"


def lines(folder):
    return [json.loads(line) for line in (folder / "sweep.jsonl").read_text().splitlines()]


def test_combinations_are_all_and_each_once():
    made = combinations(SampleOptions(top_k=5), {"guidance": (1.0, 2.0), "steps": (4, 8, 16)})
    assert [(each.guidance, each.steps) for each in made[:4]] == [(1, 4), (1, 8), (1, 16), (2, 4)]
    assert len(set(made)) == 6 and {each.top_k for each in made} == {5}
    assert combinations(SampleOptions(), {}) == [SampleOptions()]
    with pytest.raises(UserError, match="temperature is -1"):
        combinations(SampleOptions(), {"temperature": (1.0, -1.0)})


def test_the_front_is_what_nothing_beats():
    points = [(1.0, 9.0), (2.0, 5.0), (2.0, 6.0), (3.0, 5.0), (4.0, 1.0), (0.5, 20.0), (5.0, 2.0)]
    front = pareto(points)
    assert front == [5, 0, 1, 4]
    for index, point in enumerate(points):
        beaten = any(o != point and o[0] <= point[0] and o[1] <= point[1] for o in points)
        assert (index in front) == (not beaten)


def test_a_sweep_gives_table_plot_and_lines(swept):
    plan, made = json.loads((swept / "sweep.json").read_text()), lines(swept)
    assert (
        plan["varied"] == ["temperature", "steps"]
        and [each["folder"] for each in made] == plan["combinations"]
    )
    assert [(each["options"]["temperature"], each["options"]["steps"]) for each in made] == [
        (0.9, 1),
        (0.9, 2),
        (1.0, 1),
        (1.0, 2),
    ]
    rows = (swept / "sweep.md").read_text().splitlines()
    assert (
        rows[0].split("|")[1:3] == [" temperature ", " steps "]
        and len([row for row in rows if row[:1] == "|"]) == 6
    )
    assert "class agreement" in rows[0] and "★" in "".join(rows) and "Not FID" in rows[-1]
    assert (swept / "pareto.png").read_bytes()[:4] == b"\x89PNG"


def test_figures_are_of_their_own_samples(swept, root):
    from eval.extractors.in_domain import InDomain

    extractor = InDomain(root / "extractor")
    held_out = open_split(DataConfig(source="digits", image_size=16), "held_out")
    real = extractor(
        to_uint8(held_out.gather([(0, index) for index in range(len(held_out))])["images"])
    ).features
    for line in lines(swept):
        with np.load(swept / line["folder"] / "samples.npz") as stored:
            images, labels = torch.from_numpy(stored["arr_0"]).permute(0, 3, 1, 2), stored["arr_1"]
        seen = extractor(images)
        distance, agreement = line["measurements"]
        expected = frechet_distance(Gaussian.of_features(seen.features), Gaussian.of_features(real))
        assert distance["value"] == pytest.approx(expected, rel=1e-3) and distance["n"] == 60
        share = (seen.probabilities.argmax(1).numpy() == labels).mean()
        assert (
            agreement["value"] == pytest.approx(100 * share, abs=2)
            and line["seconds_per_image"] > 0
        )


def test_what_is_finished_is_never_made_again(swept, root, monkeypatch, capsys):
    kept, before = lines(swept), (swept / "sweep.jsonl").stat().st_mtime_ns
    made = {path: path.stat().st_mtime_ns for path in swept.glob("*/samples.npz")}
    assert len(made) == 4
    monkeypatch.setattr(
        "generate.sweep.measure", lambda out, *words: command("eval.sweep", out, *words)
    )
    assert command("generate.sweep", root, *WORDS) == 0
    assert capsys.readouterr().out.count("current, 60 samples") == 4
    assert (swept / "sweep.jsonl").stat().st_mtime_ns == before

    (swept / "sweep.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in kept[:3])
    )  # stopped before the last
    assert command("eval.sweep", swept) == 0
    assert lines(swept)[:3] == kept[:3] and lines(swept)[3]["key"] == kept[3]["key"]

    more = ["--temperature", "1", "--steps", "1,2,3", "--num", 60, "--batch-size", 30]
    assert command("generate.sweep", root, *more) == 0
    assert (
        all(path.stat().st_mtime_ns == then for path, then in made.items())
        and len(lines(swept)) == 5
    )
    assert json.loads((swept / "sweep.json").read_text())["varied"] == ["steps"]
    assert (swept / "sweep.md").read_text().count(
        "\n|"
    ) == 4  # those of this sweep only, under a line


def test_unconditional_samples_have_a_distance_alone(root, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "generate.sweep.measure", lambda out, *words: command("eval.sweep", out, *words)
    )
    words = ["--unconditional", "--num", 4, "--out", tmp_path / "sweep"]
    assert command("generate.sweep", root, *words, "--extractor", root / "extractor") == 0
    (line,) = lines(tmp_path / "sweep")
    assert len(line["measurements"]) == 1 and line["measurements"][0]["interval"] is None


def test_table_puts_the_best_first(swept, root):
    figures = [
        [Measurement.from_dict(fields) for fields in line["measurements"]]
        for line in lines(swept)[:2]
    ]
    made = [Combination({"steps": steps}, 1.0, found) for steps, found in zip((1, 2), figures)]
    best = dataclasses.replace(made[0].measurements[0], value=0.0, interval=None)
    made[1] = dataclasses.replace(made[1], measurements=[best, *made[1].measurements[1:]])
    rows = table(made, ["steps"]).splitlines()
    assert rows[2].split("|")[1].strip() == "2" and "★" in rows[2] and "★" not in rows[3]


@pytest.mark.parametrize(
    ("module", "words", "hint"),
    [
        ("generate.sweep", ["--num", 1], "at least 2 samples"),
        ("generate.sweep", ["--guidance", "1,x"], "invalid float value: '1,x'"),
        ("generate.sweep", ["--top-p", "1,2"], "top-p is 2.0"),
        ("eval.sweep", [], "no finished sweep is here"),
    ],
)
def test_errors_are_one_line(module, words, hint, root, capsys):
    assert command(module, root, *words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and hint in error


def test_a_damaged_file_of_lines_is_named(swept, capsys):
    good = (swept / "sweep.jsonl").read_bytes()
    try:
        (swept / "sweep.jsonl").write_bytes(good[1:])
        assert command("eval.sweep", swept) == 2
        assert "sweep.jsonl: damaged: remove it" in capsys.readouterr().err
    finally:
        (swept / "sweep.jsonl").write_bytes(good)


@pytest.mark.parametrize("cut", [1, 20, 10**6])
def test_a_last_line_that_was_cut_short_is_measured_again(tmp_path, capsys, cut):
    figure = Measurement("FD", 1.0, "", False, 9, "samples", {})
    texts = [
        json.dumps({"key": key, "seconds_per_image": 1.0, "measurements": [figure.to_dict()]})
        for key in "ab"
    ]
    path = tmp_path / "sweep.jsonl"
    last = (texts[1] + "\n")[:-cut] or texts[1][:1]
    path.write_text(f"{texts[0]}\n{last}")
    assert (
        list(_read_lines(path)) == ["a"]
        and "its last line was cut short" in capsys.readouterr().out
    )
    path.write_text("\n".join([*texts, ""]))
    assert list(_read_lines(path)) == ["a", "b"] and not capsys.readouterr().out
