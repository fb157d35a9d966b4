"""Everything that any run needs and that knows nothing of images or codes: one configuration
loader, one loop, one checkpoint format, one distributed helper. Imports nothing from the other
packages."""

import tessera.names  # also says so where another package has one of our names

_PUBLIC = {
    "LoopConfig": "training.loop",
    "OptimizerConfig": "training.optim",
    "UserError": "training.errors",
}
__all__, __getattr__, __dir__ = tessera.names.public(__name__, _PUBLIC)
