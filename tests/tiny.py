"""Tiny models of every family (in the format their publishers save) and kind; commands run in this
process."""

from __future__ import annotations

import importlib
import json
import sys

import torch

from tokenizer.encoders.foundation import quiet_transformers
from tokenizer.encoders.pretrain import initialise
from tokenizer.quantizers.vector import VectorConfig
from training.command import run_command

SHAPE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
WIDE = {**SHAPE, "intermediate_size": 32}
NAFLEX = {**{key: WIDE[key] for key in WIDE if key != "image_size"}, "num_patches": 16}
INTERN = {**WIDE, "attention_bias": True}
TEXT = {
    "vocab_size": 8,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
MAE_DECODER = {
    "decoder_hidden_size": 8,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 16,
}
QWEN = {"model_type": "qwen2", "num_key_value_heads": 2, "tie_word_embeddings": True, **TEXT}
# model type: (the class that is published, its config)
MODELS = {
    "vit_mae": ("ViTMAEForPreTraining", {**WIDE, **MAE_DECODER}),
    "vit": ("ViTModel", WIDE),
    "dinov2": ("Dinov2Model", {**SHAPE, "mlp_ratio": 2}),
    "dinov2_with_registers": (
        "Dinov2WithRegistersModel",
        {**SHAPE, "mlp_ratio": 2, "num_register_tokens": 3},
    ),
    "dinov3_vit": ("DINOv3ViTModel", {**WIDE, "num_register_tokens": 2}),
    "siglip_vision_model": ("SiglipVisionModel", WIDE),
    "siglip2_vision_model": ("Siglip2VisionModel", NAFLEX),
    "internvl_vision": ("InternVLVisionModel", INTERN),
    "siglip": ("SiglipModel", {"vision_config": WIDE, "text_config": TEXT}),
    "siglip2": ("Siglip2Model", {"vision_config": NAFLEX, "text_config": TEXT}),
    "internvl": (
        "InternVLForConditionalGeneration",
        {"vision_config": INTERN, "text_config": QWEN, "image_token_id": 7},
    ),
}
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
PROCESSORS = {
    "dinov2": "BitImageProcessor",
    "dinov2_with_registers": "BitImageProcessor",
    "dinov3_vit": "DINOv3ViTImageProcessor",
    "siglip_vision_model": "SiglipImageProcessor",
    "siglip": "SiglipImageProcessor",
    "siglip2_vision_model": "Siglip2ImageProcessor",
    "siglip2": "Siglip2ImageProcessor",
    "internvl_vision": "GotOcr2ImageProcessor",
    "internvl": "GotOcr2ImageProcessor",
}


def save_encoder(folder, model_type="vit_mae", seed=0, **overrides):
    """Write a random model with its preprocessor to `folder` (16 px, 4 x 4 patches of 4 px, 16
    channels); its path."""
    import transformers

    model_class, fields = MODELS[model_type]
    config = transformers.AutoConfig.for_model(model_type, **{**fields, **overrides})
    torch.manual_seed(seed)
    model = getattr(transformers, model_class)(config)
    if model_type == "vit_mae":
        initialise(model, config.image_size // config.patch_size)
    else:
        shake(model)
    with quiet_transformers():
        model.save_pretrained(folder)
    preprocessing = {
        "image_processor_type": PROCESSORS.get(model_type, "ViTImageProcessor"),
        "image_mean": MEAN,
        "image_std": STD,
        "do_normalize": True,
        "do_resize": False,
        "do_center_crop": False,
        "patch_size": 4,
        "max_num_patches": 40,  # NaFlex pads to these
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    return str(folder)


@torch.no_grad()
def shake(model):
    """Move what starts at zero or one (positions, class tokens, norms), so that leaving it out
    shows."""
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn_like(parameter)


# A small setting of every quantizer, by its kind in the table.
QUANTIZER_SIZES = {
    "vector": {"num_codes": 20, "code_dim": 8},
    "simvq": {"num_codes": 20, "code_dim": 8},
    "residual": {"depth": 2, "level": VectorConfig(num_codes=20, code_dim=8)},
    "product": {"heads": 2, "level": VectorConfig(num_codes=20, code_dim=4)},
    "gumbel": {"num_codes": 20, "code_dim": 8},
    "fsq": {"levels": (5, 4, 3)},
    "lookup_free": {"bits": 5},
    "bsq": {"bits": 5},
    "ibq": {"num_codes": 20, "code_dim": 8},
}


def command(module: str, *words: object) -> int:
    """Run `python -m module words` in this process; its exit code."""
    kept = sys.argv
    sys.argv = [module, *map(str, words)]
    try:
        run_command(importlib.import_module(module).main)
        return 0
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        sys.argv = kept
