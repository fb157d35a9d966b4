"""Generation: from a trained prior and its tokenizer to images."""

import tessera.names  # noqa: F401 - says so where another package has one of our names
