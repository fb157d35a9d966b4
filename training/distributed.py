"""Processes: one helper over torch.distributed that is a no-op in a single process."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor


def start() -> None:
    """Join the process group that torchrun describes in the environment; does nothing without torchrun."""
    if "WORLD_SIZE" not in os.environ or dist.is_initialized() or int(os.environ["WORLD_SIZE"]) == 1:
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def finish() -> None:
    """Leave the group, after a barrier: leaving without one aborts slower ranks. Not for error paths."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def device() -> torch.device:
    """Where this process computes."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def sum_(tensor: Tensor) -> Tensor:
    """Sum over ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def mean_(tensor: Tensor) -> Tensor:
    """Mean over ranks, in place."""
    return sum_(tensor).div_(world())


def any_true(flag: bool) -> bool:
    """Whether the flag holds on any rank; all ranks get the same answer."""
    if not dist.is_initialized():
        return flag
    return bool(sum_(torch.tensor([float(flag)], device=device())).item())


def gather_rows(rows: Tensor) -> Tensor:
    """(n, ...) of each rank -> all ranks' rows in rank order; n may differ."""
    if not dist.is_initialized():
        return rows
    parts: list[Tensor | None] = [None] * world()
    dist.all_gather_object(parts, rows.cpu())
    return torch.cat([part.to(rows.device) for part in parts])


def broadcast_(tensor: Tensor) -> Tensor:
    """Rank 0's values to every rank, in place."""
    if dist.is_initialized():
        dist.broadcast(tensor, 0)
    return tensor


def draw(seed: tuple[int, ...], positions: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
    """Uniform numbers in [0, 1) that belong to samples of the *global* batch, (len(positions), *shape) float32.

    `positions` are places within the global batch. Every rank draws the same table from `seed` and takes its
    rows, so a sample meets the same randomness however the batch is split.
    """
    generator = torch.Generator().manual_seed(mix(*seed))
    count = int(positions.max()) + 1 if positions.numel() else 0
    table = torch.rand((count, *shape), generator=generator)
    return table[positions.cpu()].to(positions.device)


def mix(*numbers: int) -> int:
    """Several integers to one 63-bit seed (SplitMix64 over the sequence, Steele et al. 2014)."""
    state = 0
    for number in numbers:
        state = (state ^ (int(number) & 0xFFFFFFFFFFFFFFFF)) & 0xFFFFFFFFFFFFFFFF
        state = (state + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state = z ^ (z >> 31)
    return state & 0x7FFFFFFFFFFFFFFF
