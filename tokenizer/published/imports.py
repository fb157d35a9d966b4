"""Published tokenizers as folders of this project, which every command takes, and back under their
authors' names."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tokenizer.data.dataset import DataConfig
from tokenizer.published.load import (
    PREFIX,
    from_pretrained,
    home,
    hyperparameters,
    locate,
    save_published,
)
from tokenizer.published.peer import Peer
from tokenizer.published.table import published_files
from tokenizer.run import TokenizerRun, load, load_autoencoder_weights, load_config
from tokenizer.sharing import save_autoencoder
from training import distributed
from training.config import flat, from_dict, to_dict
from training.errors import UserError


def import_tokenizer(
    reference: str | Path, out: str | Path, data: dict[str, Any] | None = None, **options: Any
) -> Path:
    """Write a published tokenizer as a folder that `tokenizer.load` and every command take; return
    it.

    `data` are settings of the images that it is for (DataConfig), its size its own without
    `image_size`; `options` are from_pretrained's. Raises UserError for what cannot be loaded, or
    where `out` holds something else.
    """
    data = dict(data or {})
    size = data.pop("image_size", None)
    out = Path(out)

    def write() -> None:
        model = from_pretrained(
            reference, image_size=None if size is None else int(size), **options
        )
        save_autoencoder(
            model, run_of(model, data), out, about(model.published.peer, model.published.path)
        )

    distributed.on_main(write)
    return out


def run_of(model: nn.Module, data: dict[str, Any]) -> TokenizerRun:
    """The configuration of a loaded tokenizer, for these images."""
    if model.config is None:
        raise UserError(
            f"{model.published.path}: {model.published.peer.kind} has no codes, so it is no "
            "tokenizer"
        )
    size = model.config.data.image_size
    images = from_dict(DataConfig, {**to_dict(DataConfig(image_size=size)), **data}, "data")
    return dataclasses.replace(model.config, data=images)


def export_tokenizer(folder: str | Path, like: str | Path, out: str | Path, **options: Any) -> Path:
    """Write a tokenizer of ours, trained on from a published file `like` or of that architecture
    from the start, under that file's names; return its path. The configuration of `like`, where it
    has one, is written beside it (`out` with .json for its suffix), so that `out` loads alone.

    Raises UserError where the two are not of one architecture, or compute different things.
    """
    model = from_pretrained(like, **options)
    load_autoencoder_weights(model, Path(folder))
    check_same(load(folder), model, Path(folder))
    told = configuration(like, **options)
    out = save_published(model, out)
    if told:
        out.with_suffix(".json").write_text(json.dumps(told, indent=1) + "\n")
    return out


def configuration(
    like: str | Path, as_: str | None = None, config: str | Path | None = None
) -> dict[str, Any]:
    """What is known of a published file beside its weights, by its authors' names."""
    path, told, _ = locate(like)
    return hyperparameters(path, config, told).values


@torch.no_grad()
def check_same(ours: nn.Module, theirs: nn.Module, folder: Path) -> None:
    """Raise UserError, with the settings, unless two models of the same tensors compute the same.

    Shapes do not tell it: group norms of 8 and of 32 groups have the same tensors.
    """
    size = ours.config.data.image_size
    noise = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    images = noise.to(distributed.device())
    codes = ours.encode(images)
    layout = ours.layout_of(size, size)
    same = torch.equal(codes, theirs.encode(images)) and torch.allclose(
        ours.decode(codes, layout), theirs.decode(codes, layout), atol=1e-4
    )
    if same:
        return
    settings = (to_dict(each.config.model) for each in (ours, theirs))
    telling = lambda name: name in SEARCH or not name.startswith("quantizer")  # noqa: E731
    raise another_model(folder, "model", *settings, telling)


def another_model(
    folder: Path,
    section: str,
    ours: dict[str, Any],
    theirs: dict[str, Any],
    telling: Callable[[str], bool],
) -> UserError:
    """Of two models of the same tensors that compute different things, by the settings of
    `section` in which they differ; `telling` says of which ones that may be."""
    one, other = flat(ours), flat(theirs)
    differing = [
        f"{name}={one.get(name)} ({other.get(name)} there)"
        for name in sorted(one.keys() | other.keys())
        if one.get(name) != other.get(name) and telling(name)
    ]
    return UserError(
        f"{folder}: under these names it would be another model, with the same tensors: train with "
        f"{section}.{f', {section}.'.join(differing) or '* as there'}"
    )


# What settings of a quantizer change of the model that it is in; the others are of training.
SEARCH = ("quantizer.kind", "quantizer.metric")


def at_hand() -> dict[str, str]:
    """Published tokenizers that need no network, name -> reference: put there by hand, or
    downloaded before."""
    from huggingface_hub import try_to_load_from_cache

    place = home()
    folders = sorted(each for each in place.iterdir() if each.is_dir()) if place.is_dir() else []
    found = {folder.name: str(folder) for folder in folders}
    for name, (_, file) in published_files().items():
        if (place / name / Path(file.file).name).is_file():
            found[name] = PREFIX + name  # with the hyperparameters that are known of it
    for name, (peer, file) in published_files().items():
        if name in found or peer.build is not None or not file.on_hub:
            continue
        if isinstance(try_to_load_from_cache(file.where, file.file), str):
            found[name] = PREFIX + name
    return found


def import_all(root: str | Path, data: dict[str, Any]) -> list[Path]:
    """Import all that is at hand to folders under `root`, all for images of one size.

    Without `image_size` in `data` it is the size that most of them are of, the larger of two.
    Raises UserError where nothing is at hand, or one cannot be of that size.
    """
    found = at_hand()
    if not found:
        raise UserError(
            f"no published tokenizer is at hand: put files at {home()}/NAME/, with the names of "
            "docs/published.md, or "
            "load one from the Hub"
        )
    folders = {
        import_tokenizer(reference, Path(root) / name, data): reference
        for name, reference in found.items()
    }
    sizes = [load_config(folder).data.image_size for folder in folders]
    common = max(sizes, key=lambda size: (sizes.count(size), size))
    for (folder, reference), size in zip(folders.items(), sizes):
        if size != common:
            print(f"{folder}: of {size} px, used at {common} px, as most are", flush=True)
            import_tokenizer(reference, folder, {**data, "image_size": common})
    return list(folders)


def folder_of(reference: str, data: str | None, root: str | Path = "runs") -> Path:
    """A published tokenizer's folder under `root`, imported for these images; without any, as it
    was imported before."""
    name = reference.removeprefix(PREFIX).rstrip("/")
    known = "/" not in name and not Path(name).exists()
    folder = Path(root) / (name if known else Path(name).stem)
    if data is not None:
        return import_tokenizer(reference, folder, {"source": data})
    if not (folder / "config.yaml").is_file():
        raise UserError(
            f"{reference}: of which images? name them with --data (a folder, parquet, "
            f"hub:owner/name, ...); later commands find them in {folder}"
        )
    return folder


def about(peer: Peer, path: Path) -> list[str]:
    """What a card says of an imported tokenizer."""
    lines = [
        f"{peer.title}, from {path.name}: its weights and architecture, as its authors published "
        "them.",
        "",
    ]
    lines += [f"- {quirk}" for quirk in peer.quirks]
    return [*lines, "", "## Licence", "", f"Of its authors: {peer.licence}."]
