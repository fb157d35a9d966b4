"""Priors: distributions over code sequences given a class label."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import tessera.names  # also says so where another package has one of our names
from priors.families import PRIORS

if TYPE_CHECKING:
    from priors.interface import Prior

_PUBLIC = {
    "BackboneConfig": "priors.backbone",
    "Decoding": "priors.decoding.engine",
    "PriorRun": "priors.run",
    "SampleOptions": "priors.interface",
    "train_prior": "priors.train",
}
__all__, __getattr__, __dir__ = tessera.names.public(__name__, _PUBLIC)
__all__ += ["PRIORS", "load"]


def load(run_folder: str | Path) -> Prior:
    """A trained prior with its averaged weights, in eval mode on this process's device.

    Raises UserError when the folder is no prior's run or something in it is damaged.
    """
    from priors.record import read_record
    from priors.run import PriorRun
    from training import checkpoint, config, distributed
    from training.errors import UserError

    folder = Path(run_folder)
    record = read_record(folder)
    prior = config.load(PriorRun, folder / "config.yaml", alone=True).prior.build(
        record.layout, record.num_classes
    )
    try:
        prior.load_state_dict(checkpoint.load_weights(folder))
    except RuntimeError as error:
        reason = str(error).split("\n")[-1].strip()
        raise UserError(
            f"{folder}: its weights are not those of its settings ({reason}): train it with --fresh"
        ) from None
    return prior.to(distributed.device()).eval()
