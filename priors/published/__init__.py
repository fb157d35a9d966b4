"""The field's published priors by name: `from_pretrained`, and python -m priors.published."""

from typing import Any


def __getattr__(name: str) -> Any:
    # Lazily, so that importing a part of this package does not import all of it.
    if name == "from_pretrained":
        from priors.published.load import from_pretrained

        return from_pretrained
    raise AttributeError(f"module 'priors.published' has no attribute {name!r}")
