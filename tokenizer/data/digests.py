"""What files hold, by SHA-256: each is read once, and known again by its size and times while it is
as it was."""

from __future__ import annotations

import hashlib
import os
import stat
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from tokenizer.data import file_cache
from training import distributed
from training.errors import UserError
from training.log import Progress

FORMAT = b"tessera-digests-1\n"
READING = "read once, to know them again"
BLOCK = 2**22  # bytes read at once
# A file may change again within one tick of its clock: what was written so shortly before is read
# anew next time.
YOUNG_NS = 2 * 10**9
RECORD = np.dtype(
    [
        ("name", "<u8"),  # hash of the name below the root
        ("size", "<i8"),  # bytes; -1: not known, or not to be trusted
        ("modified", "<i8"),  # ns
        (
            "changed",
            "<i8",
        ),  # ns; also moves where a program sets `modified` back, as cp -p and tar do
        ("sha256", "u1", 32),
    ]
)


class FileDigests(NamedTuple):
    """What some files hold."""

    names: list[str]  # that stay when the source moves
    sha256: np.ndarray  # (n, 32) uint8; zeros for a file that cannot be read

    @staticmethod
    def of_bytes(contents: Mapping[str, bytes]) -> FileDigests:
        """Of what is no file, by name."""
        digests = [hashlib.sha256(content).digest() for content in contents.values()]
        return FileDigests(
            list(contents), np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32)
        )

    @staticmethod
    def of_rows(
        title: str, files: Sequence[Path], items: np.ndarray, rows: Iterable[bytes]
    ) -> FileDigests:
        """Of these `items`, whose contents are `rows`: one digest, kept while `files`, which hold
        them, are as they were. Of what lies in memory alone, without files, nothing is kept.
        """
        stamps = _stamps(Path(title), list(map(str, files)))
        state = hashlib.sha256(
            FORMAT + stamps.tobytes() + np.ascontiguousarray(items).tobytes()
        ).digest()
        place = (
            file_cache.place_of("digests", Path(f"{files[0]}#{len(items)}.{items[0]}"))
            if files
            else None
        )
        before = (place and file_cache.read(place)) or b""
        if before.startswith(state):
            return FileDigests([""], np.frombuffer(before[len(state) :], np.uint8).reshape(1, 32))
        young = time.time_ns() - int(stamps.max(initial=0)) < YOUNG_NS
        whole, progress = hashlib.sha256(), Progress(f"{title}: images", len(items))
        for count, row in enumerate(rows):
            whole.update(len(row).to_bytes(8) + row)
            if distributed.is_main():
                progress.show(count + 1, READING)
        if place and not young and stamps.min() >= 0 and distributed.is_main():
            _warn_of(file_cache.write(place, state + whole.digest()))
        return FileDigests([""], np.frombuffer(whole.digest(), np.uint8).reshape(1, 32))


def file_digests(root: Path, names: list[str], largest: int | None = None) -> FileDigests:
    """Of the files below `root`, or of `root` itself, whose name is "".

    Of more than `largest` bytes only the first count, and the size. Digests are kept, so that a
    file which is as it was costs one stat. Call it on every rank: the files are dealt to them.
    Raises UserError where ranks name different files.
    """
    place, short = (
        file_cache.place_of("digests", root),
        np.array([short_hash(name) for name in names], np.uint64),
    )
    _check_ranks_agree(root, short)
    before = _read(place)
    mine = np.arange(distributed.rank(), len(names), distributed.world())
    paths = [
        os.path.join(root, names[item]) if names[item] else str(root) for item in mine.tolist()
    ]
    stamps = _stamps(root, paths)
    records = np.zeros(len(mine), RECORD)
    records["name"], records["size"] = short[mine], -1
    known = _known(before, records["name"], stamps)
    records[known >= 0] = before[known[known >= 0]]
    try:
        _read_files(
            root, paths, stamps, np.flatnonzero((known < 0) & (stamps[:, 0] >= 0)), largest, records
        )
    except BaseException:
        if distributed.is_main():
            _keep(place, before, records)  # or who starts again would read it all again
        raise
    all_records = _of_all_ranks(records, len(names))
    if distributed.is_main():
        _keep(place, before, all_records)
    return FileDigests(names, all_records["sha256"])


def short_hash(name: str) -> int:
    """64 bits of a name, whatever bytes it came from."""
    return int.from_bytes(
        hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    )


def _stamps(root: Path, paths: Sequence[str]) -> np.ndarray:
    """(n, 3) int64: bytes, and the times in ns of the last change of content and of any change; -1
    for no file."""
    stamps, progress = (
        np.full((len(paths), 3), -1, np.int64),
        Progress(f"{root}: files", len(paths)),
    )
    for row, path in enumerate(paths):
        if row % 256 == 0 and distributed.is_main():
            progress.show(row, "looking whether they are as they were")
        try:
            status = os.stat(path)
        except (OSError, ValueError):
            continue
        if stat.S_ISREG(status.st_mode):
            stamps[row] = status.st_size, status.st_mtime_ns, status.st_ctime_ns
    return stamps


def _known(before: np.ndarray, names: np.ndarray, stamps: np.ndarray) -> np.ndarray:
    """The record of each file that is as it was, (n,); -1 for others. `before` is sorted by
    name."""
    if not len(before):
        return np.full(len(names), -1)
    rows = np.searchsorted(before["name"], names).clip(max=len(before) - 1)
    same = before["name"][rows] == names
    for column, field in enumerate(("size", "modified", "changed")):
        same &= before[field][rows] == stamps[:, column]
    return np.where(same & (stamps[:, 0] >= 0), rows, -1)


def _read_files(
    root: Path,
    paths: Sequence[str],
    stamps: np.ndarray,
    rows: np.ndarray,
    largest: int | None,
    records: np.ndarray,
) -> None:
    """Read the files of these rows and write what they hold into `records`."""
    progress = Progress(f"{root}: bytes", int(stamps[rows, 0].clip(max=largest or 2**62).sum()))
    done = 0

    def tick(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        if distributed.is_main():
            progress.show(done, READING)

    for row in rows.tolist():
        started = time.time_ns()
        digest, after = _read_digest(paths[row], largest, tick)
        records["sha256"][row] = np.frombuffer(digest, np.uint8)
        if after == stamps[row].tolist() and started - max(after[1:]) >= YOUNG_NS:
            for value, field in zip(after, ("size", "modified", "changed")):
                records[field][row] = value


def _read_digest(
    path: str, largest: int | None, tick: Callable[[int], None]
) -> tuple[bytes, list[int]]:
    """A file's digest, zeros where it cannot be read, and its size and times afterwards."""
    whole, left = hashlib.sha256(), largest
    try:
        descriptor = os.open(
            path, os.O_RDONLY | os.O_NONBLOCK
        )  # or a pipe in its place would never open
        try:
            while block := os.read(descriptor, BLOCK if left is None else min(BLOCK, left)):
                whole.update(block)
                left = None if left is None else left - len(block)
                tick(len(block))
            status = os.fstat(descriptor)
        finally:
            os.close(descriptor)
    except OSError:
        return bytes(32), []
    if left == 0:
        whole.update(str(status.st_size).encode())
    return whole.digest(), [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _of_all_ranks(records: np.ndarray, count: int) -> np.ndarray:
    """Each rank's share of the records -> all of them, in order, on every rank."""
    world = distributed.world()
    if world == 1:
        return records
    rows = distributed.gather_rows(
        torch.from_numpy(records.view(np.uint8).reshape(len(records), RECORD.itemsize))
    )
    places = np.concatenate([np.arange(rank, count, world) for rank in range(world)])
    all_records = np.empty(count, RECORD)
    all_records[places] = rows.numpy().reshape(-1).view(RECORD)
    return all_records


def _check_ranks_agree(root: Path, names: np.ndarray) -> None:
    number = int.from_bytes(hashlib.sha256(names.tobytes()).digest()[:7])
    if distributed.any_true(distributed.largest(number) != number):
        raise UserError(
            f"{root}: the processes find different files there: give every machine the same data"
        )


def _read(place: Path) -> np.ndarray:
    data = file_cache.read(place) or b""
    if not data.startswith(FORMAT) or (len(data) - len(FORMAT)) % RECORD.itemsize:
        return np.zeros(0, RECORD)
    return np.frombuffer(data, RECORD, offset=len(FORMAT))


def _keep(place: Path, before: np.ndarray, new: np.ndarray) -> None:
    """Keep what is known now, and of other files below the root what was known."""
    others = before[~np.isin(before["name"], new["name"])]
    records = np.concatenate([others, new[new["size"] >= 0]])
    records = records[np.unique(records["name"], return_index=True)[1]]  # sorted
    if records.tobytes() == before.tobytes():
        return
    _warn_of(file_cache.write(place, FORMAT + records.tobytes()))


def _warn_of(reason: str | None) -> None:
    if reason is not None:
        print(
            f"warning: what files hold is not kept ({reason}): they will be read again to know "
            "them",
            flush=True,
        )
