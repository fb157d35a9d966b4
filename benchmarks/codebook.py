"""Codebook search and training step, beside vector-quantize-pytorch and the bare matrix product.

    python -m benchmarks.codebook [steps|search|memory|exactness ...]     all four, on the GPU where there is one

Results go to RESULTS.md beside this file.
"""

from __future__ import annotations

import sys
import time

import torch
from torch import Tensor

from benchmarks.measure import (
    in_fresh_process,
    keep,
    median,
    peak_mib,
    ratio,
    run_parts,
    seconds,
    table,
)
from tokenizer.quantizers import search, search_on_cpu
from tokenizer.quantizers.simvq import SimVQConfig
from tokenizer.quantizers.vector import VectorConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Images in a batch, codes along a side, channels, codes. The peer's SimVQ compares the features of
# each image on their own with the codebook, so that 8192 features cost it more of 32 images than of
# 8.
SHAPES = [(32, 16, 768, 16384), (8, 32, 768, 16384), (64, 32, 64, 1024), (128, 16, 8, 16384)]
SEARCHES = [(8192, 768, 16384), (8192, 1536, 16384), (65536, 64, 1024)]
LARGE = (8192, 768, 16384)
ROWS = 10_000_000  # of the exactness check


def images(batch: int, side: int, dim: int) -> Tensor:
    """(B, D, S, S) features that want a gradient."""
    return torch.randn(batch, dim, side, side, device=DEVICE).requires_grad_()


def ours(config: VectorConfig | SimVQConfig, features: Tensor):
    """A training step of one of our quantizers, as a function."""
    quantizer = config.build().to(DEVICE).train()

    def step() -> None:
        output = quantizer(features)
        (output.vectors.sum() + output.loss).backward()
        quantizer.update(0, True)
        features.grad = None
        quantizer.zero_grad()

    return step


def peer(kind: str, dim: int, num_codes: int, features: Tensor):
    """A training step of vector-quantize-pytorch, as a function."""
    from vector_quantize_pytorch import SimVQ, VectorQuantize

    if kind == "vector":
        quantizer = VectorQuantize(dim=dim, codebook_size=num_codes, accept_image_fmap=True)
    else:
        quantizer = SimVQ(dim=dim, codebook_size=num_codes, channel_first=True)
    quantizer = quantizer.to(DEVICE).train()

    def step() -> None:
        quantized, _, loss = quantizer(features)
        (quantized.sum() + loss.sum()).backward()
        features.grad = None
        quantizer.zero_grad()

    return step


def product_of(rows: Tensor, codebook: Tensor, precision: str = "fp32"):
    """The bare product of the same shape, in fp32, tf32 or bf16, 8 Mi entries of it at a time, as a
    function."""
    if precision == "bf16":
        rows, codebook = rows.bfloat16(), codebook.bfloat16()
    at_once = max(1, (1 << 23) // len(codebook))
    out = torch.empty(at_once, len(codebook), device=DEVICE, dtype=rows.dtype)

    def product() -> None:
        torch.backends.cuda.matmul.fp32_precision = "tf32" if precision == "tf32" else "ieee"
        for z in rows.split(at_once):
            torch.mm(z, codebook.T, out=out[: len(z)])

    return product


def steps() -> None:
    lines = []
    for batch, side, dim, num_codes in SHAPES:
        for kind, config in (("vector", VectorConfig), ("simvq", SimVQConfig)):
            features = images(batch, side, dim)
            rivals = {
                "ours": ours(config(num_codes=num_codes, code_dim=dim, init="normal"), features),
                "theirs": peer(kind, dim, num_codes, features),
            }
            taken = seconds(rivals, 3)
            figures = [f"{median(taken[name]):.3f}" for name in ("ours", "theirs")]
            shape = f"{batch} × {side} × {side} × {dim}, K = {num_codes}"
            lines.append([f"{kind}, {shape}", *figures, ratio(taken, "theirs", "ours")])
    head = [
        "forward, straight-through, backward, update",
        "ours, s",
        "vector-quantize-pytorch, s",
        "theirs / ours",
    ]
    keep("Codebook: training step", "python -m benchmarks.codebook steps", table(head, lines))


def label(kind: type) -> str:
    """Of a product, which a GPU's kernel chooses itself."""
    return "fused" if DEVICE == "cuda" else kind.__name__


def searches() -> None:
    lines = []
    for num_rows, dim, num_codes in SEARCHES:
        rows, codebook = (
            torch.randn(num_rows, dim, device=DEVICE),
            torch.randn(num_codes, dim, device=DEVICE),
        )
        precisions = ("fp32", "tf32", "bf16") if DEVICE == "cuda" else ("fp32",)
        rivals = {precision: product_of(rows, codebook, precision) for precision in precisions}
        kinds = [[search_on_cpu.InFloat32]]
        if DEVICE == "cpu":
            chosen = search_on_cpu.choose_products(num_rows, search_on_cpu.Book.of(codebook, None))
            kinds = [*kinds, chosen] if len(chosen) > 1 else kinds
        automatic = search_on_cpu.choose_products
        for kind in kinds:

            def run(kind=kind, rows=rows, codebook=codebook) -> None:
                search_on_cpu.choose_products = lambda *_: kind
                search.nearest(rows, codebook)

            rivals[label(kind[0])] = run
        taken = seconds(rivals)
        search_on_cpu.choose_products = automatic
        for name in list(rivals)[len(precisions) :]:
            for precision in precisions:
                lines.append(
                    [
                        f"{num_rows} × {dim}, K = {num_codes}, {name}",
                        precision,
                        f"{median(taken[name]):.4f}",
                        f"{median(taken[precision]):.4f}",
                        ratio(taken, name, precision),
                    ]
                )
    head = ["exact search", "bare product in", "search, s", "product, s", "search / product"]
    keep("Codebook: search", "python -m benchmarks.codebook search", table(head, lines))


def held_mib() -> float:
    """The most so far: of the GPU's memory where there is one, else of this process."""
    return torch.cuda.max_memory_allocated() / 2**20 if DEVICE == "cuda" else peak_mib()


def memory_of(what: str, num_rows: int) -> None:
    """Print MiB beyond inputs of one call, in a process of its own."""
    _, dim, num_codes = LARGE
    torch.manual_seed(0)
    if what == "search":
        rows, codebook = (
            torch.randn(num_rows, dim, device=DEVICE),
            torch.randn(num_codes, dim, device=DEVICE),
        )
        search.nearest(rows[:600], codebook[:600])
        before = held_mib()
        search.nearest(rows, codebook)
    else:
        features = images(num_rows // 1024, 32, dim)
        config = (VectorConfig if what.endswith("vector") else SimVQConfig)(
            num_codes=num_codes, code_dim=dim
        )
        step = (
            ours(config, features)
            if what.startswith("our")
            else peer(what[6:], dim, num_codes, features)
        )
        before = held_mib()
        step()
    print(held_mib() - before)


def memory() -> None:
    num_rows, dim, num_codes = LARGE
    matrix = num_rows * num_codes * 4 / 2**20
    lines = []
    for what, count in [
        ("search", num_rows),
        ("search", 2 * num_rows),
        ("search", 4 * num_rows),
        *((f"{who}-{kind}", num_rows) for kind in ("vector", "simvq") for who in ("our", "their")),
    ]:
        mib = float(in_fresh_process("benchmarks.codebook", "memory-of", what, str(count)))
        lines.append(
            [f"{what}, {count} × {dim}, K = {num_codes}", f"{mib:.0f}", f"{mib / matrix:.3f}"]
        )
    head = ["fresh process each", "MiB beyond inputs", f"over {num_rows} × {num_codes} in fp32"]
    keep("Codebook: memory", "python -m benchmarks.codebook memory", table(head, lines))


def exactness() -> None:
    """Every product against float64, on random rows; the adversarial ones are
    tests/tokenizer/test_search.py."""
    lines = []
    kinds = [search_on_cpu.InFloat32, search_on_cpu.InBFloat16]
    if torch.backends.quantized.engine in ("x86", "fbgemm"):
        kinds.append(search_on_cpu.InInt8)
    if DEVICE == "cuda":  # one kernel, whose products are chosen in another place
        kinds = [search_on_cpu.InFloat32]
    automatic = search_on_cpu.choose_products
    for num_rows, dim, num_codes in (
        (ROWS * 8 // 10, 8, 64),
        (ROWS * 2 // 10, 32, 256),
        (20_000, 768, 4096),
    ):
        wrong, differing, started = dict.fromkeys(kinds, 0), 0, time.monotonic()
        codebook = torch.randn(num_codes, dim, generator=torch.Generator().manual_seed(dim)).to(
            DEVICE
        )
        for block, start in enumerate(range(0, num_rows, 100_000)):
            count = min(100_000, num_rows - start)
            rows = torch.randn(count, dim, generator=torch.Generator().manual_seed(block)).to(
                DEVICE
            )
            parts = rows.split(8192)
            half = codebook.double().square().sum(1) / 2
            true = torch.cat([(half - z.double() @ codebook.double().T).argmin(1) for z in parts])
            found = []
            for kind in kinds:
                search_on_cpu.choose_products = lambda *_, kind=kind: [
                    kind,
                    search_on_cpu.InFloat32,
                ]
                found.append(search.nearest(rows, codebook))
                wrong[kind] += int((found[-1] != true).sum())
            differing += int(sum((codes != found[0]).sum() for codes in found[1:]))
        figures = [
            ", ".join(f"{label(kind)} {count}" for kind, count in wrong.items()),
            str(differing),
        ]
        lines.append(
            [
                f"{num_rows:,} × {dim}, K = {num_codes}",
                *figures,
                f"{time.monotonic() - started:.0f}",
            ]
        )
    search_on_cpu.choose_products = automatic
    head = ["random rows", "other than the float64 search", "differing between paths", "s"]
    keep("Codebook: exactness", "python -m benchmarks.codebook exactness", table(head, lines))


PARTS = {"steps": steps, "search": searches, "memory": memory, "exactness": exactness}


if __name__ == "__main__":
    if sys.argv[1:2] == ["memory-of"]:
        memory_of(sys.argv[2], int(sys.argv[3]))
    else:
        run_parts(PARTS, sys.argv[1:])
