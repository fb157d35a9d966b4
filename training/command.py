"""Commands: bad input is one clear line and exit code 2, Ctrl-C and SIGTERM say how to go on."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from training.errors import DEEDS, UserError
from training.output import GONE, STDOUT, open_closed_streams, silence, surviving
from training.plugins import import_plugins, take_words
from training.signals import Interrupted, listening


def run_command(main: Callable[[], None]) -> None:
    """Run `main` as a process: UserError and a full disk exit with 2, Ctrl-C with 130, SIGTERM with
    75.

    Of processes that fail together one says why. Anything else is our own bug and keeps its
    traceback.
    """
    open_closed_streams()
    os.environ["MPLBACKEND"] = (
        "agg"  # pictures become files here, and matplotlib would stop at a name it does not know
    )
    with surviving(*GONE):
        _run(main)


def _run(main: Callable[[], None]) -> None:
    try:
        with listening(signal.SIGTERM, at_once=True, to_the_end=True):
            main()
            sys.stdout.flush()  # or its errors come when nobody tells them
    except UserError as error:
        _fail("" if error.told else f"error: {error}", 2)
    except Interrupted as error:
        _fail(str(error) if os.environ.get("RANK", "0") == "0" else "", error.code)
    except KeyboardInterrupt as error:
        _fail(str(error) or str(Interrupted()), 130)
    except BrokenPipeError:
        silence(sys.stdout)
        sys.exit(141)
    except OSError as error:
        deed = next((deed for deed, numbers in DEEDS.items() if error.errno in numbers), None)
        if deed is None:
            raise
        if error.filename == STDOUT:
            silence(sys.stdout)
        name = error.filename2 or error.filename or "the output"  # of a copy, what is written
        _fail(f"error: cannot {deed} {name}: {os.strerror(error.errno)}", 2)
    except ValueError as error:
        if str(error) not in NULLS:
            raise
        _fail("error: a path holds the character \\0: leave it out", 2)
    except (MemoryError, RuntimeError) as error:
        if not _short_of_memory(error):
            raise
        _fail(
            f"error: out of memory: {_first_line(error)}: take a smaller model, or smaller batches",
            2,
        )


NULLS = ("embedded null byte", "embedded null character in path")  # Python's
SHORTAGES = (
    "can't allocate memory",
    "out of memory",
    "Storage size calculation overflowed",
)  # torch's, by device


def _short_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or any(words in str(error) for words in SHORTAGES)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


def _fail(message: str, code: int) -> None:
    if message:
        start = "\r\x1b[K" if sys.stderr.isatty() else ""  # over the progress line
        line = "".join(
            letter if letter.isprintable() else "?" for letter in " ".join(message.split())
        )
        with contextlib.suppress(OSError):  # nobody is there to be told
            print(start + line, file=sys.stderr, flush=True)
    sys.exit(code)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are UserErrors: one line, with the nearest right flag.

    It calls itself as it was called: `tessera COMMAND` where the console command started it.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        called = sys.argv[0] if sys.argv else ""
        if called.startswith("tessera ") and "python -m" in str(options.get("prog", "")):
            options["prog"] = called
        super().__init__(*arguments, **options)
        self.add_argument(
            "--plugin",
            default=argparse.SUPPRESS,
            metavar="MODULE",
            help="import a module of your own first, which adds kinds to the tables (docs/plugins.md)",
        )

    def parse_known_args(
        self, *arguments: Any, **options: Any
    ) -> tuple[argparse.Namespace, list[str]]:
        """As argparse does, with `~` in paths read as in configurations; plugins are imported
        first."""
        given = arguments[0] if arguments else options.pop("args", None)
        words, modules = take_words(sys.argv[1:] if given is None else given)
        import_plugins(modules)
        namespace, others = super().parse_known_args(words, *arguments[1:], **options)
        for name, value in vars(namespace).items():
            if isinstance(value, Path):
                setattr(namespace, name, Path(os.path.expanduser(value)))
        return namespace, others

    def error(self, message: str) -> NoReturn:
        options = [option for action in self._actions for option in action.option_strings]
        flags = [
            word.partition("=")[0].rstrip(":") for word in message.split() if word.startswith("--")
        ]
        near = [
            n
            for flag in flags
            if flag not in options
            for n in difflib.get_close_matches(flag, options, 1)
        ]
        hint = f"did you mean {near[0]}?" if near else "see --help"
        raise UserError(f"{self.prog}: {message}; {hint}")


def config_command(
    program: str,
    description: str,
    schema: type,
    run: Callable[..., object],
    dry_run: Callable[..., str] | None = None,
) -> None:
    """The main of every command that a YAML describes: PROGRAM CONFIG.yaml [section.key=value ...]
    [--fresh].

    `run(config, fresh=...)` does what the config of class `schema` says; where there is a
    `dry_run(config)`, the flag --dry-run prints what it returns instead.
    """
    parser = Parser(prog=f"python -m {program}", description=description)
    parser.add_argument("config", type=Path, help="YAML file of the run")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="settings that override the file's",
    )
    parser.add_argument(
        "--fresh", action="store_true", help="remove what the run's folder holds and start over"
    )
    if dry_run:
        parser.add_argument(
            "--dry-run",
            action="store_true",
            help="print what the run would take, and write nothing",
        )
    arguments = parser.parse_intermixed_args()

    from training import config, distributed

    loaded = config.load(schema, arguments.config, arguments.overrides, plugins=True)
    distributed.start()
    with _building(arguments.config):
        if dry_run and arguments.dry_run:
            text = dry_run(loaded)
            if distributed.is_main():
                print(text)
        else:
            run(loaded, fresh=arguments.fresh)
    distributed.finish()


@contextlib.contextmanager
def _building(path: Path) -> Iterator[None]:
    """What torch says of a setting's value within some config's `build` is the user's to mend, as a
    UserError is."""
    try:
        yield
    except (ValueError, TypeError, ArithmeticError, RuntimeError) as error:
        frames = [
            frame
            for frame, _ in traceback.walk_tb(error.__traceback__)
            if frame.f_code.co_name == "build"
        ]
        owners = [
            owner
            for frame in frames
            if dataclasses.is_dataclass(owner := frame.f_locals.get("self"))
        ]
        if isinstance(error, UserError) or _short_of_memory(error) or not owners:
            raise
        raise UserError(
            f"{path}: {type(owners[-1]).__name__} does not work out: {_first_line(error)}"
        ) from error
