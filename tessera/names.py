"""Whether the project's packages are the ones that Python finds under their names.

They are called by plain words, and a user's own folder of such a name may come first. Then one half
of the project would fail somewhere within the other. Importing this module says so instead, which
is why each of the packages does that before anything else.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PACKAGES = ("training", "tokenizer", "priors", "generate", "eval")
HOME = Path(__file__).resolve().parents[1]  # the folder that holds all of them


def check() -> None:
    """Raise ImportError, in one line with the file and the remedy, where another module of one of
    the names is found first. As `python -m` starts, print that line and exit with 2.
    """
    for name in PACKAGES:
        other = _elsewhere(name)
        if other is None:
            continue
        message = (
            f"Tessera's package {name!r} is hidden by {other}, which Python finds first: rename "
            f"that, or start in another folder (Tessera is in {HOME})"
        )
        if sys.argv[:1] == ["-m"]:  # a command of ours: nobody could catch the error
            print(f"error: {message}", file=sys.stderr)
            raise SystemExit(2)
        raise ImportError(message)


def _elsewhere(name: str) -> Path | None:
    """The file or folder that Python takes for a package of ours; None where it is ours."""
    try:
        spec = getattr(sys.modules.get(name), "__spec__", None) or find_spec(name)
    except (ImportError, ValueError):  # a module that was put together by hand has no spec
        return None
    if spec is None:
        return None
    places = [spec.origin, *(spec.submodule_search_locations or ())]
    places = [Path(place).resolve() for place in places if place not in (None, "namespace")]
    if any(place.is_relative_to(HOME / name) for place in places):
        return None
    return next(iter(places), None)


def public(
    package: str, places: dict[str, str]
) -> tuple[list[str], Callable[[str], Any], Callable[[], list[str]]]:
    """A package's `__all__`, `__getattr__` and `__dir__` (PEP 562), of its public names by the
    modules that hold them.

    A name is looked up when it is asked for, so that importing a package, or one part of it, does
    not import all of it.
    """

    def getattr_(name: str) -> Any:
        if name in places:
            return getattr(import_module(places[name]), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return sorted(places), getattr_, lambda: sorted({*vars(sys.modules[package]), *places})


check()
