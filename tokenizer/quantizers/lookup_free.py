"""A bit per channel: LFQ (Yu et al. 2023, arXiv:2310.05737) and BSQ (Zhao et al. 2024,
arXiv:2406.07548)."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.interface import QuantizerOutput
from tokenizer.quantizers.codebook import Project, Usage, finite, straight_through, to_grid, to_rows
from training import batch_means


@dataclasses.dataclass(frozen=True)
class LookupFreeConfig:
    """LFQ; the values are Open-MAGVIT2's (Luo et al. 2024, arXiv:2409.04410), the weight of both
    entropies constant."""

    kind: str = "lookup_free"
    bits: int = 10  # 2**bits codes; of more than 24 bits the use of codes is not counted
    spherical: bool = (
        False  # features and codes on the unit sphere; BSQ's other settings come with kind: bsq
    )
    # the first channel is the lowest bit of a code, not the highest (Open-MAGVIT2, MaskBit)
    lowest_first: bool = False
    commitment: float = 0.25
    entropy: float = 0.1  # weight of both entropies
    diversity: float = 1.0  # gamma, of the batch's entropy among them
    temperature: float = 0.01  # of the soft assignment, in squared distance

    def __post_init__(self) -> None:
        _check(self)

    def build(self) -> LookupFreeQuantizer:
        return LookupFreeQuantizer(
            self.bits,
            self.spherical,
            self.commitment,
            self.entropy,
            self.diversity,
            self.temperature,
            lowest_first=self.lowest_first,
        )


@dataclasses.dataclass(frozen=True)
class BSQConfig:
    """BSQ with the values of its authors' code (github.com/zhaoyue-zephyrus/bsq-vit)."""

    kind: str = "bsq"
    bits: int = 10  # 2**bits codes; of more than 24 bits the use of codes is not counted
    commitment: float = 0.0
    entropy: float = 0.1  # weight of both entropies
    entropy_boost: float = 3.0  # times that weight at the first step, falling to 1
    entropy_boost_steps: int = 2000  # in a straight line over so many steps
    diversity: float = 1.0  # gamma, of the batch's entropy among them
    temperature: float = 1.0  # of the soft assignment, in squared distance

    def __post_init__(self) -> None:
        _check(self)
        if self.entropy_boost < 1:
            raise ValueError(
                f"quantizer.entropy_boost={self.entropy_boost} must be at least 1, which leaves it "
                "out"
            )

    def build(self) -> LookupFreeQuantizer:
        return LookupFreeQuantizer(
            self.bits,
            True,
            self.commitment,
            self.entropy,
            self.diversity,
            self.temperature,
            entropy_boost=self.entropy_boost,
            entropy_boost_steps=self.entropy_boost_steps,
        )


MOST_BITS = 62  # that a code of 64 bits, -1 for no code among them, holds
COUNTED_BITS = 24  # up to which the use of every code is counted


def _check(config: LookupFreeConfig | BSQConfig) -> None:
    if not 1 <= config.bits <= MOST_BITS:
        raise ValueError(f"quantizer.bits={config.bits} must be 1 to {MOST_BITS}")
    joint = config.entropy > 0 and not getattr(config, "spherical", True)
    if joint and config.bits > COUNTED_BITS:
        raise ValueError(
            f"quantizer.bits={config.bits} has an entropy over 2**bits codes: up to {COUNTED_BITS} bits it can be "
            "computed: set quantizer.entropy=0, or take kind bsq, whose entropy is of each bit"
        )
    if config.temperature <= 0:
        usual = type(config).temperature
        raise ValueError(
            f"quantizer.temperature={config.temperature} must be above 0; {usual} is usual"
        )


class LookupFreeQuantizer(nn.Module):
    """Codes are the signs of the channels, the first the highest bit or the lowest.

    Vectors are +-1, or +-1/sqrt(bits) on the sphere. Gradients pass the signs by and are scaled as
    the vectors are: by 1/sqrt(bits) on the sphere.

    In training the loss wants confident positions and batches that use all codes: E H[q(c|z)] -
    diversity * H[E q(c|z)], in nats, for the soft assignment q(c|z) ~ exp(-|z - c|^2 /
    temperature). Given z its bits are independent, so the first entropy is a sum over bits. The
    second is taken over the joint codes for LFQ and, as Zhao et al. do, over each bit alone for
    BSQ, which bounds the joint entropy from above.
    """

    starts_from_data = False

    def __init__(
        self,
        bits: int,
        spherical: bool,
        commitment: float,
        entropy: float,
        diversity: float,
        temperature: float,
        *,
        entropy_boost: float = 1.0,
        entropy_boost_steps: int = 0,
        lowest_first: bool = False,
    ) -> None:
        super().__init__()
        self.dim, self.num_codes, self.spherical = bits, (2**bits,), spherical
        self.commitment, self.entropy, self.diversity = commitment, entropy, diversity
        self.entropy_boost, self.entropy_boost_steps = entropy_boost, entropy_boost_steps
        self.scale = bits**-0.5 if spherical else 1.0
        self.sharpness = 4 * self.scale / temperature  # |z + s|^2 - |z - s|^2 = 4 s z
        places = torch.arange(bits)
        self.register_buffer("places", places if lowest_first else places.flip(0), persistent=False)
        boosted = entropy_boost != 1 and entropy_boost_steps > 0
        self.register_buffer(
            "boost", torch.tensor(entropy_boost if boosted else 1.0), persistent=boosted
        )
        self.statistics = Usage(2**bits) if bits <= COUNTED_BITS else None

    def forward(self, features: Tensor) -> QuantizerOutput:
        """(B, bits, H, W)."""
        with torch.autocast(features.device.type, enabled=False):
            rows = to_rows(features.float())
            if self.spherical:
                rows = F.normalize(rows, dim=1)
            whole = finite(rows)
            bits = (rows.detach() > 0) & whole[:, None]
            codes = (bits.long() << self.places).sum(1).where(whole, -1)
            if self.training and self.statistics is not None:
                self.statistics.gather(codes)
            vectors = self._values(bits)
            commitment = F.mse_loss(rows, vectors)
            loss, parts = self.commitment * commitment, {"commitment": commitment}
            if self.training and self.entropy:
                logits = rows * self.sharpness  # of each bit
                sample_entropy = bit_entropy(logits).sum(1).mean()
                mean = (
                    bit_probabilities(logits).mean(0)
                    if self.spherical
                    else mean_joint_probabilities(logits)
                )
                batch_entropy = entropy_of_mean(mean)
                loss = loss + self.entropy * self.boost * (
                    sample_entropy - self.diversity * batch_entropy
                )
                parts |= {"sample_entropy": sample_entropy, "batch_entropy": batch_entropy}
            vectors = to_grid(straight_through(rows * self.scale, vectors), features.shape)
        codes = codes.unflatten(0, (len(features), 1, *features.shape[2:]))
        figures = {} if self.statistics is None else self.statistics.figures()
        return QuantizerOutput(vectors, codes, loss, {**parts, **figures})

    def lookup(self, codes: Tensor) -> Tensor:
        """(B, 1, H, W) int64 -> (B, bits, H, W) float32."""
        bits = codes.squeeze(1).clamp(min=0)[..., None] >> self.places & 1
        return self._values(bits.bool()).movedim(-1, 1)

    def initialise(
        self, rows: Tensor, seed: int, project: Project | None = None, images: Tensor | None = None
    ) -> None:
        """Nothing starts from data."""

    @torch.no_grad()
    def update(self, step: int, taken: bool) -> None:
        """Count use; set the entropies' weight for step + 1."""
        if self.statistics is not None:
            self.statistics.reduce() if taken else self.statistics.clear()
        if not taken:
            return
        if self.entropy_boost_steps > 0:
            rest = max(0.0, 1 - (step + 1) / self.entropy_boost_steps)
            self.boost.fill_(1 + (self.entropy_boost - 1) * rest)

    def _values(self, bits: Tensor) -> Tensor:
        return (2 * bits.float() - 1) * self.scale


def bit_entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of a bit with these logits, elementwise."""
    size = logits.abs()
    return F.softplus(-size) + size * (-size).sigmoid()


def bit_probabilities(logits: Tensor) -> Tensor:
    """(N, bits) -> (N, bits, 2), of a zero and of a one."""
    return torch.stack([-logits, logits], dim=-1).sigmoid()


def mean_joint_probabilities(logits: Tensor) -> Tensor:
    """The mean over rows of the joint distribution of independent bits, (N, bits) -> (2**bits,),
    indexed by code.

    The joint of a row is the outer product of the joints of its two halves, so its mean is one
    matrix product and nothing larger than N x 2**(bits / 2) is kept.
    """
    high, low = logits.tensor_split(2, dim=1)
    return (_joint(high).T @ _joint(low) / len(logits)).flatten()


def _joint(logits: Tensor) -> Tensor:
    """(N, bits) -> (N, 2**bits)."""
    joint = logits.new_ones(len(logits), 1)
    for pair in bit_probabilities(logits).unbind(1):
        joint = (joint[:, :, None] * pair[:, None, :]).flatten(1)
    return joint


def entropy_of_mean(mean: Tensor) -> Tensor:
    """Entropy in nats of mean probabilities of any shape, averaged over the global batch first.

    The gradient reaches these probabilities at full weight, as averaging gradients over its parts
    expects.
    """
    mean = straight_through(mean, batch_means.batch_mean(mean))
    return -(mean * mean.clamp(min=1e-30).log()).sum()
