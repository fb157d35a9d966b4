"""What a loss costs, counted on the meta device: the real code runs there on shapes alone, in
seconds.

Operations are those of matrix products, convolutions, attention and nearest-neighbour search, two
for a multiplication, by torch's own formulas (torch.utils.flop_counter), forward and backward as
they really run: frozen parts without gradients of weights, layers under activation checkpointing
once more. Attention counts 4 n m d forward and twice that backward, whole also where it is causal.

Memory is the largest sum of living tensors within a micro-batch's forward and backward pass,
without weights and their gradients. Attention keeps no weights (arXiv:2205.14135), and bf16 is
CUDA's autocast: products in bf16 with one copy of each weight that learns; norms, softmax and
losses in fp32. What an allocator, a library or a compiler takes or spares is not in it.

Both are nearly affine in the number of samples, so that traces of a small and a large micro-batch
tell all between.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry

from training import batch_means


@dataclasses.dataclass(frozen=True)
class Count:
    """Of one micro-batch: operations by rate (a field of Accelerator), and bytes."""

    forward: Counter[str]
    backward: Counter[str]
    kept: Counter[str]  # between forward and backward, by part
    peak: float
    # whether of several micro-batches all run forward once more, for means of the whole batch
    rehearsed: bool


@dataclasses.dataclass(frozen=True)
class Cost:
    """The counts of a small micro-batch and of a large one, and the line through them."""

    samples: tuple[int, int]
    few: Count
    many: Count

    def at(self, samples: float) -> Count:
        few, many = self.samples
        share = (samples - few) / (many - few)
        return _combined(lambda low, high: low + share * (high - low), self.few, self.many)

    @property
    def of_each(self) -> Count:
        """What one sample more adds."""
        few, many = self.samples
        return _combined(lambda low, high: (high - low) / (many - few), self.few, self.many)

    def less(self, many: Count) -> Cost:
        """Of a loss that does less for every sample, whose count of the large micro-batch is
        given."""
        share = self.samples[0] / self.samples[1]
        few = _combined(
            lambda low, high, less: low - share * (high - less), self.few, self.many, many
        )
        return Cost(self.samples, few, many)


def _combined(rule: Callable[..., float], first: Count, *others: Count) -> Count:
    """Number by number."""

    def of(*values: Any) -> Any:
        if isinstance(values[0], Counter):
            return Counter(
                {key: rule(*(value[key] for value in values)) for key in sum(values, Counter())}
            )
        return values[-1] if isinstance(values[0], bool) else rule(*values)

    fields = [field.name for field in dataclasses.fields(Count)]
    return Count(*(of(*(getattr(count, name) for count in (first, *others))) for name in fields))


def cost(
    loss: Callable[[int], Tensor],
    samples: tuple[int, int],
    precision: str,
    module: nn.Module,
    parts: Mapping[str, nn.Module],
) -> Cost:
    """Of a loss of so many samples by which `module` learns; everything is on the meta device."""
    return Cost(samples, *(trace(loss, count, precision, module, parts) for count in samples))


def trace(
    loss: Callable[[int], Tensor],
    samples: int,
    precision: str,
    module: nn.Module,
    parts: Mapping[str, nn.Module],
) -> Count:
    """One forward and backward pass in training mode; memory is told apart by which of `parts` took
    it."""
    tracer, like_cuda = _Tracer(), _LikeCuda(precision == "bf16")
    like_cuda.note = tracer.note
    whole = batch_means.WholeBatch(2)
    module.train()
    with contextlib.ExitStack() as stack:
        for name, part in parts.items():
            stack.enter_context(tracer.naming(name, part))
        stack.enter_context(_gradients_dropped(module))
        for name, method in like_cuda.autocast().items():
            stack.enter_context(mock.patch.object(torch.autocast, name, method))
        stack.enter_context(mock.patch.object(torch.distributed, "is_initialized", lambda: False))
        stack.enter_context(like_cuda.kept_in_backward())
        stack.enter_context(like_cuda)
        stack.enter_context(tracer)
        with whole.part():
            total = loss(samples)
        like_cuda.copies = None
        kept = Counter({part: size for part, size in tracer.alive.items() if size})
        forward, tracer.flops = tracer.flops, Counter()
        total.backward()
        return Count(forward, tracer.flops, kept, tracer.peak, whole.lacking)


class _Tracer(TorchDispatchMode):
    """Counts operations, and the bytes of tensors as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.flops: Counter[str] = Counter()
        self.alive: Counter[str] = Counter()
        self.now = self.peak = 0
        self.within = ["else"]
        self.known: dict[int, weakref.ref[Any] | None] = {}  # storages
        self.made: dict[Any, Any] = {}  # what operations gave: layers repeat each other

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in _tensors(args):
            self.known.setdefault(
                tensor.untyped_storage()._cdata
            )  # older than the trace, if not met yet
        result = self._result(func, args, kwargs)
        for tensor in _tensors((result,)):
            self._meet(tensor.untyped_storage())
        packet = func._overloadpacket
        if packet in flop_registry:
            self.note(
                flop_registry[packet](*args, **kwargs, out_val=result),
                args[0].dtype,
                "conv" in func.name(),
            )
        elif func.name() == "tessera::nearest":  # whose kernel for GPUs multiplies in halves
            self.note(2 * args[0].numel() * len(args[1]), torch.float16)
        return result

    def _result(self, func: Any, args: Any, kwargs: Any) -> Any:
        """By torch's own rules for shapes, once for each kind of arguments: they are in Python, and
        slow."""
        schema = func._schema
        if any(each.alias_info for each in (*schema.arguments, *schema.returns)):
            return func(*args, **kwargs)
        key = (func, _kind(args), _kind(kwargs.values()), *kwargs)
        if key not in self.made:
            result = func(*args, **kwargs)
            self.made[key] = tree_map_only(
                Tensor, lambda t: _Like(t.shape, t.stride(), t.dtype), result
            )
            return result
        return tree_map_only(_Like, _Like.make, self.made[key])

    def note(self, flops: int, dtype: torch.dtype, convolution: bool = False) -> None:
        low = dtype in (torch.bfloat16, torch.float16)
        self.flops["bf16" if low else "tf32" if convolution else "fp32"] += flops

    def _meet(self, storage: Any) -> None:
        key = storage._cdata
        if key in self.known:
            return
        part, size = self.within[-1], storage.nbytes()
        self.alive[part] += size
        self.now += size
        self.peak = max(self.peak, self.now)

        def leave(_: Any) -> None:
            self.alive[part] -= size
            self.now -= size
            del self.known[key]

        self.known[key] = weakref.ref(storage, leave)

    @contextlib.contextmanager
    def naming(self, name: str, part: nn.Module) -> Iterator[None]:
        """What is made within this module's forward goes under this name."""

        def enter(*_: Any) -> None:
            self.within.append(name)

        def leave(*_: Any) -> None:
            self.within.pop()

        hooks = (
            part.register_forward_pre_hook(enter),
            part.register_forward_hook(leave, always_call=True),
        )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


@dataclasses.dataclass(frozen=True)
class _Like:
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    def make(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")


class _LikeCuda(TorchFunctionMode):
    """On the meta device what CUDA would do: attention in one kernel, and the casts of autocast to
    bf16."""

    note: Callable[..., None]

    def __init__(self, low: bool) -> None:
        super().__init__()
        self.low = low
        self.copies: (
            dict[int, Tensor] | None
        ) = {}  # of weights, for one forward pass as autocast keeps them

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            query, key, value = (self._halved(each) for each in self._attended(*args, **kwargs))
            return _Attention.apply(query, key, value, self.note)
        if self.low and func in LOW:
            args, kwargs = tree_map_only(Tensor, self._halved, (args, kwargs))
        elif self.low and func in FULL:
            args, kwargs = tree_map_only(Tensor, _whole, (args, kwargs))
        return func(*args, **kwargs)

    @staticmethod
    def _attended(
        query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        return query, key, value

    def _halved(self, tensor: Tensor) -> Tensor:
        if not self.low or tensor.dtype != torch.float32:
            return tensor
        if self.copies is None or not (tensor.is_leaf and tensor.requires_grad):
            return tensor.bfloat16()
        return self.copies.setdefault(id(tensor), tensor.bfloat16())

    @contextlib.contextmanager
    def kept_in_backward(self) -> Iterator[None]:
        """Autograd leaves this mode: modules that run again in its backward pass come back to it as
        it was."""
        outermost: list[nn.Module] = []
        lows: dict[nn.Module, bool] = {}

        def enter(module: nn.Module, _: Any) -> None:
            if self.copies is not None:  # in the forward pass
                lows[module] = self.low
            elif not outermost:
                outermost.append(module)
                self.low = lows[module]
                self.__enter__()

        def leave(module: nn.Module, *_: Any) -> None:
            if outermost and module is outermost[0]:
                self.__exit__(None, None, None)
                outermost.clear()

        hooks = (
            register_module_forward_pre_hook(enter),
            register_module_forward_hook(leave, always_call=True),
        )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def autocast(self) -> dict[str, Callable[..., Any]]:
        """Methods in place of those of torch.autocast, which does not know the meta device."""
        before = []

        def start(
            context: Any, device_type: str, dtype: Any = None, enabled: bool = True, **_: Any
        ) -> None:
            context.enabled = enabled or device_type != "meta"

        def enter(context: Any) -> None:
            before.append(self.low)
            self.low = self.low and context.enabled

        def leave(context: Any, *_: Any) -> None:
            self.low = before.pop()

        return {"__init__": start, "__enter__": enter, "__exit__": leave}


# Of CUDA's lists (torch/csrc/autocast_mode.h) what networks and losses here call.
LOW = {
    F.linear,
    F.conv1d,
    F.conv2d,
    F.conv_transpose1d,
    F.conv_transpose2d,
    torch.conv1d,
    torch.conv2d,
    torch.matmul,
    Tensor.matmul,
    Tensor.__matmul__,
    Tensor.__rmatmul__,
    torch.mm,
    Tensor.mm,
    torch.bmm,
    Tensor.bmm,
    torch.addmm,
    torch.baddbmm,
    torch.einsum,
}
FULL = {
    F.layer_norm,
    F.group_norm,
    F.rms_norm,
    F.normalize,
    F.softmax,
    torch.softmax,
    Tensor.softmax,
    F.log_softmax,
    torch.log_softmax,
    Tensor.log_softmax,
    F.cross_entropy,
    F.mse_loss,
    F.l1_loss,
    F.softplus,
    torch.norm,
    Tensor.norm,
}


def _whole(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor


class _Attention(torch.autograd.Function):
    """Shapes and operations of attention that keeps its inputs, its output and one number per
    row."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, note: Callable[..., None]
    ) -> Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        norms = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.flops = (
            2 * math.prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1])
        )
        ctx.note = note
        ctx.save_for_backward(query, key, value, output, norms)
        note(ctx.flops, query.dtype)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *_ = ctx.saved_tensors
        ctx.note(2 * ctx.flops, query.dtype)
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


@contextlib.contextmanager
def _gradients_dropped(module: nn.Module) -> Iterator[None]:
    """As soon as they are there: they are counted by themselves."""

    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    hooks = [parameter.register_post_accumulate_grad_hook(drop) for parameter in learning]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)


def _kind(values: Iterable[Any]) -> tuple[Any, ...]:
    """All that the shape of a result can depend on."""
    return tuple(
        (value.shape, value.stride(), value.dtype, value.device)
        if isinstance(value, Tensor)
        else _kind(value)
        if isinstance(value, (tuple, list))
        else (type(value), value)
        for value in values
    )


class WeightsOnMeta(TorchFunctionMode):
    """Modules built in it take no memory for weights, and may compute with small tables, as
    torch.device may not."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(
            *args, **{**(kwargs or {}), **({"device": "meta"} if func is torch.empty else {})}
        )
