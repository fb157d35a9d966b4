"""Folders that commands write to, beside whatever else lies in them.

.lock   what was written, a name per line, noted before it is; locked by the process that writes

Only what a folder's `.lock` lists is ever removed or replaced. Whatever else is there stays where
it is, and a link stays a link. A file that a command needs to write, and that no command wrote,
ends the command before its work.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import os
import re
import shutil
import stat
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from training.atomic import (
    BUSY,
    COMMITTED,
    LOCK,
    STAGED,
    atomic_folder,
    discard,
    files_below,
    make_folder,
    naming,
    parents_of,
    remove_empty,
    remove_file,
    settle,
)
from training.errors import UserError

HEADER = "tessera-files-1"
TEMPORARY = re.compile(
    r"\.(.+)\.[0-9]+\.(?:tmp|old)", re.DOTALL
)  # of a file or a folder, with the process's number
OF_THE_SYSTEM = re.compile(r"\.nfs[0-9a-f]+|\.DS_Store|lost\+found")
NO_LOCKS = (
    errno.ENOLCK,
    errno.ENOSYS,
    errno.EOPNOTSUPP,
    errno.EINVAL,
)  # of some network file systems


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a command's folders are called, and all that may be in one: a pattern per part of a
    path."""

    name: str  # "run"
    patterns: tuple[str, ...]  # regular expressions, with "/" between those of a path's parts
    remedy: str = "name another folder"
    # Whether a folder without a list is of this kind: made before there were lists, or copied
    # without hidden files.
    made: Callable[[Path], bool] = lambda path: False
    shared: bool = False  # whether others' files are expected in it, as in the root of a pipeline

    def fits(self, name: str, *, folder: bool = False) -> bool:
        """Whether a file of this relative name may be ours; or a folder, because files within it
        may be."""
        parts = name.split("/")
        return any(
            (len(parts) < len(wanted) if folder else len(parts) == len(wanted))
            and all(map(re.fullmatch, wanted, parts))
            for wanted in (pattern.split("/") for pattern in self.patterns)
        )

    def find(self, folder: Path) -> Iterator[str]:
        """Relative names of what is in a folder and may be ours; no other folders are looked
        into."""
        for pattern in self.patterns:
            yield from _find(folder, pattern.split("/"), "")


class Folder:
    """A folder of some kind: one process writes to it, and it removes what the list names and
    nothing else.

    `take` before anything is written, `note` a file before it is, `clear` to start over,
    `replacing` to put whole new contents in place of the old, `release` in the end. All but `take`
    are of the process that has taken it.
    """

    def __init__(self, path: str | Path, kind: Kind) -> None:
        self.path, self.kind = Path(path), kind
        self.listed: set[str] = set()
        self.lock: IO[bytes] | None = None

    @contextlib.contextmanager
    def taken(self, *, wait: bool = False) -> Iterator[Folder]:
        """Take it for the time of a block."""
        self.take(wait=wait)
        try:
            yield self
        finally:
            self.release()

    def take(self, *, wait: bool = False) -> None:
        """Make the folder where it is not there, lock it, and finish or undo what a killed process
        had begun.

        Raises UserError when another process writes to it (or waits for that to end, which is for
        what takes a moment), a file is in the way, or it holds something of another kind or of
        nobody here: then nothing was changed.
        """
        path, what = self.path, self.kind.name
        if path.exists() and not path.is_dir():
            raise UserError(
                f"{path}: a {what} needs a folder, and this is a file: {self.kind.remedy}"
            )
        known = self._read() is not None
        others = [] if known else self.strangers()
        if others and not self.kind.shared and not self.kind.made(path):
            raise UserError(f"{path}: holds {others[0]}, so it is no {what}: {self.kind.remedy}")
        make_folder(path)
        refusal = f"another process is writing to this {what}: wait for it, or stop it"
        self.lock = _open_locked(path, refusal, wait=wait)
        os.register_at_fork(
            after_in_child=_closing(self.lock)
        )  # or whoever reads data would outlive us with it
        try:
            self._begin()
            settle(path)
            discard(path / STAGED, path)
            self._sweep()
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Let others write to it."""
        if self.lock is not None:
            self.lock.close()

    def strangers(self) -> list[str]:
        """Names of what is in the folder, or within it beside what is listed, and is neither ours
        nor the system's."""
        return self._others({folder for name in self.listed for folder in parents_of(name)})

    def _others(self, folders: set[str]) -> list[str]:
        """`strangers`, with the folders to look into."""
        names = []
        for folder in ["", *sorted(folders)]:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                names += [
                    f"{folder}/{entry}".lstrip("/")
                    for entry in sorted(os.listdir(self.path / folder))
                ]
        ours = {*self.listed, *folders, LOCK, STAGED, COMMITTED}
        names = [name for name in names if name not in ours and not self._is_temporary(name)]
        return [name for name in names if not OF_THE_SYSTEM.fullmatch(name.rpartition("/")[2])]

    def note(self, *names: str) -> None:
        """List files that are about to be written. Raises UserError for one that is there and that
        no command wrote."""
        new = [name for name in dict.fromkeys(names) if name not in self.listed]
        for name in new:
            assert self.kind.fits(name), f"{name} is no file of a {self.kind.name}"
            if os.path.lexists(self.path / name):
                raise UserError(
                    f"{self.path / name}: no command here wrote it, and it is in the way: move it "
                    "away"
                )
        self._append("+", new)
        self.listed |= set(new)

    def adopt(self, *names: str) -> None:
        """List files that are known to be ours by what they hold: of before they were listed."""
        new = [
            name for name in names if name not in self.listed and os.path.lexists(self.path / name)
        ]
        self._append("+", new)
        self.listed |= set(new)

    def lists(self, name: str) -> bool:
        """Whether a file is listed, for who has not taken the folder."""
        return name in (self._read() or ())

    def check_free(self) -> None:
        """Raise UserError for the first file that would be taken for ours, and that is not."""
        for name in self.kind.find(self.path):
            if name not in self.listed or not stat.S_ISREG(os.lstat(self.path / name).st_mode):
                raise UserError(
                    f"{self.path / name}: no command here wrote it, and it is in the way: move it "
                    "away"
                )

    def clear(self) -> None:
        """Remove all that is listed, and say what stays. Raises UserError as `check_free`,
        before."""
        self.check_free()
        folders = {folder for name in self.listed for folder in parents_of(name)}
        self.remove(self.listed)
        self.lock.truncate(len(self._header()))
        self._say(self._others(folders))

    def remove(self, names: Iterable[str]) -> None:
        """Remove listed files, those at the top last: they say what the folder is."""
        names = sorted(set(names) & self.listed, key=lambda name: ("/" not in name, name))
        for name in names:
            remove_file(self.path / name)
        remove_empty(self.path, names)
        self._forget(names)

    @contextlib.contextmanager
    def replacing(self, last: str) -> Iterator[Path]:
        """A folder whose files take the place of all that is listed when the block ends well; see
        `atomic_folder`.

        `note` the names before the work, so that a file in the way is found before it.
        """
        before = set(self.listed)
        options = {
            "ours": before.__contains__,
            "noting": lambda names: self.note(*names),
            "last": last,
        }
        with atomic_folder(self.path, **options) as staged:
            yield staged
        self._forget([name for name in self.listed if not os.path.lexists(self.path / name)])
        self._say(self.strangers())

    @contextlib.contextmanager
    def subfolder(self, name: str) -> Iterator[Path]:
        """As `atomic_folder`, of a folder within this one."""

        def note(names: list[str]) -> None:
            self.note(*(f"{name}/{inner}" for inner in names))

        with atomic_folder(
            self.path / name, ours=lambda inner: f"{name}/{inner}" in self.listed, noting=note
        ) as staged:
            yield staged

    def drop(self, name: str) -> str | None:
        """Remove the subfolder `name` with all that it holds, or say why it stays: it holds what no
        command wrote, or the file system does not let go of it yet, as of what is still open."""
        path = self.path / name
        entries = os.listdir(path) if path.is_dir() and not path.is_symlink() else None
        if entries is None or (
            others := [entry for entry in entries if f"{name}/{entry}" not in self.listed]
        ):
            return (
                "it is no folder" if entries is None else f"no command here wrote {others[0]} in it"
            )
        hidden = path.with_name(f".{path.name}.{os.getpid()}.old")
        try:
            os.rename(path, hidden)  # at once, so that no half of it is ever met
            for entry in entries:
                os.unlink(hidden / entry)
            os.rmdir(hidden)
        except OSError as error:
            if error.errno not in BUSY:
                raise
            return os.strerror(error.errno)
        self._forget([f"{name}/{entry}" for entry in entries])
        return None

    def _say(self, strangers: list[str]) -> None:
        if strangers:
            shown = ", ".join(strangers[:5]) + (
                f" and {len(strangers) - 5} more" if len(strangers) > 5 else ""
            )
            print(f"{self.path}: what no command here wrote stays: {shown}", flush=True)

    def _header(self) -> bytes:
        return f"{HEADER} {self.kind.name}\n".encode()

    def _read(self) -> set[str] | None:
        """What is listed; None without a list. Raises UserError for a folder of another kind, or of
        another program."""
        try:
            data = self._bytes() if self.lock else (self.path / LOCK).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except IsADirectoryError:
            data = b"?"
        if data != self._header() and self._header().startswith(data):
            return None  # of a process that was killed, or met a full disk, as it began
        first, *lines = data.split(b"\n")[:-1] or [
            data
        ]  # what follows the last line's end was cut short
        if first + b"\n" != self._header():
            what = first.decode(errors="replace").partition(" ")
            held = (
                f"holds a {what[2]}" if what[0] == HEADER else f"its {LOCK} is of another program"
            )
            raise UserError(
                f"{self.path}: {held}, so it is no {self.kind.name}: {self.kind.remedy}"
            )
        listed: set[str] = set()
        for line in (line.decode("utf-8", "surrogateescape") for line in lines):
            if line[:1] == "-":
                listed.discard(line[1:])
            elif line[:1] == "+" and self.kind.fits(line[1:]):
                listed.add(line[1:])
        return listed

    def _begin(self) -> None:
        """Read the list, of which a last line may be cut short; begin one where there is none."""
        listed = self._read()
        self.listed = listed or set()
        if listed is not None:
            self.lock.truncate(self._bytes().rfind(b"\n") + 1)
            # Where someone put a link, it is not what was written: it is neither followed nor
            # replaced.
            self.listed = {name for name in listed if not os.path.islink(self.path / name)}
        else:
            self.lock.truncate(0)
            self._write(self._header())
            adopted = self.kind.find(self.path) if self.kind.made(self.path) else ()
            names = [name for name in adopted if stat.S_ISREG(os.lstat(self.path / name).st_mode)]
            self._append("+", names)
            self.listed = set(names)

    def _bytes(self) -> bytes:
        self.lock.seek(0)
        return self.lock.read()

    def _append(self, sign: str, names: Iterable[str]) -> None:
        lines = "".join(f"{sign}{name}\n" for name in names).encode("utf-8", "surrogateescape")
        if lines:
            self._write(lines)

    def _write(self, data: bytes) -> None:
        """Add to the list. On a disk that is nearly full the system may take a part of it at a
        time."""
        with naming(self.path / LOCK):
            while data:
                data = data[self.lock.write(data) :]
            os.fsync(self.lock.fileno())

    def _forget(self, names: list[str]) -> None:
        self._append("-", names)
        self.listed -= set(names)

    def _sweep(self) -> None:
        """Remove what a killed process left under temporary names."""
        folders = {"", *(f"{folder}/" for name in self.listed for folder in parents_of(name))}
        for folder in folders:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                for entry in os.listdir(self.path / folder):
                    if self._is_temporary(folder + entry):
                        path = self.path / folder / entry
                        try:
                            shutil.rmtree(path) if path.is_dir() else path.unlink()
                        except OSError as error:
                            if error.errno not in BUSY:  # else a later start removes it
                                raise

    def _is_temporary(self, name: str) -> bool:
        """Whether an entry has a temporary name of a file of ours, or of a folder that holds no
        other files."""
        folder, _, entry = name.rpartition("/")
        match, path = TEMPORARY.fullmatch(entry), self.path / name
        if not match or path.is_symlink():
            return False
        meant = f"{folder}/{match[1]}" if folder else match[1]
        if path.is_dir():
            inner = [name for name in files_below(path) if not OF_THE_SYSTEM.fullmatch(name)]
            return self.kind.fits(meant, folder=True) and all(
                self.kind.fits(f"{meant}/{name}") for name in inner
            )
        return self.kind.fits(meant)


def _open_locked(folder: Path, refusal: str, *, wait: bool) -> IO[bytes]:
    """The folder's `.lock`, locked; where its file system cannot, that is said. Raises UserError
    where it is held."""
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
    for _ in range(3):
        try:
            file = open(
                folder / LOCK,
                "ab+",
                buffering=0,
                opener=lambda name, _: os.open(name, flags, 0o666),
            )
        except IsADirectoryError:
            raise UserError(
                f"{folder / LOCK}: a folder is in the way of a file: move it away"
            ) from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            return file
        except OSError as error:
            if error.errno in NO_LOCKS:
                reason = f"its file system gives no locks ({os.strerror(error.errno)})"
                print(f"warning: {folder}: {reason}: let no other process write there", flush=True)
                return file
            file.close()
            if isinstance(error, BlockingIOError):
                raise UserError(f"{folder}: {refusal}") from None
            if error.errno != errno.ESTALE:  # else it was replaced on the server: open the new one
                raise
    raise UserError(f"{folder / LOCK}: the file system has lost it: run the same command again")


def _closing(file: IO[Any]) -> Callable[[], None]:
    """What closes a file if it is still there."""
    reference = weakref.ref(file)
    return lambda: opened.close() if (opened := reference()) else None


def _find(folder: Path, parts: list[str], prefix: str) -> Iterator[str]:
    try:
        entries = sorted(os.listdir(folder / prefix))
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in entries:
        if re.fullmatch(parts[0], entry):
            if len(parts) == 1:
                yield prefix + entry
            else:
                yield from _find(folder, parts[1:], f"{prefix}{entry}/")
