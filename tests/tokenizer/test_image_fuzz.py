"""Damaged and hostile images through the path of every image: each is decoded or refused, none
crashes or floods."""

from __future__ import annotations

import io
import json
import os
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import processes
import pytest
from PIL import Image, features

from tokenizer.data.dataset import DataConfig, open_split
from tokenizer.data.transforms import ORIENTATION_TAG
from training.errors import UserError

ROOT = Path(__file__).parents[2]
LIMIT_MIB = 200  # that a refused image may cost


def encode(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def seeds():
    """(extension, file) of one small picture in the modes and encodings of each format."""
    levels = np.random.default_rng(0).integers(256, size=(6, 8, 3), dtype=np.uint8)
    picture = Image.fromarray(levels).resize((64, 48), Image.Resampling.BICUBIC)
    grey16 = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
    rotated = Image.Exif()
    rotated[ORIENTATION_TAG] = 6
    frames = {"save_all": True, "append_images": [picture.rotate(90), picture.rotate(180)]}
    return [
        ("jpg", encode(picture, "JPEG", quality=90, exif=rotated)),
        ("jpg", encode(picture, "JPEG", progressive=True)),
        ("jpg", encode(picture.convert("L"), "JPEG")),
        ("jpg", encode(picture.convert("CMYK"), "JPEG")),
        *(
            ("png", encode(picture.convert(mode), "PNG", exif=rotated))
            for mode in ("RGB", "RGBA", "LA", "P", "1")
        ),
        ("png", encode(grey16, "PNG")),
        ("png", encode(picture, "PNG", **frames)),
        ("webp", encode(picture, "WEBP", exif=rotated)),
        ("webp", encode(picture.convert("RGBA"), "WEBP", lossless=True)),
        ("webp", encode(picture, "WEBP", **frames)),
        ("gif", encode(picture, "GIF")),
        ("gif", encode(picture, "GIF", **frames)),
        ("bmp", encode(picture, "BMP")),
        ("bmp", encode(picture.convert("P"), "BMP")),
        *(
            ("tif", encode(picture, "TIFF", compression=name))
            for name in (None, "tiff_lzw", "tiff_deflate", "jpeg")
        ),
        ("tif", encode(picture.convert("1"), "TIFF", compression="group4")),
        ("tif", encode(grey16, "TIFF", tile=(16, 16))),
        ("tif", encode(picture, "TIFF", **frames)),
        ("ppm", encode(picture, "PPM")),
        ("jp2", encode(picture, "JPEG2000", tile_size=(32, 32))),
        *((("avif", encode(picture, "AVIF", exif=rotated)),) if features.check("avif") else ()),
    ]


def flip_bits(data, others, random):
    for place in random.integers(8 * len(data), size=int(random.integers(1, 20))):
        data[place // 8] ^= 1 << place % 8
    return data


def flip_bits_of_the_header(data, others, random):
    data[:64] = flip_bits(data[:64], others, random)
    return data


def truncate(data, others, random):
    return data[: random.integers(len(data))]


def overwrite(data, others, random):
    start, length = int(random.integers(len(data))), int(random.integers(1, 64))
    data[start : start + length] = random.bytes(len(data[start : start + length]))
    return data


def splice(data, others, random):
    """The start of this file, the rest of another."""
    other = others[random.integers(len(others))]
    start = int(random.integers(4, min(len(data), len(other))))
    return (
        data[:start] + other[start if random.random() < 0.5 else int(random.integers(len(other))) :]
    )


def repeat(data, others, random):
    """A piece of the file once more, or left out."""
    start, stop = sorted(random.integers(len(data), size=2).tolist())
    return data[:stop] + data[start:] if random.random() < 0.5 else data[:start] + data[stop:]


def replace(data, others, random):
    """A known first few bytes, then noise."""
    return data[: random.integers(16)] + random.bytes(int(random.integers(400)))


MUTATIONS = (flip_bits, flip_bits_of_the_header, truncate, overwrite, splice, repeat, replace)


def write_mutations(folder, count, seed):
    """`count` files, every mutation of every format in turn."""
    random, originals = np.random.default_rng(seed), seeds()
    folder.mkdir()
    for number in range(count):
        kind, data = originals[number % len(originals)]
        mutate = MUTATIONS[number // len(originals) % len(MUTATIONS)]
        mutated = mutate(bytearray(data), [other for _, other in originals], random)
        (folder / f"{number:05d}-{mutate.__name__}.{kind}").write_bytes(mutated)


READ = """
import json, resource, sys, time, warnings
warnings.simplefilter("error")
from tokenizer.data.dataset import DataConfig, open_split
started = time.monotonic()
counts = []
for memory_mib in (1024, 0):
    config = DataConfig(source=sys.argv[1], image_size=32, max_bad=1.0, memory_mib=memory_mib)
    parts = [open_split(config, split) for split in ("train", "held_out")]
    for part in parts:
        for start in range(0, len(part), 64):
            warnings.filterwarnings("ignore", ".*skipped")
            part.gather([(0, index) for index in range(start, min(start + 64, len(part)))])
    counts.append([sum(len(part) for part in parts), sum(len(part.bad) for part in parts)])
lines = [line for part in parts for line in part.bad]
assert not any("\\n" in line for line in lines), "one line each"
print(json.dumps({"counts": counts, "seconds": time.monotonic() - started}))
"""


def read(folder):
    """Figures of a process that reads every file of a folder, decoded at the start and again as
    they are asked for."""
    done = processes.run("-c", READ, folder)
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr[-2000:]}"
    figures = json.loads(done.stdout.splitlines()[-1])
    (decoded, refused), (listed, refused_again) = figures["counts"]
    assert decoded + refused == listed and refused == refused_again
    return {"decoded": decoded, "refused": refused, "seconds": round(figures["seconds"], 1)}


def test_seeds_are_whole(tmp_path):
    for number, (kind, data) in enumerate(seeds()):
        (tmp_path / f"{number}.{kind}").write_bytes(data)
    config = DataConfig(source=str(tmp_path), image_size=32)
    parts = [open_split(config, split) for split in ("train", "held_out")]
    assert sum(len(part) for part in parts) == len(seeds()) and not any(part.bad for part in parts)


def test_a_sample_of_mutations(tmp_path):
    count = len(seeds()) * len(MUTATIONS)
    write_mutations(tmp_path / "images", count, seed=1)
    figures = read(tmp_path / "images")
    assert figures["decoded"] + figures["refused"] == count
    assert figures["refused"] > count / 4 and figures["decoded"] > count / 10
    with pytest.raises(
        UserError, match=r"too many of its \d+ train images cannot be used: \d+ .* and \d+ more"
    ):
        open_split(DataConfig(source=str(tmp_path / "images"), image_size=32), "train")


@pytest.mark.slow
def test_thousands_of_mutations(tmp_path, capsys):
    count = 3000
    started = time.monotonic()
    write_mutations(tmp_path / "images", count, seed=2)
    figures = read(tmp_path / "images")
    assert figures["decoded"] + figures["refused"] == count
    with capsys.disabled():
        print(
            f"\n{count} mutated images: {figures}, 0 crashes, {time.monotonic() - started:.0f} s in all"
        )


# Bombs


def chunk(name, body):
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width, height, *chunks, lines=0):
    """RGB of 8 bits; the first `lines` are there and black."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(1 + 3 * width) * lines, 1))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + pixels + chunk(b"IEND", b"")


def tiff(width, height, pages=1, tile=None, data=b""):
    """Grey of 8 bits, by deflate; every page has the same data and leads to the next, the last to
    the first."""
    data = zlib.compress(data or bytes(1000))
    size = {256: width, 257: height, 258: 8, 259: 8, 262: 1, 277: 1}
    places = (
        {322: tile[0], 323: tile[1], 324: 8, 325: len(data)}
        if tile
        else {273: 8, 278: height, 279: len(data)}
    )
    entries = sorted((size | places).items())
    directory = struct.pack("<H", len(entries)) + b"".join(
        struct.pack("<HHII", tag, 4, 1, v) for tag, v in entries
    )
    first, length = 8 + len(data), len(directory) + 4
    nexts = [first + length * (page + 1) for page in range(pages - 1)] + [first]
    return (
        b"II*\0"
        + struct.pack("<I", first)
        + data
        + b"".join(directory + struct.pack("<I", n) for n in nexts)
    )


def gif(screen, frame, frames=1):
    """Squares, of which each frame holds one pixel."""
    image = b"\x2c" + struct.pack("<HHHHB", 0, 0, frame, frame, 0) + b"\x02\x02\x44\x01\x00"
    return (
        b"GIF89a"
        + struct.pack("<HHBBB", screen, screen, 0x80, 0, 0)
        + bytes(6)
        + image * frames
        + b"\x3b"
    )


def text_chunks(count):
    """Compressed texts of just under 1 MiB, the most that Pillow takes at once, in 1 KiB."""
    body = zlib.compress(bytes(2**20 - 16), 9)
    return [chunk(b"zTXt", b"%d\0\0" % number + body) for number in range(count)]


BOMBS = {
    "png-30000": lambda: png(30_000, 30_000, lines=100),
    "png-9000": lambda: png(9_000, 9_000, lines=3_000),
    "png-texts": lambda: png(8, 8, *text_chunks(500), lines=8),
    "png-profile": lambda: png(
        8, 8, chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(2**26), 9)), lines=8
    ),
    "gif-screen": lambda: gif(60_000, 1),
    "gif-frame": lambda: gif(8, 60_000),
    "gif-frames": lambda: gif(64, 1, frames=20_000),
    "tiff-picture": lambda: tiff(30_000, 30_000),
    "tiff-pages": lambda: tiff(16, 16, pages=15_000),
    "tiff-tile": lambda: tiff(16, 16, tile=(30_000, 30_000)),
    "tiff-tile-whole": lambda: tiff(16, 16, tile=(9_000, 9_000), data=bytes(9_000**2)),
    "webp-canvas": lambda: (
        b"RIFF\x1a\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + b"\xff\x3f\0" * 2 + bytes(4)
    ),
    "bmp-picture": lambda: (
        b"BM" + struct.pack("<IIIIiiHHIIiiII", 54, 0, 54, 40, 40_000, 40_000, 1, 24, *[0] * 6)
    ),
    "ppm-picture": lambda: b"P6 50000 50000 255\n" + bytes(100),
}

MEASURE = """
import io, sys, time
from PIL import Image
from tokenizer.data.transforms import BadImage, FORMATS, decode
for kind in FORMATS:
    small = io.BytesIO()
    Image.new("RGB", (8, 8)).save(small, kind)
    decode(small.getvalue(), 8, 10**6)  # loads what a first image of a format loads
def peak():
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
for path in sys.argv[1:]:
    data = open(path, "rb").read()
    open("/proc/self/clear_refs", "w").write("5")
    before, started = peak(), time.monotonic()
    try:
        decode(data, 8, 64_000_000)
        result = "decoded"
    except BadImage as error:
        result = str(error)
    print(path, round(peak() - before), round(time.monotonic() - started, 1), result, sep="\\t")
"""


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="peaks of memory are Linux's"
)
def test_bombs_are_refused_in_little_memory(tmp_path):
    paths = [tmp_path / name for name in BOMBS]
    for path in paths:
        path.write_bytes(BOMBS[path.name]())
        assert path.stat().st_size < 2**21
    done = processes.run("-c", MEASURE, *paths)
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr[-2000:]}"
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    rises = {Path(path).name: int(rise) for path, rise, _, _ in rows}
    print(done.stdout)
    assert rises.keys() == BOMBS.keys() and max(rises.values()) < LIMIT_MIB, rises
    results = {Path(path).name: result for path, _, _, result in rows}
    decodable = {"gif-frames", "tiff-pages", "png-profile", "png-texts"}
    assert all(result != "decoded" for name, result in results.items() if name not in decodable), (
        results
    )
