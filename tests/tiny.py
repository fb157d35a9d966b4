"""Tiny random models in transformers' format, one for each family of encoders."""

from __future__ import annotations

import json

import torch

from tokenizer.encoders.foundation import FAMILIES, quiet_transformers
from tokenizer.encoders.pretrain import initialise

SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}
EXTRA = {
    "vit_mae": {
        "intermediate_size": 32,
        "decoder_hidden_size": 8,
        "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 16,
    },
    "vit": {"intermediate_size": 32},
    "dinov2": {"mlp_ratio": 2},
    "dinov2_with_registers": {"mlp_ratio": 2, "num_register_tokens": 3},
}
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]


def save_encoder(folder, model_type="vit_mae", seed=0, **overrides):
    """Write a random model with its preprocessor to `folder` (16 px, 4 x 4 patches of 4 px, 16 channels); its path."""
    import transformers

    config = transformers.AutoConfig.for_model(model_type, **{**SHAPE, **EXTRA[model_type], **overrides})
    torch.manual_seed(seed)
    if model_type == "vit_mae":  # as published: with the decoder that an encoder does not need
        model = transformers.ViTMAEForPreTraining(config)
        initialise(model, config.image_size // config.patch_size)
    else:
        model = getattr(transformers, FAMILIES[model_type].model_class)(config)
    with quiet_transformers():
        model.save_pretrained(folder)
    preprocessing = {"image_processor_type": "ViTImageProcessor", "image_mean": MEAN, "image_std": STD}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    return str(folder)
