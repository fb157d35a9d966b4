"""Published priors as run folders of this project, with the tokenizer whose codes they are of, and
back under their authors' names."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from priors import load as load_prior
from priors.interface import SampleOptions
from priors.published.load import Model, from_pretrained
from priors.published.table import PEERS
from priors.record import NO_TOKENIZER, PriorRecord
from priors.run import PriorRun
from tokenizer.interface import CodeLayout
from tokenizer.published.files import FIRST_STAGE, SUFFIXES, open_weights
from tokenizer.published.imports import another_model, import_tokenizer
from tokenizer.published.load import PREFIX, Source, save_published
from tokenizer.published.table import published_files
from tokenizer.run import load as load_tokenizer
from training import distributed
from training.checkpoint import Run, load_weights, sha256, weights_hash
from training.config import load as load_config
from training.config import to_dict
from training.errors import UserError


def import_prior(
    reference: str | Path, out: str | Path, tokenizer: str | Path | None = None, **options: Any
) -> Path:
    """Write a published prior as a run folder, which `priors.load` and every command take; return
    it.

    Its tokenizer is the run folder `tokenizer`; without one the published tokenizer that belongs to
    it, imported beside `out` where it is at hand. `options` are from_pretrained's. Raises UserError
    for what cannot be loaded, where codes do not fit, or where `out` holds something else.
    """
    out = Path(out)

    def write() -> None:
        prior = from_pretrained(reference, **options)
        source, model = prior.published, prior.config
        layout, folder = prior.layout, None
        if tokenizer is not None:
            layout, folder = fitting(Path(tokenizer), prior), Path(tokenizer)
        elif (found := tokenizer_of(str(reference), source, model)) is not None:
            layout, folder = beside(out, found, prior)
        config = PriorRun(
            name=out.name,
            root=str(out.parent),
            tokens=str(out.parent / "tokens"),
            prior=model.prior,
            sampling=model.sampling,
        )
        run = Run.open(out, config, inputs={"published": sha256(source.path)})
        try:
            run.publish(prior.state_dict(), 0)
            run.files.note("weights/prior.json")
            record_of(prior, layout, folder, out).write(out)
        finally:
            run.files.release()
        print(f"{out}: {source.peer.title}: it samples as its authors do: {told(model.sampling)}")
        if folder is None:
            print(f"{out}: {NO_TOKENIZER} to sample images", flush=True)

    distributed.on_main(write)
    return out


def told(sampling: SampleOptions) -> str:
    """What is not plain."""
    plain, found = dataclasses.asdict(SampleOptions()), {}
    for name, value in dataclasses.asdict(sampling).items():
        powered = name == "guidance_power" and sampling.guidance_schedule == "power_cosine"
        if value != plain[name] or powered:
            found[name] = value
    return ", ".join(f"{name.replace('_', '-')} {v}" for name, v in found.items()) or "plainly"


def record_of(
    prior: nn.Module, layout: CodeLayout, tokenizer: Path | None, out: Path
) -> PriorRecord:
    digits = len(str(prior.num_classes - 1))
    return PriorRecord(
        layout=layout,
        class_names=[f"{number:0{digits}}" for number in range(prior.num_classes)],
        tokens="",
        tokens_sha256="",
        tokenizer="" if tokenizer is None else os.path.relpath(tokenizer.resolve(), out.resolve()),
        tokenizer_sha256="" if tokenizer is None else weights_hash(tokenizer),
        sampling=prior.config.sampling,
    )


def tokenizer_of(reference: str, source: Source, model: Model) -> tuple[str, dict[str, Any]] | None:
    """What the published tokenizer of a prior loads from, and the options for it, where it is at
    hand."""
    others = open_weights(source.path, stage="second").rest
    if any(name.startswith(FIRST_STAGE) for name in others):  # one checkpoint holds both
        config = model.hyper.find("first_stage_config")
        return str(source.path), {"config": config} if config else {}
    known = source.peer.file_of(reference.removeprefix(PREFIX)) or source.peer.file_of(
        source.path.name
    )
    if known is None or known.tokenizer not in published_files():
        return None
    return PREFIX + known.tokenizer, {}


def beside(
    out: Path, tokenizer: tuple[str, dict[str, Any]], prior: nn.Module
) -> tuple[CodeLayout, Path | None]:
    """The layout and folder of a published tokenizer that is imported beside a prior's run; None
    where it is not at hand, which is said."""
    reference, options = tokenizer
    name = reference.removeprefix(PREFIX) if reference.startswith(PREFIX) else "tokenizer"
    folder = out.parent / name
    try:
        import_tokenizer(reference, folder, **options)
        found = load_tokenizer(folder)
        factor = found.config.data.image_size / found.layout.grids[0][0]
        size = round(factor * prior.layout.grids[0][0])
        if size != found.config.data.image_size and len(prior.layout.grids[0]) == 2:
            import_tokenizer(reference, folder, {"image_size": size}, **options)
    except UserError as error:
        print(f"{reference}: {error}")
        return prior.layout, None
    return fitting(folder, prior), folder


def fitting(folder: Path, prior: nn.Module) -> CodeLayout:
    """The layout of a tokenizer's codes. Raises UserError where they are not the prior's."""
    layout = load_tokenizer(folder).layout
    if (layout.length, layout.num_codes) != (prior.layout.length, prior.layout.num_codes):
        raise UserError(
            f"{folder}: its codes are {layout.text}, and the prior is of {prior.layout.text}: "
            "give the tokenizer that it was trained with, for images of that size"
        )
    return layout


def export_prior(folder: str | Path, like: str | Path, out: str | Path, **options: Any) -> Path:
    """Write a prior of ours, trained on from a published file `like`, under that file's names;
    return its path.

    Raises UserError where the two are not of one architecture, or compute different things.
    """
    prior = from_pretrained(like, **options)
    weights, own = load_weights(Path(folder)), prior.state_dict()
    for name in sorted(own.keys() | weights.keys()):
        if name not in weights or name not in own or weights[name].shape != own[name].shape:
            raise UserError(
                f"{folder}: its {name} is not that of {like}: export what was trained on from it"
            )
    prior.load_state_dict(weights)
    check_same(folder, prior)
    return save_published(prior, out)


@torch.no_grad()
def check_same(folder: str | Path, theirs: nn.Module) -> None:
    """Raise UserError, with the settings, unless a run's prior computes what another one of the
    same tensors does. Shapes do not tell it: 4 heads and 8 have the same tensors."""
    ours, generator = load_prior(folder), torch.Generator().manual_seed(0)
    spans = ours.layout.spans()
    parts = [
        torch.randint(count, (2, span.stop - span.start), generator=generator)
        for span, count in spans
    ]
    device, labels = distributed.device(), torch.arange(2) % ours.num_classes
    codes, labels = torch.cat(parts, 1).to(device), labels.to(device)
    nats = [prior.nll(codes, labels).nats for prior in (ours, theirs.to(device))]
    if not torch.allclose(*nats, rtol=1e-4):
        settings = load_config(PriorRun, Path(folder) / "config.yaml", alone=True).prior
        raise another_model(
            Path(folder),
            "prior",
            to_dict(settings),
            to_dict(theirs.config.prior),
            lambda name: True,
        )


def is_published(path: Path) -> bool:
    """Whether it is a published prior, not a run folder: published:NAME, a file of weights, or a
    folder of one."""
    if str(path).startswith(PREFIX):
        return True
    if path.is_file():
        return path.suffix in SUFFIXES
    if not path.is_dir() or (path / "config.yaml").exists() or (path / "weights").exists():
        return False
    return any(each.suffix in SUFFIXES for each in path.iterdir())


def folder_of(reference: str, root: str | Path = "runs") -> Path:
    """A published prior's run folder, ROOT/NAME/prior, imported with its tokenizer."""
    name = reference.removeprefix(PREFIX).rstrip("/")
    known = name in published_files(PEERS) and not Path(name).exists()
    return import_prior(reference, Path(root) / (name if known else Path(name).stem) / "prior")
