"""Feature extractors and what their figures may be called.

"FID", "IS" and "KID" belong to one network, the 2015-12-05 Inception, "FD-DINOv2" and "CMMD" to one
DINOv2 and one CLIP, each known by its SHA-256. Without them, figures come from a small classifier
trained on the data at hand, or from other weights; they carry a name and a hash
(`FD[digits-cnn@a1b2c3d4]`) and compare with nothing else.
"""

from __future__ import annotations

import dataclasses
import io
import os
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eval.extractors.fid_protocols import resize_bicubic, resize_bilinear
from eval.interface import Batch
from tokenizer.encoders.foundation import IMAGENET, quiet_transformers
from tokenizer.perceptual import TRUNKS
from training import distributed
from training.checkpoint import sha256
from training.errors import UserError


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
# What figures of the standard networks are called, by the networks' names.
STANDARD_NAMES = {
    "inception-2015-12-05": {"FD": "FID", "rFD": "rFID", "FD∞": "FID∞", "IS": "IS", "KD": "KID"},
    "dinov2-vit-l-14": {
        "FD": "FD-DINOv2",
        "rFD": "rFD-DINOv2",
        "FD∞": "FD∞-DINOv2",
        "KD": "KD-DINOv2",
    },
    "clip-vit-l-14-336": {"MMD": "CMMD"},
}


@dataclasses.dataclass(frozen=True)
class Extraction:
    """What an extractor sees in n images."""

    features: Tensor  # (n, D) float32
    probabilities: (
        Tensor  # (n, C) float32, of the extractor's own classes; (n, 0) where it has none
    )


class Extractor(Protocol):
    name: str
    sha256: str  # of its weights
    standard: bool  # whether the standard names may be used
    dim: int  # D
    input_size: int  # S, pixels per side that its network sees
    settings: dict  # for measurements

    def __call__(
        self, images: Tensor
    ) -> Extraction: ...  # (B, 3, H, W) uint8, resized as its figures' names want

    def see(
        self, inputs: Tensor
    ) -> Extraction: ...  # (B, 3, S, S) floats in [0, 255], resized already


def figure_name(figure: str, extractor: Extractor) -> str:
    """ "FD" -> "FID" for the standard network and "FD[name@hash]" for any other."""
    names = STANDARD_NAMES.get(extractor.name, {}) if extractor.standard else {}
    return names.get(figure, f"{figure}[{tag(extractor)}]")


def tag(extractor: Extractor) -> str:
    return f"{extractor.name}@{extractor.sha256[:8]}"


def banner(extractor: Extractor) -> str | None:
    """The line that every output with a non-standard extractor carries; None for the standard
    one."""
    if extractor.standard:
        return None
    return (
        f"Not FID, not IS: figures marked [{tag(extractor)}] come from the extractor of that name and hash, "
        "and compare only with figures of the same mark."
    )


class FeatureRows:
    """Collects an extractor's rows over batches, each once, in order of id."""

    def __init__(self, extractor: Extractor) -> None:
        self.extractor = extractor
        self.ids: list[Tensor] = []
        self.parts: list[Extraction] = []

    def update(self, batch: Batch) -> None:
        self.add(batch.ids, self.extractor(batch.images))

    def add(self, ids: Tensor, extraction: Extraction) -> None:
        """Rows that were already extracted."""
        self.ids.append(ids.cpu())
        self.parts.append(Extraction(extraction.features.cpu(), extraction.probabilities.cpu()))

    def gathered(self) -> Extraction:
        """All ranks' rows."""
        order = distributed.gather_parts(self.ids).argsort()
        features = distributed.gather_parts([part.features for part in self.parts])
        probabilities = distributed.gather_parts([part.probabilities for part in self.parts])
        return Extraction(features[order], probabilities[order])


# The standard networks


class Inception:
    """torch-fidelity's port of the 2015-12-05 Inception, with its resize: 2048 features, 1008
    classes."""

    dim, input_size = 2048, 299

    def __init__(self, path: Path) -> None:
        """Raises UserError for a file that is missing or holds another network."""
        if not path.is_file():
            raise UserError(
                f"--inception-weights {path}: no such file; {WEIGHTS['inception'].missing()}"
            )
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        self.sha256 = sha256(path)
        self.standard = WEIGHTS["inception"].knows(self.sha256)
        self.name = "inception-2015-12-05" if self.standard else "inception"
        self.settings = {
            "extractor": self.name,
            "extractor_sha256": self.sha256,
            "resize": "torch-fidelity",
        }
        try:
            # torch-fidelity unpickles the file it is given: it gets a copy of the tensors alone.
            tensors = io.BytesIO()
            torch.save(torch.load(path, map_location="cpu", weights_only=True), tensors)
            tensors.seek(0)
            self.network = FeatureExtractorInceptionV3(
                self.name, ["2048", "logits_unbiased"], tensors
            )
        except Exception as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"--inception-weights {path}: not the Inception weights ({first[:120]}); "
                f"{WEIGHTS['inception'].missing()}"
            ) from error
        self.network.to(distributed.device())

    def __call__(self, images: Tensor) -> Extraction:
        return self.see(resize_bilinear(images.to(distributed.device()), self.input_size))

    @torch.no_grad()
    def see(self, inputs: Tensor) -> Extraction:
        """The network's forward, after its resize; its scores leave out the last layer's bias, as
        IS wants."""
        maps = (inputs.to(distributed.device()) - 128) / 128
        *layers, last = self.network.children()
        for layer in layers:
            maps = layer(maps)
        features = maps.flatten(1)
        return Extraction(features, features.mm(last.weight.T).double().softmax(1).float())


class Tower:
    """A pretrained vision transformer through transformers, fed as published figures feed it: the
    whole image to a square by Pillow's antialiased bicubic on uint8. Features are what its
    publisher pools: DINOv2's class token (Stein et al. 2023, arXiv:2306.04675), CLIP's embedding at
    unit length. It knows no classes."""

    def __init__(self, kind: str, folder: Path) -> None:
        """`kind`: a key of TOWERS; `folder`: config.json and weights in transformers' format.

        Raises UserError for a folder that is missing, damaged or holds another model.
        """
        import transformers

        known, weights = TOWERS[kind], WEIGHTS[kind]
        files = [
            folder / name
            for name in ("model.safetensors", "pytorch_model.bin")
            if (folder / name).is_file()
        ]
        try:
            if not files:
                raise OSError("no model.safetensors")
            with quiet_transformers():
                self.network, report = getattr(transformers, known.model_class).from_pretrained(
                    folder, local_files_only=True, output_loading_info=True, dtype=torch.float32
                )
            if lacking := sorted(report["missing_keys"]):
                raise ValueError(f"lacks {lacking[0]}")
        except Exception as error:  # what transformers' readers raise shares no base
            reason = str(error).strip().split("\n")[0][:120]
            raise UserError(
                f"{weights.flag} {folder}: no {kind} of transformers ({reason}); {weights.missing()}"
            ) from None
        self.sha256 = sha256(files[0])
        self.standard = weights.knows(self.sha256)
        self.name = known.name if self.standard else kind
        self.settings = {
            "extractor": self.name,
            "extractor_sha256": self.sha256,
            "resize": "Pillow bicubic, uint8",
        }
        config = self.network.config
        self.input_size = known.input_size or config.image_size
        self.pooled = known.pooled
        self.dim = config.projection_dim if known.pooled == "image_embeds" else config.hidden_size
        if kind == "dinov2":
            fit_positions(self.network.embeddings, self.input_size // config.patch_size)
        self.network.to(distributed.device()).eval().requires_grad_(False)
        self.mean, self.std = (
            torch.tensor(values, device=distributed.device()) for values in known.normalisation
        )

    def __call__(self, images: Tensor) -> Extraction:
        return self.see(resize_bicubic(images, self.input_size).to(distributed.device()).float())

    @torch.no_grad()
    def see(self, inputs: Tensor) -> Extraction:
        pixels = (inputs.to(self.mean) / 255 - self.mean.view(3, 1, 1)) / self.std.view(3, 1, 1)
        features = getattr(self.network(pixels), self.pooled)
        if self.pooled == "image_embeds":
            features = F.normalize(features, dim=1)
        return Extraction(features, features.new_zeros(len(features), 0))


@dataclasses.dataclass(frozen=True)
class TowerKind:
    name: str  # of the standard weights
    model_class: str  # of transformers
    pooled: str  # which of its outputs
    input_size: int | None  # None: what its config says
    normalisation: tuple[list[float], list[float]]  # mean and std of pixels in [0, 1]


CLIP_PIXELS = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
TOWERS = {
    "dinov2": TowerKind("dinov2-vit-l-14", "Dinov2Model", "pooler_output", 224, IMAGENET),
    "clip": TowerKind(
        "clip-vit-l-14-336", "CLIPVisionModelWithProjection", "image_embeds", None, CLIP_PIXELS
    ),
}


@torch.no_grad()
def fit_positions(embeddings: nn.Module, side: int) -> None:
    """Give a DINOv2 the positions of side x side patches as its first release interpolates them,
    which published figures inherit: by a factor that a tenth of a patch was added to. transformers'
    own differ by a little."""
    class_token, grid = embeddings.position_embeddings.split(
        [1, embeddings.position_embeddings.shape[1] - 1], 1
    )
    trained = round(grid.shape[1] ** 0.5)
    if trained == side:
        return
    maps = grid.unflatten(1, (trained, trained)).permute(0, 3, 1, 2)
    maps = F.interpolate(maps, scale_factor=(side + 0.1) / trained, mode="bicubic")
    fitted = torch.cat([class_token, maps.flatten(2).transpose(1, 2)], 1)
    embeddings.position_embeddings = nn.Parameter(fitted, requires_grad=False)


def find_inception(given: Path | None) -> Path | None:
    """The path given, else the variable's, else the file in torch's cache
    ($TORCH_HOME/hub/checkpoints)."""
    return WEIGHTS["inception"].find(given)
