"""Processes: one helper over torch.distributed that is a no-op in a single process.

And what makes a training step the same however its global batch is shared by processes and
micro-batches: random numbers that belong to samples (`draw`, `samples`, `Stream`, `Dropout`), and
means over the batch (`batch_mean`).
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training import algorithms, philox
from training.command import UserError

T = TypeVar("T")
GROUPS = {
    "cuda": "nccl",
    "xpu": "xccl",
}  # what joins the processes on a kind of GPU; gloo joins those on CPUs

GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # SplitMix64's constants, as signed integers of 64 bits
ROUNDS = ((30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64)))


def start() -> None:
    """Join the process group that torchrun describes in the environment; without torchrun there is
    none.

    Rank 0 says so where there is a GPU that is not used. Raises UserError for an environment that
    describes none, as where a scheduler sets WORLD_SIZE and nothing else.
    """
    algorithms.compute_exactly()
    if (found := unused_gpu()) and os.environ.get("RANK", "0") == "0":
        print(found, file=sys.stderr, flush=True)
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
                f"process {local} of this machine has no GPU, of which there are {gpus.device_count()}: "
                "start at most one process for each (make: NPROC)"
            )
        if not dist.is_backend_available(backend):
            raise UserError(
                f"this torch was built without {backend}, which joins processes on GPUs: start only one"
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
    return f"{name} has no float64, in which noise, likelihoods and samples are computed: all runs on the CPU"


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
    found: Any = None
    if is_main():
        try:
            found = function()
        except (UserError, OSError) as caught:
            error = caught
    if dist.is_initialized():
        told = [error and str(error), found]
        dist.broadcast_object_list(told, device=device())
        found = told[1]
        if told[0] and not is_main():
            error = UserError(told[0])
            error.told = True
    try:
        if error is not None:
            raise error
        return found
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


def gather_on_main(own: T) -> list[T]:
    """What each rank gives, in rank order, on rank 0; an empty list on others. By way of the hosts,
    not the GPUs."""
    if not dist.is_initialized():
        return [own]
    every: list[Any] = [None] * world() if is_main() else []
    dist.gather_object(own, every if is_main() else None, group=_hosts())
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


def draw(
    seed: tuple[int, ...],
    positions: Tensor,
    shape: tuple[int, ...] = (),
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Uniform numbers that belong to samples of the *global* batch, (len(positions), *shape) on
    their device.

    `positions` are places within the global batch. A sample's numbers depend on the seed and its
    place alone, so they are the same however the batch is split. float32 ones lie in [0, 1), with
    24 bits; float64 ones in (0, 1), with 53.
    """
    size = math.prod(shape)
    if dtype == torch.float64:
        drawn = philox.uniform(*_owner(seed, positions), 0, size, positions * size)
    else:
        drawn = philox.short_uniform(*_owner(seed, positions), 0, size, positions * -(-size // 2))
    return drawn.view(len(positions), *shape)


def normal(seed: tuple[int, ...], positions: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers that belong to samples as those of `draw` do, (len(positions),
    *shape) float32."""
    size = math.prod(shape)
    drawn = philox.normal(*_owner(seed, positions), 1, size, positions * -(-size // 2))
    return drawn.view(len(positions), *shape)


def _owner(seed: tuple[int, ...], positions: Tensor) -> tuple[int, Tensor]:
    """Samples of a batch have successive parts of one sequence: on the CPU that is one call for all
    of them."""
    return mix(*seed), torch.zeros_like(positions)


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


@contextlib.contextmanager
def samples(seed: tuple[int, ...], positions: Tensor) -> Iterator[None]:
    """Inside, what a `Stream` gives belongs to the samples at these places of the global batch,
    (B,) int64.

    It must span the backward pass too, where activations may be computed again.
    """
    global _samples
    kept, _samples = _samples, torch.stack([torch.full_like(positions, mix(*seed)), positions], 1)
    try:
        yield
    finally:
        _samples = kept


_samples: Tensor | None = (
    None  # (B, 2) int64: a number of the step, and each sample's place in the global batch
)


class Stream(nn.Module):
    """Where a module's random numbers come from: functions of (seed, step, place in the global
    batch, stream).

    They depend neither on how the batch is split nor on what was drawn before, and are the same
    when activations are computed again. Outside `samples`, torch's global generator decides.
    """

    def __init__(self) -> None:
        super().__init__()
        # A tensor, so that a compiled network is one for all numbers.
        self.register_buffer("number", torch.zeros((), dtype=torch.int64), persistent=False)

    def keys(self, batch: int, count: int = 1) -> Tensor:
        """(batch * count, 2) int64: `count` for each of the samples, one after another. A key is a
        sequence of numbers, and which part of it."""
        if _samples is None:
            owner = torch.randint(1 << 62, (1,), device=self.number.device).expand(batch)
            places = torch.arange(batch, device=self.number.device)
        else:
            assert len(_samples) == batch, f"{batch} rows for {len(_samples)} samples"
            owner, places = scramble_(_samples[:, 0] + self.number * GOLDEN), _samples[:, 1]
        places = places[:, None] * count + torch.arange(count, device=places.device)
        return torch.stack([owner[:, None].expand(-1, count), places], -1).flatten(0, 1)


def number_streams(module: nn.Module) -> None:
    """Give each stream within a module a number of its own."""
    for number, stream in enumerate(part for part in module.modules() if isinstance(part, Stream)):
        stream.number.fill_(number + 1)


class Dropout(nn.Module):
    """Dropout (Srivastava et al. 2014) whose masks belong to samples, the first axis; shares are of
    1 / 65536."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.dropped = round(share * 65536)
        self.stream = Stream()

    def forward(self, features: Tensor) -> Tensor:
        """(B, ...)"""
        if not (self.training and self.dropped):
            return features
        size = math.prod(features.shape[1:])
        drawn = words(self.stream.keys(len(features)), -(-size // 4)).view(torch.int16)[:, :size]
        kept = (drawn >= self.dropped - 32768).view(features.shape)
        return torch.where(kept, features, 0.0) * (65536 / (65536 - self.dropped))


def uniform(keys: Tensor, count: int) -> Tensor:
    """(N, 2) keys of a `Stream` -> (N, count) float32 in (0, 1), multiples of 2^-24; a row depends
    on its key only."""
    drawn = words(keys, -(-count // 2)).view(torch.int32)[:, :count]
    return ((drawn & 0x7FFFFF).float() + 0.5) * 2**-23


def words(keys: Tensor, count: int) -> Tensor:
    """(N, 2) keys of a `Stream` -> (N, count) int64, all bits random."""
    owner, part = keys.unbind(1)
    return philox.words(0, owner.contiguous(), 0, count, part * count)


def scramble_(z: Tensor) -> Tensor:
    """What SplitMix64 makes of its state: int64, in place."""
    for shift, factor in ROUNDS:
        z.bitwise_xor_((z >> shift).bitwise_and_((1 << 64 - shift) - 1)).mul_(factor)
    return z.bitwise_xor_((z >> 31).bitwise_and_((1 << 33) - 1))


class WholeBatch:
    """Means over a global batch of several micro-batches, found in a rehearsal: a first pass over
    all but the last.

    A loss that is no mean over samples (the entropy of a mean, a ratio of gradients) asks
    `batch_mean` for what it needs, in the same order in each micro-batch.
    """

    def __init__(self, num_parts: int) -> None:
        self.num_parts, self.totals, self.means = num_parts, [], None if num_parts > 1 else []
        self.asked = 0  # how often, by the present micro-batch

    @property
    def lacking(self) -> bool:
        """Whether means were asked for that take a rehearsal."""
        return self.means is None and bool(self.totals)

    @contextlib.contextmanager
    def part(self) -> Iterator[None]:
        """Around a micro-batch's loss."""
        global _whole
        _whole, self.asked = self, 0
        try:
            yield
        finally:
            _whole = None

    def rehearsed(self) -> None:
        """All micro-batches have asked."""
        self.means = [mean_(total / self.num_parts) for total in self.totals]

    def mean(self, own: Tensor) -> Tensor:
        self.asked += 1
        if self.means is not None:
            return self.means[self.asked - 1]
        if self.asked > len(self.totals):
            self.totals.append(torch.zeros_like(own))
        self.totals[self.asked - 1] += own
        return own


_whole: WholeBatch | None = None


def batch_mean(own: Tensor) -> Tensor:
    """The mean over ranks, and over the micro-batches of a step, of what each has; without a
    gradient."""
    own = own.detach()
    return mean_(own.clone()) if _whole is None or _whole.num_parts == 1 else _whole.mean(own)
