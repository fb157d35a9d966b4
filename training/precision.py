"""What products are computed in: fp32, or by autocast bf16 or fp16, where norms, softmax and losses
stay fp32.

The one place that decides it, for training, encoding, sampling and evaluation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

LOW = ("bf16", "fp16")
PRECISIONS = (
    "auto",
    "fp32",
    *LOW,
)  # what may be asked for; training has no fp16, for it does not scale losses

HELP = "of the networks' products: bf16 on a GPU that has it, else fp32 (auto)"


def has_bf16(device: torch.device) -> bool:
    """Whether a GPU has bf16 of its own: those before Ampere only emulate it, slower than fp32."""
    import torch

    known = device.type in ("cuda", "xpu")
    return known and getattr(torch, device.type).is_bf16_supported(including_emulation=False)


def decide(asked: str, device: torch.device, setting: str = "", title: str = "") -> str:
    """ "fp32", "bf16" or "fp16". "auto" takes bf16 on a GPU that has it, and fp32 elsewhere.

    Where a GPU has none, rank 0 says so, if `setting` names what the user would set. Raises
    UserError for other words.
    """
    from training import distributed
    from training.errors import UserError

    if asked not in PRECISIONS:
        raise UserError(f"{setting or 'precision'}={asked}: choose one of {', '.join(PRECISIONS)}")
    if asked != "auto":
        return asked
    if has_bf16(device):
        return "bf16"
    if setting and device.type != "cpu" and distributed.is_main():
        print(
            f"{title}: fp32, as this GPU only emulates bf16 ({setting}=bf16 asks for it)",
            flush=True,
        )
    return "fp32"


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Inside, products have a precision that `decide` gave: "fp32", too, whatever is on outside."""
    import torch

    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision in LOW)
