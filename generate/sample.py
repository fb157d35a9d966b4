"""`python -m generate.sample RUN --num 100 --classes 0,3-5`: class-conditional samples of a trained
prior."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from generate.classes import HELP, parse_classes
from training.command import Parser, run_command
from training.errors import UserError
from training.precision import HELP as PRECISION_HELP
from training.precision import PRECISIONS

if TYPE_CHECKING:
    from priors.interface import SampleOptions


def find_prior(path: Path) -> Path:
    """A prior's run folder, or the one named `prior` in a root folder; of a published one
    runs/NAME/prior, where it is imported with its tokenizer."""
    from priors.record import is_prior

    for folder in (path, path / "prior"):
        if is_prior(folder):
            return folder
    from priors.published.imports import folder_of, is_published

    if is_published(path):
        from training import distributed

        distributed.start()
        return folder_of(str(path))
    raise UserError(f"{path}: holds no trained prior: train one first (python -m priors.train)")


def add_class_options(parser: argparse.ArgumentParser, default: str) -> None:
    """--classes and --unconditional."""
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--classes", default="", help=f"{HELP} ({default})")
    kinds.add_argument("--unconditional", action="store_true", help="of no class")


def chosen_classes(arguments: argparse.Namespace, names: list[str]) -> tuple[int, ...]:
    """The class numbers that --classes or --unconditional name; len(names) is the unconditional
    one."""
    return (len(names),) if arguments.unconditional else parse_classes(arguments.classes, names)


MOST = 10**9  # samples, or of a batch: more is a slip of the hand

# The fields of SampleOptions on the command line.
SAMPLING: dict[str, tuple[Callable[[str], Any], str]] = {
    "guidance": (float, "classifier-free guidance scale, 1 is none"),
    "guidance_schedule": (str, "constant, or rising from 1: linear, power_cosine"),
    "guidance_power": (float, "of power_cosine: the larger, the later"),
    "temperature": (float, "divides the logits; 0 takes the likeliest code (greedy)"),
    "top_k": (int, "keep the k likeliest codes, 0 for all"),
    "top_p": (float, "keep the fewest codes of this probability"),
    "steps": (int, "of a prior that samples in parallel steps, 0 for its own number"),
    "sampler": (str, "one of the prior's; TOP/BOTTOM of a hierarchical one"),
    "seed": (int, "sample i depends on the seed, i and its class"),
}


def add_sampling_options(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """A flag per field of SampleOptions, with `several` of comma-separated values; --batch-size and
    --precision."""
    for name, (kind, explained) in SAMPLING.items():
        help_text = f"{explained} (the prior's own)"
        parser.add_argument(_flag(name), type=_several(kind) if several else kind, help=help_text)
    parser.add_argument(
        "--batch-size", type=int, default=50, help="changes speed and memory only (50)"
    )
    parser.add_argument("--precision", choices=PRECISIONS, default="auto", help=PRECISION_HELP)


def sampling_options(arguments: argparse.Namespace, default: SampleOptions) -> SampleOptions:
    """The prior's own options with those that were given. Raises UserError for a value out of
    range."""
    given = {
        name: getattr(arguments, name) for name in SAMPLING if getattr(arguments, name) is not None
    }
    return dataclasses.replace(default, **given)


def check_counts(arguments: argparse.Namespace, *names: str) -> None:
    """Raise UserError for a count below 1, or above what can be numbered."""
    for name in names:
        value = getattr(arguments, name)
        if value < 1:
            raise UserError(f"{_flag(name)} {value}: at least 1 is needed")
        if value > MOST:
            raise UserError(f"{_flag(name)} {value}: at most {MOST:,} can be")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _several(kind: Callable[[str], Any]) -> Callable[[str], tuple]:
    def values(text: str) -> tuple:
        return tuple(dict.fromkeys(kind(part) for part in text.split(",")))

    values.__name__ = kind.__name__  # argparse's errors show it
    return values


def _parse() -> argparse.Namespace:
    parser = Parser(
        prog="python -m generate.sample", description="Draw samples from a trained prior."
    )
    parser.add_argument(
        "run",
        type=Path,
        help="a prior's run folder, or a root folder that holds prior/; or a published prior: "
        "published:NAME, or its file",
    )
    parser.add_argument(
        "--num", type=int, default=100, help="samples, shared evenly by the classes (100)"
    )
    add_class_options(parser, "all")
    parser.add_argument("--out", type=Path, help="output folder (samples/ beside the prior)")
    add_sampling_options(parser)
    parser.add_argument("--png", action="store_true", help="also write every sample as a file")
    return parser.parse_args()


def main() -> None:
    arguments = _parse()
    check_counts(arguments, "num", "batch_size")

    from generate.drawing import Request
    from generate.images import write_samples
    from priors.record import read_record
    from training import distributed

    folder = find_prior(arguments.run)
    record = read_record(folder)
    options = sampling_options(arguments, record.sampling)
    classes = chosen_classes(arguments, record.class_names)
    request = Request(arguments.num, classes, options, arguments.png, arguments.precision)
    distributed.start()
    write_samples(
        folder, record, request, arguments.out or folder.parent / "samples", arguments.batch_size
    )
    distributed.finish()


if __name__ == "__main__":
    run_command(main)
