"""What a source is taken to be: layouts, columns, label files; what is passed over is said, and
doubt is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import processes
import pytest
from test_data import PLAIN, SIZE, config_of, encode, write_parquet

from tokenizer.data.dataset import DataConfig, open_split
from tokenizer.data.source import open_listing
from training.errors import UserError


def write(root: Path, *names: str, kind: str = "PNG") -> Path:
    """A picture under each name, of a shade of its own."""
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(np.full((SIZE, SIZE, 3), number, dtype=np.uint8), kind))
    return root


def found(source: Path, **options: str) -> dict[str, str | None]:
    """Class by name of every image of a folder; "|" before those that are held out."""
    listing = open_listing(str(source), 0, DataConfig(**options).choice)
    names = [*listing.class_names, None]
    held_out = listing.held_out if listing.held_out is not None else [False] * len(listing.labels)
    keys = [f"{'|' * bool(held)}{listing.key(item)}" for item, held in enumerate(held_out)]
    return {key: names[label] for key, label in zip(keys, listing.labels.tolist())}


def notes(source: Path | str, **options: str) -> str:
    images = open_split(
        DataConfig(source=str(source), image_size=SIZE, max_bad=1, **options), "train"
    )
    return "\n".join(images.notes)


# Layouts


def test_tiny_imagenet(tmp_path: Path) -> None:
    write(
        tmp_path,
        *(f"train/n0{c}/images/n0{c}_{i}.JPEG" for c in range(3) for i in range(4)),
        kind="JPEG",
    )
    write(tmp_path, *(f"val/images/val_{i}.JPEG" for i in range(6)), kind="JPEG")
    write(tmp_path, *(f"test/images/test_{i}.JPEG" for i in range(5)), kind="JPEG")
    (tmp_path / "train" / "n00" / "n00_boxes.txt").write_text("n00_0.JPEG\t0\t0\t62\t62\n")
    (tmp_path / "wnids.txt").write_text("n00\nn01\nn02\n")
    listed = "".join(f"val_{i}.JPEG\tn0{i % 3}\t0\t32\t44\t62\n" for i in range(6))
    (tmp_path / "val" / "val_annotations.txt").write_text(listed)
    classes = found(tmp_path)
    assert {key: name for key, name in classes.items() if key[0] == "|"} == {
        f"|val/images/val_{i}.JPEG": f"n0{i % 3}" for i in range(6)
    }
    assert len(classes) == 18 and all(
        classes[f"train/n0{c}/images/n0{c}_0.JPEG"] == f"n0{c}" for c in range(3)
    )
    said = notes(tmp_path)
    assert "passed over 5 images beside train and val: test/ (5)" in said
    assert "passed over 2 files of other kinds (.txt 2)" in said and "alone" not in said
    (tmp_path / "val" / "val_annotations.txt").unlink()
    assert (
        "1 classes are in the held-out split alone, so that nothing trains on them: images (6 images)"
        in notes(tmp_path)
    )


def test_coco(tmp_path: Path) -> None:
    write(
        tmp_path,
        *(f"train2017/{i:012d}.jpg" for i in range(10)),
        *(f"val2017/{i:012d}.jpg" for i in range(6)),
        kind="JPEG",
    )
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_val2017.json").write_text("{}")
    classes = found(tmp_path)
    assert set(classes.values()) == {"all"} and len(classes) == 16
    assert sorted(key for key in classes if key[0] == "|") == [
        f"|val2017/{i:012d}.jpg" for i in range(6)
    ]
    write(tmp_path, "train2014/1.jpg", "val2014/1.jpg", kind="JPEG")
    with pytest.raises(UserError, match="holds train2014, train2017, which are the same split"):
        found(tmp_path)


def test_folders_of_images_within_others(tmp_path: Path) -> None:
    for wrapper in ("images/", "tiny/tiny-200/"):
        write(
            tmp_path / wrapper[:4],
            f"{wrapper}train/a/1.png",
            f"{wrapper}val/a/2.png",
            f"{wrapper}train/b/1.png",
        )
        (tmp_path / wrapper[:4] / "labels").mkdir()
        (tmp_path / wrapper[:4] / "labels" / "1.txt").write_text("0 0 0 1 1")
        classes = {
            key.replace(wrapper, ""): name for key, name in found(tmp_path / wrapper[:4]).items()
        }
        assert classes == {"train/a/1.png": "a", "train/b/1.png": "b", "|val/a/2.png": "a"}


@pytest.mark.parametrize("name", ["train_images", "Train", "train-256", "trainset", "train2017"])
def test_names_of_splits(tmp_path: Path, name: str) -> None:
    write(tmp_path, f"{name}/a/1.png", f"{name}/a/2.png", "val_256/a/3.png")
    assert set(found(tmp_path)) == {f"{name}/a/1.png", f"{name}/a/2.png", "|val_256/a/3.png"}


def test_classes_that_are_named_like_splits_are_classes(tmp_path: Path) -> None:
    write(tmp_path, "bullet_train/1.png", "test_tube/2.png", "validator/3.png", "trainer/4.png")
    assert sorted(found(tmp_path).values()) == ["bullet_train", "test_tube", "trainer", "validator"]
    write(tmp_path / "b", "train/1.png", "car/2.png", "ship/3.png")
    assert sorted(found(tmp_path / "b").values()) == ["car", "ship", "train"]


def test_a_split_without_images_is_no_reason_to_hold_out_others(tmp_path: Path) -> None:
    write(tmp_path, *(f"train/a/{i}.png" for i in range(10)))
    (tmp_path / "val" / "a").mkdir(parents=True)
    assert len(open_split(config_of(tmp_path), "train")) == 10
    with pytest.raises(UserError, match="has no images for the held_out split"):
        open_split(config_of(tmp_path), "held_out")


def test_what_is_beside_the_splits_is_said(tmp_path: Path) -> None:
    write(
        tmp_path,
        "train/a/1.png",
        "train/a/2.png",
        "test/a/1.png",
        "extra/a/1.png",
        "extra/b/1.png",
        "cover.png",
    )
    assert "passed over 3 images beside train and test: cover.png, extra/ (2)" in notes(tmp_path)


def test_held_out_classes_that_nothing_trains_on_are_said(tmp_path: Path) -> None:
    write(tmp_path, "train/a/1.png", "val/a/1.png", "val/b/1.png", "val/b/2.png", "val/c/2.png")
    said = "2 classes are in the held-out split alone, so that nothing trains on them: b (2 images), c (1 images)"
    assert said in notes(tmp_path)


def test_what_is_said_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write(tmp_path, *(f"a/{i}.png" for i in range(5)))
    (tmp_path / "a.txt").write_text("")
    for split in ("train", "held_out"):
        open_split(config_of(tmp_path), split).announce()
    out = capsys.readouterr().out
    assert out.count(f"{tmp_path.name}: passed over 1 files of other kinds (.txt 1)\n") == 1


# Files and folders


def test_pictures_that_are_not_read_are_counted(tmp_path: Path) -> None:
    write(tmp_path, "a/1.png", "a/2.jfif", "a/3.jpe", "a/4.avif", "b/1.png", "b/2.png")
    for name in ("a/5.heic", "a/6.HEIF", "b/7.heic", "b/8.jxl"):
        (tmp_path / name).write_bytes(b"picture")
    assert len(found(tmp_path)) == 6
    assert (
        "passed over 4 pictures of kinds that are not read here (.heic 2, .heif 1, .jxl 1; a/5.heic"
        in notes(tmp_path)
    )
    with pytest.raises(
        UserError, match=r"holds no images .*; it holds \.heic 1, \.jxl 1: give images"
    ):
        for path in tmp_path.glob("b/*.png"):
            path.unlink()
        found(tmp_path / "b")


def test_folders_that_cannot_be_entered_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "a/1.png", "a/2.png", "b/1.png")
    scandir = os.scandir

    def refuse(path: str):
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr("tokenizer.data.walk.os.scandir", refuse)
    assert "could not enter 1 folders (b: Permission denied)" in notes(tmp_path)


def test_two_links_to_one_folder(tmp_path: Path) -> None:
    """Of one class they are one folder; of two, or of both splits, the images have no one class."""
    write(tmp_path / "elsewhere", "1.png", "deep/2.png")
    root = write(tmp_path / "root", "c/3.png", "a/0.png")
    (root / "a" / "one").symlink_to(tmp_path / "elsewhere")
    (root / "a" / "two").symlink_to(tmp_path / "elsewhere")
    (root / "a" / "deep").symlink_to(tmp_path / "elsewhere" / "deep")
    assert set(found(root)) == {
        "a/0.png",
        "c/3.png",
        "a/deep/2.png",
        "a/one/1.png",
    }  # each image once
    assert (
        "passed over 2 links to folders that are listed already (a/one/deep is a/deep, a/two is a/one)"
        in notes(root)
    )
    (root / "b").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"root: b and a/one are the same folder.*two classes"):
        found(root)
    (root / "b").unlink()
    (root / "b").symlink_to(tmp_path / "elsewhere" / "deep")  # overlaps with what a holds
    with pytest.raises(UserError, match=r"root: b and a/deep are the same folder.*two classes"):
        found(root)
    both = tmp_path / "both"
    for split in ("train", "val"):
        (both / split).mkdir(parents=True)
        (both / split / "a").symlink_to(root / "a")
    with pytest.raises(UserError, match=r"val/a and train/a are the same folder.*splits"):
        found(both)


def test_a_real_folder_comes_before_a_link_to_it(tmp_path: Path) -> None:
    write(tmp_path, "z/1.png", ".hidden/h/2.png")
    (tmp_path / "a").symlink_to("z")
    with pytest.raises(UserError, match="a and z are the same folder"):
        found(tmp_path)
    (tmp_path / "a").unlink()
    (tmp_path / "a").symlink_to(".hidden/h")  # where tools keep what they show elsewhere
    assert found(tmp_path) == {"a/2.png": "a", "z/1.png": "z"}


# Labels in files beside the images


def test_labels_from_metadata(tmp_path: Path) -> None:
    """The convention of ImageFolder of Hugging Face's data sets."""
    write(tmp_path, "train/0.png", "train/sub/1.png", "train/2.png", "train/3.png", "test/0.png")
    (tmp_path / "train" / "metadata.csv").write_text(
        '\ufefffile_name,text,label\n0.png,"a, b",10\nsub/1.png,c,9\n2.png,d,\nlost.png,e,9\n'
    )
    (tmp_path / "test" / "metadata.jsonl").write_text('{"file_name": "0.png", "label": 9}\n\n')
    assert found(tmp_path) == {
        "train/0.png": "10",
        "train/sub/1.png": "9",
        "train/2.png": None,
        "train/3.png": None,
        "|test/0.png": "9",
    }
    listing = open_listing(str(tmp_path), 0)
    assert listing.class_names == ["9", "10"]  # numbers, not text
    assert "train/metadata.csv names 1 images that are not there (train/lost.png)" in listing.notes
    assert not any("other kinds" in note for note in listing.notes)


def test_metadata_of_the_whole_folder_and_of_none(tmp_path: Path) -> None:
    write(tmp_path, "a/0.png", "a/1.png", "b/0.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\na/0.png,a caption\n")
    assert found(tmp_path) == {"a/0.png": "a", "a/1.png": "a", "b/0.png": "b"}
    assert "metadata.csv holds no labels, only text" in notes(tmp_path)
    (tmp_path / "metadata.csv").write_text(
        "file_name,kind,fine_label,coarse_label\na/0.png,k,x,y\nb/0.png,k,z,y\n"
    )
    with pytest.raises(
        UserError,
        match=r"metadata.csv has 2 columns that may be its labels, fine_label, coarse_label: ",
    ):
        found(tmp_path)
    assert found(tmp_path, label_column="coarse_label") == {
        "a/0.png": "y",
        "a/1.png": None,
        "b/0.png": "y",
    }
    assert found(tmp_path, label_column="kind") == {"a/0.png": "k", "a/1.png": None, "b/0.png": "k"}
    assert set(found(tmp_path, label_column="none").values()) == {"all"}
    with pytest.raises(
        UserError, match=r"data\.label_column=sort: .*metadata.csv has only kind, fine_label"
    ):
        found(tmp_path, label_column="sort")
    (tmp_path / "metadata.csv").unlink()
    with pytest.raises(
        UserError, match=r"data\.label_column=kind: .* has no metadata\.csv or metadata\.jsonl"
    ):
        found(tmp_path, label_column="kind")


@pytest.mark.parametrize(
    "name, text",
    [
        ("metadata.jsonl", "{"),
        ("metadata.jsonl", "[1]"),
        ("metadata.jsonl", "[" * 100_000),
        ("metadata.csv", 'a,"b'),
    ],
)
def test_damaged_metadata_is_one_line(tmp_path: Path, name: str, text: str) -> None:
    write(tmp_path, "a/0.png")
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=f"{name} cannot be read .*: mend or remove it") as error:
        found(tmp_path)
    assert "\n" not in str(error.value)


def test_metadata_that_contradicts_itself_or_leads_outside(tmp_path: Path) -> None:
    write(tmp_path, "a/0.png", "a/1.png")
    (tmp_path / "metadata.jsonl").write_text(
        '{"file_name": "a/0.png", "label": "x"}\n{"file_name": "../../etc/passwd", "label": "x"}\n'
        '{"file_name": "/etc/passwd", "label": "x"}\n{"file_name": 3, "label": "y"}\n'
    )
    assert found(tmp_path) == {"a/0.png": "x", "a/1.png": None}
    (tmp_path / "a" / "metadata.csv").write_text("file_name,label\n0.png,y\n")
    with pytest.raises(
        UserError, match=r"/metadata\..* and another file give a/0\.png different classes"
    ):
        found(tmp_path)


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
@pytest.mark.parametrize("other", ["a/0.png", "./a/0.png"])
def test_a_file_that_says_two_things_of_an_image_is_refused(
    tmp_path: Path, name: str, other: str
) -> None:
    write(tmp_path, "a/0.png", "a/1.png")
    rows = [("a/0.png", "x"), ("a/1.png", "y"), (other, "x")]

    def put(rows: list[tuple[str, str]]) -> None:
        as_csv = "".join(f"{image},{label}\n" for image, label in [("file_name", "label"), *rows])
        as_json = "".join(
            json.dumps({"file_name": image, "label": label}) + "\n" for image, label in rows
        )
        (tmp_path / name).write_text(as_csv if name.endswith("csv") else as_json)

    put(rows)  # twice the same: no doubt
    assert found(tmp_path) == {"a/0.png": "x", "a/1.png": "y"}
    put([*rows, (other, "z")])
    with pytest.raises(
        UserError, match=rf"{name} gives a/0\.png different classes: keep one of them"
    ):
        found(tmp_path)


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "a/0.png")
    (tmp_path / "metadata.csv").write_text("file_name,label,label\na/0.png,x,y\n")
    with pytest.raises(UserError, match=r"metadata\.csv has two columns named label: rename one"):
        found(tmp_path)


def test_names_of_digits_are_names(tmp_path: Path) -> None:
    """Zip codes and numbered classes (001.Albatross without its bird): 007 is neither 7 nor 07."""
    write(tmp_path, *(f"{number}.png" for number in range(4)))
    (tmp_path / "metadata.csv").write_text(
        "file_name,label\n0.png,007\n1.png,7\n2.png,07\n3.png,10\n"
    )
    assert list(found(tmp_path).values()) == ["007", "7", "07", "10"]
    (tmp_path / "metadata.csv").write_text(
        "file_name,label\n0.png,10\n1.png,9\n2.png,-1\n3.png,0\n"
    )
    assert open_listing(str(tmp_path), 0).class_names == ["0", "9", "10"]


def test_lines_of_label_files_end_where_their_formats_say(tmp_path: Path) -> None:
    """JSON and names of files may hold U+2028 and U+0085, at which Python's splitlines divides
    text, too."""
    write(tmp_path, "train/a/0.png", "train/b/0.png", "val/0.png", "val/x\u0085y\u2028.png")
    (tmp_path / "val" / "val_annotations.txt").write_bytes(
        "0.png\ta\r\nx\u0085y\u2028.png\tb\r\n".encode()
    )
    assert found(tmp_path)["|val/x\u0085y\u2028.png"] == "b"
    rows = [
        {"file_name": f"{name}/0.png", "label": name, "text": "x\u2028y\u0085z"} for name in "ab"
    ]
    text = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "train" / "metadata.jsonl").write_bytes(text.encode())
    assert found(tmp_path)["train/b/0.png"] == "b"


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "a_annotations.txt"])
def test_a_label_file_that_is_a_pipe_is_not_waited_for(tmp_path: Path, name: str) -> None:
    write(tmp_path, "a/0.png")
    os.mkfifo(tmp_path / "a" / name)
    with pytest.raises(
        UserError, match=f"{name} cannot be read .*no regular file.*: mend or remove it"
    ):
        found(tmp_path)


def test_classes_without_images_are_said(tmp_path: Path) -> None:
    write(tmp_path, "cats/0.png", "dogs/0.png")
    (tmp_path / "birds" / "more").mkdir(parents=True)
    assert "1 folders hold no images, and are no classes: birds" in notes(tmp_path)
    write(tmp_path / "birds" / "more", "0.png")
    assert "hold no images" not in notes(tmp_path)
    write(
        tmp_path / "set",
        *(f"{part}/{name}/0.png" for part in ("train", "val") for name in ("cats", "dogs")),
    )
    (tmp_path / "set" / "train" / "birds").mkdir()
    assert "1 folders hold no images, and are no classes: train/birds" in notes(tmp_path / "set")


def test_no_source_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`data.source=$UNSET` is not the working directory."""
    monkeypatch.chdir(write(tmp_path, "a/0.png", "b/0.png"))
    for source in ("", " "):
        with pytest.raises(UserError, match=r"data\.source= *: nothing is named"):
            DataConfig(source=source)


def test_the_hub_is_not_what_lies_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` takes a folder of that name for the data set, without a word."""
    monkeypatch.chdir(write(tmp_path, "owner/name/a/0.png", "owner/name/b/0.png"))
    with pytest.raises(UserError, match=r"data\.source=hub:owner/name: .*data\.source=owner/name"):
        open_listing("hub:owner/name", 0)
    for name in ("", "/", "a/b/c", "../x", "owner/", "a b/c"):
        with pytest.raises(UserError, match=r"data\.source=hub:.*: .*hub:owner/name"):
            open_listing(f"hub:{name}", 0)


# Tables


def table(path: Path, **columns: object) -> Path:
    """A parquet file of images and other columns."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    images = pa.array([{"bytes": data, "path": None} for data in PLAIN[:6]], kind)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": images} | columns), path)
    return path


@pytest.mark.parametrize(
    "name", ["labels", "fine_label", "class", "classId", "category", "target", "superCategory"]
)
def test_columns_that_hold_labels_by_their_names(tmp_path: Path, name: str) -> None:
    path = table(tmp_path / "a.parquet", **{name: [0, 1, 2] * 2, "text": ["a caption"] * 6})
    assert open_listing(str(path), 0).labels.tolist() == [0, 1, 2] * 2


def test_several_columns_of_labels_are_refused_and_one_is_chosen(tmp_path: Path) -> None:
    path = table(
        tmp_path / "a.parquet",
        fine_label=[0, 1, 2] * 2,
        coarse_label=["x", "y"] * 3,
        depth=[0.5] * 6,
    )
    with pytest.raises(
        UserError,
        match=r"a.parquet has 2 columns that may be its labels, fine_label, coarse_label: choose",
    ):
        open_listing(str(path), 0)
    assert found(path, label_column="coarse_label") == {str(i): "xy"[i % 2] for i in range(6)}
    assert set(found(path, label_column="none").values()) == {"all"}
    with pytest.raises(
        UserError,
        match=r"data\.label_column=fine: .*a.parquet has only fine_label, coarse_label, depth",
    ):
        found(path, label_column="fine")
    with pytest.raises(
        UserError,
        match=r"labels are float, .*: choose another column with data.label_column, or none",
    ):
        found(path, label_column="depth")


def test_labels_that_are_none_or_minus_one(tmp_path: Path) -> None:
    import pyarrow as pa

    for place, labels in enumerate([[None] * 6, [-1] * 6, pa.nulls(6)]):
        path = table(tmp_path / f"{place}.parquet", label=labels)
        assert set(found(path).values()) == {
            "all"
        } and "column label holds no label: all images are of one" in notes(path)
    assert list(found(table(tmp_path / "a.parquet", label=[4, -1, 4, None, 7, 7])).values()) == [
        "4",
        None,
        "4",
        None,
        "7",
        "7",
    ]
    assert set(found(table(tmp_path / "b.parquet", label=[True, False] * 3)).values()) == {
        "True",
        "False",
    }
    named = write_parquet(tmp_path / "c.parquet", PLAIN[:3], [-1, 0, 1], ["x", "y"])
    assert list(found(named).values()) == [None, "x", "y"]


def test_the_column_of_images_can_be_chosen(tmp_path: Path) -> None:
    import pyarrow as pa

    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    other = pa.array([{"bytes": data, "path": None} for data in PLAIN[6:12]], kind)
    path = table(tmp_path / "a.parquet", mask=other, jpg=pa.array(PLAIN[12:18]))
    read = {
        name: open_listing(str(path), 10**9, DataConfig(image_column=name).choice).read(2)
        for name in ("mask", "jpg")
    }
    assert (
        read == {"mask": PLAIN[8], "jpg": PLAIN[14]}
        and open_listing(str(path), 0).read(2) == PLAIN[2]
    )
    assert "images are taken from column image; passed over: mask" in notes(path)
    with pytest.raises(
        UserError, match=r"data\.image_column=depth: .*a.parquet has only image, mask, jpg"
    ):
        found(path, image_column="depth")
    path = table(tmp_path / "b.parquet", text=["a"] * 6)
    with pytest.raises(
        UserError, match=r"data\.image_column=text: .* it holds string, neither bytes"
    ):
        found(path, image_column="text")


def test_metadata_tables_hide_neither_images_nor_shards(tmp_path: Path) -> None:
    """What img2dataset writes: 00000.tar or 00000/*.jpg, 00000.parquet about them,
    00000_stats.json."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from test_tar_shards import samples, write_shard

    about = pa.table({"url": ["http://x"] * 4, "caption": ["y"] * 4, "status": ["success"] * 4})
    for root in (tmp_path / "shards", tmp_path / "files"):
        root.mkdir()
        pq.write_table(about, root / "00000.parquet")
        (root / "00000_stats.json").write_text("{}")
    write_shard(tmp_path / "shards" / "00000.tar", samples(range(4)))
    write(tmp_path / "files", *(f"00000/{i}.jpg" for i in range(4)), kind="JPEG")
    for root in (tmp_path / "shards", tmp_path / "files"):
        assert len(open_listing(str(root), 0).labels) == 4
        assert "passed over 2 files of other kinds (.json 1, .parquet 1)" in notes(root)
    both = table(tmp_path / "both" / "data.parquet", label=[0, 1] * 3).parent
    pq.write_table(about, both / "captions.parquet")
    write(both, "preview.png")
    assert len(open_listing(str(both), 0).labels) == 6
    assert "passed over 2 files of other kinds (.parquet 1, .png 1)" in notes(both)


def test_parts_that_are_neither_trained_on_nor_held_out_are_said(tmp_path: Path) -> None:
    for name in ("train", "validation", "test"):
        table(tmp_path / f"{name}-00000-of-00001.parquet", label=[0, 1] * 3)
    said = "passed over test-00000-of-00001.parquet: validation-00000-of-00001.parquet is held out"
    assert said in notes(tmp_path)


# Folders that datasets saved


def saved(folder: Path, parts: dict[str, int] | int) -> Path:
    import datasets

    def rows(count: int) -> datasets.Dataset:
        features = datasets.Features(
            {"img": datasets.Image(), "labels": datasets.ClassLabel(names=["even", "odd"])}
        )
        images = [{"bytes": data, "path": None} for data in PLAIN[:count]]
        table = {"img": images, "labels": [i % 2 for i in range(count)]}
        return datasets.Dataset.from_dict(table, features=features)

    made = (
        rows(parts)
        if isinstance(parts, int)
        else datasets.DatasetDict({n: rows(c) for n, c in parts.items()})
    )
    options = {"num_shards": 2} if isinstance(parts, int) else {}
    made.save_to_disk(str(folder), **options)
    return folder


def test_saved_data_sets(tmp_path: Path) -> None:
    single = saved(tmp_path / "single", 9)
    listing = open_listing(str(single), 0)
    assert [listing.read(i) for i in range(9)] == PLAIN[:9] and listing.labels.tolist() == [
        i % 2 for i in range(9)
    ]
    assert (
        listing.class_names == ["even", "odd"]
        and listing.held_out is None
        and listing.where(3) == "single row 3"
    )
    split = saved(tmp_path / "split", {"train": 6, "test": 4, "extra": 3})
    parts = [
        open_split(config_of(split, memory_mib=memory), name)
        for memory in (100, 0)
        for name in ("train", "held_out")
    ]
    assert [len(part) for part in parts] == [6, 4] * 2 and parts[0].class_names == ["even", "odd"]
    assert (
        parts[2].gather([(0, 1)])["ids"].tolist() == [1]
        and "passed over extra: test is held out" in parts[0].notes
    )


@pytest.mark.parametrize(
    "name", ["../outside.arrow", "/etc/passwd", "a/b.arrow", "", "..", 3, None]
)
def test_saved_data_sets_that_lie_are_one_line(tmp_path: Path, name: object) -> None:
    root = saved(tmp_path / "set", 4)
    (tmp_path / "outside.arrow").write_bytes((root / "data-00000-of-00002.arrow").read_bytes())
    state = json.loads((root / "state.json").read_text())
    (root / "state.json").write_text(json.dumps(state | {"_data_files": [{"filename": name}]}))
    with pytest.raises(UserError, match=r"state\.json is damaged .*: save the data set again"):
        open_listing(str(root), 0)


def test_damaged_saved_data_sets_are_one_line(tmp_path: Path) -> None:
    root = saved(tmp_path / "set", 4)
    whole = (root / "data-00000-of-00002.arrow").read_bytes()
    for data in (b"", b"ARROW1", whole[: len(whole) // 2], b"\xff" * 64):
        (root / "data-00000-of-00002.arrow").write_bytes(data)
        with pytest.raises(UserError, match=r"data-00000-of-00002\.arrow cannot be read as Arrow"):
            open_listing(str(root), 0)
    for text in ("", "[]", "{}", '{"_data_files": 3}', "[" * 100_000):
        (root / "state.json").write_text(text)
        with pytest.raises(UserError, match=r"state\.json .*: save the data set again"):
            open_listing(str(root), 0)


# Settings


def test_settings_that_a_source_has_no_use_for_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "a/0.png", "a/1.png")
    for source, options in [
        ("digits", {"label_column": "x"}),
        (tmp_path, {"image_column": "x"}),
        (tmp_path, {"hub_revision": "main"}),
        (table(tmp_path.parent / f"{tmp_path.name}-table" / "a.parquet"), {"hub_config": "x"}),
    ]:
        ((field, value),) = options.items()
        with pytest.raises(
            UserError, match=rf"data\.{field}={value}: data\.source=.* has no use for it"
        ):
            found(source, **options)


def test_a_data_set_of_the_hub_with_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load(*names: str, **options: str) -> object:
        asked.append((names, options))
        if len(names) == 1:
            raise ValueError(
                "Config name is missing.\nPlease pick one among the available configs: ['a', 'b']"
            )
        label = datasets.ClassLabel(names=["x", "y"])
        features = datasets.Features(
            {"img": datasets.Image(), "mask": datasets.Image(), "label_a": label, "label_b": label}
        )
        images = [{"bytes": data, "path": None} for data in PLAIN[:4]]
        rows = {
            "img": images,
            "mask": images[::-1],
            "label_a": [0, 1, -1, None],
            "label_b": [1, 1, 0, 0],
        }
        return datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows, features=features)})

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(
        UserError,
        match=r"hub:o/n cannot be loaded .*configs: \['a', 'b'\]\): choose one with data.hub_config",
    ):
        open_listing("hub:o/n", 0)
    with pytest.raises(UserError, match=r"only img, mask: name one with data\.image_column"):
        found("hub:o/n", hub_config="a")
    with pytest.raises(UserError, match="has 2 columns that may be its labels, label_a, label_b"):
        found("hub:o/n", hub_config="a", image_column="img")
    options = {
        "hub_config": "a",
        "hub_revision": "v2",
        "image_column": "mask",
        "label_column": "label_a",
    }
    assert list(found("hub:o/n", **options).values()) == ["x", "y", None, None]
    assert asked[-1] == (("o/n", "a"), {"revision": "v2"})
    listing = open_listing("hub:o/n", 0, DataConfig(**options).choice)
    assert listing.read(0) == PLAIN[3] and listing.notes == [
        "images are taken from column mask; passed over: img"
    ]


@pytest.mark.parametrize("change", ["cut", "removed", "written"])
def test_a_saved_file_that_changes_while_it_is_read_is_one_line(
    tmp_path: Path, change: str
) -> None:
    """It is mapped: a page beyond a new end would end the process by SIGBUS, so a process of its
    own reads it."""
    folder = saved(tmp_path / "saved", 9)
    code = f"""if True:
        import os
        from pathlib import Path
        from tokenizer.data.source import open_listing
        from tokenizer.data.transforms import BadImage
        listing = open_listing({str(folder)!r}, 0)
        for file in Path({str(folder)!r}).glob("*.arrow"):
            if {change!r} == "cut":
                os.truncate(file, 10)
            elif {change!r} == "removed":
                file.unlink()
            else:
                os.utime(file, (1, 1))
        try:
            listing.read(0)
        except BadImage as error:
            print(error)
    """
    done = processes.run("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(".arrow has changed since this run began\n")


# Splits that only a column knows


@pytest.mark.parametrize("name", ["split", "Split", "data_split", "subset"])
def test_a_column_of_splits_is_said_to_be_passed_over(tmp_path: Path, name: str) -> None:
    said = f"column {name} is not read: it may say which images are held out, and files or folders named train"
    values = {name: ["train", "train", "test"] * 2}
    assert said in notes(table(tmp_path / "a.parquet", label=[0, 1, 2] * 2, **values))
    write(tmp_path / "images", *(f"{i}.png" for i in range(6)))
    lines = "".join(f"{i}.png,{i % 2},{part}\n" for i, part in enumerate(values[name]))
    (tmp_path / "images" / "metadata.csv").write_text(f"file_name,label,{name}\n{lines}")
    assert f"metadata.csv: {said}" in notes(tmp_path / "images")


# What img2dataset writes


def test_folders_of_downloads_are_no_classes(tmp_path: Path) -> None:
    names = [f"{shard:05d}/{shard:05d}{i:04d}" for shard in range(3) for i in range(4)]
    write(tmp_path, *(f"{name}.jpg" for name in names), kind="JPEG")
    for name in names:
        (tmp_path / f"{name}.json").write_text('{"status": "success"}')
        (tmp_path / f"{name}.txt").write_text("a caption")
    assert set(found(tmp_path).values()) == {"all"}
    assert (
        "folders 00000, 00001, 00002 number img2dataset's downloads, and are no classes"
        in notes(tmp_path)
    )
    (
        tmp_path / f"{names[0]}.json"
    ).unlink()  # without them such folders may be classes, as GTSRB's are
    assert set(found(tmp_path).values()) == {"00000", "00001", "00002"}
