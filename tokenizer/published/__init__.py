"""The field's published tokenizers by name: `from_pretrained`, and python -m
tokenizer.published."""

from typing import Any


def __getattr__(name: str) -> Any:
    # Lazily, so that importing a part of this package does not import all of it.
    if name in ("from_pretrained", "save_published"):
        from tokenizer.published import load

        return getattr(load, name)
    raise AttributeError(f"module 'tokenizer.published' has no attribute {name!r}")
