"""`python -m generate.sample RUN --num 100 --classes 0,3-5`: class-conditional samples of a trained prior."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
from pathlib import Path

from training.command import Parser, UserError, run_command


def parse_classes(text: str, names: list[str]) -> tuple[int, ...]:
    """Comma-separated names, numbers and ranges a-b -> sorted class numbers; an empty text names all.

    Names come before numbers: class "7" of digits is the one so called. Raises UserError naming the nearest.
    """
    if not text:
        return tuple(range(len(names)))
    by_name = {name.casefold(): number for number, name in enumerate(names)}
    chosen: set[int] = set()
    for item in text.split(","):
        item = item.strip()
        span = re.fullmatch(r"(\d+)(?:-(\d+))?", item)
        if item.casefold() in by_name:
            chosen.add(by_name[item.casefold()])
        elif span and int(span[1]) <= int(span[2] or span[1]) < len(names):
            chosen.update(range(int(span[1]), int(span[2] or span[1]) + 1))
        elif span:
            raise UserError(f"--classes {item}: classes are numbered 0 to {len(names) - 1}, ranges upwards")
        else:
            near = difflib.get_close_matches(item.casefold(), by_name, 1, 0.5)
            some = ", ".join(names[:10]) + (", …" if len(names) > 10 else "")
            hint = f"did you mean {names[by_name[near[0]]]!r}?" if near else f"the classes are {some}"
            raise UserError(f"--classes {item!r}: there is no such class; {hint}")
    return tuple(sorted(chosen))


def find_prior(path: Path) -> Path:
    """A prior's run folder, or the one named `prior` in a root folder."""
    from priors.record import is_prior

    for folder in (path, path / "prior"):
        if is_prior(folder):
            return folder
    raise UserError(f"{path}: holds no trained prior: train one first (python -m priors.train)")


def _parse() -> argparse.Namespace:
    parser = Parser(
        prog="python -m generate.sample", description="Draw class-conditional samples from a trained prior."
    )
    parser.add_argument("run", type=Path, help="a prior's run folder, or a root folder that holds prior/")
    parser.add_argument("--num", type=int, default=100, help="samples, shared evenly by the classes (100)")
    parser.add_argument("--classes", default="", help="names, numbers and ranges: 0,3-5,cat (all)")
    parser.add_argument("--out", type=Path, help="output folder (samples/ beside the prior)")
    own = "(the prior's own)"
    parser.add_argument("--guidance", type=float, help=f"classifier-free guidance scale, 1 is none {own}")
    parser.add_argument("--temperature", type=float, help=f"divides the logits {own}")
    parser.add_argument("--top-k", type=int, help=f"keep the k likeliest codes, 0 for all {own}")
    parser.add_argument("--top-p", type=float, help=f"keep the fewest codes of this probability {own}")
    parser.add_argument("--steps", type=int, help=f"steps of a masked prior {own}")
    parser.add_argument("--seed", type=int, help=f"sample i depends on the seed, i and its class {own}")
    parser.add_argument("--batch-size", type=int, default=50, help="changes speed and memory only (50)")
    parser.add_argument("--png", action="store_true", help="also write every sample as a file")
    return parser.parse_args()


def main() -> None:
    arguments = _parse()
    for name in ("num", "batch_size"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: at least 1 is needed")

    from generate.images import Request, write_samples
    from priors.record import read_record
    from training import distributed

    folder = find_prior(arguments.run)
    record = read_record(folder)
    names = [field.name for field in dataclasses.fields(record.sampling)]
    asked = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    options = dataclasses.replace(record.sampling, **asked)
    classes = parse_classes(arguments.classes, record.class_names)
    request = Request(arguments.num, classes, options, arguments.png)
    distributed.start()
    write_samples(folder, record, request, arguments.out or folder.parent / "samples", arguments.batch_size)
    distributed.finish()


if __name__ == "__main__":
    run_command(main)
