"""docs/published.md, made from the peers: python -m priors.published page docs/published.md"""

from __future__ import annotations

from collections.abc import Iterable

from priors.published.peer import PriorPeer, PublishedPrior
from priors.published.table import PEERS as PRIORS
from tokenizer.published.peer import Peer, PublishedFile
from tokenizer.published.table import PEERS as TOKENIZERS

HEAD = """# Published models

Made by `python -m priors.published page docs/published.md`; a test keeps it current.

Tokenizers that others trained load by name, and are tokenizers like any other from there on:

```python
from tokenizer import from_pretrained

tokenizer = from_pretrained("published:llamagen-vq-ds16")  # or "FoundationVision/LlamaGen", file="vq_ds16_c2i.pt"
codes = tokenizer.encode(images)  # (B, 3, H, W) in [-1, 1] -> (B, N) int64
```

```
python -m tokenizer.published list                                         # all names
python -m tokenizer.published import llamagen-vq-ds16 runs/llamagen        # a folder that every command takes
python -m tokenizer.encode published:llamagen-vq-ds16 data.source=DATA root=RUN        # its tokens, for any prior
python -m eval.run reconstruction published:llamagen-vq-ds16 --data DATA   # what it reaches, measured here
python -m eval.run reconstruction published:llamagen-vq-ds16 --num 50000 --protocol adm  # as ADM's evaluator would
python -m tokenizer.train runs/llamagen/config.yaml name=mine start_from=runs/llamagen data.source=DATA  # train on
python -m tokenizer.train runs/llamagen/config.yaml name=mine start_from=runs/llamagen tune=decoder  # its codes stay
make compare-published DATA=DATA                                           # one table of all that are at hand
python -m tokenizer.published export runs/mine llamagen-vq-ds16 OUT.safetensors        # under its authors' names
```

`make compare-published` measures all that lie in the folder for files without a network (below), or were downloaded
before, on the same held-out images, all at the size that most of them are of: [an example](results/published.md), of
three that were trained here. `export` takes as its second argument a file of any weights of that architecture, such as
its authors' own class writes before training; it refuses a tokenizer that would compute something else under those
names, and writes the configuration beside its file.

In the place of a name stands a file (`.safetensors`, `.pt`, `.ckpt`, `.bin`), a `.index.json` of several, or a folder. Its
kind is recognised from the names and shapes of its tensors, or said with `as_=` (`--as`). Sizes come
from the shapes; what shapes do not tell comes from the authors' configuration, which is found beside
the file as config.json, config.yaml or model.yaml, or given with `config=`. Weights load in float32,
whatever the file has. A tensor that is missing, of another shape or left over is named.

No file is unpickled: tensors, containers, text and numbers are read, and everything else in a checkpoint is passed by.
So whole Lightning checkpoints load, and hostile ones do nothing.

Priors likewise, behind the `Prior` interface: guidance, samplers, likelihoods, editing and sweeps work on them.

```python
from priors.published import from_pretrained

prior = from_pretrained("published:rar-b")
prior.config.sampling  # how its authors sample, which is the default of every command
```

```
python -m priors.published list
python -m generate.sample published:rar-b --num 1000                       # through the tokenizer that belongs to it
python -m priors.published import rar-b runs/rar-b/prior                   # a run folder that every command takes
python -m priors.published import FILE runs/mine/prior --tokenizer RUN     # of other codes
python -m priors.train runs/rar-b/prior/config.yaml name=mine tokens=TOKENS start_from=runs/rar-b/prior # train on
python -m priors.published export runs/mine rar-b OUT.safetensors          # under its authors' names
```

Where a file has weights twice, as they were trained and averaged, the averages load; `averaged=False` takes the others.

Files that no Hub has, or that are to be used without a network, lie in `~/.cache/tessera/published/NAME/`, or in
`NAME/` under the folder that TESSERA_PUBLISHED names. Weights have their authors' licences.

**Figures are their authors' own** unless said otherwise, of their protocols and reference sets: they compare only where
those agree. `eval.run` measures all of them alike.

## A check

```
python -m tokenizer.published check FOLDER [--as KIND] [--out FILE]
python -m priors.published check FOLDER [--as KIND] [--out FILE]
```

compares what is computed here with what the authors' code gave: FOLDER holds the weights under their published names,
config.json, and `case.safetensors` with inputs and outputs. It prints the greatest difference of each and ends with 1
beyond the tolerance (codes equal, all else within 1e-4).
"""


def page() -> str:
    """The whole page, in Markdown."""
    priors = [line for peer in PRIORS.values() for line in prior_section(peer)]
    return "\n".join(
        [HEAD, "## Tokenizers", "", *sections(TOKENIZERS.values()), "## Priors", "", *priors]
    )


def sections(peers: Iterable[Peer]) -> list[str]:
    """Lines on each peer: how its files differ from what one would expect, and which were
    published."""
    lines = []
    for peer in peers:
        lines += [f"### {peer.title}", "", f"Kind `{peer.kind}`. Licence: {peer.licence}.", ""]
        lines += [*(f"- {quirk}" for quirk in peer.quirks), ""]
        if peer.files:
            lines += ["| name | file | sizes | its authors' figures |", "|---|---|---|---|"]
            lines += [*map(row, peer.files), ""]
    return lines


def prior_section(peer: PriorPeer) -> list[str]:
    """Lines on a prior, as `sections` of tokenizers, with how its authors sample."""
    lines = [f"### {peer.title}", "", f"Kind `{peer.kind}`. Licence: {peer.licence}.", ""]
    lines += [*(f"- {quirk}" for quirk in peer.quirks), f"- sampling: {peer.recipe}", ""]
    if peer.files:
        lines += ["| name | file | sizes | codes of | sampling | its authors' figures |"]
        lines += ["|---|---|---|---|---|---|", *map(prior_row, peer.files), ""]
    return lines


def prior_row(file: PublishedPrior) -> str:
    sampling = ", ".join(f"{name} {value}" for name, value in file.sampling.items()) or "plain"
    cells = (
        f"`{file.name}`",
        f"{file.where} `{file.file}`",
        file.about,
        f"`{file.tokenizer}`",
        sampling,
        file.figures or "none stated",
    )
    return f"| {' | '.join(cells)} |"


def row(file: PublishedFile) -> str:
    where = f"{file.where} `{file.file}`"
    return f"| `{file.name}` | {where} | {file.about} | {file.figures or 'none stated'} |"
