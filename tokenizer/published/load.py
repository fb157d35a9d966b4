"""Published tokenizers as ours: found, recognised, built and filled; and written again under either
names.

Every tensor of a file has a place, or is named: nothing is skipped in silence.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenizer.data.dataset import DataConfig
from tokenizer.published.files import (
    Hyperparameters,
    Weights,
    find_config,
    find_weights,
    open_weights,
    read_config,
)
from tokenizer.published.peer import Peer, Place, Shapes
from tokenizer.published.table import PEERS, peer_of, published_files
from tokenizer.run import TokenizerRun
from training import distributed
from training.errors import UserError

PREFIX = "published:"
# What configurations call the number of codes.
COUNTS = ("n_embed", "num_vq_embeddings", "codebook_size", "num_embeddings", "vocab_size", "n_e")


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a loaded tokenizer comes from."""

    peer: Peer
    path: Path
    places: dict[str, Place]  # ours -> the name in the file
    stage: str = "first"  # of a checkpoint of a tokenizer and of a model on its codes


def from_pretrained(
    name_or_path: str | Path,
    file: str | None = None,
    revision: str | None = None,
    as_: str | None = None,
    config: str | Path | dict[str, Any] | None = None,
    *,
    image_size: int | None = None,
    averaged: bool = True,
) -> nn.Module:
    """A published tokenizer in evaluation mode, as `tokenizer.load` gives one of ours; `.published`
    is its Source.

    name_or_path  published:NAME or NAME of docs/published.md, a file, a folder, or a repository of
                  the Hub
    file          of a folder or a repository, where it has several
    as_           the kind, where it is not to be recognised
    config        the authors' configuration (JSON, YAML, or what such a file holds), where it is
                  not beside the file
    image_size    pixels per side that `layout` is to be of, where not those that it was trained
                  on; of convolutional networks any that divides into whole codes
    averaged      False: where a file has weights twice, not their averages

    Raises UserError for what is not there, damaged, of no known kind, or not whole.
    """
    path, told, kind = locate(name_or_path, file, revision)
    weights = open_weights(path, averaged=averaged)
    hyper = hyperparameters(path, config, told)
    peer = peer_of(weights, hyper, as_ or kind)
    return load_weights(peer, weights, hyper, image_size)


def hyperparameters(
    weights: Path,
    config: str | Path | dict[str, Any] | None = None,
    told: dict[str, Any] | None = None,
) -> Hyperparameters:
    """What is given, else what lies beside a file of weights, else what is known of it."""
    if isinstance(config, dict):
        return Hyperparameters(config, weights)
    path = Path(config) if config is not None else find_config(weights)
    return Hyperparameters(read_config(path), path) if path else Hyperparameters(told, weights)


def load_weights(
    peer: Peer, weights: Weights, hyper: Hyperparameters, image_size: int | None = None
) -> nn.Module:
    """A file of a known kind as one of our modules. Raises UserError, naming tensors, where it is
    not one."""
    return filled(
        peer, weights, hyper, lambda: _built(peer, weights.shapes, hyper, image_size)
    ).requires_grad_(False)


def filled(
    peer: Any,
    weights: Weights,
    hyper: Hyperparameters,
    build: Callable[[], tuple[nn.Module, dict[str, Place], Any]],
) -> nn.Module:
    """The module that `build` makes with a place in the file for each of its tensors, in evaluation
    mode with these weights; `.config` is what `build` gives with it, `.published` its Source.

    Raises UserError, naming tensors, where the file is of another kind or not whole.
    """
    try:
        model, places, run = build()
    except KeyError as error:
        raise UserError(
            f"{weights.path}: it has no {error.args[0]}, which every {peer.kind} has"
        ) from None
    except UserError:
        raise
    except (ValueError, IndexError, ZeroDivisionError, RuntimeError) as error:
        raise UserError(
            f"{weights.path}: it is no {peer.kind} that can be built: {error}"
        ) from None
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    model.load_state_dict(read_state(peer, weights, places, shapes), strict=False)
    found = {
        ours: dataclasses.replace(place, name=weights.origins[place.name])
        for ours, place in places.items()
    }
    model.config, model.published = run, Source(peer, weights.path, found, weights.stage)
    return model.to(distributed.device()).eval()


def _built(
    peer: Peer, shapes: Shapes, hyper: Hyperparameters, image_size: int | None
) -> tuple[nn.Module, dict[str, Place], TokenizerRun | None]:
    """A module with random weights, where the file keeps each of its tensors, and the configuration
    of its run."""
    if peer.build is not None:
        model, names = peer.build(shapes, hyper)
        return model, {ours: Place(theirs) for ours, theirs in names.items()}, None
    architecture = peer.architecture(shapes, hyper)
    data = DataConfig(image_size=image_size or architecture.image_size)
    model = architecture.model.build(data.image_size, weights=False)
    told = next((hyper.number(key) for key in COUNTS if hyper.find(key) is not None), None)
    if told not in (None, *model.layout.num_codes):
        found = model.layout.num_codes[0]
        raise UserError(
            f"{hyper.path}: it is of {told:,} codes, and the weights have {found:,}: give their own"
        )
    return (
        model,
        dict(architecture.places(model)),
        TokenizerRun(name=peer.kind, model=architecture.model, data=data),
    )


def read_state(
    peer: Peer, weights: Weights, places: dict[str, Place], shapes: dict[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """Our tensors from a file's, in float32. Raises UserError for any that is missing, mis-shaped
    or left over."""
    wanted = {place.name for place in places.values()}
    missing = wanted - weights.tensors.keys()
    if missing:
        raise UserError(
            f"{weights.path}: as {peer.kind} it lacks {_listed(missing)}: is it whole, and of this "
            "kind?"
        )
    tied = {name: of for name, of in _tied(peer).items() if {name, of} <= weights.tensors.keys()}
    left = weights.tensors.keys() - wanted - tied.keys()
    unexpected = [name for name in left if not peer.ignores(name)]
    if unexpected:
        raise UserError(
            f"{weights.path}: as {peer.kind} it has no place for {_listed(unexpected)}: is it of "
            "this kind, and is the "
            "configuration its own?"
        )
    state = {}
    for ours, place in places.items():
        stored = weights.tensors[place.name]
        if not stored.dtype.is_floating_point:
            raise UserError(
                f"{weights.path}: {place.name} is {stored.dtype}, where numbers with a point are "
                "expected"
            )
        try:
            state[ours] = place.to_ours(weights.read(place.name), shapes[ours]).float().contiguous()
        except UserError:
            raise
        except (ValueError, RuntimeError):
            expected = tuple(reversed(shapes[ours])) if place.transposed else shapes[ours]
            raise UserError(
                f"{weights.path}: {place.name} is {tuple(stored.shape)}, and {expected} is "
                f"expected of this {peer.kind}"
            ) from None
    for name, of in tied.items():
        if not torch.equal(weights.read(name), weights.read(of)):
            raise UserError(
                f"{weights.path}: {name} and {of} are one tensor in every {peer.kind}, and differ "
                "here: download it again"
            )
    return state


def _tied(peer: Any) -> Mapping[str, str]:
    """Tensors that a file holds twice: name -> the name under which it is loaded."""
    return getattr(peer, "tied", {})


def published_state(model: nn.Module) -> dict[str, Tensor]:
    """A loaded model's tensors under the names, and in the shapes and types, of the file that it
    came from."""
    source: Source = model.published
    weights = open_weights(source.path, averaged=True, stage=source.stage)
    raw = open_weights(source.path, averaged=False, stage=source.stage)
    stored = {w.origins[name]: tensor for w in (raw, weights) for name, tensor in w.tensors.items()}
    ours = model.state_dict()
    found = {name: tensor.read() for name, tensor in (weights.rest | raw.rest | stored).items()}
    for name, place in source.places.items():
        like = stored[place.name]
        found[place.name] = (
            place.to_theirs(ours[name].cpu(), tuple(like.shape)).to(like.dtype).contiguous()
        )
    for name, of in _tied(source.peer).items():
        if {name, of} <= weights.origins.keys():
            found[weights.origins[name]] = found[weights.origins[of]].clone()
    return found


def save_published(model: nn.Module, out: str | Path) -> Path:
    """Write a loaded model, trained on or not, as a safetensors file under its authors' names;
    return its path.

    What the file that it came from holds beside the model is written, too, as it is.
    """
    from safetensors.torch import save_file

    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file(published_state(model), out)
    return out


def locate(
    name_or_path: str | Path,
    file: str | None = None,
    revision: str | None = None,
    peers: Mapping[str, Any] = PEERS,
) -> tuple[Path, dict[str, Any] | None, str | None]:
    """The local file of weights; with it, of a known name, hyperparameters that no file says and
    its kind.

    Raises UserError when there is none, which says where to put it.
    """
    text = str(name_or_path)
    name, known = text.removeprefix(PREFIX), published_files(peers)
    path = Path(name).expanduser()
    if name in known and not path.exists():
        peer, entry = known[name]
        return (
            fetch(entry.where, entry.file, revision, name, entry.config),
            dict(entry.hyperparameters),
            peer.kind,
        )
    if path.is_dir():
        return find_weights(path, file), None, None
    if path.is_file():
        return path, None, None
    if name.count("/") == 1 and file is not None and not name.startswith((".", "/", "~")):
        entry = next((e for _, e in known.values() if (e.where, e.file) == (name, file)), None)
        peer = next((p for p, e in known.values() if e is entry), None)
        found = fetch(
            name, file, revision, name.replace("/", "--"), entry.config if entry else "config.json"
        )
        return found, dict(entry.hyperparameters) if entry else None, peer.kind if peer else None
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        files = [e.file for _, e in known.values() if e.where == name]
        hint = f", such as file={files[0]!r}" if files else ""
        raise UserError(
            f"{name}: there is no such folder here; of a repository of the Hub name the file{hint}"
        )
    raise UserError(
        f"{name}: there is no such file or folder, and no published file of that name in "
        "docs/published.md"
    )


def home() -> Path:
    """Where files that were fetched by hand are looked for: a folder for each name."""
    given = os.environ.get("TESSERA_PUBLISHED")
    return Path(given).expanduser() if given else Path("~/.cache/tessera/published").expanduser()


def fetch(where: str, file: str, revision: str | None, name: str, config: str = "") -> Path:
    """A published file: from the folder of files fetched by hand, else from the Hub or its
    cache."""
    by_hand = home() / name / Path(file).name
    if by_hand.is_file():
        return by_hand
    if "://" in where:
        raise UserError(f"{name}: {where} is not asked from here: put its {file} at {by_hand}")
    from huggingface_hub import hf_hub_download

    from tokenizer.remote import patient

    try:
        with patient(where):
            if config:
                hf_hub_download(where, config, revision=revision)
            return Path(hf_hub_download(where, file, revision=revision))
    except Exception as error:  # the errors of its network libraries share no base
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
        raise UserError(
            f"{where}: the Hub gave no {file} ({reason}): put that file at {by_hand}"
        ) from None


def _listed(names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
