"""Commands: bad input is one clear line and exit code 2, Ctrl-C says how to go on."""

from __future__ import annotations

import argparse
import difflib
import errno
import os
import sys
from collections.abc import Callable
from typing import NoReturn


class UserError(ValueError):
    """Something the user can mend. The message names the file, the value and the remedy, in one line."""


class Interrupted(Exception):
    """A run stopped on request after saving. The message says how to resume. Exit code 130."""


def run_command(main: Callable[[], None]) -> None:
    """Run `main` as a process: UserError and a full disk exit with 2, an interrupt with 130.

    Anything else is our own bug and keeps its traceback.
    """
    try:
        main()
    except UserError as error:
        _fail(f"error: {error}", 2)
    except (Interrupted, KeyboardInterrupt) as error:
        _fail(str(error) or "interrupted: run the same command again to go on", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG):
            raise
        _fail(f"error: cannot write {error.filename or 'the output'}: {os.strerror(error.errno)}", 2)


def _fail(message: str, code: int) -> None:
    start = "\r\x1b[K" if sys.stderr.isatty() else ""  # over the progress line
    print(start + " ".join(message.split()), file=sys.stderr, flush=True)
    sys.exit(code)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are UserErrors: one line, with the nearest right flag."""

    def error(self, message: str) -> NoReturn:
        options = [option for action in self._actions for option in action.option_strings]
        flags = [word.partition("=")[0].rstrip(":") for word in message.split() if word.startswith("--")]
        near = [n for flag in flags if flag not in options for n in difflib.get_close_matches(flag, options, 1)]
        hint = f"did you mean {near[0]}?" if near else "see --help"
        raise UserError(f"{self.prog}: {message}; {hint}")


def config_command(
    program: str,
    description: str,
    schema: type,
    run: Callable[..., object],
    dry_run: Callable[..., str] | None = None,
) -> None:
    """The main of every command that a YAML describes: PROGRAM CONFIG.yaml [section.key=value ...] [--fresh].

    `run(config, fresh=...)` does what the config of class `schema` says; where there is a `dry_run(config)`, the
    flag --dry-run prints what it returns instead.
    """
    parser = Parser(prog=f"python -m {program}", description=description)
    parser.add_argument("config", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that override the file's")
    parser.add_argument("--fresh", action="store_true", help="remove what the run's folder holds and start over")
    if dry_run:
        parser.add_argument("--dry-run", action="store_true", help="print what the run would take, and write nothing")
    arguments = parser.parse_intermixed_args()

    from training import config, distributed

    loaded = config.load(schema, arguments.config, arguments.overrides)
    distributed.start()
    if dry_run and arguments.dry_run:
        text = dry_run(loaded)
        if distributed.is_main():
            print(text)
    else:
        run(loaded, fresh=arguments.fresh)
    distributed.finish()
