"""Which of its algorithms a GPU computes with. All stages have it from here, and set nothing of it
themselves.

                            products of fp32   convolutions of fp32
    a run while it trains   fp32               TF32, which rounds what is multiplied to 10 bits
    all else                fp32               fp32

What is encoded, sampled and measured is to be what another machine finds. A training step bears
TF32: most of it is bf16 already, and an H100 has seven times the fp32 rate in it for what is not,
such as LPIPS' trunk.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import nn

from training.errors import UserError

Module = TypeVar("Module", bound=nn.Module)


def compute_exactly() -> None:
    """No TF32: every command begins with it."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


@contextlib.contextmanager
def training_on(device: torch.device, *, deterministic: bool) -> Iterator[None]:
    """Inside, a GPU computes as for training: fast, or, `deterministic`, so that the same steps
    give the same bits.

    Shapes are the same in every step, so that cuDNN tries its algorithms once; deterministic, it
    may not choose by the clock. Raises UserError where something has no deterministic algorithm. A
    CPU is exact anyway, and left alone.
    """
    if device.type == "cpu":
        yield
        return
    cudnn = torch.backends.cudnn
    before = (
        cudnn.allow_tf32,
        cudnn.benchmark,
        cudnn.deterministic,
        torch.are_deterministic_algorithms_enabled(),
    )
    try:
        cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic = (
            True,
            not deterministic,
            deterministic,
        )
        torch.use_deterministic_algorithms(deterministic)
        if deterministic:
            os.environ.setdefault(
                "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
            )  # cuBLAS looks when it is first used
        yield
    except RuntimeError as error:
        name, matched, _ = str(error).partition(" does not have a deterministic implementation")
        if not (deterministic and matched):
            raise
        raise UserError(
            f"loop.deterministic: {name} has no deterministic algorithm: set it to false"
        ) from error
    finally:
        cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic = before[:3]
        torch.use_deterministic_algorithms(before[3])


def lay_out(module: Module, device: torch.device) -> Module:
    """A network that is mostly convolutions as they like it best on a GPU: with channels last, in
    place.

    Not where there is a GroupNorm: on CUDA it puts them first again, and each, and what follows it,
    would copy.
    """
    parts = list(module.modules())
    convolved = sum(
        p.numel() for part in parts if isinstance(part, nn.Conv2d) for p in part.parameters()
    )
    most = 2 * convolved > sum(p.numel() for p in module.parameters())
    if most and device.type != "cpu" and not any(isinstance(part, nn.GroupNorm) for part in parts):
        module.to(memory_format=torch.channels_last)
    return module
