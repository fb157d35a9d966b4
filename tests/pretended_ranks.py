"""Two processes on pretended GPUs, as a program: python pretended_ranks.py FOLDER, for
test_pretend_gpu.py.

Each writes what it found to FOLDER/rank-R.pt; they are forks, so that torch is imported once.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pretend import DeviceMismatch, pretended_gpu
from test_torch_compile import conv, images, tokenizer_turns, trained

from training import distributed
from training.loop import Batch

WORLD = 2
ADVERSARY_AT_ONCE = {"adversarial": 0.5, "adversarial_ramp_steps": 1, "lecam": 0.1}


def facts(folder: Path) -> dict[str, Any]:
    """What one rank finds out."""
    rank, device = distributed.rank(), distributed.device()
    here = torch.full((2,), rank + 1.0, device=device)
    found: dict[str, Any] = {
        "sum": distributed.sum_(here.clone()).tolist(),
        "broadcast": distributed.broadcast_(here.clone()).tolist(),
        "rows": distributed.gather_rows(torch.full((rank + 1, 2), float(rank), device=device))[
            :, 0
        ].tolist(),
        "parts": distributed.gather_parts([torch.tensor([rank])]).tolist(),
        "on main": distributed.gather_on_main(f"of {rank}"),
        "largest": distributed.largest(rank),
        "main": distributed.on_main(lambda: f"rank {rank}"),
    }
    try:  # as NCCL says "No backend type associated with device type cpu"
        dist.all_reduce(torch.ones(1))
    except DeviceMismatch:
        found["refused"] = True
    return found | {"state": gan(folder / "run")}


def gan(folder: Path) -> dict[str, torch.Tensor]:
    """The state of a tokenizer and its discriminator after two steps, each rank on its part of the
    batch."""
    rank, world = distributed.rank(), distributed.world()

    def part(step: int, accumulate: int) -> list[Batch]:
        (batch,) = images(step, 1)
        mine = slice(rank * 4 // world, (rank + 1) * 4 // world)
        return [Batch({"images": batch["images"][mine]}, batch.positions[mine])]

    module, turns = tokenizer_turns(
        conv(kind="vector", num_codes=20, code_dim=8, init="normal"), **ADVERSARY_AT_ONCE
    )
    return {
        name: value.cpu()
        for name, value in trained(folder, module, turns, part, compile_=False, steps=2).items()
    }


def run(rank: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD
    )
    with pretended_gpu():
        found = facts(folder)
    torch.save(found, folder / f"rank-{rank}.pt")
    distributed.finish()


def main(folder: Path) -> None:
    import safetensors.torch  # noqa: F401  slow imports of a run, once for both
    import torch._dynamo
    from tensorboard.compat.proto import event_pb2  # noqa: F401
    from tensorboard.summary.writer import record_writer  # noqa: F401

    torch.set_num_threads(1)
    children = []
    for rank in range(WORLD):
        child = os.fork()
        if child == 0:
            try:
                run(rank, folder)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        children.append(child)
    ended, status = os.wait()
    if status:  # the other waits for this one
        os.kill(next(child for child in children if child != ended), 9)
    sys.exit(int(any([status, os.wait()[1]])))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
