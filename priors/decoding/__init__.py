"""Sampling from the transformer on packed weights: slot by slot, and all positions at once."""
