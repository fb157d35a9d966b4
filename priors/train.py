"""Train a prior on a token cache: python -m priors.train CONFIG.yaml [section.key=value ...]
[--fresh | --dry-run]

Running the same command again resumes. Under torchrun the same command uses every process.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from priors.decoding import engine
from priors.dry_run import dry_run
from priors.families.diffusion import antithetic
from priors.given_tokens import GivenTokens
from priors.interface import Prior, SampleOptions
from priors.record import PriorRecord
from priors.run import PriorRun
from priors.starting import begin_with
from tokenizer.interface import CodeLayout
from training import distributed, randomness
from training.checkpoint import Run, weights_hash
from training.command import UserError, config_command, run_command
from training.loop import Batch, Loss, Phase, train

LOSS_STREAM = 0x5052494F52  # sets the loss's draws apart from all others of a step
PLAIN = 0  # the view that is no augmented one
MEASURED = 256  # held-out sequences in the log's figure
MOST_CODES = 1 << 24  # of a level
PREVIEW_ROWS, PREVIEW_COLUMNS = 10, 8


def train_prior(
    config: PriorRun,
    *,
    fresh: bool = False,
    tokens: Any = None,
    held_out: Any = None,
    layout: CodeLayout | None = None,
) -> nn.Module:
    """Train to the end, resuming; returns the averaged prior. Raises UserError when the tokens
    changed.

    `tokens` and `held_out` are map-style data sets of codes (N,), or (codes, label), in place of
    the cache `config.tokens`; `layout` says what the N positions mean. Without `held_out` a fifth
    is held out; there is no tokenizer, so there are no previews.
    """
    from tokenizer.data.loader import feed

    cache: Any
    if tokens is None:
        cache = _open_cache(config.tokens)
    else:
        cache = GivenTokens(tokens, held_out, layout)
        config = dataclasses.replace(config, tokens=cache.name)
    torch.manual_seed(randomness.mix(config.seed))
    # Before the folder is taken: what cannot be built must not cost the run that --fresh is to
    # replace.
    most = max(cache.layout.num_codes)
    if most > MOST_CODES:
        raise UserError(
            f"{cache.folder}: {most:,} codes: a prior here has a logit for each, {MOST_CODES:,} at most: take tokens "
            "of a tokenizer with fewer codes"
        )
    prior = config.prior.build(cache.layout, cache.num_classes)
    inputs = {"tokens": cache.sha256}
    if config.start_from is not None:
        inputs["start_from"] = weights_hash(Path(config.start_from))
        begin_with(prior, Path(config.start_from))
    sequences = TokenSequences(cache.split("train"), config.seed)
    batches = feed(
        sequences, config.loop.batch_size, config.seed, config.loop.accumulate, config.loop.workers
    )
    run = Run.open(Path(config.root) / config.name, config, fresh=fresh, inputs=inputs)
    record = _keep_record(run, cache, Path(config.tokens), config.sampling)

    def loss(batch: Batch, step: int) -> Loss:
        shape = (cache.layout.length + 2,)
        uniform = randomness.draw(
            (config.seed, step, LOSS_STREAM), batch.positions, shape, torch.float64
        )
        uniform = antithetic(uniform, batch.positions, config.loop.batch_size)
        return prior.loss(batch["codes"], batch["labels"], uniform)

    return train(
        config.loop,
        run,
        [Phase("prior", prior, loss, config.optimizer, after_step=getattr(prior, "update", None))],
        batches,
        seed=config.seed,
        published=prior,
        preview=None if tokens is not None else Preview(record, run.folder),
        measure=Measure(cache.split("held_out")),
    )


def _open_cache(folder: str) -> Any:
    """A whole token cache, of the tokenizer that is still there."""
    from tokenizer.cache import TokenCache

    cache = TokenCache.open(folder)
    cache.check_tokenizer()
    if distributed.is_main():
        cache.verify()
    return cache


class TokenSequences:
    """Code sequences of a cache's split. Of an image's augmented views, (seed, epoch, index)
    chooses one."""

    def __init__(self, split: Any, seed: int) -> None:
        self.codes, self.labels, self.seed = split.codes, torch.as_tensor(split.labels), seed

    def __len__(self) -> int:
        return len(self.codes)

    def gather(self, keys: list[tuple[int, int]]) -> dict[str, Tensor]:
        """(epoch, index) of each item -> codes (B, N) and labels (B,), both int64."""
        num_views = self.codes.shape[1]
        views = [randomness.mix(self.seed, epoch, index) % num_views for epoch, index in keys]
        indices = [index for _, index in keys]
        codes = np.asarray(self.codes[indices, views]).astype(np.int64)
        return {"codes": torch.from_numpy(codes), "labels": self.labels[indices]}


class Measure:
    """Held-out negative log-likelihood per token, over plain images spread evenly through the
    split: where those are all, the figure that `python -m eval.run likelihood` gives.
    """

    def __init__(self, split: Any) -> None:
        indices = np.unique(np.linspace(0, len(split.codes) - 1, MEASURED).astype(int))
        self.codes = torch.from_numpy(np.asarray(split.codes[indices, PLAIN]).astype(np.int64))
        self.labels = torch.as_tensor(split.labels)[indices]

    def __call__(self, prior: Prior) -> dict[str, float]:
        parts = zip(self.codes.split(64), self.labels.split(64))
        device = distributed.device()
        likelihoods = [prior.nll(codes.to(device), labels.to(device)) for codes, labels in parts]
        nats = torch.cat([likelihood.nats for likelihood in likelihoods])
        name = {"exact": "nats_per_token", "bound": "nats_per_token_bound"}.get(likelihoods[0].kind)
        if name is None:
            return {}
        return {name: float(nats.mean()) / prior.layout.length}


class Preview:
    """A grid of samples, one class per row."""

    def __init__(self, record: PriorRecord, run_folder: Path) -> None:
        self.rows = min(record.num_classes, PREVIEW_ROWS)
        self.tokenizer_folder = record.tokenizer_folder(run_folder)
        self.sampling = record.sampling
        self.tokenizer: Any = None

    def __call__(self, prior: nn.Module, path: Path, step: int) -> None:
        import tokenizer
        from tokenizer.data.grid import image_grid
        from tokenizer.data.transforms import to_pixels

        if self.tokenizer is None:
            self.tokenizer = tokenizer.load(self.tokenizer_folder)
        ids = torch.arange(self.rows * PREVIEW_COLUMNS, device=distributed.device())
        codes = prior.sample(ids // PREVIEW_COLUMNS, self.sampling, ids)
        engine.forget(prior)  # training has the memory
        images = to_pixels(self.tokenizer.decode(codes))
        image_grid(images, PREVIEW_COLUMNS).save(path)


def _keep_record(run: Run, cache: Any, tokens: Path, sampling: SampleOptions) -> PriorRecord:
    """Write weights/prior.json."""
    folder, places = run.folder, {"tokens": "", "tokenizer": "", "tokenizer_sha256": ""}
    if not isinstance(cache, GivenTokens):
        made_by = Path(cache.tokenizer_folder)
        places["tokens"] = os.path.relpath(tokens.resolve(), folder.resolve())
        places["tokenizer"] = os.path.relpath(made_by.resolve(), folder.resolve())
        places["tokenizer_sha256"] = weights_hash(made_by)
    record = PriorRecord(
        layout=cache.layout,
        class_names=list(cache.class_names),
        tokens_sha256=cache.sha256,
        sampling=sampling,
        **places,
    )
    if distributed.is_main():
        run.files.note("weights/prior.json")
        record.write(folder)
    distributed.barrier()
    return record


def main() -> None:
    config_command(
        "priors.train", "Train a prior on a token cache.", PriorRun, train_prior, dry_run
    )


if __name__ == "__main__":
    run_command(main)
