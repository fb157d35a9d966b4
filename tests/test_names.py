"""Names of classes and files that no encoding, terminal, SVG or Markdown was made for."""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_cache import save_images, save_tokenizer
from test_eval_report import synthetic_records
from tiny import command

from eval.report.markup import escape, markdown, table_cell
from eval.report.plots import bars, training_curves
from eval.report.report import write_report
from eval.report.stages import Stage
from priors.record import read_record
from tokenizer.cache import TokenCache
from tokenizer.data.dataset import DataConfig, open_split
from tokenizer.data.splits_and_classes import number_classes
from training.text import printable

LATIN = os.fsdecode(b"caf\xe9")  # as systems before UTF-8 wrote it
HOSTILE = [
    "\x1b[31mred\x1b[0m",
    LATIN,
    "two\nlines\n# and a heading\n| a | row |",
    "\ud800",
    "a|b\\|c",
    "\u202eevil\uffff",
]
SHOWN = [
    "\\x1b[31mred\\x1b[0m",
    "caf\\xe9",
    "two\\nlines\\n# and a heading\\n| a | row |",
    "\\ud800",
    "a|b\\|c",
    "\\u202eevil\\uffff",
]


def png(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), shade, dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def safe(text: str) -> bool:
    """Whether UTF-8 takes a text, and a terminal shows it in one line and does nothing else."""
    return text.encode().decode().isprintable()


def test_letters_of_all_languages_stay_what_they_are() -> None:
    for text in (
        "café",
        "猫 犬",
        "кот",
        "חתול",
        "क्षत्रिय",
        "👩‍🚀 🇯🇵",
        "tench, Tinca tinca",
        "a\u00a0b\u3000c",
        "\\x1b",
    ):
        assert printable(text) == text
    assert [printable(text) for text in HOSTILE] == SHOWN and all(map(safe, SHOWN))
    assert printable("a\nb\x1b", keep="\n") == "a\nb\\x1b"


def write_hostile_folder(root: bytes) -> None:
    """Two class folders and their files, with names of bytes."""
    for label, name in enumerate([b"caf\xe9", b"a\x1b[31m\nb"]):
        folder = os.path.join(root, name)
        os.makedirs(folder)
        for number in range(6):
            with open(os.path.join(folder, b"\xff%d\x1b]0;title\x07.png" % number), "wb") as file:
                file.write(png(10 * number + label) if number else b"damaged")


def test_folders_and_files_of_any_bytes(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_hostile_folder(os.fsencode(tmp_path / "pictures"))
    for memory in (100, 0):
        config = DataConfig(
            source=str(tmp_path / "pictures"), image_size=8, max_bad=0.9, memory_mib=memory
        )
        parts = [open_split(config, split) for split in ("train", "held_out")]
        assert parts[0].class_names == ["a\\x1b[31m\\nb", "caf\\xe9"]
        assert sum(map(len, parts)) == (10 if memory else 12)
        assert all(safe(part.summary()) for part in parts) and sum(
            len(part.bad) for part in parts
        ) == (2 if memory else 0)
    parts[0].announce()
    assert "\x1b" not in capsys.readouterr().out


def test_labels_of_any_text(tmp_path: Path) -> None:
    """In shards' .json and in parquet; names that are text are told apart, whatever they show
    as."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = [name for name in HOSTILE if name != LATIN] * 2
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number, name in enumerate(names):
            for suffix, data in {
                "png": png(number),
                "json": json.dumps({"label": name}).encode(),
            }.items():
                member = tarfile.TarInfo(f"{number}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    images = open_split(DataConfig(source=str(tmp_path / "a.tar"), image_size=8), "train")
    assert sorted(images.class_names) == sorted(printable(name) for name in set(names))
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    names = [name for name in names if name != "\ud800"]
    rows = pa.array([{"bytes": png(1), "path": None} for _ in names], kind)
    pq.write_table(pa.table({"image": rows, "label": names}), tmp_path / "a.parquet")
    images = open_split(DataConfig(source=str(tmp_path / "a.parquet"), image_size=8), "train")
    assert all(map(safe, images.class_names)) and len(images.class_names) == 4


def test_names_that_others_wrote_into_records_are_made_safe(tmp_path: Path) -> None:
    """A downloaded token cache or prior holds whatever its maker put there."""
    save_images(tmp_path / "images")
    save_tokenizer(tmp_path / "tokenizer", tmp_path / "images")
    (tmp_path / "empty.yaml").write_text(f"root: {tmp_path}\n")
    assert command("tokenizer.encode", tmp_path / "empty.yaml") == 0
    path = tmp_path / "tokens" / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"class_names": HOSTILE}))
    assert TokenCache.open(tmp_path / "tokens").class_names == SHOWN
    record = {
        "tokens": "x",
        "tokens_sha256": "",
        "tokenizer": "x",
        "tokenizer_sha256": "",
        "class_names": HOSTILE,
    }
    record |= {"layout": {"grids": [[2, 2]], "num_codes": [16]}, "sampling": {}}
    (tmp_path / "prior" / "weights").mkdir(parents=True)
    (tmp_path / "prior" / "weights" / "prior.json").write_text(json.dumps(record))
    assert read_record(tmp_path / "prior").class_names == SHOWN


def test_a_command_whose_paths_are_not_utf8_ends_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    source = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    os.mkdir(source)
    save_images(Path(source, "pictures"))
    (tmp_path / "a.yaml").write_text(f"root: {tmp_path}\nloop: {{steps: 1, batch_size: 4}}\n")
    assert command("tokenizer.train", tmp_path / "a.yaml", f"data.source={source}/pictures") == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and "data.source: " in printed and "caf" in printed


def rows_and_headings(folder: Path) -> tuple[int, list[str]]:
    lines = (folder / "report.md").read_text().splitlines()
    return sum(line.startswith("|") for line in lines), [
        line for line in lines if re.match(r"\s*(#|---|===)", line)
    ]


def test_a_report_takes_no_markup_from_names(tmp_path: Path) -> None:
    def write(folder: Path, names: list[str], stage: str) -> None:
        stages = [Stage(stage, "name: prior\n", {f"{stage}.nats": [(1, 5.0), (2, 0.1)]})]
        assert write_report(folder, stage, synthetic_records(), stages, names)

    link = "![x](http://x) <img src=x> [y](http://y)"
    write(tmp_path / "hostile", [HOSTILE[0], HOSTILE[2], link], HOSTILE[2])
    write(tmp_path / "plain", ["a", "b", "c"], "stage")
    hostile = rows_and_headings(tmp_path / "hostile")
    plain = rows_and_headings(tmp_path / "plain")
    assert (
        hostile[0] == plain[0]
        and hostile[1][1:] == plain[1][1:]
        and len(hostile[1]) == len(plain[1])
    )
    text = (tmp_path / "hostile" / "report.md").read_text()
    assert not re.search(r"(?<!\\)\]\(http|(?<!\\)<img|\x1b", text)
    page = (tmp_path / "hostile" / "report.html").read_text()
    assert "\x1b" not in page and "<img src=x>" not in page
    for picture in (tmp_path / "hostile" / "images").glob("*.svg"):
        ElementTree.fromstring(picture.read_text())
    linked = re.findall(r"\]\((images/\S*?)\)", text)
    assert len(linked) == 10 and all((tmp_path / "hostile" / path).is_file() for path in linked)


@pytest.mark.parametrize("name", [*HOSTILE, "\x00", "\ufffe", "<&\"'>", "]]>", "x" * 300])
def test_pictures_are_well_formed_whatever_their_names(name: str) -> None:
    for picture in (
        bars([(name, 50.0)]).decode(),
        training_curves({name: [(1, 2.0)]}).decode(),
        f"<a>{escape(name)}</a>",
    ):
        ElementTree.fromstring(picture.encode().decode())


def test_text_stays_text_in_markdown() -> None:
    assert (
        markdown("*a* _b_ `c` <d> x|y \\ &lt;")
        == "\\*a\\* \\_b\\_ \\`c\\` \\<d\\> x\\|y \\\\ \\&lt;"
    )
    assert [markdown(t) for t in ("# x", "- x", "1. x", "[a]: b", "[a](b)", "IS[x]")] == [
        "\\# x",
        "\\- x",
        "1\\. x",
        "[a\\]: b",
        "[a\\](b)",
        "IS[x]",
    ]
    assert table_cell("`a=b|c`") == "`a=b\\|c`" and table_cell("a\\|b") == "a\\\\\\|b"


ALIKE = [
    (["cat", "cat\u200b"], ["cat", "cat\\u200b"]),
    (["a b", "a\u00a0b", "a b "], ["a b", "a\\xa0b", "a b\\x20"]),
    (["caf\u00e9", "cafe\u0301"], ["caf\\xe9", "cafe\\u0301"]),
    (["x\x00", "x\\x00"], ["x\\x00", "x\\\\x00"]),
    (["क्\u200dष", "دلفين"], ["क्\u200dष", "دلفين"]),  # what belongs to a script stays
]


@pytest.mark.parametrize(("names", "shown"), ALIKE)
def test_classes_whose_names_look_alike_are_told_apart(names, shown):
    assert number_classes("x", names, names)[1] == shown
    assert number_classes("x", names)[1] == [shown[names.index(name)] for name in sorted(names)]
