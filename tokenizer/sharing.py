"""Share trained tokenizers as folders, or on the Hugging Face Hub: python -m tokenizer.sharing save
RUN OUT

config.yaml                  the run's configuration, without the paths of the machine that made it
weights/model.safetensors    as published by the run; weights/encoder/*.json: the architecture of a pretrained encoder
manifest.json                bytes and SHA-256 of these
README.md                    a model card with the run's last figures and its report's, free to be edited
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tokenizer.encoders.foundation import KNOWN
from tokenizer.interface import CodeLayout
from tokenizer.remote import patient
from tokenizer.run import TokenizerRun, load, load_autoencoder_weights, load_config
from tokenizer.vqrae import VQRAE
from training.atomic import STAGED, atomic_folder, settle
from training.checkpoint import load_weights, sha256, weights_hash, weights_path, write_weights
from training.command import Parser, UserError, run_command
from training.config import from_dict, to_dict, to_yaml
from training.words import dump

FILES = [
    "config.yaml",
    "config.json",
    "manifest.json",
    "README.md",
    "weights/*.safetensors",
    "weights/*/*.json",
]
FORMAT = "tessera-tokenizer-1"
HUB_KEYS = (
    "name",
    "encoder_config_path",
)  # what may hold a name of the Hub; elsewhere a/b is a path
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
USAGE = """```python
from tokenizer.sharing import from_pretrained

tokenizer = from_pretrained("owner/name")  # or this folder
codes = tokenizer.encode(images)  # (B, 3, H, W) in [-1, 1] -> (B, N) int64
images = tokenizer.decode(codes)
```"""
VQRAE_USAGE = """```python
from tokenizer import VQRAE

model = VQRAE.from_pretrained("owner/name")  # or this folder
codes = model.encode_to_indices(images)  # (B, 3, H, W) in [0, 1] -> (B, h, w) int64
images = model.decode_from_indices(codes)
```"""
LICENCE = (
    "`license: other` stands above until whoever shares these weights names one. Weights that began as a pretrained "
    "encoder's, and data, have licences of their own."
)


def save_pretrained(
    run_folder: str | Path, out: str | Path, report: str | Path | None = None
) -> Path:
    """Write the folder `out` that `from_pretrained` reads, of a run or of such a folder; return it.

    `report` is a reconstruction.json of these weights; without one the run's own is taken where it
    has one. Raises UserError when the run has no whole weights, the report is of others, or `out`
    holds something else.
    """
    folder, out = Path(run_folder), Path(out)
    config = load_config(folder)
    _check_target(folder, out)
    load_weights(folder)  # refuses damaged ones
    shared = _neutral(config)
    with torch.device("meta"):
        model = config.model.build(config.data.image_size, folder / "weights", weights=False)
    card = _card(shared, model.layout, folder, _find_report(folder, report))
    with _replacing(out) as temporary:
        (temporary / "config.yaml").write_text(to_yaml(shared))
        (temporary / "weights").mkdir()
        shutil.copyfile(weights_path(folder), weights_path(temporary))
        for file in sorted((folder / "weights").glob("*/*.json")):
            (temporary / "weights" / file.parent.name).mkdir(exist_ok=True)
            shutil.copyfile(file, temporary / "weights" / file.parent.name / file.name)
        _seal(temporary, card)
    return out


def from_pretrained(
    name_or_folder: str | Path,
    revision: str | None = None,
    *,
    file: str | None = None,
    as_: str | None = None,
    **options: Any,
) -> nn.Module:
    """A tokenizer as `tokenizer.load` gives it, from a shared folder, a run's, or a Hub name
    (owner/name).

    One that others published by its name (published:NAME), its file, or a repository of the Hub and
    a `file` in it; `as_` and `options` are published.from_pretrained's.

    Raises UserError when there is none, it cannot be reached, or a file is missing or not what its
    manifest says.
    """
    if file is not None or as_ is not None or options or _is_published(name_or_folder):
        from tokenizer.published.load import from_pretrained as from_published

        return from_published(name_or_folder, file, revision, as_, **options)
    return load(_fetch(name_or_folder, revision))


def _is_published(name: str | Path) -> bool:
    """Whether it is a file of weights, a folder of one that is not of this project, or
    published:NAME."""
    path = Path(name).expanduser()
    if str(name).startswith("published:") or path.is_file():
        return True
    ours = ("config.yaml", "manifest.json", "weights")
    return (
        path.is_dir()
        and any(path.glob("*.safetensors"))
        and not any((path / part).exists() for part in ours)
    )


def save_autoencoder(
    model: nn.Module, config: TokenizerRun, out: str | Path, about: list[str]
) -> Path:
    """Write the folder `out` that `from_pretrained` reads, of a tokenizer at hand and its run;
    return it.

    `about` are lines of its card. Raises UserError when `out` holds something else.
    """
    out = Path(out)
    _check_target(None, out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with _replacing(out) as temporary:
        (temporary / "config.yaml").write_text(to_yaml(config))
        write_weights(weights_path(temporary), model.state_dict(), {})
        _seal(
            temporary,
            _front_matter([config.model.kind], None, None) + _lines(out.name, [*about, "", USAGE]),
        )
    return out


def push_to_hub(
    run_folder: str | Path, repo_id: str, *, private: bool = True, report: str | Path | None = None
) -> str:
    """Upload a run, or a folder that `save_pretrained` wrote (with your changes to its card);
    return its address.

    A new repository is private unless told otherwise. Raises UserError when the Hub refuses.
    """
    folder = Path(run_folder)
    if (folder / "manifest.json").is_file():
        _verify(folder)
        return _upload(folder, repo_id, private)
    with tempfile.TemporaryDirectory() as temporary:
        return _upload(save_pretrained(folder, Path(temporary, "shared"), report), repo_id, private)


def save_vqrae(model: VQRAE, folder: str | Path) -> Path:
    """Write a VQRAE, trained by whatever code, to a folder for `load_vqrae`; return it."""
    folder, encoder, decoder = Path(folder), model.autoencoder.encoder, model.autoencoder.decoder
    _check_target(None, folder)
    arguments = _portable(dict(model.arguments))
    arguments["freeze_encoder"] = encoder.frozen  # set_stage may have changed it
    sizes = {
        "decoder_hidden_size": decoder.dim,
        "decoder_num_hidden_layers": len(decoder.decoder_layers),
        "decoder_num_attention_heads": decoder.heads,
        "decoder_intermediate_size": decoder.decoder_layers[0].intermediate["dense"].out_features,
    }
    (grid,), (num_codes,) = model.autoencoder.layout.grids, model.autoencoder.layout.num_codes
    about = f"A VQRAE: images to {grid[0]} x {grid[1]} codes of {num_codes}, and back."
    front = _front_matter(["vqrae"], arguments["encoder_config_path"], None)
    with _replacing(folder) as temporary:
        (temporary / "config.json").write_text(
            json.dumps({"class": "VQRAE", "arguments": arguments}, indent=1)
        )
        write_weights(weights_path(temporary), model.state_dict(), {})
        encoder.save_architecture(temporary / "weights" / "encoder")
        (temporary / "weights" / "decoder").mkdir()
        (temporary / "weights" / "decoder" / "config.json").write_text(json.dumps(sizes, indent=1))
        _seal(
            temporary,
            front + _lines(folder.name, [about, "", VQRAE_USAGE, "", "## Licence", "", LICENCE]),
        )
    return folder


def load_vqrae(name_or_folder: str | Path, revision: str | None = None) -> VQRAE:
    """The VQRAE that `save_vqrae` wrote, from its folder or a Hub name, in evaluation mode. Raises
    UserError."""
    folder = _fetch(name_or_folder, revision)
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(
            f"{folder}: it holds no VQRAE (there is no config.json): give what save_pretrained wrote"
        )
    try:
        arguments = json.loads(file.read_text())["arguments"]
        arguments["decoder_config_path"] = str(folder / "weights" / "decoder")
        model = VQRAE(**arguments, saved=folder / "weights")
    except UserError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: it does not describe a VQRAE ({error}): save it again") from None
    load_autoencoder_weights(model, folder)
    return model.eval()


def push_vqrae(model: VQRAE, repo_id: str, *, private: bool = True) -> str:
    """Upload a VQRAE; return its address. A new repository is private unless told otherwise."""
    with tempfile.TemporaryDirectory() as temporary:
        return _upload(
            save_vqrae(model, Path(temporary, repo_id.rpartition("/")[2])), repo_id, private
        )


def _check_target(source: Path | None, out: Path) -> None:
    """Refuse a folder that `save_pretrained` did not write; what it holds beside our files
    stays."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: a file is in the way: name a folder")
    settle(out)
    strangers = (
        sorted(path.name for path in out.iterdir() if path.name != STAGED) if out.is_dir() else []
    )
    if _is_shared(out):
        strangers = []
    if strangers or (source is not None and out.resolve() == source.resolve()):
        found = strangers[0] if strangers else "the source itself"
        raise UserError(f"{out}: holds {found} and would be replaced: name another folder")


def _replacing(out: Path) -> contextlib.AbstractContextManager[Path]:
    """A temporary folder whose files take the place of those that `save_pretrained` wrote to
    `out`."""
    try:
        manifest = json.loads((out / "manifest.json").read_text())
        ours = {"manifest.json", *manifest["files"]}
        if (out / "README.md").is_file() and sha256(out / "README.md") == manifest.get(
            "card_sha256"
        ):
            ours.add("README.md")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        ours = set()

    def check(names: list[str]) -> None:
        for name in names:
            if name not in ours and os.path.lexists(out / name):
                raise UserError(
                    f"{out / name}: was edited, or is not ours, and would be replaced: move it away"
                )

    return atomic_folder(out, ours=ours.__contains__, noting=check, last="manifest.json")


def _is_shared(folder: Path) -> bool:
    """Whether `save_pretrained` wrote the folder."""
    try:
        return json.loads((folder / "manifest.json").read_text())["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _neutral(config: TokenizerRun) -> TokenizerRun:
    """The same tokenizer, where nothing names a folder or a file of this machine."""
    raw = _portable(to_dict(dataclasses.replace(config, root=".", start_from=None)))
    return from_dict(TokenizerRun, raw, "config.yaml")


def _portable(value: Any, key: str = "name") -> Any:
    """Of strings that are paths only the last part; names of the Hub, and all else, as they are."""
    if isinstance(value, dict):
        return {name: _portable(entry, name) for name, entry in value.items()}
    if isinstance(value, Path):
        value = str(value)
    if (
        not isinstance(value, str)
        or value.startswith("hub:")
        or ("/" not in value and not value.startswith("~"))
    ):
        return value
    return value if key in HUB_KEYS and _is_of_the_hub(value) else Path(value).name or "."


def _is_of_the_hub(name: str) -> bool:
    """Whether the Hub is known to have it: by us, or by what was downloaded here. Else a/b may be a
    folder's path."""
    from huggingface_hub import try_to_load_from_cache

    if not HUB_NAME.fullmatch(name) or Path(name).exists():
        return False
    try:
        return name in KNOWN or isinstance(try_to_load_from_cache(name, "config.json"), str)
    except ValueError:  # no name that a repository can have
        return False


def _seal(folder: Path, card: str) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    entries = {
        path.relative_to(folder).as_posix(): {"sha256": sha256(path), "bytes": path.stat().st_size}
        for path in files
    }
    (folder / "README.md").write_text(card)
    manifest = {"format": FORMAT, "files": entries, "card_sha256": sha256(folder / "README.md")}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))


def _fetch(name: str | Path, revision: str | None) -> Path:
    """The local folder of a name, whole where it has a manifest."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if not HUB_NAME.fullmatch(str(name)):
            raise UserError(
                f"{name}: there is no such folder, and it is no name of the Hub (owner/name)"
            )
        folder = _download(str(name), revision)
    _verify(folder)
    return folder


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        with patient(name):
            return Path(snapshot_download(name, revision=revision, allow_patterns=FILES))
    except Exception as error:  # the errors of its network libraries share no base
        raise UserError(
            f"{name} is no folder here, and the Hub gave no tokenizer ({_reason(error)}): check the name and the "
            "connection, or give the path of a downloaded one"
        ) from None


def _verify(folder: Path) -> None:
    """Raise UserError unless every file is what the manifest says; a run's folder has none."""
    file = folder / "manifest.json"
    if not file.is_file():
        return
    try:
        entries = json.loads(file.read_text())["files"].items()
        wanted = [(folder / name, entry["bytes"], entry["sha256"]) for name, entry in entries]
        if any(
            "\0" in str(path) or type(size) is not int or type(told) is not str
            for path, size, told in wanted
        ):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{file}: damaged: download the folder again, or save it again") from None
    for path, size, digest in wanted:
        if not path.resolve().is_file():
            raise UserError(
                f"{path}: missing, though manifest.json has it: download the folder again"
            )
        if path.stat().st_size != size or sha256(path) != digest:
            raise UserError(
                f"{path}: not what manifest.json says (SHA-256 {digest[:8]}…): download the folder again"
            )


def _upload(folder: Path, repo_id: str, private: bool) -> str:
    from huggingface_hub import HfApi

    if not HUB_NAME.fullmatch(repo_id):
        raise UserError(f"{repo_id}: a repository of the Hub is named owner/name")
    try:
        with patient(repo_id):
            api = HfApi()
            address = str(api.create_repo(repo_id, private=private, exist_ok=True))
            api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                allow_patterns=FILES,
                commit_message="Tokenizer trained with Tessera",
            )
    except Exception as error:  # the errors of its network libraries share no base
        raise UserError(
            f"{repo_id}: the Hub did not take it ({_reason(error)}): log in with `hf auth login`, and check the "
            "name and the connection"
        ) from None
    return address


def _reason(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")


def _find_report(folder: Path, given: str | Path | None) -> dict[str, Any] | None:
    """The record of reconstruction of these very weights: the one given, the run's, or its
    pipeline's."""
    if given is not None:
        record = _read_report(Path(given))
        if record is None:
            raise UserError(f"{given}: there is no such report: run `python -m eval.run` first")
        if record["settings"]["tokenizer_sha256"] != weights_hash(folder):
            raise UserError(
                f"{given}: measured on other weights than {folder}'s: run `python -m eval.run` again"
            )
        return record
    records = (
        _read_report(place / "report" / "reconstruction.json") for place in (folder, folder.parent)
    )
    mine = (r for r in records if r and r["settings"]["tokenizer_sha256"] == weights_hash(folder))
    return next(mine, None)


def _read_report(file: Path) -> dict[str, Any] | None:
    """The record that eval wrote, or None where there is no such file."""
    if not file.is_file():
        return None
    try:
        record = json.loads(file.read_text())
        record["settings"]["tokenizer_sha256"], record["measurements"], record["notes"]
        return record
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{file}: damaged, or no record of a reconstruction: run `python -m eval.run` again"
        ) from None


def _card(
    config: TokenizerRun, layout: CodeLayout, folder: Path, record: dict[str, Any] | None
) -> str:
    source, loop = config.data.source, config.loop
    encoder = getattr(config.model.encoder, "name", None)
    grids = ", ".join(
        f"{' x '.join(map(str, grid))} of {k}" for grid, k in zip(layout.grids, layout.num_codes)
    )
    name = f" on {encoder}" if encoder and HUB_NAME.fullmatch(encoder) else ""
    lines = [
        f"A {config.model.kind} tokenizer{name}: images of {config.data.image_size} px to {layout.length} discrete "
        f"codes ({grids}), {layout.bits:.0f} bits, and back.",
        "",
        USAGE,
        "",
        "## Training",
        "",
        f"{loop.steps} steps of {loop.batch_size} images of {source.removeprefix('hub:')} (training split, "
        f"augmentation: {config.data.augment}). config.yaml has every setting; weights are an exponential average.",
        "",
        *_last_figures(folder),
        "## Figures",
        "",
        *(
            _measurements(record)
            if record
            else ["No report was made of these weights (`python -m eval.run`)."]
        ),
        "",
        "## Licence",
        "",
        LICENCE,
        "",
        f"SHA-256 of weights/model.safetensors: {weights_hash(folder)}",
    ]
    return _front_matter([config.model.kind], encoder, source) + _lines(config.name, lines)


def _last_figures(folder: Path) -> list[str]:
    """The log's last value of everything, where there is a log."""
    figures: dict[str, float] = {}
    try:
        for line in (folder / "log.jsonl").read_text().splitlines():
            figures |= json.loads(line)
    except (OSError, ValueError):
        return []
    step = figures.pop("step", None)
    shown = [
        f"{name} {value:.4g}" for name, value in sorted(figures.items()) if isinstance(value, float)
    ]
    return [f"At step {step}: {', '.join(shown)}.", ""] if shown else []


def _measurements(record: dict[str, Any]) -> list[str]:
    """A table with everything that a figure needs to be one."""
    data = record["settings"]["data"]
    rows = ["| figure | value | 95 % | N | images | how |", "|---|---|---|---|---|---|"]
    for each in record["measurements"]:
        arrow = {True: " ↑", False: " ↓", None: ""}[each["higher_is_better"]]
        value = f"{float(each['value']):.4g} {each['unit']}".strip()
        interval = (
            ""
            if not each["interval"]
            else " – ".join(f"{float(end):.4g}" for end in each["interval"])
        )
        how = ", ".join(
            f"{k} {v}" for k, v in each["settings"].items() if k not in ("data", "batch_size")
        )
        rows.append(
            f"| {each['name']}{arrow} | {value} | {interval} | {each['n']} | {each['split']} | {how} |"
        )
    about = (
        f"Of {data['source']} ({data['split']}, {data['image_size']} px), by `python -m eval.run`."
    )
    return [about, "", *rows, *([""] if record["notes"] else []), *record["notes"]]


def _front_matter(tags: list[str], encoder: str | None, source: str | None) -> str:
    """The metadata that the Hub reads."""
    fields: dict[str, Any] = {
        "library_name": "tessera",
        "license": "other",
        "tags": ["tessera", "image-tokenizer", "vector-quantization", *tags],
    }
    if encoder and HUB_NAME.fullmatch(encoder):
        fields["base_model"] = encoder
    if source and source.startswith("hub:"):
        fields["datasets"] = [source.removeprefix("hub:")]
    return f"---\n{dump(fields)}---\n"


def _lines(title: str, lines: list[str]) -> str:
    return "\n".join(["", f"# {title}", "", *lines]) + "\n"


def main() -> None:
    parser = Parser(prog="python -m tokenizer.sharing", description="Share trained tokenizers.")
    commands = parser.add_subparsers(dest="command", required=True)
    save = commands.add_parser("save", help="write a folder to be shared")
    push = commands.add_parser(
        "push", help="upload a run, or what `save` wrote, to the Hugging Face Hub"
    )
    for command, target in ((save, "OUT"), (push, "OWNER/NAME")):
        command.add_argument("run", metavar="RUN", help="the run's folder")
        command.add_argument("target", metavar=target)
        command.add_argument(
            "--report", metavar="FILE", help="reconstruction.json of these weights"
        )
    push.add_argument(
        "--public", action="store_true", help="for all to see, where the repository is new"
    )
    given = parser.parse_args()
    if given.command == "save":
        print(save_pretrained(given.run, given.target, given.report))
    else:
        print(push_to_hub(given.run, given.target, private=not given.public, report=given.report))


if __name__ == "__main__":
    run_command(main)
