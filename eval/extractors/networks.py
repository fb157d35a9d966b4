"""The standard networks: Inception for FID, IS and KID, DINOv2 and CLIP for their distances."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eval.extractors.interface import Extraction
from eval.extractors.resizing import resize_bicubic, resize_bilinear
from eval.extractors.weights import WEIGHTS
from tokenizer.encoders.foundation import IMAGENET, quiet_transformers
from training import distributed
from training.checkpoint import sha256
from training.errors import UserError


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
