"""Encoders, one file each: images to a grid of continuous features."""

from tokenizer.encoders.conv import ConvEncoderConfig
from tokenizer.encoders.dvae import DVAEEncoderConfig
from tokenizer.encoders.foundation import FoundationConfig
from tokenizer.encoders.magvit import MagvitEncoderConfig
from tokenizer.encoders.patch_vit import PatchViTEncoderConfig
from tokenizer.encoders.resnet import ResNetEncoderConfig
from tokenizer.encoders.titok import TiTokEncoderConfig

ENCODERS = {
    "conv": ConvEncoderConfig,
    "resnet": ResNetEncoderConfig,
    "magvit": MagvitEncoderConfig,
    "patch_vit": PatchViTEncoderConfig,
    "titok": TiTokEncoderConfig,
    "dvae": DVAEEncoderConfig,
    "foundation": FoundationConfig,
}
