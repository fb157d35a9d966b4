"""Fully sharded data parallelism (FSDP2, arXiv:2304.11277): each process keeps a part of every
block.

A block is an entry of a ModuleList, as transformers have them, that holds nothing but parameters:
what anything other than the optimizer changes, such as a codebook, stays whole in every process,
and so do embeddings and heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from training import distributed
from training.errors import UserError


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """The outermost blocks of a module."""
    blocks = []
    for child in module.children():
        entries = list(child) if isinstance(child, nn.ModuleList) else []
        if entries and all(_is_block(entry) for entry in entries):
            blocks += entries
        else:
            blocks += blocks_of(child)
    return blocks


def _is_block(module: nn.Module) -> bool:
    parameters = dict(module.named_parameters())
    composite = any(True for _ in module.children()) and not isinstance(
        module, nn.ModuleList | nn.ModuleDict
    )
    return (
        composite
        and 0 < len(parameters) == len(module.state_dict())
        and all(p.ndim for p in parameters.values())
    )


def share_of(blocks: Sequence[nn.Module], module: nn.Module) -> float:
    """The share of a module's parameters that are the blocks'."""
    whole = sum(parameter.numel() for parameter in module.parameters())
    return sum(parameter.numel() for block in blocks for parameter in block.parameters()) / max(
        1, whole
    )


def shareable_blocks(module: nn.Module) -> list[nn.Module]:
    """The blocks of a module, for loop.sharding=full. Raises UserError where they are less than
    half of it."""
    blocks = blocks_of(module)
    if share_of(blocks, module) < 0.5:
        raise UserError(
            "loop.sharding=full: there are no transformer blocks that hold half of this model's "
            "parameters, and "
            "nothing else is shared out: set loop.sharding=none"
        )
    return blocks


def shard_(engine: nn.Module, device: torch.device) -> None:
    """Share the blocks within `engine`, whose forward is a whole step, among all processes; all
    else is moved whole.

    Raises UserError as `shareable_blocks` does: little would be saved.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    blocks = shareable_blocks(engine)
    mesh = init_device_mesh(device.type, (distributed.world(),))
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    rest = {parameter for parameter in engine.parameters() if not is_shared(parameter)}
    fully_shard(
        engine, mesh=mesh, ignored_params=rest
    )  # owns nothing, but lets blocks be fetched ahead
    for tensor in [*rest, *engine.buffers()]:
        tensor.data = tensor.data.to(device)


def is_shared(tensor: Tensor) -> bool:
    """Whether it is a DTensor; without their import, which takes seconds."""
    return hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, in the same memory: all of it unless it is shared."""
    return tensor.detach().to_local() if is_shared(tensor) else tensor  # type: ignore[attr-defined]


def shared(full: Tensor, like: Tensor) -> Tensor:
    """A full tensor, known to every process, shared as `like` is."""
    if not is_shared(like):
        return full
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(
        full.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    )


def part(full: Tensor, like: Tensor) -> Tensor:
    """This process's part of a full tensor, in memory of its own where `like` is shared."""
    return local(shared(full, like)).clone() if is_shared(like) else full


def whole(part: Tensor, like: Tensor) -> Tensor:
    """All processes' parts of a tensor that is shared as `like` is, on rank 0's CPU; others get
    nothing. Collective."""
    if not is_shared(like):
        return part
    from torch.distributed.tensor import DTensor

    tensor = DTensor.from_local(
        part,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )
    full = tensor.full_tensor()
    return full.cpu() if distributed.is_main() else full.new_empty(0)


def reduce_gradients(parameters: Sequence[Tensor]) -> None:
    """Average over processes the gradients of parameters that are not shared; those of shared ones
    are already."""
    gradients = [p.grad for p in parameters if not is_shared(p) and p.grad is not None]
    if gradients:
        flat = distributed.mean_(torch.cat([gradient.flatten() for gradient in gradients]))
        for gradient, mean in zip(
            gradients, flat.split([gradient.numel() for gradient in gradients])
        ):
            gradient.copy_(mean.view_as(gradient))


def total_norm(parameters: Sequence[Tensor]) -> Tensor:
    """The norm of all gradients, shared ones counted once; the same on every process."""
    parts: dict[bool, list[Tensor]] = {True: [], False: []}
    for parameter in parameters:
        if parameter.grad is not None:
            parts[is_shared(parameter)].append(local(parameter.grad))
    plain, theirs = (nn.utils.get_total_norm(parts[kind]) ** 2 for kind in (False, True))
    return (plain + distributed.sum_(theirs.to(distributed.device()))).sqrt()
