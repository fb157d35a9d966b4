"""`python -m generate.sweep RUN --guidance 1,2,4 --steps 8,16`: which settings sample best, and at
what cost.

Samples every combination, each in a folder of its own, and then has `python -m eval.sweep` measure
them. What is finished is never made again, so running the same command again goes on, and adding a
value adds its combinations.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from generate.sample import (
    SAMPLING,
    add_class_options,
    add_sampling_options,
    check_counts,
    chosen_classes,
    find_prior,
)
from training.command import Parser, run_command
from training.errors import UserError
from training.folder import Folder, Kind

if TYPE_CHECKING:
    from generate.drawing import Request
    from priors.interface import SampleOptions

PLAN, LINES, TABLE, PLOT = "sweep.json", "sweep.jsonl", "sweep.md", "pareto.png"


def _has_plan(folder: Path) -> bool:
    """Whether a folder without a list of files holds a sweep."""
    try:
        return {"pipeline", "varied", "combinations"} <= json.loads(
            (folder / PLAN).read_bytes()
        ).keys()
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


SWEEP = Kind(
    "sweep",
    tuple(map(re.escape, (PLAN, LINES, TABLE, PLOT))),
    "choose another --out",
    made=_has_plan,
    shared=True,
)


def claim(out: Path) -> None:
    """List what a sweep writes beside its folders of samples. Raises UserError for a file that no
    command wrote."""
    with Folder(out, SWEEP).taken(wait=True) as folder:
        folder.note(PLAN, LINES, TABLE, PLOT)


def combinations(default: SampleOptions, varied: dict[str, tuple]) -> list[SampleOptions]:
    """Every combination of the values, the last option changing fastest. Raises UserError for
    values out of range."""
    return [
        dataclasses.replace(default, **dict(zip(varied, chosen)))
        for chosen in itertools.product(*varied.values())
    ]


def sample_all(
    folder: Path, requests: list[Request], varied: list[str], out: Path, batch_size: int
) -> None:
    """Write samples of every request to `out`/<hash>, and out/sweep.json, which says what belongs
    to this sweep."""
    from generate.images import maker, write_samples
    from priors.record import read_record
    from training import distributed
    from training.checkpoint import digest, replace_file

    record = read_record(folder)
    distributed.on_main(lambda: claim(out))
    named = [
        dataclasses.replace(each, precision="fp32") if each.precision == "auto" else each
        for each in requests
    ]
    names = [
        digest(maker(folder, record) | each.facts())[:12] for each in named
    ]  # the same on every machine
    for index, (name, request) in enumerate(zip(names, requests)):
        if distributed.is_main():
            values = ", ".join(f"{key} {getattr(request.options, key)}" for key in varied)
            print(
                f"{index + 1} of {len(requests)}: {values or 'the options of the prior'}",
                flush=True,
            )
        write_samples(folder, record, request, out / name, batch_size)
    pipeline = (folder / record.tokens).resolve().parent
    plan = {
        "pipeline": os.path.relpath(pipeline, out.resolve()),
        "varied": varied,
        "combinations": names,
    }
    if distributed.is_main():
        replace_file(out / PLAN, json.dumps(plan, indent=1).encode())


def measure(out: Path, *words: Any) -> int:
    """Run eval.sweep on a folder of samples; its exit code. What measures lies downstream: its own
    process."""
    alone = {
        key: value
        for key, value in os.environ.items()
        if key not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")
    }
    return subprocess.run(
        [sys.executable, "-m", "eval.sweep", str(out), *map(str, words)], env=alone
    ).returncode


def _parse() -> argparse.Namespace:
    parser = Parser(
        prog="python -m generate.sweep",
        description="Sample a prior under every combination of settings, each a comma-separated list, and compare.",
    )
    parser.add_argument(
        "run", type=Path, help="a prior's run folder, or a root folder that holds prior/"
    )
    parser.add_argument("--num", type=int, default=1000, help="samples of each combination (1000)")
    add_class_options(parser, "all")
    parser.add_argument("--out", type=Path, help="output folder (sweep/ beside the prior)")
    parser.add_argument(
        "--extractor",
        type=Path,
        metavar="RUN",
        help="in-domain extractor (extractor/ beside tokens/)",
    )
    add_sampling_options(parser, several=True)
    return parser.parse_args()


def main() -> None:
    arguments = _parse()
    check_counts(arguments, "num", "batch_size")
    if arguments.num < 2:
        raise UserError("--num 1: a distance needs at least 2 samples")

    from generate.drawing import Request
    from priors.record import read_record
    from training import distributed

    folder = find_prior(arguments.run)
    record = read_record(folder)
    given = {
        name: getattr(arguments, name) for name in SAMPLING if getattr(arguments, name) is not None
    }
    classes = chosen_classes(arguments, record.class_names)
    make = functools.partial(Request, arguments.num, classes, precision=arguments.precision)
    requests = [make(options) for options in combinations(record.sampling, given)]
    distributed.start()
    varied = [name for name, values in given.items() if len(values) > 1]
    out = arguments.out or folder.parent / "sweep"
    sample_all(folder, requests, varied, out, arguments.batch_size)
    main_process = distributed.is_main()
    distributed.finish()
    if main_process:
        extractor = ["--extractor", arguments.extractor] if arguments.extractor else []
        sys.exit(measure(out, *extractor))


if __name__ == "__main__":
    run_command(main)
