"""Codes to bytes and back without loss: range coding (Martin 1979) by constriction (Bamler 2022,
arXiv:2201.01741).

The model is a table of counts, which the file holds or which is that of another split, or an
autoregressive prior. Both sides must find the same probabilities to the last bit, or all behind the
first difference is lost. So one piece of code passes the codes through, at one batch size, to be
written or to be read; a prior's logits come from a float64 copy of its network and are rounded to
1/1024 nat, and all after that is integers. Errors of float64 carry a logit over the border of two
steps once in 10^10 or so: other kernels agree as a rule. Every file is decoded when it is made, and
checksums refuse what differs.

A file, integers in little endian, counts in LEB128:

    "TSTK", version u8, kind u8, labelled u8
    images, batch size, levels; of every level dimensions, sides and codebook size
    first 8 bytes of the model's SHA-256
    size of the table (0 unless kind is "table"), table: counts, u32, byte planes, deflated
    CRC-32 of the codes and labels, u32
    size of the payload, payload
    CRC-32 of all above, u32
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import math
import zlib
from collections.abc import Callable, Iterator
from decimal import Decimal, localcontext
from typing import Any, Protocol

import constriction
import numpy as np
import torch
from torch import Tensor

from priors.families.autoregressive import AutoregressivePrior
from priors.families.hierarchical import HierarchicalPrior
from priors.interface import Prior
from tokenizer.interface import CodeLayout
from training.checkpoint import digest
from training.errors import UserError

MAGIC, VERSION = b"TSTK", 1
KINDS = ("table", "split", "prior")
PRECISION = 24  # bits of constriction's fixed-point probabilities
STEPS = 1024  # per nat, that logits are rounded to
MOST_CODES = 1 << 20  # of a codebook

Array = np.ndarray
Port = Callable[
    [Array, Array], Array
]  # symbols (m,), integer weights (n,) of all or (m, n) of each -> symbols (m,)


@dataclasses.dataclass(frozen=True)
class Tokens:
    """What a file holds."""

    layout: CodeLayout
    codes: Tensor  # (n, N) int64
    labels: Tensor | None  # (n,) int64


class CodeModel(Protocol):
    """A distribution over codes that can be coded with."""

    kind: str  # one of KINDS
    layout: CodeLayout
    sha256: str  # of all that the probabilities depend on
    batch_size: int  # images at a time; 0 is all

    def transmit(self, port: Port, codes: Array, labels: Array | None, batch_size: int) -> None:
        """Pass (n, N) codes and (n,) labels, int64, through the port, and replace them by what
        comes out."""

    def ideal_bits(self, codes: Tensor, labels: Tensor | None) -> Tensor:
        """-log2 p of each image's codes, and of its label if there are any, (n,) float64."""


def encode_tokens(
    codes: Tensor, layout: CodeLayout, model: CodeModel | None = None, labels: Tensor | None = None
) -> bytes:
    """(n, N) int64 codes as a file; without a model it holds the table of these very codes.

    A prior conditions on (n,) int64 labels, which the file then holds too, and else on none. The
    file has been decoded when this returns. Raises UserError when the model is of another layout,
    or decodes to something else.
    """
    layout.check(codes)
    _check_layout(layout)
    model = model or TableModel.of_codes(codes, layout)
    if model.layout != layout:
        raise UserError(
            f"codes of {layout} cannot be coded by a model of {model.layout}: use the one of these codes"
        )
    if labels is not None and model.kind != "prior":
        raise ValueError("a table knows no labels: only a prior's file holds them")
    codes = codes.cpu()
    written = codes.numpy().copy()
    written_labels = None if labels is None else labels.cpu().numpy().copy()
    writer = _Writer()
    model.transmit(writer, written, written_labels, model.batch_size)
    file = TokenFile(
        kind=model.kind,
        layout=layout,
        num_images=len(codes),
        labelled=labels is not None,
        batch_size=model.batch_size,
        model=model.sha256[:16],
        table=model.stored() if isinstance(model, TableModel) else b"",
        codes_checksum=_checksum(written, written_labels),
        payload=writer.payload(),
    )
    data = file.to_bytes()
    if not torch.equal(decode_tokens(data, model, "the codes just encoded").codes, codes):
        raise RuntimeError("decoded codes of an equal checksum differ")
    return data


def decode_tokens(data: bytes, model: CodeModel | None = None, name: str = "the file") -> Tokens:
    """What `encode_tokens` was given. Of a file that holds its table no model is needed.

    Raises UserError when the file is damaged or cut short, was made by another model, or decodes to
    other codes.
    """
    file = TokenFile.from_bytes(data, name)
    if file.kind == "table":
        model = TableModel.of_stored(file.table, file.layout, name)
    elif model is None:
        raise UserError(
            f"{name}: its codes were coded by the {file.kind} {file.model}…: give that model"
        )
    if (model.kind, model.sha256[:16]) != (file.kind, file.model):
        raise UserError(
            f"{name}: was coded by the {file.kind} {file.model}…, not {model.kind} {model.sha256[:16]}…"
        )
    codes = np.zeros((file.num_images, file.layout.length), np.int64)
    labels = np.zeros(file.num_images, np.int64) if file.labelled else None
    try:
        model.transmit(_Reader(file.payload), codes, labels, file.batch_size)
        same = _checksum(codes, labels) == file.codes_checksum
    except (AssertionError, IndexError):  # a payload that these probabilities cannot have made
        same = False
    if not same:
        raise UserError(
            f"{name}: decodes to other codes than were encoded, as the {model.kind}'s probabilities differ here: "
            "decode on the kind of machine, and with the versions, that encoded"
        )
    return Tokens(
        file.layout, torch.from_numpy(codes), None if labels is None else torch.from_numpy(labels)
    )


class TableModel:
    """Codes are independent, with one table of integer weights (num_codes,) per level."""

    batch_size = 0

    def __init__(self, kind: str, layout: CodeLayout, weights: list[Array]) -> None:
        self.kind, self.layout, self.weights = (
            kind,
            layout,
            [level.astype("<i8") for level in weights],
        )
        tables = hashlib.sha256(b"".join(level.tobytes() for level in self.weights)).hexdigest()
        self.sha256 = digest([kind, dataclasses.asdict(layout), tables])

    @classmethod
    def of_codes(cls, codes: Tensor, layout: CodeLayout) -> TableModel:
        """The table of (n, N) codes themselves, which goes into the file; codes that are not there
        get no share."""
        spans = layout.spans()
        return cls(
            "table",
            layout,
            [codes[:, span].flatten().bincount(minlength=k).cpu().numpy() for span, k in spans],
        )

    @classmethod
    def of_split(cls, histograms: list[Array], layout: CodeLayout) -> TableModel:
        """From another split's counts (num_codes,) per level, such as the train split's: (c + 1/2)
        / (n + K/2), Krichevsky & Trofimov 1981. Whoever decodes needs the same counts."""
        return cls("split", layout, [2 * np.asarray(counts, np.int64) + 1 for counts in histograms])

    def stored(self) -> bytes:
        """Empty unless the file has to hold the table."""
        if self.kind != "table":
            return b""
        counts = np.concatenate(self.weights).astype("<u4")
        return zlib.compress(counts.view(np.uint8).reshape(-1, 4).T.tobytes(), 9)

    @classmethod
    def of_stored(cls, table: bytes, layout: CodeLayout, name: str) -> TableModel:
        size = 4 * sum(layout.num_codes)
        try:
            planes = zlib.decompressobj().decompress(table, size)
            counts = (
                np.frombuffer(planes, np.uint8).reshape(4, size // 4).T.copy().view("<u4")[:, 0]
            )
        except (zlib.error, ValueError) as error:
            raise UserError(f"{name}: its table is damaged ({error})") from None
        return cls("table", layout, np.split(counts, np.cumsum(layout.num_codes)[:-1]))

    def transmit(self, port: Port, codes: Array, labels: Array | None, batch_size: int) -> None:
        for weights, (span, _) in zip(self.weights, self.layout.spans()):
            used = np.flatnonzero(weights)
            level = codes[:, span]
            places = port(used.searchsorted(level.ravel()), weights[used])
            codes[:, span] = used[places].reshape(level.shape)

    def ideal_bits(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        bits = torch.zeros(len(codes), dtype=torch.float64)
        for weights, (span, _) in zip(self.weights, self.layout.spans()):
            shares = torch.from_numpy(weights) / max(1, int(weights.sum()))
            bits -= shares.double().log2()[codes[:, span].cpu()].sum(1)
        return bits


class PriorModel:
    """Each code has the probability that an autoregressive prior gives it after those before it in
    raster order.

    A hierarchical prior is one when both its priors are.
    """

    kind = "prior"

    def __init__(self, prior: Prior, batch_size: int = 64) -> None:
        """Raises UserError when the prior is of a family without such probabilities."""
        self.prior, self.layout, self.batch_size = prior, prior.layout, batch_size
        self.sha256 = _hash_prior(prior)
        self.stages = [copy.deepcopy(stage).double().eval() for stage in _stages(prior)]
        self.device = next(prior.parameters()).device

    @torch.no_grad()
    def transmit(self, port: Port, codes: Array, labels: Array | None, batch_size: int) -> None:
        if labels is not None:
            labels[:] = port(labels, np.ones(self.prior.num_classes + 1, np.int64))
        for start in range(0, len(codes), batch_size):
            batch = codes[start : start + batch_size]
            conditions = self._conditions(
                len(batch), None if labels is None else labels[start : start + batch_size]
            )
            given, first = None, 0
            for stage in self.stages:
                slots = batch[:, first : first + stage.layout.length]
                decoding, previous = stage.backbone.decoding(conditions, given=given), None
                for slot in range(stage.layout.length):
                    weights = exponentials(decoding.step(slot, previous).cpu().numpy())
                    slots[:, slot] = port(slots[:, slot], weights)
                    previous = torch.from_numpy(slots[:, slot].copy()).to(self.device)
                given = torch.from_numpy(slots.copy()).to(self.device)
                first += stage.layout.length

    def ideal_bits(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        bits = torch.full(
            (len(codes),), 0.0 if labels is None else math.log2(self.prior.num_classes + 1)
        ).double()
        for rows in torch.arange(len(codes)).split(self.batch_size):
            conditions = self._conditions(
                len(rows), None if labels is None else labels[rows].cpu().numpy()
            )
            bits[rows] += self.prior.nll(
                codes[rows].to(self.device), conditions
            ).nats.cpu() / math.log(2)
        return bits

    def _conditions(self, count: int, labels: Array | None) -> Tensor:
        none = np.full(count, self.prior.num_classes)
        return torch.from_numpy(none if labels is None else labels).to(self.device)


def _stages(prior: Prior) -> Iterator[AutoregressivePrior]:
    """The autoregressive priors whose product a prior is; each is given the codes of the one
    before."""
    for stage in (prior.top, prior.bottom) if isinstance(prior, HierarchicalPrior) else (prior,):
        if not isinstance(stage, AutoregressivePrior):
            raise UserError(
                f"{type(stage).__name__} gives no code a probability after those before it: to code tokens use an "
                "autoregressive prior, or a table"
            )
        yield stage


def _hash_prior(prior: Any) -> str:
    """SHA-256 of the prior's tensors, their names and its layout."""
    found = hashlib.sha256(digest([dataclasses.asdict(prior.layout), prior.num_classes]).encode())
    for name, tensor in sorted(prior.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


# Integers in place of probabilities


def exponentials(logits: Array) -> Array:
    """(m, K) logits -> (m, K) int64 weights, about 2^32 exp(logit - largest); the logits are
    rounded to steps."""
    table = _exponentials()
    steps = np.rint(logits.astype(np.float64) * STEPS).astype(np.int64)
    below = steps.max(-1, keepdims=True) - steps
    return table[np.minimum(below, len(table) - 1)]


@functools.cache
def _exponentials() -> Array:
    """2^32 exp(-i / STEPS), rounded down, as far as it is not 0, and a 0: no machine's exp() takes
    part."""
    with localcontext(prec=50):
        factor = int((Decimal(-1) / STEPS).exp() * (1 << 96))
    found, value = [], 1 << 96
    while value >> 64:
        found.append(value >> 64)
        value = value * factor >> 96
    return np.array([*found, 0])


def masses(weights: Array) -> Array:
    """(..., n) int64 weights >= 0, not all 0 -> (..., n) int64 of sum 2^24 and at least 1, what is
    left to the largest.

    What is coded costs at most -log2(1 - n / 2^24) bits more than under the weights, or 24 bits.
    """
    free = (1 << PRECISION) - weights.shape[-1]
    found = 1 + weights * free // weights.sum(-1, keepdims=True)
    largest = found.argmax(-1)[..., None]
    rest = (1 << PRECISION) - found.sum(-1, keepdims=True)
    np.put_along_axis(found, largest, np.take_along_axis(found, largest, -1) + rest, -1)
    return found


def _categorical(weights: Array) -> tuple[Any, ...]:
    """constriction's arguments for weights (n,) of all symbols, or (m, n) of each.

    It gives each of n symbols 1 / 2^24 and shares out the other 2^24 - n in proportion: exactly, in
    float32, when the proportions are integers of that sum.
    """
    model, table = constriction.stream.model.Categorical, (masses(weights) - 1).astype(np.float32)
    return (model(table, perfect=False),) if table.ndim == 1 else (model(perfect=False), table)


class _Writer:
    """A port that keeps what passes."""

    def __init__(self) -> None:
        self.coder = constriction.stream.queue.RangeEncoder()

    def __call__(self, symbols: Array, weights: Array) -> Array:
        if len(symbols) and weights.shape[-1] > 1:
            self.coder.encode(symbols.astype(np.int32), *_categorical(weights))
        return symbols

    def payload(self) -> bytes:
        return self.coder.get_compressed().astype("<u4").tobytes()


class _Reader:
    """A port that puts what was kept in the place of what passes."""

    def __init__(self, payload: bytes) -> None:
        self.coder = constriction.stream.queue.RangeDecoder(
            np.frombuffer(payload, "<u4").astype(np.uint32)
        )

    def __call__(self, symbols: Array, weights: Array) -> Array:
        if not len(symbols) or weights.shape[-1] < 2:
            return np.zeros(len(symbols), np.int64)
        model, *each = _categorical(weights)
        return self.coder.decode(model, *(each or [len(symbols)])).astype(np.int64)


# The file


@dataclasses.dataclass(frozen=True)
class TokenFile:
    """The parts of a file."""

    kind: str
    layout: CodeLayout
    num_images: int
    labelled: bool
    batch_size: int
    model: str  # 16 hexadecimal digits
    table: bytes
    codes_checksum: int
    payload: bytes

    def to_bytes(self) -> bytes:
        levels = [
            _counts(len(grid), *grid, num_codes)
            for grid, num_codes in zip(self.layout.grids, self.layout.num_codes)
        ]
        parts = [
            MAGIC + bytes([VERSION, KINDS.index(self.kind), self.labelled]),
            _counts(self.num_images, self.batch_size, len(levels)),
            *levels,
            bytes.fromhex(self.model),
            _counts(len(self.table)) + self.table,
            self.codes_checksum.to_bytes(4, "little"),
            _counts(len(self.payload)) + self.payload,
        ]
        data = b"".join(parts)
        return data + zlib.crc32(data).to_bytes(4, "little")

    @staticmethod
    def from_bytes(data: bytes, name: str = "the file") -> TokenFile:
        """Raises UserError when this is no such file, or it is damaged."""
        if data[:4] != MAGIC:
            raise UserError(f"{name}: is no token file: it begins with {data[:4]!r}, not {MAGIC!r}")
        if data[4:5] != bytes([VERSION]):
            raise UserError(
                f"{name}: is of version {data[4] if data[4:] else '?'}, and this reads {VERSION}"
            )
        if zlib.crc32(data[:-4]).to_bytes(4, "little") != data[-4:]:
            raise UserError(
                f"{name}: is damaged or cut short: its CRC-32 is not that of its {len(data):,} bytes"
            )
        try:
            cursor = _Cursor(data, 5)
            kind, labelled = KINDS[cursor.take(1)[0]], bool(cursor.take(1)[0])
            num_images, batch_size, num_levels = cursor.count(), cursor.count(), cursor.count()
            levels = [
                [cursor.count() for _ in range(cursor.count() + 1)] for _ in range(num_levels)
            ]
            layout = CodeLayout(
                tuple(tuple(level[:-1]) for level in levels), tuple(level[-1] for level in levels)
            )
            _check_layout(layout)
            model, table = cursor.take(8).hex(), cursor.take(cursor.count())
            checksum, payload = (
                int.from_bytes(cursor.take(4), "little"),
                cursor.take(cursor.count()),
            )
            if (
                cursor.place != len(data) - 4
                or len(payload) % 4
                or (kind == "prior" and not batch_size)
            ):
                raise ValueError("its parts do not add up")
        except (IndexError, ValueError) as error:
            raise UserError(f"{name}: is damaged ({error})") from None
        return TokenFile(
            kind, layout, num_images, labelled, batch_size, model, table, checksum, payload
        )


class _Cursor:
    def __init__(self, data: bytes, place: int) -> None:
        self.data, self.place = data, place

    def take(self, size: int) -> bytes:
        if self.place + size > len(self.data):
            raise ValueError("it ends too early")
        self.place += size
        return self.data[self.place - size : self.place]

    def count(self) -> int:
        """LEB128: seven bits a byte, the lowest first, the eighth bit set but in the last byte."""
        value, shift = 0, 0
        while True:
            byte = self.take(1)[0]
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7


def _counts(*values: int) -> bytes:
    found = bytearray()
    for value in values:
        while value > 127:
            found.append(value & 127 | 128)
            value >>= 7
        found.append(value)
    return bytes(found)


def _check_layout(layout: CodeLayout) -> None:
    if (
        not layout.grids
        or min(layout.num_codes) < 1
        or max(layout.num_codes) > MOST_CODES
        or not layout.length
    ):
        raise ValueError(f"{layout} cannot be coded")


def _checksum(codes: Array, labels: Array | None) -> int:
    found = zlib.crc32(codes.astype("<u4").tobytes())
    return found if labels is None else zlib.crc32(labels.astype("<u4").tobytes(), found)
