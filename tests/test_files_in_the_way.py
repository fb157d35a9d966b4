"""Files of users where records, sweeps and statistics are written; and numbers beyond all sense, in
one line."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from test_damage import a_record

from eval.pipeline import Options
from eval.record import Record
from eval.reference import write_reference
from eval.report.stages import read_log
from eval.run import rate
from generate.classes import parse_classes
from generate.drawing import Request, drawn
from generate.edit import Edit
from generate.images import FILES
from generate.sample import MOST, check_counts
from generate.shards import PLAN, UNFINISHED
from generate.sweep import SWEEP, claim
from priors.interface import SampleOptions
from training.atomic import replace_file
from training.errors import UserError


@pytest.mark.parametrize("suffix", [".json", ".npz"])
@pytest.mark.parametrize("text", [b"electricity", b'{"kwh": 3}'])
def test_no_record_takes_the_place_of_a_file_of_others(suffix, text, tmp_path):
    record = a_record()
    file = tmp_path / f"{record.kind}{suffix}"
    file.write_bytes(text)
    for use in (
        lambda: Record.load(tmp_path, record.kind, record.settings),
        lambda: record.save(tmp_path),
    ):
        with pytest.raises(UserError, match="no command here wrote it"):
            use()
    assert file.read_bytes() == text and not [
        path for path in tmp_path.iterdir() if "tmp" in path.name
    ]


def test_records_of_before_lists_are_replaced_and_listed_ones_whatever_they_hold(tmp_path):
    record = a_record()
    record.save(tmp_path)
    (tmp_path / ".lock").unlink()
    record.save(tmp_path)
    for suffix in (".json", ".npz"):
        (tmp_path / f"{record.kind}{suffix}").write_bytes(b"damaged")
    assert Record.load(tmp_path, record.kind, record.settings) is None
    record.save(tmp_path)
    assert Record.load(tmp_path, record.kind, record.settings).measurements == record.measurements


def test_a_plot_of_someone_else_is_refused_before_anything_is_measured(tmp_path, monkeypatch):
    class Found:
        report_folder = tmp_path

    monkeypatch.setattr("eval.pipeline.Pipeline", lambda options: Found())
    for name in ("measure_rate", "measure_rate_distortion"):
        monkeypatch.setattr(f"eval.token_records.{name}", lambda pipeline: pytest.fail("measured"))
    (tmp_path / "rate_distortion.png").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"rate_distortion\.png: no command here wrote it"):
        rate(Options(tmp_path, rate_distortion=6))
    assert (tmp_path / "rate_distortion.png").read_bytes() == b"mine"


@pytest.mark.parametrize("name", ["sweep.json", "sweep.jsonl", "sweep.md", "pareto.png"])
def test_no_sweep_takes_the_place_of_a_file_of_others(name, tmp_path):
    (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=f"{name}: no command here wrote it"):
        claim(tmp_path)
    assert (tmp_path / name).read_text() == "{}"


def test_a_sweep_of_before_lists_goes_on(tmp_path):
    (tmp_path / "sweep.json").write_text(
        json.dumps({"pipeline": "..", "varied": [], "combinations": ["a"]})
    )
    (tmp_path / "sweep.md").write_text("table")
    (tmp_path / "photo.jpg").write_text("photo")
    claim(tmp_path)
    claim(tmp_path)
    assert SWEEP.made(tmp_path) and (tmp_path / "photo.jpg").read_text() == "photo"


@pytest.mark.parametrize(
    "arrays", [None, {"arr_0": np.zeros((3, 16, 16, 3), np.uint8)}, {"mu": 0, "sigma": 0}]
)
def test_statistics_take_the_place_of_statistics_of_ours_alone(arrays, tmp_path):
    out = tmp_path / "images.npz"
    out.write_bytes(b"mine") if arrays is None else np.savez(out, **arrays)
    before = out.read_bytes()
    with pytest.raises(UserError, match="is no file of statistics that was made here"):
        write_reference(str(out), out, None)
    assert out.read_bytes() == before


def test_a_folder_in_the_way_of_a_file_is_one_line(tmp_path):
    (tmp_path / "report.html").mkdir()
    with pytest.raises(UserError, match="a folder is in the way of a file"):
        replace_file(tmp_path / "report.html", b"")


@dataclasses.dataclass
class Broken:
    """Draws nothing, as a prior that is asked for a sampler it has not."""

    request: Request

    def draw(self, numbers, batch_size):
        raise UserError("sampler is 'x'")
        yield


def test_settings_that_cannot_be_drawn_leave_the_unfinished_samples_of_others(tmp_path):
    shards = tmp_path / UNFINISHED
    shards.mkdir()
    (shards / PLAN).write_text('{"seed": 0}')
    (shards / "000000000-000000050.npz").write_bytes(b"an hour's work")
    request = Request(4, (0,), SampleOptions(sampler="x"))
    with (
        pytest.raises(UserError, match="sampler is"),
        drawn(Broken(request), tmp_path, FILES, {"seed": 1}, 2, []),
    ):
        pass
    assert (shards / "000000000-000000050.npz").read_bytes() == b"an hour's work"
    assert json.loads((shards / PLAN).read_text()) == {"seed": 0}


def test_numbers_beyond_all_sense_are_one_line():
    digits = "9" * 5000
    for text in (digits, f"@{digits}", f"0-{digits}", f"@0-{digits}"):
        with pytest.raises(UserError):
            parse_classes(text, ["cat", "dog"])
    for value in (0, MOST + 1, 10**30):
        with pytest.raises(UserError, match="--num"):
            check_counts(type("Arguments", (), {"num": value}), "num")
    with pytest.raises(UserError, match="dilate"):
        Edit(torch.ones(2, 2, dtype=torch.bool), dilate=10**12)


LINES = [
    "[" * 100_000,
    '{"step": ' + "9" * 5000 + "}",
    '{"step": 1e400}',
    '{"step": 2, "loss": ' + "9" * 400 + "}",
]


@pytest.mark.parametrize("line", LINES)
def test_a_line_of_a_log_that_no_number_holds_is_passed_over(line, tmp_path):
    (tmp_path / "log.jsonl").write_text(
        f'{{"step": 1, "loss": 2}}\n{line}\n{{"step": 3, "loss": 4}}\n'
    )
    assert read_log(tmp_path)["loss"] == [(1, 2.0), (3, 4.0)]
