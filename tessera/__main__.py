"""The console command: tessera COMMAND ..., where each command is the main of one of the modules.

`tessera --version`, and `tessera completion bash` (or zsh) prints what a shell's start-up file may
source. `python -m MODULE` is the same without it.
"""

from __future__ import annotations

import difflib
import importlib
import shlex
import sys
from typing import Any

import tessera.names  # noqa: F401 - says so where another package has one of our names
from tessera import __version__
from training.command import Parser, run_command
from training.errors import UserError

# What is typed -> the module whose main it is, the words that come first, and what it does.
COMMANDS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "train": ("tokenizer.train", (), "train a tokenizer, as a YAML says"),
    "train-prior": ("priors.train", (), "train a prior on a token cache, as a YAML says"),
    "pretrain": ("tokenizer.encoders.pretrain", (), "pretrain a small masked autoencoder"),
    "encode": ("tokenizer.encode", (), "encode images to a token cache"),
    "sample": ("generate.sample", (), "draw samples from a trained prior"),
    "inpaint": ("generate.inpaint", (), "fill a hole in an image"),
    "sweep": ("generate.sweep", (), "draw samples over guidance, temperature and others"),
    "eval": ("eval.run", (), "measure a tokenizer, a prior or samples"),
    "report": ("eval.run", ("report",), "all figures of a pipeline, and report.html"),
    "compare": ("eval.compare", (), "the figures of two records side by side"),
    "doctor": ("eval.doctor", (), "what evaluation finds on this machine"),
    "published": ("tokenizer.published.__main__", (), "tokenizers that others published"),
    "share": ("tokenizer.sharing", (), "save a tokenizer to be shared, or upload it"),
}
SHELLS = ("bash", "zsh")


def command() -> None:
    """The entry point `tessera`."""
    run_command(main)


def main() -> None:
    """What the command line says. Raises UserError for a command that there is not."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        print(usage())
    elif words[0] == "--version":
        print(f"tessera {__version__}")
    elif words[0] == "completion":
        if len(words) != 2 or words[1] not in SHELLS:
            raise UserError(f"tessera completion: name a shell: {', '.join(SHELLS)}")
        print(completion(words[1]))
    elif words[0] not in COMMANDS:
        near = difflib.get_close_matches(words[0], COMMANDS, 1)
        hint = f"did you mean {near[0]}?" if near else "see tessera --help"
        raise UserError(f"tessera {words[0]}: there is no such command; {hint}")
    else:
        module, first, _ = COMMANDS[words[0]]
        # The modules' parsers call themselves by this where they are started through here.
        sys.argv = [f"tessera {words[0]}", *first, *words[1:]]
        importlib.import_module(module).main()


def usage() -> str:
    """The commands, a line each."""
    lines = [f"  {name:12} {about}" for name, (_, _, about) in COMMANDS.items()]
    lines += [f"  {'completion':12} print completions for a shell: {', '.join(SHELLS)}"]
    return "\n".join(
        ["usage: tessera COMMAND ... | tessera COMMAND --help | tessera --version", "", *lines]
    )


def completion(shell: str) -> str:
    """A script for bash or zsh that completes commands, their flags and choices, else files.

    The words are those of the modules' own argparse parsers.
    """
    cases = []
    for name, (module, first, _) in COMMANDS.items():
        parser = parser_of(module, first)
        for path, words in _words(parser, name):
            cases.append(f"    {shlex.quote(path)}) words={shlex.quote(' '.join(words))} ;;")
    start = " ".join([*COMMANDS, "completion", "--version", "--help"])
    script = BASH.format(start=shlex.quote(start), cases="\n".join(cases))
    return script if shell == "bash" else f"autoload -U +X bashcompinit && bashcompinit\n{script}"


BASH = """_tessera() {{
  local words current=${{COMP_WORDS[COMP_CWORD]}} path=${{COMP_WORDS[1]}}
  case $COMP_CWORD in 1) path= ;; esac
  case $path in eval|published|share) (( COMP_CWORD > 2 )) && path="$path ${{COMP_WORDS[2]}}" ;; esac
  case $path in
    '') words={start} ;;
{cases}
  esac
  COMPREPLY=( $(compgen -W "$words" -- "$current") )
}}
complete -o default -F _tessera tessera"""


class _Shown(Exception):
    """Carries a parser out of the main that made it."""


def parser_of(module: str, first: tuple[str, ...] = ()) -> Any:
    """The argparse parser that a module's main makes; with `first`, the one of that subcommand."""

    def show(parser: Parser, *arguments: Any, **options: Any) -> Any:
        raise _Shown(parser)

    kept, sys.argv = sys.argv, [module]
    before, Parser.parse_known_args = Parser.parse_known_args, show
    try:
        importlib.import_module(module).main()
    except _Shown as shown:
        parser = shown.args[0]
    finally:
        sys.argv, Parser.parse_known_args = kept, before
    for word in first:
        parser = _subcommands(parser)[word]
    return parser


def _subcommands(parser: Any) -> dict[str, Any]:
    tables = (
        action.choices for action in parser._actions if action.nargs == "A..." and action.choices
    )
    return next(tables, {})


def _words(parser: Any, path: str) -> list[tuple[str, list[str]]]:
    """(path, words that may follow it) of a parser and its subcommands."""
    inner = _subcommands(parser)
    words = [*inner]
    for action in parser._actions:
        words += action.option_strings
        if action.option_strings and action.choices:
            words += map(str, action.choices)
    rest = [each for name, one in inner.items() for each in _words(one, f"{path} {name}")]
    return [(path, words), *rest]


if __name__ == "__main__":
    run_command(main)
