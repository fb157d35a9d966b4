"""Images to discrete codes and back.

`tokenizer.load(run_folder)` gives a trained tokenizer, `tokenizer.from_pretrained(name_or_folder)`
a shared one, and `tokenizer.VQRAE` is the class behind the interface of RAE.
"""

from typing import Any

import tessera.names  # noqa: F401 - says so where another package has one of our names


def __getattr__(name: str) -> Any:
    # Lazily, so that importing a part of this package does not import all of it.
    if name == "load":
        from tokenizer.run import load

        return load
    if name == "from_pretrained":
        from tokenizer.sharing import from_pretrained

        return from_pretrained
    if name == "VQRAE":
        from tokenizer.vqrae import VQRAE

        return VQRAE
    raise AttributeError(f"module 'tokenizer' has no attribute {name!r}")
