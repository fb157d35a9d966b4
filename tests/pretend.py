"""A GPU that is not there: tensors that report the device "gpu:0", hold true values on the CPU, run
backward.

What CUDA refuses is refused: tensors of two devices, CPU generators, `.numpy()`. What makes the
host wait for a GPU is counted, with its place in the code. Copies to the host that are not waited
for hold nonsense until an event behind them was. A process group that is joined within takes no
tensor of the CPU, as NCCL takes none.
"""

from __future__ import annotations

import collections
import contextlib
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    return_and_correct_aliasing,
)

from training.tracing import FULL, LOW

ROOT = str(Path(__file__).resolve().parents[1])
WAITS: collections.Counter[tuple[str, str]] = collections.Counter()  # (what, where) the host waits
aten = torch.ops.aten
READS = {  # results whose size depends on values
    aten.nonzero.default,
    aten.masked_select.default,
    aten.unique_dim.default,
    aten._unique2.default,
    aten.bincount.default,
    aten.unique_consecutive.default,
}
NO_TENSORS = {torch.ops.c10d.barrier.default}  # what it takes is its own
INDEXED = {aten.index.Tensor, aten._unsafe_index.Tensor}
PUT = {aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}


COMING: list[
    tuple[torch.Tensor, torch.Tensor]
] = []  # copies to the host on their way, and what they will hold


class Event:
    """torch.cuda.Event, of a GPU that is a little behind: the first time it is asked for, an event
    has not happened."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.asked = 0

    def record(self) -> None:
        self.time, self.before = time.monotonic(), list(COMING)

    def query(self) -> bool:
        self.asked += 1
        if self.asked > 1:
            self._happen()
        return self.asked > 1

    def synchronize(self) -> None:
        if self.asked < 2:
            note("event")
        self.asked = 2
        self._happen()

    def elapsed_time(self, other: Event) -> float:
        return 1000 * (other.time - self.time)

    def _happen(self) -> None:
        for there, values in self.before:
            there.copy_(values)


class DeviceMismatch(RuntimeError):
    """What CUDA would refuse."""


class Backend(backend_registration._DummyBackendModule):
    """What torch asks of a device's module."""

    _initialized = True
    device = contextlib.nullcontext
    Event = Event
    pretended = False  # torch's fake tensors go another way where any accelerator is there

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return Backend.pretended

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    def manual_seed_all(self, seed: int) -> None: ...

    def manual_seed(self, seed: int) -> None: ...

    def _is_in_bad_fork(self) -> bool:
        return False


class Pretended(torch.Tensor):
    """A tensor "on the GPU"; its values are those of `held`, on the CPU."""

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Pretended:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=torch.device("gpu", 0),
        )
        made.held = held.detach()
        return made

    def __repr__(self) -> str:
        return f"Pretended({self.held})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    def __deepcopy__(self, memo: dict) -> torch.Tensor:
        if id(self) not in memo:
            with torch.no_grad():
                new = Pretended(self.held.clone())
            if isinstance(self, nn.Parameter):
                new = nn.Parameter(new, self.requires_grad)
            memo[id(self)] = new.requires_grad_(self.requires_grad)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise DeviceMismatch("a tensor of the GPU is written to a file")

    def tolist(self) -> Any:
        note("tolist")
        return self.held.tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy: use Tensor.cpu() first")

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self.numpy()


def place(depth: int = 3) -> str:
    """Where in the project we are, innermost first."""
    frames = [
        f
        for f in traceback.extract_stack()
        if f.filename.startswith(ROOT) and f.filename != __file__
    ]
    parts = (
        f"{f.filename[len(ROOT) + 1 :]}:{f.lineno} {f.name}" for f in reversed(frames[-depth:])
    )
    return " < ".join(parts)


def note(what: str) -> None:
    WAITS[what, place()] += 1


def is_gpu(device: Any) -> bool:
    return device is not None and torch.device(device).type == "gpu"


def wrap(value: Any) -> Any:
    plain = isinstance(value, torch.Tensor) and not isinstance(value, Pretended)
    return Pretended(value) if plain else value


def unwrap(value: Any) -> Any:
    return value.held if isinstance(value, Pretended) else value


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Of what an operation is given; torch's own way takes most of a step's time."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from tensors_in(part)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


def mapped(function: Any, value: Any) -> Any:
    if isinstance(value, tuple | list):
        return type(value)([mapped(function, part) for part in value])
    return function(value)


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation of which a tensor, or the result, is on the GPU."""
    tensors = list(tensors_in((args, kwargs)))
    on_gpu = [t for t in tensors if isinstance(t, Pretended)]
    if func is aten._local_scalar_dense.default:
        note("scalar")
        return func(unwrap(args[0]))
    if func in READS or func is aten.equal.default:
        note(str(func))
    if func is aten._to_copy.default:
        return _copied(args[0], kwargs, bool(on_gpu))
    if func is aten.copy_.default:
        if isinstance(args[0], Pretended) != isinstance(args[1], Pretended):
            note("copy between devices")
        unwrap(args[0]).copy_(unwrap(args[1]))
        return args[0]
    if func.namespace == "c10d" and func not in NO_TENSORS:
        return _collective(func, args, kwargs, tensors)
    if func._schema.name.startswith("tessera::"):
        if len({isinstance(t, Pretended) for t in tensors}) > 1:
            raise DeviceMismatch(f"{func}: tensors on two devices: {place(6)}")
        from tokenizer.quantizers import search_on_cpu

        with (
            Factories(),
            Functions(),
        ):  # as the fused kernel, which waits for nothing and answers the same
            return search_on_cpu.in_float64(*args)
    if func is aten._fused_adamw_.default and any(map(_lie_otherwise, *args[:4])):
        raise DeviceMismatch(
            f"{func}: a parameter, its gradient and its moments lie in memory in different ways"
        )
    to_gpu = _target(func, args, kwargs, tensors, on_gpu)
    _check_generator(func, kwargs.get("generator"), to_gpu)
    plain = {name: mapped(unwrap, value) for name, value in kwargs.items() if name != "pin_memory"}
    if plain.get("device") is not None:
        plain["device"] = torch.device("cpu")
    made = func(*mapped(unwrap, args), **plain)
    if not to_gpu:
        return made
    return return_and_correct_aliasing(func, args, kwargs, mapped(wrap, made))


def _collective(func: Any, args: Any, kwargs: dict[str, Any], tensors: list) -> Any:
    """By gloo, on the values that the tensors hold, in place."""
    if not all(isinstance(t, Pretended) for t in tensors):
        raise DeviceMismatch(f"{func}: no backend for a tensor on the CPU: {place(6)}")
    made = func(
        *mapped(unwrap, args), **{name: mapped(unwrap, value) for name, value in kwargs.items()}
    )
    return mapped(wrap, made)


def _of_objects(gather: Any) -> Any:
    """It resizes tensors, which pretended ones do not do; of the GPU's none can be among what is
    pickled."""

    def gathered(*args: Any, **kwargs: Any) -> None:
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            gather(*args, **kwargs)

    return gathered


def _lie_otherwise(*tensors: torch.Tensor) -> bool:
    """Whether strides differ of axes that matter; or are not what the wrapper says."""
    sizes = tensors[0].shape
    strides = [each.stride() for t in tensors for each in (t, unwrap(t))]
    return len({tuple(s for s, n in zip(each, sizes) if n > 1) for each in strides}) > 1


def _copied(tensor: torch.Tensor, kwargs: dict[str, Any], on_gpu: bool) -> torch.Tensor:
    to_gpu = is_gpu(kwargs["device"]) if kwargs.get("device") is not None else on_gpu
    if to_gpu != on_gpu and not kwargs.get("non_blocking"):
        note("copy between devices")
    rest = {name: value for name, value in kwargs.items() if name not in ("device", "pin_memory")}
    made = aten._to_copy.default(unwrap(tensor), **rest)
    if on_gpu and not to_gpu and kwargs.get("non_blocking"):
        COMING.append((made, made.clone()))
        made.view(torch.uint8).fill_(0x7F)
    return Pretended(made) if to_gpu else made


def _target(func: Any, args: Any, kwargs: Any, tensors: list, on_gpu: list) -> bool:
    """Whether the result is on the GPU. Raises DeviceMismatch."""
    if func in INDEXED | PUT:
        return _indexed(func, args)
    others = [t for t in tensors if not isinstance(t, Pretended)]
    if on_gpu and others:
        if any(t.ndim for t in others):
            raise DeviceMismatch(f"{func}: tensors on two devices: {place(6)}")
        whole = torch.Tag.pointwise in func.tags or func._schema.name.startswith("aten::_foreach")
        if not whole and "fused" not in func._schema.name:
            raise DeviceMismatch(
                f"{func}: a scalar on the CPU beside tensors on the GPU: {place(6)}"
            )
        return True
    return bool(on_gpu) if kwargs.get("device") is None else is_gpu(kwargs["device"])


def _indexed(func: Any, args: Any) -> bool:
    own, indices = (
        isinstance(args[0], Pretended),
        [i for i in args[1] if isinstance(i, torch.Tensor)],
    )
    if not own and any(isinstance(i, Pretended) for i in indices):
        raise DeviceMismatch(f"{func}: a CPU tensor is indexed by one on the GPU: {place(6)}")
    if own and any(i.dtype in (torch.bool, torch.uint8) for i in indices):
        note("boolean index")
    if own and any(not isinstance(i, Pretended) and i.ndim for i in indices):
        note("index by a CPU tensor")
    if func in PUT and isinstance(args[2], Pretended) != own and (not own or args[2].ndim):
        raise DeviceMismatch(f"{func}: value on another device: {place(6)}")
    return own


def _check_generator(func: Any, generator: Any, to_gpu: bool) -> None:
    if generator is not None and to_gpu != (generator._cdata in GENERATORS):
        raise DeviceMismatch(f"{func}: a generator of another device: {place(6)}")


class Factories(TorchDispatchMode):
    """What makes a tensor on a device from none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        collective = getattr(func, "namespace", "") == "c10d"
        if (
            collective
            or is_gpu(kwargs.get("device"))
            or any(issubclass(t, Pretended) for t in types)
        ):
            return run(func, args, kwargs)
        return func(*args, **kwargs)


class Functions(TorchFunctionMode):
    """What does not come down to operations on tensors, or has a kernel for each device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and is_gpu(kwargs.get("device")):
            if isinstance(args[0], Pretended):
                return args[0]
            note("torch.tensor on the GPU")
            if isinstance(args[0], torch.Tensor):
                return Pretended(args[0].clone())
            return Pretended(torch.tensor(*args, **{**kwargs, "device": "cpu"}))
        if func is torch.Tensor.new_tensor and isinstance(args[0], Pretended):
            note("new_tensor")
            return Pretended(args[0].held.new_tensor(*args[1:], **kwargs))
        if func == torch.Tensor.data.__set__ and isinstance(args[0], Pretended):
            args[0].held = args[1].held
        attention = nn.functional.scaled_dot_product_attention
        if LOWS[-1] is not None and func in {*LOW, *FULL, attention}:
            wanted = torch.float32 if func in FULL else LOWS[-1]
            args = [_cast(value, wanted) for value in args]
            kwargs = {name: _cast(value, wanted) for name, value in kwargs.items()}
        if func is attention and isinstance(args[0], Pretended):
            return _attention(*args, **kwargs)
        return func(*args, **kwargs)


def _attention(
    queries: Any,
    keys: Any,
    values: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    if not all(
        isinstance(t, Pretended)
        for t in (keys, values, *([] if attn_mask is None else [attn_mask]))
    ):
        raise DeviceMismatch(f"attention: tensors on two devices: {place(6)}")
    scores = queries @ keys.transpose(-1, -2) * (scale or queries.shape[-1] ** -0.5)
    if is_causal:
        seen = torch.ones(
            queries.shape[-2], keys.shape[-2], dtype=torch.bool, device=queries.device
        ).tril()
        scores = scores.masked_fill(~seen, -torch.inf)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(-1) @ values


LOWS: list[torch.dtype | None] = [None]  # what autocast casts to on the GPU, by nesting


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """As CUDA's autocast does; float64 stays."""
    plain = isinstance(value, Pretended) and value.dtype in (
        torch.float32,
        torch.bfloat16,
        torch.float16,
    )
    return value.to(dtype) if plain else value


@contextlib.contextmanager
def _autocasting() -> Iterator[None]:
    """torch.autocast knows the GPU, for which torch itself has no casts to offer."""
    enter, leave = torch.autocast.__enter__, torch.autocast.__exit__
    enabled, dtype = torch.is_autocast_enabled, torch.get_autocast_dtype

    def begin(context: torch.autocast) -> Any:
        if context.device != "gpu":
            return enter(context)
        LOWS.append(context.fast_dtype if context._enabled else None)
        return context

    def end(context: torch.autocast, *error: Any) -> Any:
        return leave(context, *error) if context.device != "gpu" else LOWS.pop() and None

    with (
        mock.patch.object(torch.autocast, "__enter__", begin),
        mock.patch.object(torch.autocast, "__exit__", end),
        mock.patch.object(
            torch,
            "is_autocast_enabled",
            lambda *of: LOWS[-1] is not None if of == ("gpu",) else enabled(*of),
        ),
        mock.patch.object(
            torch, "get_autocast_dtype", lambda of: LOWS[-1] if of == "gpu" else dtype(of)
        ),
    ):
        yield


GENERATORS: dict[int, torch.Generator] = {}  # of the GPU, by identity
_Generator = torch.Generator


class _Made:
    """torch.Generator, which may be asked for the GPU; a class, as annotations join it to None."""

    def __new__(cls, device: Any = "cpu") -> Any:
        made = _Generator()
        if is_gpu(device):
            GENERATORS[made._cdata] = made
        return made


_ready = False


@contextlib.contextmanager
def pretended_gpu() -> Iterator[collections.Counter]:
    """Inside, processes compute on the GPU; gives the count of waits, which starts at none."""
    global _ready
    if not _ready:
        backend_registration._setup_privateuseone_for_python_backend(
            "gpu", backend_module=Backend()
        )
        _ready = True
    from training import distributed

    WAITS.clear()
    COMING.clear()
    with contextlib.ExitStack() as stack:
        device = torch.device("gpu", 0)
        stack.enter_context(mock.patch.object(Backend, "pretended", True))
        stack.enter_context(mock.patch.object(distributed, "device", lambda: device))
        for name in ("all_gather_object", "gather_object"):
            stack.enter_context(mock.patch.object(dist, name, _of_objects(getattr(dist, name))))
        stack.enter_context(mock.patch.object(torch, "Generator", _Made))
        stack.enter_context(_autocasting())
        for mode in (torch.autograd.set_multithreading_enabled(False), Factories(), Functions()):
            stack.enter_context(mode)
        yield WAITS
