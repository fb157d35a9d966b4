"""Decoders, one file each: a grid of code vectors to images."""

from tokenizer.decoders.conv import ConvDecoderConfig
from tokenizer.decoders.magvit import MagvitDecoderConfig
from tokenizer.decoders.resnet import ResNetDecoderConfig
from tokenizer.decoders.vit import ViTDecoderConfig

DECODERS = {
    "conv": ConvDecoderConfig,
    "resnet": ResNetDecoderConfig,
    "magvit": MagvitDecoderConfig,
    "vit": ViTDecoderConfig,
}
