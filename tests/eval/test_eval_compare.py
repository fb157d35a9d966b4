"""`python -m eval.compare`: equal records differ by 0, unlike ones are refused by the field's
name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from tiny import command

from eval.compare import Figures, compare_records
from eval.record import Measurement, Record
from training.errors import UserError

DATA = {"source": "digits", "n": 9, "ids_sha256": "ab" * 32}
PSNR = Measurement(
    "PSNR", 25.0, "dB", True, 9, "held-out", {"data": DATA, "batch_size": 4}, interval=(24.5, 25.5)
)
DISTANCE = Measurement(
    "FD[cnn@aaaaaaaa] to held-out",
    3.0,
    "",
    False,
    9,
    "samples",
    {"data": [DATA, DATA], "extractor": "cnn", "extractor_sha256": "a" * 64},
    interval=(2.0, 4.0),
)


def keep(
    folder: Path, *measurements: Measurement, kind: str = "reconstruction", **environment: object
) -> Path:
    settings = {"tokenizer_sha256": folder.name}
    Record(kind, settings, list(measurements), {}, [], environment).save(folder / "report")
    return folder


def changed(figure: Measurement, value: float | None = None, **settings: object) -> Measurement:
    value = figure.value if value is None else value
    return dataclasses.replace(figure, value=value, settings=figure.settings | settings)


def rows(lines: list[str]) -> dict[str, list[str]]:
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in lines
        if line.startswith("|")
    ]
    return {row[0]: row[1:] for row in cells[2:]}


def compare(first: Path, second: Path, *allowed: str) -> list[str]:
    return compare_records(Figures.read(first), Figures.read(second), allowed)


def test_equal_records_have_zero_differences(tmp_path: Path) -> None:
    endless = dataclasses.replace(PSNR, name="PSNR, pooled", value=float("inf"), interval=None)
    run = keep(tmp_path / "a", PSNR, DISTANCE, endless)
    for other in (run, run / "report", run / "report" / "reconstruction.json"):
        found = rows(compare(run, other))
        assert [row[-2:] for row in found.values()] == [["0", ""]] * 3
        assert list(found) == ["PSNR ↑", "FD[cnn] to held-out ↓", "PSNR, pooled ↑"]


def test_differences_and_who_is_better_where_intervals_lie_apart(tmp_path: Path) -> None:
    first = keep(tmp_path / "a", PSNR, DISTANCE)
    better = dataclasses.replace(PSNR, value=27.0, interval=(26.5, 27.5))
    worse = dataclasses.replace(DISTANCE, value=3.5, interval=(2.5, 4.5))
    extra = dataclasses.replace(PSNR, name="SSIM")
    lines = compare(first, keep(tmp_path / "b", better, worse, extra))
    found = rows(lines)
    assert found["PSNR ↑"] == [
        "25.00 dB",
        "24.50 … 25.50",
        "27.00 dB",
        "26.50 … 27.50",
        "2.000",
        "B",
    ]
    assert found["FD[cnn] to held-out ↓"][-2:] == ["0.5000", ""], (
        "overlapping intervals tell nothing apart"
    )
    assert f"only in {tmp_path / 'b'}: SSIM" in lines
    turned = rows(compare(tmp_path / "b", first))
    assert turned["PSNR ↑"][-2:] == ["-2.000", "A"]


@pytest.mark.parametrize(
    ("other", "field", "values"),
    [
        (changed(PSNR, batch_size=8), "batch_size", "4 and 8"),
        (changed(PSNR, data=DATA | {"ids_sha256": "cd"}), "data.ids_sha256", f"{'ab' * 32} and cd"),
        (dataclasses.replace(PSNR, n=8), "n", "9 and 8"),
        (dataclasses.replace(PSNR, split="train"), "split", "held-out and train"),
        (changed(PSNR, window=11), "window", "nothing and 11"),
        (
            changed(
                dataclasses.replace(DISTANCE, name="FD[cnn@bbbbbbbb] to held-out"),
                extractor_sha256="b" * 64,
            ),
            "extractor_sha256",
            f"{'a' * 64} and {'b' * 64}",
        ),
        (changed(DISTANCE, data=[DATA, DATA | {"n": 7}]), "data.1.n", "9 and 7"),
    ],
)
def test_unlike_settings_are_refused_by_name(other, field, values, tmp_path, capsys) -> None:
    first, second = keep(tmp_path / "a", PSNR, DISTANCE), keep(tmp_path / "b", other)
    assert command("eval.compare", first, second) == 2
    error = capsys.readouterr().err
    assert (
        error.count("\n") == 1
        and f" {field} {values}" in error
        and f"--allow-differences {field}" in error
    )
    assert command("eval.compare", first, second, "--allow-differences", field) == 0
    assert len(rows(capsys.readouterr().out.splitlines())) == 1


def test_whose_they_are_and_where_they_ran_does_not_forbid(tmp_path: Path) -> None:
    first = keep(
        tmp_path / "a",
        dataclasses.replace(PSNR, subject={"seed": 0}),
        packages={"torch": "1"},
        device="cpu",
    )
    other = dataclasses.replace(PSNR, subject={"seed": 1}, details={"more": 2})
    lines = compare(first, keep(tmp_path / "b", other, packages={"torch": "2"}, device="cpu"))
    assert [line for line in lines if line.startswith("note")] == [
        "note: reconstruction was measured with packages.torch 1 and 2"
    ]


def test_a_prefix_allows_all_below_it_and_an_unknown_field_is_told(tmp_path: Path) -> None:
    data = {"source": "cifar10", "n": 5, "ids_sha256": "cd"}
    first, second = keep(tmp_path / "a", PSNR), keep(tmp_path / "b", changed(PSNR, data=data))
    assert compare(first, second, "data")
    with pytest.raises(
        UserError, match=r"--allow-differences batch: is not one of batch_size, data\.ids_sha256"
    ):
        compare(first, second, "batch")


def test_what_is_no_record_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = keep(tmp_path / "a", PSNR)
    (tmp_path / "torn.json").write_text('{"measurements": [')
    (tmp_path / "other.json").write_text(json.dumps({"figures": 3}))
    for wrong, reason in (
        ("torn.json", "damaged"),
        ("other.json", "no record"),
        ("absent", "holds no record"),
    ):
        assert command("eval.compare", run, tmp_path / wrong) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and reason in error and wrong in error
    assert (
        command("eval.compare", run, keep(tmp_path / "c", dataclasses.replace(PSNR, name="SSIM")))
        == 2
    )
    assert "no figure in common" in capsys.readouterr().err
    assert command("eval.compare", run) == 2


def test_the_same_images_in_another_folder_compare(tmp_path: Path) -> None:
    """A data set is named by its folder and known by what it holds."""
    moved, other = ({**DATA, "source": "moved", **more} for more in ({}, {"ids_sha256": "cd" * 32}))
    first = keep(tmp_path / "a", PSNR, DISTANCE)
    lines = compare(
        first,
        keep(tmp_path / "b", changed(PSNR, data=moved), changed(DISTANCE, data=[moved, DATA])),
    )
    assert [row[-2] for row in rows(lines).values()] == ["0", "0"]
    with pytest.raises(UserError, match=r"PSNR has data\.ids_sha256"):
        compare(first, keep(tmp_path / "c", changed(PSNR, data=other)))
    unknown = {
        key: value for key, value in DATA.items() if key != "ids_sha256"
    }  # of an earlier version
    with pytest.raises(UserError, match=r"PSNR has data\.source digits and moved"):
        figures = [
            changed(PSNR, data={**unknown, "source": source}) for source in ("digits", "moved")
        ]
        compare(keep(tmp_path / "d", figures[0]), keep(tmp_path / "e", figures[1]))
