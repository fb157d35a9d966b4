"""WebDataset shards: places by an index that agrees with tarfile, exact order, and nothing that a
tar could set off."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image

from tokenizer.data import tar_index
from tokenizer.data.dataset import DataConfig, open_split
from tokenizer.data.source import open_listing
from tokenizer.data.tar_shards import MAX_SHARDS, expand_braces
from tokenizer.data.transforms import BadImage, to_uint8
from training import distributed
from training.errors import UserError

SIZE = 8
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "tessera" / "tars"


def png(shade):
    buffer = io.BytesIO()
    Image.fromarray(np.full((SIZE, SIZE, 3), shade, dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_shard(path, entries, kind="pax"):
    """Entries (name, bytes), or TarInfo that stand for themselves, in order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=FORMATS[kind]) as tar:
        for entry in entries:
            if isinstance(entry, tarfile.TarInfo):
                tar.addfile(entry)
            else:
                member = tarfile.TarInfo(entry[0])
                member.size, member.mtime = len(entry[1]), 1.5
                tar.addfile(member, io.BytesIO(entry[1]))
    return path


def samples(numbers, label=lambda number: {"cls": str(number % 2).encode()}, extension="png"):
    """Members of samples, each an image whose shade is its number and what `label` gives."""
    for number in numbers:
        for suffix, data in ({extension: png(number)} | label(number)).items():
            yield f"{number:06d}.{suffix}", data


def shards(root, counts=(5, 7, 8), **options):
    first = 0
    for place, count in enumerate(counts):
        write_shard(
            root / f"shards-{place:06d}.tar", samples(range(first, first + count), **options)
        )
        first += count
    return root


def config_of(source, **options):
    return DataConfig(source=str(source), image_size=SIZE, **options)


def shades(images):
    """Of every image of a split, in order."""
    return to_uint8(images.gather([(0, i) for i in range(len(images))])["images"])[
        :, 0, 0, 0
    ].tolist()


def everything(source, **options):
    """Shades and labels of a whole source in its order, and its class names."""
    parts = [open_split(config_of(source, **options), split) for split in ("train", "held_out")]
    found = {}
    for images in parts:
        found |= dict(zip(images.ids.tolist(), zip(shades(images), images.labels.tolist())))
    return [found[item] for item in sorted(found)], parts[0].class_names


# Places


@pytest.mark.parametrize("kind", FORMATS)
def test_headers_are_read_as_tarfile_reads_them(tmp_path, kind):
    random = np.random.default_rng(0)
    names = [
        "a.png",
        "./b.png",
        "folder/" * 12 + "c" * 60 + ".png",
        "d" * 99 + "/" + "e" * 90 + ".png",
        "déjà.png",
    ]
    if kind != "ustar":
        names += ["f" * 300 + ".png", "g" * 300 + "/" + "h" * 5000 + ".png", "日本/猫.png"]
    link = tarfile.TarInfo("link.png")
    link.type, link.linkname = tarfile.SYMTYPE, "k" * (90 if kind == "ustar" else 300)
    folder = tarfile.TarInfo("folder")
    folder.type = tarfile.DIRTYPE
    entries = [(name, random.bytes(int(random.integers(2000)))) for name in names]
    path = write_shard(
        tmp_path / "a.tar", [folder, *entries[:2], link, *entries[2:], ("empty.cls", b"")], kind
    )
    with tarfile.open(path) as tar:
        expected = [
            (m.name.encode(), m.type, m.offset_data, m.size)
            for m in tar
            if not tar.pax_headers.get("GNU.sparse.name")
        ]
    with open(path, "rb") as file:
        found = [
            (m.name.removesuffix(b"/"), m.kind, m.offset, m.size)
            for m in tar_index.members(file.fileno())
        ]
    assert found == expected and len(found) == len(names) + 3


def test_large_sizes_are_read_without_their_data(tmp_path):
    """More than 8 GiB, which octal digits do not hold; the file is a hole."""
    for kind in ("gnu", "pax"):
        member = tarfile.TarInfo("huge.npy")
        member.size = 9 * 2**30 + 5
        with open(tmp_path / "a.tar", "wb") as file:
            file.write(member.tobuf(FORMATS[kind]))
            file.seek(-(-member.size // 512) * 512, os.SEEK_CUR)
            file.write(write_shard(tmp_path / "b.tar", samples([3])).read_bytes())
        index = tar_index.scan(tmp_path / "a.tar")
        assert index.offsets.tolist()[0] == -1 and index.offsets[1] > member.size
        assert open_listing(str(tmp_path / "a.tar"), 0).read(1) == png(3)


@pytest.mark.parametrize("extension", ["png", "PNG", "img.png"])
def test_order_is_that_of_the_shards(tmp_path, extension):
    found, class_names = everything(shards(tmp_path / "set", extension=extension))
    assert found == [(number, number % 2) for number in range(20)] and class_names == ["0", "1"]


def test_shards_give_what_a_folder_gives(tmp_path):
    """The same batches, whether decoded once or as they are read, and after a change of how they
    are kept."""
    root = shards(tmp_path / "set")
    eager = open_split(config_of(root, augment="flip_shift"), "train", augment=True, seed=4)
    lazy = open_split(
        config_of(root, augment="flip_shift", memory_mib=0), "train", augment=True, seed=4
    )
    keys = [(epoch, index) for epoch in range(3) for index in range(len(lazy))]
    one, other = eager.gather(keys), lazy.gather(keys)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert eager.identity() == lazy.identity() and eager.identity()["source"] == "set"


def test_the_image_is_the_plain_one(tmp_path):
    entries = [
        ("a.seg.png", png(1)),
        ("a.png", png(2)),
        ("a.jpg", png(3)),
        ("b.depth.png", png(4)),
        ("c.txt", b""),
    ]
    listing = open_listing(str(write_shard(tmp_path / "a.tar", entries)), 0)
    assert [listing.read(0), listing.read(1)] == [png(2), png(4)]
    assert listing.refused == {2: "holds no image"} and listing.where(2) == "a/c"
    with pytest.raises(BadImage, match="holds no image"):
        listing.read(2)


def test_what_belongs_to_no_sample_is_passed_over(tmp_path):
    folder = tarfile.TarInfo("0")
    folder.type = tarfile.DIRTYPE
    listed = [
        ("README", b"text"),
        ("0/._a.png", b"of another system"),
        ("0/a.png", png(1)),
        ("0/b.png", png(2)),
    ]
    assert everything(write_shard(tmp_path / "a.tar", [folder, *listed])) == (
        [(1, 0), (2, 0)],
        ["0"],
    )


# Classes


def test_classes_come_from_cls_then_json_then_the_folder(tmp_path):
    def named(text):
        return {"json": json.dumps({"label": text, "caption": "…"}).encode()}

    both = named(9) | {"cls": b"4\n"}
    cases = [
        ([*samples([1, 2], lambda number: named(number))], ["1", "2"]),
        ([*samples([1, 2], lambda number: named("ab"[number % 2]))], ["a", "b"]),
        (
            [*samples([1], lambda number: both), *samples([2], lambda number: {"cls": b"3"})],
            ["3", "4"],
        ),
        (
            [
                ("x/a.png", png(1)),
                ("y/z/b.png", png(2)),
                ("./y/c.png", png(3)),
                ("y/c.json", b"{}"),
            ],
            ["x", "y"],
        ),
        ([*samples([1, 2], lambda number: {"json": b"[1]"})], ["all"]),
    ]
    for place, (entries, class_names) in enumerate(cases):
        listing = open_listing(str(write_shard(tmp_path / f"{place}.tar", entries)), 0)
        assert listing.class_names == class_names and not listing.refused


def test_classes_are_those_of_all_shards(tmp_path):
    for place, classes in enumerate([[7, 3], [11, 7], [5]]):
        entries = [
            entry
            for n in classes
            for entry in ((f"{n}.png", png(n)), (f"{n}.cls", str(n).encode()))
        ]
        write_shard(tmp_path / f"{place}.tar", entries)
    listing = open_listing(str(tmp_path), 0)
    assert listing.class_names == ["3", "5", "7", "11"] and listing.labels.tolist() == [
        2,
        0,
        3,
        2,
        1,
    ]


def test_one_long_name_of_a_class_does_not_widen_the_others(tmp_path):
    def named(number):
        return {
            "json": json.dumps(
                {"label": "x" * (100_000 if number == 7 else 1) + str(number)}
            ).encode()
        }

    index = tar_index.scan(write_shard(tmp_path / "a.tar", samples(range(200), named)))
    assert sum(part.nbytes for part in index) < 10 * 100_000


def test_a_sample_without_a_class_among_others_is_listed(tmp_path):
    entries = [*samples(range(60)), ("lost.png", png(3)), ("folder/lost.png", png(4))]
    path = write_shard(tmp_path / "a.tar", entries)
    images, held = (
        open_split(config_of(path, max_bad=0.2), split) for split in ("train", "held_out")
    )
    lost = ["a/folder/lost: has no class, unlike others", "a/lost: has no class, unlike others"]
    assert sorted(images.bad + held.bad) == lost and images.class_names == ["0", "1"]


# The index


def test_headers_are_read_once(tmp_path, cache, monkeypatch, capsys):
    root = shards(tmp_path / "set")
    first = everything(root)
    assert capsys.readouterr().out == "reading the headers of 3 shards, once\n"
    assert len(list(cache.iterdir())) == 3
    scanned = []
    scan = tar_index.scan
    monkeypatch.setattr(tar_index, "scan", lambda path: scanned.append(path.name) or scan(path))
    assert everything(root) == first and not scanned
    os.utime(root / "shards-000001.tar", ns=(0, 1))
    damaged = sorted(cache.iterdir())[0]
    assert everything(root) == first and scanned == ["shards-000001.tar"]
    for data in (b"", b"no index", damaged.read_bytes()[:-30]):
        damaged.write_bytes(data)
        scanned.clear()
        assert everything(root) == first and len(scanned) == 1
    write_shard(root / "shards-000002.tar", samples(range(50, 52)))
    assert everything(root)[0][-2:] == [(50, 0), (51, 1)] and not list(cache.glob(".*"))


def test_other_labels_under_the_same_size_and_date_are_read(tmp_path):
    """As cp -p, rsync --times and tar leave a shard that was written anew."""

    def put(*labels):
        members = [
            ((f"{n}.png", png(n)), (f"{n}.cls", b"%d" % label)) for n, label in enumerate(labels)
        ]
        return write_shard(tmp_path / "a.tar", [member for pair in members for member in pair])

    path = put(0, 0, 1, 1)
    assert everything(path)[0] == [(0, 0), (1, 0), (2, 1), (3, 1)]
    found = path.stat()
    put(0, 1, 0, 1)
    while (
        path.stat().st_ctime_ns == found.st_ctime_ns or path.stat().st_mtime_ns != found.st_mtime_ns
    ):
        os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (found.st_size, found.st_mtime_ns)
    assert everything(path)[0] == [(0, 0), (1, 1), (2, 0), (3, 1)]


def test_an_index_with_a_flipped_bit_is_made_again(tmp_path, cache):
    path = write_shard(tmp_path / "a.tar", samples(range(3)))
    first = everything(path)
    (kept,) = cache.iterdir()
    whole, index = kept.read_bytes(), tar_index.scan(path)
    for place in range(
        0, len(whole), 3
    ):  # headers of the archive, of its arrays, and what they hold
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        kept.write_bytes(damaged)
        made = tar_index.index_of(path)
        assert all(map(np.array_equal, made, index)), place
        if place % 100 == 0:
            kept.write_bytes(damaged)
            assert everything(path) == first, place


def test_an_index_that_cannot_be_kept_is_not_needed(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(everything(shards(tmp_path / "set"))[0]) == 20


def test_processes_begin_at_different_shards(tmp_path, monkeypatch):
    root, order = shards(tmp_path / "set", (1, 1, 1, 1)), []
    monkeypatch.setattr(
        tar_index,
        "scan",
        lambda path, scan=tar_index.scan: order.append(path.name[-5]) or scan(path),
    )
    monkeypatch.setattr("tokenizer.data.tar_shards.READERS", 1)
    monkeypatch.setattr(distributed, "world", lambda: 2)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    assert open_listing(str(root), 0).labels.tolist() == [0, 1, 0, 1] and order == [
        "2",
        "3",
        "0",
        "1",
    ]


def test_memory_per_item_is_some_tens_of_bytes(tmp_path):
    """A million samples with short names are 40 MB: arrays, no object per sample."""
    count = 5_000
    whole = write_shard(
        tmp_path / "one.tar", [("0000000.cls", b"1"), ("0000000.jpg", b"x")], "ustar"
    ).read_bytes()
    blocks = bytearray(whole[: 4 * 512] * count)
    for number in range(count):
        for start in (4 * 512 * number, 4 * 512 * number + 2 * 512):
            header = bytearray(blocks[start : start + 512])
            header[:7] = b"%07d" % number
            header[148:156] = b" " * 8
            blocks[start : start + 512] = header[:148] + b"%06o\0 " % sum(header) + header[156:]
    (tmp_path / "many.tar").write_bytes(bytes(blocks) + b"\0" * 1024)
    open_listing(str(tmp_path / "many.tar"), 0)
    tracemalloc.start()
    listing = open_listing(str(tmp_path / "many.tar"), 0)
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(listing.labels) == count and listing.key(count - 1) == "many/0004999"
    assert used < 50 * count


# Patterns and splits


def test_braces_count_and_list():
    assert expand_braces("a-{008..011}.tar") == ["a-008.tar", "a-009.tar", "a-010.tar", "a-011.tar"]
    assert expand_braces("{x,y}-{0..1}.tar") == ["x-0.tar", "x-1.tar", "y-0.tar", "y-1.tar"]
    assert len(expand_braces("s-{000000..000099}.tar")) == 100
    for pattern in ("a-{5..4}.tar", "a-{0..99999999}.tar", "{0..1999}{0..1999}.tar"):
        with pytest.raises(UserError, match=f"{MAX_SHARDS} shards"):
            expand_braces(pattern)


def test_patterns_name_shards(tmp_path):
    root = shards(tmp_path / "set")
    whole = everything(root)
    assert everything(root / "shards-{000000..000002}.tar") == whole
    assert everything(root / "shards-{000001,000002}.tar")[0] == whole[0][5:]
    assert everything(root / "shards-000001.tar")[0] == whole[0][5:12]
    with pytest.raises(UserError, match=r"2 of 5 shards are missing: .*shards-000003\.tar"):
        open_listing(str(root / "shards-{000000..000004}.tar"), 0)
    with pytest.raises(UserError, match="no such file or folder"):
        open_listing(str(root / "shards-000009.tar"), 0)


@pytest.mark.parametrize(
    "names", [("train-0", "train-1", "validation-0"), ("train/0", "train/1", "val/0")]
)
def test_shards_with_their_own_split(tmp_path, names):
    for place, name in enumerate([*names, "notes-0"]):
        write_shard(tmp_path / f"{name}.tar", samples(range(10 * place, 10 * place + 4)))
    train, held_out = (open_split(config_of(tmp_path), split) for split in ("train", "held_out"))
    assert shades(train) == [0, 1, 2, 3, 10, 11, 12, 13] and shades(held_out) == [20, 21, 22, 23]


@pytest.mark.parametrize("above", ["train_and_val", "test sets", "val"])
def test_splits_below_a_folder_that_speaks_of_splits(tmp_path, above):
    for place, name in enumerate(["train/0", "val/0"]):
        write_shard(tmp_path / above / f"{name}.tar", samples(range(10 * place, 10 * place + 4)))
    train, held_out = (open_split(config_of(tmp_path), split) for split in ("train", "held_out"))
    assert shades(train) == [0, 1, 2, 3] and shades(held_out) == [10, 11, 12, 13]


def test_archives_beside_their_images_are_no_source(tmp_path):
    shards(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").write_bytes(png(1))
    assert open_listing(str(tmp_path), 0).class_names == ["a"]


# Hostile and damaged shards


class Payload:
    """Would make a file if anything unpickled it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def special(name, kind, target=""):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def test_nothing_that_a_shard_holds_is_run_followed_or_written(tmp_path, monkeypatch):
    import pickle

    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(99))
    trap = tmp_path / "sprung"
    code = pickle.dumps(Payload(trap))
    shell = f"touch {trap}"
    entries = [
        *samples(range(40)),
        *(
            (f"p{n}.{suffix}", code)
            for n, suffix in enumerate(["pyd", "pickle", "pkl", "pth", "npy", "pt", "bin"])
        ),
        ("p7.jpg", code),
        ("p7.cls", b"1"),
        ("p8.png", png(1)),
        ("p8.cls", f"__import__('os').system('{shell}')"[:32].encode()),
        ("p9.png", png(1)),
        ("p9.json", b"[" * 100_000),
        ("q0.png", png(1)),
        ("q0.json", json.dumps({"label": {"__reduce__": shell}}).encode()),
        (f"q1 | {shell}.png", png(1)),
        (f"pipe:{shell}.jpg", png(1)),
        ("../../escaped.png", png(1)),
        ("a/../../escaped.png", png(1)),
        (str(tmp_path / "absolute.png"), png(1)),
        special("r0.png", tarfile.SYMTYPE, str(secret)),
        special("r1.png", tarfile.LNKTYPE, "000001.png"),
        special("r2.png", tarfile.FIFOTYPE),
        special("r3.png", tarfile.CHRTYPE),
        special("r4.png", tarfile.BLKTYPE),
        special("r5.png", tarfile.GNUTYPE_SPARSE),
    ]
    path = write_shard(tmp_path / "shard.tar", entries)
    before = sorted(tmp_path.rglob("*"))
    listing = open_listing(str(path), 0)
    reasons = {
        listing.where(item).removeprefix("shard/"): reason
        for item, reason in listing.refused.items()
    }
    outside = {name: reason for name, reason in reasons.items() if "leaves" in reason}
    assert len(outside) == 3 and all("escaped" in name or "absolute" in name for name in outside)
    assert {name: reasons[name] for name in ("r0", "r1")} == dict.fromkeys(
        ("r0", "r1"), "is a link"
    )
    assert all("device" in reasons[f"r{n}"] for n in range(2, 6))
    assert all(reasons[f"p{n}"] == "holds no image" for n in range(7))
    assert (
        "class number" in reasons["p8"]
        and "damaged" in reasons["p9"]
        and "neither" in reasons["q0"]
    )
    parts = [open_split(config_of(path, max_bad=0.9), split) for split in ("train", "held_out")]
    assert sorted(shades(parts[0]) + shades(parts[1])) == list(range(40))
    assert sum("p7: is not an image" in line for part in parts for line in part.bad) == 1
    with pytest.raises(UserError, match="too many of its"):
        open_split(config_of(path), "train")
    for source in (
        f"pipe:{shell}",
        f"pipe:{shell} {{0..1}}.tar",
        f"pipe:cat {path} {{0..1}}.tar",
        "http://x/{0..1}.tar",
    ):
        with pytest.raises(UserError, match="no such file or folder"):
            open_listing(source, 0)
    assert sorted(tmp_path.rglob("*")) == before and not trap.exists()


def test_an_image_or_label_that_is_too_large_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(tar_index.MAX_BYTES, "png", 1000)
    entries = [("a.png", bytes(1001)), ("b.png", png(1)), ("b.cls", b"1" * 33)]
    listing = open_listing(str(write_shard(tmp_path / "a.tar", entries)), 0)
    assert listing.refused == {0: "is too large", 1: "is too large"}


def test_damaged_shards_are_one_line(tmp_path):
    whole = write_shard(tmp_path / "a.tar", samples(range(4)), "ustar").read_bytes()
    cases = [
        (whole[:700], "not all there"),
        (whole[:2048], "without the mark of an end"),
        (b"", "without the mark of an end"),
        (b"x" * 2048, "is no tar at byte 0"),
        (gzip.compress(whole), "is compressed.*decompress"),
        (whole[:1024] + b"\1" * 512 + whole[1536:], "is no tar at byte 1024"),
    ]
    for data, reason in cases:
        (tmp_path / "a.tar").write_bytes(data)
        with pytest.raises(UserError, match=reason) as error:
            open_listing(str(tmp_path / "a.tar"), 0)
        assert "a.tar" in str(error.value) and "\n" not in str(error.value)
    digits = tarfile.TarInfo("a.png")
    digits.pax_headers = {"size": "9" * 5000}  # more than Python reads as a number
    write_shard(tmp_path / "a.tar", [digits])
    with pytest.raises(UserError, match="damaged pax header"):
        open_listing(str(tmp_path / "a.tar"), 0)
    write_shard(tmp_path / "a.tar", [])
    with pytest.raises(UserError, match="holds no samples"):
        open_listing(str(tmp_path / "a.tar"), 0)
    (tmp_path / "a.tar").unlink()
    os.mkfifo(tmp_path / "a.tar")
    with pytest.raises(UserError, match="is no regular file"):
        open_listing(str(tmp_path), 0)


def test_mutated_headers_end_in_an_index_or_a_line(tmp_path):
    """Checksums are mended, so that the fields behind them are met."""
    random = np.random.default_rng(0)
    entries = [
        ("n" * 150 + ".png", png(1)),
        *samples(range(3)),
        special("l.png", tarfile.SYMTYPE, "x"),
    ]
    refused = 0
    for number in range(400):
        kind = list(FORMATS)[number % 3]
        if number < 3:
            write_shard(tmp_path / f"{kind}.tar", entries[kind == "ustar" :], kind)
        data = bytearray((tmp_path / f"{kind}.tar").read_bytes())
        start = int(random.integers(6)) * 512
        for place in random.integers(160, size=1 + number % 4):
            data[start + place] = random.integers(256)
        header = data[start : start + 148] + b" " * 8 + data[start + 156 : start + 512]
        data[start + 148 : start + 156] = b"%06o\0 " % sum(header)
        (tmp_path / "mutated.tar").write_bytes(data)
        try:
            index = tar_index.scan(tmp_path / "mutated.tar")
            assert (index.offsets + index.sizes <= len(data)).all() and (index.sizes >= 0).all()
        except UserError as error:
            refused += 1
            assert "mutated.tar" in str(error)
    assert 20 < refused < 380


def test_a_shard_that_changes_under_a_run_is_not_misread(tmp_path):
    path = write_shard(tmp_path / "a.tar", samples(range(4)))
    listing = open_listing(str(path), 0)
    descriptors = os.listdir("/proc/self/fd") if os.path.exists("/proc/self/fd") else []
    assert [listing.read(item) for item in range(4)] == [png(number) for number in range(4)]
    write_shard(path, samples(range(8)))
    with pytest.raises(BadImage, match="has changed"):
        listing.read(0)
    path.unlink()
    with pytest.raises(BadImage, match="cannot be read"):
        listing.read(0)
    assert not descriptors or len(os.listdir("/proc/self/fd")) == len(descriptors)


# What is an item


def test_no_image_of_a_name_with_dots_vanishes(tmp_path):
    """Names split at the first dot, so that 22.00.jpg … 22.09.jpg are one sample: of ten items."""
    entries = [
        (f"{key}.{frame:02d}.png", png(10 * key + frame)) for key in (2, 3) for frame in range(10)
    ]
    assert everything(write_shard(tmp_path / "a.tar", entries)) == (
        [(shade, 0) for shade in range(20, 40)],
        ["all"],
    )
    listing = open_listing(str(tmp_path / "a.tar"), 0)
    assert [listing.key(item) for item in (0, 9, 10)] == [
        "a/2.00",
        "a/2.09",
        "a/3.00",
    ] and not listing.refused
    assert listing.notes == [
        "2 samples hold several images (2, 3, …): each image is an item of its own"
    ]


def test_labels_of_images_that_share_a_sample(tmp_path):
    """Its own, else its sample's, else the folder's."""
    entries = [
        ("x/v1.a.png", png(1)),
        ("x/v1.a.cls", b"7"),
        ("x/v1.b.png", png(2)),
        ("x/v1.json", b'{"label": 9}'),
        ("x/v2.c.png", png(3)),
        ("x/v2.c.cls", b"5"),
        ("y/v3.d.png", png(4)),
        ("y/v3.cls", b"-1"),
        ("y/v4.png", png(5)),
        ("y/v4.cls", b"5"),
        ("y/v4.mask.cls", b"no number"),
    ]
    listing = open_listing(str(write_shard(tmp_path / "a.tar", entries)), 0)
    names = [*listing.class_names, None]
    assert [names[label] for label in listing.labels.tolist()] == [
        "7",
        "9",
        "5",
        None,
        "5",
    ] and not listing.refused


def test_bad_members_of_a_sample_of_several_images_are_their_own(tmp_path):
    entries = [
        ("a.1.png", png(1)),
        special("a.2.png", tarfile.SYMTYPE, "x"),
        ("a.3.png", png(3)),
        ("a.3.cls", b"x"),
    ]
    listing = open_listing(str(write_shard(tmp_path / "a.tar", entries)), 0)
    assert [listing.key(item) for item in range(3)] == ["a/a.1", "a/a.2", "a/a.3"] and listing.read(
        0
    ) == png(1)
    assert (
        listing.refused.keys() == {1, 2}
        and "link" in listing.refused[1]
        and ".cls" in listing.refused[2]
    )


def test_what_is_passed_over_is_said(tmp_path, monkeypatch):
    entries = [
        ("a.png", png(1)),
        ("a.seg.png", png(2)),
        ("a.jpg", png(3)),
        ("a.txt", b"caption"),
        ("b.png", png(4)),
        ("b.npy", b"0"),
        ("b.txt", b"caption"),
        ("README", b""),
    ]
    path = write_shard(tmp_path / "a.tar", entries)
    said = [
        "passed over 2 images beside the one of their sample (a.jpg, a.seg.png, …)",
        "passed over 4 members of other kinds (.txt 2, .npy 1, without a name or an ending 1)",
    ]
    assert open_listing(str(path), 0).notes == said
    monkeypatch.setattr(tar_index, "scan", lambda path: pytest.fail("was read again"))
    assert open_listing(str(path), 0).notes == said  # from the index that was kept


@pytest.mark.parametrize("extension", ["gif", "bmp", "tif", "ppm", "jp2", "jfif", "JPG"])
def test_every_kind_of_image_is_one_in_a_shard(tmp_path, extension):
    listing = open_listing(str(write_shard(tmp_path / "a.tar", [(f"a.{extension}", png(3))])), 0)
    assert listing.read(0) == png(3)


def test_shards_without_labels(tmp_path):
    path = write_shard(tmp_path / "a.tar", samples(range(4), lambda number: {"cls": b"-1"}))
    assert everything(path) == ([(shade, 0) for shade in range(4)], ["all"])
    path = write_shard(tmp_path / "b.tar", samples(range(4)))
    assert everything(path, label_column="none") == ([(shade, 0) for shade in range(4)], ["all"])
    with pytest.raises(UserError, match=r"data\.label_column=x: data\.source=.* has no use for it"):
        everything(path, label_column="x")


def test_folders_whose_names_are_no_utf8_stay_apart(tmp_path):
    names = [os.fsdecode(name) for name in (b"caf\xe9/a.png", b"caf\xe8/b.png")]
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, errors="surrogateescape") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(png(1))
            tar.addfile(member, io.BytesIO(png(1)))
    assert sorted(open_listing(str(path), 0).class_names) == ["caf\\xe8", "caf\\xe9"]


def test_a_name_that_is_there_twice_counts_twice_and_is_said(tmp_path):
    """`tar -r` leaves the old member, which `tar -x` would overwrite."""
    path = write_shard(tmp_path / "a.tar", [*samples(range(4)), *samples([1, 2])])
    images = open_split(config_of(path), "train")
    assert (
        "2 items have the name of an earlier one in their shard (000001, 000002): both count"
        in images.notes
    )
    assert len(images.ids) + len(open_split(config_of(path), "held_out").ids) == 6
    assert not any(
        "earlier" in note
        for note in open_split(config_of(shards(tmp_path / "plain")), "train").notes
    )
