"""Pretrained vision transformers as encoders, through transformers' own classes, from a folder or
the Hub."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tokenizer.remote import patient
from training.errors import UserError


@dataclasses.dataclass(frozen=True)
class FoundationConfig:
    """A model of one of FAMILIES, or the vision part of a composite model that has one (SigLIP,
    InternVL).

    `final_norm` says what ends the encoder: "affine", its last LayerNorm as trained, or "plain",
    that norm without its learned scale and shift (as RAE does, arXiv:2510.11690): each token has
    mean 0 and variance 1 over its channels. InternViT as published ends in none: "affine" gives its
    features as they are, "plain" normalises them.
    """

    kind: str = "foundation"
    name: str = "facebook/dinov2-base"  # a folder in transformers' format, or a model of the Hub
    revision: str | None = None
    frozen: bool = True
    final_norm: str = "affine"  # or "plain"
    input_size: int | None = (
        None  # pixels per side that the model sees, where not data.image_size (resized, bicubic)
    )
    gradient_checkpointing: bool = (
        False  # each layer runs again in backward: less memory, a third more time
    )

    def __post_init__(self) -> None:
        if self.final_norm not in ("affine", "plain"):
            raise ValueError(f"encoder.final_norm={self.final_norm!r} must be 'affine' or 'plain'")

    def build(
        self, image_size: int, saved: Path | None = None, weights: bool = True
    ) -> FoundationEncoder:
        """The encoder with its pretrained weights; with `saved` only its architecture, from that
        folder.

        `weights=False` gives random weights and needs only a local folder's config.json or a name
        in KNOWN; under `torch.device("meta")` it takes no memory. Raises UserError when the name is
        neither a folder nor a reachable model, or the model is of a family that is not known here.
        """
        if saved is not None:
            model, preprocessing = load_architecture(saved / "encoder")
        else:
            model, preprocessing = load_pretrained(self.name, self.revision, weights)
        encoder = FoundationEncoder(
            model, preprocessing, self.frozen, self.final_norm, self.gradient_checkpointing
        )
        if self.input_size is not None:
            encoder.stride = self._stride(image_size, encoder.patch)
        return encoder

    def _stride(self, image_size: int, patch: int) -> int:
        """Pixels of the image per feature. Raises ValueError unless both sizes are whole numbers of
        features."""
        side = self.input_size // patch
        if side < 1 or self.input_size % patch or image_size % side:
            raise ValueError(
                f"data.image_size={image_size} with encoder.input_size={self.input_size}: the "
                "input must be a multiple "
                f"of the model's patch of {patch} pixels, and the image one of the patches per "
                f"side ({side})"
            )
        return image_size // side


def _plain(pixels: Tensor, config: Any) -> dict[str, Any]:
    """For models that fit their positions to any image by themselves."""
    return {"pixel_values": pixels}


def _interpolated(pixels: Tensor, config: Any) -> dict[str, Any]:
    """For models that interpolate their positions when told to."""
    native = tuple(pixels.shape[2:]) == _pair(config.image_size)
    return {"pixel_values": pixels, "interpolate_pos_encoding": not native}


def _in_order(pixels: Tensor, config: Any) -> dict[str, Any]:
    """For MAE: even with nothing masked it sorts its patches by this noise."""
    (height, width), (rows, columns) = pixels.shape[2:], _pair(config.patch_size)
    order = torch.arange(
        (height // rows) * (width // columns), device=pixels.device, dtype=torch.float32
    )
    return {**_interpolated(pixels, config), "noise": order.expand(len(pixels), -1)}


def _flattened(pixels: Tensor, config: Any) -> dict[str, Any]:
    """For NaFlex (arXiv:2502.14786): patches as rows, and the grid that they came from. All images
    of a batch have the same grid, so that no row is padding and none is masked."""
    rows, columns = _pair(config.patch_size)
    grid = (pixels.shape[2] // rows, pixels.shape[3] // columns)
    return {
        "pixel_values": rearrange(pixels, "b c (h p) (w q) -> b (h w) (p q c)", p=rows, q=columns),
        "pixel_attention_mask": None,
        "spatial_shapes": torch.tensor(grid, device="cpu").expand(
            len(pixels), 2
        ),  # the model reads it as integers
    }


@dataclasses.dataclass(frozen=True)
class Family:
    """How one architecture is made and called. In all of them class and register tokens come before
    the patches."""

    model_class: str
    inputs: Callable[
        [Tensor, Any], dict[str, Any]
    ]  # (normalised pixels (B, 3, H, W), config) -> arguments
    final_norm: str = "layernorm"  # the attribute that holds the last norm
    arguments: dict[str, Any] = dataclasses.field(
        default_factory=dict
    )  # of the class, beside its config


FAMILIES = {
    "vit_mae": Family("ViTMAEModel", _in_order),
    "vit": Family("ViTModel", _interpolated, arguments={"add_pooling_layer": False}),
    "dinov2": Family("Dinov2Model", _plain),
    "dinov2_with_registers": Family("Dinov2WithRegistersModel", _plain),
    "dinov3_vit": Family("DINOv3ViTModel", _plain, final_norm="norm"),
    "siglip_vision_model": Family("SiglipVisionModel", _interpolated, final_norm="post_layernorm"),
    "siglip2_vision_model": Family("Siglip2VisionModel", _flattened, final_norm="post_layernorm"),
    "internvl_vision": Family("InternVLVisionModel", _plain),
}

# what the weights are called in a model that has more parts
PART_OF_COMPOSITE = r"^(model\.)?vision_(tower|model)\."

# What every family's config is set to, where it has the field: features depend on nothing but the
# image, in training too, and pooling heads are not made.
SETTINGS = {
    "mask_ratio": 0.0,
    "drop_path_rate": 0.0,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "attention_dropout": 0.0,
    "projection_dropout": 0.0,
    "pos_embed_shift": None,  # these three: random rotary coordinates of DINOv3
    "pos_embed_jitter": None,
    "pos_embed_rescale": None,
    "vision_use_head": False,
}
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
HALF = ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5])
_DINOV2 = {"image_size": 518, "patch_size": 14}
_SO400M = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
}

# Hub name: (model type, fields that differ from transformers' defaults, image mean, image std)
KNOWN: dict[str, tuple[str, dict[str, Any], list[float], list[float]]] = {
    "facebook/dinov2-base": ("dinov2", _DINOV2, *IMAGENET),
    "facebook/dinov2-with-registers-base": ("dinov2_with_registers", _DINOV2, *IMAGENET),
    "facebook/dinov3-vitb16-pretrain-lvd1689m": (
        "dinov3_vit",
        {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_attention_heads": 12,
            "num_register_tokens": 4,
        },
        *IMAGENET,
    ),
    "google/siglip-large-patch16-256": (
        "siglip_vision_model",
        {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 256,
        },
        *HALF,
    ),
    "google/siglip2-so400m-patch16-256": (
        "siglip_vision_model",
        {**_SO400M, "image_size": 256},
        *HALF,
    ),
    "google/siglip2-so400m-patch16-512": (
        "siglip_vision_model",
        {**_SO400M, "image_size": 512},
        *HALF,
    ),
    "OpenGVLab/InternVL3-1B-hf": ("internvl_vision", {"attention_bias": True}, *IMAGENET),
    "facebook/vit-mae-base": ("vit_mae", {}, *IMAGENET),
    "google/vit-base-patch16-224": ("vit", {}, *HALF),
    "facebook/dino-vits8": (
        "vit",
        {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6, "patch_size": 8},
        *IMAGENET,
    ),
}


class FoundationEncoder(nn.Module):
    """(B, 3, H, W) in [-1, 1] -> patch features (B, channels, H / stride, W / stride), for any
    whole grid of patches.

    Images are normalised as the model's preprocessor_config.json says; class and register tokens
    are dropped. A frozen encoder runs without gradients and stays in evaluation mode.
    """

    def __init__(
        self,
        model: nn.Module,
        preprocessing: dict[str, Any],
        frozen: bool,
        final_norm: str = "affine",
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.preprocessing = model, preprocessing
        config = model.config
        self.family = FAMILIES[config.model_type]
        self.channels = config.hidden_size
        self.patch = self.stride = _pair(config.patch_size)[
            0
        ]  # pixels per feature: of the model's input, of images
        self.register_buffer(
            "mean", torch.tensor(preprocessing["image_mean"], dtype=torch.float32).view(3, 1, 1)
        )
        self.register_buffer(
            "std", torch.tensor(preprocessing["image_std"], dtype=torch.float32).view(3, 1, 1)
        )
        if hasattr(model.embeddings, "mask_token"):  # only pretraining uses it
            model.embeddings.mask_token = None
        if final_norm == "plain":
            plain = nn.LayerNorm(self.channels, config.layer_norm_eps, elementwise_affine=False)
            setattr(model, self.family.final_norm, plain)
        if (
            gradient_checkpointing
        ):  # which transformers does in training mode alone; it is about to rename the method
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        self._asked_mode = True
        self.set_frozen(frozen)

    def set_frozen(self, frozen: bool) -> None:
        """Switch between stage 1 (frozen) and stage 2, in which every parameter learns."""
        self.frozen = frozen
        self.model.requires_grad_(not frozen)
        self.train(self._asked_mode)

    def train(self, mode: bool = True) -> FoundationEncoder:
        self._asked_mode = mode
        return super().train(mode and not self.frozen)

    def forward(self, images: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """`grid` of features, where not one for every `stride` pixels; images are resized to what
        it takes (bicubic).

        Raises ValueError when the image is no whole number of strides, and no grid is given.
        """
        height, width = grid or (images.shape[2] // self.stride, images.shape[3] // self.stride)
        if grid is None and images.shape[2:] != (height * self.stride, width * self.stride):
            size = f"{images.shape[2]} x {images.shape[3]}"
            raise ValueError(
                f"images of {size} pixels do not divide into patches of {self.stride}: crop or "
                "resize"
            )
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            seen = (height * self.patch, width * self.patch)
            if images.shape[2:] != seen:
                images = F.interpolate(images, seen, mode="bicubic", align_corners=False)
            pixels = ((images + 1) / 2 - self.mean) / self.std
            tokens = self.model(**self.family.inputs(pixels, self.model.config)).last_hidden_state
        return rearrange(tokens[:, -height * width :], "b (h w) c -> b c h w", h=height)

    def fingerprint(self) -> str:
        """SHA-256 of the weights as they are now."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def save_architecture(self, folder: Path) -> None:
        """Write what `load_architecture` reads: two small JSON files."""
        folder.mkdir(parents=True, exist_ok=True)
        self.model.config.save_pretrained(folder)
        (folder / "preprocessor_config.json").write_text(json.dumps(self.preprocessing, indent=1))


def load_pretrained(
    name: str, revision: str | None, weights: bool = True
) -> tuple[nn.Module, dict[str, Any]]:
    """(model, preprocessing) of a local folder or a Hub model; safetensors only, no remote code.

    Without `weights` the model is random, and a Hub model is one of KNOWN: nothing is fetched.
    """
    import transformers

    local = Path(name).is_dir()
    if not local and (name.startswith((".", "/", "~")) or name.count("/") != 1):
        raise UserError(
            f"model.encoder.name={name}: there is no such folder, and it is no Hub name "
            "(owner/model): "
            "train one on your own data with `make encoder`, or give the path of one"
        )
    if not local and not weights:
        return _load_known(name)
    folder = name if local else _download(name, revision)
    try:
        with quiet_transformers():
            config = _vision_config(folder, name)
            preprocessing = _preprocessing(folder, name)
            if not weights:
                return _build(config), preprocessing
            family = FAMILIES[config.model_type]
            model, report = getattr(transformers, family.model_class).from_pretrained(
                folder,
                config=config,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                dtype=torch.float32,
                key_mapping={PART_OF_COMPOSITE: ""},
                **family.arguments,
            )
    except UserError:
        raise
    except Exception as error:  # what transformers' readers raise shares no base
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"model.encoder.name={name} is damaged or not in transformers' format ({reason}): "
            "give the path of a downloaded model"
        ) from None
    misfits = sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])})
    if misfits:
        raise UserError(
            f"model.encoder.name={name}: its weights lack {misfits[0]} as its config.json "
            "describes it"
        )
    return model, preprocessing


def _download(name: str, revision: str | None) -> str:
    """The local folder of a Hub model, from the Hub or its cache. A Hub that is away is told at
    once."""
    from huggingface_hub import snapshot_download

    wanted = ["config.json", "*processor_config.json", "model.safetensors*", "model-*.safetensors"]
    try:
        with patient(name):
            return snapshot_download(name, revision=revision, allow_patterns=wanted)
    except Exception as error:  # the errors of its network libraries share no base
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"model.encoder.name={name} is no folder here, and the Hub gave no model ({reason}): "
            "give the path of a downloaded model"
        ) from None


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without its progress bars and its table of the weights that an encoder does not need."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def load_architecture(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """(model with random weights, preprocessing) from the two JSON files of a saved tokenizer."""
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder}/config.json is missing: train that tokenizer again, or copy its whole folder"
        )
    return _build(_vision_config(str(folder), str(folder))), _preprocessing(
        str(folder), str(folder)
    )


def _load_known(name: str) -> tuple[nn.Module, dict[str, Any]]:
    import transformers

    if name not in KNOWN:
        known = ", ".join(KNOWN)
        raise UserError(
            f"model.encoder.name={name}: only these are known without weights: {known}; or give a "
            "folder"
        )
    model_type, differences, mean, std = KNOWN[name]
    config = transformers.AutoConfig.for_model(model_type, **differences)
    return _build(_settle(config)), {"image_mean": mean, "image_std": std}


def _build(config: Any) -> nn.Module:
    """The model that a config describes, with random weights."""
    import transformers

    family = FAMILIES[config.model_type]
    return getattr(transformers, family.model_class)(config, **family.arguments)


def _vision_config(folder: str, name: str) -> Any:
    """The config in a folder, or its vision part, of a family that is known here."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    config = getattr(config, "vision_config", config)
    if config.model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise UserError(
            f"model.encoder.name={name}: model type {config.model_type!r} is not one of {known}"
        )
    return _settle(config)


def _settle(config: Any) -> Any:
    for field, value in SETTINGS.items():
        # transformers before 5.24 reads SigLIP's field without having it
        if hasattr(config, field) or (
            field == "vision_use_head" and config.model_type.startswith("siglip")
        ):
            setattr(config, field, value)
    return config


def _preprocessing(folder: str, name: str) -> dict[str, Any]:
    from transformers import BaseImageProcessor

    settings, _ = BaseImageProcessor.get_image_processor_dict(folder)
    try:
        return {key: list(settings[key]) for key in ("image_mean", "image_std")}
    except KeyError as error:
        raise UserError(
            f"model.encoder.name={name}: its preprocessor_config.json lacks {error}: add it"
        ) from None


def _pair(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a size that a config gives as one number or as two."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])
