"""`python -m eval.doctor`: what is absent is told with its remedy, what is broken ends in exit code
2."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import shutil
import subprocess
from collections import namedtuple
from pathlib import Path

import pytest
from tiny import command
from toy_pipeline import tiny_extractor

from eval import doctor
from eval.extractors.in_domain import train_extractor
from eval.extractors.weights import WEIGHTS


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No weights in torch's cache, none by variables."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    for weights in WEIGHTS.values():
        monkeypatch.delenv(weights.variable, raising=False)
    place = tmp_path / "torch" / "hub" / "checkpoints"
    place.mkdir(parents=True)
    return place


def test_absent_weights_say_file_hash_folder_and_command(nowhere: Path) -> None:
    for name, weights in WEIGHTS.items():
        found = doctor.examine_weights(name)
        assert found.state == doctor.ABSENT
        assert all(each in found.text for each in (weights.file, weights.sha256[0], str(nowhere)))
        assert str(weights.place) in found.text and (
            "curl -Lfo" in found.text or "hf download" in found.text
        )


def test_weights_are_known_by_hash_alone(
    nowhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = tmp_path / "mine.pth"
    given.write_bytes(b"weights")
    own = hashlib.sha256(b"weights").hexdigest()
    found = doctor.examine_weights("inception", given)
    assert found.state == doctor.OK and own in found.text and "not the published file" in found.text
    known = doctor.Finding("lpips-alex", doctor.OK, f"{given}, SHA-256 {own}")
    monkeypatch.setitem(
        WEIGHTS, "lpips-alex", dataclasses.replace(WEIGHTS["lpips-alex"], sha256=(own,))
    )
    assert doctor.examine_weights("lpips-alex", given) == known
    monkeypatch.setenv("TESSERA_LPIPS_ALEX", str(given))
    assert doctor.examine_weights("lpips-alex") == known


def test_damaged_files_and_empty_folders_are_broken(nowhere: Path, tmp_path: Path) -> None:
    WEIGHTS["inception"].place.write_bytes(b"cut short")
    found = doctor.examine_weights("inception")
    assert found.state == doctor.BROKEN and "remove it" in found.text and "curl" in found.text
    (tmp_path / "tower").mkdir()
    assert doctor.examine_weights("dinov2", tmp_path / "tower").state == doctor.BROKEN
    (tmp_path / "tower" / "model.safetensors").write_bytes(b"tower")
    assert doctor.examine_weights("dinov2", tmp_path / "tower").state == doctor.OK
    missing = doctor.examine_weights("clip", tmp_path / "nothing")
    assert missing.state == doctor.BROKEN and "no such file" in missing.text


def test_extractors_are_found_by_name_and_hash(tmp_path: Path) -> None:
    (none,) = doctor.examine_extractors(tmp_path)
    assert none.state == doctor.ABSENT
    train_extractor(tiny_extractor(), tmp_path / "good" / "extractor")
    shutil.copytree(tmp_path / "good", tmp_path / "torn")
    weights = tmp_path / "good" / "extractor" / "weights" / "model.safetensors"
    (tmp_path / "torn" / "extractor" / "weights" / "model.safetensors").write_bytes(b"torn")
    good, torn = doctor.examine_extractors(tmp_path)
    assert (
        good.state == doctor.OK
        and hashlib.sha256(weights.read_bytes()).hexdigest()[:8] in good.text
    )
    assert torn.state == doctor.BROKEN and str(tmp_path / "torn") in torn.text


def test_a_torchvision_that_does_not_import_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess(
        [], 1, "", "Traceback\nRuntimeError: operator torchvision::nms does not exist\n"
    )
    monkeypatch.setattr(subprocess, "run", lambda *words, **options: failed)
    found = doctor.examine_pairing()
    assert found.state == doctor.BROKEN and "torchvision::nms does not exist" in found.text


def test_too_little_space_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 30))
    assert doctor.examine_space(tmp_path / "not" / "yet").state == doctor.BROKEN
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 40))
    assert doctor.examine_space(tmp_path / "not" / "yet").state == doctor.OK


def test_the_command_ends_well_without_weights_and_with_2_when_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    fine = doctor.Finding("torchvision", doctor.OK, "as it should be")
    monkeypatch.setattr(doctor, "examine_pairing", lambda: fine)  # tested above, and slow
    monkeypatch.setattr(doctor, "LEAST_SPACE", 0)
    monkeypatch.setattr(doctor, "examine_packages", lambda: iter([fine]))
    assert command("eval.doctor", "--runs", tmp_path) == 0
    said = capsys.readouterr().out
    assert (
        all(name in said for name in [*WEIGHTS, "gpu", "disk", "python", "torchvision"])
        and "BROKEN" not in said
    )
    assert command("eval.doctor", "--runs", tmp_path, "--clip", tmp_path / "nothing") == 2
    captured = capsys.readouterr()
    assert "BROKEN" in captured.out and captured.err.count("\n") == 1
    broken = doctor.Finding("torchvision", doctor.BROKEN, "does not import")
    monkeypatch.setattr(doctor, "examine_pairing", lambda: broken)
    assert command("eval.doctor", "--runs", tmp_path) == 2
    assert "inception" not in capsys.readouterr().out, "what imports torch is left alone"


def test_packages_are_compared_with_what_the_project_requires(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = ["torch>=2", "pillow<1", "absent-package>=1", 'ruff>=0.14; extra == "dev"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: wanted)
    found = [*doctor.examine_packages()]
    assert [each.state for each in found] == [doctor.BROKEN, doctor.BROKEN, doctor.OK]
    assert (
        "pillow" in found[0].text and "absent-package" in found[1].text and "torch" in found[2].text
    )
    assert not any("ruff" in each.text for each in found)
