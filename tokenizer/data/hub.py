"""Data sets of the Hugging Face Hub as a source."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from tokenizer.data.naming import number_classes, own_split
from tokenizer.data.transforms import BadImage
from tokenizer.remote import patient
from training.command import UserError


class HubListing:
    """A data set of the Hugging Face Hub, through `datasets` and its cache."""

    refused: Mapping[int, str] = {}

    def __init__(self, name: str):
        import datasets

        try:
            with patient(f"hub:{name}"):
                parts = datasets.load_dataset(name)
        except Exception as error:  # anything from a typing slip to a lost connection
            reason = " ".join(str(error).split())
            remedy = "check the name and the connection"
            raise UserError(f"data.source=hub:{name} cannot be loaded ({reason}): {remedy}") from error
        self.name = name.split("/")[-1]
        split = own_split(list(parts))
        used = list(parts) if split is None else [*split.train, *split.held_out]
        whole = datasets.concatenate_datasets([parts[part] for part in used])
        images = [key for key, feature in whole.features.items() if isinstance(feature, datasets.Image)]
        if "image" not in images and len(images) != 1:
            raise UserError(f"data.source=hub:{name} has no image column, only {', '.join(whole.features)}")
        self._column = "image" if "image" in images else images[0]
        rows = whole.select_columns(self._column)
        self._rows = rows.cast_column(self._column, datasets.Image(decode=False))
        values = list(whole["label"]) if "label" in whole.features else ["all"] * len(whole)
        class_names = getattr(whole.features.get("label"), "names", None)
        self.labels, self.class_names = number_classes(f"hub:{name}", values, class_names)
        in_held_out = [split is not None and part in split.held_out for part in used]
        self.held_out = None if split is None else np.repeat(in_held_out, [len(parts[p]) for p in used])

    def key(self, item: int) -> str:
        return str(item)

    def where(self, item: int) -> str:
        return f"row {item}"

    def read(self, item: int) -> bytes:
        image = self._rows[item][self._column]
        if image is None:
            raise BadImage("has no bytes")
        try:
            return image["bytes"] or Path(image["path"]).read_bytes()  # Hub folders stay files in the cache
        except (TypeError, OSError) as error:
            raise BadImage(f"cannot be read ({error})") from error
