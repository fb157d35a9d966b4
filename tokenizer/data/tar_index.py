"""Where a WebDataset shard keeps its samples, read from the tar's headers alone (POSIX ustar and pax, GNU long names).

Nothing is extracted, no name of a member is ever opened, and members of other kinds than the few that are wanted
are never read: whatever they hold, there is nothing here that could run it.
"""

from __future__ import annotations

import io
import json
import os
import stat
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tokenizer.data import kept
from training.arrays import read_arrays
from training.checkpoint import replace_file
from training.command import UserError

FORMAT = "tessera-tar-index-1"
BLOCK = 512
IMAGES = ("jpg", "jpeg", "png", "webp")
MAX_BYTES = {"cls": 32, "json": 2**20} | dict.fromkeys(IMAGES, 2**28)  # of a member that is read
MAX_NAME = 2**16  # bytes of a long name or of a pax header
REGULAR, FOLDER, LONG_NAME, PAX, SPARSE = b"\x000" + b"7", b"5", b"L", b"x", b"S"
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd
WITHOUT_DATA = b"123456"  # links, devices, folders, pipes
# Why a sample cannot be used; TarIndex.offsets holds -1 - place in this list.
PROBLEMS = (
    "holds no image",
    "has a name that leaves the shard",
    "is a link",
    "is a device, a pipe or a sparse file",
    "is too large",
    "has a .cls that is no class number",
    "has a .json that is damaged, or whose label is neither a number nor a name",
)
NO_IMAGE, OUTSIDE, LINK, SPECIAL, TOO_LARGE, BAD_CLS, BAD_JSON = range(len(PROBLEMS))


class Member(NamedTuple):
    """An entry of a tar."""

    name: bytes
    kind: bytes  # the header's type flag
    offset: int  # of its data
    size: int  # bytes


class TarIndex(NamedTuple):
    """The n samples of a shard, in its order. Neighbours of one name up to its first dot are one sample."""

    offsets: np.ndarray  # (n,) int64, bytes from the start of the tar to the image; below 0: -1 - a problem
    sizes: np.ndarray  # (n,) int64, bytes
    labels: np.ndarray  # (n,) int32, places in `classes`; -1 without
    classes: np.ndarray  # () str, JSON of a list of texts, each the JSON of a number, a name or [a folder's name]
    keys: np.ndarray  # uint8, the samples' names one after another
    key_ends: np.ndarray  # (n,) int64


def index_of(path: Path) -> TarIndex:
    """A shard's index, from the cache folder while the shard is as it was; read anew and kept there else.

    Where nothing can be written, nothing is kept. Raises UserError for a file that is no whole, plain tar.
    """
    state, place = stamp(path), kept_at(path)
    index = _load(place, state)
    if index is None:
        index = scan(path)
        content = io.BytesIO()
        np.savez(content, about=np.array(json.dumps([FORMAT, *state])), **index._asdict())
        try:
            replace_file(place, content.getvalue())
        except (OSError, UserError):  # read-only or full: the index serves this process
            pass
    return index


def kept_at(path: Path) -> Path:
    """Where a shard's index is kept."""
    return kept.kept_at("tars", path).with_suffix(".npz")


class Stamp(NamedTuple):
    """What tells whether a file is still the one that was indexed."""

    size: int  # bytes
    modified: int  # ns


def stamp(file: Path | int) -> Stamp:
    """Of a path or a descriptor. Raises UserError unless it is a regular file, without opening it."""
    try:
        found = os.stat(file)
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror})") from error
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{file} is no regular file: give tar files")
    return Stamp(found.st_size, found.st_mtime_ns)


def scan(path: Path) -> TarIndex:
    """Read a shard's headers, labels and .json once, in order."""
    offsets, sizes, labels, key_ends = array("q"), array("q"), array("i"), array("q")
    keys, classes = bytearray(), dict[str, int]()

    def close(sample: _Sample) -> None:
        usable = sample.problem is None and sample.image is not None
        offsets.append(sample.image.offset if usable else -1 - (sample.problem or NO_IMAGE))
        sizes.append(sample.image.size if usable else 0)
        label = sample.label() if usable else None
        labels.append(-1 if label is None else classes.setdefault(json.dumps(label), len(classes)))
        keys.extend(sample.key)
        key_ends.append(len(keys))

    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            sample = None
            for member in members(descriptor):
                folder, slash, base = member.name.removeprefix(b"./").rpartition(b"/")
                first, dot, extension = base.partition(b".")
                if not (first and dot) or member.kind == FOLDER:
                    continue  # by WebDataset's convention it belongs to no sample
                key = folder + slash + first
                if sample is None or key != sample.key:
                    if sample is not None:
                        close(sample)
                    sample = _Sample(key)
                sample.add(descriptor, member, extension.decode("utf-8", "replace").lower())
            if sample is not None:
                close(sample)
        finally:
            os.close(descriptor)
    except (_Damage, OSError) as error:
        raise UserError(f"{path} {error}: copy it again, or leave it out") from error
    return TarIndex(
        np.array(offsets, np.int64),
        np.array(sizes, np.int64),
        np.array(labels, np.int32),
        np.array(json.dumps(list(classes))),
        np.frombuffer(keys, np.uint8),
        np.array(key_ends, np.int64),
    )


class _Sample:
    """What is known of the members that share a name."""

    def __init__(self, key: bytes) -> None:
        self.key = key
        self.image: Member | None = None
        self.problem: int | None = None
        self._plain = False  # whether the image's extension is no compound, such as seg.png
        self._cls: int | None = None
        self._json: int | str | None = None

    def add(self, descriptor: int, member: Member, extension: str) -> None:
        kind = extension.rpartition(".")[2]
        if kind not in MAX_BYTES or (kind not in IMAGES and kind != extension):
            return  # of no interest, and never read
        if member.name.startswith(b"/") or b".." in member.name.split(b"/") or b"\0" in member.name:
            self.problem = OUTSIDE
        elif member.kind in b"12":
            self.problem = LINK
        elif member.kind not in REGULAR:
            self.problem = SPECIAL
        elif member.size > MAX_BYTES[kind]:
            self.problem = TOO_LARGE
        elif kind in IMAGES:
            if self.image is None or (kind == extension and not self._plain):
                self.image, self._plain = member, kind == extension
        else:
            try:
                read = {"cls": _class_number, "json": _class_of_json}[kind]
                setattr(self, f"_{kind}", read(os.pread(descriptor, member.size, member.offset)))
            except (ValueError, RecursionError):
                self.problem = {"cls": BAD_CLS, "json": BAD_JSON}[kind]

    def label(self) -> int | str | list[str] | None:
        """From .cls, else .json, else [the first folder of the name]."""
        folder, slash, _ = self.key.partition(b"/")
        named = [folder.decode("utf-8", "replace")] if slash else None
        return next((label for label in (self._cls, self._json, named) if label is not None), None)


def _class_number(data: bytes) -> int:
    if not data.strip().isdigit():
        raise ValueError
    return int(data)


def _class_of_json(data: bytes) -> int | str | None:
    """The value of `label` where there is one, a whole number or a name."""
    found = json.loads(data)
    label = found.get("label") if isinstance(found, dict) else None
    if label is not None and type(label) not in (int, str):
        raise ValueError
    return label


class _Damage(ValueError):
    """Why a file is no whole, plain tar. The message goes on from its name."""


def members(descriptor: int) -> Iterator[Member]:
    """The entries of an open tar, in order, by positioned reads of headers. Raises _Damage."""
    end, position = os.fstat(descriptor).st_size, 0
    extended: dict[str, bytes] = {}
    while True:
        header = os.pread(descriptor, BLOCK, position)
        if not position and header.startswith(COMPRESSED):
            raise _Damage("is compressed, so that nothing in it has a place (decompress it)")
        if len(header) < BLOCK:
            raise _Damage(f"ends at byte {end} without the mark of an end: it is not all there")
        if not any(header):
            return
        if not _checksum_holds(header):
            raise _Damage(f"is no tar at byte {position}")
        kind, start = header[156:157], position + BLOCK
        about_next = kind in b"KLVXgx"  # or about the tar: names no file of its own
        size = int(extended["size"]) if "size" in extended and not about_next else _number(header[124:136])
        data = 0 if kind in WITHOUT_DATA else size
        if size < 0 or start + data > end:
            raise _Damage(f"announces {size} bytes at byte {position} and ends at {end}: it is not all there")
        position = start + -(-data // BLOCK) * BLOCK
        if kind in (LONG_NAME, PAX):
            if size > MAX_NAME:
                raise _Damage(f"has a name of {size} bytes at byte {start - BLOCK}")
            body = os.pread(descriptor, size, start)
            extended |= {"path": body.rstrip(b"\0")} if kind == LONG_NAME else _pax(body, start)
        elif not about_next:
            sparse = any(key.startswith("GNU.sparse") for key in extended)
            yield Member(extended.get("path") or _name(header), SPARSE if sparse else kind, start, data)
            extended = {}


def _checksum_holds(header: bytes) -> bool:
    try:
        return int(header[148:156].strip(b" \0"), 8) == sum(header) - sum(header[148:156]) + 8 * ord(" ")
    except ValueError:
        return False


def _number(field: bytes) -> int:
    """Octal digits, or GNU's base 256 where the first bit is set."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:]) if field[0] == 0x80 else -1
    try:
        return int(field.strip(b" \0") or b"0", 8)
    except ValueError:
        return -1


def _name(header: bytes) -> bytes:
    name, prefix = header[:100].partition(b"\0")[0], header[345:500].partition(b"\0")[0]
    return prefix + b"/" + name if prefix and header[257:263] == b"ustar\0" else name


def _pax(body: bytes, start: int) -> dict[str, bytes]:
    """Records "length key=value\\n" of a pax header. Only `path`, `size` and GNU's marks of sparse files matter."""
    found, position = {}, 0
    while position < len(body):
        digits, space, _ = body[position : position + 8].partition(b" ")
        length = int(digits) if space and digits.isdigit() else 0
        key, equals, value = body[position : position + length][len(digits) + 1 : -1].partition(b"=")
        if not equals or position + length > len(body) or (key == b"size" and not _is_size(value)):
            raise _Damage(f"has a damaged pax header at byte {start}")
        found[key.decode("utf-8", "replace")] = value
        position += length
    return found


def _is_size(digits: bytes) -> bool:
    return digits.isdigit() and len(digits) < 20


def _load(path: Path, state: Stamp) -> TarIndex | None:
    """A kept index, if it is whole and of this state of the shard."""
    try:
        stored = read_arrays(path)
        if json.loads(str(stored["about"])) != [FORMAT, *state]:
            return None
        return TarIndex(**{name: stored[name] for name in TarIndex._fields})
    except (OSError, ValueError, KeyError):
        return None  # absent, damaged or of another version: the shard is read anew
