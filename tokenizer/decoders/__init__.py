"""Decoders, one file each: a grid of code vectors to images."""

from tokenizer.decoders.conv import ConvDecoderConfig
from tokenizer.decoders.dvae import DVAEDecoderConfig
from tokenizer.decoders.magvit import MagvitDecoderConfig
from tokenizer.decoders.patch_vit import PatchViTDecoderConfig
from tokenizer.decoders.resnet import ResNetDecoderConfig
from tokenizer.decoders.titok import TiTokDecoderConfig
from tokenizer.decoders.vit import ViTDecoderConfig

DECODERS = {
    "conv": ConvDecoderConfig,
    "resnet": ResNetDecoderConfig,
    "magvit": MagvitDecoderConfig,
    "patch_vit": PatchViTDecoderConfig,
    "titok": TiTokDecoderConfig,
    "dvae": DVAEDecoderConfig,
    "vit": ViTDecoderConfig,
}
