"""Processes of Python that begin at once: forked from one that has imported torch and has run no
test.

`python -m …` imports for seconds before it does anything, and torchrun starts three of them. What a
test asks of a process (its exit code and output, a signal's effect, the ranks of a group) holds of
a forked one too. A test of the start itself (imports, variables that imports read, the
interpreter's own memory or buffers) needs `subprocess`.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import gc
import importlib
import importlib.util
import json
import logging
import multiprocessing.util
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
import warnings
from pathlib import Path
from typing import Any

# What a run imports before its first step, beside torch: once, for all processes.
IMPORTS = (
    "torch._dynamo",
    "torch.distributed.run",
    "torch.utils.flop_counter",
    "tensorboard.compat.proto.event_pb2",
    "tensorboard.summary.writer.record_writer",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "safetensors.torch",
    "transformers",
    "x_transformers",
)
TORCHRUN = "torchrun"
TESTS = Path(__file__).parent

_orders: socket.socket | None = None
_starter: int | None = None


def begin() -> None:
    """Fork the process from which all others are forked: before the first test runs."""
    global _orders, _starter
    _orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    _starter = os.fork()
    if _starter == 0:
        try:
            _orders.close()
            _serve(theirs)
        finally:
            os._exit(1)
    theirs.close()


def end() -> None:
    """Let that process end."""
    assert _orders is not None and _starter is not None
    _orders.shutdown(socket.SHUT_RDWR)  # also where a child that goes on still holds it
    _orders.close()
    os.waitpid(_starter, 0)


class Process:
    """As `subprocess.Popen([sys.executable, *words])`: a module (`-m name`), a text (`-c text`) or a
    file, with its arguments. Output goes to files, which are read at the end."""

    def __init__(
        self, *words: object, env: dict[str, str] | None = None, cwd: Path | str | None = None
    ) -> None:
        assert _orders is not None
        self.args, self.returncode = [str(word) for word in words], None
        self._out, self._err = tempfile.TemporaryFile(), tempfile.TemporaryFile()
        self._status, theirs = os.pipe()
        order = {
            "words": self.args,
            "env": dict(os.environ if env is None else env),
            "cwd": str(cwd or os.getcwd()),
        }
        files = [self._out.fileno(), self._err.fileno(), theirs]
        socket.send_fds(_orders, [json.dumps(order).encode()], files)
        os.close(theirs)
        os.set_blocking(self._status, True)
        self.pid = int(os.read(self._status, 16))

    def poll(self) -> int | None:
        """The exit code as subprocess says it, or None while it runs."""
        if self.returncode is None:
            os.set_blocking(self._status, False)
            try:
                said = os.read(self._status, 16)
            except BlockingIOError:
                return None
            assert said, "the process and what waits for it are gone"
            self.returncode = int(said)
            os.close(self._status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        started = time.monotonic()
        while self.poll() is None:
            if timeout is not None and time.monotonic() - started > timeout:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.01)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        texts = []
        for file in (self._out, self._err):
            file.seek(0)
            texts.append(file.read().decode())
        return texts[0], texts[1]


def run(
    *words: object,
    env: dict[str, str] | None = None,
    cwd: Path | str | None = None,
    timeout: float | None = None,
) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run([sys.executable, *words], capture_output=True, text=True)`."""
    process = Process(*words, env=env, cwd=cwd)
    try:
        out, err = process.communicate(timeout)
    finally:
        process.kill()
    assert process.returncode is not None
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def torchrun(
    count: int, *words: object, max_restarts: int = 0, **options: Any
) -> subprocess.CompletedProcess[str]:
    """As `torchrun --standalone` of a file: its own agent, which forks its ranks."""
    return run(TORCHRUN, count, max_restarts, *words, **options)


# The process that takes orders, and what it forks


def _serve(orders: socket.socket) -> None:
    _forget_pytest(orders.fileno())
    prepared = False
    while True:
        text, files, *_ = socket.recv_fds(orders, 1 << 20, 3)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:  # keepers that have done their part
                pass
        if not text:
            os._exit(0)
        if not prepared:
            for name in IMPORTS:
                importlib.import_module(name)
            gc.freeze()
            prepared = True
        if os.fork() == 0:
            orders.close()
            _keep(json.loads(text), *files)
        for file in files:
            os.close(file)


def _keep(order: dict[str, Any], out: int, err: int, status: int) -> None:
    """Fork the process that was ordered, and tell its number and then how it ended."""
    child = os.fork()
    if child == 0:
        os.close(status)
        _become(order, out, err)
    os.close(out), os.close(err)
    os.write(status, b"%-16d" % child)
    os.write(status, b"%-16d" % os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    os._exit(0)


def _forget_pytest(orders: int) -> None:
    """What pytest has put in the place of Python's own, and its open files."""
    for number in (signal.SIGALRM, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0)
    faulthandler.disable()
    atexit._clear()
    atexit.register(multiprocessing.util._exit_function)
    sys.excepthook, sys.unraisablehook = sys.__excepthook__, sys.__unraisablehook__
    threading.excepthook = threading.__excepthook__
    logging.root.handlers.clear()
    logging.root.setLevel(logging.WARNING)
    spec = importlib.util.find_spec("warnings")
    own = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(own)
    warnings.showwarning = warnings._showwarning_orig
    warnings._showwarnmsg_impl = own._showwarnmsg_impl
    warnings.resetwarnings()
    for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", category)
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in map(int, os.listdir("/proc/self/fd")):
        # Numbers stay in use: an object that closes its own file later must close no other.
        if number not in (orders, nothing):
            os.dup2(nothing, number, inheritable=number < 3)


def _become(order: dict[str, Any], out: int, err: int) -> None:
    """Go on as `python words` would, and end as it would."""
    code = 1
    try:
        os.dup2(out, 1), os.dup2(err, 2)
        os.close(out), os.close(err)
        os.environ.clear()
        os.environ.update(order["env"])
        os.chdir(order["cwd"])
        sys.stdin = sys.__stdin__ = open(0, closefd=False)
        sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)
        sys.stderr = sys.__stderr__ = open(2, "w", 1, errors="backslashreplace", closefd=False)
        code = _ended(lambda: _main(order["words"]))
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush(), sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _ended(main: Any) -> int:
    """Exit code of what Python runs."""
    try:
        main()
        return 0
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        print(stop.code, file=sys.stderr)
    except KeyboardInterrupt:
        traceback.print_exc()
        sys.stdout.flush(), sys.stderr.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
    return 1


def _main(words: list[str]) -> None:
    """What `python words` runs, as the module __main__."""
    import numpy as np
    import torch

    random.seed(), np.random.seed()  # noqa: NPY002
    torch.manual_seed(67280421310721)  # with which torch begins
    for folder in reversed(os.environ.get("PYTHONPATH", "").split(":")):
        if folder and folder not in sys.path:
            sys.path.insert(0, folder)
    first, *rest = words
    if first == TORCHRUN:
        _launch(int(rest[0]), int(rest[1]), rest[2:])
    elif first == "-c":
        sys.argv = ["-c", *rest[1:]]
        module = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), module.__dict__)
    elif first == "-m":
        sys.argv = rest
        sys.modules.pop(rest[0], None)  # run as new, as if nobody had imported it
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(first).parent))
        runpy.run_path(first, run_name="__main__")


def _launch(count: int, max_restarts: int, words: list[str]) -> None:
    """What torchrun does once it has read its command line."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=str(os.getpid()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=max_restarts,
        start_method="fork",
    )
    elastic_launch(config, _rank)(words)


def _rank(words: list[str]) -> None:
    """A rank of the group; how it ended is for the agent that forked it."""
    code = _ended(lambda: _main(words))
    sys.stdout.flush(), sys.stderr.flush()
    if code:
        os._exit(code)
