"""Standard output and error that may go away: closed from the beginning, a terminal that is gone, a
full disk."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

STDOUT, STDERR = "standard output", "standard error"
GONE = (errno.EIO, errno.ENXIO, errno.ENODEV)  # what a terminal answers that was closed


class Output:
    """A text stream whose errors of these numbers, or all where there are none, end it and not the
    program.

    Others say that they are of this stream. `stream` is None where the process was started without
    one.
    """

    def __init__(self, stream: Any, name: str, numbers: tuple[int, ...]) -> None:
        self._stream, self._name, self._numbers = stream, name, numbers

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._try("write", text)
        return len(text)

    def flush(self) -> None:
        self._try("flush")

    def isatty(self) -> bool:
        return self._stream is not None and self._stream.isatty()

    def _try(self, method: str, *arguments: str) -> None:
        if self._stream is None:
            return
        try:
            getattr(self._stream, method)(*arguments)
        except OSError as error:
            error.filename = error.filename or self._name
            if self._numbers and error.errno not in self._numbers:
                raise
            silence(self._stream)


def silence(stream: Any) -> None:
    """Send what a stream still holds, and whatever is written to it, nowhere: the end of Python
    would flush it."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


@contextlib.contextmanager
def surviving(*numbers: int) -> Iterator[None]:
    """Within, standard output and error pass over errors of these numbers, or over all."""
    before = sys.stdout, sys.stderr
    for stream in before:
        if isinstance(
            stream, io.TextIOWrapper
        ):  # a name that its encoding does not have is no reason to fail
            stream.reconfigure(errors="backslashreplace")
    ours = Output(before[0], STDOUT, numbers), Output(before[1], STDERR, numbers)
    sys.stdout, sys.stderr = ours
    try:
        yield
    finally:
        if sys.stdout is ours[0]:
            sys.stdout = before[0]
        if sys.stderr is ours[1]:
            sys.stderr = before[1]


@contextlib.contextmanager
def outliving_the_terminal() -> Iterator[None]:
    """Within, whoever started this process may leave: SIGHUP and output that nobody takes are
    passed over."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with surviving():
            yield
    finally:
        signal.signal(signal.SIGHUP, before)


def open_closed_streams() -> None:
    """Give a process that was started without some of the descriptors 0 to 2 others that lead
    nowhere.

    Or the next file that it opens would be what prints, and what others print, are written to.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one
