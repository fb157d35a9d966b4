"""Published tokenizers: python -m tokenizer.published check FOLDER, and list, import, import-all,
export."""

from __future__ import annotations

import sys
from pathlib import Path

from training.command import Parser, run_command


def main() -> None:
    parser = Parser(
        prog="python -m tokenizer.published", description="Tokenizers that others published."
    )
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
    take = commands.add_parser("import", help="write one as a folder that every command takes")
    take.add_argument("reference", metavar="NAME", help="of the list, or a file or folder")
    take.add_argument("out", type=Path, metavar="OUT")
    take.add_argument("--file", metavar="FILE", help="of a folder, or a repository of the Hub")
    take.add_argument("--revision", metavar="REVISION", help="of a repository of the Hub")
    take.add_argument("--data", metavar="DATA", help="the images that it is for")
    take.add_argument(
        "--image-size", type=int, metavar="PIXELS", help="per side, where not its own"
    )
    every = commands.add_parser(
        "import-all", help="import all that need no network to folders under ROOT"
    )
    every.add_argument("root", type=Path, metavar="ROOT")
    every.add_argument("--data", metavar="DATA", help="the images that they are for", required=True)
    every.add_argument(
        "--image-size", type=int, metavar="PIXELS", help="per side, where not their own"
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


def import_one(given) -> None:
    from tokenizer.published.imports import import_tokenizer

    asked = {"source": given.data, "image_size": given.image_size}
    data = {name: value for name, value in asked.items() if value is not None}
    print(
        import_tokenizer(
            given.reference,
            given.out,
            data,
            file=given.file,
            revision=given.revision,
            as_=given.kind,
            config=given.config,
        )
    )


def import_every(given) -> None:
    from tokenizer.published.imports import import_all

    size = {} if given.image_size is None else {"image_size": given.image_size}
    for folder in import_all(given.root, {"source": given.data, **size}):
        print(folder)


def export_one(given) -> None:
    from tokenizer.published.imports import export_tokenizer

    print(export_tokenizer(given.run, given.like, given.out, as_=given.kind, config=given.config))


COMMANDS = {
    "check": check_case,
    "list": list_names,
    "import": import_one,
    "import-all": import_every,
    "export": export_one,
}

if __name__ == "__main__":
    run_command(main)
