"""YAML whose scalars stay text: what a word means is for the field to say that it is given to."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from training.errors import UserError

MOST_VALUES = 10_000  # of a file, so that aliases of aliases end
REFERENCE = re.compile(r"\$\$\{|\$\{(\w+(?:\.\w+)*)\}")  # the escape, or a key


class Word(str):
    """Text that was not in quotes: what it means is for the field to say that it is given to."""


class _Dumper(yaml.SafeDumper):
    def represent_str(self, text: str) -> yaml.ScalarNode:
        """In single quotes, some characters that end a line elsewhere (U+0085) would come back as
        others."""
        return self.represent_scalar(
            "tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"'
        )


_Dumper.add_representer(str, _Dumper.represent_str)


def dump(value: Any) -> str:
    """Plain dictionaries, lists and scalars as YAML, in their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**9)


def undump(path: Path) -> dict[str, Any]:
    """What `dump` wrote to a file, with numbers as numbers. Raises ValueError, in one line."""
    with _one_line():
        content = yaml.safe_load(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("no mapping of sections")
        return content


def read(path: Path) -> dict[str, Any]:
    """A file's sections, with scalars as text: str where it was quoted, Word where it was not, and
    None.

    Raises UserError for what is no mapping in YAML.
    """
    try:
        raw = parse(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as YAML: {error}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: a configuration is a mapping of sections")
    return raw


def parse(text: bytes | str) -> Any:
    """YAML as dictionaries, lists, str, Word and None. Raises ValueError, in one line."""
    with _one_line():
        node = yaml.compose(text, yaml.SafeLoader)
        return {} if node is None else _plain(node, itertools.count())


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    try:
        yield
    except (yaml.YAMLError, OSError, ValueError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())) from None


def _plain(node: yaml.Node, counter: Iterator[int], within: tuple[yaml.Node, ...] = ()) -> Any:
    kind = node.tag.removeprefix("tag:yaml.org,2002:")
    if kind not in (
        "str",
        "int",
        "float",
        "bool",
        "null",
        "timestamp",
        "value",
        "merge",
        "seq",
        "map",
    ):
        raise _at(node, f"the tag {node.tag!r} is not known here")
    if next(counter) > MOST_VALUES or node in within:
        raise _at(node, f"more than {MOST_VALUES} values, or one that holds itself")
    if isinstance(node, yaml.SequenceNode):
        return [_plain(each, counter, (*within, node)) for each in node.value]
    if isinstance(node, yaml.ScalarNode):
        if "${" in REFERENCE.sub("", node.value):
            raise _at(
                node,
                f"{node.value!r}: ${{key}} refers to another key, and $${{ stands for the "
                "characters",
            )
        return None if kind == "null" else str(node.value) if node.style else Word(node.value)
    made: dict[str, Any] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.value in made:
            raise _at(key, "a key is one word, and there once")
        made[key.value] = _plain(value, counter, (*within, node))
    return made


def _at(node: yaml.Node, problem: str) -> yaml.YAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


def shown(value: Any) -> str:
    """A value as its author would write it."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(shown, value))}]"
    return str(value) if isinstance(value, Word) else repr(value)


def escaped(value: Any) -> Any:
    """The same where no text refers to anything."""
    if isinstance(value, dict):
        return {key: escaped(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [escaped(each) for each in value]
    return value.replace("${", "$${") if isinstance(value, str) else value
