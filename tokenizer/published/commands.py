"""What the commands for published tokenizers and for published priors share: check, list, import
and export, as far as both have them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.command import Parser

if TYPE_CHECKING:
    from tokenizer.published.check import Difference


def add_commands(parser: Parser, run_folder: str) -> tuple[Any, argparse.ArgumentParser]:
    """The sub-commands that both have; gives the place for more, and that of import.

    `run_folder` is what import writes.
    """
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    check = commands.add_parser(
        "check", help="compare with a case: what its authors' code makes of given inputs"
    )
    check.add_argument(
        "folder", type=Path, metavar="FOLDER", help="weights, config.json and case.safetensors"
    )
    check.add_argument("--as", dest="kind", metavar="KIND", help="of which kind the weights are")
    check.add_argument(
        "--out", type=Path, metavar="FILE", help="write what was computed, under the case's names"
    )
    commands.add_parser("list", help="names for published:NAME")
    take = commands.add_parser(
        "import", help=f"write one as a {run_folder} that every command takes"
    )
    take.add_argument("reference", metavar="NAME", help="of the list, or a file or folder")
    take.add_argument("out", type=Path, metavar="OUT")
    take.add_argument("--file", metavar="FILE", help="of a folder, or a repository of the Hub")
    take.add_argument("--revision", metavar="REVISION", help="of a repository of the Hub")
    give = commands.add_parser(
        "export", help="write a run's weights under the names of the file that it began with"
    )
    give.add_argument("run", type=Path, metavar="RUN")
    give.add_argument("like", metavar="LIKE", help="the published file, or its name")
    give.add_argument("out", type=Path, metavar="OUT", help=".safetensors file to write")
    for command in (take, give):
        command.add_argument(
            "--as", dest="kind", metavar="KIND", help="of which kind the weights are"
        )
        command.add_argument(
            "--config", type=Path, metavar="FILE", help="the authors' configuration"
        )
    return commands, take


def check_case(
    check: Callable[[Path, str | None], tuple[list[Difference], dict[str, Any]]],
    given: argparse.Namespace,
) -> None:
    """Print how far each tensor is from its case, write what was computed where that is asked for,
    and exit with 1 where one is too far."""
    from tokenizer.published.check import told

    differences, computed = check(given.folder, given.kind)
    if given.out:
        from safetensors.torch import save_file

        save_file({name: value.cpu().contiguous() for name, value in computed.items()}, given.out)
    print(told(differences), flush=True)
    if not all(each.within for each in differences):
        sys.exit(1)


def print_names(files: Mapping[str, tuple[Any, Any]]) -> None:
    for name, (peer, file) in files.items():
        print(f"{name:<32} {peer.kind:<16} {file.where} {file.file}")
