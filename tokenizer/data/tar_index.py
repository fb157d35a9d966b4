"""Where a WebDataset shard keeps its samples, read from the tar's headers alone (POSIX ustar and
pax, GNU long names).

Nothing is extracted, no name of a member is ever opened, and members of other kinds than the few
that are wanted are never read: whatever they hold, there is nothing here that could run it.
"""

from __future__ import annotations

import io
import json
import os
import stat
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tokenizer.data import file_cache
from tokenizer.data.splits_and_classes import EXTENSIONS
from training.arrays import read_arrays
from training.checkpoint import replace_file
from training.errors import UserError

FORMAT = "tessera-tar-index-3"
BLOCK = 512
IMAGES = tuple(extension.removeprefix(".") for extension in EXTENSIONS)
MAX_BYTES = {"cls": 32, "json": 2**20} | dict.fromkeys(IMAGES, 2**28)  # of a member that is read
MOST_KINDS = 20  # of members of no interest that are counted by their ending
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
    """The n items of a shard, in its order. Neighbours of one name up to its first dot are one
    sample, and a sample is one item, unless it holds several images of which none has the plain
    name: then each of them is.
    """

    offsets: (
        np.ndarray
    )  # (n,) int64, bytes from the start of the tar to the image; below 0: -1 - a problem
    sizes: np.ndarray  # (n,) int64, bytes
    labels: np.ndarray  # (n,) int32, places in `classes`; -1 without
    classes: (
        np.ndarray
    )  # () str, JSON of a list of texts, each the JSON of a number, a name or [a folder's name]
    keys: np.ndarray  # uint8, the samples' names one after another
    key_ends: np.ndarray  # (n,) int64
    seen: np.ndarray  # () str, JSON of Seen


class Seen(NamedTuple):
    """What a shard holds beside its items, and how it was read, for people."""

    kinds: dict[str, int]  # members that are of no interest, by their ending
    beside: list[Any]  # images beside the one of their sample: how many, and the first of them
    several: list[Any]  # samples of several images: how many, and the first
    repeated: list[
        Any
    ]  # items of a name that an earlier one has, as `tar -r` leaves them: how many, and the first

    def note(self, counter: list[Any], name: bytes) -> None:
        counter[0] += 1
        if len(counter) < 4:
            counter.append(name[:200].decode("utf-8", "replace"))

    def note_kind(self, extension: str) -> None:
        kind = extension if extension in self.kinds or len(self.kinds) < MOST_KINDS else ""
        self.kinds[kind] = self.kinds.get(kind, 0) + 1


def index_of(path: Path) -> TarIndex:
    """A shard's index, from the cache folder while the shard is as it was; read anew and kept there
    else.

    Where nothing can be written, nothing is kept. Raises UserError for a file that is no whole,
    plain tar.
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
    return file_cache.place_of("tars", path).with_suffix(".npz")


class Stamp(NamedTuple):
    """What tells whether a file is still the one that was indexed."""

    size: int  # bytes
    modified: int  # ns
    changed: int  # ns; also moves where a program sets `modified` back, as cp -p and tar do

    def same_contents(self, other: Stamp) -> bool:
        """Whether a run can go on: a new link to a file, as backups make, changes `changed`
        alone."""
        return self[:2] == other[:2]


def stamp(file: Path | int) -> Stamp:
    """Of a path or a descriptor. Raises UserError unless it is a regular file, without opening
    it."""
    try:
        status = os.stat(file)
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror})") from error
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{file} is no regular file: give tar files")
    return Stamp(status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def scan(path: Path) -> TarIndex:
    """Read a shard's headers, labels and .json once, in order."""
    offsets, sizes, labels, key_ends = array("q"), array("q"), array("i"), array("q")
    keys, classes = bytearray(), dict[str, int]()

    seen = Seen({}, [0], [0], [0])
    names: set[bytes] = set()

    def close(sample: _Sample) -> None:
        for item in sample.items(seen):
            if item.key in names:
                seen.note(seen.repeated, item.key)
            names.add(item.key)
            usable = item.image is not None
            offsets.append(item.image.offset if usable else -1 - item.problem)
            sizes.append(item.image.size if usable else 0)
            label = item.label if usable else None
            labels.append(
                -1 if label is None else classes.setdefault(json.dumps(label), len(classes))
            )
            keys.extend(item.key)
            key_ends.append(len(keys))

    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            sample = None
            for member in members(descriptor):
                folder, slash, base = member.name.removeprefix(b"./").rpartition(b"/")
                first, dot, extension = base.partition(b".")
                if member.kind == FOLDER:
                    continue
                if not (first and dot):  # by WebDataset's convention it belongs to no sample
                    seen.note_kind("")
                    continue
                key = folder + slash + first
                if sample is None or key != sample.key:
                    if sample is not None:
                        close(sample)
                    sample = _Sample(key)
                sample.add(descriptor, member, extension.decode("utf-8", "replace").lower(), seen)
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
        np.array(json.dumps(seen)),
    )


class _Item(NamedTuple):
    key: bytes
    image: Member | None
    problem: int  # where there is no image
    label: int | str | list[str] | None


class _Sample:
    """What is known of the members that share a name."""

    def __init__(self, key: bytes) -> None:
        self.key = key
        # By stem, a name up to its last dot: the image `22.01.jpg` of sample `22` may have a label
        # `22.01.cls` alone.
        self._images: dict[bytes, list[Member | int]] = {}  # or what is wrong with it
        self._labels: dict[tuple[bytes, str], int | str | None] = {}  # (stem, cls or json)
        self._problems: dict[bytes, int] = {}  # of labels

    def add(self, descriptor: int, member: Member, extension: str, seen: Seen) -> None:
        kind = extension.rpartition(".")[2]
        if kind not in MAX_BYTES:  # of no interest, and never read
            seen.note_kind(kind)
            return
        stem = member.name.removeprefix(b"./").rpartition(b".")[0]
        problem = None
        if member.name.startswith(b"/") or b".." in member.name.split(b"/") or b"\0" in member.name:
            problem = OUTSIDE
        elif member.kind in b"12":
            problem = LINK
        elif member.kind not in REGULAR:
            problem = SPECIAL
        elif member.size > MAX_BYTES[kind]:
            problem = TOO_LARGE
        elif kind not in IMAGES:
            try:
                read = {"cls": _class_number, "json": _class_of_json}[kind]
                self._labels[stem, kind] = read(os.pread(descriptor, member.size, member.offset))
            except (ValueError, RecursionError):
                problem = {"cls": BAD_CLS, "json": BAD_JSON}[kind]
        if kind in IMAGES:
            self._images.setdefault(stem, []).append(member if problem is None else problem)
        elif problem is not None:
            self._problems[stem] = problem

    def items(self, seen: Seen) -> Iterator[_Item]:
        """The image of the plain name, else the only one; of several others each is an item of its
        own name."""
        images = [(stem, image) for stem, found in self._images.items() for image in found]
        plain = [(stem, image) for stem, image in images if stem == self.key]
        if not images:
            yield _Item(self.key, None, self._problems.get(self.key, NO_IMAGE), None)
        elif plain or len(images) == 1:
            stem, image = (plain or images)[0]
            for other in images:
                if other[1] is not image:
                    seen.note(
                        seen.beside, other[1].name if isinstance(other[1], Member) else other[0]
                    )
            problems = [found for _, found in images if isinstance(found, int)]
            yield self._item(self.key, stem, problems[0] if problems else image)
        else:
            seen.note(seen.several, self.key)
            for stem, image in images:
                yield self._item(stem, stem, image)

    def _item(self, key: bytes, stem: bytes, image: Member | int) -> _Item:
        problem = (
            image
            if isinstance(image, int)
            else self._problems.get(stem, self._problems.get(self.key))
        )
        if problem is not None:
            return _Item(key, None, problem, None)
        return _Item(key, image, NO_IMAGE, self._label(stem))

    def _label(self, stem: bytes) -> int | str | list[str] | None:
        """From .cls, else .json, of the image's own name or its sample's, else [the first folder of
        the name]."""
        folder, slash, _ = self.key.partition(b"/")
        named = [folder.decode("utf-8", "surrogateescape")] if slash else None
        labels = [
            self._labels.get((name, kind)) for kind in ("cls", "json") for name in (stem, self.key)
        ]
        return next((label for label in (*labels, named) if label is not None), None)


def _class_number(data: bytes) -> int:
    if not data.strip().isdigit() and data.strip() != b"-1":  # which stands for no class
        raise ValueError
    return int(data)


def _class_of_json(data: bytes) -> int | str | None:
    """The value of `label` where there is one, a whole number or a name."""
    fields = json.loads(data)
    label = fields.get("label") if isinstance(fields, dict) else None
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
        size = (
            int(extended["size"])
            if "size" in extended and not about_next
            else _number(header[124:136])
        )
        data = 0 if kind in WITHOUT_DATA else size
        if size < 0 or start + data > end:
            raise _Damage(
                f"announces {size} bytes at byte {position} and ends at {end}: it is not all there"
            )
        position = start + -(-data // BLOCK) * BLOCK
        if kind in (LONG_NAME, PAX):
            if size > MAX_NAME:
                raise _Damage(f"has a name of {size} bytes at byte {start - BLOCK}")
            body = os.pread(descriptor, size, start)
            extended |= {"path": body.rstrip(b"\0")} if kind == LONG_NAME else _pax(body, start)
        elif not about_next:
            sparse = any(key.startswith("GNU.sparse") for key in extended)
            yield Member(
                extended.get("path") or _name(header), SPARSE if sparse else kind, start, data
            )
            extended = {}


def _checksum_holds(header: bytes) -> bool:
    try:
        return int(header[148:156].strip(b" \0"), 8) == sum(header) - sum(
            header[148:156]
        ) + 8 * ord(" ")
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
    """Records "length key=value\\n" of a pax header. Only `path`, `size` and GNU's marks of sparse
    files matter."""
    fields, position = {}, 0
    while position < len(body):
        digits, space, _ = body[position : position + 8].partition(b" ")
        length = int(digits) if space and digits.isdigit() else 0
        key, equals, value = body[position : position + length][len(digits) + 1 : -1].partition(
            b"="
        )
        if not equals or position + length > len(body) or (key == b"size" and not _is_size(value)):
            raise _Damage(f"has a damaged pax header at byte {start}")
        fields[key.decode("utf-8", "replace")] = value
        position += length
    return fields


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
