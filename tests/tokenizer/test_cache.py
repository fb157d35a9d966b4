"""The token cache: a round trip through files, and no codes of another tokenizer or of damaged
files."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import re
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from PIL import Image

import tokenizer
from tokenizer import encode
from tokenizer.autoencoder import VQVAEConfig
from tokenizer.batch_encoder import BatchEncoder
from tokenizer.cache import FORMAT, Shards, TokenCache, code_dtype, shard_file
from tokenizer.data import dataset, loader
from tokenizer.data.dataset import DataConfig, open_split
from tokenizer.decoders.conv import ConvDecoderConfig
from tokenizer.encode import TokensRun, encode_data
from tokenizer.encoders.conv import ConvEncoderConfig
from tokenizer.interface import CodeLayout
from tokenizer.npy_file import NpyFile
from tokenizer.quantizers.vector import VectorConfig
from tokenizer.run import TokenizerRun
from training.checkpoint import sha256, write_weights
from training.config import to_yaml
from training.errors import UserError

SIDE, SHARD = 8, 7


def save_tokenizer(folder, source, seed=0, num_codes=16, **data):
    """The run folder of a tiny tokenizer as training leaves it, without the training."""
    model = VQVAEConfig(
        encoder=ConvEncoderConfig(channels=8, residual_blocks=1, residual_channels=4),
        quantizer=VectorConfig(num_codes=num_codes, code_dim=2, init="normal"),
        decoder=ConvDecoderConfig(channels=8, residual_blocks=1, residual_channels=4),
    )
    config = TokenizerRun(data=DataConfig(str(source), SIDE, augment="shift", **data), model=model)
    torch.manual_seed(seed)
    autoencoder = model.build(SIDE)
    with torch.no_grad():  # codes where features are
        latents = (
            autoencoder(torch.rand(64, 3, SIDE, SIDE) * 2 - 1).latents.movedim(1, -1).flatten(0, 2)
        )
    autoencoder.quantizer.codebook.copy_(
        latents.mean(0) + latents.std(0) * torch.randn(num_codes, 2)
    )
    (folder / "weights").mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(to_yaml(config))
    write_weights(folder / "weights" / "model.safetensors", autoencoder.state_dict(), {})


def save_images(folder):
    """Two classes of twelve pictures each: 20 to train, 4 held out."""
    generator = np.random.default_rng(0)
    for name in ("cats", "dogs"):
        (folder / name).mkdir(parents=True)
        for index in range(12):
            pixels = generator.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "IMAGES_PER_SHARD", SHARD)
    save_images(tmp_path / "images")
    save_tokenizer(tmp_path / "tokenizer", tmp_path / "images")
    return tmp_path


def run(root, **options):
    return TokensRun(**{"root": str(root), "tokenizer": str(root / "tokenizer"), **options})


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# what a cache holds


def test_round_trip(root):
    cache = encode_data(run(root))
    trained = tokenizer.load(root / "tokenizer")
    for name in ("train", "held_out"):
        images = open_split(DataConfig(source=str(root / "images"), image_size=SIDE), name)
        batch = images.gather([(0, index) for index in range(len(images))])
        split = cache.split(name)
        assert split.codes.shape == (len(images), 1, 4) and split.codes.dtype == np.uint16
        codes = torch.from_numpy(np.asarray(split.codes[:, 0]).astype(np.int64))
        assert torch.equal(codes, trained.encode(batch["images"]))
        trained.decode(codes)
        assert split.labels.tolist() == images.labels.tolist() and split.labels.dtype == np.int64
        assert split.ids.tolist() == images.ids.tolist()
    assert cache.layout == trained.layout == CodeLayout(((2, 2),), (16,))
    assert cache.class_names == ["cats", "dogs"] and cache.num_classes == 2
    assert cache.tokenizer_folder == (root / "tokenizer").resolve()
    cache.check_tokenizer()
    cache.verify()


def test_features_that_are_not_finite_are_no_codes(root):
    """They would be written as 65535."""
    trained = tokenizer.load(root / "tokenizer")
    state = trained.state_dict()
    next(value for name, value in state.items() if name.startswith("encoder"))[:] = torch.nan
    write_weights(root / "tokenizer" / "weights" / "model.safetensors", state, {})
    with pytest.raises(UserError, match=r"tokens: .*number \d+ .*not finite: .*encode again"):
        encode_data(run(root))
    with pytest.raises(UserError, match="no finished token cache"):
        TokenCache.open(root / "tokens")


def test_manifest_and_files(root):
    manifest = encode_data(run(root)).manifest
    assert manifest["format"] == FORMAT and manifest["dtype"] == "<u2" and manifest["views"] == 1
    assert manifest["layout"] == {"grids": [[2, 2]], "num_codes": [16]}
    assert manifest["tokenizer"]["weights_sha256"] == sha256(
        root / "tokenizer" / "weights" / "model.safetensors"
    )
    assert (
        manifest["splits"]["train"]["count"] == 20 and manifest["splits"]["held_out"]["count"] == 4
    )
    assert [shard["count"] for shard in manifest["splits"]["train"]["shards"]] == [7, 7, 6]
    listed = {}
    for split in manifest["splits"].values():
        for shard in split["shards"]:
            listed |= shard["files"]
    found = {path.name for path in (root / "tokens").iterdir()}
    assert found == {".lock", "manifest.json", *listed}
    for name, entry in listed.items():
        path = root / "tokens" / name
        assert entry == {"bytes": path.stat().st_size, "sha256": sha256(path)}
    assert np.load(root / "tokens" / "train-00000.codes.npy", mmap_mode="r").shape == (7, 1, 4)


def test_views(root):
    views = encode_data(run(root, views=3)).split("train").codes
    plain = encode_data(run(root, name="plain")).split("train").codes
    assert views.shape == (20, 3, 4)
    assert np.array_equal(views[:, 0], plain[:, 0])
    assert (views[:, 1] != views[:, 0]).any() and (views[:, 1] != views[:, 2]).any()


def test_views_need_an_augmentation(root):
    config = root / "tokenizer" / "config.yaml"
    config.write_text(config.read_text().replace("augment: shift", "augment: none"))
    with pytest.raises(UserError, match=r"views=2: .*data.augment=none"):
        encode_data(run(root, views=2))


@pytest.mark.parametrize("views", [10**6, 10**12, 10**25])
def test_views_that_nothing_holds_leave_the_cache_that_is_there(root, monkeypatch, views):
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, 10**8)
    )
    encode_data(run(root))
    before = files(root / "tokens")
    with pytest.raises(
        UserError, match=rf"tokens: views={views} .* bytes of codes, .* free: lower views"
    ):
        encode_data(run(root, views=views))
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**40, 0, 10**39)
    )
    if views > 10**6:
        with pytest.raises(UserError, match=rf"tokens: views={views} .* bytes of memory"):
            encode_data(run(root, views=views))
    assert files(root / "tokens") == before


def test_weights_that_cannot_be_loaded_leave_the_cache_that_is_there(root):
    encode_data(run(root))
    before = files(root / "tokens")
    (root / "tokenizer" / "weights" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match="damaged"):
        encode_data(run(root), fresh=True)
    assert files(root / "tokens") == before


@pytest.mark.parametrize(
    ("num_codes", "dtype"),
    [
        ((16,), "<u2"),
        ((1 << 16,), "<u2"),
        ((4, (1 << 16) + 1), "<u4"),
        ((1 << 32,), "<u4"),
        ((1 << 36,), "<i8"),
    ],
)
def test_the_smallest_type_that_holds_every_code(num_codes, dtype):
    assert code_dtype(CodeLayout(((1,),) * len(num_codes), num_codes)) == np.dtype(dtype)


def test_a_large_codebook(root):
    save_tokenizer(root / "tokenizer", root / "images", num_codes=70_000)
    cache = encode_data(run(root))
    codes = cache.split("train").codes
    assert (
        codes.dtype == np.uint32
        and cache.manifest["dtype"] == "<u4"
        and np.asarray(codes).max() > 1 << 16
    )
    cache.verify()


def test_another_source(root):
    save_images(root / "others")
    cache = encode_data(run(root, source=str(root / "others")))
    assert cache.manifest["data"]["source"] == str(root / "others")


# when it is made


def test_a_current_cache_is_left_alone(root, capsys):
    encode_data(run(root))
    before = {path: path.stat().st_mtime_ns for path in (root / "tokens").iterdir()}
    capsys.readouterr()
    encode_data(run(root))
    assert "up to date" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (root / "tokens").iterdir()} == before
    encode_data(run(root), fresh=True)
    assert {path: path.stat().st_mtime_ns for path in (root / "tokens").iterdir()} != before


def interrupted(monkeypatch, config, after):
    """Encode until `after` files are written."""
    written = []

    def stop(path, data):
        written.append(path)
        if len(written) > after:
            raise KeyboardInterrupt
        replace(path, data)

    replace = encode.replace_file
    with monkeypatch.context() as patch:
        patch.setattr(encode, "replace_file", stop)
        with pytest.raises(KeyboardInterrupt):
            encode_data(config)


@pytest.mark.parametrize("after", [1, 2, 5, 12, 13])
def test_an_interrupted_cache_is_completed_with_the_same_bytes(root, monkeypatch, after):
    encode_data(run(root, name="straight", views=2))
    config = run(root, views=2)
    interrupted(monkeypatch, config, after)
    with pytest.raises(UserError, match="no finished token cache"):
        TokenCache.open(root / "tokens")
    kept = {
        path: path.stat().st_mtime_ns for path in sorted((root / "tokens").glob("train-00000.*"))
    }
    (root / "tokens" / ".train-00001.codes.npy.1.tmp").write_bytes(b"left over")
    encode_data(config)
    if after >= 4:
        assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert files(root / "tokens") == files(root / "straight")


def test_an_unfinished_cache_of_another_plan_is_not_completed(root, monkeypatch):
    interrupted(monkeypatch, run(root), 5)
    save_tokenizer(root / "tokenizer", root / "images", seed=1)
    encode_data(run(root))
    encode_data(run(root, name="straight"))
    assert files(root / "tokens") == files(root / "straight")


def test_codes_of_another_tokenizer_are_refused_and_made_anew(root):
    cache = encode_data(run(root))
    then = sha256(root / "tokenizer" / "weights" / "model.safetensors")
    old = np.asarray(cache.split("train").codes)
    save_tokenizer(root / "tokenizer", root / "images", seed=1)
    now = sha256(root / "tokenizer" / "weights" / "model.safetensors")
    with pytest.raises(UserError) as caught:
        TokenCache.open(root / "tokens").check_tokenizer()
    message = str(caught.value)
    assert (
        then[:8] in message
        and now[:8] in message
        and "run `make tokens` again" in message
        and "\n" not in message
    )
    again = encode_data(run(root))
    again.check_tokenizer()
    assert not np.array_equal(np.asarray(again.split("train").codes), old)


# of which images


def redraw(root, seed=1, name="0.png"):
    """Another picture in place of one, or of all."""
    generator = np.random.default_rng(seed)
    for path in sorted((root / "images").rglob(name)):
        Image.fromarray(generator.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(path)


def add(root):
    shutil.copy(root / "images" / "cats" / "3.png", root / "images" / "cats" / "99.png")


OTHER_IMAGES = {
    "overwritten": (redraw, r"names or contents of the (train|held_out) images have changed"),
    "all overwritten": (
        lambda root: redraw(root, name="*.png"),
        "contents of the train images have changed",
    ),
    "added": (add, "images are now|names or contents"),
    "removed": (lambda root: (root / "images" / "dogs" / "5.png").unlink(), "images are now"),
    "class renamed": (
        lambda root: (root / "images" / "dogs").rename(root / "images" / "eels"),
        "dogs is now eels",
    ),
}


@pytest.mark.parametrize("change", OTHER_IMAGES)
def test_codes_of_other_images_are_made_anew(root, capsys, change):
    old = encode_data(run(root))
    identity = old.sha256
    make, words = OTHER_IMAGES[change]
    make(root)
    held_out = open_split(DataConfig(source=str(root / "images"), image_size=SIDE), "held_out")
    train = open_split(DataConfig(source=str(root / "images"), image_size=SIDE), "train")
    with pytest.raises(UserError, match=r"tokens: of other images .*: run `make tokens` again"):
        for images in (train, held_out):
            old.check_images(images)
    capsys.readouterr()
    new = encode_data(run(root))
    said = capsys.readouterr().out.splitlines()[0]
    assert re.match(rf"{root}/tokens: of other images \(.*({words}).*\): making it again", said), (
        said
    )
    assert files(root / "tokens") == files(encode_data(run(root, name="straight")).folder)
    assert new.sha256 != identity and new.class_names == train.class_names
    for images in (train, held_out):
        new.check_images(images)
        assert new.manifest["splits"][images.split]["ids_sha256"] == images.inventory.sha256


def test_an_unfinished_cache_of_other_images_is_not_completed(root, monkeypatch, capsys):
    interrupted(monkeypatch, run(root), 5)
    redraw(root, name="*.png")
    encode_data(run(root))
    assert "beginning anew" in capsys.readouterr().out
    encode_data(run(root, name="straight"))
    assert files(root / "tokens") == files(root / "straight")


def test_images_that_change_while_they_are_encoded_are_refused(root, monkeypatch):
    batches, encode_batch = [], BatchEncoder.__call__

    def once(*arguments):
        batches.append(1)
        if len(batches) == 2:
            redraw(root)
        return encode_batch(*arguments)

    monkeypatch.setattr(BatchEncoder, "__call__", once)
    with pytest.raises(
        UserError, match="images changed while it was encoded: run the same command again"
    ):
        encode_data(run(root))
    with pytest.raises(UserError, match="no finished token cache"):
        TokenCache.open(root / "tokens")
    encode_data(run(root))
    encode_data(run(root, name="straight"))
    assert files(root / "tokens") == files(root / "straight")


def test_images_that_moved_are_the_same(root, capsys):
    cache = encode_data(run(root))
    before, identity = files(root / "tokens"), cache.sha256
    there = str((root / "images").rename(root / "photos"))
    capsys.readouterr()
    moved = encode_data(run(root, source=there))
    assert "up to date" in capsys.readouterr().out and moved.sha256 == identity
    assert TokenCache.open(root / "tokens").manifest["data"]["source"] == there
    after = files(root / "tokens")
    assert {name for name in after if after[name] != before[name]} == {"manifest.json"}


def test_a_cache_of_an_earlier_version_says_so(root, capsys):
    """Which names no images: its codes still serve, to whom they are by the hash of the
    manifest."""
    encode_data(run(root))
    path = root / "tokens" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["identity"]
    for split in manifest["splits"].values():
        del split["listed"]
    path.write_text(json.dumps(manifest | {"plan_sha256": "0" * 64}))
    cache = TokenCache.open(root / "tokens")
    cache.verify()
    assert cache.sha256 == sha256(path)
    images = open_split(DataConfig(source=str(root / "images"), image_size=SIDE), "train")
    with pytest.raises(
        UserError, match="an earlier version made it, which did not note of which images: run `make"
    ):
        cache.check_images(images)
    capsys.readouterr()
    encode_data(run(root)).check_images(images)
    assert (
        "an earlier version made it, which did not note of which images: making it again"
        in capsys.readouterr().out
    )


def test_other_settings_make_it_anew(root):
    assert encode_data(run(root)).manifest["views"] == 1
    assert encode_data(run(root, views=2)).manifest["views"] == 2


@pytest.mark.parametrize(
    "stranger", ["thesis.txt", "features.npy", "train-00000.codes.npy.bak", "photos"]
)
def test_a_folder_with_other_files_is_not_touched(root, stranger):
    (root / "tokens").mkdir()
    if stranger == "photos":
        (root / "tokens" / stranger).mkdir()
    else:
        (root / "tokens" / stranger).write_text("mine")
    for fresh in (False, True):
        with pytest.raises(UserError, match=f"holds {stranger}, so it is no token cache"):
            encode_data(run(root), fresh=fresh)
    assert [path.name for path in (root / "tokens").iterdir()] == [stranger]


def test_files_of_others_stay_and_links_are_followed(root):
    encode_data(run(root))
    os.rename(root / "tokens", root / "disk")
    (root / "tokens").symlink_to("disk")
    for name in ("thesis.tmp", ".thesis.tmp", ".thesis.9.tmp", "train-00000.codes.npy.bak"):
        (root / "disk" / name).write_text("mine")
    made = files(root / "tokens")
    encode_data(run(root), fresh=True)
    assert (root / "tokens").is_symlink() and files(root / "tokens") == made
    encode_data(run(root, views=2))
    assert {name for name, data in files(root / "disk").items() if data == b"mine"} == {
        "thesis.tmp",
        ".thesis.tmp",
        ".thesis.9.tmp",
        "train-00000.codes.npy.bak",
    }
    (root / "disk" / "train-00007.codes.npy").write_text("mine")
    with pytest.raises(
        UserError, match=r"train-00007\.codes\.npy: no command here wrote it.*move it away"
    ):
        encode_data(run(root), fresh=True)
    assert TokenCache.open(root / "tokens").manifest["views"] == 2


def test_a_cache_of_before_there_were_lists_is_made_anew(root):
    encode_data(run(root))
    (root / "tokens" / ".lock").unlink()
    assert encode_data(run(root, views=2)).manifest["views"] == 2


def test_one_process_encodes_at_a_time(root, monkeypatch):
    refused, replace = [], encode.replace_file

    def others(path, data):
        for fresh in (
            (False, True) if path.name in ("unfinished.json", "train-00001.codes.npy") else ()
        ):
            with pytest.raises(UserError, match="another process is writing to this token cache"):
                encode_data(run(root), fresh=fresh)
            refused.append(path)
        replace(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(encode, "replace_file", others)
        encode_data(run(root))
    assert len(refused) == 4
    encode_data(run(root)).verify()
    encode_data(run(root), fresh=True)


def test_a_file_in_the_way_is_refused(root):
    (root / "tokens").write_text("mine")
    with pytest.raises(UserError, match="this is a file"):
        encode_data(run(root))
    assert (root / "tokens").read_text() == "mine"


def test_without_a_tokenizer(root):
    with pytest.raises(UserError, match="run `make tokenizer`"):
        encode_data(run(root, tokenizer=str(root / "nowhere")))


def test_views_are_counted_from_one():
    with pytest.raises(ValueError, match="views=0"):
        TokensRun(views=0)


# damage


def damaged(root, change, name="train-00001.codes.npy"):
    encode_data(run(root))
    path = root / "tokens" / name
    data = bytearray(path.read_bytes())
    path.write_bytes(change(data))
    return path


def flip(data):
    data[-1] ^= 1
    return data


def test_a_missing_or_cut_file_is_refused_and_mended_by_the_remedy(root):
    good = files(encode_data(run(root)).folder)
    for change in (
        lambda path: path.unlink(),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
    ):
        path = root / "tokens" / shard_file("train", 1, "labels")
        change(path)
        with pytest.raises(UserError, match=r"train-00001\.labels\.npy.*run `make tokens` again"):
            TokenCache.open(root / "tokens")
        encode_data(run(root))
        assert files(root / "tokens") == good


def test_a_flipped_bit_is_found(root):
    path = damaged(root, flip)
    cache = TokenCache.open(root / "tokens")
    with pytest.raises(UserError, match=f"{path.name}: its SHA-256"):
        cache.verify()


def test_a_code_that_is_none_is_found(root):
    cache = encode_data(run(root))
    smaller = dataclasses.replace(cache.layout, num_codes=(2,))
    cache.layout = smaller
    with pytest.raises(UserError, match="holds codes of 2 and more"):
        cache.verify()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '"x"', json.dumps({"format": "tessera-tokens-0"})]
)
def test_a_damaged_manifest_is_refused(root, text):
    damaged(root, lambda data: text.encode(), "manifest.json")
    with pytest.raises(UserError, match=r"manifest\.json") as caught:
        TokenCache.open(root / "tokens")
    assert "\n" not in str(caught.value)


def test_a_manifest_cannot_name_files_elsewhere(root):
    encode_data(run(root))
    (root / "secret.npy").write_bytes(b"x")
    manifest = json.loads((root / "tokens" / "manifest.json").read_text())
    manifest["splits"]["train"]["shards"][0]["files"]["../secret.npy"] = {"bytes": 1, "sha256": ""}
    (root / "tokens" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"secret\.npy"):
        TokenCache.open(root / "tokens")


def test_codes_cut_short_or_replaced_while_they_are_read_end_in_a_line(root):
    """A map of them would end the process by SIGBUS."""
    cache = encode_data(run(root))
    codes = cache.split("train").codes
    whole = np.asarray(codes)
    assert np.array_equal(codes[[19, 0, 8, 7]], whole[[19, 0, 8, 7]])
    path = root / "tokens" / "train-00001.codes.npy"
    content = path.read_bytes()
    for change in (lambda: os.truncate(path, 130), lambda: path.write_bytes(content), path.unlink):
        change()
        with pytest.raises(
            UserError, match=r"train-00001\.codes\.npy: missing or damaged .*`make tokens` again"
        ) as caught:
            codes[[0, 9]]
        assert "\n" not in str(caught.value)
    assert np.array_equal(codes[[0, 19]], whole[[0, 19]])  # of other shards


@pytest.mark.parametrize("dtype", ["<u2", "<f4"])
@pytest.mark.parametrize("shape", [(7,), (7, 2, 3), (0, 4), (7, 0)])
def test_rows_of_a_file(tmp_path, dtype, shape):
    array = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    np.save(tmp_path / "a.npy", array)
    file = NpyFile(tmp_path / "a.npy", "remedy")
    assert (len(file), file.shape, file.dtype) == (len(array), array.shape, array.dtype)
    np.testing.assert_array_equal(np.asarray(file), array)
    for places in ([], [3], [0, 1, 2], [6, 5, 5, 6, 0, 1]):
        if max(places, default=-1) < len(array):
            np.testing.assert_array_equal(
                file[np.array(places, dtype=int)], array[np.array(places, dtype=int)]
            )
    if len(shape) > 1:
        np.testing.assert_array_equal(
            np.asarray(file.merged()), array.reshape(shape[0] * shape[1], *shape[2:])
        )


def test_a_flipped_bit_in_a_header_is_one_line(tmp_path):
    array = np.arange(30, dtype="<u2").reshape(10, 3)
    np.save(tmp_path / "a.npy", array)
    whole = (tmp_path / "a.npy").read_bytes()
    refused = 0
    for bit in range(8 * (len(whole) - array.nbytes)):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        (tmp_path / "a.npy").write_bytes(data)
        try:
            found = NpyFile(tmp_path / "a.npy", "remedy")
            assert (
                found.shape != (10, 3)
                or found.dtype != array.dtype
                or np.array_equal(np.asarray(found), array)
            )
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 200


# shards as one array

WHOLE = np.arange(10 * 3 * 4).reshape(10, 3, 4)
MASK = np.arange(10) % 3 == 0
KEYS = [
    0,
    9,
    -1,
    -10,
    np.int64(4),
    slice(None),
    slice(2, 8, 3),
    slice(None, None, -1),
    slice(5, 5),
    [0, 9, 3, 3, -2],
    np.array([7, 1]),
    np.array([], dtype=np.int64),
    MASK,
    (3,),
    (3, 1),
    (-1, 2, 0),
    (slice(1, 9), 0),
    (slice(None), slice(1, None), 2),
    (slice(2, 5), [0, 2]),
    ([1, 8, 2], [0, 2, 1]),
    ([1, 8], 0),
    ([4, -4], slice(None), 1),
    (MASK, 1),
]


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_shards_index_as_one_array(key):
    shards = Shards([WHOLE[:4], WHOLE[4:8], WHOLE[8:]])
    found = shards[key]
    assert found.dtype == WHOLE.dtype
    np.testing.assert_array_equal(found, WHOLE[key])


def test_shards_have_a_length_a_shape_and_ends():
    shards = Shards([WHOLE[:4], WHOLE[4:]])
    assert len(shards) == 10 and shards.shape == WHOLE.shape
    np.testing.assert_array_equal(np.asarray(shards), WHOLE)
    for outside in (10, -11, [0, 10], ([0, -11], 1)):
        with pytest.raises(IndexError, match="of 10"):
            shards[outside]


# in low precision


def share_of_others(one, other, split):
    """Of the codes of plain images in two caches."""
    codes = [np.asarray(cache.split(split).codes[:, 0]) for cache in (one, other)]
    return float((codes[0] != codes[1]).mean())


def test_codes_in_low_precision_say_how_many_fp32_would_make_others(root, capsys):
    save_tokenizer(root / "tokenizer", root / "images", num_codes=400)
    full = encode_data(run(root, name="full", views=2))
    assert full.precision == "fp32" and "codes_unlike_fp32" not in full.manifest
    capsys.readouterr()
    low = encode_data(run(root, views=2, precision="bf16"))
    said, told = capsys.readouterr().out, low.manifest["codes_unlike_fp32"]
    shares = {split: share_of_others(full, low, split) for split in ("train", "held_out")}
    assert 0 < shares["train"] < 0.5 and low.precision == "bf16" and low.sha256 != full.sha256
    assert told == {
        split: {"share": shares[split], "images": count}
        for split, count in (("train", 20), ("held_out", 4))
    }
    assert (
        f"in bf16 {shares['train']:.2%} of the codes of 20 train images differ from those of fp32"
        in said
    )
    for asked in ("auto", "bf16"):  # whatever the machine, "auto" is content with what is there
        encode_data(run(root, views=2, precision=asked))
        assert "up to date" in capsys.readouterr().out
    again = encode_data(run(root, views=2, precision="fp32"))
    assert "its codes were made in bf16, not in fp32: making it again" in capsys.readouterr().out
    assert again.sha256 == full.sha256
    path = root / "tokens" / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(
        json.dumps({name: value for name, value in manifest.items() if name != "precision"})
    )
    encode_data(run(root, views=2, precision="fp32"))  # of an earlier version, which knew no other
    assert "up to date" in capsys.readouterr().out
    path.write_text(json.dumps(manifest | {"precision": "fp8"}))
    with pytest.raises(UserError, match="damaged"):
        TokenCache.open(root / "tokens")


def test_an_unfinished_cache_is_not_completed_in_another_precision(root, monkeypatch, capsys):
    interrupted(monkeypatch, run(root, precision="bf16"), 5)
    encode_data(run(root))
    assert "beginning anew" in capsys.readouterr().out
    encode_data(run(root, name="straight"))
    assert files(root / "tokens") == files(root / "straight")


def test_numbers_that_a_precision_cannot_hold_are_refused_before_the_work(root, monkeypatch):
    def overflowing(encode, images):
        return np.full((len(images), 4), -1 if encode.precision == "fp16" else 1)

    monkeypatch.setattr(BatchEncoder, "__call__", overflowing)
    with pytest.raises(
        UserError, match="precision=fp16: the encoder's numbers overflow it: set precision=fp32"
    ):
        encode_data(run(root, precision="fp16"))
    assert not list((root / "tokens").glob("*.npy"))


# read by other processes


@pytest.fixture
def unreadable(root):
    """The images, three of which cannot be read, for a tokenizer that decodes them as they are
    read."""
    for name in ("cats/3", "cats/5", "dogs/7"):
        (root / "images" / f"{name}.png").write_bytes(b"damaged")
    save_tokenizer(root / "tokenizer", root / "images", memory_mib=0, max_bad=0.5)
    return root


def test_processes_that_read_change_nothing(unreadable):
    caches, said = [], []
    for workers in (0, 2):
        with pytest.warns(UserWarning, match="skipped") as warned:
            caches.append(
                encode_data(run(unreadable, name=f"by-{workers}", views=2, workers=workers))
            )
        said.append([str(line.message) for line in warned])
    assert files(caches[0].folder) == files(caches[1].folder)
    assert [sorted(line.split()[2] for line in lines) for lines in said] == [
        ["1", "2"]
    ] * 2  # of 3, at 1, 2, 4, ...
    assert not multiprocessing.active_children()


def test_bad_images_that_others_meet_are_too_many_together(unreadable, monkeypatch):
    save_tokenizer(unreadable / "tokenizer", unreadable / "images", memory_mib=0, max_bad=0.1)
    monkeypatch.setattr(dataset, "FEWEST_READS", 1)
    with (
        pytest.warns(UserWarning),
        pytest.raises(UserError, match=r"too many of its \d+ train images"),
    ):
        encode_data(run(unreadable, workers=2))
    assert not multiprocessing.active_children()


def test_what_is_in_memory_needs_no_process(root, monkeypatch):
    monkeypatch.setattr(loader, "_read_ahead", None)
    encode_data(run(root, workers=2))


@pytest.mark.parametrize("event", ["interrupted", "a reader is killed"])
def test_no_process_outlives_the_encoding(unreadable, monkeypatch, event):
    encode_batch = BatchEncoder.__call__

    def stopping(encoder, images):
        readers = multiprocessing.active_children()
        assert len(readers) == 2
        if event == "interrupted":
            raise KeyboardInterrupt
        os.kill(readers[0].pid, signal.SIGKILL)
        time.sleep(0.2)
        return encode_batch(encoder, images)

    monkeypatch.setattr(BatchEncoder, "__call__", stopping)
    with pytest.warns(UserWarning), pytest.raises((KeyboardInterrupt, UserError)) as ended:
        encode_data(run(unreadable, views=40, workers=2))
    assert not multiprocessing.active_children()
    if event != "interrupted":
        assert "process that reads images ahead is gone" in str(
            ended.value
        ) and "lower workers" in str(ended.value)
    monkeypatch.undo()
