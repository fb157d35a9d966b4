"""Measurements and the records that keep them: a figure without its N, split and settings is no
figure."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import io
import json
import math
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch

from training import distributed
from training.arrays import DamagedFile, read_arrays, reason_of
from training.checkpoint import digest, replace_file
from training.errors import UserError
from training.folder import Folder, Kind

PACKAGES = (
    "torch",
    "torchvision",
    "numpy",
    "scipy",
    "lpips",
    "torch-fidelity",
    "pillow",
    "constriction",
)


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One figure. `settings`, `subject` and `details` hold plain JSON values."""

    name: str
    value: float
    unit: str  # "dB", "%", "bits", ... or ""
    higher_is_better: bool | None  # None: neither
    n: int  # images measured
    split: str  # which images
    settings: dict[str, Any] = dataclasses.field(
        default_factory=dict
    )  # how: reference, extractor, window, ...
    subject: dict[str, Any] = dataclasses.field(
        default_factory=dict
    )  # whose: hashes of weights and samples, seed
    details: dict[str, Any] = dataclasses.field(default_factory=dict)  # what else was found
    interval: tuple[float, float] | None = None  # 95 %

    @property
    def settings_hash(self) -> str:
        """SHA-256 over name, n, split and settings: figures of equal hashes may be compared."""
        return digest({"name": self.name, "n": self.n, "split": self.split, **self.settings})

    def to_dict(self) -> dict[str, Any]:
        fields = dataclasses.asdict(self) | {"settings_hash": self.settings_hash}
        fields["value"] = _to_json(self.value)
        fields["interval"] = self.interval and [_to_json(end) for end in self.interval]
        return fields

    @staticmethod
    def from_dict(fields: dict[str, Any]) -> Measurement:
        fields = {key: value for key, value in fields.items() if key != "settings_hash"}
        interval = fields.pop("interval")
        return Measurement(
            **fields | {"value": float(fields["value"])},
            interval=interval and tuple(float(end) for end in interval),
        )


@dataclasses.dataclass(frozen=True)
class Origin:
    """What figures have in common: which images, measured how, and whose they are."""

    split: str
    settings: dict[str, Any]
    subject: dict[str, Any]

    def measure(
        self,
        name: str,
        value: float,
        unit: str,
        higher_is_better: bool | None,
        n: int,
        *,
        interval: tuple[float, float] | None = None,
        details: dict[str, Any] | None = None,
        **settings: Any,
    ) -> Measurement:
        """A figure of this origin; `settings` are those that only it has."""
        own = self.settings | settings
        given = (
            name,
            value,
            unit,
            higher_is_better,
            n,
            self.split,
            own,
            self.subject,
            details or {},
            interval,
        )
        return Measurement(*given)


@dataclasses.dataclass
class Record:
    """The measurements of one command and the pictures behind them, kept as `kind`.json and
    `kind`.npz."""

    kind: str  # "reconstruction" or "generation"
    settings: dict[str, Any]  # what makes it current: hashes of weights, samples and data, options
    measurements: list[Measurement]
    arrays: dict[str, np.ndarray]
    notes: list[str] = dataclasses.field(
        default_factory=list
    )  # banners, and figures left out with the reason
    environment: dict[str, Any] = dataclasses.field(default_factory=lambda: describe_environment())

    @property
    def hash(self) -> str:
        return _hash(self.kind, self.settings)

    def save(self, folder: Path) -> None:
        """The arrays first: a JSON file without its own arrays counts as absent."""
        arrays, names = io.BytesIO(), (f"{self.kind}.npz", f"{self.kind}.json")
        np.savez_compressed(arrays, record_hash=np.array(self.hash), **self.arrays)
        fields = self.to_dict()
        with Folder(folder, PAGES).taken(wait=True) as pages:
            if _is_record(folder / names[1]):
                pages.adopt(*names)
            pages.note(*names)
            replace_file(folder / names[0], arrays.getvalue())
            replace_file(folder / names[1], dump_json(fields | {"sha256": digest(fields)}))

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "hash": self.hash,
            "settings": self.settings,
            "measurements": [measurement.to_dict() for measurement in self.measurements],
            "notes": self.notes,
            "environment": self.environment,
        }

    @staticmethod
    def load(folder: Path, kind: str, settings: dict[str, Any]) -> Record | None:
        """The kept record if it was made with exactly these settings and is whole, else None."""
        kept = Record.read(folder, kind)
        return kept if kept and kept.hash == _hash(kind, settings) else None

    @staticmethod
    def read(folder: Path, kind: str) -> Record | None:
        """The kept record, whatever its settings; None when there is none, or it is damaged, which
        is said.

        Raises UserError for files of these names that no command wrote: they would be lost when it
        is measured.
        """
        file = folder / f"{kind}.json"
        for path in (file, file.with_suffix(".npz")):
            if os.path.lexists(path) and not (
                _is_record(file) or Folder(folder, PAGES).lists(path.name)
            ):
                raise UserError(
                    f"{path}: no command here wrote it, and it is in the way: move it away"
                )
        try:
            fields = json.loads(file.read_bytes())
            arrays = read_arrays(file.with_suffix(".npz"))
            if "sha256" in fields and fields.pop("sha256") != digest(fields):
                raise DamagedFile("its SHA-256 is not that of what it holds")
            measurements = [Measurement.from_dict(each) for each in fields["measurements"]]
            own = str(arrays.pop("record_hash"))
            record = Record(
                kind,
                fields["settings"],
                measurements,
                arrays,
                fields["notes"],
                fields["environment"],
            )
            return (
                record if own == fields["hash"] == record.hash else None
            )  # else a kill came between the two files
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if distributed.is_main():
                reason = f"damaged, or of another version ({reason_of(error)})"
                print(f"warning: {file} or its .npz: {reason}: it is not used", flush=True)
            return None


def _is_record(path: Path) -> bool:
    """Whether a file holds a record, though it may be out of date or have a flipped bit in its
    figures."""
    try:
        return {"kind", "hash", "measurements"} <= json.loads(path.read_bytes()).keys()
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def _has_pages(folder: Path) -> bool:
    """Whether a folder without a list of files holds pages of ours."""
    for name in ("report", "quantizers", "priors"):
        try:
            if {"hash", "runs"} & json.loads((folder / f"{name}.json").read_bytes()).keys():
                return True
        except (OSError, ValueError, AttributeError):
            continue
    return False


RECORDS = (
    r"(reconstruction|codebook|rate|rate_distortion|probe|protocols|likelihood|generation"
    r"|(reconstruction|likelihood|generation)-.+)\.(json|npz)"
)
PAGES = Kind(
    "folder of pages",
    (
        r"(report|quantizers|priors)\.(md|html|json)",
        r"rate_distortion\.png",
        r"images/[\w.-]+",
        RECORDS,
    ),
    made=_has_pages,
    shared=True,
)


def claim_pages(folder: Path, *names: str) -> None:
    """List pages that are going to be written. Raises UserError for one that is there and that no
    command wrote."""
    with Folder(folder, PAGES).taken(wait=True) as pages:
        pages.note(*names)


def write_pages(folder: Path, files: dict[str, bytes]) -> None:
    """Write files in their order, the last of which says that all are there, beside whatever else
    is in the folder.

    Raises UserError, and writes nothing, for one that is there and that no command wrote.
    """
    with Folder(folder, PAGES).taken(wait=True) as pages:
        pages.note(*files)
        for name, data in files.items():
            replace_file(folder / name, data)


def _hash(kind: str, settings: dict[str, Any]) -> str:
    return digest({"kind": kind, **nameless(settings)})


def nameless(settings: Any) -> Any:
    """Settings without the names of data sets, which have an identity: a folder may be called
    otherwise."""
    if isinstance(settings, list):
        return [nameless(each) for each in settings]
    if not isinstance(settings, dict):
        return settings
    left_out = {"source"} if "ids_sha256" in settings else set()
    return {key: nameless(value) for key, value in settings.items() if key not in left_out}


def share_interval(hits: int, n: int) -> tuple[float, float]:
    """95 % for a share (Wilson 1927), in percent, within [0, 100]."""
    z, share = 1.96, hits / n
    middle, reach = (
        share + z * z / (2 * n),
        z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)),
    )
    low, high = (100 * (middle + side) / (1 + z * z / n) for side in (-reach, reach))
    # Of no hits, and of hits alone, one end is exactly 0 or 100, which rounding misses.
    return low if hits else 0.0, high if hits < n else 100.0


def mean_interval(values: torch.Tensor) -> tuple[float, float] | None:
    """95 % for the mean of independent (n,) values, normal; None below 2 values or if any is not
    finite."""
    if len(values) < 2 or not values.isfinite().all():
        return None
    reach = 1.96 * float(values.std()) / math.sqrt(len(values))
    return float(values.mean()) - reach, float(values.mean()) + reach


def describe_environment() -> dict[str, Any]:
    """What may move a figure in its last digits."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "packages": versions,
        "device": "cpu"
        if (kind := distributed.gpu()) is None
        else getattr(torch, kind).get_device_name(),
        "torch_threads": torch.get_num_threads(),
        "git_commit": git_commit(),
    }


def git_commit() -> str | None:
    """HEAD of the checkout that this code lies in, "+" when it has changes; None without git or
    checkout."""
    try:
        head, changes = (
            subprocess.run(
                ["git", *arguments],
                cwd=Path(__file__).parent,
                capture_output=True,
                text=True,
                timeout=10,
            )
            for arguments in (
                ["rev-parse", "HEAD"],
                ["status", "--porcelain", "--untracked-files=no"],
            )
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if head.returncode:
        return None
    return head.stdout.strip() + ("+" if changes.stdout.strip() else "")


def dump_json(content: Any) -> bytes:
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    return text.encode(
        errors="backslashreplace"
    )  # of a path whose bytes are no UTF-8: "\udce9" is JSON's own escape


def _to_json(value: float) -> float | str:
    """JSON has no infinity: the PSNR of equal images is the string "inf", which float() reads
    back."""
    return value if math.isfinite(value) else str(value)
