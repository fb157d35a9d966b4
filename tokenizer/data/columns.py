"""Tables of images (parquet, Arrow, the Hub): which column holds the images, which one the
labels."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from tokenizer.data.splits_and_classes import some
from training.errors import UserError

LABEL_WORDS = {
    "label",
    "labels",
    "class",
    "classes",
    "category",
    "categories",
    "target",
    "targets",
    "cls",
}
SPLIT_WORDS = {"split", "splits", "subset", "partition"}
NO_LABELS = "none"  # a label column: the images have no classes


class Choice(NamedTuple):
    """What a user says of a source; None leaves it to what the source says of itself."""

    image_column: str | None = None
    label_column: str | None = None  # or NO_LABELS
    hub_config: str | None = None
    hub_revision: str | None = None

    def refuse(self, source: str, *fields: str) -> None:
        """Raise UserError where a setting is given that a source has no use for."""
        for field in fields:
            if getattr(self, field) is not None:
                raise UserError(
                    f"data.{field}={getattr(self, field)}: data.source={source} has no use for it"
                )


NO_CHOICE = Choice()


def choose_label(
    source: str, columns: Sequence[str], choice: Choice, classes: Collection[str] = ()
) -> str | None:
    """The column of labels: the one chosen, else the only one whose name or description says so;
    None without.

    `classes` are the columns that the source itself describes as classes.
    """
    if choice.label_column == NO_LABELS:
        return None
    if choice.label_column is not None:
        if choice.label_column not in columns:
            raise UserError(
                f"data.label_column={choice.label_column}: {source} has only {', '.join(columns)}"
            )
        return choice.label_column
    candidates = [name for name in columns if name in classes or _words(name) & LABEL_WORDS]
    if len(candidates) > 1:
        raise UserError(
            f"{source} has {len(candidates)} columns that may be its labels, "
            f"{', '.join(candidates)}: choose one with "
            f"data.label_column={candidates[0]}, or data.label_column={NO_LABELS} for none"
        )
    return candidates[0] if candidates else None


def choose_image(source: str, columns: Sequence[str], images: Sequence[str], choice: Choice) -> str:
    """The column of images: the one chosen, else "image", else the only one of `images`, which hold
    images."""
    if choice.image_column is not None:
        if choice.image_column not in columns:
            raise UserError(
                f"data.image_column={choice.image_column}: {source} has only {', '.join(columns)}"
            )
        return choice.image_column
    if "image" in images:
        return "image"
    if len(images) != 1:
        shown = ", ".join(images or columns)
        raise UserError(
            f"{source} has no column image: {{bytes, path}}, only {shown}: name one with "
            "data.image_column"
        )
    return images[0]


class Table(NamedTuple):
    """How a table of images is read."""

    image: str  # column
    encoded: str  # where in it the encoded images are
    label: str | None  # column
    class_names: list[str] | None  # of the labels, where the table has them
    others: list[str]  # columns of images that are passed over
    splits: Sequence[str] = ()  # columns that may say which split a row is of, and are not read

    @staticmethod
    def of_schema(source: str, schema: Any, choice: Choice) -> Table:
        """Of an Arrow schema. Raises UserError where a column is missing or in doubt."""
        images, classes = image_columns(schema), class_columns(schema)
        image = choose_image(source, schema.names, images, choice)
        rest = [name for name in schema.names if name != image]
        label = choose_label(source, rest, choice, classes)
        others = [name for name in images if name != image]
        return Table(
            image,
            _encoded(source, schema, image),
            label,
            classes.get(label or ""),
            others,
            split_columns(rest),
        )

    def notes(self, values: Sequence[Any]) -> list[str]:
        """What people should know of it, given the labels."""
        notes = []
        if self.others:
            notes.append(
                f"images are taken from column {self.image}; passed over: {some(self.others)}"
            )
        if self.label is not None and all(value is None or value == -1 for value in values):
            notes.append(f"column {self.label} holds no label: all images are of one class")
        notes += [split_note(self.splits)] if self.splits else []
        return notes


def split_columns(columns: Sequence[str]) -> list[str]:
    """Those that by their names may say which split a row is of."""
    return [name for name in columns if _words(name) & SPLIT_WORDS]


def split_note(columns: Sequence[str]) -> str:
    """That nobody reads them, which would otherwise train on what was to be held out."""
    return (
        f"column {some(columns)} is not read: it may say which images are held out, and files or "
        "folders named train "
        "and validation do"
    )


def binary(column: Any) -> Any:
    """A column of `Table.encoded`, as parquet and Arrow give it -> a pyarrow array of bytes."""
    import pyarrow as pa

    return column.field("bytes") if pa.types.is_struct(column.type) else column


def image_columns(schema: Any) -> list[str]:
    """Columns of an Arrow schema in the Hugging Face layout {bytes, path}."""
    return [field.name for field in schema if _has_bytes(field.type)]


def _encoded(source: str, schema: Any, column: str) -> str:
    """In the column itself, or in its part `bytes`."""
    import pyarrow as pa

    kind = schema.field(column).type
    if _has_bytes(kind):
        return f"{column}.bytes"
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return column
    raise UserError(
        f"data.image_column={column}: in {source} it holds {kind}, neither bytes nor {{bytes, "
        f"path}}"
    )


def class_columns(schema: Any) -> dict[str, list[str]]:
    """What `datasets` wrote into an Arrow schema about columns of classes: their names."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        named = {
            name: feature.get("names")
            for name, feature in features.items()
            if isinstance(feature, dict)
        }
    except (KeyError, TypeError, AttributeError, ValueError):
        return {}
    return {
        name: names
        for name, names in named.items()
        if isinstance(names, list) and name in schema.names
    }


def _has_bytes(kind: Any) -> bool:
    import pyarrow as pa

    place = kind.get_field_index("bytes") if pa.types.is_struct(kind) else -1
    return place >= 0 and kind[place].type in (pa.binary(), pa.large_binary())


def _words(name: str) -> set[str]:
    return {word.lower() for word in re.findall("[A-Z]?[a-z]+|[A-Z]+", name)}
