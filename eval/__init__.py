"""Figures that say what they measure: each comes with its count, split, extractor and settings
hash.

Runs downstream of everything, on finished tokenizers and samples: `python -m eval.run report RUN`.
"""

import tessera.names  # noqa: F401 - says so where another package has one of our names
