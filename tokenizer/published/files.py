"""Files of published weights: safetensors and torch.save's, out of their envelopes and prefixes.

Nothing is unpickled but tensors, containers, text and numbers (pickles.py), and tensors are read
when they are asked for, so that an optimizer's state beside a model costs nothing.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from tokenizer.published.pickles import Damaged, Opaque, StoredTensor, module_tensors, read_torch
from training.errors import UserError
from training.words import parse

SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".pkl")
USUAL = (
    "weights.pt",
    "weights.safetensors",
    "model.safetensors",
    "diffusion_pytorch_model.safetensors",
)
# Of training checkpoints. Averaged weights stand before others, as published figures are of them.
AVERAGED = ("ema", "ema_state_dict", "model_ema", "ema_model")
ENVELOPES = ("state_dict", "model", "module", "model_state_dict", "weights")
FIRST_STAGE = "first_stage_model."  # of a tokenizer within the checkpoint of a model on its codes
STAGES = (FIRST_STAGE, "cond_stage_model.")
WRAPPED = "module."  # of modules that were trained on several devices
PREFIXES = (WRAPPED, "_orig_mod.", FIRST_STAGE)  # of distributed and of compiled modules
INDEX = ".index.json"  # of weights in several files, which says what lies where
HALVES = ("encoder.pkl", "decoder.pkl")  # of one model, in one folder
COMPILED = re.compile(r"(^|\.)_orig_mod\.")  # wherever in a name
SHADOW = "model_ema."  # of averages within a state dict, under names without dots
SHADOW_OWN = (f"{SHADOW}decay", f"{SHADOW}num_updates")
CASE = "case.safetensors"  # inputs and outputs beside weights, no weights themselves
CONFIGS = ("config.json", "config.yaml", "model.yaml", "config.yml")


class Stored(Protocol):
    """A tensor in a file."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self) -> Tensor: ...


@dataclasses.dataclass(frozen=True)
class SafeTensor:
    """A tensor of a safetensors file."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self) -> Tensor:
        from safetensors import safe_open

        with safe_open(self.path, "pt") as file:
            return file.get_tensor(self.name)


@dataclasses.dataclass
class Weights:
    """The tensors of one file by plain names."""

    path: Path
    tensors: dict[str, Stored]
    origins: dict[str, str]  # of each the name in the file
    shadowed: bool = False  # whether there are averages under names without dots
    rest: dict[str, Stored] = dataclasses.field(
        default_factory=dict
    )  # what stands beside them, by its name
    stage: str = "first"

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def read(self, name: str) -> Tensor:
        """One tensor as the file has it. Raises UserError when the file is not whole."""
        try:
            return self.tensors[name].read()
        except Exception as error:  # what the readers of files raise shares no base
            raise _damaged(self.path, error) from None


def open_weights(path: str | Path, *, averaged: bool = True, stage: str = "first") -> Weights:
    """A file's tensors; of a file that has them twice the averages, or else as they were trained.

    `stage`: of a checkpoint that holds a tokenizer and the model on its codes, "first" is the
    tokenizer, "second" the model.

    Raises UserError for what is no such file, is damaged, or holds no tensors by name.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: there is no such file: give the path of published weights")
    if path.name.endswith(INDEX):
        found = _plain(path, _open_parts(path, averaged), averaged, stage)
        return dataclasses.replace(found, stage=stage)
    if path.name == HALVES[0] and path.with_name(HALVES[1]).is_file():
        return _joined(path, averaged)
    found = _plain(path, _open_file(path, averaged), averaged, stage)
    return dataclasses.replace(found, stage=stage)


def find_weights(folder: Path, file: str | None = None) -> Path:
    """The one file of weights in a folder. Raises UserError where there is none, or which one is
    not told."""
    if file is not None:
        if not (folder / file).is_file():
            raise UserError(f"{folder / file}: there is no such file: name one of the folder's")
        return folder / file
    files = sorted(each for each in folder.iterdir() if each.suffix in SUFFIXES and each.is_file())
    indexes = sorted(folder.glob(f"*{INDEX}"))
    parts = {name for index in indexes for name in _parts(index).values()}
    files = indexes + [each for each in files if each.name not in parts | {CASE}]
    usual = [each for name in USUAL for each in files if each.name in (name, f"{name}{INDEX}")]
    files = usual[:1] or files
    if sorted(each.name for each in files) == sorted(HALVES):
        files = [folder / HALVES[0]]
    if len(files) != 1:
        names = ", ".join(each.name for each in files) or f"none ({', '.join(SUFFIXES)})"
        raise UserError(
            f"{folder}: one file of weights is expected there, and it has {names}: name it with "
            "file="
        )
    return files[0]


def find_config(weights: Path) -> Path | None:
    """The configuration that lies beside a file of weights, if any does."""
    beside = [weights.with_name(name) for name in CONFIGS]
    if not weights.name.endswith(INDEX):
        beside += [weights.with_suffix(suffix) for suffix in (".json", ".yaml")]
    return next((file for file in beside if file.is_file()), None)


def read_config(path: Path) -> dict[str, Any]:
    """A configuration in JSON or YAML. Raises UserError for what is neither, or no mapping."""
    try:
        text = path.read_text()
        found = json.loads(text) if path.suffix == ".json" else parse(text)
        if not isinstance(found, dict):
            raise ValueError("it is no mapping")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: not readable as a configuration ({error}): copy it again"
        ) from None
    return found


class Hyperparameters:
    """What a published configuration says, by the names that it has there, wherever in it they
    stand."""

    def __init__(self, values: Mapping[str, Any] | None = None, path: Path | str = "") -> None:
        """`path`: of the configuration, or of the weights that have none."""
        self.values, self.path = dict(values or {}), path

    def find(self, *names: str) -> Any:
        """The value at the end of a chain of keys, the least nested one; None where there is
        none."""
        todo: list[Any] = [self.values]
        while todo:
            level = [each for each in todo if isinstance(each, dict)]
            for each in level:
                value: Any = each
                for name in names:
                    value = value.get(name) if isinstance(value, dict) else None
                if value is not None:
                    return value
            todo = [inner for each in level for inner in each.values() if isinstance(inner, dict)]
        return None

    def number(self, *names: str) -> int | None:
        """A whole number. Raises UserError for something else."""
        value = self.find(*names)
        try:
            return None if value is None else int(value)
        except (TypeError, ValueError):
            raise UserError(
                f"{self.path}: {'.'.join(names)}={value!r} is no whole number"
            ) from None

    def heads_of(self, width: int, depth: int) -> int | None:
        """`heads` of a transformer of this size: from the section that says its width and layers,
        else the least nested. None where there is none."""
        todo: list[Any] = [self.values]
        while todo:
            each = todo.pop(0)
            if each.get("heads") and (each.get("width"), each.get("layers")) == (width, depth):
                return int(each["heads"])
            todo += [inner for inner in each.values() if isinstance(inner, dict)]
        return self.number("heads")

    def flag(self, *names: str) -> bool | None:
        """A boolean, or text that says one."""
        value = self.find(*names)
        return (
            value
            if value is None or isinstance(value, bool)
            else str(value).lower() in ("true", "yes", "1")
        )

    def needed(self, *names: str, why: str) -> int:
        """A number that nothing else tells. Raises UserError, in one line, where it is not
        there."""
        value = self.number(*names)
        if value is None:
            told = f"{self.path}: no configuration says {'.'.join(names)}, {why}"
            raise UserError(
                f"{told}: give one that does, config=FILE (or a folder with its config.json)"
            )
        return value


def _parts(index: Path) -> dict[str, str]:
    """Tensors -> the files beside an index that hold them. Raises UserError where it is none."""
    try:
        parts = json.loads(index.read_bytes())["weight_map"]
        if not all(isinstance(file, str) and Path(file).name == file for file in parts.values()):
            raise ValueError("it names files elsewhere")
        return dict(parts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(index, error) from None


def _open_parts(index: Path, averaged: bool) -> dict[str, Stored]:
    """The tensors of all files that an index names."""
    parts, found = _parts(index), {}
    for file in sorted(set(parts.values())):
        path = index.with_name(file)
        if not path.is_file():
            raise UserError(f"{index}: {path} is missing: download it, too")
        found |= _open_file(path, averaged)
    lost = sorted(parts.keys() - found.keys())
    if lost:
        raise UserError(f"{index}: {index.with_name(parts[lost[0]])} lacks {lost[0]}")
    return found


def _open_file(path: Path, averaged: bool) -> dict[str, Stored]:
    """The tensors of one file by its names."""
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    try:
        return _state_dict(path, read_torch(path), averaged)
    except Damaged as error:
        raise _damaged(path, error) from None


def _joined(path: Path, averaged: bool) -> Weights:
    """A model in two files, the names of each under its own."""
    tensors: dict[str, Stored] = {}
    for name in HALVES:
        half = path.with_name(name)
        found = _open_file(half, averaged)
        tensors |= {f"{half.stem}.{inner}": tensor for inner, tensor in found.items()}
    return Weights(path, tensors, {name: name for name in tensors})


def _open_safetensors(path: Path) -> dict[str, Stored]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            found = {}
            for name in file.keys():
                part = file.get_slice(name)
                found[name] = SafeTensor(
                    path, name, tuple(part.get_shape()), _SAFE_DTYPES[part.get_dtype()]
                )
            return found
    except (SafetensorError, OSError, KeyError) as error:
        raise _damaged(path, error) from None


_SAFE_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def _state_dict(path: Path, saved: Any, averaged: bool) -> dict[str, Stored]:
    """The tensors by name within what was saved, out of its envelopes."""
    for _ in range(4):
        names = [*AVERAGED, *ENVELOPES] if averaged else [*ENVELOPES, *AVERAGED]
        inner = [
            name for name in names if isinstance(saved, dict) and _holds_tensors(saved.get(name))
        ]
        if inner:  # first: a counter may lie beside an envelope
            saved = saved[inner[0]]
            continue
        direct = _direct(saved)
        if direct:
            return direct
        break
    raise UserError(
        f"{path}: it holds {_described(saved)} and no tensors by name: give a state dict, alone or "
        "as one of "
        f"{', '.join((*ENVELOPES, *AVERAGED))}"
    )


def _direct(saved: Any) -> dict[str, Stored]:
    """Tensors by name: of a mapping, or of a whole module."""
    if isinstance(saved, Opaque):
        return module_tensors(saved)
    if isinstance(saved, dict) and set(saved) == {"encoder", "decoder"}:  # a state dict for each
        halves = {side: _direct(half) for side, half in saved.items()}
        return {
            f"{side}.{name}": tensor
            for side, half in halves.items()
            for name, tensor in half.items()
        }
    items = saved.items() if isinstance(saved, dict) else ()
    return {
        name: value
        for name, value in items
        if isinstance(name, str) and isinstance(value, StoredTensor)
    }


def _holds_tensors(value: Any) -> bool:
    return bool(_direct(value)) or (
        isinstance(value, dict)
        and any(_direct(value.get(name)) for name in (*ENVELOPES, *AVERAGED))
    )


def _described(saved: Any) -> str:
    if isinstance(saved, Opaque):
        return f"a {saved.of}"
    if isinstance(saved, dict):
        return f"the keys {', '.join(sorted(map(str, saved))[:8])}" if saved else "nothing"
    return f"a {type(saved).__name__}"


def _plain(path: Path, found: dict[str, Stored], averaged: bool, stage: str) -> Weights:
    """Under names without prefixes; averages in the place of what they are averages of."""
    found, outside = _of_stage(found, stage)
    common = "".join(_common_prefixes(found))
    origins: dict[str, str] = {}
    for name in found:
        plain = COMPILED.sub(r"\1", name.removeprefix(common))
        while plain.startswith(WRAPPED):  # some, beside losses that were not wrapped
            plain = plain.removeprefix(WRAPPED)
        if origins.setdefault(plain, name) != name:
            raise UserError(f"{path}: {origins[plain]} and {name} are both {plain}: keep one")
    tensors = {plain: found[name] for plain, name in origins.items()}
    shadows = {name: tensor for name, tensor in tensors.items() if name.startswith(SHADOW)}
    if not shadows:
        return Weights(path, tensors, origins, rest=outside)
    raw = {name: tensor for name, tensor in tensors.items() if name not in shadows}
    if not averaged:
        rest = {origins[name]: tensor for name, tensor in shadows.items()}
        return Weights(path, raw, {name: origins[name] for name in raw}, True, rest)
    # An average's name has lost its dots: so it is made from the names that are known.
    of = {name: f"{SHADOW}{name.replace('.', '')}" for name in raw}
    taken = {name: shadow for name, shadow in of.items() if shadow in shadows}
    lost = sorted(shadows.keys() - taken.values() - set(SHADOW_OWN))
    if lost:
        raise UserError(
            f"{path}: {origins[lost[0]]} is an average of nothing that is there: download the file "
            "again"
        )
    main = {name: shadows[taken[name]] if name in taken else tensor for name, tensor in raw.items()}
    where = {name: origins[taken.get(name, name)] for name in raw}
    rest = {origins[name]: tensors[name] for name in tensors if origins[name] not in where.values()}
    return Weights(path, main, where, True, rest)


def _of_stage(found: dict[str, Stored], stage: str) -> tuple[dict[str, Stored], dict[str, Stored]]:
    """What belongs to the stage that is asked for, and what stands beside it."""
    others = STAGES if stage == "second" else (FIRST_STAGE,)
    inside = {name for name in found if name.startswith(others)}
    if stage == "second":
        inside = found.keys() - inside
    elif not inside:  # a tokenizer alone
        inside = set(found)
    return (
        {name: tensor for name, tensor in found.items() if name in inside},
        {name: tensor for name, tensor in found.items() if name not in inside},
    )


def _common_prefixes(names: Iterable[str]) -> list[str]:
    """What every name begins with, one after the other."""
    found: list[str] = []
    rest = list(names)
    while rest and (
        prefix := next((p for p in PREFIXES if all(n.startswith(p) for n in rest)), None)
    ):
        found.append(prefix)
        rest = [name.removeprefix(prefix) for name in rest]
    return found


def _damaged(path: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return UserError(f"{path}: damaged, or no file of weights ({reason}): download it again")
