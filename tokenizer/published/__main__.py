"""Published tokenizers: python -m tokenizer.published check FOLDER, and list, import, import-all,
export."""

from __future__ import annotations

from pathlib import Path

from tokenizer.published.commands import add_commands, check_case, print_names
from training.command import Parser, run_command


def main() -> None:
    parser = Parser(
        prog="python -m tokenizer.published", description="Tokenizers that others published."
    )
    commands, take = add_commands(parser, "folder")
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
    given = parser.parse_args()
    COMMANDS[given.command](given)


def run_check(given) -> None:
    from tokenizer.published.check import check

    check_case(check, given)


def list_names(given) -> None:
    from tokenizer.published.table import published_files

    print_names(published_files())


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
    "check": run_check,
    "list": list_names,
    "import": import_one,
    "import-all": import_every,
    "export": export_one,
}

if __name__ == "__main__":
    run_command(main)
