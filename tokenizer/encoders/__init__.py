"""Encoders, one file each: images to a grid of continuous features."""

from tokenizer.encoders.conv import ConvEncoderConfig
from tokenizer.encoders.foundation import FoundationConfig

ENCODERS = {"conv": ConvEncoderConfig, "foundation": FoundationConfig}
