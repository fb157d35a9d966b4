"""Which classes a text names: `cat,0,3-5,"tench, Tinca tinca",@7`."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterator

from training.errors import UserError

# A name in quotes, in which a doubled quote stands for one, or what has no comma and begins with no
# quote.
ITEM = re.compile(r'\s*(?:"(?P<quoted>(?:[^"]|"")*)"|(?P<bare>[^",\s][^,]*)?)\s*(?P<end>,|$)')
# Of no more digits than Python reads; what has more is no class either.
NUMBER = re.compile(r"0|[1-9]\d{0,3999}", re.ASCII)
RANGE = re.compile(r"(\d{1,4000})-(\d{1,4000})", re.ASCII)
HELP = (
    "names, numbers from 0, and ranges of them, with commas between: 0,3-5,cat. A name that has a comma stands in "
    "double quotes, '\"tench, Tinca tinca\"'; what is in quotes is no number, and @7 or @3-5 is no name"
)


def parse_classes(text: str, names: list[str]) -> tuple[int, ...]:
    """Items with commas between -> sorted class numbers; an empty text names all.

    One rule for each item. In quotes it is a name, letter by letter; after @ a number, or a range
    of numbers. Else it is a name as it stands, or where there is none so written one that differs
    in case alone; or a number from 0; and a-b is the items a to b. What can be read as several
    classes is refused, with how to write each, and so is what can be read as none, with the nearest
    name: UserError.
    """
    if not text:
        return tuple(range(len(names)))
    chosen: set[int] = set()
    for item, quoted in _items(text):
        if quoted:
            chosen.add(_only(item, _named(item, names, exactly=True), names))
        elif item.startswith("@"):
            chosen.update(_numbered(item, names))
        else:
            chosen.update(_read(item, names))
    return tuple(sorted(chosen))


def _items(text: str) -> Iterator[tuple[str, bool]]:
    """Each item, and whether it stood in quotes."""
    place, more = 0, True
    while more:
        found = ITEM.match(text, place)
        if found is None:
            raise UserError(f"--classes {text}: a quote is not closed, or no comma follows it")
        quoted, bare = found["quoted"], found["bare"]
        if quoted is None and bare is None:
            raise UserError(
                f"--classes {text}: an item is empty: leave out the comma, or write the name in quotes"
            )
        yield (bare.strip(), False) if quoted is None else (quoted.replace('""', '"'), True)
        place, more = found.end(), found["end"] == ","


def _read(item: str, names: list[str]) -> list[int]:
    """A bare item: every reading has to give the same."""
    span = RANGE.fullmatch(item)
    named = _named(item, names)
    if span is None:
        number = [int(item)] if NUMBER.fullmatch(item) and int(item) < len(names) else []
        return [_only(item, named + number, names)]
    if named:
        raise UserError(
            f'--classes {item}: is a class and a range: write "{item}" in quotes, or @{item}'
        )
    return [number for part in _between(item, span, names) for number in _read(part, names)]


def _between(item: str, span: re.Match[str], names: list[str]) -> list[str]:
    """The items of a range; leading zeros stay."""
    first, last = int(span[1]), int(span[2])
    width = len(span[1]) if span[1].startswith("0") else 0
    if not first <= last or (last >= len(names) and f"{last:0{width}d}" not in names):
        raise _beyond(item, names)
    return [f"{number:0{width}d}" for number in range(first, last + 1)]


def _numbered(item: str, names: list[str]) -> list[int]:
    """@number, or @first-last."""
    span = RANGE.fullmatch(item[1:]) or RANGE.fullmatch(f"{item[1:]}-{item[1:]}")
    if span is None:
        raise UserError(
            f"--classes {item}: after @ comes a number or a range; a name that begins so stands in quotes"
        )
    first, last = int(span[1]), int(span[2])
    if not first <= last < len(names):
        raise _beyond(item, names)
    return list(range(first, last + 1))


def _named(item: str, names: list[str], exactly: bool = False) -> list[int]:
    """The classes so called, or else, unless it is to be exact, those whose names differ in case
    alone."""
    exact = [number for number, name in enumerate(names) if name == item]
    if exact or exactly:
        return exact
    return [number for number, name in enumerate(names) if _folded(name) == _folded(item)]


def _only(item: str, readings: list[int], names: list[str]) -> int:
    readings = list(dict.fromkeys(readings))
    if len(readings) == 1:
        return readings[0]
    if readings:
        ways = ", ".join(f"@{number} ({names[number]})" for number in readings[:5])
        more = ", …" if len(readings) > 5 else ""
        raise UserError(
            f"--classes {item}: can be read as {len(readings)} classes: write {ways}{more}"
        )
    if NUMBER.fullmatch(item):
        raise _beyond(item, names)
    some = ", ".join(names[:10]) + (", …" if len(names) > 10 else "")
    near = _nearest(item, names)
    hint = f"the classes are {some}" if near is None else f"did you mean {_written(near)}?"
    raise UserError(f"--classes {item!r}: there is no such class; {hint}")


def _beyond(item: str, names: list[str]) -> UserError:
    return UserError(
        f"--classes {item}: classes are numbered 0 to {len(names) - 1}, ranges upwards"
    )


def _nearest(item: str, names: list[str]) -> str | None:
    by_folded = {_folded(name): name for name in names}
    longer = [
        name for folded, name in by_folded.items() if item and folded.startswith(_folded(item))
    ]
    near = [
        by_folded[folded] for folded in difflib.get_close_matches(_folded(item), by_folded, 1, 0.5)
    ]
    return next(iter([*near, *longer]), None)


def _written(name: str) -> str:
    """As it is to be typed in a shell: in double quotes where it needs them, and single ones
    around."""
    plain = name == name.strip() and not name.startswith("@") and not set(',"') & set(name)
    return f"'{name}'" if plain else "'\"" + name.replace('"', '""') + "\"'"


def _folded(name: str) -> str:
    """What names have in common that differ in case, or in how their accents are encoded."""
    return unicodedata.normalize("NFKC", name).casefold()
