"""Stored features: what training from them gives is what training through the frozen encoder
gives."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import save_encoder

from tokenizer import features as features_module
from tokenizer.autoencoder import VQRAEConfig, VQVAEConfig
from tokenizer.data.dataset import DataConfig, open_split
from tokenizer.decoders.vit import ViTDecoderConfig
from tokenizer.encoders.foundation import FoundationConfig, FoundationEncoder
from tokenizer.features import FeaturesConfig, StoredFeatures
from tokenizer.hierarchical import VQVAE2Config
from tokenizer.objective import Objective, ObjectiveConfig
from tokenizer.quantizers.vector import VectorConfig
from tokenizer.run import TokenizerRun
from tokenizer.train import train_tokenizer
from training import distributed
from training.checkpoint import Run, load_weights
from training.config import from_dict, to_dict
from training.errors import UserError
from training.loop import LoopConfig
from training.optim import OptimizerConfig
from training.signals import Interrupted

SIZE, COUNT, VIEWS = 16, 150, 2
SHARD = VIEWS * 16 * 16 * 4 * 64  # bytes of 64 images in float32: three shards in all


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """An encoder (16 px, 4 x 4 features of 16 channels), and a folder of 150 training images."""
    root = tmp_path_factory.mktemp("features")
    (root / "encoder").mkdir()
    save_encoder(root / "encoder", "vit")
    draw_images(root / "images")
    return root


def draw_images(folder, seed=0):
    generator = np.random.default_rng(seed)
    for split, count in (("train", COUNT), ("validation", 8)):
        (folder / split / "all").mkdir(parents=True, exist_ok=True)
        for index in range(count):
            pixels = generator.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / split / "all" / f"{index:03d}.png")


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(features_module, "SHARD_BYTES", SHARD)


def data(root, **changes):
    return DataConfig(
        source=str(root / "images"), image_size=SIZE, **{"augment": "flip_shift", **changes}
    )


def run_config(root, out, /, steps=2, **changes):
    """8 steps of 32 images go into the second epoch. With all that comes after the encoder."""
    model = VQRAEConfig(
        encoder=FoundationConfig(name=str(root / "encoder")),
        quantizer=VectorConfig(num_codes=16, code_dim=8, restart="data"),
        decoder=ViTDecoderConfig(dim=16, depth=1, heads=2),
        denormalise=True,
        noise_tau=0.5,
    )
    config = TokenizerRun(
        name="stage1",
        root=str(out),
        data=data(root),
        model=model,
        calibration_images=64,
        optimizer=OptimizerConfig(lr=2e-3, warmup_steps=2),
        loop=LoopConfig(
            steps=steps, batch_size=32, ema_decay=0.9, log_every=1, save_every=4, preview_every=8
        ),
    )
    return dataclasses.replace(config, **changes)


def stored(root, out, *, encoder=None, source=None, augment="flip_shift", seed=0, **options):
    """(what is stored, the encoder)"""
    options = {"views": VIEWS, "dtype": "float32", **options}
    encoder = encoder or FoundationConfig(name=str(root / "encoder")).build(SIZE)
    images = open_split(source or data(root, augment=augment), "train", augment=True, seed=seed)
    return StoredFeatures(
        images, encoder, FeaturesConfig(**options), augment=augment, seed=seed, root=out
    ), encoder


def files(store):
    return {path.name: path.read_bytes() for path in store.folder.glob("*.npy")}


def figures(folder):
    """{step: {name: value}} of a log, without the clock's."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    steps = {line["step"]: {} for line in lines}
    for line in lines:
        parts = {
            name: value
            for name, value in line.items()
            if name.startswith(("autoencoder.", "held_out."))
        }
        steps[line["step"]] |= parts
    return steps


def keys(epoch, count=COUNT):
    return [(epoch, index) for index in range(count)]


# what is stored


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_features_belong_to_the_images_beside_them(root, tmp_path, dtype):
    store, encoder = stored(root, tmp_path, dtype=dtype)
    store.make(encoder)
    mixed = [(epoch, index) for index in (149, 3, 64, 63) for epoch in (5, 0)]
    for asked in (mixed, keys(0), keys(VIEWS + 1)):
        batch = store.gather(asked)
        with torch.no_grad():
            expected = encoder(batch["images"])
        assert batch["features"].shape == expected.shape and batch["features"].dtype == getattr(
            torch, dtype
        )
        tolerance = 1e-6 if dtype == "float32" else 1e-3
        torch.testing.assert_close(
            batch["features"].float(), expected, atol=tolerance, rtol=tolerance
        )
        for name, value in store.images.gather(
            [(epoch % VIEWS, index) for epoch, index in asked]
        ).items():
            assert torch.equal(batch[name], value), name
    assert not torch.equal(store.gather(keys(0))["features"], store.gather(keys(1))["features"])


def test_processes_that_read_images_change_nothing(root, tmp_path):
    alone, encoder = stored(root, tmp_path / "alone")
    alone.make(encoder)
    for source, readers in (
        (data(root), 0),
        (data(root, memory_mib=0), 2),
    ):  # pixels in memory need none
        store, encoder = stored(root, tmp_path / f"{readers}", source=source)
        met = []
        hook = encoder.register_forward_pre_hook(
            lambda *_, met=met: met.append(len(multiprocessing.active_children()))
        )
        store.make(encoder, workers=2)
        hook.remove()
        assert max(met) == readers and not multiprocessing.active_children()
        assert files(store) == files(alone)


def test_numpy_reads_the_files(root, tmp_path):
    store, encoder = stored(root, tmp_path, dtype="float16")
    store.make(encoder)
    rows = np.concatenate(
        [np.load(path, mmap_mode="r") for path in sorted(store.folder.glob("*.npy"))]
    )
    assert rows.shape == (COUNT, VIEWS, 4, 4, 16) and rows.dtype == "<f2"
    assert rows.nbytes == COUNT * store.bytes_per_image
    batch = store.gather(keys(1))["features"]
    assert np.array_equal(rows[:, 1], batch.movedim(1, -1).numpy())
    assert json.loads((store.folder / "manifest.json").read_text()) == store.plan


# training


def test_training_from_features_is_training_from_images(root, tmp_path, monkeypatch):
    """Through the encoder and from float32 features: equal losses, as long as epochs have views of
    their own."""
    plain = run_config(root, tmp_path / "images", steps=8)
    cached = run_config(
        root, tmp_path / "features", steps=8, features=FeaturesConfig(views=VIEWS, dtype="float32")
    )
    train_tokenizer(plain)
    within = {"loss": False, "ran": 0, "losses": 0}
    loss, forward = Objective.autoencoder_loss, FoundationEncoder.forward

    def watched_loss(self, batch, step):
        within["loss"], within["losses"] = True, within["losses"] + 1
        try:
            return loss(self, batch, step)
        finally:
            within["loss"] = False

    def watched_forward(self, *arguments, **options):
        within["ran"] += within["loss"]
        return forward(self, *arguments, **options)

    monkeypatch.setattr(Objective, "autoencoder_loss", watched_loss)
    monkeypatch.setattr(FoundationEncoder, "forward", watched_forward)
    train_tokenizer(cached)
    assert within == {"loss": False, "ran": 0, "losses": 8}
    ours, theirs = (figures(tmp_path / name / "stage1") for name in ("features", "images"))
    assert ours.keys() == theirs.keys() == set(range(1, 9))
    for step, values in theirs.items():
        assert ours[step] == pytest.approx(values, rel=1e-6, abs=1e-6), step
    ours, theirs = (load_weights(tmp_path / name / "stage1") for name in ("features", "images"))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=1e-4, rtol=1e-4, msg=name)


def test_half_precision_trains_alike(root, tmp_path):
    results = []
    for dtype in ("float16", "float32"):
        config = run_config(
            root, tmp_path, name=dtype, features=FeaturesConfig(views=VIEWS, dtype=dtype)
        )
        loop = dataclasses.replace(config.loop, workers=int(dtype == "float16"))
        train_tokenizer(dataclasses.replace(config, loop=loop))
        results.append(figures(tmp_path / dtype)[1]["autoencoder.mse"])
    assert results[0] == pytest.approx(results[1], rel=1e-2)
    assert len(list((tmp_path / "features").iterdir())) == 2


def test_runs_share_features_and_a_finished_one_makes_none(root, tmp_path, monkeypatch):
    config = run_config(root, tmp_path, features=FeaturesConfig(views=1))
    train_tokenizer(config)
    (folder,) = (tmp_path / "features").iterdir()
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.npy")}
    monkeypatch.setattr(StoredFeatures, "_make", lambda *_: pytest.fail("features were made again"))
    other = dataclasses.replace(config.model, quantizer=VectorConfig(num_codes=8, code_dim=4))
    train_tokenizer(dataclasses.replace(config, name="other", model=other))
    assert before == {path: path.stat().st_mtime_ns for path in folder.glob("*.npy")}
    for path in before:
        path.unlink()
    train_tokenizer(config)
    assert not list(folder.glob("*.npy"))


def test_no_run_of_before_is_changed(root, tmp_path):
    """A run that never heard of features goes on: its config.yaml has no such key."""
    config = run_config(root, tmp_path)
    assert to_dict(config)["features"] is None
    train_tokenizer(config)
    saved = tmp_path / "stage1" / "config.yaml"
    lines = saved.read_text().splitlines(True)
    saved.write_text("".join(line for line in lines if not line.startswith("features:")))
    assert len(saved.read_text().splitlines()) == len(lines) - 1
    Run.open(tmp_path / "stage1", config)


# interruptions


def test_what_is_finished_is_kept(root, tmp_path, monkeypatch):
    whole, encoder = stored(root, tmp_path / "whole")
    whole.make(encoder)
    store, encoder = stored(root, tmp_path / "killed")
    calls, forward = [], encoder.forward

    def dies(images):
        calls.append(len(images))
        if len(calls) == 4:  # in the second view of the second of three shards
            raise Interrupted
        return forward(images)

    monkeypatch.setattr(encoder, "forward", dies)
    with pytest.raises(Interrupted):
        store.make(encoder)
    assert [path.name for path in store.folder.glob("*.npy")] == ["00000.npy"]
    (store.folder / ".00001.npy.7.tmp").write_bytes(b"what a killed process leaves")
    kept = (store.folder / "00000.npy").stat().st_mtime_ns
    calls[:] = [0] * 4
    store.make(encoder)
    assert calls[4:] == [64, 64, 22, 22]
    assert (store.folder / "00000.npy").stat().st_mtime_ns == kept
    assert files(store) == files(whole) and not list(store.folder.glob(".*.tmp"))


def test_preemption_leaves_a_run_that_asks_to_go_on(root, tmp_path, monkeypatch):
    def preempted(*_):
        raise Interrupted(number=signal.SIGTERM)

    config = run_config(root, tmp_path, features=FeaturesConfig(views=1))
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(StoredFeatures, "_make", preempted)
        train_tokenizer(config)
    assert (tmp_path / "stage1" / "requeue").is_file()
    train_tokenizer(config)
    assert not (tmp_path / "stage1" / "requeue").exists()


@pytest.mark.parametrize("damage", ["truncated", "another shape", "a pickle", "empty"])
def test_a_damaged_shard_is_made_again(root, tmp_path, damage):
    store, encoder = stored(root, tmp_path)
    store.make(encoder)
    before, path = files(store), store.folder / "00001.npy"
    if damage == "another shape":
        np.save(path, np.zeros((64, *store.shape[1:]), store.dtype))
    elif damage == "a pickle":
        np.save(path, np.array([{"no": "array"}], dtype=object), allow_pickle=True)
    else:
        path.write_bytes(path.read_bytes()[: -1 if damage == "truncated" else 0])
    if damage != "another shape":
        with pytest.raises(
            UserError, match=r"00001.npy: missing or damaged.*run the same command again"
        ):
            store.gather([(0, 64)])
    store.make(encoder)
    assert files(store) == before


def test_processes_share_the_work(root, tmp_path, monkeypatch):
    alone, encoder = stored(root, tmp_path / "one")
    alone.make(encoder)
    store, encoder = stored(root, tmp_path / "two")
    monkeypatch.setattr(distributed, "world", lambda: 2)
    for rank, names in ((1, ["00001.npy"]), (0, ["00000.npy", "00001.npy", "00002.npy"])):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        store.make(encoder)
        assert sorted(files(store)) == names
    assert files(store) == files(alone)


def test_two_runs_do_not_write_at_once(root, tmp_path):
    store, encoder = stored(root, tmp_path)
    with contextlib.ExitStack() as held:
        store._prepare(held)
        with pytest.raises(UserError, match="another process"):
            store.make(encoder)
    store.make(encoder)


def test_files_of_others_stay(root, tmp_path):
    store, encoder = stored(root, tmp_path)
    store.make(encoder)
    before = files(store)
    for name in (".thesis.tmp", ".thesis.9.tmp", "notes.txt"):
        (store.folder / name).write_text("mine")
    (store.folder / "00001.npy").unlink()
    store.make(encoder)
    assert files(store) == before
    assert all(
        (store.folder / name).read_text() == "mine"
        for name in (".thesis.tmp", ".thesis.9.tmp", "notes.txt")
    )


# what cannot be


def test_features_of_something_else_are_not_taken(root, tmp_path):
    store, encoder = stored(root, tmp_path)
    save_encoder(root, "vit", seed=1)
    others = {
        "encoder": {"encoder": FoundationConfig(name=str(root)).build(SIZE)},
        "its last norm": {
            "encoder": FoundationConfig(name=str(root / "encoder"), final_norm="plain").build(SIZE)
        },
        "augmentation": {"augment": "flip"},
        "seed": {"seed": 1},
        "views": {"views": 3},
        "dtype": {"dtype": "float16"},
    }
    heads, normalised = (FoundationConfig(name=str(root / "encoder")).build(SIZE) for _ in range(2))
    heads.model.config.num_attention_heads = 4
    normalised.preprocessing["image_mean"] = [0.5] * 3
    others |= {"heads": {"encoder": heads}, "preprocessing": {"encoder": normalised}}
    draw_images(tmp_path / "redrawn" / "images", seed=1)
    redrawn = dataclasses.replace(data(root), source=str(tmp_path / "redrawn" / "images"))
    others["images"] = {"source": redrawn}
    hashes = {name: stored(root, tmp_path, **change)[0].hash for name, change in others.items()}
    assert len({store.hash, *hashes.values()}) == 1 + len(others)
    assert stored(root, tmp_path)[0].hash == store.hash
    store.make(encoder)
    manifest = store.folder / "manifest.json"
    manifest.write_text(json.dumps({**store.plan, "dtype": "<f8"}))
    with pytest.raises(UserError, match=r"manifest.json.*remove its folder"):
        store.make(encoder)


def test_a_run_does_not_go_on_with_other_images(root, tmp_path):
    """Of the same names and number, so that nothing but what they hold tells."""
    draw_images(tmp_path / "images")
    config = run_config(root, tmp_path, data=data(tmp_path), features=FeaturesConfig(views=1))
    train_tokenizer(config)
    draw_images(tmp_path / "images", seed=2)
    with pytest.raises(
        UserError, match=r"was made from other images: 158 files changed \(train/all/000\.png\)"
    ):
        train_tokenizer(config)


def test_disk_space_is_checked_before(root, tmp_path, monkeypatch):
    store, encoder = stored(root, tmp_path)
    usage = type("Usage", (), {"free": COUNT * store.bytes_per_image - 1})
    monkeypatch.setattr(features_module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        UserError, match=f"need {COUNT * 2048:,} bytes and {COUNT * 2048 - 1:,} are free"
    ):
        store.make(encoder)
    assert not files(store)
    usage.free += 1
    store.make(encoder)


def test_features_too_large_for_half_precision(root, tmp_path, monkeypatch):
    store, encoder = stored(root, tmp_path, dtype="float16")
    forward = encoder.forward
    monkeypatch.setattr(encoder, "forward", lambda images: forward(images) * 1e5)
    with pytest.raises(UserError, match=r"beyond float16: set features.dtype=float32"):
        store.make(encoder)


REFUSED = {
    "stage 2": ({"model": {"encoder": {"frozen": False}}}, "model.encoder.frozen=false"),
    "a conv encoder": ({"model": {"kind": "vqvae"}}, "vqvae learns its encoder"),
    "VQ-VAE-2": (
        {"model": {"kind": "vqvae2", "encoder": {"kind": "foundation"}}},
        "vqvae2 learns its encoder",
    ),
    "a teacher": (
        {"objective": {"distillation": 0.5}},
        "objective.distillation=0.5 runs a teacher",
    ),
    "equal views": ({"data": {"augment": "none"}}, "all views are equal"),
    "no views": ({"features": {"views": 0}}, "features.views=0"),
    "other numbers": ({"features": {"dtype": "bfloat16"}}, "features.dtype='bfloat16'"),
    "unknown key": ({"features": {"view": 4}}, "view"),
    "no section": ({"features": 4}, "features"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_one_line(case):
    changes, message = REFUSED[case]
    raw = {"data": {"augment": "flip"}, "features": {"views": 2}, **changes}
    with pytest.raises(UserError, match=message) as caught:
        from_dict(TokenizerRun, raw, "run.yaml")
    assert "\n" not in str(caught.value) and str(caught.value).startswith("run.yaml")


def test_a_configuration_says_so_and_a_later_stage_takes_it_back():
    raw = {"data": {"augment": "flip"}, "features": {"views": 3}}
    config = from_dict(TokenizerRun, raw, "run.yaml")
    assert config.features == FeaturesConfig(views=3, dtype="float16")
    assert from_dict(TokenizerRun, to_dict(config), "run.yaml") == config
    assert from_dict(TokenizerRun, {**raw, "features": None}, "run.yaml").features is None


def test_models_whose_encoders_cannot_be_frozen_are_known():
    objective = ObjectiveConfig()
    for model in (VQVAEConfig(), VQVAE2Config()):
        with pytest.raises(ValueError, match="learns its encoder"):
            FeaturesConfig().check(DataConfig(augment="flip"), model, objective)
    FeaturesConfig().check(DataConfig(augment="flip"), VQRAEConfig(), objective)
    codes = dataclasses.replace(objective, distillation=1.0, distillation_target="codes")
    FeaturesConfig().check(DataConfig(augment="flip"), VQRAEConfig(), codes)
