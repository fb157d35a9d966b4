"""Image decoding gives the right pixels; sources, splits and bad items behave by their laws."""

from __future__ import annotations

import io
import json
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, features

from tokenizer.data import dataset, transforms
from tokenizer.data.dataset import DataConfig, open_split
from tokenizer.data.source import open_listing
from tokenizer.data.transforms import BadImage, decode, to_float, to_uint8
from training.errors import UserError

SIZE = 8
RAMP = (
    np.arange(SIZE * SIZE, dtype=np.uint8).reshape(SIZE, SIZE) * 4
)  # not symmetric under any turn
COLOURS = np.stack([RAMP, 255 - RAMP, RAMP.T], axis=-1)  # (8, 8, 3)


def encode(image, kind="PNG", **options):
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(data, size=SIZE, max_pixels=10**6):
    """Decoded (S, S, 3)."""
    return decode(data, size, max_pixels).transpose(1, 2, 0)


def grey(values):
    return np.repeat(np.asarray(values)[..., None], 3, axis=-1)


def with_alpha(values, alpha):
    image = Image.fromarray(values)
    image.putalpha(Image.fromarray(alpha))
    return image


# Modes


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_plain_grey_and_colour_are_exact(kind):
    assert np.array_equal(pixels(encode(RAMP, kind)), grey(RAMP))
    assert np.array_equal(pixels(encode(COLOURS, kind)), COLOURS)


def test_every_format_opens():
    for kind in transforms.FORMATS:
        if kind == "AVIF" and not features.check("avif"):  # a Pillow of the system's may lack it
            continue
        got = pixels(encode(np.full((SIZE, SIZE, 3), 77, dtype=np.uint8), kind))
        assert np.abs(got.astype(int) - 77).max() <= 1


def test_one_bit():
    bits = RAMP > 100
    assert np.array_equal(pixels(encode(Image.fromarray(bits))), grey(bits * np.uint8(255)))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_rescaled_not_clipped(kind):
    values = RAMP.astype(np.uint16) * 257 + 100
    assert np.array_equal(
        pixels(encode(values, kind)), grey(np.rint(values / 257).astype(np.uint8))
    )


def test_thirty_two_bits_and_floats():
    values = RAMP.astype(np.int32) * 257
    assert np.array_equal(pixels(encode(values, "TIFF")), grey(RAMP))
    for white in (1, 255, 65535):
        values = (RAMP / 255 * white).astype(np.float32)
        assert np.array_equal(pixels(encode(values, "TIFF")), grey(RAMP))
    values[0, 0] = np.nan
    with pytest.raises(BadImage, match="finite"):
        pixels(encode(values, "TIFF"))


def test_floats_around_white_are_no_other_range():
    """Resampling shoots over black and white by a little: 1.02 is a bright pixel, not a nearly
    black one."""
    for white in (1, 255, 65535):
        values = (RAMP / 255 * white).astype(np.float32)
        values[0, :2], values[-1, -2:] = -0.02 * white, 1.02 * white
        expected = RAMP.copy()
        expected[0, :2], expected[-1, -2:] = 0, 255
        assert np.array_equal(pixels(encode(values, "TIFF")), grey(expected))


@pytest.mark.parametrize("dark", [1, 0.3, 0.004])
def test_dark_floats_up_to_one_stay_dark(dark):
    values = (RAMP / 255 * dark).astype(np.float32)
    assert np.array_equal(
        pixels(encode(values, "TIFF")), grey(np.rint(values * 255).astype(np.uint8))
    )


def test_whole_numbers_up_to_255_are_levels_of_eight_bits():
    for kind in (np.float32, np.int32):
        assert np.array_equal(pixels(encode((RAMP // 8).astype(kind), "TIFF")), grey(RAMP // 8))


@pytest.mark.parametrize(
    "low, high, kind",
    [
        (0, 1.5, np.float32),
        (0, 3.7, np.float32),
        (0, 40.5, np.float32),
        (-1, 1, np.float32),
        (-90, 250, np.int32),
        (0, 3000, np.float32),
        (0, 4095, np.int32),
        (0, 1e6, np.float32),
        (0, 2**20, np.int32),
        (-1e30, 1e38, np.float32),
    ],
)
def test_ranges_that_could_be_several_are_refused(low, high, kind):
    """A high dynamic range, heights, [-1, 1]: what is white cannot be told from one picture."""
    values = (low + RAMP / RAMP.max() * (high - low)).astype(kind)
    with pytest.raises(BadImage, match=r"values from .* to .*: .*save it with 8 or 16 bits"):
        pixels(encode(values, "TIFF"))


def test_palette_and_its_transparency():
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 8, 7]], dtype=np.uint8)
    indices = (RAMP // 64).astype(np.uint8)
    image = Image.fromarray(indices, "L").convert("P")
    image.putdata(indices.flatten().tolist())
    image.putpalette(colours.flatten().tolist())
    assert image.mode == "P"
    assert np.array_equal(pixels(encode(image)), colours[indices])
    colours[2] = 255
    assert np.array_equal(pixels(encode(image, transparency=2)), colours[indices])


def test_alpha_lies_on_white():
    alpha = np.full((SIZE, SIZE), 255, dtype=np.uint8)
    alpha[:4], alpha[4] = 0, 51
    expected = COLOURS.copy()
    expected[:4] = 255
    expected[4] = np.rint(COLOURS[4] * 0.2 + 255 * 0.8)
    for values, result in [(COLOURS, expected), (RAMP, grey(expected[..., 0]))]:
        got = pixels(encode(with_alpha(values, alpha)))
        assert np.abs(got.astype(int) - result).max() <= 1
        assert np.array_equal(got[5:], result[5:]) and (got[:4] == 255).all()


def test_transparent_colour_of_an_rgb_png():
    expected = COLOURS.copy()
    expected[0, 0] = 255
    assert np.array_equal(
        pixels(encode(COLOURS, transparency=tuple(COLOURS[0, 0].tolist()))), expected
    )


def test_cmyk():
    ink = np.zeros((SIZE, SIZE, 4), dtype=np.uint8)
    ink[..., 0] = 255  # all cyan
    for kind in ("TIFF", "JPEG"):
        got = pixels(encode(Image.fromarray(ink, "CMYK"), kind)).astype(int)
        assert np.abs(got - [0, 255, 255]).max() <= 3


# Geometry


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_exif_orientation(orientation, kind):
    # What the camera stores is the upright picture turned by the inverse of what EXIF asks for.
    inverse = {6: 8, 8: 6}.get(orientation, orientation)
    upright = Image.fromarray(np.kron(COLOURS, np.ones((8, 8, 1), dtype=np.uint8)))
    stored = upright if inverse == 1 else upright.transpose(transforms.UPRIGHT[inverse])
    exif = Image.Exif()
    exif[transforms.ORIENTATION_TAG] = orientation
    options = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {}
    for size in (64, 16, 8):  # JPEG decodes at a lower scale for the small ones
        got = pixels(encode(stored, kind, exif=exif, **options), size)
        expected = pixels(encode(upright, kind, **options), size)
        assert np.abs(got.astype(int) - expected).mean() < 2


def test_centre_square_and_antialiasing():
    wide = np.zeros((40, 100, 3), dtype=np.uint8)
    wide[:, 10:90] = 200  # wider than the square by the reach of the filter
    assert (pixels(encode(wide)) == 200).all()
    assert (pixels(encode(wide.transpose(1, 0, 2))) == 200).all()
    stripes = np.tile(np.array([0, 255], dtype=np.uint8), (128, 64))
    assert np.abs(pixels(encode(stripes)).astype(int) - 127).max() <= 2
    assert (
        pixels(encode(np.full((1, 1), 9, dtype=np.uint8))).tolist()
        == np.full((8, 8, 3), 9).tolist()
    )


def test_fast_jpeg_decoding_agrees_with_a_full_one():
    smooth = Image.fromarray(COLOURS).resize((800, 600), Image.Resampling.BICUBIC)
    data = encode(smooth, "JPEG", quality=95)
    slow = Image.open(io.BytesIO(data)).convert("RGB").crop((100, 0, 700, 600))
    slow = np.asarray(slow.resize((32, 32), Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(pixels(data, 32) - slow).mean() < 1


# Bad images


def test_damaged_images_give_a_reason():
    whole = encode(COLOURS.repeat(9, 0))
    half = whole[: len(whole) // 2]
    for data, reason in [
        (b"", "is empty"),
        (b"no image at all", "not an image"),
        (half, "trunc|broken"),
    ]:
        with pytest.raises(BadImage, match=reason):
            pixels(data)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 255
    with pytest.raises(BadImage):
        pixels(bytes(flipped))


def test_a_shortage_of_memory_is_no_bad_image(monkeypatch):
    """The image may be sound: the run ends with the machine's fault, and does not go on without the
    image."""

    def load(self):
        raise MemoryError

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    with pytest.raises(
        BadImage, match="MemoryError"
    ):  # there is memory: it is the image that asks for too much
        pixels(encode(COLOURS))
    monkeypatch.setattr(transforms, "bytearray", load, raising=False)
    with pytest.raises(MemoryError):
        pixels(encode(COLOURS))


def test_bombs_are_refused_before_decoding(monkeypatch):
    def chunk(name, body):
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    def png(width, height):
        header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        return (
            b"\x89PNG\r\n\x1a\n"
            + chunk(b"IHDR", header)
            + chunk(b"IDAT", b"")
            + chunk(b"IEND", b"")
        )

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("was decoded"))
    with pytest.raises(BadImage, match=r"9000x9000 is more than data\.max_pixels=64000000"):
        pixels(png(9000, 9000), max_pixels=64_000_000)
    with pytest.raises(BadImage, match="bomb"):  # Pillow's own guard stays
        pixels(png(100_000, 100_000), max_pixels=64_000_000)
    with pytest.raises(BadImage):
        pixels(png(0, 5))


# Pixels and augmentation


def test_all_levels_survive_the_round_trip():
    levels = torch.arange(256, dtype=torch.uint8)
    floats = to_float(levels)
    assert floats.dtype == torch.float32 and floats[0] == -1 and floats[-1] == 1
    assert torch.equal(to_uint8(floats), levels)
    assert to_uint8(torch.tensor([-7.0, 0.0, 7.0])).tolist() == [0, 128, 255]


def test_augmentations():
    image = torch.from_numpy(COLOURS).permute(2, 0, 1)
    flips = [transforms.augment(image, "flip", seed) for seed in range(40)]
    assert all(torch.equal(result, image) or torch.equal(result, image.flip(2)) for result in flips)
    assert 5 < sum(torch.equal(result, image) for result in flips) < 35
    moved = transforms.augment(image, "shift", 0)
    for seed in range(20):
        moved = transforms.augment(image, "shift", seed)
        # One pixel each way at this size: the inside is a moved copy, the edge repeats it.
        padded = torch.nn.functional.pad(image[None].float(), (1, 1, 1, 1), mode="replicate")[
            0
        ].byte()
        copies = [padded[:, y : y + SIZE, x : x + SIZE] for y in range(3) for x in range(3)]
        assert any(torch.equal(moved, copy) for copy in copies)
    assert torch.equal(transforms.augment(image, "none", 0), image)
    with pytest.raises(UserError, match=r"data.augment=flop.*flip_shift"):
        DataConfig(augment="flop")
    with pytest.raises(UserError, match=r"data.max_pixels=0: must be at least 1"):
        DataConfig(max_pixels=0)


def test_augmentation_depends_on_seed_epoch_and_index_only():
    config = DataConfig(augment="shift", image_size=32)
    first = open_split(config, "train", augment=True, seed=1)
    keys = [(epoch, index) for epoch in range(3) for index in range(8)]
    batch = first.gather(keys)["images"]
    again = open_split(config, "train", augment=True, seed=1).gather(keys[::-1])["images"]
    assert torch.equal(batch, again.flip(0))
    assert not torch.equal(batch[:8], batch[8:16])
    assert not torch.equal(
        batch, open_split(config, "train", augment=True, seed=2).gather(keys)["images"]
    )
    plain = open_split(config, "train").gather(keys)["images"]
    assert torch.equal(plain[:8], plain[8:16])


# Sources and splits


def write_folder(root, classes=("cats", "dogs"), count=10, start=0):
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(start, start + count):
            shade = np.full((5 + number % 3, 9, 3), (8 * number + label) % 256, dtype=np.uint8)
            (root / name / f"{number:03d}.png").write_bytes(encode(shade))
    return root


def shades(images):
    """The first pixel of each image of a split: what `write_folder` put there."""
    return to_uint8(images.gather([(0, i) for i in range(len(images))])["images"])[:, 0, 0, 0]


def config_of(source, **options):
    return DataConfig(source=str(source), image_size=SIZE, **options)


def both(config):
    return open_split(config, "train"), open_split(config, "held_out")


def test_digits():
    train, held_out = both(DataConfig(image_size=8))
    assert (len(train) + len(held_out), train.num_classes, train.class_names[3]) == (1797, 10, "3")
    assert set(train.ids.tolist()).isdisjoint(held_out.ids.tolist())
    for label in range(10):
        ours, theirs = (held_out.labels == label).sum(), (train.labels == label).sum()
        assert abs(ours / (ours + theirs) - 0.2) < 0.01
    batch = train.gather([(0, 0), (4, 0)])
    assert batch["images"].shape == (2, 3, 8, 8) and batch["images"].dtype == torch.float32
    assert -1 <= batch["images"].min() and batch["images"].max() <= 1
    from sklearn.datasets import load_digits

    digits = load_digits()
    assert torch.equal(train.labels, torch.from_numpy(digits.target)[train.ids])
    expected = torch.from_numpy(np.rint(digits.images * 255 / 16)).byte()[train.ids[0]]
    assert torch.equal(to_uint8(batch["images"][0]), expected.expand(3, 8, 8))


def test_class_folders(tmp_path):
    root = write_folder(tmp_path / "pets")
    (root / "notes.txt").write_text("not an image")
    (root / "cats" / "._000.png").write_bytes(b"left by another system")
    train, held_out = both(config_of(root))
    assert (train.name, train.class_names, len(train), len(held_out)) == (
        "pets",
        ["cats", "dogs"],
        16,
        4,
    )
    for images in (train, held_out):
        assert torch.equal(shades(images).long(), images.ids % 10 * 8 + images.labels)
        assert torch.equal(images.labels, images.ids // 10)
        assert set(images.identity()) == {"source", "split", "n", "image_size", "ids_sha256"}
    assert sorted(torch.cat([train.ids, held_out.ids]).tolist()) == list(range(20))
    assert held_out.labels.bincount().tolist() == [2, 2]


def test_split_does_not_move_with_the_folder_or_other_classes(tmp_path):
    def names(root):
        config = config_of(root)
        listing = open_listing(config.source, 0)
        return {listing.key(item) for item in open_split(config, "held_out").ids.tolist()}

    first = names(write_folder(tmp_path / "one"))
    assert names(write_folder(tmp_path / "two")) == first
    assert {
        n for n in names(write_folder(tmp_path / "two", classes=["birds"])) if "birds" not in n
    } == first


def test_every_class_keeps_a_training_item(tmp_path):
    write_folder(tmp_path, classes=["many"], count=9)
    write_folder(tmp_path, classes=["two"], count=2)
    write_folder(tmp_path, classes=["one"], count=1)
    train, held_out = both(config_of(tmp_path, held_out=0.95))
    assert train.labels.bincount(minlength=3).tolist() == [1, 1, 1]
    assert held_out.labels.bincount(minlength=3).tolist() == [8, 0, 1]


def test_flat_folder_and_nothing_to_hold_out(tmp_path):
    write_folder(tmp_path / "a", classes=["."])
    train, held_out = both(config_of(tmp_path / "a"))
    assert (train.class_names, len(train), len(held_out)) == (["all"], 8, 2)
    write_folder(tmp_path / "b", classes=["."], count=1)
    with pytest.raises(UserError, match="no images for the held_out split"):
        open_split(config_of(tmp_path / "b"), "held_out")


@pytest.mark.parametrize("name", ["val", "validation", "test"])
def test_a_folder_with_its_own_split(tmp_path, name):
    write_folder(tmp_path / "train", count=4)
    write_folder(tmp_path / name, count=3, start=4)
    train, held_out = both(config_of(tmp_path))
    assert sorted(shades(train).tolist()) == [0, 1, 8, 9, 16, 17, 24, 25]
    assert sorted(shades(held_out).tolist()) == [32, 33, 40, 41, 48, 49]
    assert train.class_names == held_out.class_names == ["cats", "dogs"]
    assert set(train.ids.tolist()).isdisjoint(held_out.ids.tolist())


def test_a_lone_train_folder_is_no_class(tmp_path):
    write_folder(tmp_path / "train")
    assert open_split(config_of(tmp_path), "train").class_names == ["cats", "dogs"]


def test_links_are_followed_without_loops(tmp_path):
    write_folder(tmp_path / "elsewhere", classes=["cats"])
    write_folder(tmp_path / "root", classes=["dogs"])
    (tmp_path / "root" / "cats").symlink_to(tmp_path / "elsewhere" / "cats")
    (tmp_path / "root" / "dogs" / "again").symlink_to(tmp_path / "root")
    train, held_out = both(config_of(tmp_path / "root"))
    assert train.class_names == ["cats", "dogs"] and len(train) + len(held_out) == 20


def write_parquet(path, images, labels=None, class_names=None, row_group_size=3):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    table = {"image": [{"bytes": data, "path": None} for data in images]}
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    table = pa.table(
        {"image": pa.array(table["image"], kind)} | ({"label": labels} if labels else {})
    )
    if class_names:
        features = {
            "image": {"_type": "Image"},
            "label": {"names": class_names, "_type": "ClassLabel"},
        }
        description = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": description})
    pq.write_table(table, path, row_group_size=row_group_size)
    return path


PLAIN = [encode(np.full((SIZE, SIZE), shade, dtype=np.uint8)) for shade in range(0, 250, 10)]


def test_parquet_with_its_own_split(tmp_path):
    names = ["ankle boot", "bag", "coat"]
    write_parquet(
        tmp_path / "data/train-00000-of-00002.parquet", PLAIN[:7], [0, 1] * 3 + [0], names
    )
    write_parquet(
        tmp_path / "data/train-00001-of-00002.parquet", PLAIN[7:14], [1, 0] * 3 + [1], names
    )
    write_parquet(tmp_path / "data/test-00000-of-00001.parquet", PLAIN[14:20], [2, 0] * 3, names)
    train, held_out = both(config_of(tmp_path))
    assert train.class_names == held_out.class_names == names
    assert shades(train).tolist() == list(range(0, 140, 10))
    assert shades(held_out).tolist() == list(range(140, 200, 10))
    assert train.labels.tolist() == [0, 1] * 7 and held_out.labels.tolist() == [2, 0] * 3
    assert sorted(torch.cat([train.ids, held_out.ids]).tolist()) == list(range(20))


def test_single_parquet_file(tmp_path):
    path = write_parquet(tmp_path / "train.parquet", PLAIN[:20], ["x", "y"] * 10)
    train, held_out = both(config_of(path))
    assert (train.class_names, len(train), len(held_out)) == (["x", "y"], 16, 4)
    assert torch.equal(shades(train).long(), train.ids * 10)
    assert (
        open_split(config_of(write_parquet(tmp_path / "b.parquet", PLAIN)), "train").num_classes
        == 1
    )


def test_sets_above_the_memory_budget_are_decoded_as_they_are_read(tmp_path):
    path = write_parquet(tmp_path / "train.parquet", PLAIN[:20], [0, 1] * 10)
    for source in (path, write_folder(tmp_path / "folder"), "digits"):
        small, large = (open_split(config_of(source, memory_mib=mib), "train") for mib in (1024, 0))
        keys = [(0, index) for index in (5, 0, 3, 3, len(small) - 1)]
        one, other = small.gather(keys), large.gather(keys)
        assert all(torch.equal(one[name], other[name]) for name in ("images", "labels", "ids"))
        assert small.identity() == large.identity()


def test_hub(monkeypatch):
    import datasets

    def rows(start, stop):
        features = datasets.Features(
            {"img": datasets.Image(), "label": datasets.ClassLabel(names=["even", "odd"])}
        )
        images = [{"bytes": PLAIN[i], "path": None} for i in range(start, stop)]
        table = {"img": images, "label": [i % 2 for i in range(start, stop)]}
        return datasets.Dataset.from_dict(table, features=features)

    def load(name):
        if name != "someone/numbers":
            raise FileNotFoundError("no such\nthing")
        return datasets.DatasetDict(
            {"train": rows(0, 10), "test": rows(10, 15), "extra": rows(15, 20)}
        )

    monkeypatch.setattr(datasets, "load_dataset", load)
    train, held_out = both(config_of("hub:someone/numbers"))
    assert (train.name, train.class_names) == ("numbers", ["even", "odd"])
    assert shades(train).tolist() == list(range(0, 100, 10)) and train.labels.tolist() == [0, 1] * 5
    assert shades(held_out).tolist() == list(range(100, 150, 10))
    with pytest.raises(UserError, match=r"hub:someone/numbrs cannot be loaded \(no such thing\)"):
        open_split(config_of("hub:someone/numbrs"), "train")


# Bad items within a source


@pytest.fixture
def damaged(tmp_path):
    """40 training images, two of them unreadable."""
    root = write_folder(tmp_path / "set" / "train", count=20)
    write_folder(tmp_path / "set" / "test", count=2)
    whole = (root / "cats" / "003.png").read_bytes()
    (root / "cats" / "003.png").write_bytes(whole[: len(whole) // 2])
    (root / "dogs" / "000.png").write_text("not an image")
    return tmp_path / "set"


def test_bad_items_are_left_out_counted_and_listed(damaged):
    train = open_split(config_of(damaged), "train")
    again = open_split(config_of(damaged), "train")
    assert len(train) == 38 and torch.equal(train.ids, again.ids)
    assert [line.split(":")[0] for line in train.bad] == [
        "train/cats/003.png",
        "train/dogs/000.png",
    ]
    assert "skipped 2 (train/cats/003.png: " in train.summary() and "\n" not in train.summary()
    assert open_split(config_of(damaged), "held_out").bad == []
    assert torch.equal(shades(train).long() % 2, train.labels)


def test_too_many_bad_items_are_an_error(damaged):
    with pytest.raises(
        UserError, match=r"too many of its 40 train images.*: 2 \(train/cats/003.png"
    ):
        open_split(config_of(damaged, max_bad=0.04), "train")


def test_bad_items_of_a_large_set_give_the_next_of_their_class(damaged):
    train = open_split(config_of(damaged, memory_mib=0), "train")
    keys = [(0, index) for index in range(40)]
    with pytest.warns(UserWarning, match=r"skipped 1 \(train/"):
        batch = train.gather(keys)
    assert len(train) == 40 and len(train.bad) == 2
    assert torch.equal(batch["labels"], train.labels)
    changed = torch.nonzero(batch["ids"] != train.ids).flatten()
    assert torch.equal(batch["ids"][changed], train.ids[changed] + 1) and len(changed) == 2
    again = train.gather(keys)
    assert torch.equal(again["images"], batch["images"]) and len(train.bad) == 2
    strict = open_split(config_of(damaged, memory_mib=0, max_bad=0.04), "train")
    with pytest.warns(UserWarning), pytest.raises(UserError, match="too many of its 40"):
        strict.gather(keys)


def test_a_reader_judges_by_what_it_read(tmp_path, monkeypatch):
    """A process that sees a part of a large set need not see as many bad items as the whole may
    have."""
    monkeypatch.setattr(dataset, "FEWEST_READS", 20)
    root = write_folder(tmp_path / "train", classes=["a"], count=200)
    write_folder(tmp_path / "test", classes=["a"], count=1)
    for number in range(4, 200, 10):
        (root / "a" / f"{number:03d}.png").write_bytes(b"damaged")
    part = [(0, index) for index in range(60)]
    with (
        pytest.warns(UserWarning, match="skipped 1"),
        pytest.raises(UserError, match=r"too many of its \d+ train"),
    ):
        open_split(config_of(tmp_path, memory_mib=0), "train").gather(part)
    patient = open_split(config_of(tmp_path, memory_mib=0, max_bad=0.2), "train")
    with pytest.warns(UserWarning) as lines:
        patient.gather(part)
    assert len(patient.bad) == 6 and [str(line.message).split()[2] for line in lines] == [
        "1",
        "2",
        "4",
    ]


def test_files_that_are_no_images_are_not_waited_for(tmp_path):
    root = write_folder(tmp_path / "set", count=30)
    os.mkfifo(root / "cats" / "900.png")
    (root / "cats" / "901.png").symlink_to("/dev/zero")
    (root / "cats" / "902.png").symlink_to(root / "missing")
    with open(root / "cats" / "903.png", "wb") as file:
        file.truncate(2**28 + 1)
    parts = both(config_of(root, max_bad=0.5))
    lines = {line.split(": ")[0]: line for part in parts for line in part.bad}
    for number, reason in enumerate(
        ["no regular file", "no regular file", "No such file", "more than 268435456"]
    ):
        assert reason in lines.pop(f"cats/90{number}.png")
    assert not lines and sum(map(len, parts)) == 60


def test_images_beside_the_class_folders_are_not_taken_silently(tmp_path):
    write_folder(tmp_path, count=30)
    (tmp_path / "cover.png").write_bytes(PLAIN[0])
    train, held_out = both(config_of(tmp_path))
    assert len(train) + len(held_out) == 60
    assert train.bad + held_out.bad == ["cover.png: has no class, unlike others"]


def test_missing_labels_and_bytes_are_bad_items(tmp_path):
    images = [*PLAIN[:20], None]
    path = write_parquet(tmp_path / "a.parquet", images, [None, *[0] * 10, *[1] * 10], ["a", "b"])
    train, held_out = both(config_of(path, max_bad=0.5))
    assert sorted(train.bad + held_out.bad) == [
        "a.parquet row 0: has no class, unlike others",
        "a.parquet row 20: has no bytes",
    ]


# Messages


def test_messages_name_value_and_remedy(tmp_path):
    def message(source, split="train"):
        with pytest.raises(UserError) as error:
            open_split(config_of(source), split)
        assert "\n" not in str(error.value) and str(source).removeprefix("hub:") in str(error.value)
        return str(error.value)

    assert "no such file or folder; give a folder of images" in message(tmp_path / "missing")
    assert "did you mean digits?" in message("digit")
    assert "write hub:someone/pictures" in message("someone/pictures")
    assert "is empty" in message(tmp_path)
    (tmp_path / "notes.txt").write_text("no image")
    assert "holds no images (.png .jpg" in message(tmp_path)
    assert "no folder, .parquet or .tar file: unpack it" in message(tmp_path / "notes.txt")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and then nothing")
    assert "cannot be read as parquet" in message(tmp_path / "broken.parquet")

    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["a"], "label": [0]}), tmp_path / "text.parquet")
    assert "has no column image: {bytes, path}, only text, label" in message(
        tmp_path / "text.parquet"
    )
    write_parquet(tmp_path / "float.parquet", PLAIN[:2], [0.5, 1.5])
    assert "labels are float, not class numbers" in message(tmp_path / "float.parquet")
