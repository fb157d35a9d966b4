"""What codebook quantizers share: gradients past the choice, assignment and its losses, statistics,
restarts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from tokenizer.interface import QuantizerOutput
from tokenizer.quantizers import search_on_cpu
from tokenizer.quantizers.kmeans import kmeans, segment_sums
from tokenizer.quantizers.search import LowRank, half_norms, nearest
from training import batch_means, distributed, randomness

Project = Callable[[Tensor], Tensor]  # (n, d) -> (n, D)


def to_rows(features: Tensor) -> Tensor:
    """(B, C, H, W) -> (B * H * W, C)."""
    return features.movedim(1, -1).flatten(0, -2)


def to_grid(rows: Tensor, shape: Sequence[int]) -> Tensor:
    """(B * H * W, C) -> (B, C, H, W), for a `shape` (B, ..., H, W)."""
    return rows.unflatten(0, (shape[0], *shape[-2:])).movedim(-1, 1)


def finite(rows: Tensor) -> Tensor:
    """Which of rows (N, D) have a code, (N,) bool. Others get -1 from every quantizer, and their
    loss is not finite."""
    return rows.isfinite().all(1)


def straight_through(features: Tensor, vectors: Tensor) -> Tensor:
    """`vectors` in the forward pass, to the last bit; the identity for gradients (Bengio et al.
    2013, arXiv:1308.3432).

    What is returned shares its memory with `vectors`.
    """
    return _StraightThrough.apply(features, vectors)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features: Tensor, vectors: Tensor) -> Tensor:
        return vectors.view_as(vectors)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient, None


def rotate(features: Tensor, vectors: Tensor) -> Tensor:
    """`vectors` (N, D) in the forward pass, to the last bit; backwards the rotation trick
    (arXiv:2410.06424).

    The rotation R and the scale |q| / |e| that take a feature e to its vector q are constants to
    the gradient, (|q| / |e|) R^T g, with R = I - 2 r r^T + 2 q^ e^^T of unit vectors e^, q^ and r
    along e^ + q^ (section 4.2).
    """
    return _Rotation.apply(features, vectors)


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features: Tensor, vectors: Tensor) -> Tensor:
        ctx.save_for_backward(features, vectors)
        return vectors.view_as(vectors)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        features, vectors = ctx.saved_tensors
        scale = vectors.norm(dim=1, keepdim=True) / features.norm(dim=1, keepdim=True).clamp(
            min=1e-6
        )
        e, q = F.normalize(features, dim=1), F.normalize(vectors, dim=1)
        r = F.normalize(e + q, dim=1)
        along_r, along_q = ((gradient * unit).sum(1, keepdim=True) for unit in (r, q))
        return scale * (gradient - 2 * along_r * r + 2 * along_q * e), None


class _Distance(torch.autograd.Function):
    """Mean squared distance of (N, D) rows and vectors, twice: for gradients of the rows, and of
    the vectors."""

    @staticmethod
    def forward(ctx, rows: Tensor, vectors: Tensor):
        difference = rows - vectors
        ctx.save_for_backward(difference)
        distance = torch.linalg.vector_norm(difference, dim=1).square().sum() / difference.numel()
        return distance, distance.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor):
        (difference,) = ctx.saved_tensors
        of_rows, of_vectors = (gradient * (2 / difference.numel()) for gradient in gradients)
        wanted = ctx.needs_input_grad
        return difference * of_rows if wanted[0] else None, difference * -of_vectors if wanted[
            1
        ] else None


class Assignment(nn.Module):
    """Features to their nearest codes, in fp32 whatever the autocast, and what that costs.

    The loss is commitment * |z - sg(e)|^2, and |sg(z) - e|^2 where gradients move the codebook (van
    den Oord et al. 2017, equation 3), as means over elements; in training plus entropy * (mean H(p)
    - H(mean p)).
    """

    def __init__(
        self,
        *,
        learn_codebook: bool,
        cosine: bool,
        commitment: float,
        commitment_warmup_steps: int,
        entropy: float,
        entropy_temperature: float,
        rotation: bool,
    ) -> None:
        """`cosine`: features are brought to unit length; the codebook has to come in unit length,
        too."""
        super().__init__()
        self.learn_codebook, self.cosine, self.rotation = learn_codebook, cosine, rotation
        self.commitment, self.commitment_warmup_steps = commitment, commitment_warmup_steps
        self.entropy, self.entropy_temperature = entropy, entropy_temperature
        warming = commitment_warmup_steps > 0
        self.register_buffer("warmth", torch.tensor(0.0 if warming else 1.0), persistent=warming)

    def forward(
        self,
        features: Tensor,
        codebook: Tensor,
        statistics: Statistics,
        low_rank: LowRank | None = None,
        vectors_of: Callable[[Tensor], Tensor] | None = None,
    ) -> QuantizerOutput:
        """(B, D, H, W) features and a codebook (K, D); `low_rank` are the same features, for a
        cheaper search.

        `vectors_of` gives the vectors of codes, (N,) -> (N, D), where gradients are not to go
        through the codebook.
        """
        with torch.autocast(features.device.type, enabled=False):
            rows = self.rows_of(features)
            if low_rank is not None:  # a row's length does not change which cosine is the largest
                codes = low_rank.nearest(codebook.detach())
            else:
                codes = nearest(rows.detach(), codebook.detach())
            return self.output(rows, codes, codebook, statistics, features.shape, vectors_of)

    def rows_of(self, features: Tensor) -> Tensor:
        """(B, D, H, W) -> (B * H * W, D) float32, what is searched for."""
        rows = to_rows(features.float())
        return F.normalize(rows, dim=1) if self.cosine else rows

    def output(
        self,
        rows: Tensor,
        codes: Tensor,
        codebook: Tensor,
        statistics: Statistics,
        shape: Sequence[int],
        vectors_of: Callable[[Tensor], Tensor] | None = None,
    ) -> QuantizerOutput:
        """What follows from rows (N, D) and their codes (N,), for features of `shape`; called
        without autocast."""
        vectors = embed(codes, codebook) if vectors_of is None else vectors_of(codes)
        if self.learn_codebook:
            distance, moving = _Distance.apply(rows, vectors)
            loss = self.commitment * self.warmth * distance + moving
        else:
            distance = F.mse_loss(rows, vectors.detach())
            loss = self.commitment * self.warmth * distance
        parts = {"commitment": distance}
        if self.training:
            statistics.gather(rows, codes)
            if self.entropy:
                parts["entropy"] = entropy_loss(rows, codebook, self.entropy_temperature)
                loss = loss + self.entropy * parts["entropy"]
        passed = (rotate if self.rotation else straight_through)(rows, vectors.detach())
        codes = codes.unflatten(0, (shape[0], 1, *shape[2:]))
        return QuantizerOutput(
            to_grid(passed, codes.shape), codes, loss, {**parts, **statistics.figures()}
        )

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Set the commitment's weight for the step after this one."""
        if self.commitment_warmup_steps > 0:
            self.warmth.fill_(min(1.0, (step + 1) / self.commitment_warmup_steps))


def build_assignment(config: Any, *, learn_codebook: bool) -> Assignment:
    """The assignment that a quantizer's configuration describes with fields of these names."""
    return Assignment(
        learn_codebook=learn_codebook,
        cosine=config.metric != "l2",
        commitment=config.commitment,
        commitment_warmup_steps=config.commitment_warmup_steps,
        entropy=config.entropy,
        entropy_temperature=config.entropy_temperature,
        rotation=config.rotation,
    )


def embed(codes: Tensor, codebook: Tensor) -> Tensor:
    """Rows of the codebook (K, D), codes (...) -> (..., D); code -1, of features that are not
    finite, meets the first.

    So it is in the other quantizers, too. The training loop skips a step whose loss is not finite.
    """
    return F.embedding(codes.clamp(min=0), codebook)


def entropy_loss(rows: Tensor, codebook: Tensor, temperature: float) -> Tensor:
    """mean_n H(p_n) - H(q), q = mean_n p_n, in nats, of p_nk ~ exp(-|z_n - e_k|^2 / temperature).

    Sure of each code and using all of them makes it small (Yu et al. 2023, arXiv:2310.05737,
    section 3.2). It is -mean_n KL(p_n | q), and its gradient is the same with q held constant: so q
    is measured first, over the global batch, and the sum over n is taken in chunks that are
    computed again in the backward pass.
    """
    chunks = rows.split(max(1, search_on_cpu.BUDGET // len(codebook)))

    def log_p(z: Tensor, codebook: Tensor) -> Tensor:
        return ((z @ codebook.T - half_norms(codebook)) * (2 / temperature)).log_softmax(1)

    def negative_kl(z: Tensor, codebook: Tensor) -> Tensor:
        log_share = log_p(z, codebook)
        return (log_share.exp() * (log_q - log_share)).sum()

    with torch.no_grad():
        q = torch.stack([log_p(z, codebook).exp().sum(0) for z in chunks]).sum(0) / len(rows)
        log_q = batch_means.batch_mean(q).clamp(min=1e-30).log()
    terms = [
        checkpoint(negative_kl, z, codebook, use_reentrant=False, preserve_rng_state=False)
        for z in chunks
    ]
    return torch.stack(terms).sum() / len(rows)


class Usage(nn.Module):
    """How often each code was met: since the last `reduce`, and over the last `window` updates for
    the log."""

    def __init__(self, num_codes: int, dim: int = 0, *, window: int = 100) -> None:
        """`dim`: of sums kept beside the counts."""
        super().__init__()
        self.num_codes, self.dim, self.window = num_codes, dim, window
        self.register_buffer("usage", torch.zeros(num_codes))  # exponentially forgotten counts
        self.totals: list[Tensor] = []  # counts (K,) and sums (K, dim) gathered so far
        self.shared = False  # whether the totals are those of all ranks

    @property
    def counts(self) -> Tensor:
        return self._totals()[0]

    @torch.no_grad()
    def gather(self, codes: Tensor) -> None:
        """Add codes of any shape; -1 is not counted."""
        codes = codes.flatten()
        self._add(
            segment_sums(
                codes.new_empty((len(codes), 0), dtype=torch.float32), codes, self.num_codes
            )
        )

    @torch.no_grad()
    def reduce(self) -> Tensor:
        """Counts (K,) over micro-batches and ranks, the same on every rank; gathering starts
        anew."""
        return self._take()[0]

    def clear(self) -> None:
        self.totals, self.shared = [], False

    def figures(self) -> dict[str, Tensor]:
        """Usage (share of codes met lately) and perplexity, for the log."""
        total = self.usage.sum()
        entropy = torch.special.entr(self.usage / total.clamp(min=1e-9)).sum()
        used = self.usage > total / self.num_codes * 1e-3
        return {"usage": used.float().mean(), "perplexity": entropy.exp()}

    def _add(self, totals: Sequence[Tensor]) -> None:
        if self.totals:
            for total, more in zip(self.totals, totals):
                total.add_(more)
        else:
            self.totals = list(totals)

    def _totals(self) -> list[Tensor]:
        """Zeros where nothing was gathered."""
        return self.totals or [
            self.usage.new_zeros(self.num_codes),
            self.usage.new_zeros(self.num_codes, self.dim),
        ]

    def _take(self) -> list[Tensor]:
        share([] if self.shared else [self])
        totals = self._totals()
        self.usage.mul_(1 - 1 / self.window).add_(totals[0])
        self.clear()
        return totals


class Statistics(Usage):
    """Usage, sums of the features that met each code, and the features themselves for restarts."""

    def __init__(
        self, num_codes: int, dim: int, *, keep_rows: bool = True, window: int = 100
    ) -> None:
        """`dim`: of the sums, 0 for none."""
        super().__init__(num_codes, dim, window=window)
        self.keep_rows = keep_rows
        self.candidates: list[Tensor] = []

    @torch.no_grad()
    def gather(self, rows: Tensor, codes: Tensor) -> None:  # type: ignore[override]
        """Add (N, D) features and their (N,) codes."""
        rows = rows.detach().float()
        self._add(segment_sums(rows[:, : self.dim], codes, self.num_codes))
        if self.keep_rows:
            self.candidates.append(rows)

    def interleave(self, count: int) -> None:
        """Of the last `count` times that features were given: the first of each, the second of
        each, ...

        So their order does not depend on how a batch is cut, where one codebook is met several
        times by it.
        """
        if self.candidates:
            self.candidates[-count:] = [torch.stack(self.candidates[-count:], 1).flatten(0, 1)]

    @torch.no_grad()
    def reduce(self) -> tuple[Tensor, Tensor, Tensor | None]:  # type: ignore[override]
        """(counts (K,), sums (K, D), candidates (M, D) or None); counts and sums are the same on
        every rank."""
        candidates = self.candidates
        counts, sums = self._take()
        return (
            counts,
            sums,
            torch.cat(candidates) if len(candidates) > 1 else next(iter(candidates), None),
        )

    def clear(self) -> None:
        super().clear()
        self.candidates = []


@torch.no_grad()
def share(statistics: Sequence[Usage]) -> None:
    """Sum what was gathered over ranks, in one reduction for all of these."""
    if distributed.world() > 1 and statistics:
        totals = [total for each in statistics for total in each._totals()]
        parts = distributed.sum_(torch.cat([total.flatten() for total in totals])).split(
            [t.numel() for t in totals]
        )
        for each, counts, sums in zip(statistics, parts[::2], parts[1::2]):
            each.totals = [counts, sums.view(each.num_codes, each.dim)]
    for each in statistics:
        each.shared = True


def start_from(
    rows: Tensor,
    num_codes: int,
    seed: int,
    project: Project | None,
    cosine: bool = False,
    *,
    choose: Callable[..., Tensor] = kmeans,
) -> Tensor:
    """A codebook (K, D) from rows (N, D), or from rows (N, d) that `project` maps to (n, D) keeping
    distances."""
    centres = choose(rows, num_codes, seed, cosine=cosine)
    centres = centres if project is None else project(centres).float()
    return F.normalize(centres, dim=1) if cosine else centres


@torch.no_grad()
def revive(
    book: Tensor,
    mean_counts: Tensor,
    candidates: Tensor | None,
    step: int,
    *,
    below: float,
    split: bool = False,
    to_book: Callable[[Tensor], Tensor] = lambda rows: rows,
) -> Tensor:
    """Put new vectors, in place, where a code is used less than `below` times the mean; which codes
    changed, (K,) bool.

    The new vectors are `to_book` of rows of the data (`candidates`, (N, D)), with the mean for
    their count; or, with `split`, copies of the most used codes moved by a hundredth of the book's
    spread, each pair sharing its count; all in one direction, drawn for the step (as in Linde, Buzo
    & Gray 1980).
    """
    mean = mean_counts.mean()
    dead = mean_counts < below * mean
    places = dead.cumsum(0) - 1  # of dead codes, among them
    if not split:
        if candidates is None:
            return torch.zeros_like(dead)
        replace_(
            book, dead, lambda rows: to_book(pick_rows(candidates, len(book), step, places[rows]))
        )
        mean_counts.copy_(torch.where(dead, mean, mean_counts))
        return dead
    dead &= places < len(book) - dead.sum()  # at most one copy of each code that is in use
    order = mean_counts.argsort(descending=True, stable=True)
    parents, ranks = order[places], order.argsort()
    halved = ranks < dead.sum()

    def moved(rows: Tensor) -> Tensor:
        generator = _generator(book.device, step, len(book))
        shift = torch.randn(
            book.shape[1], generator=generator, device=book.device, dtype=book.dtype
        )
        return book[parents[rows]] + 0.01 * book.std(0).mean() * shift

    replace_(book, dead, moved)
    mean_counts.copy_(torch.where(halved, mean_counts / 2, mean_counts))
    mean_counts.copy_(torch.where(dead, mean_counts[parents], mean_counts))
    return dead | halved


@torch.no_grad()
def follow(quantizer: nn.Module, source: nn.Module, names: Sequence[str]) -> None:
    """Copy the rows `source.changed`, (K,) bool, of tensors from one quantizer to another of the
    same shapes."""
    if source.changed is not None:
        for name in names:
            replace_(
                getattr(quantizer, name),
                source.changed,
                lambda rows, name=name: getattr(source, name)[rows],
            )


@torch.no_grad()
def replace_(tensor: Tensor, mask: Tensor, new: Callable[[Tensor], Tensor]) -> None:
    """Put `new` of row numbers (M,), (M, ...), where `mask` (K,) says, in place of rows of `tensor`
    (K, ...)."""
    rows = _numbers_of(mask)
    if len(rows):
        chosen = mask[rows].view(-1, *[1] * (tensor.ndim - 1))
        tensor.index_copy_(0, rows, torch.where(chosen, new(rows), tensor[rows]))


def _numbers_of(mask: Tensor) -> Tensor:
    """Numbers of at least the rows where a mask (K,) holds, (M,): of all on a GPU, not to wait for
    it."""
    rows = torch.arange(len(mask), device=mask.device)
    return rows[mask] if mask.device.type == "cpu" else rows


@torch.no_grad()
def pick_rows(candidates: Tensor, count: int, step: int, places: Tensor | None = None) -> Tensor:
    """`count` of all ranks' candidates, (M, D) per rank -> (count, D): the same whatever the number
    of ranks.

    Ranks hold consecutive shares of the global batch, so a row's global number does not depend on
    their count. `places` (n,) of the `count`, at least -count, choose among them: (n, D).
    """
    total, first = len(candidates) * distributed.world(), len(candidates) * distributed.rank()
    device = candidates.device
    generator = _generator(device, step, count)
    rounds = range(-(-count // total))
    order = torch.cat([torch.randperm(total, generator=generator, device=device) for _ in rounds])[
        :count
    ]
    local = (order if places is None else order[places]) - first
    if distributed.world() == 1:
        return candidates[local]
    mine = (local >= 0) & (local < len(candidates))
    return distributed.sum_(candidates[local.clamp(0, len(candidates) - 1)].mul_(mine[:, None]))


def _generator(device: torch.device, *numbers: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(randomness.mix(*numbers))


def check_positive(**values: float) -> None:
    """Raise ValueError unless each key's value is above 0."""
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"quantizer.{name}={value} must be above 0")


def check_choices(**choices: tuple[str, tuple[str, ...]]) -> None:
    """Raise ValueError unless each key's value is one of what follows it."""
    for name, (value, known) in choices.items():
        if value not in known:
            raise ValueError(f"quantizer.{name}={value!r} is not one of {', '.join(known)}")
