"""Exact nearest neighbours on a CPU, without an N x K matrix: scored in chunks, decided in float64.

A score is half a squared distance less what all codes share, o_k - <z, e_k> with o_k = |e_k|^2 / 2.
A product in low precision (8-bit integers, bf16, or fp32 itself) scores all codes for some rows; a
bound on its error (Cauchy-Schwarz on what its rounding took away, and gamma_D = D u for sums,
Higham 2002, section 3.1) says which codes can still be the nearest. These are compared in fp32, and
what fp32 cannot tell apart in float64. So the answer does not depend on chunks, threads or the
precision of the product.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

BUDGET = 6 << 20  # scores held at once, 24 MiB in fp32
CACHED = 2 << 20  # the same where a score costs so little that it should not leave the cache
LEAST_ROWS = 32  # that a product takes, also where their scores are more
TILE = 64  # codes that are looked at together
MANY = (
    64  # tiles that may hold the nearest code: with more, a row is searched again, more precisely
)
FEW = 128  # rows for which a float64 search costs less than another product's copy of the codebook
OPEN = -2  # the code of a row that is to be searched again
UNIT = 2.0**-24  # roundoff of fp32
TINY = 2.0**-126  # smaller products may be flushed to zero
# length of the longest code, below which squares of what rounding takes away would vanish
LEAST = 1e-15
CANDIDATES = 256  # codes that may be the nearest: with more, as with more tiles than MANY
COARSE_DIM, COARSE_WORK = (
    256,
    1 << 33,
)  # channels, and multiplications, from which low precision gains


def half_norms(codebook: Tensor) -> Tensor:
    """|e_k|^2 / 2, (K, D) -> (K,)."""
    return torch.linalg.vector_norm(codebook, dim=1).square() / 2


def on_cpu(features: Tensor, codebook: Tensor, offsets: Tensor | None) -> Tensor:
    """One search in fp32, (N, D), (K, D), (K,) -> (N,)."""
    codes = features.new_full((len(features),), OPEN, dtype=torch.int64)
    book = Book.of(codebook, offsets)
    todo, rows = torch.arange(len(features)), features
    for place, kind in enumerate(choose_products(len(features), book) if book.fits() else ()):
        if len(todo) > (FEW if place else 0):
            with full_precision():
                product = kind(book)
                parts = [_search(part, book, product) for part in rows.split(book.rows_at_once())]
                del product
            codes[todo] = torch.cat(parts)
            todo = (codes == OPEN).nonzero()[:, 0]
            rows = features[todo]
    if len(todo):
        codes[todo] = in_float64(rows, codebook, offsets)
    return codes


@dataclasses.dataclass(frozen=True)
class Book:
    """A codebook less its mean, because bounds grow with lengths, and filled up to whole tiles.

    Filled, because a matrix product may round its last columns in another way: equal codes have to
    score equally.
    """

    codebook: Tensor  # (K, D), as it was given
    given: Tensor | None  # its offsets (K,), as they were given
    shift: Tensor  # (D,), the mean code
    offsets: Tensor  # (K',), of the codes less their mean; infinite from K on
    radius: Tensor  # (), of the longest code
    largest: Tensor  # (), of the given offsets, in absolute value

    @classmethod
    def of(cls, codebook: Tensor, offsets: Tensor | None) -> Book:
        shift = codebook.mean(0)
        lengths = torch.cat(
            [torch.linalg.vector_norm(part - shift, dim=1) for part in codebook.split(TILE * 16)]
        )
        padded = lengths.square() / 2 if offsets is None else offsets
        largest = padded.abs().max() if offsets is not None else padded.new_zeros(())
        padded = F.pad(padded, (0, -len(codebook) % TILE), value=torch.inf)
        return cls(codebook, offsets, shift, padded, lengths.max(), largest)

    def fits(self) -> bool:
        """Whether all bounds hold: what is given is finite, and squares neither overflow nor
        vanish."""
        finite = 2 * self.radius.square() + self.largest < torch.inf
        return bool(finite & ((self.radius >= LEAST) | (self.codebook == self.shift).all()))

    def parts(self) -> Iterator[tuple[slice, Tensor]]:
        """The centred codes in pieces, and the places of each among all (K,)."""
        for start in range(0, len(self.codebook), TILE * 16):
            part = self.codebook[start : start + TILE * 16] - self.shift
            yield slice(start, start + len(part)), part

    def rows_at_once(self) -> int:
        """That are scored together: more of them where a product's own work, not memory, takes the
        time."""
        budget = BUDGET if self.codebook.shape[1] >= COARSE_DIM else min(BUDGET, CACHED)
        return max(LEAST_ROWS, budget // len(self.offsets))

    def centre(self, rows: Tensor) -> Tensor:
        """Rows less the shift, where that changes all scores of a row alike."""
        return rows - self.shift if self.given is None else rows

    def rounding(self, lengths: Tensor) -> Tensor:
        """How far a score computed in fp32 may be from the true one, for rows of these lengths,
        (n,) -> (n,)."""
        dim = len(self.shift)
        lengthy = (
            self.radius * (lengths + self.radius) * ((dim + 8) * UNIT)
        )  # infinite where a score may be
        # Some devices take numbers below TINY for 0, of factors and of their products.
        return lengthy + (4 * UNIT * self.largest + dim * TINY * (1 + self.radius + lengths))

    def score(self, z: Tensor, row: Tensor, code: Tensor) -> Tensor:
        """Scores in fp32 of pairs of a centred row and a code, (P,) each, rows ascending and codes
        in a row -> (P,).

        A product with no more entries than there are pairs; codes as they were given, so
        `rerounding` bounds it.
        """
        first = F.pad(torch.bincount(row, minlength=len(z)).cumsum(0), (1, 0))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # sparse tensors are called a beta
            shape = (len(z), len(self.codebook))
            wanted = torch.sparse_csr_tensor(
                first, code, z.new_zeros(len(code)), shape, check_invariants=False
            )
            products = torch.sparse.sampled_addmm(wanted, z, self.codebook.T, beta=0.0).values()
        return self.offsets[code] - (products - (z @ self.shift)[row])

    def rerounding(self, lengths: Tensor) -> Tensor:
        """The error of `score`, as `rounding` is that of a product with centred codes."""
        extra = 2 * (len(self.shift) + 8) * UNIT * torch.linalg.vector_norm(self.shift) * lengths
        return self.rounding(lengths) + extra

    def exact_score(self, rows: Tensor, row: Tensor, code: Tensor) -> Tensor:
        """The same in float64 and of the vectors as they were given."""
        scores = []
        for n, k in zip(*(index.split(_pairs_at_once(rows)) for index in (row, code))):
            z, e = rows[n].double(), self.codebook[k].double()
            if self.given is None:
                scores.append((z - e).square_().sum(1) / 2)
            else:
                scores.append(self.given[k].double() - (z * e).sum(1))
        return torch.cat(scores)


class _Product(Protocol):
    """Scores of centred rows z (n, D) with all codes."""

    exact: bool  # as fp32 is

    def __init__(self, book: Book) -> None: ...

    def scores(self, z: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor | float]: ...

    # (n, K'), and how far they may be from those of fp32, (n,); they are valid until the next call


class InFloat32:
    """One product, in which the offsets are a further channel."""

    exact = True

    def __init__(self, book: Book) -> None:
        self.codes = torch.zeros(len(book.offsets), len(book.shift) + 1)
        for places, part in book.parts():
            self.codes[places, :-1] = part
        self.codes[:, -1] = book.offsets
        at_once = book.rows_at_once()
        self.rows, self.buffer = (
            torch.ones(at_once, len(book.shift) + 1),
            torch.empty(at_once * len(self.codes)),
        )

    def scores(self, z: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor | float]:
        rows, scores = self.rows[: len(z)], self.buffer[: len(z) * len(self.codes)]
        torch.neg(z, out=rows[:, :-1])
        if 8 * len(z) > len(self.codes):
            return torch.mm(rows, self.codes.T, out=scores.view(len(z), -1)), 0.0
        return torch.mm(
            self.codes, rows.T, out=scores.view(-1, len(z))
        ).T, 0.0  # faster where codes are many


class InBFloat16:
    """Factors and products rounded to 8 bits, sums in fp32."""

    exact = False

    def __init__(self, book: Book) -> None:
        self.offsets, self.radius = book.offsets, book.radius
        self.codes = torch.zeros(len(book.offsets), len(book.shift), dtype=torch.bfloat16)
        self.lost = 0.0
        for places, part in book.parts():
            self.codes[places] = part
            self.lost = max(self.lost, _longest(part - self.codes[places]))

    def scores(self, z: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor | float]:
        rounded = z.bfloat16()
        lost = torch.linalg.vector_norm(z - rounded, dim=1)
        reach = self.radius + self.lost  # of a rounded code
        slack = lost * reach + lengths * self.lost + 2.0**-8 * (lengths + lost) * reach
        return self.offsets - (rounded @ self.codes.T).float(), slack


class InInt8:
    """Rows in 7 bits and codes in 8, each with its own scale: the sum of two products fits into 16
    bits."""

    exact = False

    def __init__(self, book: Book) -> None:
        self.offsets, self.lost, self.reach = book.offsets, 0.0, 0.0
        codes = torch.zeros(len(book.offsets), len(book.shift), dtype=torch.int8)
        self.scales = torch.ones(len(codes))
        for places, part in book.parts():
            scale = part.abs().amax(1, keepdim=True).clamp_(min=TINY).div_(127)
            whole = (part / scale).round_()
            codes[places], self.scales[places] = whole, scale[:, 0]
            rounded = whole.mul_(scale)
            self.reach = max(self.reach, _longest(rounded))
            self.lost = max(self.lost, _longest(part.sub_(rounded)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of an API that newer versions may lack
            codes = torch._make_per_tensor_quantized_tensor(codes, 1.0, 0)
        self.packed = torch.ops.quantized.linear_prepack(codes, None)

    def scores(self, z: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor | float]:
        scale = z.abs().amax(1, keepdim=True).clamp(min=TINY) / 63
        whole = (z / scale).round_()
        product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            whole, 1.0, 64, self.packed
        )
        lost = torch.linalg.vector_norm(z - whole.mul_(scale), dim=1)
        slack = lost * self.reach + lengths * self.lost + 8 * UNIT * (lengths + lost) * self.reach
        return torch.addcmul(
            self.offsets, product.mul_(self.scales), scale, value=-1, out=product
        ), slack


def choose_products(num_rows: int, book: Book) -> list[type[_Product]]:
    """What is fastest for this size on this processor, and then what decides the rows that it left
    open."""
    num_codes, dim = book.codebook.shape
    if dim >= COARSE_DIM and num_rows * num_codes * dim >= COARSE_WORK:
        if any(
            getattr(torch.cpu, f"_is_{name}_supported", bool)()
            for name in ("avx512_bf16", "amx_tile")
        ):
            return [InBFloat16, InFloat32]
        if torch.backends.quantized.engine in ("x86", "fbgemm") and hasattr(
            torch, "_make_per_tensor_quantized_tensor"
        ):
            return [InInt8, InFloat32]
    return [InFloat32]


def _search(rows: Tensor, book: Book, product: _Product) -> Tensor:
    """(n, D) -> (n,), by short lists of the codes that can be nearest; OPEN where a list would be
    long."""
    z = book.centre(rows)
    lengths = torch.linalg.vector_norm(z, dim=1)
    scores, slack = product.scores(z, lengths)
    tiles = scores.unflatten(1, (-1, TILE))
    if (
        scores.is_contiguous()
    ):  # the lowest of each tile, (n, K' / TILE), along the scores as they lie in memory
        lowest = tiles.amin(2)
    else:
        lowest = scores.T.unflatten(0, (-1, TILE)).amin(1).T.contiguous()
    if product.exact:
        limit = lowest.amin(1) + 2 * book.rounding(lengths)
    else:  # what the likeliest code really scores: the nearest scores no more
        tile = lowest.argmin(1)
        each = torch.arange(len(z))
        code = tile * TILE + tiles[each, tile].argmin(1)
        best = book.score(z, each, code.clamp(max=len(book.codebook) - 1))
        limit = best + slack + book.rounding(lengths) + book.rerounding(lengths)
    limit = limit.where(
        limit.isfinite(), torch.nan
    )  # where something is not finite, or too long, no code is listed
    row, tile = (lowest <= limit[:, None]).nonzero(as_tuple=True)
    num_tiles = torch.bincount(row, minlength=len(z))
    row, tile = _of_short(num_tiles <= MANY, row, tile)
    listed = tiles[row, tile] <= limit[row, None]
    num_codes = torch.zeros_like(num_tiles).index_add_(0, row, listed.sum(1))
    row, tile, listed = _of_short(num_codes <= CANDIDATES, row, tile, listed)
    pair, place = listed.nonzero(as_tuple=True)
    row, code = row[pair], tile[pair] * TILE + place
    if not product.exact:
        row, code = _keep_lowest(row, code, book.score(z, row, code), 2 * book.rerounding(lengths))
    several = torch.bincount(row, minlength=len(z))[row] > 1
    if several.any():
        pairs, exactly = (
            (row[several], code[several]),
            torch.zeros_like(lengths, dtype=torch.float64),
        )
        pairs = _keep_lowest(*pairs, book.exact_score(rows, *pairs), exactly)
        row, code = (torch.cat([own[~several], kept]) for own, kept in zip((row, code), pairs))
    return row.new_full((len(z),), OPEN).scatter_reduce(0, row, code, "amin", include_self=False)


def _of_short(short: Tensor, row: Tensor, *others: Tensor) -> list[Tensor]:
    """Those entries of lists of rows (P,), and what belongs to them, whose row is `short` (n,)."""
    kept = slice(None) if short.all() else short[row]
    return [each[kept] for each in (row, *others)]


def _keep_lowest(
    row: Tensor, code: Tensor, scores: Tensor, margin: Tensor
) -> tuple[Tensor, Tensor]:
    """Those pairs whose score is within the row's `margin` (n,) of the lowest of the row."""
    lowest = torch.full_like(margin, torch.inf, dtype=scores.dtype).scatter_reduce(
        0, row, scores, "amin"
    )
    kept = scores <= (lowest + margin)[row]
    return row[kept], code[kept]


def in_float64(rows: Tensor, codebook: Tensor, offsets: Tensor | None) -> Tensor:
    """The whole search in float64, for what fp32 cannot hold or tell apart, (n, D) -> (n,). Waits
    for no device.

    A product may round equal codes in different ways: the lowest index within the error of the best
    is taken.
    """
    found, height = [], TILE * 16
    for part in rows.split(BUDGET // (4 * height)):
        z, count = part.double(), len(codebook)
        lengths = torch.linalg.vector_norm(z, dim=1)
        best, own = (
            z.new_full((len(z),), torch.inf),
            rows.new_full((len(z),), count, dtype=torch.int64),
        )
        for finds in (
            False,
            True,
        ):  # the least upper bound of a score first, then who may be below it
            for start in range(0, count, height):
                e = codebook[start : start + height].double()
                o = (
                    e.square().sum(1) / 2
                    if offsets is None
                    else offsets[start : start + height].double()
                )
                error = torch.outer(lengths, torch.linalg.vector_norm(e, dim=1)).add_(o.abs())
                scores, error = o - z @ e.T, error.mul_((z.shape[1] + 8) * 2.0**-52)
                if finds:
                    places = torch.arange(start, start + len(e), device=rows.device)
                    near = (scores - error <= best[:, None]) & scores.isfinite()
                    own = torch.minimum(own, places.where(near, count).amin(1))
                else:
                    bound = (scores + error).nan_to_num_(
                        nan=torch.inf, posinf=torch.inf, neginf=torch.inf
                    )
                    best = torch.minimum(best, bound.amin(1))
        found.append(own.where((own < count) & best.isfinite(), -1))
    codes = torch.cat(found) if found else rows.new_zeros(0, dtype=torch.int64)
    return codes.where(rows.isfinite().all(1), -1)


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """No tf32 or bf16 in products of fp32 numbers, whatever the process has allowed elsewhere."""
    settings = (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul)
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        yield
    finally:
        for setting, precision in zip(settings, before):
            setting.fp32_precision = precision


def _pairs_at_once(rows: Tensor) -> int:
    return max(1, BUDGET // (4 * rows.shape[1]))


def _longest(rows: Tensor) -> float:
    return float(torch.linalg.vector_norm(rows, dim=1).max())
