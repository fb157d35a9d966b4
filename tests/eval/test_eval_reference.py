"""Reference statistics: written and read back, ADM's files, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from eval import reference
from eval.extractors.interface import Extraction
from eval.metrics.frechet import Gaussian, frechet_distance
from eval.metrics.moments import Moments
from eval.reference import npz_batches, read_reference, write_reference
from training import distributed
from training.errors import UserError


@dataclasses.dataclass
class Means:
    """Features: the mean of each quarter of each channel, 12 of them."""

    name: str = "means"
    sha256: str = "a" * 64
    standard: bool = False
    dim: int = 12
    input_size: int = 8

    @property
    def settings(self) -> dict:
        return {"extractor": self.name, "extractor_sha256": self.sha256}

    def __call__(self, images: torch.Tensor) -> Extraction:
        features = torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1)
        return Extraction(features, features.softmax(1))


STANDARD = Means("inception-2015-12-05", "6" * 64, True)


def pixels(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 8, 8, 3), dtype=np.uint8)


def features(images: np.ndarray) -> torch.Tensor:
    return Means()(torch.from_numpy(images).permute(0, 3, 1, 2)).features


def save(path: Path, **arrays: object) -> Path:
    np.savez(path, **arrays)
    return path


def test_statistics_come_back_as_they_were(tmp_path: Path) -> None:
    images = pixels(57)
    source = save(
        tmp_path / "samples.npz", arr_0=images, arr_1=np.arange(57)
    )  # as generate.sample writes
    found = write_reference(str(source), tmp_path / "stats.npz", Means(), batch_size=10)
    direct = Moments.of(features(images))
    torch.testing.assert_close(found.gaussian.mean, direct.mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.gaussian.covariance, direct.covariance, rtol=1e-12, atol=0)
    assert torch.equal(found.features, features(images))
    assert found.settings["reference_n"] == 57 and len(found.settings["reference_sha256"]) == 64
    again = write_reference(str(source), tmp_path / "again.npz", Means(), batch_size=10)
    assert again.settings["reference_sha256"] == found.settings["reference_sha256"]  # to the byte
    with np.load(tmp_path / "stats.npz", allow_pickle=False) as stored:  # what other tools look for
        assert stored["mu"].shape == (12,) and stored["sigma"].shape == (12, 12)


def test_rows_are_kept_evenly_and_not_beyond_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "KEPT_ROWS", 20)
    images = pixels(57)
    source = save(tmp_path / "samples.npz", arr_0=images)
    found = write_reference(str(source), tmp_path / "stats.npz", Means(), batch_size=10)
    assert torch.equal(found.features, features(images[::3]))
    assert found.settings["reference_n"] == 57
    few = write_reference(str(source), tmp_path / "few.npz", Means(), num=15, batch_size=10)
    assert few.settings["reference_n"] == 15


def test_a_source_is_measured_at_the_size_that_was_asked(tmp_path: Path) -> None:
    found = write_reference(
        "digits", tmp_path / "digits.npz", Means(), split="held_out", image_size=8, num=40
    )
    assert found.settings["reference_n"] == 40 and found.features.shape == (40, 12)
    with pytest.raises(UserError, match="--image-size"):
        write_reference("digits", tmp_path / "digits.npz", Means())
    with pytest.raises(UserError, match=r"\.npz"):
        write_reference("digits", tmp_path / "digits.pt", Means())


def test_adms_files(tmp_path: Path) -> None:
    """Statistics of the whole set for the distance, images of a part of it for manifolds."""
    whole, part = pixels(90, 1), pixels(20, 2)
    moments = Moments.of(features(whole))
    statistics = {"mu": moments.mean.numpy(), "sigma": moments.covariance.numpy()}
    path = save(tmp_path / "adm.npz", arr_0=part, **statistics, mu_s=np.zeros(3), sigma_s=np.eye(3))
    found = read_reference(path, STANDARD)
    expected = Gaussian.of_moments(moments)
    assert frechet_distance(found.gaussian, expected) == pytest.approx(0, abs=1e-12)
    assert torch.equal(found.features, features(part)) and found.settings["reference_n"] is None
    other = read_reference(path, Means())  # not its statistics: its images are measured
    assert other.settings["reference_n"] == 20
    torch.testing.assert_close(other.gaussian.mean, features(part).double().mean(0))
    bare = save(tmp_path / "bare.npz", **statistics)
    assert read_reference(bare, STANDARD).features is None
    with pytest.raises(UserError, match=r"inception-2015-12-05.*means@aaaaaaaa"):
        read_reference(bare, Means())


def test_statistics_of_another_extractor_are_refused(tmp_path: Path) -> None:
    source = save(tmp_path / "samples.npz", arr_0=pixels(20))
    write_reference(str(source), tmp_path / "stats.npz", Means())
    with pytest.raises(UserError, match="statistics by means"):
        read_reference(tmp_path / "stats.npz", Means(sha256="b" * 64))


def test_images_of_another_size_are_refused_and_not_measured(tmp_path: Path) -> None:
    """The same digits at 8 and at 16 px are far apart, whatever a network resizes them to."""
    small, large = (tmp_path / f"{size}.npz" for size in (8, 16))
    for path, size in ((small, 8), (large, 16)):
        write_reference("digits", path, Means(), image_size=size, num=40)
    bare = save(tmp_path / "images.npz", arr_0=np.zeros((4, 16, 16, 3), np.uint8))
    adm = save(
        tmp_path / "adm.npz",
        arr_0=np.zeros((4, 16, 16, 3), np.uint8),
        mu=np.zeros(12),
        sigma=np.eye(12),
    )
    unknown = save(tmp_path / "unknown.npz", mu=np.zeros(12), sigma=np.eye(12))
    assert read_reference(small, Means(), image_size=8).settings["reference_size"] == 8
    assert read_reference(unknown, STANDARD, image_size=8).settings["reference_size"] is None
    for path, extractor in ((large, Means()), (bare, Means()), (adm, STANDARD), (adm, Means())):
        with pytest.raises(
            UserError, match=rf"{path.name}: .* are of 16 px, and 8 px are needed.*--image-size"
        ):
            read_reference(path, extractor, image_size=8)
    with pytest.raises(UserError, match="16 px, and 8 px are needed"):
        write_reference(str(bare), tmp_path / "out.npz", Means(), image_size=8)
    assert not (tmp_path / "out.npz").exists()


def test_an_about_that_is_not_ours_is_refused_in_a_line(tmp_path: Path) -> None:
    good = {"mu": np.zeros(12), "sigma": np.eye(12)}
    for about in (
        "[]",
        "3",
        "{}",
        '{"extractor": 3, "data": {}}',
        '{"extractor": {"extractor": "a"}, "data": []}',
    ):
        path = save(tmp_path / "about.npz", **good, about=np.array(about))
        with pytest.raises(UserError, match=r"about\.npz"):
            read_reference(path, Means())


def test_what_is_no_reference_is_refused_in_a_line(tmp_path: Path) -> None:
    good = {"mu": np.zeros(12), "sigma": np.eye(12)}
    cut = save(tmp_path / "cut.npz", arr_0=pixels(30))
    cut.write_bytes(cut.read_bytes()[:-900])
    (tmp_path / "text.npz").write_text("no archive")
    bad = [
        tmp_path / "absent.npz",
        tmp_path / "text.npz",
        cut,
        save(tmp_path / "object.npz", mu=np.array([{}], dtype=object), sigma=np.eye(12)),
        save(tmp_path / "none.npz", other=np.zeros(3)),
        save(tmp_path / "size.npz", mu=np.zeros(5), sigma=np.eye(5)),
        save(tmp_path / "nan.npz", **good | {"mu": np.full(12, np.nan)}),
        save(tmp_path / "skew.npz", **good | {"sigma": np.triu(np.ones((12, 12)))}),
        save(tmp_path / "floats.npz", arr_0=pixels(9).astype(np.float32)),
        save(tmp_path / "order.npz", arr_0=pixels(9).transpose(0, 3, 1, 2)),
        save(tmp_path / "empty.npz", arr_0=pixels(9)[:0]),
    ]
    for path in bad:
        with pytest.raises(UserError, match=path.name) as raised:
            read_reference(path, STANDARD)
        assert "\n" not in str(raised.value)


def test_ranks_share_the_images_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = pixels(25)
    path = save(tmp_path / "samples.npz", arr_0=images)
    monkeypatch.setattr(distributed, "world", lambda: 2)
    seen = []
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        seen += list(npz_batches(path, 4, 25))
    ids = torch.cat([batch.ids for batch in seen])
    assert ids.sort().values.tolist() == list(range(25))
    for batch in seen:
        assert np.array_equal(batch.images.permute(0, 2, 3, 1).numpy(), images[batch.ids.numpy()])
