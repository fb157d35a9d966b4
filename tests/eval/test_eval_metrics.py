"""Standard networks, kernel distances, two ranks, and what a distance must notice."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from eval.extractors.in_domain import Classifier
from eval.extractors.interface import Extraction, FeatureRows, figure_name
from eval.extractors.networks import Inception, Tower, find_inception
from eval.extractors.weights import WEIGHTS
from eval.interface import Batch
from eval.metrics.cmmd import cmmd
from eval.metrics.frechet import Gaussian, frechet_distance
from eval.metrics.image_similarity import Paired
from eval.metrics.inception_score import inception_score
from eval.metrics.kid import kernel_distance, polynomial_mmd
from eval.metrics.moments import Moments
from eval.metrics.precision_recall import manifold
from eval.record import Origin
from tokenizer.data.transforms import to_float
from training import distributed
from training.errors import UserError


def normal(n: int, dim: int, seed: int) -> torch.Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_images(n: int, size: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(
        0, 256, (n, 3, size, size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )


# Kernel distances


def test_kid_is_torch_fidelitys() -> None:
    from torch_fidelity.metric_kid import kid_features_to_metric

    a, b = normal(90, 32, 0), normal(70, 32, 1) + 0.2
    ours = kernel_distance(a, b, subsets=7, subset_size=40)
    theirs = kid_features_to_metric(
        a, b, kid_subsets=7, kid_subset_size=40, rng_seed=2020, verbose=False
    )
    assert ours.mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-6)
    assert ours.deviation == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-6)
    with pytest.raises(ValueError, match="70"):
        kernel_distance(a, b, subset_size=71)


def test_kid_is_unbiased() -> None:
    """At 10 rows a biased estimate would be far above 0 throughout."""
    found = torch.stack(
        [polynomial_mmd(normal(10, 4, 2 * i), normal(10, 4, 2 * i + 1)) for i in range(400)]
    )
    assert abs(float(found.mean())) < 3 * float(found.std()) / 400**0.5
    assert float(found.min()) < 0


def test_cmmd_by_the_definition() -> None:
    x, y = (F.normalize(normal(n, 6, n), dim=1) for n in (9, 7))

    def kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.exp(-(a[:, None] - b[None]).square().sum(2) / 200).mean()

    expected = 1000 * float(kernel(x, x) + kernel(y, y) - 2 * kernel(x, y))
    assert cmmd(x, y, chunk=4) == pytest.approx(expected, rel=1e-9)
    assert cmmd(x, x) == pytest.approx(0, abs=1e-12)
    point, other = torch.tensor([[1.0, 0]]), torch.tensor([[-1.0, 0]])
    assert cmmd(point, other) == pytest.approx(2000 * (1 - np.exp(-4 / 200)), rel=1e-12)


# The standard networks


def save_inception(path: Path, seed: int = 0) -> Path:
    """Random weights in torch-fidelity's format, scaled so that features neither vanish nor blow
    up."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    torch.manual_seed(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        torch.save({}, path)
        network = FeatureExtractorInceptionV3("random", ["2048"], str(path))
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> Inception:
    return Inception(save_inception(tmp_path_factory.mktemp("weights") / "random.pth"))


def test_inception_sees_what_torch_fidelitys_does(inception: Inception) -> None:
    images = random_images(2, 32)
    features, logits = inception.network(images)
    found = inception(images)
    assert torch.equal(found.features, features) and found.features.shape == (2, inception.dim)
    torch.testing.assert_close(found.probabilities, logits.softmax(1))
    assert not inception.standard and figure_name("KD", inception).startswith("KD[inception@")


@pytest.mark.slow
def test_all_figures_are_torch_fidelitys(inception: Inception, tmp_path: Path) -> None:
    """Images to figures, through their calculate_metrics and through ours."""
    from torch_fidelity import calculate_metrics
    from torch_fidelity.metric_kid import kid_features_to_metric

    class Pictures(torch.utils.data.Dataset):
        def __init__(self, images: torch.Tensor) -> None:
            self.images = images

        def __len__(self) -> int:
            return len(self.images)

        def __getitem__(self, place: int) -> torch.Tensor:
            return self.images[place]

    made = random_images(24, 32, 1) // 2 + 40
    real = F.interpolate(random_images(30, 8, 2).float(), size=32, mode="bilinear").byte()
    path = save_inception(tmp_path / "random.pth")
    theirs = calculate_metrics(
        input1=Pictures(made),
        input2=Pictures(real),
        cuda=False,
        cache=False,
        verbose=False,
        batch_size=6,
        isc=True,
        fid=True,
        kid=True,
        prc=True,
        kid_subset_size=20,
        kid_subsets=10,
        isc_splits=3,
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(path),
    )
    ours, other = inception(made), inception(real)
    distance = frechet_distance(*(Gaussian.of_features(side.features) for side in (ours, other)))
    assert distance == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)
    score = inception_score(ours.probabilities, 3)
    assert score.mean == pytest.approx(theirs["inception_score_mean"], rel=1e-6)
    kernel = kernel_distance(ours.features, other.features, 10, 20)
    assert kernel.mean == pytest.approx(
        theirs["kernel_inception_distance_mean"], rel=1e-4
    )  # theirs is in float32
    exact = kid_features_to_metric(
        ours.features.double(),
        other.features.double(),
        kid_subsets=10,
        kid_subset_size=20,
        verbose=False,
    )
    assert kernel.mean == pytest.approx(exact["kernel_inception_distance_mean"], rel=1e-6)
    share = manifold(ours.features, other.features)
    assert (np.float32(share.precision), np.float32(share.recall)) == (
        theirs["precision"],
        theirs["recall"],
    )


def save_tower(kind: str, folder: Path) -> Path:
    import transformers

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 14}
    if kind == "dinov2":
        transformers.Dinov2Model(
            transformers.Dinov2Config(image_size=70, mlp_ratio=2, **shape)
        ).save_pretrained(folder)
    else:
        vision = {**shape, "image_size": 42, "intermediate_size": 32, "projection_dim": 8}
        text = {**shape, "intermediate_size": 16, "vocab_size": 8, "projection_dim": 8}
        config = transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=8)
        transformers.CLIPModel(config).save_pretrained(folder)  # as published: text beside vision
    return folder


@pytest.mark.parametrize("kind", ["dinov2", "clip"])
def test_towers_follow_their_conventions(kind: str, tmp_path: Path) -> None:
    tower = Tower(kind, save_tower(kind, tmp_path / kind))
    size, dim = {"dinov2": (224, 16), "clip": (42, 8)}[kind]
    images = random_images(3, 50)
    found = tower(images)
    assert found.features.shape == (3, dim) == (3, tower.dim) and found.probabilities.shape == (
        3,
        0,
    )
    picture = Image.fromarray(images[1].permute(1, 2, 0).numpy()).resize(
        (size, size), Image.Resampling.BICUBIC
    )
    pixels = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None].float() / 255
    mean, std = (values.view(3, 1, 1) for values in (tower.mean, tower.std))
    with torch.no_grad():
        outputs = tower.network((pixels - mean) / std)
    if kind == "clip":
        expected = outputs.image_embeds / outputs.image_embeds.norm()
        torch.testing.assert_close(found.features.norm(dim=1), torch.ones(3))
    else:
        expected = outputs.last_hidden_state[:, 0]
        assert tower.network.embeddings.position_embeddings.shape[1] == 1 + 16 * 16
    torch.testing.assert_close(found.features[1:2], expected, rtol=1e-4, atol=1e-5)
    assert not tower.standard and figure_name("FD", tower) == f"FD[{kind}@{tower.sha256[:8]}]"


def test_a_tower_of_another_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "absent", tmp_path / "empty", save_tower("clip", tmp_path / "clip")):
        with pytest.raises(UserError, match="hf download facebook/dinov2-large") as raised:
            Tower("dinov2", folder)
        assert "\n" not in str(raised.value)


def test_missing_weights_say_all_that_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = WEIGHTS["inception"]
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv(weights.variable, raising=False)
    assert find_inception(None) is None
    with pytest.raises(UserError) as raised:
        find_inception(tmp_path / "absent.pth")
    said = str(raised.value)
    for part in (
        weights.file,
        weights.sha256[0],
        str(tmp_path / "hub" / "checkpoints"),
        "curl -Lfo",
        "absent.pth",
    ):
        assert part in said
    weights.place.parent.mkdir(parents=True)
    weights.place.write_bytes(b"cached")
    assert find_inception(None) == weights.place
    named, given = tmp_path / "named.pth", tmp_path / "given.pth"
    named.write_bytes(b"named"), given.write_bytes(b"given")
    monkeypatch.setenv(weights.variable, str(named))
    assert find_inception(None) == named and find_inception(given) == given
    named.unlink()
    with pytest.raises(UserError, match=weights.variable):
        find_inception(None)


def test_every_published_file_is_recognised_by_its_hash_only() -> None:
    for weights in WEIGHTS.values():
        assert all(weights.knows(known.ljust(64, "0")) for known in weights.sha256)
        assert not weights.knows("0" * 64)
        assert weights.file in weights.missing() and str(weights.place) in weights.missing()


# Ranks


class Rows:
    """An extractor that takes the first pixels for features."""

    name, sha256, standard, dim, input_size, settings = "rows", "0" * 64, False, 6, 16, {}

    def __call__(self, images: torch.Tensor) -> Extraction:
        features = images.flatten(1)[:, :6].float() / 255
        return Extraction(features, features.softmax(1))


def measure(share: slice, batch_size: int) -> dict[str, float]:
    """Figures of every kind over 60 images of which this process sees a share."""
    images, references = random_images(60, 16, 1), random_images(60, 16, 2)
    ids = torch.arange(60)[share]
    rows, paired, moments = FeatureRows(Rows()), Paired(Origin("all", {}, {})), Moments.empty(6)
    for part in ids.split(batch_size):
        batch = Batch(images[part], part, references=references[part])
        rows.update(batch), paired.update(batch)
        moments.update(Rows()(batch.images).features)
    reduced, seen = moments.reduced(), rows.gathered()
    target = Gaussian.of_features(Rows()(references).features)
    figures = {name: measurement.value for name, measurement in paired.compute().items()}
    figures["FD"] = frechet_distance(Gaussian.of_moments(reduced), target)
    figures["FD of rows"] = frechet_distance(Gaussian.of_features(seen.features), target)
    figures["IS"] = inception_score(seen.probabilities, 3).mean
    figures["KD"] = kernel_distance(seen.features, Rows()(references).features, 5, 30).mean
    figures["covariance"] = float(reduced.covariance.norm())
    return figures | {"n": reduced.count}


def test_two_ranks_measure_what_one_does(tmp_path: Path) -> None:
    """Uneven shares and batches; forked processes, joined as torchrun joins them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    children = []
    for rank, (share, batch_size) in enumerate([(slice(1, 60, 3), 7), (None, 5)]):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.environ |= {
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": port,
                    "WORLD_SIZE": "2",
                    "RANK": str(rank),
                }
                distributed.start()
                mine = share or torch.tensor([place for place in range(60) if place % 3 != 1])
                (tmp_path / f"{rank}.json").write_text(json.dumps(measure(mine, batch_size)))
                distributed.finish()
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert first == pytest.approx(measure(slice(None), 60), rel=1e-12)


# What a distance must notice


@pytest.fixture(scope="module")
def world():
    """(draw, features): images of eight made classes, and a classifier's view of them."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.rand(8, 3, 4, 4, generator=generator)

    def draw(n: int, classes: int = 8) -> torch.Tensor:
        coarse = patterns[torch.arange(n) % classes] + 0.1 * torch.randn(
            n, 3, 4, 4, generator=generator
        )
        images = F.interpolate(coarse, size=16, mode="bicubic") + 0.02 * torch.randn(
            n, 3, 16, 16, generator=generator
        )
        return (255 * images).clamp(0, 255).byte()

    torch.manual_seed(0)
    classifier = Classifier(width=8, dim=16, num_classes=8)
    optimizer = torch.optim.Adam(classifier.parameters(), lr=3e-3)
    for _ in range(60):
        loss = F.cross_entropy(classifier(to_float(draw(64))), torch.arange(64) % 8)
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    assert loss.item() < 0.5

    @torch.no_grad()
    def features(images: torch.Tensor) -> torch.Tensor:
        return classifier.features(to_float(images))

    return draw, features


def test_a_distance_rises_with_every_harm(world) -> None:
    draw, features = world
    reference = Gaussian.of_features(features(draw(2000)))
    clean = draw(400)

    def distance(images: torch.Tensor) -> float:
        return frechet_distance(Gaussian.of_features(features(images)), reference)

    def noisy(levels: float) -> torch.Tensor:
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
        return (clean + levels * noise).clamp(0, 255).byte()

    def blurred(times: int) -> torch.Tensor:
        images = clean.float()
        for _ in range(times):
            images = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        return images.byte()

    harms = {
        "noise": [noisy(20), noisy(60)],
        "blur": [blurred(2), blurred(8)],
        "dropped classes": [draw(400, 6), draw(400, 3)],
        "duplicates": [clean[:40].repeat(10, 1, 1, 1), clean[:8].repeat(50, 1, 1, 1)],
    }
    base = distance(clean)
    for harm, (some, more) in harms.items():
        assert base < distance(some) < distance(more), harm
        assert distance(more) > 3 * base, harm
