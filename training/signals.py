"""Requests to stop: SIGTERM, which is how a cluster preempts and torchrun ends its workers, and
SIGINT, Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from typing import Any

# seconds that a process which reads data goes on for, to feed the step that is to be finished
WORKER_GRACE = 20
EXIT_CODES = {
    signal.SIGINT: 130,
    signal.SIGTERM: os.EX_TEMPFAIL,
}  # 128 + 2 as shells say it, 75: try again later


class Interrupted(BaseException):
    """A command ends because it was asked to. The message says how to go on; `code` is the
    process's exit code.

    No Exception, so that nothing which passes over what is broken (a damaged image, say) passes
    over this.
    """

    def __init__(self, message: str = "", number: int = signal.SIGINT) -> None:
        super().__init__(message or "interrupted: run the same command again to go on")
        self.number, self.code = number, EXIT_CODES[signal.Signals(number)]


class Requests:
    """What this process was asked since `listening` began: the signal's number, 0 for nothing."""

    def __init__(self, *, at_once: bool) -> None:
        self.number, self._at_once, self._owner = 0, at_once, os.getpid()

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, a request raises Interrupted wherever it finds the program, and so does one that
        came before."""
        if self.number:
            raise Interrupted(number=self.number)
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    def _receive(self, number: int, frame: Any) -> None:
        if (
            os.getpid() != self._owner
        ):  # forked: ends by the signal, but not while its parent finishes a step
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, 1e-3 if self._at_once else WORKER_GRACE)
            return
        repeated, self.number = bool(self.number), self.number or number
        if repeated and number == signal.SIGINT:
            raise KeyboardInterrupt  # who presses Ctrl-C twice will not wait for a checkpoint
        if self._at_once and not repeated:
            raise Interrupted(number=number)


@contextlib.contextmanager
def listening(*numbers: int, at_once: bool = False, to_the_end: bool = False) -> Iterator[Requests]:
    """Note these signals instead of ending by them; `at_once` from the beginning. Of the main
    thread alone.

    A request that ends the block is one to whoever listens around it too, and is not obeyed again
    there. `to_the_end`: nor by the process, which ends in order, with its own exit code, however
    often it is asked.
    """
    requests = Requests(at_once=at_once)
    before = {number: signal.signal(number, requests._receive) for number in numbers}
    ended = False
    try:
        yield requests
    except BaseException:
        ended = bool(requests.number)
        raise
    finally:
        for number, handler in before.items():
            around = getattr(handler, "__self__", None)
            if ended and isinstance(around, Requests):
                around.number = around.number or requests.number
            # The end of Python leaves what is passed over alone, and gives what has a handler back
            # to the system.
            signal.signal(number, signal.SIG_IGN if ended and to_the_end else handler)
