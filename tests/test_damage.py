"""Bits that flip in what is kept and in what is given: measured again, or one line; never other
figures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_eval_reference import Means, pixels, save
from test_tar_shards import shards

from eval.extractors.in_domain import ExtractorRun, open_extractor, train_extractor
from eval.record import Measurement, Record
from eval.reference import read_reference, write_reference
from eval.report.stages import Stage
from tokenizer.data import tar_index
from tokenizer.data.dataset import DataConfig, open_split
from training.arrays import DamagedFile, read_arrays
from training.checkpoint import weights_path
from training.errors import UserError
from training.loop import LoopConfig

FLIPS = 120


def flips(data: bytes) -> list[bytes]:
    """Copies with one bit that is not as it was, all through; and cut ones."""
    places = np.linspace(0, len(data) - 1, FLIPS).astype(int).tolist()
    changed = [
        data[:at] + bytes([data[at] ^ (1 << number % 8)]) + data[at + 1 :]
        for number, at in enumerate(places)
    ]
    return [*changed, b"", data[:-1], data[: len(data) // 2], b"\x00" * len(data), data[::-1]]


def a_record() -> Record:
    noise = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    figures = [
        Measurement(
            "PSNR", 23.5, "dB", True, 10, "held-out", {"mean": "over images"}, interval=(23.0, 24.0)
        )
    ]
    arrays = {"shown": noise, "flat": np.zeros(5000), "ramp": np.arange(3000)}
    return Record("reconstruction", {"tokenizer": "a"}, figures, arrays, ["a note"])


@pytest.mark.parametrize("suffix", ["npz", "json"])
def test_a_damaged_record_is_said_and_measured_again(tmp_path, capsys, suffix):
    whole = a_record()
    whole.save(tmp_path)
    path = tmp_path / f"reconstruction.{suffix}"
    refused = 0
    for data in flips(path.read_bytes()):
        path.write_bytes(data)
        found = Record.load(tmp_path, "reconstruction", whole.settings)
        said = capsys.readouterr().out
        if found is None:
            refused += 1
            assert said.count("\n") <= 1 and (
                not said or ("warning" in said and str(tmp_path) in said)
            )
        else:  # a bit that tells nothing, as of the time in an archive
            assert found.to_dict() == whole.to_dict() and found.arrays.keys() == whole.arrays.keys()
            assert all(
                np.array_equal(found.arrays[name], whole.arrays[name]) for name in whole.arrays
            )
    assert refused > FLIPS // 2
    whole.save(tmp_path)
    assert Record.load(tmp_path, "reconstruction", whole.settings) is not None
    path.unlink()
    assert (
        Record.load(tmp_path, "reconstruction", whole.settings) is None
        and not capsys.readouterr().out
    )


def test_a_record_of_before_checksums_is_used(tmp_path: Path) -> None:
    whole = a_record()
    whole.save(tmp_path)
    fields = json.loads((tmp_path / "reconstruction.json").read_text())
    del fields["sha256"]
    (tmp_path / "reconstruction.json").write_text(json.dumps(fields))
    assert Record.load(tmp_path, "reconstruction", whole.settings).to_dict() == whole.to_dict()


@pytest.mark.parametrize("kind", ["statistics", "compressed images"])
def test_a_damaged_reference_is_one_line(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "reference.npz"
    if kind == "statistics":
        write_reference(str(save(tmp_path / "samples.npz", arr_0=pixels(30))), path, Means())
    else:
        np.savez_compressed(path, arr_0=pixels(30) // 64)
    whole = read_reference(path, Means(), 7)
    refused = 0
    for data in flips(path.read_bytes()):
        path.write_bytes(data)
        try:
            found = read_reference(path, Means(), 7)
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
        else:
            assert torch.equal(found.gaussian.mean, whole.gaussian.mean) and torch.equal(
                found.features, whole.features
            )
            assert torch.equal(found.gaussian.covariance, whole.gaussian.covariance)
    assert refused > FLIPS // 2


@pytest.mark.parametrize(
    "wrong",
    [
        {"about": np.array("[]")},
        {"about": np.array('{"extractor": 3}')},
        {"about": np.array("{")},
        {"n": np.array("x")},
        {"n": np.array([1, 2])},
        {"features": np.zeros((3, 5))},
        {"features": np.full((3, 12), np.nan)},
        {"mu": np.array(["a"] * 12)},
    ],
)
def test_a_reference_that_lies_is_one_line(tmp_path: Path, wrong: dict) -> None:
    write_reference(
        str(save(tmp_path / "samples.npz", arr_0=pixels(30))), tmp_path / "stats.npz", Means()
    )
    with np.load(tmp_path / "stats.npz") as stored:
        arrays = {name: stored[name] for name in stored.files}
    save(tmp_path / "stats.npz", **arrays | wrong)
    with pytest.raises(UserError, match=r"stats\.npz"):
        read_reference(tmp_path / "stats.npz", Means())


def test_a_reference_that_is_damaged_further_on_is_one_line(tmp_path: Path) -> None:
    path = save(tmp_path / "images.npz", arr_0=pixels(500))
    data = bytearray(path.read_bytes())
    data[-20_000] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(UserError, match=r"images\.npz: damaged"):
        read_reference(path, Means(), 50)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "objects.npz", a=np.array([{"no": "array"}], dtype=object))
    with pytest.raises(DamagedFile):
        read_arrays(tmp_path / "objects.npz")
    with pytest.raises(FileNotFoundError):
        read_arrays(tmp_path / "absent.npz")


def test_a_damaged_index_of_a_tar_is_read_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (shard,) = sorted(shards(tmp_path / "shards", counts=(5,)).iterdir())
    whole, kept = tar_index.index_of(shard), tar_index.kept_at(shard)
    for data in flips(kept.read_bytes()):
        kept.write_bytes(data)
        assert all(map(np.array_equal, tar_index.index_of(shard), whole))


def test_damaged_weights_of_an_extractor_are_written_again(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    data = DataConfig(source="digits", image_size=8)
    config = ExtractorRun(
        data=data, width=8, dim=8, loop=LoopConfig(steps=2, batch_size=8, preview_every=9)
    )
    folder, images = tmp_path / "extractor", open_split(data, "train")
    train_extractor(config, folder)
    weights = weights_path(folder)
    whole, before = weights.read_bytes(), open_extractor(folder, data, images)
    for place in (len(whole) // 2, 3):
        weights.write_bytes(whole[:place] + bytes([whole[place] ^ 64]) + whole[place + 1 :])
        capsys.readouterr()
        again = open_extractor(folder, data, images)
        assert again.sha256 == before.sha256 and weights.read_bytes() == whole
        assert "warning: " in (said := capsys.readouterr().out) and "model.safetensors" in said
    weights.unlink()
    assert open_extractor(folder, data, images).sha256 == before.sha256


def test_a_stage_with_damaged_text_is_shown(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(b"name: \xff\n")
    (tmp_path / "log.jsonl").write_bytes(b'{"step": 1, "a.mse": 0.5}\n{"step": 2, "a.mse": \xff}\n')
    assert Stage.read(tmp_path).curves == {"a.mse": [(1, 0.5)]}
