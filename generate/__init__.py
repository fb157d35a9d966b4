"""Generation: from a trained prior and its tokenizer to images."""

import tessera.names  # also says so where another package has one of our names

_PUBLIC = {
    "SampleOptions": "priors.interface",
    "sample_images": "generate.api",
}
__all__, __getattr__, __dir__ = tessera.names.public(__name__, _PUBLIC)
