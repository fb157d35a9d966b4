"""Writing that is whole or absent: a process that dies at any moment leaves the old or the new,
never half of it.

.tessera-staged/     what is to take the place of a folder's contents, while it is made
.tessera-committed/  the same once it is whole, while it takes that place: whoever comes next
                     finishes it
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO

from training.errors import DEEDS, UserError

LOCK, STAGED, COMMITTED = ".lock", ".tessera-staged", ".tessera-committed"
JOURNAL = ".names"  # within COMMITTED: what is to be put in place, and what is to go
BUSY = (
    errno.EBUSY,
    errno.ENOTEMPTY,
    errno.EEXIST,
    errno.ESTALE,
)  # of network file systems, for what is still open


def replace_file(path: Path, data: bytes) -> None:
    """Write a file so that it is either the old one or the new one, whatever happens. A link's
    target is replaced."""
    if path.is_symlink():
        path = Path(os.path.realpath(path))
    if path.is_dir():
        raise UserError(f"{path}: a folder is in the way of a file: move it away")
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path, temporary):
            with open(temporary, "wb") as file:
                file.write(data)
                _sync(file)
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def naming(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Let a failed write say which file it was, which the system does only for opening, and not by
    the name that it, or its folder, had meanwhile.
    """
    try:
        yield
    except OSError as error:
        name = Path(str(error.filename2 or error.filename or path))
        if temporary is not None and name.is_relative_to(temporary):
            name = path / name.relative_to(temporary)
        error.filename, error.filename2 = str(name), None
        raise


@contextlib.contextmanager
def atomic_folder(
    path: Path,
    *,
    ours: Callable[[str], bool] = lambda name: True,
    noting: Callable[[list[str]], object] = lambda names: None,
    last: str | None = None,
) -> Iterator[Path]:
    """A temporary folder whose files take the place of those in `path` when the block ends well.

    Otherwise it vanishes. Of what `path` held before, the files go for which `ours(relative name)`
    holds; others stay, and so does a link to a folder. `noting(relative names)` is called before
    the first of them appears. `last` is the file that says to others that the folder is whole: it
    goes first and comes last.

    A process that is killed leaves the old contents or the new ones, or what `settle` makes the new
    ones of. Raises UserError for a file in the way, and where another process is writing.
    """
    path = Path(os.path.realpath(path)) if path.is_symlink() else path
    make_folder(path.parent)
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: a file is in the way of a folder: move it away")
    settle(path)
    inside = path.is_dir()
    staged = path / STAGED if inside else path.with_name(f".{path.name}.{os.getpid()}.tmp")
    for left_over in [path / STAGED, *_siblings(path)]:
        discard(left_over, path)
    staged.mkdir()
    held = _hold(staged)
    try:
        if held is None:
            raise UserError(f"{path}: another process is writing to it: wait for it, or stop it")
        with naming(path, staged):
            yield staged
        names = sorted(files_below(staged))
        noting(names)
        if inside:
            before = {name for name in files_below(path) if not _hidden(name) and ours(name)}
            _commit(path, staged, names, sorted(before - set(names)), last)
        else:
            for name in names:
                _sync_file(staged / name)
            os.rename(staged, path)
            _sync_folder(path.parent)
    except BaseException:
        if held is not None:
            shutil.rmtree(staged, ignore_errors=True)
        settle(path)
        raise
    finally:
        if held is not None:
            os.close(held)


def settle(path: Path) -> None:
    """Finish what a killed process had begun to put in place in `path`; nothing where there was
    none.

    Raises UserError when what it left is damaged.
    """
    committed = path / COMMITTED
    if not committed.is_dir():
        return
    _refuse_link(committed)
    try:
        journal = json.loads((committed / JOURNAL).read_text())
        names, gone, last = journal["names"], journal["gone"], journal["last"]
        outside = [name for name in {*names, *gone} if not _is_below(path, name)]
        if outside:
            raise ValueError(f"{outside[0]} is outside the folder")
    except FileNotFoundError:  # it goes when everything is in place
        names, gone, last = [], [], None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{committed}: damaged ({error}): move it away, and make the folder anew"
        ) from None
    if last in names and os.path.lexists(committed / last):
        gone, names = [last, *gone], [name for name in names if name != last] + [last]
    for name in gone:
        remove_file(path / name)
    for name in names:
        if os.path.lexists(committed / name):
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(committed / name, path / name)
    for folder in {(path / name).parent for name in names}:
        _sync_folder(folder)
    remove_empty(path, gone)
    (committed / JOURNAL).unlink(missing_ok=True)
    shutil.rmtree(committed)


def is_settled(path: Path) -> bool:
    """Whether no process was ended while it put new contents in place in `path`; `settle` finishes
    what one left."""
    return not (path / COMMITTED).is_dir()


def make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except NotADirectoryError:
        raise UserError(f"{path}: a part of this path is a file: name another folder") from None
    except FileExistsError:
        what = "is a link to nothing" if path.is_symlink() else "is a file"
        raise UserError(f"{path}: {what}, where a folder is needed: move it away") from None
    except OSError as error:
        if any(
            error.errno in numbers for numbers in DEEDS.values()
        ):  # which every command tells in one line
            raise
        raise UserError(
            f"{path}: no folder can be made here ({error.strerror}): name another one"
        ) from None


def _commit(path: Path, staged: Path, names: list[str], gone: list[str], last: str | None) -> None:
    """Put what is staged in place. Whatever ends it after the one renaming, `settle` completes."""
    for name in names:
        _sync_file(staged / name)
    replace_file(
        staged / JOURNAL, json.dumps({"names": names, "gone": gone, "last": last}).encode()
    )
    os.rename(staged, path / COMMITTED)
    _sync_folder(path)
    settle(path)


def discard(left_over: Path, path: Path) -> None:
    """Remove a temporary folder that a killed process left. UserError where a process is at work in
    it."""
    if not left_over.is_dir():
        return
    _refuse_link(left_over)
    held = _hold(left_over)
    if held is None:
        raise UserError(f"{path}: another process is writing to it: wait for it, or stop it")
    try:
        shutil.rmtree(left_over)
    finally:
        os.close(held)


def _refuse_link(path: Path) -> None:
    if path.is_symlink():
        raise UserError(f"{path}: is a link, which no command makes: remove it")


def _siblings(path: Path) -> list[Path]:
    """Temporary folders beside `path` that became it, or would have."""
    wanted = re.compile(rf"\.{re.escape(path.name)}\.[0-9]+\.tmp")
    folders = [
        path.with_name(entry) for entry in os.listdir(path.parent) if wanted.fullmatch(entry)
    ]
    return [each for each in folders if each.is_dir() and not each.is_symlink()]


def _hold(folder: Path) -> int | None:
    """A descriptor that tells other processes of this machine that a folder is in use; None where
    one holds it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except (
        OSError
    ):  # network file systems lock no folders; the folder's own `.lock` is what counts there
        pass
    return descriptor


def files_below(folder: Path) -> Iterator[str]:
    """Relative names of all files below a folder; links to folders count as files, and are not
    followed."""
    for root, folders, files in os.walk(folder):
        linked = [each for each in folders if os.path.islink(os.path.join(root, each))]
        for entry in (*files, *linked):
            yield os.path.relpath(os.path.join(root, entry), folder)


def _hidden(name: str) -> bool:
    return name == LOCK or name.startswith((f"{STAGED}/", f"{COMMITTED}/"))


def _is_below(folder: Path, name: str) -> bool:
    """Whether a relative name stays within its folder, links included."""
    parent = os.path.realpath((folder / name).parent)
    return ".." not in name.split("/") and Path(parent).is_relative_to(os.path.realpath(folder))


def parents_of(name: str) -> Iterator[str]:
    while "/" in name:
        name = name.rpartition("/")[0]
        yield name


def remove_file(path: Path) -> None:
    """Remove a file that is there; not a folder nor a link, which no command makes."""
    try:
        if stat.S_ISREG(os.lstat(path).st_mode):
            os.unlink(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        if error.errno not in BUSY:
            raise
        print(
            f"warning: {path}: cannot be removed ({os.strerror(error.errno)}), and stays",
            flush=True,
        )


def remove_empty(path: Path, names: Iterable[str]) -> None:
    """Remove the folders in `path` that held these files, where nothing is left in them and they
    are no links."""
    folders = {folder for name in names for folder in parents_of(name)}
    for folder in sorted(folders, key=len, reverse=True):
        if not (path / folder).is_symlink():
            with contextlib.suppress(OSError):
                os.rmdir(path / folder)


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_file(path: Path) -> None:
    if path.is_file():
        with naming(path), open(path, "rb+") as opened:
            _sync(opened)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
