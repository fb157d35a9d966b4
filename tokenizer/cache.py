"""The token cache: codes of whole data sets as plain .npy files, tied by hash to the tokenizer that
made them.

    manifest.json
    train-00000.codes.npy    (n, views, N) uint16, or uint32 when a codebook is larger than 65536
    train-00000.labels.npy   (n,) int32
    train-00000.ids.npy      (n,) int64, the images' places in their source
    held_out-00000.…

Little endian. View 0 is the plain image, the others are augmented. Every shard but the last of a
split holds
the same number of images. In numpy:  codes = np.load("train-00000.codes.npy", mmap_mode="r")
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tokenizer.data.identity import FORMAT as IDENTITY
from tokenizer.data.identity import Inventory, of_classes
from tokenizer.interface import CodeLayout
from tokenizer.npy_file import NpyFile
from training.checkpoint import digest, sha256, weights_hash
from training.errors import UserError
from training.precision import LOW
from training.text import printable

if TYPE_CHECKING:
    from tokenizer.data.dataset import Images

FORMAT = "tessera-tokens-1"
ARRAYS = ("codes", "labels", "ids")
SPLITS = ("train", "held_out")


def shard_file(split: str, index: int, array: str) -> str:
    """The name of one array of one shard."""
    return f"{split}-{index:05d}.{array}.npy"


def code_dtype(layout: CodeLayout) -> np.dtype:
    """The smallest of uint16, uint32 and int64 that holds every code."""
    most = max(layout.num_codes)
    return np.dtype("<u2" if most <= 1 << 16 else "<u4" if most <= 1 << 32 else "<i8")


class Shards:
    """The arrays of a split, one after another in the shards, as one array on the first axis."""

    def __init__(self, parts: list[NpyFile] | list[np.ndarray]) -> None:
        self.parts = parts
        self.starts = np.cumsum([0, *map(len, parts)])
        self.shape = (int(self.starts[-1]), *parts[0].shape[1:])
        self.dtype = parts[0].dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> np.ndarray:
        """Rows by an integer, a slice, a list or a mask; a tuple indexes further axes. All as numpy
        does."""
        rows, *rest = key if isinstance(key, tuple) else (key,)
        places = np.arange(len(self))[rows] if isinstance(rows, slice) else np.asarray(rows)
        if places.dtype == bool:
            places = np.flatnonzero(places)
        flat = np.atleast_1d(places)
        if flat.size and not (-len(self) <= flat.min() and flat.max() < len(self)):
            raise IndexError(f"rows {flat.min()}..{flat.max()} of {len(self)}")
        flat = np.where(flat < 0, flat + len(self), flat)
        shards = np.searchsorted(self.starts, flat, side="right") - 1
        out = np.empty((len(flat), *self.shape[1:]), self.dtype)
        for shard in np.unique(shards):
            mine = shards == shard
            out[mine] = self.parts[shard][flat[mine] - self.starts[shard]]
        if not places.ndim:
            return out[0][tuple(rest)] if rest else out[0]
        return (
            out[(slice(None) if isinstance(rows, slice) else np.arange(len(flat)), *rest)]
            if rest
            else out
        )

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return np.concatenate([np.asarray(part, dtype) for part in self.parts])


@dataclasses.dataclass(frozen=True)
class TokenSplit:
    codes: Shards  # (n, views, N)
    labels: np.ndarray  # (n,) int64
    ids: np.ndarray  # (n,) int64


class TokenCache:
    """A finished token cache, of whose codes only the rows that are asked for are read."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest
        self.layout = CodeLayout(**manifest["layout"])
        self.class_names = [printable(name) for name in manifest["class_names"]]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def precision(self) -> str:
        """What the encoder's products were computed in: "fp32", "bf16" or "fp16"."""
        return precision_of(self.manifest)

    @property
    def tokenizer_folder(self) -> Path:
        """The run folder of the tokenizer that made the codes."""
        return Path(os.path.normpath(self.folder.resolve() / self.manifest["tokenizer"]["folder"]))

    @classmethod
    def open(cls, folder: str | Path) -> TokenCache:
        """Raises UserError when there is no finished cache, or a file is missing or not as the
        manifest says."""
        folder = Path(folder)
        manifest = read_manifest(folder)
        if manifest is None:
            raise UserError(
                f"{folder}: there is no finished token cache (no manifest.json): run `make tokens`"
            )
        for split in SPLITS:
            for shard in manifest["splits"][split]["shards"]:
                for name, entry in shard["files"].items():
                    path = folder / name
                    if not path.is_file() or path.stat().st_size != entry["bytes"]:
                        raise UserError(
                            f"{path}: is not the {entry['bytes']} bytes that the manifest names: "
                            f"{REMAKE}"
                        )
        return cls(folder, manifest)

    @property
    def sha256(self) -> str:
        """Of all that the codes, labels and ids are, wherever the images and the tokenizer lie."""
        if "identity" not in self.manifest:  # of an earlier version, by which priors know it
            return sha256(self.folder / "manifest.json")
        known = {key: self.manifest[key] for key in ("layout", "views", "class_names")}
        shards = {split: self.manifest["splits"][split]["shards"] for split in SPLITS}
        return digest(
            {**known, "tokenizer": self.manifest["tokenizer"]["weights_sha256"], "shards": shards}
        )

    def check_images(self, images: Images) -> None:
        """Raise UserError unless these codes are of this very split."""
        if words := other_images(self.manifest, images.split, images.inventory):
            raise UserError(f"{self.folder}: {words}: run `make tokens` again")

    def check_tokenizer(self) -> None:
        """Raise UserError unless the tokenizer's weights are those that made these codes."""
        now, then = (
            weights_hash(self.tokenizer_folder),
            self.manifest["tokenizer"]["weights_sha256"],
        )
        if now != then:
            raise UserError(
                f"{self.folder}: the cache was made by {self.tokenizer_folder} with weights "
                f"{then[:8]}…, and they are "
                f"now {now[:8]}…: run `make tokens` again"
            )

    def verify(self) -> None:
        """Compare every file's SHA-256 and every code's range. Raises UserError naming the first
        that differs."""
        for split in SPLITS:
            for shard in self.manifest["splits"][split]["shards"]:
                for name, entry in shard["files"].items():
                    if sha256(self.folder / name) != entry["sha256"]:
                        raise UserError(
                            f"{self.folder / name}: its SHA-256 is not the manifest's: {REMAKE}"
                        )
            whole = self.split(split)
            if (
                len(whole.labels)
                and not 0 <= whole.labels.min() <= whole.labels.max() < self.num_classes
            ):
                raise UserError(
                    f"{self.folder}: {split} holds labels outside its {self.num_classes} classes: "
                    f"{REMAKE}"
                )
            for codes in map(np.asarray, whole.codes.parts):
                for span, size in self.layout.spans():
                    if codes[..., span].size and codes[..., span].max() >= size:
                        raise UserError(
                            f"{self.folder}: {split} holds codes of {size} and more: {REMAKE}"
                        )

    def split(self, name: str) -> TokenSplit:
        """ "train" or "held_out"."""
        shards = self.manifest["splits"][name]["shards"]

        def read(array: str) -> list[NpyFile]:
            return [
                self._open(shard_file(name, index, array), shard["count"])
                for index, shard in enumerate(shards)
            ]

        labels, ids = (
            np.concatenate([*map(np.asarray, read(array))]).astype(np.int64)
            for array in ("labels", "ids")
        )
        return TokenSplit(Shards(read("codes")), labels, ids)

    def _open(self, name: str, count: int) -> NpyFile:
        """A file's array, of `count` rows. Raises UserError when it holds another, or objects."""
        codes = (self.manifest["views"], self.layout.length) if ".codes." in name else ()
        array = NpyFile(self.folder / name, REMAKE)
        if array.shape != (count, *codes) or array.dtype.kind not in "iu":
            wanted = f"whole numbers {(count, *codes)}"
            raise UserError(
                f"{self.folder / name}: is {array.dtype} {array.shape}, not {wanted}: {REMAKE}"
            )
        return array


REMAKE = "run `make tokens` again"


def precision_of(manifest: dict[str, Any]) -> str:
    """What the encoder's products were computed in; earlier versions computed in fp32 and did not
    say so."""
    return manifest.get("precision", "fp32")


def other_images(manifest: dict[str, Any], split: str, inventory: Inventory) -> str:
    """How a split differs from that which was encoded, in words; nothing where it does not."""
    entry = manifest["splits"][split]
    if manifest.get("identity") != IDENTITY:
        return "an earlier version made it, which did not note of which images"
    if entry["ids_sha256"] == inventory.sha256:
        return ""
    if words := of_classes(manifest["class_names"], inventory.class_names):
        return f"of other images ({words})"
    if entry["listed"] != inventory.num_items:
        return f"of other images ({entry['listed']} {split} images are now {inventory.num_items})"
    return f"of other images (names or contents of the {split} images have changed)"


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a finished cache, or None. Raises UserError when it is damaged or of another
    format."""
    path = folder / "manifest.json"
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text())
        if manifest["format"] != FORMAT:
            raise UserError(
                f"{path}: its format is {manifest['format']!r}, not {FORMAT!r}: {REMAKE}"
            )
        _check(manifest)
        return manifest
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: damaged ({error}): remove it, and {REMAKE}") from None


def _check(manifest: dict[str, Any]) -> None:
    """Raise ValueError, KeyError, TypeError or AttributeError unless a manifest has the form that
    `encode` writes."""
    CodeLayout(**manifest["layout"])
    for value, kind in ((names := manifest["class_names"], list), *((name, str) for name in names)):
        if not isinstance(value, kind):
            raise ValueError("class_names")
    if not isinstance(manifest["data"], dict):
        raise ValueError("data")
    if not isinstance(manifest["plan_sha256"], str):
        raise ValueError("plan_sha256")
    if precision_of(manifest) not in ("fp32", *LOW):
        raise ValueError("precision")
    for key in ("folder", "weights_sha256"):
        if not isinstance(manifest["tokenizer"][key], str):
            raise ValueError(f"tokenizer.{key}")
    for split in SPLITS:
        entry = manifest["splits"][split]
        if "identity" in manifest and (type(entry["listed"]), type(entry["ids_sha256"])) != (
            int,
            str,
        ):
            raise ValueError(f"listed or ids_sha256 of {split}")
        for index, shard in enumerate(entry["shards"]):
            if shard["files"].keys() != {shard_file(split, index, array) for array in ARRAYS}:
                raise ValueError(f"shard {index} of {split} has files {', '.join(shard['files'])}")
            for value in (
                manifest["views"],
                shard["count"],
                *(entry["bytes"] for entry in shard["files"].values()),
            ):
                if not isinstance(value, int):
                    raise ValueError(f"{value!r} is no count")
