"""Networks that see images for a distance between distributions, and how others fed them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# Extractors of a user's own (docs/plugins.md), by the name that --extractor of `distance` and
# `reference-stats` takes: what makes a `interface.Extractor`.
EXTRACTORS: dict[str, Callable[[], Any]] = {}
