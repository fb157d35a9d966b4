"""A frozen encoder's features as plain .npy files, computed once per augmented view, for stage 1 to
train from.

    <root>/features/<hash of what they depend on>/
        manifest.json    what that is
        00000.npy        (n, views, h, w, C) float16 or float32, little endian: the next n images
        00001.npy        …

Epoch e trains on view e mod `views`: the augmentations of the first `views` epochs, over and over.
In numpy: features = np.load("00000.npy", mmap_mode="r")
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenizer.data.dataset import DataConfig, Images
from tokenizer.data.loader import Key, read
from tokenizer.encoders.foundation import FoundationConfig, FoundationEncoder
from tokenizer.hierarchical import VQVAE2Config
from tokenizer.npy_file import NpyFile
from tokenizer.objective import ObjectiveConfig
from training import distributed
from training.checkpoint import digest, replace_file
from training.errors import UserError
from training.folder import Folder, Kind
from training.log import Progress

FORMAT = "tessera-features-1"
# Its name is the hash of what it holds, so no one else has a use for it.
FEATURES = Kind(
    "cache of features", (r"manifest\.json", r"[0-9]{5,}\.npy"), made=lambda folder: True
)
DTYPES = {"float16": np.dtype("<f2"), "float32": np.dtype("<f4")}
SHARD_BYTES = 64 * 2**20  # about: what a kill can cost, and what a process holds in memory
BATCH = 64  # fixed, so that the same images meet the same kernels whatever the number of processes


@dataclasses.dataclass(frozen=True)
class FeaturesConfig:
    """What is stored; runs of the same encoder, data, seed and settings share it, whatever else
    they differ in."""

    views: int = 4  # augmentations of each image, one per epoch in turn
    dtype: str = "float16"  # or "float32", which trains exactly as images would

    def __post_init__(self) -> None:
        if self.views < 1:
            raise ValueError(f"features.views={self.views}: at least 1 is needed")
        if self.dtype not in DTYPES:
            raise ValueError(f"features.dtype={self.dtype!r} is not one of {', '.join(DTYPES)}")

    def check(self, data: DataConfig, model: Any, objective: ObjectiveConfig) -> None:
        """Raise ValueError for a run whose encoder has to see the images."""
        if isinstance(model, VQVAE2Config) or not isinstance(model.encoder, FoundationConfig):
            raise ValueError(
                f"features.views={self.views}: {model.kind} learns its encoder: set features=null"
            )
        if not model.encoder.frozen:
            raise ValueError(
                f"features.views={self.views}: model.encoder.frozen=false changes its features at "
                "every step: "
                "set features=null"
            )
        if objective.distillation > 0 and objective.distillation_target == "teacher":
            raise ValueError(
                f"features.views={self.views}: objective.distillation={objective.distillation} "
                "runs a teacher on the "
                "images, and a frozen encoder needs none: set objective.distillation=0"
            )
        if self.views > 1 and data.augment == "none":
            raise ValueError(
                f"features.views={self.views}: with data.augment=none all views are equal: set it "
                "to 1"
            )

    def bytes_per_image(self, channels: int, grid: tuple[int, int]) -> int:
        """On disk, of features (channels, *grid)."""
        return self.views * channels * grid[0] * grid[1] * DTYPES[self.dtype].itemsize


class StoredFeatures:
    """`images` as a map-style data set that gives "features" (B, C, h, w) beside what the images
    themselves give."""

    def __init__(
        self,
        images: Images,
        encoder: FoundationEncoder,
        config: FeaturesConfig,
        *,
        augment: str,
        seed: int,
        root: Path,
    ) -> None:
        """Only names them: `make` computes. `augment` and `seed` are what `images` were opened
        with."""
        self.images, self.skipped = images, images.skipped
        self.views, self.dtype = config.views, DTYPES[config.dtype]
        side = images.image_size // encoder.stride
        self.shape = (config.views, side, side, encoder.channels)
        self.bytes_per_image = config.bytes_per_image(encoder.channels, (side, side))
        self.images_per_shard = max(1, SHARD_BYTES // self.bytes_per_image // BATCH) * BATCH
        self.plan = {
            "format": FORMAT,
            "encoder": _identity(encoder),
            "images": {
                "identity": images.inventory.sha256,
                "n": len(images),
                "image_size": images.image_size,
            },
            "views": {"augment": augment, "seed": seed},
            "shape": list(self.shape),
            "dtype": self.dtype.str,
            "images_per_shard": self.images_per_shard,
        }
        self.hash = digest(self.plan)
        self.folder = root / "features" / self.hash[:16]

    def __len__(self) -> int:
        return len(self.images)

    def gather(self, keys: list[Key]) -> dict[str, Tensor]:
        """(epoch, index) keys -> images (B, 3, S, S), features (B, C, h, w) of these very images,
        labels and ids."""
        keys = [(epoch % self.views, index) for epoch, index in keys]
        views, indices = np.array(keys, dtype=np.int64).reshape(-1, 2).T
        rows, shards = (
            np.empty((len(keys), *self.shape[1:]), self.dtype),
            indices // self.images_per_shard,
        )
        for shard in np.unique(shards).tolist():
            mine = shards == shard
            places = indices[mine] % self.images_per_shard * self.views + views[mine]
            rows[mine] = self._open(shard).merged()[places]
        return {**self.images.gather(keys), "features": torch.from_numpy(rows).movedim(-1, 1)}

    def make(self, encoder: FoundationEncoder, workers: int = 0) -> None:
        """Compute the shards that are not there yet, dealt to ranks in turn; `workers` processes
        read the images.

        Raises UserError when they do not fit the disk, or the folder holds something else.
        """
        with contextlib.ExitStack() as held:
            distributed.on_main(lambda: self._prepare(held))
            encoder.to(distributed.device())
            progress = Progress(str(self.folder), len(self))
            shards = range(distributed.rank(), self._num_shards, distributed.world())
            missing = [shard for shard in shards if not self._is_whole(shard)]
            keys = (
                [(view, index) for index in part]
                for shard in missing
                for part in self._batches(shard)
                for view in range(self.views)
            )
            with contextlib.closing(
                read(self.images, keys, self.images.readers(workers), "loop.workers")
            ) as batches:
                for shard in missing:
                    self._make(shard, batches, encoder, progress)
            distributed.barrier()
        if distributed.is_main():
            progress.finish(
                f"{len(self)} images, {self.views} views, {len(self) * self.bytes_per_image:,} "
                "bytes"
            )

    def _make(
        self,
        shard: int,
        batches: Iterator[dict[str, Tensor]],
        encoder: FoundationEncoder,
        progress: Progress,
    ) -> None:
        """`batches`: of each part of the shard all views."""
        places = self._places(shard)
        rows = np.empty((len(places), *self.shape), self.dtype)
        for part in self._batches(shard):
            start = part.start - places.start
            for view in range(self.views):
                images = next(batches)["images"]
                with torch.no_grad():
                    features = encoder(images.to(distributed.device())).movedim(1, -1).cpu().numpy()
                if np.abs(features).max() > np.finfo(self.dtype).max:
                    raise UserError(
                        f"{self.folder}: features reach {np.abs(features).max():.3g}, beyond "
                        f"{self.dtype.name}: "
                        "set features.dtype=float32"
                    )
                rows[start : start + len(part), view] = features
            if distributed.is_main():
                progress.show(part[-1] + 1, f"{self.views} views each")
        buffer = io.BytesIO()
        np.save(buffer, rows)
        replace_file(self._path(shard), buffer.getbuffer())

    def _prepare(self, held: contextlib.ExitStack) -> None:
        """The folder with its manifest, this process's alone, with room on the disk for what is
        missing."""
        missing = [shard for shard in range(self._num_shards) if not self._is_whole(shard)]
        manifest, text = self.folder / "manifest.json", json.dumps(self.plan, indent=1).encode()
        if manifest.is_file() and manifest.read_bytes() != text:
            raise UserError(
                f"{manifest}: is not what these settings make: remove its folder and run again"
            )
        if not missing:
            return
        files = held.enter_context(Folder(self.folder, FEATURES).taken())
        files.note(manifest.name, *(self._path(shard).name for shard in range(self._num_shards)))
        needed = sum(len(self._places(shard)) for shard in missing) * self.bytes_per_image
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise UserError(
                f"{self.folder}: the features need {needed:,} bytes and {free:,} are free: lower "
                "features.views="
                f"{self.views}, make room, or set features=null"
            )
        replace_file(manifest, text)

    @property
    def _num_shards(self) -> int:
        return -(-len(self) // self.images_per_shard)

    def _places(self, shard: int) -> range:
        return range(len(self))[shard * self.images_per_shard : (shard + 1) * self.images_per_shard]

    def _batches(self, shard: int) -> Iterator[range]:
        places = self._places(shard)
        return (places[start : start + BATCH] for start in range(0, len(places), BATCH))

    def _path(self, shard: int) -> Path:
        return self.folder / f"{shard:05d}.npy"

    def _open(self, shard: int) -> NpyFile:
        """(n, views, h, w, C)."""
        return NpyFile(self._path(shard), "run the same command again")

    def _is_whole(self, shard: int) -> bool:
        try:
            array = self._open(shard)
        except UserError:
            return False
        return array.shape == (len(self._places(shard)), *self.shape) and array.dtype == self.dtype


def _identity(encoder: FoundationEncoder) -> dict[str, Any]:
    """What makes an encoder's features, beside the images."""
    architecture = {
        name: value
        for name, value in encoder.model.config.to_dict().items()
        if not name.startswith("_") and name != "transformers_version"
    }
    return {
        "weights_sha256": encoder.fingerprint(),
        "architecture_sha256": digest(architecture),
        "preprocessing": encoder.preprocessing,
        "patch": encoder.patch,
        "stride": encoder.stride,
    }
