"""Saving that does not hold training up: state is copied, and written by a thread while training
goes on."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from training.checkpoint import Run
from training.errors import UserError


class Saver:
    """Writes one checkpoint at a time. What went wrong is told by `failed` and raised by `wait`;
    until then no more.

    A state that is not finite is not written, and so never takes the place of one that is.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ):
        if self._thread is not None:
            self._thread.join()
        if kind is None:
            self.wait()

    def save(self, step: int, state: dict[str, Any], keep: int | None) -> None:
        """Publish state["ema"] and write the checkpoint; returns when the state is copied."""
        if self._thread is not None:
            self._thread.join()
        if not self.failed:
            self._thread = threading.Thread(
                target=self._write, args=(step, copied(state), keep), name="saver"
            )
            self._thread.start()

    @property
    def failed(self) -> bool:
        return self._error is not None

    def wait(self) -> None:
        """Return when all is on the disk. Raises UserError for a full disk, and for a state that is
        not finite."""
        if self._thread is not None:
            self._thread.join()
        self._thread, error = None, self._error
        if error is not None:
            self._error = None
            raise error

    def _write(self, step: int, state: dict[str, Any], keep: int | None) -> None:
        try:
            for part in ("modules", "optimizers", "ema"):
                for name, tensor in tensors_in(state[part], part):
                    if not is_finite(tensor):
                        raise UserError(
                            f"{self.run.folder}: at step {step} {name} is not finite, and was not "
                            "saved: " + advice(self.run)
                        )
            self.run.publish(
                state["ema"], step
            )  # first: whoever finds the last checkpoint finds its weights
            self.run.save(step, state, keep)
        except BaseException as error:  # of any kind: it goes on in the thread that waits
            self._error = error


def advice(run: Run) -> str:
    """What to do about steps that are not finite."""
    newest = run.newest()
    checkpoint = f"{run.checkpoints / newest} is kept" if newest else "there is no checkpoint yet"
    return (
        f"{checkpoint}; lower optimizer.lr or loop.clip, or set loop.precision=fp32, in the "
        "configuration and in "
        f"{run.folder / 'config.yaml'} too, and run again"
    )


def copied(tree: Any) -> Any:
    """Nested containers with their tensors copied to the CPU."""
    if isinstance(tree, Tensor):
        return tree.detach().to("cpu", copy=True)
    if isinstance(tree, dict):
        return {key: copied(value) for key, value in tree.items()}
    return type(tree)(map(copied, tree)) if isinstance(tree, list | tuple) else tree


def tensors_in(tree: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    """Tensors of nested containers, by dotted path."""
    if isinstance(tree, Tensor):
        yield path, tree
    elif isinstance(tree, dict | list | tuple):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from tensors_in(value, f"{path}.{key}")


def is_finite(tensor: Tensor) -> bool:
    """Whether all elements are; in one pass and no memory, as NaN is kept by the largest and the
    smallest."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    return bool(torch.stack(tensor.aminmax()).isfinite().all())
