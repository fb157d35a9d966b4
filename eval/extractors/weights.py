"""Published weights of networks that judge images: where they are looked for, how they are known."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import torch

from tokenizer.perceptual import TRUNKS
from training.command import UserError


@dataclasses.dataclass(frozen=True)
class Weights:
    """Published weights: where they are looked for, how they are recognised, what fetches them."""

    file: str  # in torch's cache, $TORCH_HOME/hub/checkpoints; those of towers are folders
    sha256: tuple[str, ...]  # of the published file, or as much of it as its publisher gives
    fetch: str  # a command; {path} is where the file belongs
    flag: str  # of eval.run
    variable: str  # of the environment

    @property
    def place(self) -> Path:
        return Path(torch.hub.get_dir()) / "checkpoints" / self.file

    def find(self, given: Path | None = None) -> Path | None:
        """The path given, else the variable's, else the place in torch's cache; None when nothing
        is there.

        Raises UserError when what was given, or what the variable names, does not exist.
        """
        for source, path in ((self.flag, given), (self.variable, os.environ.get(self.variable))):
            if path and not Path(path).exists():
                raise UserError(f"{source} {path}: no such file; {self.missing()}")
            if path:
                return Path(path)
        return self.place if self.place.exists() else None

    def missing(self) -> str:
        """Which file, which hash, which folder, and the command that fetches it."""
        return (
            f"{self.file} (SHA-256 {self.sha256[0]}) belongs into {self.place.parent}, or wherever {self.flag} or "
            f"{self.variable} says: {self.fetch.format(path=self.place)}"
        )

    def knows(self, sha256: str) -> bool:
        return sha256.startswith(self.sha256)


FIDELITY = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"


# The SqueezeNet trunk is also known as its convolutions alone.
SQUEEZE_FEATURES = "435cedb387e95bc8291893f61a3a64f0345b8c23a05139aceef43947efb3d52d"


WEIGHTS = {
    "inception": Weights(
        "weights-inception-2015-12-05-6726825d.pth",
        ("6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",),
        f"curl -Lfo {{path}} {FIDELITY}weights-inception-2015-12-05-6726825d.pth",
        "--inception-weights",
        "TESSERA_INCEPTION",
    ),
    "dinov2": Weights(
        "dinov2-large",
        ("399fba97a95f22c36834418bc69373364a99af3a1153da1c0fb31db567c92e23",),
        "hf download facebook/dinov2-large config.json model.safetensors --local-dir {path}",
        "--dinov2",
        "TESSERA_DINOV2",
    ),
    "clip": Weights(
        "clip-vit-large-patch14-336",
        ("c6032c2e0caae3dc2d4fba35535fa6307dbb49df59c7e182b1bc4b3329b81801",),
        "hf download openai/clip-vit-large-patch14-336 config.json pytorch_model.bin --local-dir {path}",
        "--clip",
        "TESSERA_CLIP",
    ),
} | {
    f"lpips-{net}": Weights(
        file,
        (Path(file).stem.rpartition("-")[2], *((SQUEEZE_FEATURES,) if net == "squeeze" else ())),
        f"curl -Lfo {{path}} https://download.pytorch.org/models/{file}",
        "--lpips-weights",
        f"TESSERA_LPIPS_{net.upper()}",
    )
    for net, file in TRUNKS.items()
}
