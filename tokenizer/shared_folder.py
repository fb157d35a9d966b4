"""The folder that a shared tokenizer is: written whole or not at all, checked by its manifest, and
fetched from the Hugging Face Hub or sent there.

config.yaml or config.json   what the tokenizer is
weights/                     its tensors, and architectures of pretrained parts
manifest.json                bytes and SHA-256 of these
README.md                    a model card, free to be edited
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from pathlib import Path
from typing import Any

from tokenizer.encoders.foundation import KNOWN
from tokenizer.remote import patient
from training.atomic import STAGED, atomic_folder, settle
from training.checkpoint import sha256
from training.errors import UserError

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


def check_target(source: Path | None, out: Path) -> None:
    """Refuse a folder that `save_pretrained` did not write; what it holds beside our files
    stays."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: a file is in the way: name a folder")
    settle(out)
    strangers = (
        sorted(path.name for path in out.iterdir() if path.name != STAGED) if out.is_dir() else []
    )
    if is_shared(out):
        strangers = []
    if strangers or (source is not None and out.resolve() == source.resolve()):
        stranger = strangers[0] if strangers else "the source itself"
        raise UserError(f"{out}: holds {stranger} and would be replaced: name another folder")


def replacing(out: Path) -> contextlib.AbstractContextManager[Path]:
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


def is_shared(folder: Path) -> bool:
    """Whether `save_pretrained` wrote the folder."""
    try:
        return json.loads((folder / "manifest.json").read_text())["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        return False


def portable(value: Any, key: str = "name") -> Any:
    """Of strings that are paths only the last part; names of the Hub, and all else, as they are."""
    if isinstance(value, dict):
        return {name: portable(entry, name) for name, entry in value.items()}
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


def seal(folder: Path, card: str) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    entries = {
        path.relative_to(folder).as_posix(): {"sha256": sha256(path), "bytes": path.stat().st_size}
        for path in files
    }
    (folder / "README.md").write_text(card)
    manifest = {"format": FORMAT, "files": entries, "card_sha256": sha256(folder / "README.md")}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))


def fetch(name: str | Path, revision: str | None) -> Path:
    """The local folder of a name, whole where it has a manifest."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if not HUB_NAME.fullmatch(str(name)):
            raise UserError(
                f"{name}: there is no such folder, and it is no name of the Hub (owner/name)"
            )
        folder = _download(str(name), revision)
    verify(folder)
    return folder


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        with patient(name):
            return Path(snapshot_download(name, revision=revision, allow_patterns=FILES))
    except Exception as error:  # the errors of its network libraries share no base
        raise UserError(
            f"{name} is no folder here, and the Hub gave no tokenizer ({_reason(error)}): check "
            "the name and the "
            "connection, or give the path of a downloaded one"
        ) from None


def verify(folder: Path) -> None:
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
                f"{path}: not what manifest.json says (SHA-256 {digest[:8]}…): download the folder "
                "again"
            )


def upload(folder: Path, repo_id: str, private: bool) -> str:
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
            f"{repo_id}: the Hub did not take it ({_reason(error)}): log in with `hf auth login`, "
            "and check the "
            "name and the connection"
        ) from None
    return address


def _reason(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
