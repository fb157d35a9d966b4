"""Decoders, one file each: a grid of code vectors to images."""

from tokenizer.decoders.conv import ConvDecoderConfig
from tokenizer.decoders.vit import ViTDecoderConfig

DECODERS = {"conv": ConvDecoderConfig, "vit": ViTDecoderConfig}
