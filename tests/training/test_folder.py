"""Folders that commands write to: whole contents or none whenever a process dies, and nobody else's
file is touched."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import os
import signal
from pathlib import Path

import processes
import pytest

from training.atomic import atomic_folder, is_settled, replace_file, settle
from training.checkpoint import RUN
from training.errors import UserError
from training.folder import Folder, Kind

PICTURES = Kind("set of pictures", ("about.json", r"[0-9]+\.png", r"more/[0-9]+\.png"))
HIDDEN = (".tessera-staged", ".tessera-committed")


def contents(path: Path) -> dict[str, str]:
    """Everything that a user sees in a folder."""
    found = {p.relative_to(path).as_posix(): p for p in path.rglob("*") if p.is_file()}
    return {
        name: p.read_text()
        for name, p in found.items()
        if name != ".lock" and not name.startswith(".tessera")
    }


def fill(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)


OLD = {"about.json": "old", "1.png": "old", "2.png": "old", "more/1.png": "old"}
NEW = {"about.json": "new", "1.png": "new", "3.png": "new", "more/2.png": "new"}
MINE = {
    "thesis.tmp": "mine",
    "notes.txt": "mine",
    ".about.json.x.tmp": "mine",
    "more/5.txt": "mine",
}


def make(path: Path, files: dict[str, str]) -> None:
    with Folder(path, PICTURES).taken() as folder, folder.replacing("about.json") as staged:
        fill(staged, files)


def test_new_contents_replace_the_listed_ones_alone(tmp_path):
    make(tmp_path / "out", OLD)
    fill(tmp_path / "out", MINE)
    make(tmp_path / "out", NEW)
    assert contents(tmp_path / "out") == NEW | MINE
    assert os.listdir(tmp_path) == ["out"] and not any(
        (tmp_path / "out" / name).exists() for name in HIDDEN
    )


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk")
    for files in (OLD, NEW):
        make(tmp_path / "out", files)
        assert contents(tmp_path / "disk") == files
    assert (tmp_path / "out").is_symlink() and sorted(os.listdir(tmp_path)) == ["disk", "out"]
    with atomic_folder(tmp_path / "out") as staged:
        fill(staged, OLD)
    assert (tmp_path / "out").is_symlink() and contents(tmp_path / "disk") == OLD


def test_a_file_in_the_way_is_refused_and_kept(tmp_path):
    make(tmp_path / "out", OLD)
    fill(tmp_path / "out", {"3.png": "mine"})
    with pytest.raises(UserError, match=r"3\.png: no command here wrote it.*move it away"):
        make(tmp_path / "out", NEW)
    assert contents(tmp_path / "out") == OLD | {"3.png": "mine"}
    with (
        Folder(tmp_path / "out", PICTURES).taken() as folder,
        pytest.raises(UserError, match=r"3\.png"),
    ):
        folder.note("3.png")
    assert contents(tmp_path / "out") == OLD | {"3.png": "mine"}


def test_clearing_leaves_what_is_not_listed_and_says_so(tmp_path, capsys):
    make(tmp_path / "out", OLD)
    fill(tmp_path / "out", MINE)
    with Folder(tmp_path / "out", PICTURES).taken() as folder:
        folder.clear()
    assert (
        "stays: .about.json.x.tmp, notes.txt, thesis.tmp, more/5.txt\n" in capsys.readouterr().out
    )
    assert contents(tmp_path / "out") == MINE


def test_a_link_where_a_file_was_written_is_neither_followed_nor_replaced(tmp_path):
    (tmp_path / "precious").write_text("mine")
    make(tmp_path / "out", OLD)
    (tmp_path / "out" / "1.png").unlink()
    (tmp_path / "out" / "1.png").symlink_to("../precious")
    for attempt in (lambda folder: folder.note("1.png"), lambda folder: folder.clear()):
        with (
            Folder(tmp_path / "out", PICTURES).taken() as folder,
            pytest.raises(UserError, match=r"1\.png"),
        ):
            attempt(folder)
    assert (tmp_path / "out" / "1.png").is_symlink() and (
        tmp_path / "precious"
    ).read_text() == "mine"


@pytest.mark.parametrize("name", ["../precious", "more/../../precious", "precious", "link/1.png"])
def test_a_list_that_lies_removes_nothing_else(tmp_path, name):
    for folder in (tmp_path, tmp_path / "out", tmp_path / "elsewhere"):
        folder.mkdir(exist_ok=True)
        (folder / "precious").write_text("mine")
    (tmp_path / "elsewhere" / "1.png").write_text("mine")
    (tmp_path / "out" / "link").symlink_to("../elsewhere")
    (tmp_path / "out" / ".lock").write_text(
        f"tessera-files-1 set of pictures\n+{name}\n+{tmp_path}/precious\n"
    )
    with Folder(tmp_path / "out", PICTURES).taken() as folder:
        folder.clear()
    committed = tmp_path / "out" / ".tessera-committed"
    committed.mkdir()
    (committed / ".names").write_text(
        f'{{"names": [], "gone": ["../precious", "{name}"], "last": null}}'
    )
    with pytest.raises(UserError, match=r"damaged .*outside the folder"):
        settle(tmp_path / "out")
    assert all(
        (folder / "precious").exists()
        for folder in (tmp_path, tmp_path / "out", tmp_path / "elsewhere")
    )
    assert (tmp_path / "elsewhere" / "1.png").exists()


def test_a_list_that_was_cut_short_is_read_to_its_last_whole_line(tmp_path):
    make(tmp_path / "out", OLD)
    with open(tmp_path / "out" / ".lock", "ab") as file:
        file.write(b"+4.pn")
    with Folder(tmp_path / "out", PICTURES).taken() as folder:
        assert folder.listed == set(OLD)
        folder.note("7.png")
    assert (tmp_path / "out" / ".lock").read_text().endswith("\n+7.png\n")


@pytest.mark.parametrize("lock", ["", "theirs\n", "tessera-files-1 run\n+1.png\n", None])
def test_a_folder_of_something_else_is_refused_as_it_is(tmp_path, lock):
    (tmp_path / "out").mkdir()
    fill(tmp_path / "out", {"1.png": "mine"})
    if lock is not None:
        (tmp_path / "out" / ".lock").write_text(lock)
    before = {path: path.read_text() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(UserError, match="so it is no set of pictures: name another folder"):
        Folder(tmp_path / "out", PICTURES).take()
    assert {path: path.read_text() for path in (tmp_path / "out").iterdir()} == before


def test_what_was_made_before_there_were_lists_is_adopted_by_name(tmp_path):
    (tmp_path / "out").mkdir()
    fill(tmp_path / "out", OLD | MINE)
    kind = dataclasses.replace(PICTURES, made=lambda path: (path / "about.json").is_file())
    with Folder(tmp_path / "out", kind).taken() as folder:
        assert folder.listed == set(OLD)
        folder.clear()
    assert contents(tmp_path / "out") == MINE


@pytest.mark.parametrize("name", [".tessera-staged", ".tessera-committed"])
def test_a_link_in_place_of_our_own_folders_is_refused(tmp_path, name):
    make(tmp_path / "out", OLD)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / ".names").write_text('{"names": [], "gone": ["1.png"], "last": null}')
    (tmp_path / "out" / name).symlink_to("../elsewhere")
    with pytest.raises(UserError, match="is a link, which no command makes"):
        make(tmp_path / "out", NEW)
    assert contents(tmp_path / "out") == OLD and (tmp_path / "elsewhere" / ".names").exists()


# Processes that die


class Died(BaseException):
    """In place of a kill: nothing after it touches a file."""


CALLS = ("rename", "replace", "unlink", "rmdir", "mkdir")


def dying(monkeypatch, path: Path, point: int, files: dict[str, str], work=make) -> bool:
    """Do `work` and let every change of the files after the first `point` ones fail; whether it
    came so far."""
    count = 0

    def guarded(call):
        def wrapped(*arguments, **keywords):
            nonlocal count
            count += 1
            if count > point:
                raise Died
            return call(*arguments, **keywords)

        return wrapped

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)  # it would take most of the time
        for name in CALLS:
            patch.setattr(os, name, guarded(getattr(os, name)))
        try:
            work(path, files)
        except Died:
            return True
    return False


def replace_whole(path: Path, files: dict[str, str]) -> None:
    with atomic_folder(path) as staged:
        fill(staged, files)


@pytest.mark.parametrize("work", [make, replace_whole])
@pytest.mark.parametrize("linked", [False, True])
def test_whenever_a_process_dies_the_old_or_the_new_contents_are_back(
    tmp_path, monkeypatch, work, linked
):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    point, seen, kept = 0, set(), MINE if work is make else {}
    while True:
        root = tmp_path / str(point)
        root.mkdir()
        (root / "disk").mkdir()
        path = root / "out"
        if linked:
            path.symlink_to("disk")
        work(path, OLD)
        fill(path, kept)
        if not dying(monkeypatch, path, point, NEW, work):
            break
        about = path / "about.json"  # who reads meanwhile finds whole contents, or none
        if about.exists() and is_settled(path):
            assert contents(path) in (OLD | kept, NEW | kept), point
        if work is make:
            Folder(path, PICTURES).take()
        settle(path)
        found = contents(path)
        assert found in (OLD | kept, NEW | kept), point
        seen.add(found["about.json"])
        work(path, NEW)
        assert contents(path) == NEW | kept and path.is_symlink() == linked
        assert not any((path / name).exists() for name in HIDDEN), point
        assert sorted(os.listdir(root)) == ["disk", "out"]
        point += 1
    assert seen == {"old", "new"} and point > 10


def test_a_new_folder_that_was_never_whole_is_not_there(tmp_path, monkeypatch):
    point = 0
    while dying(monkeypatch, tmp_path / str(point) / "out", point, NEW, replace_whole):
        path = tmp_path / str(point) / "out"
        assert not path.exists() or contents(path) == NEW
        replace_whole(path, OLD)
        assert contents(path) == OLD and os.listdir(path.parent) == ["out"]
        point += 1
    assert point > 3


KILLED = """
import os, signal, sys
from pathlib import Path
from test_folder import NEW, make
def watch(event, arguments):
    if event == "os.rename" and str(arguments[1]).endswith("/out/3.png"):
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(watch)
make(Path(sys.argv[1]), NEW)
"""


def test_after_a_kill_the_same_command_goes_on(tmp_path):
    """A real one, in the midst of putting new contents in place."""
    out = tmp_path / "out"
    make(out, OLD)
    fill(out, MINE)
    done = processes.run("-c", KILLED, out)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not is_settled(out) and not (out / "about.json").exists()
    with Folder(out, PICTURES).taken():
        assert contents(out) == NEW | MINE and is_settled(out)


# One writer


@pytest.mark.parametrize("length", range(0, 20, 3))
def test_a_list_that_was_only_begun_is_begun_again(tmp_path, length):
    """By a process that was killed, or met a full disk, within the list's first line."""
    make(tmp_path / "whole", OLD)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".lock").write_bytes((tmp_path / "whole" / ".lock").read_bytes()[:length])
    make(tmp_path / "out", OLD)
    assert (tmp_path / "out" / ".lock").read_bytes() == (tmp_path / "whole" / ".lock").read_bytes()
    assert contents(tmp_path / "out") == OLD


def test_a_folder_has_one_writer(tmp_path):
    with Folder(tmp_path / "out", PICTURES).taken():
        with pytest.raises(UserError, match="another process is writing to this set of pictures"):
            Folder(tmp_path / "out", PICTURES).take()
    with atomic_folder(tmp_path / "out") as staged:
        fill(staged, NEW)
        with (
            pytest.raises(UserError, match="another process is writing"),
            atomic_folder(tmp_path / "out"),
        ):
            pass
    assert contents(tmp_path / "out") == NEW


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_where_there_are_no_locks_it_is_said_once(tmp_path, monkeypatch, capsys, number):
    monkeypatch.setattr(
        fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(number, os.strerror(number)))
    )
    make(tmp_path / "out", NEW)
    assert contents(tmp_path / "out") == NEW
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "gives no locks" in said and str(tmp_path / "out") in said


def test_a_lock_that_went_stale_is_opened_again(tmp_path, monkeypatch):
    flock, stale = fcntl.flock, [1, 1]

    def sometimes(*arguments):
        if stale:
            stale.pop()
            raise OSError(errno.ESTALE, "Stale file handle")
        return flock(*arguments)

    monkeypatch.setattr(fcntl, "flock", sometimes)
    make(tmp_path / "out", NEW)
    assert contents(tmp_path / "out") == NEW
    stale += [1] * 9
    with pytest.raises(UserError, match="run the same command again"):
        Folder(tmp_path / "out", PICTURES).take()


@pytest.mark.parametrize("name", ["out", "out/deep"])
def test_what_is_no_folder_is_named(tmp_path, name):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UserError, match="file"):
        Folder(tmp_path / name, PICTURES).take()
    (tmp_path / "gone").symlink_to("nowhere")
    with pytest.raises(UserError, match="link to nothing"):
        Folder(tmp_path / "gone", PICTURES).take()
    assert (tmp_path / "out").read_text() == "mine" and (tmp_path / "gone").is_symlink()


def test_a_file_behind_a_link_is_replaced_and_the_link_stays(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "stats").write_text("old")
    (tmp_path / "stats").symlink_to("disk/stats")
    replace_file(tmp_path / "stats", b"new")
    assert (tmp_path / "stats").is_symlink() and (tmp_path / "disk" / "stats").read_text() == "new"
    assert os.listdir(tmp_path / "disk") == ["stats"]


@pytest.mark.parametrize("work", [make, replace_whole])
def test_a_request_to_stop_at_any_point_leaves_the_old_or_the_new_at_once(
    tmp_path, monkeypatch, work
):
    """As SIGTERM between two renamings: one call is interrupted, and what cleans up after it is
    not."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    point, seen, kept = 0, set(), MINE if work is make else {}
    while True:
        path, count = tmp_path / str(point) / "out", 0
        work(path, OLD)
        fill(path, kept)

        def once(call):
            def wrapped(*arguments, **keywords):
                nonlocal count
                count += 1
                if count == point + 1:  # noqa: B023
                    raise KeyboardInterrupt
                return call(*arguments, **keywords)

            return wrapped

        try:
            with monkeypatch.context() as patch:
                for name in CALLS:
                    patch.setattr(os, name, once(getattr(os, name)))
                work(path, NEW)
        except KeyboardInterrupt:
            assert contents(path) in (OLD | kept, NEW | kept), point
            assert (
                is_settled(path)
                and not (path / ".tessera-staged").exists()
                and os.listdir(path.parent) == ["out"]
            )
            seen.add((path / "about.json").read_text())
            point += 1
        else:
            break
    assert seen == {"old", "new"}


@pytest.mark.parametrize("folder", ["/proc/runs", "/proc/self/fd/deep/runs", "/dev/null/runs"])
def test_where_the_system_makes_no_folder_is_one_line(folder):
    if not Path(folder).parents[-2].is_dir():
        pytest.skip("of Linux")
    with pytest.raises(UserError, match=f"{folder}: .*: name another"):
        Folder(folder, RUN).take()
