"""The quantizers for anybody's own model: `quantizer = SimVQ(num_codes=1024, dim=64)`, and
`out = quantizer(features)` with `out.vectors`, `out.codes`, `out.loss` and `out.parts`.

They need nothing of this project's loop but `quantizer.update()` after each optimizer step. Where
each comes from is said in the file of its config, with what its settings mean.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tokenizer.interface import QuantizerOutput
from tokenizer.quantizers.codebook import finite, to_rows
from tokenizer.quantizers.fsq import FSQConfig
from tokenizer.quantizers.gumbel import GumbelConfig
from tokenizer.quantizers.ibq import IBQConfig
from tokenizer.quantizers.lookup_free import BSQConfig, LookupFreeConfig
from tokenizer.quantizers.product import ProductConfig
from tokenizer.quantizers.residual import ResidualConfig
from tokenizer.quantizers.simvq import SimVQConfig
from tokenizer.quantizers.vector import VectorConfig
from training import distributed
from training.config import from_dict

FORGOTTEN = 100  # forward passes in training without an update, after which that is said


class Quantize(nn.Module):
    """A quantizer of any kind within a model that knows nothing of this project.

    Statistics, restarts and schedules are gathered in `forward`, in training mode, and applied by
    `update`, once after each optimizer step: so gradient accumulation and several processes give
    the codebook that one large batch does. `eval()` applies what is left. Where a codebook starts
    from data, it does so at the first forward pass in training.
    """

    def __init__(self, config: Any, *, auto_update: bool = False, seed: int = 0) -> None:
        """`config`: of one of the kinds in QUANTIZERS.

        `auto_update`: each forward pass in training first applies what the one before gathered, so
        that nothing has to call `update`; right where a step is one forward pass. `seed`: of a
        codebook that starts from data.
        """
        super().__init__()
        self.quantizer, self.auto_update, self.seed = config.build(), auto_update, seed
        self.dim: int = self.quantizer.dim
        self.num_codes: tuple[int, ...] = self.quantizer.num_codes  # per level
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("started", torch.tensor(not self.quantizer.starts_from_data))
        # The same on the host: no step waits for a GPU.
        self._steps, self._started, self._pending = 0, not self.quantizer.starts_from_data, 0
        self.register_load_state_dict_post_hook(Quantize._loaded)

    def forward(self, features: Tensor) -> QuantizerOutput:
        """Features (B, C, H, W) or (B, N, C), of any float type, C = `dim`.

        `vectors` have the features' shape, in float32, and pass gradients to them. `codes` are
        int64, (B, H, W) or (B, N); of quantizers of L > 1 levels (B, L, H, W) or (B, L, N); -1
        where a feature is not finite. `loss` is a scalar, already weighted, to be added to your
        own. `parts` are its terms, with `usage` and `perplexity` of the codes met lately.
        """
        tokens = features.ndim == 3
        if features.ndim not in (3, 4) or features.shape[2 if tokens else 1] != self.dim:
            raise ValueError(
                f"features are {tuple(features.shape)}: (B, {self.dim}, H, W) or (B, N, {self.dim}) "
                f"is needed for dim={self.dim}"
            )
        grid = features.transpose(1, 2).unsqueeze(-1) if tokens else features
        if self.training:
            if self.auto_update and self._pending:
                self.update()
            self._start(grid)
            self._note_pending()
        out = self.quantizer(grid)
        vectors = out.vectors.squeeze(-1).transpose(1, 2) if tokens else out.vectors
        codes = out.codes.squeeze(-1) if tokens else out.codes
        codes = codes.squeeze(1) if len(self.num_codes) == 1 else codes
        return QuantizerOutput(vectors, codes, out.loss, out.parts)

    def lookup(self, codes: Tensor) -> Tensor:
        """Codes as `forward` gives them -> the vectors that it gave in evaluation, float32."""
        if len(self.num_codes) == 1:
            codes = codes.unsqueeze(1)
        if codes.ndim == 4:
            return self.quantizer.lookup(codes)
        return self.quantizer.lookup(codes.unsqueeze(-1)).squeeze(-1).transpose(1, 2)

    @torch.no_grad()
    def update(self, taken: bool = True) -> None:
        """Apply what was gathered since the last call: once after each optimizer step, on every
        process. `taken=False` throws it away, as of a step that was skipped."""
        self.quantizer.update(self._steps, taken)
        self._steps, self._pending = self._steps + 1, 0
        self.steps.fill_(self._steps)

    def train(self, mode: bool = True) -> Quantize:
        """As torch has it; leaving training applies what was gathered."""
        if not mode and self.training and self._pending:
            self.update()
        return super().train(mode)

    def _start(self, grid: Tensor) -> None:
        if self._started:
            return
        rows = to_rows(grid.detach().float())
        self.quantizer.initialise(rows[finite(rows)], self.seed)
        distributed.equalise(self.quantizer)  # each process began from features of its own
        self._started = True
        self.started.fill_(True)

    def _note_pending(self) -> None:
        self._pending += 1
        if self._pending == FORGOTTEN:
            warnings.warn(
                f"{FORGOTTEN} forward passes without {type(self).__name__}.update(): the codebook "
                "learns by it: call it after each optimizer step, or set auto_update=True",
                stacklevel=3,
            )

    @staticmethod
    def _loaded(module: Quantize, keys: Any) -> None:
        module._steps, module._started = int(module.steps), bool(module.started)


# `settings` are those of the named config class, and `auto_update` and `seed` as above.


class VQ(Quantize):
    """A codebook by moving averages, or by gradients (van den Oord et al. 2017,
    arXiv:1711.00937); `settings` are VectorConfig's, as metric="cosine", restart="data"."""

    def __init__(self, num_codes: int = 512, dim: int = 64, **settings: Any) -> None:
        _make(self, VectorConfig, {"num_codes": num_codes, "code_dim": dim}, settings)


class SimVQ(Quantize):
    """A frozen codebook under a learnable linear map (Zhu et al. 2024, arXiv:2411.02038);
    `settings` are SimVQConfig's."""

    def __init__(self, num_codes: int = 8192, dim: int = 256, **settings: Any) -> None:
        _make(self, SimVQConfig, {"num_codes": num_codes, "code_dim": dim}, settings)


class ResidualVQ(Quantize):
    """Each of `depth` levels quantizes what those before left (Lee et al. 2022, arXiv:2203.01941);
    `settings` are ResidualConfig's, and for each level VectorConfig's."""

    def __init__(
        self, num_codes: int = 512, dim: int = 64, depth: int = 4, **settings: Any
    ) -> None:
        own = {name: settings.pop(name) for name in RESIDUAL & settings.keys()}
        level = {"num_codes": num_codes, "code_dim": dim} | _levels(settings)
        _make(self, ResidualConfig, {"depth": depth, "level": level} | own, settings)


class ProductVQ(Quantize):
    """`heads` groups of the `dim` channels, each with a codebook (Jegou et al. 2011); `settings`
    are VectorConfig's, for each head. Raises ValueError unless heads divide dim."""

    def __init__(
        self, num_codes: int = 256, dim: int = 64, heads: int = 4, **settings: Any
    ) -> None:
        if heads < 1 or dim % heads:
            raise ValueError(f"ProductVQ: dim={dim} does not divide into heads={heads}")
        level = {"num_codes": num_codes, "code_dim": dim // heads} | _levels(settings)
        _make(self, ProductConfig, {"heads": heads, "level": level}, settings)


class GumbelVQ(Quantize):
    """Gumbel-softmax over the codes (Jang et al. 2016, arXiv:1611.01144); `settings` are
    GumbelConfig's. In training codes are samples, and vectors mix the codebook's."""

    def __init__(self, num_codes: int = 8192, dim: int = 256, **settings: Any) -> None:
        _make(self, GumbelConfig, {"num_codes": num_codes, "code_dim": dim}, settings)


class IBQ(Quantize):
    """Index backpropagation: gradients reach every code (Shi et al. 2024, arXiv:2412.02692);
    `settings` are IBQConfig's."""

    def __init__(self, num_codes: int = 16384, dim: int = 256, **settings: Any) -> None:
        _make(self, IBQConfig, {"num_codes": num_codes, "code_dim": dim}, settings)


class FSQ(Quantize):
    """Finite scalar quantization (Mentzer et al. 2023, arXiv:2309.15505): a channel for each of
    `levels`, rounded to so many values; the loss is 0."""

    def __init__(self, levels: Sequence[int] = (8, 5, 5, 5), **settings: Any) -> None:
        _make(self, FSQConfig, {"levels": list(levels)}, settings)


class LFQ(Quantize):
    """Lookup-free quantization (Yu et al. 2023, arXiv:2310.05737): the signs of `bits` channels,
    2**bits codes; `settings` are LookupFreeConfig's."""

    def __init__(self, bits: int = 10, **settings: Any) -> None:
        _make(self, LookupFreeConfig, {"bits": bits}, settings)


class BSQ(Quantize):
    """Binary spherical quantization (Zhao et al. 2024, arXiv:2406.07548): signs of `bits` channels
    on the unit sphere; `settings` are BSQConfig's."""

    def __init__(self, bits: int = 10, **settings: Any) -> None:
        _make(self, BSQConfig, {"bits": bits}, settings)


OWN = {"auto_update", "seed"}
RESIDUAL = {"shared", "quantizer_dropout"}


def _levels(settings: dict[str, Any]) -> dict[str, Any]:
    """Takes out of `settings` what is the levels', and leaves what is `Quantize`'s own."""
    return {name: settings.pop(name) for name in settings.keys() - OWN}


def _make(face: Quantize, schema: type, sizes: dict[str, Any], settings: dict[str, Any]) -> None:
    """Raises UserError, a ValueError, for a setting that there is not, with the nearest one."""
    own = {name: settings[name] for name in OWN & settings.keys()}
    rest = {name: settings[name] for name in settings.keys() - OWN}
    config = from_dict(schema, sizes | rest, type(face).__name__)
    Quantize.__init__(face, config, **own)
