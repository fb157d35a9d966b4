"""One YAML per run over frozen dataclasses (structured omegaconf).

A file may `include:` another, which it overrides key by key; the command line overrides both. A field made by
`one_of` holds one of a table's config classes: its `kind` names which, and naming another kind drops what a
lower layer said about the old one.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from training.command import UserError
from training.text import printable

T = TypeVar("T")
COMMAND_LINE = "command line"
LARGEST = 2**63 - 1  # what a tensor of integers holds
LAYERS, MOST_LAYERS = ("depth", "layers", "blocks"), 1000  # ends of keys: counts of what is built one by one


def one_of(table: Mapping[str, type], kind: str, **defaults: Any) -> Any:
    """A dataclass field that holds an instance of one of `table`'s classes, by default of `kind`'s."""
    return dataclasses.field(
        default_factory=lambda: table[kind](**defaults),
        metadata={"table": table, "kind": kind, "defaults": defaults},
    )


def load(schema: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """The config of class `schema` that a YAML file and `section.key=value` overrides describe.

    Raises UserError, naming the file (or the command line), the key and the nearest right one.
    """
    origins: dict[str, str] = {}
    layers = [*_read(Path(path), origins), read_overrides(overrides)]
    _note_origins(layers[-1], COMMAND_LINE, origins)
    raw: dict[str, Any] = {}
    for layer in layers:
        raw = _overlay(raw, layer)
    return from_dict(schema, raw, str(path), origins)


def from_dict(schema: type[T], raw: Mapping[str, Any], source: str, origins: Mapping[str, str] = {}) -> T:
    """The config that a plain dictionary describes; `source` names it in errors."""

    def fail(key: str, message: str) -> UserError:
        parent = next((k for k in (key, key.rpartition(".")[0]) if k in origins), "")
        return UserError(f"{origins.get(parent, source)}: {key}: {message}")

    prototype = _prototype(schema, raw, "", fail)
    try:
        config = OmegaConf.merge(OmegaConf.structured(prototype), raw)
        missing = sorted(OmegaConf.missing_keys(config))
        made = None if missing else OmegaConf.to_object(config)
    except (OmegaConfBaseException, TypeError) as error:
        if getattr(error, "full_key", None):
            raise fail(str(error.full_key), str(error).splitlines()[0]) from None
        key, value = _misfit(prototype, raw)  # omegaconf does not say where for tuples
        raise fail(key, f"{value!r} is of a wrong type or length") from None
    except (ValueError, ArithmeticError) as error:  # a range check in some __post_init__
        raise UserError(f"{source}: {error}") from None
    if missing:
        raise fail(missing[0], "this key has no default: give it a value")
    for key, value in _scalars(OmegaConf.to_container(config, resolve=True)):
        largest = MOST_LAYERS if key.endswith(LAYERS) else LARGEST
        if isinstance(value, int | float) and not 0 <= value <= largest:  # NaN is neither
            raise fail(key, f"{value} is not a number from 0 to {largest}")
        # Bytes of a path that are no UTF-8 have no place in YAML.
        if isinstance(value, str) and value != value.encode(errors="replace").decode():
            raise fail(key, f"{printable(value)} is not UTF-8: rename it, or give a link to it with another name")
    return made


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain dictionaries, lists and scalars, as JSON would hold it."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def to_yaml(config: Any) -> str:
    """The resolved config as YAML."""
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


def _read(path: Path, origins: dict[str, str], seen: tuple[Path, ...] = ()) -> list[dict[str, Any]]:
    """The layers of a file: what it includes, then itself."""
    if path.resolve() in seen:
        raise UserError(f"{path}: include: the files include each other")
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], 1, 0.4)
        hint = f"; did you mean {path.with_name(near[0])}?" if near else ""
        raise UserError(f"{path}: there is no such configuration file{hint}")
    try:
        loaded = OmegaConf.load(path)
    except Exception as error:  # the YAML parser's errors share no base with omegaconf's
        raise UserError(f"{path}: not readable as YAML: {_one_line(error)}") from None
    if not OmegaConf.is_dict(loaded):
        raise UserError(f"{path}: a configuration is a mapping of sections")
    raw = OmegaConf.to_container(loaded)
    assert isinstance(raw, dict)
    include = raw.pop("include", None)
    if include is not None and not isinstance(include, str):
        raise UserError(f"{path}: include: one file name is expected, not {include!r}")
    layers = _read(path.parent / include, origins, (*seen, path.resolve())) if include else []
    _note_origins(raw, str(path), origins)
    return [*layers, raw]


def read_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """`section.key=value` words as nested dictionaries. Raises UserError for a word of another form."""
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not all(part.replace("_", "").isalnum() for part in key.split(".")):
            raise UserError(f"{COMMAND_LINE}: {override!r} is not of the form section.key=value")
    try:
        raw = OmegaConf.to_container(OmegaConf.from_dotlist(list(overrides)))
    except Exception as error:
        raise UserError(f"{COMMAND_LINE}: {' '.join(overrides)}: {_one_line(error)}") from None
    assert isinstance(raw, dict)
    return raw


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _misfit(prototype: Any, raw: Mapping[Any, Any], prefix: tuple[str, ...] = ()) -> tuple[str, Any]:
    """The first key, and its value, that does not fit by itself."""
    for key, value in raw.items():
        path = (*prefix, str(key))
        alone = functools.reduce(lambda inner, name: {name: inner}, reversed(path), value)
        try:
            OmegaConf.merge(OmegaConf.structured(prototype), alone)
        except (OmegaConfBaseException, TypeError):
            return _misfit(prototype, value, path) if isinstance(value, Mapping) else (".".join(path), value)
    return ".".join(prefix) or "config", raw


def _scalars(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(key, value) of every scalar in nested containers; an item of a list has the list's key."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _scalars(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _scalars(inner, key)
    else:
        yield key, value


def _note_origins(raw: Mapping[Any, Any], source: str, origins: dict[str, str], prefix: str = "") -> None:
    for key, value in raw.items():
        origins[f"{prefix}{key}"] = source
        if isinstance(value, Mapping):
            _note_origins(value, source, origins, f"{prefix}{key}.")


def _overlay(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(lower)
    for key, value in upper.items():
        below = merged.get(key)
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            other_kind = "kind" in value and value["kind"] != below.get("kind", value["kind"])
            merged[key] = dict(value) if other_kind else _overlay(below, value)
        else:
            merged[key] = value
    return merged


def _prototype(schema: type, raw: Any, prefix: str, fail: Any, defaults: Mapping[str, Any] = {}) -> Any:
    """An instance of `schema` whose one_of fields hold the classes that `raw` names; unknown keys fail here."""
    if not isinstance(raw, Mapping):
        raise fail(prefix.rstrip(".") or "config", f"a section of keys is expected, not {raw!r}")
    fields = {field.name: field for field in dataclasses.fields(schema)}
    for key in raw:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, 1, 0.5)
            hint = f"did you mean {near[0]}?" if near else f"it takes {', '.join(sorted(fields))}"
            raise fail(f"{prefix}{key}", f"unknown key; {hint}")
    hints, values = get_type_hints(schema), dict(defaults)
    for name, field in fields.items():
        given, below = raw.get(name, {}), f"{prefix}{name}."
        if "table" in field.metadata:
            table, kind = field.metadata["table"], field.metadata["kind"]
            if isinstance(given, str):
                raise fail(f"{prefix}{name}", f"a section is expected: {name}: {{kind: {given}}}")
            chosen = given.get("kind", kind) if isinstance(given, Mapping) else kind
            if not isinstance(chosen, str) or chosen not in table:
                near = difflib.get_close_matches(str(chosen), table, 1, 0.4)
                hint = f"did you mean {near[0]}? It" if near else "it"
                raise fail(f"{below}kind", f"unknown kind {chosen!r}; {hint} is one of {', '.join(table)}")
            inner = field.metadata["defaults"] if chosen == kind else {}
            values[name] = _prototype(table[chosen], given, below, fail, inner)
        elif dataclasses.is_dataclass(hints[name]):
            inner = {}
            if field.default_factory is not dataclasses.MISSING:
                made = field.default_factory()
                inner = {f.name: getattr(made, f.name) for f in dataclasses.fields(made)}
            values[name] = _prototype(hints[name], given, below, fail, inner)
        elif name not in values:
            required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            if required:
                values[name] = MISSING
    return schema(**values)
