"""weights/prior.json: what others must know of a trained prior beside its weights."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

from priors.interface import SampleOptions
from tokenizer.interface import CodeLayout
from training.checkpoint import replace_file, weights_hash
from training.errors import UserError
from training.text import printable

NO_TOKENIZER = (
    "the tokenizer of its codes is not at hand: import the prior again with --tokenizer RUN "
    "(python -m priors.published import)"
)


@dataclasses.dataclass(frozen=True)
class PriorRecord:
    """Folders are relative to the prior's run folder, so that a root can be moved as a whole. Of an
    imported prior there are no tokens, and maybe no tokenizer: these are empty."""

    layout: CodeLayout
    class_names: list[str]
    tokens: str  # token cache folder
    tokens_sha256: str  # TokenCache.sha256
    tokenizer: str  # run folder
    tokenizer_sha256: str  # of its weights
    sampling: SampleOptions  # what to sample with where nothing else is asked for

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def write(self, run_folder: Path) -> None:
        replace_file(_path(run_folder), json.dumps(dataclasses.asdict(self), indent=1).encode())

    def tokenizer_folder(self, run_folder: Path) -> Path:
        """The tokenizer's run folder. Raises UserError when its weights did not make the tokens, or
        a published prior has none."""
        if not self.tokenizer:
            raise UserError(
                f"{run_folder}: {NO_TOKENIZER}; one that was trained on train_prior(tokens=…) draws "
                "codes alone: priors.load(folder).sample"
            )
        folder = Path(os.path.normpath(run_folder.resolve() / self.tokenizer))
        now = weights_hash(folder)
        if now != self.tokenizer_sha256:
            raise UserError(
                f"{run_folder} was trained on tokens from {folder} with weights "
                f"{self.tokenizer_sha256[:8]}, and they are now {now[:8]}: make the tokens again, then train "
                "the prior with --fresh (make: FRESH=1)"
            )
        return folder


def is_prior(run_folder: Path) -> bool:
    """Whether a folder is a prior's run."""
    return _path(run_folder).is_file()


def read_record(run_folder: Path) -> PriorRecord:
    """Raises UserError when the folder is no prior's run or its record is damaged."""
    path = _path(run_folder)
    if not path.is_file():
        raise UserError(
            f"{path}: there is no such file: train a prior there first (python -m priors.train)"
        )
    try:
        raw = json.loads(path.read_text())
        typed = {
            "layout": CodeLayout(**raw["layout"]),
            "sampling": SampleOptions(**raw["sampling"]),
        }
        names = raw["class_names"]
        if (
            not names
            or not isinstance(names, list)
            or not all(isinstance(name, str) for name in names)
        ):
            raise ValueError("class_names")
        typed["class_names"] = [printable(name) for name in names]
        for name in ("tokens", "tokens_sha256", "tokenizer", "tokenizer_sha256"):
            if not isinstance(raw[name], str):
                raise ValueError(name)
        return PriorRecord(**{**raw, **typed})
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: damaged ({error}): train the prior with --fresh (make: FRESH=1)"
        ) from None


def _path(run_folder: Path) -> Path:
    return Path(run_folder) / "weights" / "prior.json"
