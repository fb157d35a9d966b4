"""samples.json: what is known of samples beside their pixels, and which of it a comparison
needs."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from generate.images import FILES
from training.arrays import reason_of
from training.errors import UserError

REMEDY = "remove it, and sample again (python -m generate.sample)"


def read_facts(folder: Path) -> dict[str, Any]:
    """What samples.json of a folder says; nothing where there is none, as of samples by others.

    Raises UserError for a damaged one: what is there has the form that generate.sample writes.
    """
    path = folder / FILES.record
    if not os.path.lexists(path):
        return {}
    try:
        facts = json.loads(path.read_bytes())
        made_from = facts.get("made_from", {})
        for name in ("prior_sha256", "tokenizer_sha256"):
            _check(name, made_from.get(name, ""), _is_text)
        _check("num", made_from.get("num", 0), _is_count)
        if "options" in made_from:
            _check("options.seed", made_from["options"]["seed"], _is_count)
        return facts
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({reason_of(error)}): {REMEDY}") from None


def read_cost(folder: Path) -> dict[str, Any]:
    """The same, of samples that are compared: their number, options, seconds, batch size and device
    are in it.

    Raises UserError where one is not, or has no such value.
    """
    path, facts = folder / FILES.record, read_facts(folder)
    try:
        _check("seconds_per_image", facts["seconds_per_image"], _is_time)
        _check("device", facts["device"], _is_text)
        _check("batch_size", facts["batch_size"], _is_count)
        _check("num", facts["made_from"]["num"], _is_count)
        _check("options.guidance", facts["made_from"]["options"]["guidance"], _is_time)
        return facts
    except KeyError as error:
        raise UserError(
            f"{path}: has no {error.args[0]}, which a comparison needs: {REMEDY}"
        ) from None
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error}): {REMEDY}") from None


def _check(name: str, value: Any, good: Callable[[Any], bool]) -> None:
    if not good(value):
        raise ValueError(f"{name} is {str(value)[:40]!r}")


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_time(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value >= 0
