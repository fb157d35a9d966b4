"""Figures that say what they measure: each comes with its count, split, extractor and settings
hash.

Runs downstream of everything, on finished tokenizers and samples: `python -m eval.run report RUN`.
"""

import tessera.names  # also says so where another package has one of our names

_PUBLIC = {
    "frechet_distance": "eval.distance",
    "lpips": "eval.distance",
    "psnr": "eval.distance",
}
__all__, __getattr__, __dir__ = tessera.names.public(__name__, _PUBLIC)
