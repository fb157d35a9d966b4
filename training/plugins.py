"""A user's own modules, which add kinds to the tables that configurations choose from.

    # my_quantizers.py
    from tokenizer.quantizers import QUANTIZERS
    QUANTIZERS["mine"] = MineConfig

`plugins: [my_quantizers]` in a YAML that a command is given, or `--plugin my_quantizers`, imports
it before the tables are read. What a run or a shared folder records is never imported: it says
which code made it, and whoever trusts that names it.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from training.errors import UserError

KEY = "plugins"  # of a configuration
OWN = ("training", "tokenizer", "priors", "generate", "eval", "tessera")
NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)


def import_plugins(modules: Sequence[str], beside: Path | None = None) -> None:
    """Import modules that are installed, in the current folder, or in the folder `beside`.

    Raises UserError for a name of another form, or where there is none; what fails within a module
    keeps its traceback.
    """
    folders = [str(Path.cwd()), *([str(beside.resolve())] if beside else [])]
    for name in modules:
        if not NAME.fullmatch(name):
            raise UserError(
                f"{KEY}: {name!r} is no name of a module: give it as Python imports it: my_quantizers"
            )
        # Last, so that a folder of the user's hides nothing; and for good, as processes that read
        # ahead and a module's own imports look there later.
        sys.path += [folder for folder in folders if folder not in sys.path]
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name.split(".")[0] and error.name != name:
                raise
            raise UserError(
                f"{KEY}: {name}: there is no such module, neither installed nor in "
                f"{' or '.join(folders)}: give the name of a file there, without .py"
            ) from None


def take_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """(words of a command line without --plugin, the modules that it named)."""
    rest: list[str] = []
    modules: list[str] = []
    left = iter(words)
    for word in left:
        if word == "--":
            return [*rest, word, *left], modules
        if word.startswith("--plugin="):
            modules.append(word.partition("=")[2])
        elif word == "--plugin":
            modules.append(next(left, ""))
        else:
            rest.append(word)
    return rest, modules


def check_imported(modules: Sequence[str], source: str) -> None:
    """Raise UserError, for the record `source`, unless its plugins were asked for here."""
    for name in modules:
        if name not in sys.modules and name != _main_name():
            raise UserError(
                f"{source}: is of the module {name}, whose code is not run unasked: if you trust it, "
                f"add --plugin {name} (in Python: import {name})"
            )


def plugins_of(config: Any) -> list[str]:
    """The modules outside this project whose kinds a run's configuration holds."""
    if type(config).__module__.split(".")[0] not in OWN:
        return []
    modules = {type(each).__module__ for each in _configs(config)}
    foreign = {name for name in modules if name.split(".")[0] not in OWN}
    return sorted(_main_name() if name == "__main__" else name for name in foreign)


def _configs(config: Any) -> Iterator[Any]:
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        yield config
        for field in dataclasses.fields(config):
            yield from _configs(getattr(config, field.name))


def _main_name() -> str:
    """What the program that runs would be imported as."""
    main = sys.modules.get("__main__")
    spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
    return spec.name if spec else Path(file).stem if file else "__main__"
