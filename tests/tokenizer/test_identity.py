"""A data set is what it holds: any change of names, classes, split or contents is noticed, a move
is none."""

from __future__ import annotations

import dataclasses
import io
import json
import multiprocessing
import os
import re
import shutil
import tarfile
import time

import numpy as np
import pytest
import torch
from PIL import Image

from tokenizer.data import digests, identity
from tokenizer.data.dataset import DataConfig, open_split, take_inventories
from tokenizer.data.digests import FileDigests, file_digests
from tokenizer.data.identity import open_run
from tokenizer.data.source import open_listing
from training import distributed
from training.errors import UserError

SIZE = 4


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "tessera" / "digests"


@pytest.fixture
def trusting(monkeypatch):
    """Files count as old enough to be known by their times."""
    monkeypatch.setattr(digests, "YOUNG_NS", 0)


@pytest.fixture
def reads(monkeypatch):
    """The names of the files that are read to know them."""
    names, read = [], digests._read_digest
    monkeypatch.setattr(
        digests,
        "_read_digest",
        lambda path, *rest: names.append(os.path.basename(path)) or read(path, *rest),
    )
    return names


def png(shade):
    buffer = io.BytesIO()
    Image.fromarray(np.full((SIZE, SIZE, 3), shade, dtype=np.uint8)).save(
        buffer, "PNG", compress_level=0
    )
    return buffer.getvalue()


def write_images(root, classes=("cats", "dogs"), count=5, first=0):
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            (root / name / f"{number}.png").write_bytes(png(first + 10 * label + number))
    return root


def write_tars(root):
    root.mkdir()
    for shard in range(2):
        with tarfile.open(root / f"{shard}.tar", "w") as tar:
            for number in range(5):
                for name, data in (
                    (f"{number}.png", png(shard * 5 + number)),
                    (f"{number}.cls", b"%d" % (number % 2)),
                ):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return root


def write_parquet(root):
    import pyarrow as pa
    import pyarrow.parquet as pq

    root.mkdir(exist_ok=True)
    for name, first in (("train-0", 0), ("test-0", 6)):
        images = [{"bytes": png(first + number), "path": None} for number in range(6)]
        pq.write_table(
            pa.table({"image": images, "label": ["a", "b"] * 3}), root / f"{name}.parquet"
        )
    return root


def config_of(source, **options):
    return DataConfig(source=str(source), image_size=SIZE, **options)


def identities(source, **options):
    """(train, held out) without decoding, which those of the opened splits have to equal."""
    config = config_of(source, **options)
    found = {split: inventory.sha256 for split, inventory in take_inventories(config).items()}
    assert found == {split: open_split(config, split).identity()["ids_sha256"] for split in found}
    return found["train"], found["held_out"]


def held_out_of(source):
    listing = open_listing(str(source), 0)
    return [listing.key(item) for item in open_split(config_of(source), "held_out").ids.tolist()]


# What makes a data set another one


def overwrite(root):
    """In place, with the size and the times of before."""
    path = root / "cats" / "1.png"
    before = path.stat()
    path.write_bytes(png(77))
    assert path.stat().st_size == before.st_size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def swap(root):
    one, other = root / "cats" / "0.png", root / "cats" / "1.png"
    contents = one.read_bytes(), other.read_bytes()
    one.write_bytes(contents[1]), other.write_bytes(contents[0])


def write_saved(root):
    import datasets

    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
    )
    images = [{"bytes": png(number), "path": None} for number in range(10)]
    rows = datasets.Dataset.from_dict({"image": images, "label": [0, 1] * 5}, features=features)
    datasets.DatasetDict({"train": rows}).save_to_disk(str(root))
    return root


CHANGES = {
    "overwritten": overwrite,
    "swapped": swap,
    "added": lambda root: (root / "cats" / "new.png").write_bytes(png(50)),
    "added of the same contents": lambda root: shutil.copy(
        root / "cats" / "1.png", root / "cats" / "9.png"
    ),
    "removed": lambda root: (root / "dogs" / "2.png").unlink(),
    "renamed": lambda root: (root / "dogs" / "2.png").rename(root / "dogs" / "zwei.png"),
    "of another class": lambda root: (root / "dogs" / "2.png").rename(root / "cats" / "dog.png"),
    "class renamed": lambda root: (root / "dogs").rename(root / "wolves"),
    "class added": lambda root: write_images(root, ["birds"]),
    "class removed": lambda root: shutil.rmtree(root / "dogs"),
    "became unreadable": lambda root: (
        (root / "cats" / "1.png").unlink() or (root / "cats" / "1.png").mkdir()
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_another_identity(tmp_path, trusting, change):
    before = identities(write_images(tmp_path / "set"))
    assert identities(tmp_path / "set") == before
    CHANGES[change](tmp_path / "set")
    assert identities(tmp_path / "set") != before


def test_a_split_has_its_own_identity(tmp_path):
    for split in ("train", "validation"):
        write_images(tmp_path / split)
    train, held_out = identities(tmp_path)
    (tmp_path / "train" / "cats" / "0.png").write_bytes(png(99))
    assert identities(tmp_path)[0] != train and identities(tmp_path)[1] == held_out
    (tmp_path / "train" / "cats" / "0.png").rename(tmp_path / "validation" / "cats" / "x.png")
    assert identities(tmp_path)[1] != held_out


def test_which_images_are_held_out_is_part_of_it(tmp_path):
    write_images(tmp_path / "set")
    assert identities(tmp_path / "set", held_out=0.2) != identities(tmp_path / "set", held_out=0.4)


WRITERS = {
    "folder": write_images,
    "tars": write_tars,
    "parquet": write_parquet,
    "saved": write_saved,
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_data_set_that_moved_is_the_same(tmp_path, trusting, write):
    before = identities(write(tmp_path / "here"))
    (tmp_path / "far").mkdir()
    shutil.move(tmp_path / "here", tmp_path / "far" / "there")
    assert identities(tmp_path / "far" / "there") == before
    shutil.copytree(tmp_path / "far" / "there", tmp_path / "copy")
    (tmp_path / "link").symlink_to(tmp_path / "copy")
    assert identities(tmp_path / "copy") == before == identities(tmp_path / "link")


def test_a_single_parquet_file_may_have_another_name(tmp_path):
    path = write_parquet(tmp_path / "here") / "train-0.parquet"
    before = identities(path)
    assert identities(path.rename(tmp_path / "numbers.parquet")) == before


@pytest.mark.parametrize("write", [write_tars, write_parquet], ids=["tars", "parquet"])
def test_shards_with_other_contents_are_another_data_set(tmp_path, trusting, write):
    root = write(tmp_path / "set")
    before = take_inventories(config_of(root))
    path = sorted(root.iterdir())[0]
    data, times = path.read_bytes(), path.stat()
    place = data.index(b"IDAT") + 10
    path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    after = take_inventories(config_of(root))
    changed = {split for split in before if before[split].sha256 != after[split].sha256}
    assert changed == ({"train", "held_out"} if write is write_tars else {"held_out"})


def test_rows_of_the_hub(tmp_path, trusting, monkeypatch):
    import datasets

    def write(folder, shade):
        images = [{"bytes": png(shade + number), "path": None} for number in range(10)]
        features = datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
        )
        rows = datasets.Dataset.from_dict({"image": images, "label": [0, 1] * 5}, features=features)
        datasets.DatasetDict({"train": rows}).save_to_disk(str(folder))

    def identity_of(folder):
        monkeypatch.setattr(
            datasets, "load_dataset", lambda name, **rest: datasets.load_from_disk(str(folder))
        )
        read = []
        monkeypatch.setattr(
            "tokenizer.data.hub.HubListing.read",
            lambda self, item, of=read_row: read.append(item) or of(self, item),
        )
        return [each.sha256 for each in take_inventories(config_of("hub:some/rows")).values()], len(
            read
        )

    from tokenizer.data.hub import HubListing

    read_row = HubListing.read
    write(tmp_path / "one", 0), write(tmp_path / "other", 1)
    first = identity_of(tmp_path / "one")
    assert first[1] == 10 and identity_of(tmp_path / "one") == (first[0], 0)  # known again
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    assert identity_of(tmp_path / "copy") == first
    assert identity_of(tmp_path / "other")[0] != first[0]


def test_names_need_not_be_text(tmp_path):
    write_images(tmp_path / "set")
    before = identities(tmp_path / "set")
    name = os.fsencode(tmp_path / "set" / "cats") + b"/\xe9.png"
    with open(name, "wb") as file:
        file.write(png(3))
    assert take_inventories(config_of(tmp_path / "set"))["train"].sha256 != before[0]


# What files hold is read once


def test_files_that_are_as_they_were_are_not_read(tmp_path, trusting, reads, cache):
    root = write_images(tmp_path / "set")
    before = identities(root)
    assert len(reads) == 10 and len(list(cache.iterdir())) == 1
    reads.clear()
    assert identities(root) == before and not reads
    overwrite(root)  # times set back: the time of the change of the inode tells
    os.utime(root / "dogs" / "3.png")
    assert identities(root)[0] != before[0] or identities(root)[1] != before[1]
    assert sorted(reads) == ["1.png", "3.png"]


def test_a_file_just_written_is_read_again(tmp_path, reads, cache):
    """Its clock may not tell a second change from the first."""
    root = write_images(tmp_path / "set")
    take_inventories(config_of(root)), take_inventories(config_of(root))
    assert len(reads) == 20 and not cache.exists()


def test_what_is_kept_may_be_damaged_or_lost(tmp_path, trusting, reads, cache):
    root = write_images(tmp_path / "set")
    before = identities(root)
    (kept,) = cache.iterdir()
    whole = kept.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 4
    for data in (bytes(flipped), whole[:-1], whole[:50], b""):
        kept.write_bytes(data)
        reads.clear()
        assert identities(root) == before and len(reads) == 10
    assert kept.read_bytes() == whole


def test_where_nothing_can_be_kept_it_is_said_and_goes_on(
    tmp_path, trusting, reads, monkeypatch, capsys
):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    root = write_images(tmp_path / "set")
    assert identities(root) == identities(root) and len(reads) == 40
    assert "file cannot be written): they will be read again" in capsys.readouterr().out


def test_what_was_read_before_an_interruption_is_kept(tmp_path, trusting, reads, monkeypatch):
    root, read = write_images(tmp_path / "set"), digests._read_digest

    def stop(path, *rest):
        if len(reads) == 4:
            raise KeyboardInterrupt
        return read(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(digests, "_read_digest", stop)
        with pytest.raises(KeyboardInterrupt):
            take_inventories(config_of(root))
    take_inventories(config_of(root))
    assert len(reads) == 10


def test_what_is_no_file_does_not_block(tmp_path):
    root = write_images(tmp_path / "set")
    os.mkfifo(root / "cats" / "pipe.png")
    (root / "cats" / "nowhere.png").symlink_to("/nowhere")
    assert np.count_nonzero(~take_inventories(config_of(root))["train"].files.sha256.any(1)) <= 2


def test_of_a_file_too_large_to_be_an_image_the_beginning_counts(tmp_path):
    path = tmp_path / "a.png"
    found = []
    for content in (b"x" * 100, b"x" * 99 + b"y", b"x" * 101, b"y" * 100):
        path.write_bytes(content)
        found.append(file_digests(tmp_path, ["a.png"], 50).sha256.tobytes())
    assert found[0] == found[1] and len(set(found)) == 3


def test_a_long_reading_says_how_far_it_is(tmp_path, capsys, monkeypatch):
    path = tmp_path / "a.tar"
    path.write_bytes(bytes(100))
    monkeypatch.setattr(digests, "BLOCK", 10)
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    file_digests(tmp_path, ["a.tar"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 3 and all("read once, to know them again" in line for line in lines)
    assert "30/100" in lines[0]


def test_a_file_that_is_as_it_was_costs_one_stat(tmp_path, trusting, monkeypatch):
    names, count = [f"{number:06d}.png" for number in range(300)], []
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    file_digests(tmp_path, names)
    stat = os.stat
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", lambda path, **rest: count.append(path) or stat(path, **rest))
        patch.setattr(os, "open", lambda path, *rest, **more: pytest.fail(path))
        file_digests(tmp_path, names)
    assert len([path for path in count if str(path).endswith(".png")]) == 300


def of_rank(rank, root, names, results):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    torch.distributed.init_process_group("gloo", f"file://{root}/store", rank=rank, world_size=2)
    read, own = digests._read_digest, []
    digests._read_digest = lambda path, *rest: own.append(path) or read(path, *rest)
    found = file_digests(root, names)
    try:
        file_digests(root, names if rank else names[:-1])
        refused = ""
    except UserError as error:
        refused = str(error)
    results.put((rank, found.sha256.tobytes(), len(own), refused))
    distributed.finish()


def test_ranks_share_the_reading_and_must_see_the_same(tmp_path):
    names = [f"{number}.png" for number in range(7)]
    for number, name in enumerate(names):
        (tmp_path / name).write_bytes(b"x" * number)
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [
        context.Process(target=of_rank, args=(rank, tmp_path, names, results)) for rank in range(2)
    ]
    for process in processes:
        process.start()
    found = sorted(results.get(timeout=60) for _ in processes)
    for process in processes:
        process.join()
    alone = file_digests(tmp_path, names).sha256.tobytes()
    assert [each[1] for each in found] == [alone, alone] and [each[2] for each in found] == [4, 3]
    assert all("find different files there" in each[3] for each in found)


# Runs


@dataclasses.dataclass(frozen=True)
class Config:
    data: DataConfig
    width: int = 8


def begin(folder, source, fresh=False, **settings):
    config = Config(config_of(source), **settings)
    data = [open_split(config.data, split) for split in ("train", "held_out")]
    return open_run(folder, config, data, fresh=fresh)


def refused(*arguments, **settings):
    """What is said: the error itself would keep the run's lock."""
    with pytest.raises(UserError) as caught:
        begin(*arguments, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def trained(tmp_path):
    """The folder of a run with a checkpoint, and its images."""
    source = write_images(tmp_path / "set")
    run = begin(tmp_path / "run", source)
    run.save(1, {"step": 1}, keep=1)
    run._lock.close()
    return tmp_path / "run", source


WORDS = {
    "overwritten": r"1 file changed \(cats/1\.png\);",
    "swapped": r"2 files changed \(cats/0\.png\);",
    "added": r"1 file added \(cats/new\.png\);",
    "added of the same contents": r"1 file added \(cats/9\.png\);",
    "removed": "1 file removed;",
    "renamed": "1 file under another name;",
    "of another class": "1 file under another name;",
    "class renamed": "5 files under another name; class dogs is now wolves;",
    "class added": r"5 files added \(birds/0\.png\); 2 classes are now 3 with birds;",
    "class removed": "5 files removed; 2 classes are now 1 without dogs;",
}


@pytest.mark.parametrize("change", WORDS)
def test_a_run_does_not_go_on_with_other_images(trained, change):
    folder, source = trained
    CHANGES[change](source)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    said = refused(folder, source)
    assert re.match(f"{folder} was made from other images: {WORDS[change]}.*--fresh", said), said
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert begin(folder, source, fresh=True).latest() is None


def test_every_cat_became_a_dog(trained):
    """The classes change places: names, number and files are as they were, and each label is
    wrong."""
    folder, source = trained
    (source / "cats").rename(source / "x")
    (source / "dogs").rename(source / "cats")
    (source / "x").rename(source / "dogs")
    assert "10 files changed (cats/0.png)" in refused(folder, source)


def test_other_labels_of_the_same_files(tmp_path, trained, monkeypatch):
    folder, source = trained

    def swapped(*arguments):
        listing = open_listing(*arguments)
        listing.labels = 1 - listing.labels
        return listing

    monkeypatch.setattr("tokenizer.data.dataset.open_listing", swapped)
    assert "other images: their labels, or the split that they are in;" in refused(folder, source)


def test_a_run_goes_on_where_its_images_moved_to(trained, capsys):
    folder, source = trained
    there = source.rename(source.with_name("photos"))
    assert begin(folder, there).latest()["step"] == 1
    assert (
        f"data.source was {source} and is {there}, which is the same: it goes on"
        in capsys.readouterr().out
    )
    assert f"source: {there}" in (folder / "config.yaml").read_text()
    assert "was made with width=8, and now it is 9" in refused(folder, there, width=9)
    CHANGES["overwritten"](there)
    assert "1 file changed (cats/1.png)" in refused(
        folder, there.rename(source.with_name("pictures"))
    )


def test_a_run_of_an_earlier_version_says_that_it_cannot_tell(trained, capsys):
    folder, source = trained
    for left in ("{}", '{"images": "%s"}' % ("a" * 64), "[]", "no json"):
        (folder / "inputs.json").write_text(left)
        run = begin(folder, source)
        assert run.latest()["step"] == 1
        run._lock.close()
        unknown = (
            "did not note its train images and held_out images: it goes on"
            if "{" in left
            else "is not compared"
        )
        assert capsys.readouterr().out.count(unknown) == 1
        assert json.loads((folder / "inputs.json").read_text()).keys() >= {
            "train images",
            "held_out images",
        }
    (folder / "inputs.json").write_text("{}")
    said = refused(folder, source.rename(source.with_name("photos")))
    assert "was made with data.source=" in said  # nothing says that it is the same


def test_damage_to_what_a_run_noted_costs_words_alone(trained):
    folder, source = trained
    CHANGES["overwritten"](source)
    whole = (folder / identity.FILE).read_bytes()
    for place in range(0, len(whole), 90):
        damaged = bytearray(whole)
        damaged[place] ^= 16
        (folder / identity.FILE).write_bytes(damaged)
        assert "was made from other images" in refused(folder, source)


def test_digests_of_what_is_no_file():
    found = FileDigests.of_bytes({"a": b"1", "b": b"2"})
    assert found.names == ["a", "b"] and found.sha256.shape == (2, 32)
