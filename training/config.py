"""One YAML per run over frozen dataclasses, read by the types of their fields.

A file may `include:` another, which it overrides key by key; the command line overrides both. A
field made by `one_of` holds one of a table's config classes: its `kind` names which, and naming
another kind drops what a lower layer said about the old one.

What a word means is the field's to say, in a file and on the command line alike: `007` is text for
a `str`, 7 for an `int`. Nothing else reads it, so `1e3`, `yes` and `a: b` are as good a name as
any.

Text in a file may refer to another key of the same configuration, `${root}/tokenizer`, which
omegaconf looks up; `$${` stands for `${` itself.
Nothing else in braces means anything: no environment, no functions. On the command line `${` is
text.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from training.errors import UserError
from training.plugins import KEY as PLUGINS
from training.plugins import check_imported, import_plugins, plugins_of
from training.text import printable
from training.words import REFERENCE, Word, dump, escaped, parse, read, shown

T = TypeVar("T")
COMMAND_LINE = "command line"
LARGEST = 2**63 - 1  # what a tensor of integers holds
LAYERS, MOST_LAYERS = (
    ("depth", "layers", "blocks"),
    1000,
)  # ends of keys: counts of what is built one by one
WHOLE = re.compile(r"[+-]?\d+(_\d+)*", re.ASCII)
NUMBER = re.compile(
    r"[+-]?(\d[\d_]*\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?\.?inf|\.?nan", re.ASCII | re.IGNORECASE
)
YES, NO = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
NULLS = ("", "null")
Fail = Callable[[str, str], UserError]  # of a key, and what is wrong with it


class Misfit(ValueError):
    """A value is not of its field's type; the message says why, without the key."""


@dataclasses.dataclass
class Section:
    """A config before it is made: its class, and of each field a value of the right type or a
    Section."""

    schema: type
    values: dict[str, Any]


def one_of(table: Mapping[str, type], kind: str, **defaults: Any) -> Any:
    """A dataclass field that holds an instance of one of `table`'s classes, by default of
    `kind`'s."""
    return dataclasses.field(
        default_factory=lambda: table[kind](**defaults),
        metadata={"table": table, "kind": kind, "defaults": defaults},
    )


def signed(default: Any) -> Any:
    """A dataclass field of numbers that may be below 0, which others are refused for."""
    return dataclasses.field(default=default, metadata={"signed": True})


def load(
    schema: type[T],
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    alone: bool = False,
    plugins: bool = False,
) -> T:
    """The config of class `schema` that a YAML file and `section.key=value` overrides describe.

    With `alone` the file includes no other one: people who should read none here may have written
    it. With `plugins` the modules that it names as such are imported first; else they must have
    been. Raises UserError, naming the file (or the command line), the key and the nearest right
    one.
    """
    origins: dict[str, str] = {}
    layers = [*_layers(Path(path).expanduser(), origins, alone=alone), read_overrides(overrides)]
    _note_origins(layers[-1], COMMAND_LINE, origins)
    raw: dict[str, Any] = {}
    for layer in layers:
        if layer is layers[-1]:
            _tell_replaced(raw, layer, str(path))
        raw = _overlay(raw, layer)
    if plugins:
        import_plugins(_plugins(raw, str(path)), Path(path).expanduser().parent)
    return _made(schema, raw, str(path), origins)


def from_dict(schema: type[T], raw: Mapping[str, Any], source: str) -> T:
    """The config that a plain dictionary, such as `to_dict` gives, describes; `source` names it in
    errors.

    Its text refers to nothing. Raises UserError, naming the key.
    """
    return _made(schema, escaped(raw), source, {})


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain dictionaries, lists and scalars, as JSON would hold it; with `plugins`, the
    modules outside this project that its kinds are from, where there are any."""
    plain = json.loads(json.dumps(dataclasses.asdict(config)))
    modules = plugins_of(config)
    return plain | {PLUGINS: modules} if modules else plain


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"loop": {"steps": 3}} -> {"loop.steps": 3}; of lists of such, {"data": [{"n": 1}]} ->
    {"data.0.n": 1}."""
    pairs: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, list) and value and all(isinstance(each, dict) for each in value):
            value = {str(index): each for index, each in enumerate(value)}
        pairs |= (
            flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
        )
    return pairs


def to_yaml(config: Any) -> str:
    """The resolved config as YAML, for `load`."""
    return dump(escaped(to_dict(config)))


def read_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """`section.key=value` words as nested dictionaries of Words. Raises UserError for a word of
    another form."""
    raw: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not all(part.replace("_", "").isalnum() for part in key.split(".")):
            raise UserError(f"{COMMAND_LINE}: {override!r} is not of the form section.key=value")
        *sections, name = key.split(".")
        section = raw
        for part in sections:
            inner = _section(section.get(part), key)
            section[part] = inner if isinstance(inner, dict) else {}
            section = section[part]
        section[name] = _joined(section.get(name), Word(escaped(text)), key)
    return raw


# From files to nested dictionaries


def _layers(
    path: Path, origins: dict[str, str], seen: tuple[Path, ...] = (), *, alone: bool = False
) -> list[dict[str, Any]]:
    """The layers of a file: what it includes, then itself."""
    if path.resolve() in seen:
        raise UserError(f"{path}: include: the files include each other")
    if not path.is_file():
        near = difflib.get_close_matches(
            path.name, [p.name for p in path.parent.glob("*.yaml")], 1, 0.4
        )
        hint = f"; did you mean {path.with_name(near[0])}?" if near else ""
        raise UserError(f"{path}: there is no such configuration file{hint}")
    raw = read(path)
    include = raw.pop("include", None)
    if include is not None and not isinstance(include, str):
        raise UserError(f"{path}: include: one file name is expected, not {shown(include)}")
    if include and alone:
        raise UserError(f"{path}: include: a saved configuration stands alone")
    layers = (
        _layers(path.parent / os.path.expanduser(include), origins, (*seen, path.resolve()))
        if include
        else []
    )
    _note_origins(raw, str(path), origins)
    return [*layers, raw]


def _section(value: Any, key: str) -> Any:
    """Where a word of the command line is a section, {a: 1}, its dictionary; all else as it is."""
    if not isinstance(value, Word) or not value.lstrip().startswith(("{", "[")):
        return value
    try:
        return parse(value)
    except ValueError as error:
        raise UserError(f"{COMMAND_LINE}: {key}: {error}") from None


def _joined(before: Any, word: Word, key: str) -> Any:
    """A word after another one about the same key: of two sections what both say, else the
    later."""
    if before is None or not word.lstrip().startswith("{"):
        return word
    before = _section(before, key)
    return _merge(before, _section(word, key)) if isinstance(before, dict) else word


def _merge(before: Any, after: Any) -> Any:
    if not isinstance(before, dict) or not isinstance(after, dict):
        return after
    return before | {key: _merge(before.get(key), value) for key, value in after.items()}


def _note_origins(
    raw: Mapping[str, Any], source: str, origins: dict[str, str], prefix: str = ""
) -> None:
    for key, value in raw.items():
        origins[f"{prefix}{key}"] = source
        if isinstance(value, Mapping):
            _note_origins(value, source, origins, f"{prefix}{key}.")


def _overlay(
    lower: Mapping[str, Any], upper: Mapping[str, Any], prefix: str = ""
) -> dict[str, Any]:
    merged = dict(lower)
    for key, value in upper.items():
        below = merged.get(key)
        if isinstance(below, Mapping):
            value = _section(value, f"{prefix}{key}")
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            other_kind = "kind" in value and value["kind"] != below.get("kind", value["kind"])
            merged[key] = dict(value) if other_kind else _overlay(below, value, f"{prefix}{key}.")
        else:
            merged[key] = value
    return merged


def _tell_replaced(
    lower: Mapping[str, Any], upper: Mapping[str, Any], source: str, prefix: str = ""
) -> None:
    """Say, once, where the command line names another kind: what a file says of the old one does
    not hold for it."""
    for key, value in upper.items():
        below, name = lower.get(key), f"{prefix}{key}"
        value = _section(value, name) if isinstance(below, Mapping) else value
        if not isinstance(value, Mapping) or not isinstance(below, Mapping):
            continue
        before = below.get("kind", value.get("kind"))
        if value.get("kind", before) == before:
            _tell_replaced(below, value, source, f"{name}.")
        elif (left := [f"{name}.{each}" for each in below.keys() - value.keys() - {"kind"}]) and (
            os.environ.get("RANK", "0") == "0"
        ):
            print(
                f"{name}.kind={value['kind']}: kinds do not combine: what {source} says of {before} is "
                f"left out ({', '.join(sorted(left))})",
                file=sys.stderr,
            )


# From nested dictionaries to a config


def _made(schema: type[T], raw: Any, source: str, origins: Mapping[str, str]) -> T:
    """The config itself. What a class says of its own values is told with the file's name."""

    def make(section: Section) -> Any:
        return section.schema(
            **{name: make(v) if isinstance(v, Section) else v for name, v in section.values.items()}
        )

    fail = _failing(source, origins)
    if isinstance(raw, Mapping) and PLUGINS in raw:
        check_imported(_plugins(raw, source), source)
        raw = {key: value for key, value in raw.items() if key != PLUGINS}
    tree = _typed(schema, raw, "", fail)
    known = OmegaConf.create(_for_omegaconf(tree))
    resolved = _resolved(tree, known, [known], 0, "", fail)
    try:
        return make(resolved)
    except (ValueError, ArithmeticError) as error:  # a range check in some __post_init__
        raise UserError(f"{source}: {error}") from None


def _plugins(raw: Mapping[str, Any], source: str) -> list[str]:
    """The modules that a configuration names under `plugins`."""
    try:
        return _converted(list[str], _section(raw.get(PLUGINS, []), PLUGINS))
    except Misfit as error:
        raise UserError(f"{source}: {PLUGINS}: {error}: [my_quantizers]") from None


def _failing(source: str, origins: Mapping[str, str]) -> Fail:
    def fail(key: str, message: str) -> UserError:
        parent = next((k for k in (key, key.rpartition(".")[0]) if k in origins), "")
        return UserError(f"{origins.get(parent, source)}: {key}: {message}")

    return fail


def _typed(
    schema: type, raw: Any, prefix: str, fail: Fail, defaults: Mapping[str, Any] = {}
) -> Section:
    """What `raw` says and, where it says nothing, the defaults. Unknown keys and wrong types fail
    here."""
    if not isinstance(raw, Mapping):
        raise fail(
            prefix.rstrip(".") or "config", f"a section of keys is expected, not {shown(raw)}"
        )
    fields, hints, values = (
        {field.name: field for field in dataclasses.fields(schema)},
        get_type_hints(schema),
        {},
    )
    for key in raw:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, 1, 0.5)
            hint = f"did you mean {near[0]}?" if near else f"it takes {', '.join(sorted(fields))}"
            raise fail(f"{prefix}{key}", f"unknown key; {hint}")
    for name, field in fields.items():
        key, default = f"{prefix}{name}", defaults.get(name, _default(field))
        hint, optional = _without_none(hints[name])
        raw_value = _section(raw[name], key) if name in raw and hint is not str else raw.get(name)
        if "table" in field.metadata:
            chosen, inner = _chosen(
                field, raw_value if name in raw else {}, defaults.get(name), key, fail
            )
            values[name] = _typed(chosen, raw_value if name in raw else {}, f"{key}.", fail, inner)
        elif (
            optional
            and name in raw
            and (raw_value is None or (isinstance(raw_value, Word) and raw_value in NULLS))
        ):
            values[name] = None
        elif dataclasses.is_dataclass(hint) and (name in raw or default is not None):
            values[name] = _typed(
                hint, raw_value if name in raw else {}, f"{key}.", fail, _fields(default)
            )
        elif name in raw:
            values[name] = _value(hint, raw_value, key, fail, "signed" in field.metadata)
        elif default is dataclasses.MISSING:
            raise fail(key, "this key has no default: give it a value")
        else:
            values[name] = default
    return Section(schema, values)


def _chosen(
    field: Any, raw_value: Any, default: Any, key: str, fail: Fail
) -> tuple[type, Mapping[str, Any]]:
    """The class that a field made by `one_of` is to hold, and the defaults of its fields."""
    table, kind, defaults = (
        field.metadata["table"],
        field.metadata["kind"],
        field.metadata["defaults"],
    )
    if default is not None:
        kind, defaults = default.kind, _fields(default)
    if isinstance(raw_value, str):
        raise fail(key, f"a section is expected: {field.name}: {{kind: {raw_value}}}")
    chosen = raw_value.get("kind", kind) if isinstance(raw_value, Mapping) else kind
    if not isinstance(chosen, str) or chosen not in table:
        near = difflib.get_close_matches(str(chosen), table, 1, 0.4)
        hint = f"did you mean {near[0]}? It" if near else "it"
        raise fail(f"{key}.kind", f"unknown kind {chosen!r}; {hint} is one of {', '.join(table)}")
    return table[chosen], defaults if chosen == kind else {}


def _default(field: Any) -> Any:
    """A field's default, or MISSING."""
    return (
        field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    )


def _fields(config: Any) -> dict[str, Any]:
    """What a config holds; nothing of what is none."""
    made = dataclasses.is_dataclass(config) and not isinstance(config, type)
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(config)} if made else {}


def _without_none(hint: Any) -> tuple[Any, bool]:
    """`X | None` as X and True."""
    if get_origin(hint) not in (Union, types.UnionType):
        return hint, False
    (inner,) = [each for each in get_args(hint) if each is not types.NoneType]
    return inner, True


def _value(hint: Any, raw_value: Any, key: str, fail: Fail, signed: bool) -> Any:
    """`raw_value` as one of the type `hint`. Numbers are finite and, unless they are signed, not
    below 0."""
    if get_origin(hint) is dict and isinstance(raw_value, Mapping):
        return {
            str(name): _value(get_args(hint)[1], each, f"{key}.{name}", fail, signed)
            for name, each in raw_value.items()
        }
    try:
        value = _converted(hint, raw_value)
    except Misfit as error:
        raise fail(key, str(error)) from None
    largest = MOST_LAYERS if key.endswith(LAYERS) else LARGEST
    smallest = -largest if signed else 0
    for number in value if isinstance(value, list | tuple) else [value]:
        if isinstance(number, int | float) and not smallest <= number <= largest:  # NaN is neither
            raise fail(key, f"{number} is not a number from {smallest} to {largest}")
    return value


def _converted(hint: Any, raw_value: Any) -> Any:
    """`raw_value` as a value of the type `hint`; text is read as one. Raises Misfit."""
    items = get_args(hint)
    if get_origin(hint) in (tuple, list):
        many = (len(items) == 2 and items[1] is Ellipsis) or get_origin(hint) is list
        if not isinstance(raw_value, list | tuple) or not (many or len(raw_value) == len(items)):
            raise Misfit(f"{shown(raw_value)} is of a wrong type or length")
        try:
            return get_origin(hint)(
                [_converted(items[0 if many else i], each) for i, each in enumerate(raw_value)]
            )
        except Misfit:
            raise Misfit(f"{shown(raw_value)} is of a wrong type or length") from None
    if isinstance(raw_value, Mapping | list | tuple) or raw_value is None or hint not in READERS:
        what = (
            "nothing (null)"
            if raw_value is None
            else "a section"
            if isinstance(raw_value, Mapping)
            else shown(raw_value)
        )
        raise Misfit(
            f"Cannot convert {what} to {NAMES.get(hint, hint)}{QUOTE if hint is str else ''}"
        )
    if type(raw_value) is hint or (hint is float and type(raw_value) is int):
        return hint(raw_value)
    value = (
        READERS[hint](str(raw_value).strip().lower() if hint is not str else raw_value)
        if isinstance(raw_value, str)
        else None
    )
    if value is None:
        raise Misfit(f"Value {str(raw_value)!r} is not {NAMES[hint]}{QUOTE if hint is str else ''}")
    return value


def _bool(text: str) -> bool | None:
    return True if text in YES else False if text in NO else None


def _int(text: str) -> int | None:
    return int(text) if WHOLE.fullmatch(text) and len(text) < 1000 else None


def _float(text: str) -> float | None:
    plain = text.replace("_", "").replace(".inf", "inf").replace(".nan", "nan")
    return float(plain) if NUMBER.fullmatch(text) else None


READERS: dict[Any, Callable[[str], Any]] = {str: str, bool: _bool, int: _int, float: _float}
NAMES = {str: "text", bool: "true or false", int: "a whole number", float: "a number"}
QUOTE = ": put text in quotes"


# References


def _resolved(value: Any, known: DictConfig, holder: Any, place: Any, key: str, fail: Fail) -> Any:
    """The same with what its text refers to in `known`, and with the home folder for `~`.

    `holder[place]` is the value within `known`, which is omegaconf's, and looks references up.
    """
    if isinstance(value, Section):
        return Section(value.schema, _resolved(value.values, known, holder, place, key, fail))
    if isinstance(value, dict):
        return {
            name: None
            if each is None
            else _resolved(each, known, holder[place], name, f"{key}.{name}".lstrip("."), fail)
            for name, each in value.items()
        }
    if isinstance(value, list | tuple):
        inner = [
            _resolved(each, known, holder[place], i, key, fail) for i, each in enumerate(value)
        ]
        return type(value)(inner)
    try:
        return _text(value, known, holder, place) if isinstance(value, str) else value
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise fail(key, f"{reason}; $${{ stands for the characters ${{") from None
    except Misfit as error:
        raise fail(key, str(error)) from None


def _text(text: str, known: DictConfig, holder: Any, place: Any) -> str:
    looked_up = holder[place] if "${" in text else text
    for name in REFERENCE.findall(text):
        if name and OmegaConf.is_config(OmegaConf.select(known, name)):
            raise Misfit(f"${{{name}}} refers to more than one value")
    resolved = os.path.expanduser(str(looked_up))
    # Bytes of a path that are no UTF-8 have no place in YAML.
    if resolved != resolved.encode(errors="replace").decode():
        raise Misfit(
            f"{printable(resolved)} is not UTF-8: rename it, or give a link to it with another name"
        )
    return resolved


def _for_omegaconf(value: Any) -> Any:
    """A tree in plain containers, its text escaped as omegaconf has it. Of `${...}` it holds keys
    alone, which `words.parse` has seen to, so that no resolver is ever called. A None is left out:
    nothing may refer to it."""
    if isinstance(value, Section):
        return _for_omegaconf(value.values)
    if isinstance(value, dict):
        return {name: _for_omegaconf(each) for name, each in value.items() if each is not None}
    if isinstance(value, list | tuple):
        return [_for_omegaconf(each) for each in value]
    if isinstance(value, str):
        return re.sub(r"(\\*)(\$?)\$\{", lambda m: 2 * m[1] + ("\\" if m[2] else "") + "${", value)
    return value
