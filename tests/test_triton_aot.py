"""Every Triton kernel, compiled for GPUs that are not there, as it would be launched: it fits, and
does not spill.

Triton's own compiler and NVIDIA's assembler come with it, and ask for no GPU.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from tokenizer.quantizers import fused
from training import philox_kernel

triton = pytest.importorskip(
    "triton", reason="Triton is not installed: its kernels cannot be compiled"
)
ROOT = Path(__file__).parent.parent


class Target(NamedTuple):
    multiprocessors: int
    shared: int  # KiB that a block may have
    product: str  # its instruction of tensor cores, of the intermediate language
    assembled: str  # and of the machine


TARGETS = {
    80: Target(108, 163, r"mma\.sync", "HMMA"),
    89: Target(128, 99, r"mma\.sync", "HMMA"),
    90: Target(132, 227, r"wgmma\.mma_async", "HGMMA"),
    100: Target(148, 227, r"tcgen05\.mma", "UTCHMMA"),
    120: Target(170, 99, r"mma\.sync", "HMMA"),
}
SPILLED = 16  # bytes of a thread that may be spilled, at most
SEARCHES = {  # precision, rows, codes, channels, whether offsets are given
    "wide": ("fp16", 8192, 16384, 256, False),
    "narrow": ("fp16", 300, 500, 12, True),
    "bf16": ("bf16", 8192, 16384, 256, False),
    "tf32": ("tf32", 8192, 16384, 256, False),
    "four": ("ieee", 8192, 1024, 4, False),
}


class Compiled(NamedTuple):
    name: str
    precision: str | None  # of a short list
    shared: float  # KiB
    spilled: int  # bytes
    products: bool  # whether tensor cores multiply


class Pointer:
    """A tensor as far as a kernel is compiled for it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.dtype, self.offset = tensor.dtype, tensor.storage_offset() * tensor.element_size()

    def data_ptr(self) -> int:
        return self.offset

    def ptr_range(self) -> int:
        return 0


@contextlib.contextmanager
def compiling_for(capability: int, *only: tuple[str, str | None]) -> Iterator[list[Compiled]]:
    """Inside, what is launched on fake tensors is compiled, each kernel once; `only` these, by name
    and precision."""
    target, found, seen, run = TARGETS[capability], [], set(), triton.runtime.JITFunction.run

    def launch(kernel, *args, grid, warmup, **kwargs):
        precision = kwargs.get("PRECISION")
        if only and (kernel.__name__, precision) not in only:
            return
        args = [Pointer(arg) if isinstance(arg, FakeTensor) else arg for arg in args]
        with torch._C._DisableTorchDispatch():
            made = run(kernel, *args, grid=grid, warmup=True, **kwargs)
        if made.hash not in seen:
            seen.add(made.hash)
            found.append(measured(made, kernel.__name__, precision, target))

    driver = SimpleNamespace(
        get_current_device=lambda: capability,  # kernels are kept by device
        get_current_stream=lambda device: 0,
        get_current_target=lambda: triton.backends.compiler.GPUTarget("cuda", capability, 32),
    )
    with contextlib.ExitStack() as stack:

        def patch(owner, name, value):
            stack.enter_context(mock.patch.object(owner, name, value))

        patch(triton.runtime.JITFunction, "run", launch)
        patch(triton.runtime.driver, "_active", driver)
        patch(torch.cuda, "get_device_capability", lambda *_: divmod(capability, 10))
        patch(torch.cuda, "device_of", lambda _: contextlib.nullcontext())
        patch(fused, "_multiprocessors", lambda _: target.multiprocessors)
        stack.enter_context(FakeTensorMode())
        yield found


def measured(made, name: str, precision: str | None, target: Target) -> Compiled:
    disassembler = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    file = Path(triton.knobs.cache.dir) / "kernel.cubin"
    file.write_bytes(made.asm["cubin"])

    def shown(what: str) -> str:
        return subprocess.run(
            [disassembler, what, file], capture_output=True, text=True, check=True
        ).stdout

    stack, local = re.search(r"STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", shown("-res-usage")).groups()
    products = re.search(target.product, made.asm["ptx"]) and re.search(
        rf"\b{target.assembled}\b", shown("-sass")
    )
    return Compiled(
        name, precision, made.metadata.shared / 1024, int(stack) + int(local), bool(products)
    )


@pytest.fixture(autouse=True)
def own_kernels(monkeypatch, tmp_path):
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))


def search(coarse: str, rows: int, num_codes: int, channels: int, given: bool) -> None:
    features, codebook = (
        torch.empty(rows, channels, device="cuda"),
        torch.empty(num_codes, channels, device="cuda"),
    )
    fused.search(
        features, codebook, torch.empty(num_codes, device="cuda") if given else None, coarse
    )


def random_words(count: int, from_zero: bool) -> None:
    ids = torch.empty(50, dtype=torch.int64, device="cuda")
    philox_kernel.words(ids, 2**62, 3, count, None if from_zero else ids)


def check(found: list[Compiled], capability: int) -> None:
    print(*found, sep="\n")
    for kernel in found:
        assert kernel.shared <= TARGETS[capability].shared, kernel
        multiplied = (
            kernel.name == "_shortlist" and kernel.precision != "ieee"
        )  # fp32 as it is has no tensor cores
        assert kernel.spilled <= SPILLED and kernel.products == multiplied, kernel


def test_these_are_all_kernels():
    """What defines kernels is compiled here: a new file of them must come along."""
    folders = ("training", "tokenizer", "priors", "generate", "eval")
    files = [
        path
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
        if "triton.jit" in path.read_text()
    ]
    assert {path.relative_to(ROOT).as_posix() for path in files} == {
        "tokenizer/quantizers/fused.py",
        "training/philox_kernel.py",
    }


@pytest.mark.parametrize("capability", [100])
def test_the_short_list_on_tensor_cores(capability):
    """Of the target with the least room for it; the slow tests compile all kernels for all
    targets."""
    with compiling_for(capability, ("_shortlist", "fp16")) as found:
        search(*SEARCHES["wide"])
    assert len(found) == 1
    check(found, capability)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize("which", SEARCHES)
def test_every_kernel_of_the_search(which, capability):
    coarse = SEARCHES[which][0]
    # A search in bf16 or tf32 ends as one in fp16 does.
    only = (("_shortlist", coarse), ("_round_rows", None)) if coarse in ("bf16", "tf32") else ()
    with compiling_for(capability, *only) as found:
        search(*SEARCHES[which])
    names = {"_measure_rows", "_round_rows", "_shortlist", "_decide"} - (
        {"_round_rows"} if coarse == "ieee" else set()
    )
    assert {kernel.name for kernel in found} == ({name for name, _ in only} or names)
    check(found, capability)


@pytest.mark.parametrize(
    "capability", [80, *(pytest.param(key, marks=pytest.mark.slow) for key in (89, 90, 100, 120))]
)
def test_random_words(capability):
    with compiling_for(capability) as found:
        random_words(7, True)
        random_words(5000, False)
    assert len(found) == 2
    check(found, capability)
