"""k-means on the codebook's search, a chunk of rows at a time, and a bounded sample of a stream of
rows for it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import tokenizer.quantizers.search as search
from training.errors import UserError

CHUNK = 8192  # rows handled at once
SEEDING_ROUNDS = 64
ROWS, ROWS_PER_CODE = 65536, 16
COMMON_ROWS_PER_CODE, COMMON_ROUNDS, FEW = 48, 8, 0.6


def rows_wanted(num_codes: int, per_code: int = 0) -> int:
    """As many rows as k-means reads at most; or so many of each code."""
    return max(ROWS, (per_code or ROWS_PER_CODE) * num_codes)


@torch.no_grad()
def kmeans(
    rows: Tensor, num_codes: int, seed: int, iterations: int | None = None, *, cosine: bool = False
) -> Tensor:
    """Centres of `rows`, (N, D) -> (num_codes, D): seeding in rounds, then Lloyd's iterations (10;
    3 above 8192 codes).

    A round draws rows in proportion to their squared distance from the centres so far: one at a
    time up to 65 codes, which is k-means++ (Arthur & Vassilvitskii 2007), and several at once above
    (Bahmani et al. 2012, arXiv:1203.6402). Of more than `rows_wanted`, as many are drawn by `seed`.
    A centre that loses its rows moves to the row that is worst represented. With fewer rows than
    codes the rows are repeated with noise of a hundredth of their spread. `cosine`: rows are
    brought to unit length. Raises ValueError for rows that are not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = _enough(rows, num_codes, generator, cosine)
    if len(rows) > rows_wanted(num_codes):
        rows = rows[
            torch.randperm(len(rows), generator=generator)[: rows_wanted(num_codes)].to(rows.device)
        ]
    centres, codes, distances = _seed_centres(rows, num_codes, generator, cosine)
    for iteration in range(iterations or (10 if num_codes <= 8192 else 3)):
        if iteration:
            codes, distances = _nearest(rows, centres, cosine)
        counts, centres = torch.zeros_like(centres[:, 0]), torch.zeros_like(centres)
        for part, part_codes in zip(rows.split(CHUNK), codes.split(CHUNK)):
            more, sums = segment_sums(_seen(part, cosine), part_codes, num_codes)
            counts += more
            centres += sums
        centres /= counts.clamp(min=1)[:, None]
        worst = distances.topk(int((counts == 0).sum())).indices
        centres[counts == 0] = _seen(rows[worst], cosine)
    return centres


@torch.no_grad()
def common(
    rows: Tensor, num_codes: int, seed: int, images: Tensor | None = None, *, cosine: bool = False
) -> Tensor:
    """Codes that many images have, from `rows`, (N, D) -> (num_codes, D): rows at random, then
    rounds of moves.

    Row i is of the image numbered `images[i]`, or of its own. A round counts for each code the
    images that meet it, and moves those below FEW of the mean: half the way from another code to
    one of its rows, which are drawn in proportion to how far above the mean the images are that
    meet that code. k-means prefers what a single image has, however often: it lowers the error, and
    no image but that one meets the code. Fewer rows than codes, or bad ones, as in `kmeans`.
    """
    generator = torch.Generator().manual_seed(seed)
    too_few = len(rows) < num_codes
    rows = _enough(rows, num_codes, generator, cosine)
    centres = _seen(
        rows[torch.randperm(len(rows), generator=generator)[:num_codes].to(rows.device)], cosine
    )
    if too_few:
        return centres
    images = torch.arange(len(rows), device=rows.device) if images is None else images
    for _ in range(COMMON_ROUNDS):
        codes = _nearest(rows, centres, cosine)[0]
        met = torch.bincount(
            torch.unique(images * num_codes + codes) % num_codes, minlength=num_codes
        ).float()
        few = (met < FEW * met.mean()).nonzero()[:, 0]
        if not len(few):
            break
        weights = (
            (met / met.mean() - 1).clamp(min=0) / torch.bincount(codes, minlength=num_codes)
        )[codes]
        race = torch.empty(len(rows)).exponential_(generator=generator).to(rows.device)
        few = few[: int((weights > 0).sum())]
        chosen = (weights / race).topk(len(few)).indices
        parents = centres[codes[chosen]]
        centres[few] = _seen(parents + (_seen(rows[chosen], cosine) - parents) / 2, cosine)
    return centres


@torch.no_grad()
def segment_sums(rows: Tensor, codes: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """How many of (N, D) rows have each code, (K,), and the sums of these rows, (K, D); code -1 is
    not counted.

    Rows are sorted by code and each code's are added in their order: repeatable on every device,
    and as fast as `index_add_` on a CPU. No shape depends on the codes, so that no GPU is waited
    for.
    """
    codes = codes % (num_codes + 1)  # -1 comes last
    counts = codes.new_zeros(num_codes + 1).scatter_add_(0, codes, torch.ones_like(codes))
    if rows.shape[1]:
        first = counts.cumsum(0) - counts
        sums = F.embedding_bag(codes.argsort(stable=True), rows.float(), first, mode="sum")[:-1]
    else:  # only the counts are wanted
        sums = rows.new_zeros((num_codes, 0), dtype=torch.float32)
    return counts[:-1].float(), sums


class Reservoir:
    """At most `size` rows of a stream, each equally likely, drawn by seed (Vitter 1985, algorithm
    R).

    They are the same however the stream is cut into batches, and all of it, in order, where it is
    no longer.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.length = size, 0  # of the sample, of the stream
        self.generator = torch.Generator().manual_seed(seed)
        self._rows, self._places = torch.empty(0), torch.full((size,), -1)

    @property
    def rows(self) -> Tensor:
        """(M, D) float32."""
        return self._rows[: self.length]

    @property
    def places(self) -> Tensor:
        """Each row's number in the stream, (M,) int64, on the CPU."""
        return self._places[: self.length]

    @torch.no_grad()
    def add(self, rows: Tensor) -> None:
        """(n, D), the next of the stream."""
        if not self.length:
            self._rows = torch.empty((self.size, rows.shape[1]), device=rows.device)
        places = torch.arange(self.length, self.length + len(rows))
        drawn = torch.rand(len(rows), generator=self.generator, dtype=torch.float64) * (places + 1)
        slots = torch.where(
            places < self.size, places, drawn.long()
        )  # row i takes the place of one of 0 ... i
        taken = slots < self.size
        self._places.scatter_reduce_(
            0, slots[taken], places[taken], "amax"
        )  # the last of those for one place
        fresh = (self._places >= self.length).nonzero()[:, 0]
        self._rows[fresh.to(rows.device)] = rows[
            (self._places[fresh] - self.length).to(rows.device)
        ].float()
        self.length += len(rows)


def _enough(rows: Tensor, num_codes: int, generator: torch.Generator, cosine: bool) -> Tensor:
    """Rows, and so many repeated with noise that there is one for each code."""
    bad = sum(int((~part.isfinite()).any(1).sum()) for part in rows.split(CHUNK))
    if bad:
        raise UserError(
            f"codebook: {bad} of {len(rows)} features are not finite: look at the encoder and its "
            "images"
        )
    if len(rows) >= num_codes:
        return rows
    rows = _seen(rows, cosine)
    extra = torch.randint(len(rows), (num_codes - len(rows),), generator=generator)
    noise = torch.randn((len(extra), rows.shape[1]), generator=generator).to(rows)
    return torch.cat(
        [rows, rows[extra.to(rows.device)] + 0.01 * rows.std(0, correction=0).mean() * noise]
    )


def _seed_centres(
    rows: Tensor, num_codes: int, generator: torch.Generator, cosine: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """`num_codes` different rows, and which of them is nearest to each row, at what squared
    distance.

    The largest d_i / E_i, of exponential E_i, are a draw in proportion to d_i, without repetition.
    """
    drawn = torch.randint(len(rows), (1,), generator=generator).to(rows.device)
    chosen = torch.empty(0, dtype=torch.int64, device=rows.device)
    codes = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    distances = torch.full((len(rows),), float("inf"), device=rows.device)
    for share in [*filter(len, torch.arange(1, num_codes).chunk(SEEDING_ROUNDS)), ()]:
        nearest, fresh = _nearest(rows, _seen(rows[drawn], cosine), cosine)
        codes = torch.where(fresh < distances, nearest + len(chosen), codes)
        distances = torch.minimum(distances, fresh)
        chosen = torch.cat([chosen, drawn])
        race = torch.empty(len(rows)).exponential_(generator=generator).to(rows.device)
        drawn = (distances / race).index_fill_(0, chosen, -1.0).topk(len(share)).indices
    return _seen(rows[chosen], cosine), codes, distances


def _nearest(rows: Tensor, centres: Tensor, cosine: bool) -> tuple[Tensor, Tensor]:
    """Codes (N,) and squared distances |z_n - e_k(n)|^2, (N,)."""
    parts = []
    for part in rows.split(CHUNK):
        part = _seen(part, cosine)
        codes = search.nearest(part, centres)
        parts.append((codes, (part - centres[codes]).square().sum(1)))
    codes, distances = zip(*parts)
    return torch.cat(codes), torch.cat(distances)


def _seen(rows: Tensor, cosine: bool) -> Tensor:
    """Rows as k-means sees them."""
    return F.normalize(rows.float(), dim=1) if cosine else rows.float()
