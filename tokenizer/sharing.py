"""Share trained tokenizers as folders, or on the Hugging Face Hub: python -m tokenizer.sharing save
RUN OUT

config.yaml                  the run's configuration, without the paths of the machine that made it
weights/model.safetensors    as published by the run
weights/encoder/*.json       the architecture of a pretrained encoder
manifest.json                bytes and SHA-256 of these
README.md                    a model card with the run's last figures and its report's; edit it
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tokenizer.model_card import USAGE, card_of_run, find_report, front_matter, titled
from tokenizer.run import TokenizerRun, load, load_config
from tokenizer.shared_folder import (
    check_target,
    fetch,
    portable,
    replacing,
    seal,
    upload,
    verify,
)
from training.checkpoint import load_weights, weights_path, write_weights
from training.command import Parser, run_command
from training.config import from_dict, to_dict, to_yaml


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
    check_target(folder, out)
    load_weights(folder)  # refuses damaged ones
    shared = _neutral(config)
    with torch.device("meta"):
        model = config.model.build(config.data.image_size, folder / "weights", weights=False)
    card = card_of_run(shared, model.layout, folder, find_report(folder, report))
    with replacing(out) as temporary:
        (temporary / "config.yaml").write_text(to_yaml(shared))
        (temporary / "weights").mkdir()
        shutil.copyfile(weights_path(folder), weights_path(temporary))
        for file in sorted((folder / "weights").glob("*/*.json")):
            (temporary / "weights" / file.parent.name).mkdir(exist_ok=True)
            shutil.copyfile(file, temporary / "weights" / file.parent.name / file.name)
        seal(temporary, card)
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
    return load(fetch(name_or_folder, revision))


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
    check_target(None, out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as temporary:
        (temporary / "config.yaml").write_text(to_yaml(config))
        write_weights(weights_path(temporary), model.state_dict(), {})
        seal(
            temporary,
            front_matter([config.model.kind], None, None) + titled(out.name, [*about, "", USAGE]),
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
        verify(folder)
        return upload(folder, repo_id, private)
    with tempfile.TemporaryDirectory() as temporary:
        return upload(save_pretrained(folder, Path(temporary, "shared"), report), repo_id, private)


def _neutral(config: TokenizerRun) -> TokenizerRun:
    """The same tokenizer, where nothing names a folder or a file of this machine."""
    raw = portable(to_dict(dataclasses.replace(config, root=".", start_from=None)))
    return from_dict(TokenizerRun, raw, "config.yaml")


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
    arguments = parser.parse_args()
    if arguments.command == "save":
        print(save_pretrained(arguments.run, arguments.target, arguments.report))
    else:
        print(
            push_to_hub(
                arguments.run,
                arguments.target,
                private=not arguments.public,
                report=arguments.report,
            )
        )


if __name__ == "__main__":
    run_command(main)
