"""Published tokenizers: python -m tokenizer.published list | check FOLDER | import NAME OUT | export RUN OUT | page"""

from __future__ import annotations

import sys
from pathlib import Path

from training.command import Parser, run_command


def main() -> None:
    parser = Parser(prog="python -m tokenizer.published", description="Tokenizers that others published.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    check = commands.add_parser("check", help="compare with a case: what its authors' code makes of given inputs")
    check.add_argument("folder", type=Path, metavar="FOLDER", help="weights, config.json and case.safetensors")
    check.add_argument("--as", dest="kind", metavar="KIND", help="of which kind the weights are")
    check.add_argument("--out", type=Path, metavar="FILE", help="write what was computed, under the case's names")
    commands.add_parser("list", help="names for published:NAME")
    given = parser.parse_args()
    COMMANDS[given.command](given)


def check_case(given) -> None:
    from tokenizer.published.check import check, told

    differences, computed = check(given.folder, given.kind)
    if given.out:
        from safetensors.torch import save_file

        save_file({name: value.cpu().contiguous() for name, value in computed.items()}, given.out)
    print(told(differences), flush=True)
    if not all(each.within for each in differences):
        sys.exit(1)


def list_names(given) -> None:
    from tokenizer.published.table import published_files

    for name, (peer, file) in published_files().items():
        print(f"{name:<32} {peer.kind:<16} {file.where} {file.file}")


COMMANDS = {"check": check_case, "list": list_names}

if __name__ == "__main__":
    run_command(main)
