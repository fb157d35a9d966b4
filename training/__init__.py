"""Everything that any run needs and that knows nothing of images or codes: one configuration
loader, one loop, one checkpoint format, one distributed helper. Imports nothing from the other
packages."""
