"""Encoders, one file each: images to a grid of continuous features."""

from tokenizer.encoders.conv import ConvEncoderConfig
from tokenizer.encoders.foundation import FoundationConfig
from tokenizer.encoders.magvit import MagvitEncoderConfig
from tokenizer.encoders.resnet import ResNetEncoderConfig

ENCODERS = {
    "conv": ConvEncoderConfig,
    "resnet": ResNetEncoderConfig,
    "magvit": MagvitEncoderConfig,
    "foundation": FoundationConfig,
}
