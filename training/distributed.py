"""Processes: one helper over torch.distributed that is a no-op in a single process."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training import algorithms
from training.errors import UserError

T = TypeVar("T")
GROUPS = {
    "cuda": "nccl",
    "xpu": "xccl",
}  # what joins the processes on a kind of GPU; gloo joins those on CPUs


def start() -> None:
    """Join the process group that torchrun describes in the environment; without torchrun there is
    none.

    Rank 0 says so where there is a GPU that is not used. Raises UserError for an environment that
    describes none, as where a scheduler sets WORLD_SIZE and nothing else.
    """
    algorithms.compute_exactly()
    if (unused := unused_gpu()) and os.environ.get("RANK", "0") == "0":
        print(unused, file=sys.stderr, flush=True)
    if "WORLD_SIZE" not in os.environ or dist.is_initialized() or _told("WORLD_SIZE", 1) == 1:
        return
    _told("RANK", 0, _told("WORLD_SIZE", 1) - 1)
    if not os.environ.get("MASTER_ADDR"):
        raise _not_launched("MASTER_ADDR", "is not set")
    _told("MASTER_PORT", 1, 65535)
    local = _told("LOCAL_RANK", 0) if "LOCAL_RANK" in os.environ else 0
    backend, bound = "gloo", None
    if (kind := gpu()) is not None:
        gpus, backend = getattr(torch, kind), GROUPS[kind]
        if local >= gpus.device_count():
            raise UserError(
                f"process {local} of this machine has no GPU, of which there are "
                f"{gpus.device_count()}: "
                "start at most one process for each (make: NPROC)"
            )
        if not dist.is_backend_available(backend):
            raise UserError(
                f"this torch was built without {backend}, which joins processes on GPUs: start "
                "only one"
            )
        gpus.set_device(local)
        bound = device()
    store, rank, size = next(dist.rendezvous("env://"))
    if (
        os.environ.get("GROUP_WORLD_SIZE") == "1"
    ):  # torchrun on one machine keeps the addresses of before a restart
        store = dist.PrefixStore(
            f"restart-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store
        )
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, device_id=bound)


def _told(name: str, least: int, most: int = 2**31) -> int:
    """A number that torchrun sets."""
    text = os.environ.get(name)
    if text is None or not text.isdecimal() or not least <= int(text) <= most:
        raise _not_launched(name, "is not set" if text is None else f"is {text!r}")
    return int(text)


def _not_launched(name: str, what: str) -> UserError:
    several = f"WORLD_SIZE={os.environ['WORLD_SIZE']} asks for several processes"
    return UserError(f"{several}, and {name} {what}: start them with torchrun, or unset WORLD_SIZE")


def finish() -> None:
    """Leave the group, after a barrier: leaving without one aborts slower ranks. Not for error
    paths."""
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


def gpu() -> str | None:
    """The kind of GPU that processes compute on, as torch names it, ROCm's "cuda", too; None
    without one."""
    if torch.cuda.is_available():
        return "cuda"
    if torch.xpu.is_available() and torch.xpu.get_device_properties(0).has_fp64:
        return "xpu"
    return None


def unused_gpu() -> str | None:
    """A line about a GPU that is there and cannot be used."""
    there = {"Apple's GPU (MPS)": torch.backends.mps, "Intel's GPU (XPU)": torch.xpu}
    name = next((name for name, backend in there.items() if backend.is_available()), None)
    if name is None or gpu() is not None:
        return None
    return (
        f"{name} has no float64, in which noise, likelihoods and samples are computed: all runs on "
        "the CPU"
    )


def device() -> torch.device:
    """Where this process computes."""
    kind = gpu()
    return (
        torch.device("cpu")
        if kind is None
        else torch.device(kind, getattr(torch, kind).current_device())
    )


def sum_(tensor: Tensor) -> Tensor:
    """Sum over ranks, in place. A collective's tensor is on the device of the process, here and
    elsewhere."""
    if dist.is_initialized():
        dist.all_reduce(_here(tensor))
    return tensor


def mean_(tensor: Tensor) -> Tensor:
    """Mean over ranks, in place."""
    return sum_(tensor).div_(world())


def any_true(flag: bool) -> bool:
    """Whether the flag holds on any rank; all ranks get the same answer."""
    return bool(largest(flag))


def largest(number: int) -> int:
    """The largest number of any rank; all ranks get the same answer."""
    if not dist.is_initialized():
        return number
    return int(largest_(torch.tensor([number], device=device())).item())


def largest_(numbers: Tensor) -> Tensor:
    """The largest of any rank, element by element, in place."""
    if dist.is_initialized():
        dist.all_reduce(_here(numbers), dist.ReduceOp.MAX)
    return numbers


def on_main(function: Callable[[], T]) -> T:
    """Call on rank 0 while the others wait; all get what it returned. What it cannot do there
    (UserError, a full disk) fails on every rank.
    """
    error: Exception | None = None
    result: Any = None
    if is_main():
        try:
            result = function()
        except (UserError, OSError) as caught:
            error = caught
    if dist.is_initialized():
        told = [error and str(error), result]
        dist.broadcast_object_list(told, device=device())
        result = told[1]
        if told[0] and not is_main():
            error = UserError(told[0])
            error.told = True
    try:
        if error is not None:
            raise error
        return result
    finally:
        error = None  # or the error, its traceback and this frame would keep each other


def gather_rows(rows: Tensor) -> Tensor:
    """(n, ...) of each rank -> all ranks' rows in rank order; n may differ."""
    return gather_parts([rows]).to(rows.device) if dist.is_initialized() else rows


def gather_parts(parts: Sequence[Tensor]) -> Tensor:
    """Parts (n, ...) of each rank, of which some ranks may have none -> all ranks' rows in rank
    order."""
    own = torch.cat(list(parts)).cpu() if parts else None
    if not dist.is_initialized():
        return own
    every: list[Tensor | None] = [None] * world()
    dist.all_gather_object(every, own, group=_hosts())
    return torch.cat([rows for rows in every if rows is not None])


def gather_on_main(value: T) -> list[T]:
    """What each rank gives, in rank order, on rank 0; an empty list on others. By way of the hosts,
    not the GPUs."""
    if not dist.is_initialized():
        return [value]
    every: list[Any] = [None] * world() if is_main() else []
    dist.gather_object(value, every if is_main() else None, group=_hosts())
    return every


@functools.lru_cache(maxsize=1)
def _hosts() -> Any:
    """A group of all processes that joins their hosts' memories; made once, when every rank first
    asks for it."""
    return dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")


def samples_each(batch_size: int, accumulate: int) -> int:
    """Samples of a micro-batch. Raises UserError where the processes there are cannot share a step
    evenly."""
    each, rest = divmod(batch_size, world() * accumulate)
    if rest or each == 0:
        raise UserError(
            f"loop.batch_size={batch_size} cannot be shared evenly by {world()} processes x "
            f"loop.accumulate={accumulate}: make it a multiple of {world() * accumulate}"
        )
    return each


def broadcast_(tensor: Tensor) -> Tensor:
    """Rank 0's values to every rank, in place."""
    if dist.is_initialized():
        dist.broadcast(_here(tensor), 0)
    return tensor


def _here(tensor: Tensor) -> Tensor:
    """A tensor that the process group can take: NCCL, which joins GPUs, knows no other device."""
    assert tensor.device.type == device().type, (
        f"a collective of a tensor on {tensor.device}, not on {device()}"
    )
    return tensor


def equalise(module: nn.Module) -> None:
    """Rank 0's parameters and buffers to every rank: what each makes by itself may differ by
    rounding on a GPU."""
    if world() > 1:
        for tensor in module.state_dict().values():
            tensor.copy_(broadcast_(tensor.contiguous()))
