"""Everything that any run needs and that knows nothing of images or codes: one configuration
loader, one loop, one checkpoint format, one distributed helper. Imports nothing from the other
packages."""

import tessera.names  # noqa: F401 - says so where another package has one of our names
