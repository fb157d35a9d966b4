"""Encode a data set to a token cache: python -m tokenizer.encode CONFIG.yaml [key=value ...]
[--fresh]

The data set is the one that the tokenizer was trained on, unless `source` names another. A cache
that is current is left alone, one that was interrupted is completed, one of another tokenizer or of
other images is made anew.

A tokenizer that others published is imported to ROOT/tokenizer and used from there:
python -m tokenizer.encode published:NAME data.source=IMAGES [root=ROOT] [key=value ...]
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from tokenizer.batch_encoder import BATCH, BatchEncoder, compare_with_fp32
from tokenizer.cache import (
    ARRAYS,
    FORMAT,
    SPLITS,
    TokenCache,
    code_dtype,
    other_images,
    precision_of,
    read_manifest,
    shard_file,
)
from tokenizer.data.dataset import DataConfig, Images, open_split, take_inventories
from tokenizer.data.given import MapDataset, open_given
from tokenizer.data.identity import FORMAT as IDENTITY
from tokenizer.data.identity import Inventory
from tokenizer.data.loader import Key, read
from tokenizer.interface import CodeLayout
from tokenizer.run import load, load_config
from training import distributed
from training.checkpoint import digest, replace_file, sha256, weights_hash
from training.command import Parser, config_command, run_command
from training.config import COMMAND_LINE, from_dict, read_overrides, to_dict
from training.errors import UserError
from training.folder import Folder, Kind
from training.log import Progress
from training.precision import PRECISIONS, decide

IMAGES_PER_SHARD = 4096


@dataclasses.dataclass(frozen=True)
class TokensRun:
    """Which images to encode with which tokenizer, to the folder `root`/`name`."""

    name: str = "tokens"
    root: str = "runs"
    tokenizer: str = "${root}/tokenizer"  # its run folder
    views: int = 1  # versions of each image, all but the first augmented as data.augment says
    source: str | None = None  # another data set than the tokenizer's own
    precision: str = (
        "auto"  # of the encoder: bf16 on a GPU that has it, else fp32; or "fp32", "bf16", "fp16"
    )
    workers: int | None = (
        None  # processes that read images; as many as the tokenizer was trained with
    )

    def __post_init__(self) -> None:
        if self.tokenizer == "${root}/tokenizer":  # made in Python, where nothing resolves it
            object.__setattr__(self, "tokenizer", f"{self.root}/tokenizer")
        if self.views < 1:
            raise ValueError(f"views={self.views}: at least 1 is needed")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision={self.precision!r} is not one of {', '.join(PRECISIONS)}")
        if self.workers is not None and self.workers < 0:
            raise ValueError(f"workers={self.workers}: at least 0 is needed")


def encode_data(
    config: TokensRun,
    *,
    fresh: bool = False,
    images: MapDataset | None = None,
    held_out: MapDataset | None = None,
) -> TokenCache:
    """Encode both splits, of the data that the tokenizer was trained on, or of the map-style data
    sets that are given (see `train_tokenizer`).

    Raises UserError when the folder holds something else or another process writes to it, or there
    is no tokenizer.
    """
    with contextlib.ExitStack() as held:
        return _encode_data(config, fresh, held, images, held_out)


def _encode_data(
    config: TokensRun,
    fresh: bool,
    held: contextlib.ExitStack,
    images_given: MapDataset | None = None,
    held_out_given: MapDataset | None = None,
) -> TokenCache:
    run_folder, out, views = Path(config.tokenizer), Path(config.root) / config.name, config.views
    tokenizer_config = load_config(run_folder)
    data = tokenizer_config.data
    if config.source is not None:
        data = dataclasses.replace(data, source=config.source)
    given: dict[str, Images] = {}
    if images_given is not None:
        data, given = open_given(data, images_given, held_out_given)
    if views > 1 and data.augment == "none":
        raise UserError(
            f"views={views}: {run_folder} has data.augment=none, so all views are equal: set "
            "views=1"
        )
    maker = {
        "folder": os.path.relpath(run_folder.resolve(), out.resolve()),
        "weights_sha256": weights_hash(run_folder),
        "config_sha256": digest(to_dict(tokenizer_config)["model"]),
    }
    inventories = _inventories(data, given)
    plan = {
        "tokenizer": maker,
        "views": views,
        "data": {**to_dict(data), "source": None},  # where the images lie does not make them others
        "identity": {split: inventory.sha256 for split, inventory in inventories.items()},
        "images_per_shard": IMAGES_PER_SHARD,
    }
    precision = distributed.on_main(
        lambda: decide(config.precision, distributed.device(), setting="precision", title=str(out))
    )
    current = None if fresh else _current(out, plan, inventories, config.precision)
    if current is not None:
        distributed.on_main(lambda: _note_source(current, data.source))
        if distributed.is_main():
            print(f"{out}: up to date", flush=True)
        return current
    # All that may refuse the work comes before the first file of an earlier cache goes.
    tokenizer = load(run_folder)
    encoder = BatchEncoder(tokenizer, precision)
    opened = given or {split: open_split(data, split, augment=True) for split in SPLITS}
    counts = {split: len(images) for split, images in opened.items()}
    distributed.on_main(lambda: _check_room(out, counts, views, tokenizer.layout))
    checked: dict[str, Any] = {}  # of each split, how many codes fp32 would make others
    for split, images in opened.items() if precision != "fp32" else ():
        compare = functools.partial(compare_with_fp32, encoder, images.plain(), str(out))
        checked[split] = distributed.on_main(compare)
    plan_sha256 = digest(_in_precision(plan, precision))
    files = Folder(out, TOKENS)
    held.callback(files.release)
    distributed.on_main(lambda: _prepare(files, plan_sha256))

    workers = tokenizer_config.loop.workers if config.workers is None else config.workers
    splits: dict[str, Any] = {}
    for split, augmented in opened.items():
        sources = [augmented.plain(), augmented]
        augmented.announce()
        _note_shards(files, split, len(sources[0]))
        _encode_split(encoder, Views(*sources), split, out, views, workers)
        inventory = sources[0].inventory
        splits[split] = {
            "count": len(sources[0]),
            **sources[0].identity(),
            "listed": inventory.num_items,
        }
        names = sources[0].class_names
    after = {split: inventory.sha256 for split, inventory in _inventories(data, given).items()}
    if after != plan["identity"] or any(
        splits[split]["ids_sha256"] != after[split] for split in SPLITS
    ):
        distributed.on_main(
            lambda: files.remove([PLAN])
        )  # or those shards would be taken for the plan's
        raise UserError(
            f"{data.source} changed while it was encoded: run the same command again, which begins "
            "anew"
        )
    distributed.barrier()
    if distributed.is_main():
        for split in SPLITS:
            splits[split]["shards"] = _shards(out, split, splits[split]["count"])
        manifest = {
            "format": FORMAT,
            "identity": IDENTITY,
            "tokenizer": maker,
            "layout": {"grids": tokenizer.layout.grids, "num_codes": tokenizer.layout.num_codes},
            "dtype": code_dtype(tokenizer.layout).str,
            "views": views,
            "class_names": names,
            "data": to_dict(data),
            "plan_sha256": plan_sha256,
            "precision": precision,
            "splits": splits,
        }
        if checked:
            manifest["codes_unlike_fp32"] = checked
        replace_file(out / "manifest.json", json.dumps(manifest, indent=1).encode())
        files.remove([PLAN])
    distributed.barrier()
    return TokenCache.open(out)


def _inventories(data: DataConfig, given: Mapping[str, Images]) -> dict[str, Inventory]:
    """What each split is made of now; of data sets that were given, what it was when they were."""
    if given:
        return {split: images.inventory for split, images in given.items()}
    return take_inventories(data)


PLAN = "unfinished.json"


def _made(folder: Path) -> bool:
    """Whether a folder without a list of files holds a token cache, whole or not."""
    try:
        return json.loads((folder / "manifest.json").read_text())["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        return (folder / PLAN).is_file()


TOKENS = Kind(
    "token cache",
    (
        r"manifest\.json",
        re.escape(PLAN),
        rf"({'|'.join(SPLITS)})-[0-9]{{5,}}\.({'|'.join(ARRAYS)})\.npy",
    ),
    remedy="give it another name=",
    made=_made,
)


def _in_precision(plan: dict[str, Any], precision: str) -> dict[str, Any]:
    """The plan of codes in that precision. fp32 is not told: earlier versions knew no other."""
    return plan if precision == "fp32" else {**plan, "precision": precision}


def _current(
    out: Path, plan: dict[str, Any], inventories: Mapping[str, Inventory], asked: str
) -> TokenCache | None:
    """The finished cache of this plan, or None when there is none, its files are damaged or its
    images others.

    With the precision `asked` for; "auto" is content with any, so that codes are not made again
    because of another machine.
    """
    manifest = read_manifest(out)
    if manifest is None:
        return None
    made = precision_of(manifest)
    if asked not in ("auto", made):
        reason = f"{out}: its codes were made in {made}, not in {asked}"
    elif manifest["plan_sha256"] == digest(_in_precision(plan, made)):
        try:
            return TokenCache.open(out)
        except UserError as error:
            reason = f"warning: {error}"
    else:
        differences = (
            other_images(manifest, split, inventory) for split, inventory in inventories.items()
        )
        reason = next((f"{out}: {words}" for words in differences if words), "")
    if reason and distributed.is_main():
        print(f"{reason}: making it again", flush=True)
    return None


def _note_source(cache: TokenCache, source: str) -> None:
    """Say in the manifest where the images lie now, for those who ask it for them."""
    if cache.manifest["data"]["source"] != source:
        cache.manifest["data"]["source"] = source
        with Folder(cache.folder, TOKENS).taken():
            replace_file(
                cache.folder / "manifest.json", json.dumps(cache.manifest, indent=1).encode()
            )


def _check_room(out: Path, counts: Mapping[str, int], views: int, layout: CodeLayout) -> None:
    """Raise UserError where the codes do not fit the disk, or those of one shard the memory."""
    each = views * layout.length * code_dtype(layout).itemsize  # bytes of an image
    needed = each * sum(counts.values())
    existing = next(folder for folder in (out, *out.absolute().parents) if folder.is_dir())
    ours = (
        sum(path.stat().st_size for path in out.glob("*.npy")) if out.is_dir() else 0
    )  # which go, or count
    free = shutil.disk_usage(existing).free + ours
    if needed > free:
        raise UserError(
            f"{out}: views={views} makes {needed:,} bytes of codes, and {free:,} are free: lower "
            "views, or make room"
        )
    held = (
        2 * each * min(IMAGES_PER_SHARD, max(counts.values()))
    )  # as an array, and as the file that it becomes
    try:
        np.empty(held, np.uint8)
    except (MemoryError, ValueError):  # ValueError: beyond what can be addressed
        raise UserError(
            f"{out}: views={views} takes {held:,} bytes of memory: lower views"
        ) from None


def _prepare(files: Folder, plan: str) -> None:
    """Take the folder, where an unfinished cache of the same plan stays and all else that was
    written here goes."""
    files.take()
    unfinished = files.path / PLAN
    same = unfinished.is_file() and unfinished.read_bytes() == plan.encode()
    if not same or (files.path / "manifest.json").exists():
        if unfinished.is_file():
            print(
                f"{files.path}: what is there is of other images or settings: beginning anew",
                flush=True,
            )
        files.clear()
    files.note("manifest.json", PLAN)
    replace_file(unfinished, plan.encode())


def _note_shards(files: Folder, split: str, count: int) -> None:
    """List a split's files before any process writes one."""
    shards = range(-(-count // IMAGES_PER_SHARD))
    distributed.on_main(
        lambda: files.note(
            *(shard_file(split, shard, array) for shard in shards for array in ARRAYS)
        )
    )


class Views:
    """A split as data to read: view 0 is the plain image, the others are augmented."""

    def __init__(self, plain: Images, augmented: Images) -> None:
        self.plain, self.augmented, self.skipped = plain, augmented, plain.skipped

    def __len__(self) -> int:
        return len(self.plain)

    def gather(self, keys: list[Key]) -> dict[str, Tensor]:
        """(view, index) keys, all of one view, to what Images give."""
        return (self.augmented if keys[0][0] else self.plain).gather(keys)


def _encode_split(
    encode: BatchEncoder, images: Views, split: str, out: Path, views: int, workers: int
) -> None:
    """Shards are dealt to ranks in turn; finished ones are kept."""
    count, layout = len(images), encode.tokenizer.layout
    progress = Progress(f"{out} {split}", count)

    def files_of(shard: int) -> dict[str, Path]:
        return {array: out / shard_file(split, shard, array) for array in ARRAYS}

    def batches_of(shard: int) -> Iterator[range]:
        first, last = shard * IMAGES_PER_SHARD, min(count, (shard + 1) * IMAGES_PER_SHARD)
        return (range(start, min(start + BATCH, last)) for start in range(first, last, BATCH))

    shards = range(distributed.rank(), -(-count // IMAGES_PER_SHARD), distributed.world())
    missing = [
        shard for shard in shards if not all(path.exists() for path in files_of(shard).values())
    ]
    keys = (
        [(view, index) for index in places]
        for shard in missing
        for places in batches_of(shard)
        for view in range(views)
    )
    with contextlib.closing(read(images, keys, images.plain.readers(workers))) as batches:
        for shard in missing:
            size = min(count, (shard + 1) * IMAGES_PER_SHARD) - shard * IMAGES_PER_SHARD
            codes = np.empty((size, views, layout.length), code_dtype(layout))
            labels, ids = np.empty(size, "<i4"), np.empty(size, "<i8")
            for places in batches_of(shard):
                rows = slice(
                    places.start - shard * IMAGES_PER_SHARD, places.stop - shard * IMAGES_PER_SHARD
                )
                for view in range(views):
                    batch = next(batches)
                    made = encode(batch["images"])
                    if made.min() < 0:  # an unsigned type would hold it as a large code
                        raise UserError(
                            f"{out}: image number {batch['ids'][(made < 0).any(1).argmax()]} of "
                            f"{split} has features "
                            "that are not finite: look at it and at the tokenizer's log, mend "
                            "what is wrong and "
                            "encode again"
                        )
                    codes[rows, view] = made
                    if view == 0:
                        labels[rows], ids[rows] = batch["labels"], batch["ids"]
                if distributed.is_main():
                    progress.show(places.stop, f"{layout.length} codes each")
            for array, path in files_of(shard).items():
                buffer = io.BytesIO()
                np.save(buffer, {"codes": codes, "labels": labels, "ids": ids}[array])
                replace_file(path, buffer.getbuffer())
    if distributed.is_main():
        progress.finish(f"{count} images, {views} view{'s' * (views > 1)}")


def _shards(out: Path, split: str, count: int) -> list[dict[str, Any]]:
    shards = []
    for shard in range(-(-count // IMAGES_PER_SHARD)):
        names = [shard_file(split, shard, array) for array in ARRAYS]
        files = {
            name: {"bytes": (out / name).stat().st_size, "sha256": sha256(out / name)}
            for name in names
        }
        shards.append(
            {"count": min(IMAGES_PER_SHARD, count - shard * IMAGES_PER_SHARD), "files": files}
        )
    return shards


def encode_published(
    reference: str, overrides: list[str], kind: str | None = None, *, fresh: bool = False
) -> None:
    """Import a published tokenizer to its place in the root, and encode with it."""
    from tokenizer.published.imports import import_tokenizer

    raw = read_overrides(overrides)
    data = raw.pop("data", {})
    config = from_dict(TokensRun, raw, COMMAND_LINE)
    if config.source is not None:
        raise UserError(
            f"{COMMAND_LINE}: source={config.source}: say data.source={config.source}, it has no "
            "other"
        )
    if not isinstance(data, dict) or "source" not in data:
        raise UserError(
            f"{COMMAND_LINE}: data.source: which images are to be encoded with {reference}?"
        )
    import_tokenizer(reference, config.tokenizer, data, as_=kind)
    encode_data(config, fresh=fresh)


def main() -> None:
    if not any(word.startswith("published:") for word in sys.argv[1:2]):
        return config_command(
            "tokenizer.encode", "Encode a data set to tokens.", TokensRun, encode_data
        )
    parser = Parser(
        prog="python -m tokenizer.encode",
        description="Encode a data set with a published tokenizer.",
    )
    parser.add_argument("reference", help="published:NAME, or published:PATH of a file or a folder")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--as", dest="kind", metavar="KIND", help="of which kind the weights are")
    parser.add_argument(
        "--fresh", action="store_true", help="remove what the cache holds and start over"
    )
    arguments = parser.parse_intermixed_args()
    distributed.start()
    encode_published(
        arguments.reference, arguments.overrides, arguments.kind, fresh=arguments.fresh
    )
    distributed.finish()


if __name__ == "__main__":
    run_command(main)
