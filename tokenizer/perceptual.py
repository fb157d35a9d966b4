"""LPIPS (Zhang et al. 2018, arXiv:1801.03924): the lpips package's heads on a trunk that is given
by path."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from training.checkpoint import sha256
from training.errors import UserError

TRUNKS = {
    "alex": "alexnet-owt-7be5be79.pth",
    "vgg": "vgg16-397923af.pth",
    "squeeze": "squeezenet1_1-b8a52dc0.pth",
}


class Perceptual(nn.Module):
    """LPIPS v0.1 between images (B, 3, H, W) in [-1, 1] -> (B,); always in evaluation mode, never
    trained."""

    def __init__(self, net: str, weights: Path) -> None:
        """`weights`: torchvision's state dict of the trunk, or its `features.*` part alone.

        Raises UserError for an unknown net, a missing file, or a file that holds another trunk.
        """
        super().__init__()
        if net not in TRUNKS:
            raise UserError(f"LPIPS net {net!r} is not one of {', '.join(TRUNKS)}")
        if not Path(weights).is_file():
            raise UserError(
                f"{weights}: no such file: LPIPS-{net} needs torchvision's {TRUNKS[net]} (or its "
                "features.*)"
            )
        import lpips

        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchvision's, on the arguments that lpips gives it
            self.network = lpips.LPIPS(net=net, pretrained=True, pnet_rand=True, verbose=False)
        try:
            state = torch.load(weights, map_location="cpu", weights_only=True)
        except Exception as error:
            raise UserError(
                f"{weights}: not a state dict of tensors ({type(error).__name__}): give "
                f"{TRUNKS[net]}"
            ) from None
        if not isinstance(state, Mapping):
            raise UserError(
                f"{weights}: holds a {type(state).__name__}, not a state dict of tensors: give "
                f"{TRUNKS[net]}"
            )
        # lpips cuts the trunk into slices but keeps its layer numbers: features.3.weight is
        # slice2.3.weight.
        places = {name.partition(".")[2]: name for name in self.network.net.state_dict()}
        trunk = {
            places[name.removeprefix("features.")]: tensor
            for name, tensor in state.items()
            if name.removeprefix("features.") in places
        }
        try:
            self.network.net.load_state_dict(trunk)
        except RuntimeError:
            raise UserError(
                f"{weights}: holds another network than the trunk of LPIPS-{net}: give "
                f"{TRUNKS[net]}"
            ) from None
        self.name, self.sha256 = f"LPIPS-{net}", sha256(Path(weights))
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def check(self, image_size: int) -> None:
        """Raise UserError where the trunk's halvings leave nothing of square images of this
        size."""
        blank = torch.zeros(1, 3, image_size, image_size, device=next(self.parameters()).device)
        try:
            self(blank, blank)
        except RuntimeError:
            raise UserError(
                f"objective.perceptual: {self.name} leaves nothing of images of {image_size} px: "
                "set it to 0"
            ) from None

    def train(self, mode: bool = True) -> Perceptual:
        return super().train(False)  # the heads have dropout

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        with torch.autocast(images.device.type, enabled=False):
            return self.network(images.float(), others.float()).flatten()
