"""The name and version of the project; its packages are training, tokenizer, priors, generate and
eval."""

__version__ = "0.1.0"
__all__ = ["__version__"]
