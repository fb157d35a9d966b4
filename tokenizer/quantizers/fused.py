"""Exact nearest codes on a GPU in Triton: a short-list on tensor cores, a decision in fp64, a
certificate per row.

A product in half precision keeps the best codes of a row in registers, as attention without its
matrix keeps a running sum (Rabe & Staats 2021, arXiv:2112.05682). Codes are kept by a lower bound
of their exact score, so that a row whose last kept bound lies above its best exact score cannot
have lost the winner; the others are searched in fp32.

Score of row x and code c of offset o, both less a centre m: o - <x - m, c - m>. Powers of two bring
it to a range where nothing overflows or vanishes: X = (x - m) 2^-e, C = (c - m) 2^-f, score = o -
<X, C> 2^(e+f). The product of the rounded X', C' is wrong by, Cauchy-Schwarz, and as tensor cores
truncate (Fasi et al. 2021, doi:10.7717/peerj-cs.330) with two units of fp32 for each of D
additions,
    |<X, C> - fl<X', C'>| <= |X - X'| |C| + |X'| |C - C'| + D 2^-22 |X'| |C'|.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:  # no Triton for this platform: `available` says so, and no kernel is called

    def jit(kernel):
        return kernel

    triton = tl = None

COARSE = {"fp16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32}
DROPPED = {"fp16": 13, "bf16": 16, "tf32": 13}  # bits of fp32
GROUP = 4  # rows that a program rounds or decides
KEPT = 8  # codes kept for a row; a power of two
MAX_SPLITS = 64  # of the codes among programs, where rows are few
BUDGET = 1 << 27  # bytes beyond the codebook's copy
TOP = 100  # scores reach 2^100, and are told apart down to 2^-100
RANGE = 2.0**-10  # codes shorter than this part of the longest are bounded as if they were so long
GAMMA = 2.0**-22  # for each addition of a product
CENTRE_CODES = 1024  # whose mean is the centre


class Tiles(NamedTuple):
    """What a program holds: rows x codes of scores, `depth` entries of each at a time."""

    rows: int
    codes: int
    depth: int
    warps: int
    stages: int
    resident: int  # programs on a multiprocessor at once


class Search(NamedTuple):
    codes: Tensor  # (N,) int64, -1 for a row that is not finite
    rechecked: Tensor  # () int32, rows that were searched in fp32


def available(device: torch.device) -> bool:
    """Whether kernels run there: CUDA of capability 8.0 and above, or anywhere under
    TRITON_INTERPRET=1."""
    if triton is None or triton.knobs.runtime.interpret:
        return triton is not None
    return (
        device.type == "cuda"
        and not torch.version.hip
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def nearest_fused(
    features: Tensor, codebook: Tensor, offsets: Tensor | None = None, *, coarse: str = "fp16"
) -> Tensor:
    """Index of the code nearest in L2, (N, D) and (K, D) -> (N,) int64; equal codes give the lowest
    index.

    With `offsets` (K,) it is argmin_k offsets_k - <x_n, c_k> instead. The answer is that of float64
    on the fp32 inputs, except where more than eight codes tie in fp32, for every `coarse`, the
    precision of the first product: "fp16", "bf16" and "tf32" run on tensor cores, "ieee" is the
    fp32 search of all rows. As fast as bf16, fp16 has an eighth of its error (scales keep it in
    range). A row that is not finite gets -1; a code that is not, by entry or offset, is never
    chosen. A common mean is taken off, unless offsets are given. The host is never synchronised.
    Call it once before capturing a CUDA graph: kernels are compiled at their first call.
    """
    if coarse not in (*COARSE, "ieee"):
        raise ValueError(f"coarse={coarse!r} is none of {', '.join(COARSE)}, ieee")
    given = [features, codebook] if offsets is None else [features, codebook, offsets]
    if (
        not len(codebook)
        or codebook.shape[1] != features.shape[1]
        or given[-1].shape[0] != len(codebook)
    ):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in given)
        raise ValueError(
            f"features, codebook, offsets are {shapes}: give (N, D), (K, D), (K,), with K at least "
            "1"
        )
    with torch.no_grad():
        return _nearest(
            features.detach(),
            codebook.detach(),
            None if offsets is None else offsets.detach(),
            coarse,
        )


@torch.library.custom_op("tessera::nearest_fused", mutates_args=())
def _nearest(features: Tensor, codebook: Tensor, offsets: Tensor | None, coarse: str) -> Tensor:
    return search(features, codebook, offsets, coarse).codes


@_nearest.register_fake
def _(features: Tensor, codebook: Tensor, offsets: Tensor | None, coarse: str) -> Tensor:
    return features.new_empty(features.shape[0], dtype=torch.int64)


def search(
    features: Tensor,
    codebook: Tensor,
    offsets: Tensor | None,
    coarse: str,
    tiles: Tiles | None = None,
    chunk: int = 0,
) -> Search:
    """`nearest_fused` outside the operator, with the count of rows that needed fp32; given tiles
    and rows at a time."""
    with torch.cuda.device_of(features):
        codebook = Codes(codebook.float().contiguous(), offsets, coarse)
        row_bytes = 4 * codebook.width + 8 * KEPT + 64
        parts = features.split(chunk or max(1, BUDGET // row_bytes)) if len(features) else ()
        found = [_search_rows(rows.float().contiguous(), codebook, coarse, tiles) for rows in parts]
        codes = [part.codes for part in found] or [features.new_empty(0, dtype=torch.int64)]
        rechecked = sum(
            (part.rechecked for part in found),
            torch.zeros((), dtype=torch.int32, device=features.device),
        )
        return Search(torch.cat(codes), rechecked)


class Codes:
    """The codebook's side of a search: (K, D) fp32, offsets, and for a coarse product its rounded
    copy and bounds."""

    def __init__(self, values: Tensor, offsets: Tensor | None, coarse: str):
        self.values, self.width = values, _width(values.shape[1])
        self.centre = _centre(values) if offsets is None else torch.zeros_like(values[0])
        peaks, half_norms = _measure(values, self.centre)
        offsets = half_norms if offsets is None else offsets.double()
        valid = peaks.isfinite() & offsets.isfinite()  # (K,)
        self.exponent = _exponent(peaks.where(valid, 0).amax())  # f
        self.scales = (
            _power(-self.exponent) * valid
        )  # (K,) 2^-f, or 0 for a code that is never chosen
        self.exact_offsets = offsets.where(valid, float("inf"))  # fp64
        self.offset_exponent = torch.frexp(offsets.abs().where(valid, 0).amax()).exponent  # h
        self.offsets = (self.exact_offsets * _power64(TOP - self.offset_exponent)).float()
        if coarse in COARSE:
            self.rounded, norms, residuals = _round(
                values, self.centre, self.scales, self.width, coarse
            )
            # |C|, at least a thousandth of the longest so that |C - C'| can be bounded in parts of
            # it: (K,), ()
            self.reaches = norms.maximum(norms.amax() * RANGE).clamp(min=2.0**-100)
            self.relative_residual = (residuals / self.reaches).amax()
            self.lower_offsets = (self.offsets - self.offsets.abs() * 2.0**-21).where(
                valid, float("inf")
            )


def _search_rows(rows: Tensor, codebook: Codes, coarse: str, tiles: Tiles | None) -> Search:
    num_rows, (num_codes, depth) = len(rows), codebook.values.shape
    peaks, _ = _measure(rows, codebook.centre)
    finite = peaks.isfinite()  # (N,)
    exponents = _exponent(peaks.where(finite, 0))  # e
    scales = _power(-exponents) * finite  # 2^-e, or 0 for a row that gets no code
    above = (
        exponents + codebook.exponent - codebook.offset_exponent
    )  # e + f - h: the larger side reaches the top
    weights = _power((-above).clamp(-126, 0))  # of the offsets, and
    units = _power((TOP + above).clamp(-126, TOP))  # of <X, C>, in score * range
    ranges = _power64(TOP - above.clamp(min=0) - codebook.offset_exponent)

    codes = torch.full((num_rows,), -1, dtype=torch.int64, device=rows.device)
    order = torch.arange(num_rows, dtype=torch.int32, device=rows.device)
    count = torch.full((), num_rows, dtype=torch.int32, device=rows.device)
    for precision in dict.fromkeys((coarse, "ieee")):
        if (
            precision == "ieee"
        ):  # rounded as it is read; kept by score, since no other search follows
            errors = torch.zeros_like(units)
            left, right, offsets, reaches = (
                rows,
                codebook.values,
                codebook.offsets,
                codebook.offsets,
            )
        else:
            left, norms, residuals = _round(
                rows, codebook.centre, scales, codebook.width, precision
            )
            gamma, relative = GAMMA * (codebook.width + 4), codebook.relative_residual
            errors = residuals + (norms + residuals) * (relative + gamma * (1 + relative))
            errors = errors * units * 1.01  # what rounding the norms and this line may lose
            right, offsets, reaches = codebook.rounded, codebook.lower_offsets, codebook.reaches
        tile = tiles or _tiles(rows.device, precision, depth)
        programs = tile.resident * _multiprocessors(rows.device)
        found = rows.new_empty(
            (max(triton.cdiv(num_rows, tile.rows), programs), tile.rows, KEPT), dtype=torch.int64
        )
        shape = dict(ROWS=tile.rows, CODES=tile.codes, KEPT=KEPT, MAX_SPLITS=MAX_SPLITS)
        _shortlist[(programs,)](
            left,
            right,
            codebook.centre,
            offsets,
            reaches,
            order,
            count,
            scales,
            codebook.scales,
            weights,
            units,
            errors,
            found,
            num_codes,
            left.shape[1],
            PRECISION=precision,
            DEPTH=tile.depth,
            **shape,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        doubtful, rechecked = torch.empty_like(order), torch.zeros_like(count)
        _decide[(triton.cdiv(num_rows, GROUP),)](
            found,
            order,
            count,
            rows,
            codebook.values,
            codebook.centre,
            codebook.exact_offsets,
            scales,
            ranges,
            codes,
            doubtful,
            rechecked,
            num_codes,
            depth,
            programs,
            FINAL=precision == "ieee",
            DEPTH=min(256, triton.next_power_of_2(depth)),
            GROUP=GROUP,
            **shape,
        )
        if precision != "ieee":
            order, count = doubtful, rechecked
    return Search(codes, count)


def _centre(codebook: Tensor) -> Tensor:
    """The mean of some codes, (D,), where it leaves them half as large; else 0, which an outlier
    cannot move."""
    some = codebook[:CENTRE_CODES]
    mean = some.mean(0)
    return mean.where((some - mean).abs().amax() <= some.abs().amax() / 2, 0)


def _measure(values: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """max_i |v_i - m_i|, infinite where v is not finite, and |v - m|^2 / 2, of (N, D): (N,)
    fp64."""
    peaks, half_norms = values.new_empty((2, len(values)), dtype=torch.float64)
    block = min(256, triton.next_power_of_2(values.shape[1]))
    _measure_rows[(triton.cdiv(len(values), GROUP),)](
        values, centre, peaks, half_norms, *values.shape, GROUP=GROUP, BLOCK=block
    )
    return peaks, half_norms


def _round(
    values: Tensor, centre: Tensor, scales: Tensor, width: int, coarse: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(values - centre) * scales rounded, (N, width) filled up with 0; norms before, and of what
    was lost, (N,)."""
    interpreted = coarse == "bf16" and not values.is_cuda  # whose products do not know bf16
    dtype = torch.float32 if interpreted else COARSE[coarse]
    rounded = values.new_empty((len(values), width), dtype=dtype)
    norms, residuals = torch.empty_like(scales), torch.empty_like(scales)
    _round_rows[(triton.cdiv(len(values), GROUP),)](
        values,
        centre,
        scales,
        rounded,
        norms,
        residuals,
        *values.shape,
        width,
        DROPPED=DROPPED[coarse],
        GROUP=GROUP,
        BLOCK=min(512, triton.next_power_of_2(width)),
    )
    return rounded, norms, residuals


def _exponent(peak: Tensor) -> Tensor:
    """e with peak 2^-e in [1/2, 1), int32; at the ends of fp32 the nearest whose powers of two are
    normal numbers."""
    return torch.frexp(peak.clamp(min=2.0**-149)).exponent.clamp(-126, 126)


def _power(exponent: Tensor) -> Tensor:
    """2^exponent, exactly, of int32 in [-126, 127]."""
    return ((exponent + 127) << 23).view(torch.float32)


def _power64(exponent: Tensor) -> Tensor:
    """2^exponent, exactly, of int32 in [-1022, 1023]."""
    return ((exponent.long() + 1023) << 52).view(torch.float64)


def _width(depth: int) -> int:
    """Columns of a rounded copy: whole tiles, so that its product reads without a mask."""
    return triton.cdiv(depth, 64) * 64 if depth > 64 else max(16, triton.next_power_of_2(depth))


def _multiprocessors(device: torch.device) -> int:
    return (
        torch.cuda.get_device_properties(device).multi_processor_count
        if device.type == "cuda"
        else 2
    )


def _tiles(device: torch.device, precision: str, depth: int) -> Tiles:
    """What fits a multiprocessor: scores in its registers, `stages` tiles of both sides in its
    shared memory.

    Hopper (9.0) multiplies 64 x 256 from 227 KiB of shared memory: 128 x 256 scores take half of
    the reads of 128 x 128, and all registers. Data centre Blackwell (10.x) has as much shared
    memory, but a memory of its own for products, which a thread reads by rows: it holds what
    belongs to all codes of these, so codes are few. The others, of 99 KiB and more, have three
    stages of 32 KiB. fp32 runs on the ordinary units, of few rows at a time: few are left, and a
    block of them costs one reading of the codebook.
    """
    family = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
    if precision == "ieee":
        tiles = Tiles(rows=32, codes=128, depth=32, warps=4, stages=2, resident=2)
    elif family == 9:
        tiles = Tiles(rows=128, codes=256, depth=64, warps=8, stages=4, resident=1)
    elif family == 10:
        tiles = Tiles(rows=256, codes=64, depth=64, warps=8, stages=4, resident=1)
    else:
        tiles = Tiles(rows=128, codes=128, depth=64, warps=8, stages=3, resident=1)
    if precision == "tf32":
        tiles = tiles._replace(depth=32)
    return tiles._replace(depth=min(tiles.depth, max(16, triton.next_power_of_2(depth))))


@jit
def _measure_rows(
    values, centre, peaks, half_norms, num_rows, depth, GROUP: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0) * GROUP + tl.arange(0, GROUP)
    source = values + row.to(tl.int64)[:, None] * depth
    peak = tl.zeros((GROUP, BLOCK), tl.float64)
    squares = tl.zeros((GROUP, BLOCK), tl.float64)
    for start in range(0, depth, BLOCK):
        entry = start + tl.arange(0, BLOCK)[None, :]
        inside = (row < num_rows)[:, None] & (entry < depth)
        value = tl.load(source + entry, mask=inside, other=0.0).to(tl.float64)
        value -= tl.load(centre + entry, mask=inside, other=0.0).to(tl.float64)
        size = tl.where(tl.abs(value) < float("inf"), tl.abs(value), float("inf"))  # NaN too
        peak = tl.maximum(peak, size)
        squares += value * value
    tl.store(peaks + row, tl.max(peak, 1), mask=row < num_rows)
    tl.store(half_norms + row, tl.sum(squares, 1) / 2, mask=row < num_rows)


@jit
def _round_rows(
    values,
    centre,
    scales,
    rounded,
    norms,
    residuals,
    num_rows,
    depth,
    width,
    DROPPED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * GROUP + tl.arange(0, GROUP)
    inside = (row < num_rows)[:, None]
    scale = tl.load(scales + row, mask=row < num_rows, other=0.0)[:, None]
    source = values + row.to(tl.int64)[:, None] * depth
    target = rounded + row.to(tl.int64)[:, None] * width
    squares = tl.zeros((GROUP, BLOCK), tl.float32)
    lost = tl.zeros((GROUP, BLOCK), tl.float32)
    for start in range(0, width, BLOCK):
        entry = start + tl.arange(0, BLOCK)[None, :]
        value = tl.load(source + entry, mask=inside & (entry < depth), other=0.0) * scale
        value -= tl.load(centre + entry, mask=entry < depth, other=0.0) * scale
        value = tl.where(scale > 0, value, 0.0)
        bits = value.to(tl.int32, bitcast=True)
        half = (1 << (DROPPED - 1)) - 1 + ((bits >> DROPPED) & 1)  # ties to even
        kept = (
            (((bits + half) >> DROPPED) << DROPPED)
            .to(tl.float32, bitcast=True)
            .to(rounded.dtype.element_ty)
        )
        tl.store(target + entry, kept, mask=inside & (entry < width))
        difference = value - kept.to(tl.float32)
        squares += value * value
        lost += difference * difference
    tl.store(norms + row, tl.sqrt(tl.sum(squares, 1)), mask=row < num_rows)
    tl.store(residuals + row, tl.sqrt(tl.sum(lost, 1)), mask=row < num_rows)


@jit
def _shortlist(
    features,
    codebook,
    centre,
    offsets,
    reaches,
    order,
    count,
    row_scales,
    code_scales,
    weights,
    units,
    errors,
    found,
    num_codes,
    depth,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    CODES: tl.constexpr,
    DEPTH: tl.constexpr,
    KEPT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
):
    """The KEPT smallest bounds of the rows order[:count], and their codes, for every split of the
    codebook."""
    total = tl.load(count)
    blocks, splits, share = _partition(
        total, num_codes, tl.num_programs(0), ROWS, CODES, MAX_SPLITS
    )
    lane = tl.arange(0, ROWS)
    column = tl.arange(0, CODES)
    slot = tl.arange(0, KEPT)
    entry = tl.arange(0, DEPTH)
    for item in range(tl.program_id(0), blocks * splits, tl.num_programs(0)):
        position = (item // splits) * ROWS + lane
        row = tl.load(order + position, mask=position < total, other=0).to(tl.int64)
        weight = tl.load(weights + row)
        unit = tl.load(units + row)
        error = tl.load(errors + row)
        row_scale = tl.load(row_scales + row)
        best = _empty(slot)[None, :] + tl.zeros((ROWS, 1), tl.int64)
        first = (item % splits) * share * CODES
        for start in range(first, tl.minimum(first + share * CODES, num_codes), CODES):
            code = start + column
            here = tl.minimum(code, num_codes - 1).to(tl.int64)
            left = features + row[:, None] * depth + entry[None, :]
            right = codebook + here[None, :] * depth + entry[:, None]
            products = tl.zeros((ROWS, CODES), tl.float32)
            if PRECISION == "ieee":
                code_scale = tl.load(code_scales + here)
                for at in range(0, depth, DEPTH):
                    inside = at + entry < depth
                    x = tl.load(left + at, mask=inside[None, :], other=0.0)
                    c = tl.load(right + at, mask=inside[:, None], other=0.0)
                    m = tl.load(centre + at + entry, mask=inside, other=0.0)
                    x = x * row_scale[:, None] - m[None, :] * row_scale[:, None]
                    c = c * code_scale[None, :] - m[:, None] * code_scale[None, :]
                    x = tl.where(row_scale[:, None] > 0, x, 0.0)
                    c = tl.where(code_scale[None, :] > 0, c, 0.0)
                    products = tl.dot(x, c, products, input_precision="ieee")
            else:
                for at in range(0, depth, DEPTH):
                    products = tl.dot(
                        tl.load(left + at), tl.load(right + at), products, input_precision="tf32"
                    )
            offset = tl.load(offsets + code, mask=code < num_codes, other=float("inf"))
            scores = offset[None, :] * weight[:, None] - products * unit[:, None]
            if PRECISION != "ieee":
                scores -= error[:, None] * tl.load(reaches + here)[None, :]
            # The tile's least score enters while it is less than the last one kept: seldom, after
            # the first tiles.
            last = tl.max(best, 1)
            least = tl.min(scores, 1)
            while tl.max((least < _score(last)).to(tl.int32), 0) > 0:
                winner = tl.min(tl.where(scores == least[:, None], column[None, :], CODES), 1)
                key = _key(least, start + winner)
                best = tl.where((best == last[:, None]) & (key < last)[:, None], key[:, None], best)
                scores = tl.where(column[None, :] == winner[:, None], float("inf"), scores)
                last = tl.max(best, 1)
                least = tl.min(scores, 1)
        tl.store(found + (item * ROWS + lane)[:, None] * KEPT + slot[None, :], best)


@jit
def _decide(
    found,
    order,
    count,
    features,
    codebook,
    centre,
    offsets,
    row_scales,
    ranges,
    codes,
    doubtful,
    num_doubtful,
    num_codes,
    depth,
    programs,
    FINAL: tl.constexpr,
    ROWS: tl.constexpr,
    CODES: tl.constexpr,
    DEPTH: tl.constexpr,
    KEPT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """The best kept code of a row in fp64. Unless FINAL only those whose bound allows it; else the
    row is doubtful."""
    start = tl.program_id(0) * GROUP
    total = tl.load(count)
    if start >= total:
        return
    position = start + tl.arange(0, GROUP)
    row = tl.load(order + position, mask=position < total, other=0).to(tl.int64)
    searched = (position < total) & (tl.load(row_scales + row) > 0)
    span = tl.load(ranges + row)
    _, splits, _ = _partition(total, num_codes, programs, ROWS, CODES, MAX_SPLITS)
    candidate = tl.arange(0, MAX_SPLITS * KEPT)[None, :]
    item = (position // ROWS)[:, None] * splits + candidate // KEPT
    empty = _empty(candidate)
    stored = (candidate // KEPT < splits) & searched[:, None]
    keys = tl.load(
        found + (item * ROWS + (position % ROWS)[:, None]) * KEPT + candidate % KEPT,
        mask=stored,
        other=0,
    )
    keys = tl.where(stored, keys, empty)
    best = tl.full((GROUP,), float("inf"), tl.float64)
    chosen = tl.full((GROUP,), -1, tl.int64)
    bound = tl.full((GROUP,), float("inf"), tl.float64)
    for _ in range(KEPT):
        key = tl.min(keys, 1)
        keys = tl.where(keys == key[:, None], empty, keys)
        code = key & 0x7FFFFFFF
        bound = _score(key).to(tl.float64) - 7.9e-31  # 2^-100, for what vanishes below fp32
        wanted = searched & (code < num_codes)
        if not FINAL:
            wanted = wanted & (bound <= best * span)
        if tl.max(wanted.to(tl.int32), 0) > 0:
            products = tl.zeros((GROUP, DEPTH), tl.float64)
            for at in range(0, depth, DEPTH):
                entry = at + tl.arange(0, DEPTH)[None, :]
                inside = wanted[:, None] & (entry < depth)
                x = tl.load(features + row[:, None] * depth + entry, mask=inside, other=0.0).to(
                    tl.float64
                )
                c = tl.load(codebook + code[:, None] * depth + entry, mask=inside, other=0.0).to(
                    tl.float64
                )
                m = tl.load(centre + entry, mask=entry < depth, other=0.0).to(tl.float64)
                products += tl.where(inside, (x - m) * (c - m), 0.0)
            score = tl.load(offsets + code, mask=wanted, other=float("inf")) - tl.sum(products, 1)
            better = wanted & ((score < best) | ((score == best) & (code < chosen)))
            best = tl.where(better, score, best)
            chosen = tl.where(better, code, chosen)
    tl.store(codes + row, chosen, mask=searched)
    if not FINAL:
        uncertain = searched & (bound <= best * span)  # a code that was not kept may be better
        slot = tl.atomic_add(num_doubtful + tl.zeros((GROUP,), tl.int32), 1, mask=uncertain)
        tl.store(doubtful + slot, row.to(tl.int32), mask=uncertain)


@jit
def _partition(
    total, num_codes, programs, ROWS: tl.constexpr, CODES: tl.constexpr, MAX_SPLITS: tl.constexpr
):
    """Blocks of rows, splits of the codebook for each so that programs have work, tiles of codes in
    a split."""
    blocks = tl.cdiv(total, ROWS)
    tiles = tl.cdiv(num_codes, CODES)
    splits = tl.maximum(programs // tl.maximum(blocks, 1), 1)
    share = tl.cdiv(tiles, tl.minimum(splits, tl.minimum(tiles, MAX_SPLITS)))
    return blocks, tl.cdiv(tiles, share), share


@jit
def _key(score, code):
    """int64 in the order of (score, code); fp32 read as int32 is in order once negatives are turned
    around."""
    bits = score.to(tl.int32, bitcast=True)
    return ((bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) << 32) | code.to(tl.int64)


@jit
def _score(key):
    bits = (key >> 32).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@jit
def _empty(slot):
    """Keys of score infinity and of no code, all different, so that one at a time is replaced."""
    return 0x7F8000007FFFFFFF - slot.to(tl.int64)
