"""Published priors: python -m priors.published check FOLDER, and list, import, export, page."""

from __future__ import annotations

import sys
from pathlib import Path

from training.command import Parser, run_command


def main() -> None:
    parser = Parser(prog="python -m priors.published", description="Priors that others published.")
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
    take = commands.add_parser("import", help="write one as a run folder that every command takes")
    take.add_argument("reference", metavar="NAME", help="of the list, or a file or folder")
    take.add_argument("out", type=Path, metavar="OUT")
    take.add_argument("--file", metavar="FILE", help="of a folder, or a repository of the Hub")
    take.add_argument("--revision", metavar="REVISION", help="of a repository of the Hub")
    take.add_argument(
        "--tokenizer", metavar="RUN", help="whose codes it is of, where not the published one"
    )
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
    page = commands.add_parser(
        "page", help="write docs/published.md from what is known here of tokenizers and priors"
    )
    page.add_argument("out", type=Path, metavar="FILE")
    given = parser.parse_args()
    COMMANDS[given.command](given)


def check_case(given) -> None:
    from priors.published.check import check
    from tokenizer.published.check import told

    differences, computed = check(given.folder, given.kind)
    if given.out:
        from safetensors.torch import save_file

        save_file({name: value.cpu().contiguous() for name, value in computed.items()}, given.out)
    print(told(differences), flush=True)
    if not all(each.within for each in differences):
        sys.exit(1)


def list_names(given) -> None:
    from priors.published.table import PEERS
    from tokenizer.published.table import published_files

    for name, (peer, file) in published_files(PEERS).items():
        print(f"{name:<32} {peer.kind:<16} {file.where} {file.file}")


def import_one(given) -> None:
    from priors.published.imports import import_prior

    print(
        import_prior(
            given.reference,
            given.out,
            given.tokenizer,
            file=given.file,
            revision=given.revision,
            as_=given.kind,
            config=given.config,
        )
    )


def export_one(given) -> None:
    from priors.published.imports import export_prior

    print(export_prior(given.run, given.like, given.out, as_=given.kind, config=given.config))


def write_page(given) -> None:
    from priors.published.page import page

    given.out.write_text(page())


COMMANDS = {
    "check": check_case,
    "list": list_names,
    "import": import_one,
    "export": export_one,
    "page": write_page,
}

if __name__ == "__main__":
    run_command(main)
