"""Samples drawn in shards, each written when it is finished: the same command goes on where one was
stopped, and memory does not grow with their number.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from generate.npz import IMAGES, LABELS, Column, Rows, write_arrays
from generate.shards import PLAN, SHARD, UNFINISHED, Shards, cut, shard_name, shard_size
from priors.interface import Prior, SampleOptions
from tokenizer.data.transforms import to_uint8
from tokenizer.interface import Tokenizer
from training import distributed
from training.atomic import LOCK
from training.config import to_dict
from training.errors import UserError
from training.folder import Folder, Kind
from training.log import Progress
from training.precision import autocast, decide

SINGLE = r"\d{6,}-.+\.png"  # a file of one sample


@dataclasses.dataclass(frozen=True)
class Request:
    """What decides every pixel, beside the weights. Sample i is of class classes[i %
    len(classes)]."""

    num: int
    classes: tuple[int, ...]  # the number of classes stands for none
    options: SampleOptions
    png: bool = False  # also write single files
    precision: str = "auto"  # of the networks' products; probabilities and draws are float64 in all

    def decided(self, title: str) -> Request:
        """With the precision that "auto" is here, of which rank 0 says what there is to say. Call
        it on every rank."""
        device, setting = distributed.device(), "--precision"
        precision = distributed.on_main(lambda: decide(self.precision, device, setting, title))
        return dataclasses.replace(self, precision=precision)

    def facts(self) -> dict[str, Any]:
        """For records. fp32 is not told: earlier versions knew no other."""
        return {
            name: value
            for name, value in to_dict(self).items()
            if (name, value) != ("precision", "fp32")
        }

    def labels(self) -> np.ndarray:
        """(num,) int64."""
        return np.resize(np.array(self.classes, np.int64), self.num)


@dataclasses.dataclass
class Samples:
    """All samples in order of their ids."""

    images: np.ndarray | Rows  # (num, H, W, 3) uint8
    labels: np.ndarray  # (num,) int64
    codes: np.ndarray | Rows  # (num, N) int64
    seconds_per_image: (
        float  # at the batch size used, without the first of several batches: it warms up
    )


@dataclasses.dataclass(frozen=True)
class Drawing:
    """How samples come about; sample i depends on all of this and on i alone."""

    prior: Prior
    decoder: Tokenizer
    request: Request
    known: Callable[[Tensor], Tensor] | None = (
        None  # ids (B,) -> their known codes (B, N), -1 where there is none
    )
    finish: Callable[[np.ndarray], None] | None = (
        None  # changes decoded images (n, H, W, 3) in place
    )

    def draw(self, numbers: Sequence[range], batch_size: int) -> Iterator[Drawn]:
        """The samples of these numbers, batch after batch.

        What is less than a batch is filled up with the ids that would come next and cut, so that
        every batch has the same shape, and so the same rounding.
        """
        device = distributed.device()
        precision = decide(self.request.precision, device)
        classes = torch.tensor(self.request.classes, device=device)
        for start, stop in ((first, each.stop) for each in numbers for first in each[::batch_size]):
            began = time.monotonic()
            ids = torch.arange(start, start + batch_size, device=device)
            known = self.known(ids) if self.known else None
            labels = classes[ids % len(classes)]
            with torch.no_grad(), autocast(precision, device):
                codes = self.prior.sample(labels, self.request.options, ids, known)
                decoded = self.decoder.decode(codes)
                if precision == "fp16":
                    self._check_range(codes, labels, decoded)
            images = to_uint8(decoded).permute(0, 2, 3, 1).cpu()
            wanted, images = min(batch_size, stop - start), images.contiguous().numpy()
            if self.finish:
                self.finish(images)
            codes = codes[:wanted].cpu().numpy()
            yield Drawn(start, images[:wanted], codes, time.monotonic() - began)

    def _check_range(self, codes: Tensor, labels: Tensor, images: Tensor) -> None:
        """Raise UserError where numbers are beyond fp16's 65,504, after which codes are drawn from
        nothing."""
        for what, values in (
            ("tokenizer", images),
            ("prior", self.prior.nll(codes[:1], labels[:1]).nats),
        ):
            if not values.isfinite().all():
                raise UserError(
                    f"--precision fp16: numbers of the {what} overflow it: take bf16 or fp32"
                )


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A batch."""

    first: int
    images: np.ndarray  # (n, H, W, 3) uint8
    codes: np.ndarray  # (n, N) int64
    seconds: float


@dataclasses.dataclass
class Clock:
    """Seconds and samples of a process: of all batches, and of all but its first, which warms
    up."""

    batch_size: int
    batches: int = 0
    times: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(4))

    def add(self, seconds: float) -> None:
        count = self.batch_size * distributed.world()  # while this process drew its own
        self.times += [seconds, count, *((seconds, count) if self.batches else (0.0, 0))]
        self.batches += 1

    def read(self) -> np.ndarray:
        """What was added since the last reading: (4,) float64, for `seconds_each`."""
        found, self.times = self.times, np.zeros(4)
        return found


def seconds_each(times: np.ndarray) -> float:
    """Seconds per sample, from the sums of all clocks."""
    seconds, count, warm, warm_count = times.tolist()
    return warm / warm_count if warm_count else seconds / count


def draw_samples(
    prior: Prior,
    decoder: Tokenizer,
    request: Request,
    batch_size: int,
    progress: Progress | None = None,
    **more: Any,
) -> Samples | None:
    """The request's samples in the memory of rank 0, of as many as fit; None on others. `more` as
    of `Drawing`.

    Each process draws its shards, which go to rank 0 one after another, by way of the hosts.
    """
    drawing, world, num = Drawing(prior, decoder, request, **more), distributed.world(), request.num
    pieces = cut([range(num)], shard_size(num, batch_size, world))
    clock, parts = Clock(batch_size), []
    for start in range(0, len(pieces), world):
        own = pieces[start : start + world][distributed.rank() :][:1]
        batches = list(drawing.draw(own, batch_size))
        for batch in batches:
            clock.add(batch.seconds)
        parts += itertools.chain(*distributed.gather_on_main(batches))
        if progress and distributed.is_main():
            progress.show(
                min(num, pieces[start].stop + (world - 1) * len(pieces[start])), "samples"
            )
    times = sum(distributed.gather_on_main(clock.read()))
    if not distributed.is_main():
        return None
    images, codes = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("images", "codes")
    )
    return Samples(images, request.labels(), codes, seconds_each(times))


@dataclasses.dataclass(frozen=True)
class Files:
    """What a command that draws samples writes to its folder."""

    arrays: str
    record: str  # the last: it says that the others are whole
    kind: Kind

    @staticmethod
    def of(what: str, *pictures: str) -> Files:
        arrays, record = f"{what}.npz", f"{what}.json"
        names = map(re.escape, (arrays, record, *pictures))
        made = (record, f"{UNFINISHED}/{PLAN}")
        kind = Kind(
            f"folder of {what}",
            (*names, SINGLE, SHARD),
            "choose another --out",
            made=lambda path: any((path / name).is_file() for name in made),
        )
        return Files(arrays, record, kind)


@contextlib.contextmanager
def drawn(
    drawing: Drawing,
    out: Path,
    files: Files,
    plan: dict[str, Any],
    batch_size: int,
    names: Sequence[str],
) -> Iterator[tuple[Path | None, Samples | None]]:
    """All samples of a request in an .npz file: drawn, or there from when the same `plan` was
    stopped.

    Gives rank 0 the folder in which that file is, for other files of these names, and the samples,
    which are read when they are asked for; the others None. As the block ends, these files take the
    place of what commands had written to `out`, and of the shards. Raises UserError, before the
    work, where `out` holds something else.
    """
    num, world, folder, shards = (
        drawing.request.num,
        distributed.world(),
        Folder(out, files.kind),
        Shards(out),
    )
    with contextlib.ExitStack() as stack:
        stack.enter_context(leaving_nothing(out))

        def take() -> list[range]:
            stack.enter_context(folder.taken())
            shards.begin(folder, plan)
            pieces = cut(shards.missing(num), shard_size(num, batch_size, world))
            folder.note(files.arrays, files.record, *names, *map(shard_name, pieces))
            return pieces

        if distributed.on_main(lambda: shards.of_others(plan)):
            # What cannot be drawn, such as by an unknown sampler, fails before the shards of others
            # are gone.
            next(drawing.draw([range(1)], batch_size))
        pieces = distributed.on_main(take)
        draw_shards(drawing, shards, pieces, batch_size, str(out))
        distributed.barrier()
        if not distributed.is_main():
            yield None, None
            return
        staged = stack.enter_context(folder.replacing(files.record))
        write_arrays(staged / files.arrays, columns(shards, drawing.request))
        images, codes = (Rows(staged / files.arrays, name) for name in (IMAGES, "codes"))
        yield (
            staged,
            Samples(images, drawing.request.labels(), codes, seconds_each(shards.total("times"))),
        )


@contextlib.contextmanager
def leaving_nothing(out: Path) -> Iterator[None]:
    """Let a folder that was not there go again when the block fails before it holds any sample."""
    existed = out.exists()
    try:
        yield
    except BaseException:
        unfinished = out / UNFINISHED
        if (
            not existed
            and distributed.is_main()
            and out.is_dir()
            and not any(unfinished.glob("*.npz"))
        ):
            (unfinished / PLAN).unlink(missing_ok=True)
            (out / LOCK).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # what someone put there meanwhile stays
                unfinished.rmdir()
                out.rmdir()
        raise


def draw_shards(
    drawing: Drawing, shards: Shards, pieces: list[range], batch_size: int, title: str
) -> None:
    """Draw what is missing, which is dealt to the processes in turn."""
    num, rank, world = drawing.request.num, distributed.rank(), distributed.world()
    progress, clock, kept = Progress(title, num), Clock(batch_size), []
    done = num - sum(map(len, pieces))
    if done and distributed.is_main():
        print(f"{title}: {done} of {num} samples were drawn before", flush=True)
    own = pieces[rank::world]
    ends = {piece.stop for piece in own}
    for batch in drawing.draw(own, batch_size):
        kept.append(batch)
        clock.add(batch.seconds)
        done += len(batch.images) * world
        if batch.first + len(batch.images) in ends:
            images, codes = (
                np.concatenate([getattr(each, name) for each in kept])
                for name in ("images", "codes")
            )
            shards.write(kept[0].first, images, codes, clock.read())
            kept = []
        if distributed.is_main():
            progress.show(min(done, num), "samples")


def columns(shards: Shards, request: Request) -> dict[str, Column]:
    """arr_0 and arr_1, as the ADM evaluator reads, and `codes`."""
    num = request.num

    def column(name: str) -> Column:
        first = next(shards.parts(name, num))
        return Column((num, *first.shape[1:]), first.dtype, shards.parts(name, num))

    labels = request.labels()
    return {
        IMAGES: column("images"),
        LABELS: Column(labels.shape, labels.dtype, [labels]),
        "codes": column("codes"),
    }
