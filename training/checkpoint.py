"""Run folders and checkpoints: written under a temporary name, fsynced, renamed; checksummed; no
pickles.

config.yaml, inputs.json     the resolved configuration, and hashes of what the run is made from
inventory.npz                what the images were, to say what became of them
log.jsonl, events.out.*      figures by step
checkpoints/step-00000600/   state.pt and manifest.json (SHA-256): everything to resume
weights/model.safetensors    averaged weights, what others load
previews/                    pictures
requeue                      only after SIGTERM: that the run asks to be started again
.lock                        all of this by name: what is not listed there is never removed
                             (training/folder.py)
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from training import distributed
from training.atomic import replace_file, settle
from training.config import to_dict, to_yaml
from training.errors import UserError
from training.folder import Folder, Kind
from training.signals import Interrupted
from training.words import escaped, undump

# Settings that a run may change between one start and the next: they move no weight, or, where they
# only say how the same step is computed, not beyond rounding.
FREE_KEYS = {"root", "log_every", "save_every", "preview_every", "keep", "workers", "sampling"}
FREE_KEYS |= {"accumulate", "sharding", "compile", "gradient_checkpointing"}

CHECKSUM = "tensors_sha256"  # in the metadata of published weights


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value: Any) -> str:
    """SHA-256 of a JSON value in canonical form."""
    return hashlib.sha256(
        json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()


def _made(folder: Path) -> bool:
    """Whether a folder without a list holds a run: of before there were lists, or copied without
    hidden files."""
    has_checkpoints = any(
        RUN.fits(f"checkpoints/{name}", folder=True) for name in _entries(folder / "checkpoints")
    )
    is_marked = (folder / ".lock").is_file() and (folder / "inputs.json").is_file()
    return (folder / "config.yaml").is_file() and (has_checkpoints or is_marked)


def _entries(folder: Path) -> list[str]:
    return os.listdir(folder) if folder.is_dir() else []


STEP = re.compile(
    r"step-([0-9]{8}|[1-9][0-9]{8,})"
)  # exactly as `_name` writes it: a copy of another name is no one's
CHECKPOINT = ("state.pt", "manifest.json")
ALWAYS = ("config.yaml", "inputs.json", "log.jsonl", "requeue", "weights/model.safetensors")
RUN = Kind(
    "run",
    (
        *map(re.escape, ALWAYS),
        r"events\.out\.tfevents\.[0-9]{20}\.[0-9]+",
        rf"checkpoints/{STEP.pattern}/(state\.pt|manifest\.json)",
        rf"previews/{STEP.pattern}\.png",
        r"inventory\.npz",
        r"weights/[\w-]+\.json",
        r"weights/[\w-]+/[\w.-]+\.json",
        r"model/[\w.-]+",
    ),
    made=_made,
)


class OtherInput(UserError):
    """A run was made from something else than what is there now."""

    def __init__(self, message: str, name: str) -> None:
        super().__init__(message)
        self.name = name  # of the input


class Run:
    """A run's folder: one configuration, one writer."""

    def __init__(self, folder: Path, config: Any) -> None:
        self.folder, self.config = folder, config
        self.files = Folder(folder, RUN)
        self._warned: set[str] = set()

    @classmethod
    def open(
        cls,
        folder: str | Path,
        config: Any,
        *,
        fresh: bool = False,
        inputs: Mapping[str, str] | None = None,
        where: Mapping[str, str] = {},
    ) -> Run:
        """Take a run folder, new or to be resumed.

        `inputs` are the SHA-256 of what the run is made from, by name; `where` has for some of them
        the setting that only says where they lie, and may change while they do not. Raises
        UserError when another process writes to the folder, when the run was made with other
        settings or from other inputs (OtherInput, of the first that differs), or when it holds
        something else. `fresh` first removes what runs wrote there, and nothing else.
        """
        run = cls(Path(folder), config)

        def take() -> None:
            try:
                run._take(fresh, inputs or {}, where)
                replace_file(run.folder / "config.yaml", to_yaml(config).encode())
                replace_file(
                    run.folder / "inputs.json", json.dumps(inputs or {}, indent=1).encode()
                )
            except BaseException:
                run.files.release()  # or who catches the error would hold the folder with it
                raise

        distributed.on_main(take)
        return run

    def _take(self, fresh: bool, inputs: Mapping[str, str], where: Mapping[str, str]) -> None:
        self._refuse_what_is_no_run(fresh)
        self.files.take()
        for name in self._steps():
            settle(self.checkpoints / name)
        if fresh:
            self._start_over()
        self.files.note(*ALWAYS)
        if self._steps():  # before the first, nothing would be lost
            settings, made_from = self._settings(), self._inputs()
            known = made_from or {}
            said = list(self._same_settings(settings, known, where))
            self._check_inputs(inputs, known)
            missing = " and ".join(name for name in inputs if name not in known)
            if missing and made_from is not None:
                said.append(
                    f"warning: {self.folder}: an earlier version began it, and did not note its "
                    f"{missing}: it goes on with what is there now"
                )
            for line in said:
                print(line, flush=True)

    def _refuse_what_is_no_run(self, fresh: bool) -> None:
        """Raise UserError for a folder with files that no list of ours names, but for a run without
        hidden files, which may go on."""
        has_lock = (self.folder / ".lock").is_file()
        if not self.folder.is_dir() or has_lock or not self.files.strangers():
            return
        if not (self.folder / "config.yaml").is_file():
            raise UserError(
                f"{self.folder}: holds files but no config.yaml, so it is no run: "
                "name another folder"
            )
        if fresh:
            raise UserError(
                f"{self.folder}: no run here made this folder: remove it yourself to start over"
            )

    def _settings(self) -> dict[str, Any]:
        """What the checkpoints were made with. Raises UserError where that is lost."""
        file = self.folder / "config.yaml"
        if not file.is_file():
            raise UserError(
                f"{file} is not there, and with what settings {self.newest()} was made, nothing "
                "else says: put it back, or start the run over with --fresh (make: FRESH=1)"
            )
        try:
            return undump(file)
        except ValueError as error:
            raise UserError(f"{file}: damaged ({error}): start the run over with --fresh") from None

    def _same_settings(
        self, settings: dict[str, Any], known: Mapping[str, str], where: Mapping[str, str]
    ) -> Iterator[str]:
        """Raise UserError for a setting that is another now; a line about each that only says where
        the same inputs lie."""
        movable = {key for name, key in where.items() if name in known}
        movable -= {key for name, key in where.items() if name not in known}
        now = _rooted(escaped(to_dict(self.config)))
        for key, before, after in _differences(_rooted(settings), now):
            if key not in movable:
                raise UserError(
                    f"{self.folder} was made with {key}={before}, and now it is {after}: give the "
                    "run another name, or start it over with --fresh (make: FRESH=1)"
                )
            yield f"{self.folder}: {key} was {before} and is {after}, which is the same: it goes on"

    def _check_inputs(self, inputs: Mapping[str, str], known: Mapping[str, str]) -> None:
        """Raise OtherInput for the first that is not what the run was made from."""
        for name, now in inputs.items():
            if known.get(name, now) != now:
                raise OtherInput(
                    f"{self.folder} was made from {name} {known[name][:8]}…, which is now "
                    f"{now[:8]}…: start it over with --fresh (make: FRESH=1)",
                    name,
                )

    def _start_over(self) -> None:
        """Remove what runs wrote. Raises UserError, and removes nothing, where others' files would
        be taken for it."""
        for name in self._steps():
            others = set(_entries(self.checkpoints / name)) - set(CHECKPOINT)
            if others:
                raise UserError(
                    f"{self.checkpoints / name / min(others)}: no command here wrote it, and it is "
                    "in the way: "
                    "move it away"
                )
        self.files.clear()

    def _inputs(self) -> dict[str, str] | None:
        """What the run was made from; None where that is lost: it is not compared, as the run
        itself is whole."""
        file = self.folder / "inputs.json"
        try:
            before = json.loads(file.read_text())
            if not isinstance(before, dict) or not all(
                isinstance(value, str) for value in before.values()
            ):
                raise ValueError("no hashes by name")
            return before
        except (OSError, ValueError) as error:
            print(
                f"warning: {file}: damaged ({error}): what the run was made from is not compared",
                flush=True,
            )
            return None

    @property
    def _lock(self) -> IO[bytes] | None:
        return self.files.lock

    def _steps(self) -> list[str]:
        """Names of checkpoints, whole or not, the oldest first."""
        return sorted(filter(STEP.fullmatch, _entries(self.checkpoints)), key=_number)

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def previews(self) -> Path:
        return self.folder / "previews"

    def finished(self, steps: int) -> bool:
        """Whether the last of `steps` steps is in a checkpoint."""
        return (self.checkpoints / _name(steps) / "manifest.json").is_file()

    def newest(self) -> str:
        """The name of the newest checkpoint, whole or not; empty where there is none."""
        return max(self._steps(), key=_number, default="")

    @contextlib.contextmanager
    def marking(self) -> Iterator[None]:
        """Leave the marker `requeue` when SIGTERM ends the block; an earlier one goes as it begins.
        Whatever else ends it before its time, the folder is free for another start at once."""
        marker = self.folder / "requeue"
        if distributed.is_main():
            marker.unlink(missing_ok=True)
        try:
            yield
        except BaseException as error:
            if (
                isinstance(error, Interrupted)
                and error.number == signal.SIGTERM
                and distributed.is_main()
            ):
                step = int(self.newest().removeprefix("step-") or 0)
                facts = {"step": step, "signal": "SIGTERM", "time": datetime.now(UTC).isoformat()}
                replace_file(marker, json.dumps(facts).encode())
            self.files.release()
            raise

    def save(self, step: int, state: dict[str, Any], keep: int | None) -> None:
        """Write a checkpoint, then remove all but the newest `keep`, if it is given. Only rank 0
        writes.

        Raises UserError when the disk is full: the older checkpoints stay as they are.
        """
        if not distributed.is_main():
            return
        folder = self.checkpoints / _name(step)
        try:
            with self.files.subfolder(f"checkpoints/{folder.name}") as temporary:
                torch.save(state, temporary / "state.pt")
                files = {
                    p.name: {"sha256": sha256(p), "bytes": p.stat().st_size}
                    for p in temporary.iterdir()
                }
                manifest = {"step": step, "files": files}
                (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1))
        except (OSError, RuntimeError) as error:  # torch.save reports a full disk as either
            raise _unwritable(folder, _size(state), error) from None
        steps = self._steps()
        earlier = [
            name for name in steps if _number(name) <= step
        ]  # later ones are damaged: we passed them over
        for old in [name for name in steps if name not in earlier[-keep:]] if keep else ():
            reason = self.files.drop(f"checkpoints/{old}")
            if reason and old not in self._warned:
                print(f"warning: {self.checkpoints / old} stays: {reason}", flush=True)
                self._warned.add(old)

    def latest(self) -> dict[str, Any] | None:
        """The newest checkpoint's state that is whole, or None. Says which damaged ones it passes
        over."""
        for folder in [self.checkpoints / name for name in reversed(self._steps())]:
            damage = _damage(folder)
            if damage is None:
                try:
                    return torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
                except (
                    Exception
                ) as error:  # a file that is what its manifest says, but was not made by `save`
                    damage = f"state.pt: {type(error).__name__}: {str(error).splitlines()[0]}"
            if distributed.is_main():
                print(
                    f"warning: {folder} is damaged ({damage}); falling back to the one before it",
                    flush=True,
                )
        return None

    def publish(self, tensors: dict[str, Tensor], step: int) -> None:
        """Write weights/model.safetensors, what other programs load."""
        if distributed.is_main():
            write_weights(weights_path(self.folder), tensors, {"step": str(step)})


def write_weights(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file atomically, with a checksum. Raises UserError when the disk is
    full."""
    from safetensors.torch import save

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    data = _in_order(save(tensors, metadata | {CHECKSUM: _tensors_hash(tensors)}))
    try:
        replace_file(path, data)
    except OSError as error:
        raise _unwritable(path, len(data), error) from None


def weights_path(run_folder: Path) -> Path:
    return Path(run_folder) / "weights" / "model.safetensors"


def load_weights(run_folder: Path) -> dict[str, Tensor]:
    """The published weights of a run. Raises UserError when there are none or they are damaged."""
    from safetensors import SafetensorError, safe_open

    path = weights_path(run_folder)
    if not path.is_file():
        raise UserError(f"{path}: there are no weights here: train that run first")
    try:
        with safe_open(path, "pt") as file:
            tensors, expected = (
                {name: file.get_tensor(name) for name in file.keys()},
                file.metadata() or {},
            )
        if expected.get(CHECKSUM, actual := _tensors_hash(tensors)) != actual:
            raise SafetensorError(
                f"its tensors have the SHA-256 {actual[:8]}, "
                f"not {expected[CHECKSUM][:8]} as written"
            )
    except SafetensorError as error:
        raise UserError(
            f"{path}: damaged ({error}): remove it and run its training command again"
        ) from None
    return tensors


def weights_hash(run_folder: Path) -> str:
    """SHA-256 of a run's published weights, by which others refer to it."""
    path = weights_path(run_folder)
    if not path.is_file():
        raise UserError(f"{path}: there are no weights here: train that run first")
    return sha256(path)


def _in_order(data: bytes) -> bytes:
    """A safetensors file with its header sorted: several metadata stand in random order."""
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:start]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return b"".join([len(header).to_bytes(8, "little"), header, memoryview(data)[start:]])


def _tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and bytes."""
    whole = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        whole.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        whole.update(tensor.flatten().view(torch.uint8).numpy())
    return whole.hexdigest()


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _number(name: str) -> int:
    return int(name.removeprefix("step-"))


def _damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None when it is whole."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        for name, entry in manifest["files"].items():
            if (folder / name).stat().st_size != entry["bytes"]:
                return f"{name} has another size than its manifest says"
            if sha256(folder / name) != entry["sha256"]:
                return f"{name} has another SHA-256 than its manifest says"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _size(state: Any) -> int:
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, dict):
        return sum(map(_size, state.values()))
    return sum(map(_size, state)) if isinstance(state, list | tuple) else 0


def _unwritable(path: Path, size: int, error: Exception) -> UserError:
    free = shutil.disk_usage(next(p for p in path.parents if p.exists())).free
    return UserError(
        f"{path}: about {size} bytes cannot be written ({free} bytes are free): {error}; what was "
        "saved before "
        "is intact: make room and run the same command again"
    )


def _rooted(value: Any, root: str = "") -> Any:
    """A config with its root replaced by a mark in every path, so that a root can be moved as a
    whole."""
    if isinstance(value, dict):
        root = root or str(value.get("root", ""))
        return {key: _rooted(entry, root) for key, entry in value.items()}
    if isinstance(value, str) and root and (value + "/").startswith(root.rstrip("/") + "/"):
        return "${root}" + value[len(root.rstrip("/")) :]
    return value


def _differences(old: Any, new: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*new, *(k for k in old if k not in new)]:
            if key not in FREE_KEYS:
                yield from _differences(
                    old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key
                )
    elif old != new:
        yield prefix, old, new
