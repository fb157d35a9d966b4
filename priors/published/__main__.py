"""Published priors: python -m priors.published check FOLDER, and list, import, export, page."""

from __future__ import annotations

from pathlib import Path

from tokenizer.published.commands import add_commands, check_case, print_names
from training.command import Parser, run_command


def main() -> None:
    parser = Parser(prog="python -m priors.published", description="Priors that others published.")
    commands, take = add_commands(parser, "run folder")
    take.add_argument(
        "--tokenizer", metavar="RUN", help="whose codes it is of, where not the published one"
    )
    page = commands.add_parser(
        "page", help="write docs/published.md from what is known here of tokenizers and priors"
    )
    page.add_argument("out", type=Path, metavar="FILE")
    given = parser.parse_args()
    COMMANDS[given.command](given)


def run_check(given) -> None:
    from priors.published.check import check

    check_case(check, given)


def list_names(given) -> None:
    from priors.published.table import PEERS
    from tokenizer.published.table import published_files

    print_names(published_files(PEERS))


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
    "check": run_check,
    "list": list_names,
    "import": import_one,
    "export": export_one,
    "page": write_page,
}

if __name__ == "__main__":
    run_command(main)
