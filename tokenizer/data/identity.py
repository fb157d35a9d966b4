"""What a data set is: the names, classes, split and contents of its items, wherever it lies."""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from tokenizer.data.digests import FileDigests, short_hash
from training import distributed
from training.arrays import read_arrays
from training.checkpoint import OtherInput, Run, replace_file
from training.errors import UserError

if TYPE_CHECKING:
    from tokenizer.data.source import Listing

FORMAT = "tessera-data-1"
FILE = "inventory.npz"  # in a run's folder: what its images were, to say what became of them


@dataclasses.dataclass(frozen=True)
class Inventory:
    """What one split of a data set is made of."""

    class_names: list[str]
    num_items: int
    items_sha256: str  # of their names and labels, in order
    files: FileDigests  # that hold them

    @staticmethod
    def take(listing: Listing, items: np.ndarray) -> Inventory:
        """Of these items of a source, (n,) int64. Reads no file that is as it was; call it on every
        rank."""
        whole = hashlib.sha256()
        for item, label in zip(items.tolist(), listing.labels[items].tolist()):
            whole.update(f"{listing.key(item)}\0{label}\n".encode("utf-8", "surrogatepass"))
        return Inventory(
            list(listing.class_names), len(items), whole.hexdigest(), listing.digests(items)
        )

    @functools.cached_property
    def sha256(self) -> str:
        """The identity of the split: equal where, and only where, all that training can see of it
        is."""
        whole = hashlib.sha256(
            json.dumps([FORMAT, self.class_names, self.num_items, self.items_sha256]).encode()
        )
        for name in self.files.names:
            whole.update(name.encode("utf-8", "surrogatepass") + b"\0")
        whole.update(self.files.sha256.tobytes())
        return whole.hexdigest()


class Split(Protocol):
    """One split of a data set, as `dataset.Images` is."""

    split: str  # its name
    inventory: Inventory


def open_run(
    folder: Path,
    config: Any,
    data: Sequence[Split],
    *,
    fresh: bool = False,
    inputs: Mapping[str, str] = {},
    remedy: str = "",
) -> Run:
    """`Run.open` for a run that is made from splits of a data set, at the path `data.source` of its
    configuration.

    The path may change while the data stay what they were. Raises UserError, with what changed,
    where they did not.
    """
    made_from = {_input(each.split): each.inventory.sha256 for each in data}
    where = dict.fromkeys(made_from, "data.source")
    try:
        run = Run.open(folder, config, fresh=fresh, inputs={**made_from, **inputs}, where=where)
    except OtherInput as error:
        if error.name not in made_from:
            raise
        raise UserError(
            f"{folder} was made from other images: "
            f"{changes(folder, [each.inventory for each in data])}; give it "
            f"those again, or start it over with --fresh (make: FRESH=1){remedy}"
        ) from None
    distributed.on_main(lambda: _note(run, [each.inventory for each in data]))
    return run


def noted(folder: Path, split: str) -> str | None:
    """The identity of the split that a run was made from; None where the run says nothing of it."""
    try:
        return json.loads((folder / "inputs.json").read_text())[_input(split)]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def changes(folder: Path, now: Sequence[Inventory]) -> str:
    """How the images that a run noted differ from those that there are, in words."""
    before = _read_note(folder)
    if before is None:
        return "their names, classes, split or contents"
    differences = [_of_files(before, now), of_classes(before["class_names"], now[0].class_names)]
    return "; ".join(filter(None, differences)) or "their labels, or the split that they are in"


def of_classes(before: Sequence[str], now: Sequence[str]) -> str:
    """How two lists of classes differ, in words; nothing where they do not."""
    if list(before) == list(now):
        return ""
    added, removed = (
        [name for name in one if name not in set(other)]
        for one, other in ((now, before), (before, now))
    )
    if added and len(added) == len(removed):
        return f"class {_first([f'{was} is now {name}' for was, name in zip(removed, added)])}"
    counts = f"{len(before)} classes are now {len(now)}"
    came = [
        f"{verb} {_first(names)}"
        for verb, names in (("with", added), ("without", removed))
        if names
    ]
    return " ".join([counts, *came]) if came else "its classes stand in another order"


def _of_files(before: Mapping[str, Any], now: Sequence[Inventory]) -> str:
    was = dict(zip(before["names"].tolist(), before["contents"].tolist()))
    named = {short_hash(name): name for each in now for name in each.files.names}
    current = {short: content for each in now for short, content in zip(*_shorten(each.files))}
    added = [short for short in current if short not in was]
    removed = [short for short in was if short not in current]
    changed = [short for short, content in current.items() if was.get(short, content) != content]
    moved = collections.Counter(current[short] for short in added) & collections.Counter(
        was[s] for s in removed
    )
    renamed = moved.total()
    counts = {
        "changed": len(changed),
        "added": len(added) - renamed,
        "removed": len(removed) - renamed,
    }
    counts["under another name"] = renamed
    shown = changed or [short for short in added if current[short] not in moved]
    example = f" ({named[shown[0]]})" if shown and named[shown[0]] else ""
    counted = [f"{n} file{'s' * (n != 1)} {what}" for what, n in counts.items() if n]
    return ", ".join([counted[0] + example, *counted[1:]]) if counted else ""


def _shorten(files: FileDigests) -> tuple[list[int], list[int]]:
    """64 bits of each file's name and of what it holds."""
    contents = np.ascontiguousarray(files.sha256[:, :8]).view("<u8").reshape(-1)
    return [short_hash(name) for name in files.names], contents.tolist()


def _note(run: Run, now: Sequence[Inventory]) -> None:
    pairs = {short: content for each in now for short, content in zip(*_shorten(each.files))}
    content = io.BytesIO()
    np.savez(
        content,
        names=np.array(list(pairs), "<u8"),
        contents=np.array(list(pairs.values()), "<u8"),
        class_names=np.array(json.dumps(now[0].class_names)),
    )
    run.files.note(FILE)
    path = run.folder / FILE
    if not path.is_file() or path.read_bytes() != content.getvalue():
        replace_file(path, content.getvalue())


def _read_note(folder: Path) -> dict[str, Any] | None:
    try:
        arrays: dict[str, Any] = read_arrays(folder / FILE)
        class_names = [str(name) for name in json.loads(str(arrays["class_names"]))]
        return {
            "names": arrays["names"],
            "contents": arrays["contents"],
            "class_names": class_names,
        }
    except (OSError, ValueError, KeyError, TypeError):  # only the words of a refusal depend on it
        return None


def _input(split: str) -> str:
    return f"{split} images"


def _first(names: Sequence[str]) -> str:
    return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else "".join(names)
