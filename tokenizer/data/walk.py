"""The files below a folder: every real folder is entered once, by itself rather than by a link to
it."""

from __future__ import annotations

import heapq
import os
from pathlib import Path
from typing import NamedTuple


class Repeat(NamedTuple):
    """A folder that was not entered again. Paths are below the root, which is ""."""

    path: str
    first: str  # by which it had been entered


class Walk(NamedTuple):
    """What lies below a folder, as sorted paths relative to it with "/". Hidden files and folders
    are left out."""

    files: list[str]
    folders: list[
        str
    ]  # those that could not be entered, too, and those that were not entered again
    unreadable: dict[str, str]  # folder: why it could not be entered
    repeats: list[Repeat]

    def having(self, *extensions: str) -> list[str]:
        return [file for file in self.files if file.lower().endswith(extensions)]


def walk(root: Path) -> Walk:
    """Links are followed after all real folders, in the order of their names, and never to what
    holds the root."""
    tree = Walk([], [], {}, [])
    real = {"": os.path.realpath(root)}  # of the folders that wait to be entered
    entered: dict[str, str] = {}  # real path: path below the root
    links: list[str] = []

    def enter(start: str) -> None:
        waiting = [start]
        while waiting:
            here = waiting.pop()
            target = real.pop(here)
            tree.folders.append(here)
            if (first := entered.setdefault(target, here)) != here:
                tree.repeats.append(Repeat(here, first))
                continue
            try:
                with os.scandir(os.path.join(root, here)) as entries:
                    listed = sorted(entries, key=lambda entry: entry.name)
            except OSError as error:
                tree.unreadable[here] = error.strerror or str(error)
                continue
            for entry in listed:
                path = f"{here}/{entry.name}" if here else entry.name
                if entry.name[0] == ".":
                    continue
                if not _is_folder(entry):
                    tree.files.append(path)
                elif entry.is_symlink():
                    heapq.heappush(links, path)
                else:
                    real[path] = os.path.join(target, entry.name)
                    waiting.append(path)

    enter("")
    top = os.path.realpath(root)
    while links:
        link = heapq.heappop(links)
        real[link] = os.path.realpath(os.path.join(root, link))
        if os.path.commonpath([real[link], top]) == real[link]:  # the root, or what holds it
            real[link] = top
        enter(link)
    tree.files.sort()
    tree.folders.sort()
    return tree


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except (
        OSError
    ):  # of a link that leads nowhere, or where nobody may look: reading it will say so
        return False
