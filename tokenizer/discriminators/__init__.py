"""Discriminators, one file each: images to logits of being real."""

from tokenizer.discriminators.dino import DinoConfig
from tokenizer.discriminators.patch import PatchConfig

DISCRIMINATORS = {"patch": PatchConfig, "dino": DinoConfig}
