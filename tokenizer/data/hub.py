"""Data sets of the Hugging Face Hub as a source."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from tokenizer.data.columns import (
    NO_CHOICE,
    Choice,
    Table,
    choose_image,
    choose_label,
    split_columns,
)
from tokenizer.data.digests import FileDigests
from tokenizer.data.splits_and_classes import number_classes, own_split
from tokenizer.data.transforms import BadImage
from tokenizer.remote import patient
from training.errors import UserError

NAME = r"[\w-][\w.-]*(/[\w-][\w.-]*)?"  # of a data set: owner/name, or one without an owner


class HubListing:
    """A data set of the Hugging Face Hub, through `datasets` and its cache."""

    refused: Mapping[int, str] = {}

    def __init__(self, name: str, choice: Choice = NO_CHOICE) -> None:
        import datasets

        source = f"hub:{name}"
        if not re.fullmatch(NAME, name):
            raise UserError(f"data.source={source}: a data set of the Hub is named hub:owner/name")
        if Path(name).exists():  # which `datasets` would take
            raise UserError(
                f"data.source={source}: {name} is here, too: for what is here write "
                f"data.source={name}, for what the "
                "Hub has start in another folder"
            )
        wanted = [choice.hub_config] if choice.hub_config is not None else []
        revision = {"revision": choice.hub_revision} if choice.hub_revision is not None else {}
        try:
            with patient(source):
                parts = datasets.load_dataset(name, *wanted, **revision)
        except Exception as error:  # anything from a typing slip to a lost connection
            reason = " ".join(str(error).split())
            remedy = "check the name and the connection"
            if (
                "onfig" in reason and not wanted
            ):  # "Config name is missing. Please pick one among …"
                remedy = "choose one with data.hub_config"
            raise UserError(
                f"data.source={source} cannot be loaded ({reason}): {remedy}"
            ) from error
        self.name = name.split("/")[-1]
        split = own_split(list(parts))
        used = list(parts) if split is None else [*split.train, *split.held_out]
        whole = datasets.concatenate_datasets([parts[part] for part in used])
        images = [
            key for key, feature in whole.features.items() if isinstance(feature, datasets.Image)
        ]
        self._column = choose_image(f"data.source={source}", list(whole.features), images, choice)
        if self._column not in images:
            raise UserError(f"data.image_column={self._column}: in {source} it holds no images")
        classes = {
            key: kind.names
            for key, kind in whole.features.items()
            if isinstance(kind, datasets.ClassLabel)
        }
        rest = [key for key in whole.features if key != self._column]
        label = choose_label(f"data.source={source}", rest, choice, classes)
        rows = whole.select_columns(self._column)
        self._rows = rows.cast_column(self._column, datasets.Image(decode=False))
        values = [None] * len(whole) if label is None else list(whole[label])
        self.labels, self.class_names = number_classes(source, values, classes.get(label or ""))
        in_held_out = [split is not None and part in split.held_out for part in used]
        self.held_out = (
            None if split is None else np.repeat(in_held_out, [len(parts[p]) for p in used])
        )
        others = [key for key in images if key != self._column]
        table = Table(
            self._column, self._column, label, classes.get(label or ""), others, split_columns(rest)
        )
        self.notes = [*(split.notes() if split else []), *table.notes(values)]

    def key(self, item: int) -> str:
        return str(item)

    def where(self, item: int) -> str:
        return f"row {item}"

    def read(self, item: int) -> bytes:
        image = self._rows[item][self._column]
        if image is None:
            raise BadImage("has no bytes")
        try:
            return (
                image["bytes"] or Path(image["path"]).read_bytes()
            )  # Hub folders stay files in the cache
        except (TypeError, OSError) as error:
            raise BadImage(f"cannot be read ({error})") from error

    def digests(self, items: np.ndarray) -> FileDigests:
        """Of the images themselves: the files of the cache name its folder."""

        def read() -> Iterator[bytes]:
            for item in items.tolist():
                try:
                    yield self.read(item)
                except BadImage:
                    yield b""

        files = [Path(file["filename"]) for file in self._rows.cache_files]
        return FileDigests.of_rows(f"hub:{self.name}", files, items, read())
