"""What torch.save wrote, read without running any of it.

A pickle is a program. Here its instructions are followed over an own, small stack: containers, text
and numbers are made, tensors are noted with the place of their bytes, and whatever else it names
becomes an `Opaque` that is never imported and never called. So files that hold more than tensors
(Lightning's checkpoints, whole pickled modules) can be read, and hostile ones stay harmless.
"""

from __future__ import annotations

import dataclasses
import io
import math
import pickletools
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # begins what torch.save wrote before version 1.6
DTYPES = {
    "Float": torch.float32,
    "Double": torch.float64,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
}
MODULE_PARTS = ("_parameters", "_buffers")


class Damaged(Exception):
    """The file is not whole, or is nothing that torch.save wrote; the message says why, without the
    file's name."""


@dataclasses.dataclass(frozen=True)
class Name:
    """Something that a pickle refers to by name. It is not looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclasses.dataclass
class Opaque:
    """In the place of an object of some class: its name, and the state that it would have been
    given."""

    of: str
    state: Any = None


@dataclasses.dataclass(frozen=True)
class Storage:
    key: str
    dtype: torch.dtype | None  # None: bytes, of the tensor's own type
    numel: int
    offset: int = 0  # of a view into another one (in files of before version 1.6)


@dataclasses.dataclass
class StoredTensor:
    """A tensor that is still in its file."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    source: Callable[[Storage], bytes] | None = None

    def read(self) -> Tensor:
        """Raises Damaged when the file does not hold it."""
        data = bytearray(self.source(self.storage))
        if not math.prod(self.shape):
            return torch.empty(self.shape, dtype=self.dtype)
        flat = torch.frombuffer(data, dtype=self.dtype)
        last = self.offset + sum((size - 1) * step for size, step in zip(self.shape, self.stride))
        if min((self.offset, *self.stride)) < 0 or last >= len(flat):
            raise Damaged("a tensor reaches beyond its bytes")
        return flat.as_strided(self.shape, self.stride, self.offset).clone()


def read_torch(path: Path) -> Any:
    """The object of a file of torch.save, with StoredTensor for tensors and Opaque for what is no
    plain value.

    Raises Damaged.
    """
    with open(path, "rb") as file:
        start = file.read(8)
    try:
        if start.startswith(b"PK\x03\x04"):
            return _read_archive(path)
        return _read_legacy(path)
    except (zipfile.BadZipFile, EOFError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise Damaged(f"{type(error).__name__}: {error}") from None
    except (ValueError, OverflowError, NotImplementedError, RuntimeError) as error:
        raise Damaged(" ".join(str(error).split())) from None


def module_tensors(module: Any) -> dict[str, StoredTensor]:
    """The named tensors of a whole module that was pickled; none of what is no module."""
    found: dict[str, StoredTensor] = {}
    todo = [("", module)]
    while todo and len(found) < 100_000:
        prefix, each = todo.pop()
        state = each.state if isinstance(each, Opaque) else None
        if not isinstance(state, dict):
            continue
        for part in MODULE_PARTS:
            tensors = state.get(part)
            for name, tensor in tensors.items() if isinstance(tensors, dict) else ():
                if isinstance(tensor, StoredTensor):
                    found[f"{prefix}{name}"] = tensor
        inner = state.get("_modules")
        if isinstance(inner, dict) and prefix.count(".") < 50:
            todo += [(f"{prefix}{name}.", child) for name, child in inner.items()]
    return found


def _read_archive(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise Damaged("no archive of torch.save (there is no data.pkl in it)")
        prefix = pickles[0].removesuffix("data.pkl")
        order = f"{prefix}byteorder"
        if order in archive.namelist() and archive.read(order) != b"little":
            raise Damaged("written on a machine of another byte order")
        with archive.open(pickles[0]) as file:
            saved, tensors = follow(io.BytesIO(file.read()))

    def source(storage: Storage) -> bytes:
        with zipfile.ZipFile(path) as archive:
            try:
                entry = archive.getinfo(f"{prefix}data/{storage.key}")
                if entry.compress_type != zipfile.ZIP_STORED:
                    raise Damaged("its tensors are compressed, as torch.save never does")
                return archive.read(entry)
            except (KeyError, zipfile.BadZipFile, EOFError, OSError, RuntimeError) as error:
                raise Damaged(f"tensor data {storage.key}: {error}") from None

    for tensor in tensors:
        tensor.source = source
    return saved


def _read_legacy(path: Path) -> Any:
    with open(path, "rb") as file:
        if follow(file)[0] != LEGACY_MAGIC:
            raise Damaged("no file of torch.save")
        follow(file)
        follow(file)
        saved, tensors = follow(file)
        keys, _ = follow(file)
        sizes = {
            tensor.storage.key: (tensor.storage.dtype or torch.uint8).itemsize for tensor in tensors
        }
        places: dict[str, tuple[int, int]] = {}
        end = path.stat().st_size
        for key in keys:
            head = file.read(8)
            place, size = file.tell(), int.from_bytes(head, "little") * sizes.get(str(key), 1)
            if len(head) < 8 or place + size > end:
                raise Damaged("it ends too early")
            places[str(key)] = (place, size)
            file.seek(place + size)

    def source(storage: Storage) -> bytes:
        if storage.key not in places:
            raise Damaged(f"tensor data {storage.key} is missing")
        place, size = places[storage.key]
        with open(path, "rb") as file:
            file.seek(place)
            return file.read(size)

    for tensor in tensors:
        tensor.source = source
    return saved


# The stack machine


def follow(file: IO[bytes]) -> tuple[Any, list[StoredTensor]]:
    """One pickle from a file, up to its end: its object, and all tensors that it names. Raises
    Damaged."""
    machine = _Machine()
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name == "STOP":
            return machine.pop(), machine.tensors
        machine.do(opcode.name, argument)
    raise Damaged("it ends too early")


MARK = object()
CONSTANTS = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": list,
}
VALUES = {
    "INT",
    "BININT",
    "BININT1",
    "BININT2",
    "LONG",
    "LONG1",
    "LONG4",
    "FLOAT",
    "BINFLOAT",
    "STRING",
    "BINSTRING",
    "SHORT_BINSTRING",
    "UNICODE",
    "BINUNICODE",
    "SHORT_BINUNICODE",
    "BINUNICODE8",
    "BINBYTES",
    "SHORT_BINBYTES",
    "BINBYTES8",
    "BYTEARRAY8",
}


class _Machine:
    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.tensors: list[StoredTensor] = []

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is MARK:
            raise Damaged("its instructions are out of order")
        return value

    def pop_to_mark(self) -> list[Any]:
        place = max(i for i, value in enumerate(self.stack) if value is MARK)
        items = self.stack[place + 1 :]
        del self.stack[place:]
        return items

    def do(self, name: str, argument: Any) -> None:
        push = self.stack.append
        if name in CONSTANTS:
            push(CONSTANTS[name]())
        elif name in VALUES:
            push(argument)
        elif name == "MARK":
            push(MARK)
        elif name in ("PROTO", "FRAME"):
            pass
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[int(argument)] = self.stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = self.stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            push(self.memo[int(argument)])
        else:
            handler = getattr(self, f"_{name.lower()}", None)
            if handler is None:
                raise Damaged(f"the instruction {name} has no place in it")
            handler(argument)

    def _pop(self, _: Any) -> None:
        self.stack.pop()

    def _pop_mark(self, _: Any) -> None:
        self.pop_to_mark()

    def _dup(self, _: Any) -> None:
        self.stack.append(self.stack[-1])

    def _tuple(self, _: Any) -> None:
        self.stack.append(tuple(self.pop_to_mark()))

    def _tuple1(self, _: Any) -> None:
        self._gather(1)

    def _tuple2(self, _: Any) -> None:
        self._gather(2)

    def _tuple3(self, _: Any) -> None:
        self._gather(3)

    def _gather(self, count: int) -> None:
        items = tuple(self.pop() for _ in range(count))
        self.stack.append(items[::-1])

    def _list(self, _: Any) -> None:
        self.stack.append(self.pop_to_mark())

    def _frozenset(self, _: Any) -> None:
        self.stack.append(self.pop_to_mark())

    def _dict(self, _: Any) -> None:
        made: dict[Any, Any] = {}
        _set_items(made, self.pop_to_mark())
        self.stack.append(made)

    def _append(self, _: Any) -> None:
        item = self.pop()
        _extend(self.stack[-1], [item])

    def _appends(self, _: Any) -> None:
        items = self.pop_to_mark()
        _extend(self.stack[-1], items)

    def _additems(self, _: Any) -> None:
        self._appends(None)

    def _setitem(self, _: Any) -> None:
        value, key = self.pop(), self.pop()
        _set_items(self.stack[-1], [key, value])

    def _setitems(self, _: Any) -> None:
        items = self.pop_to_mark()
        _set_items(self.stack[-1], items)

    def _global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self.stack.append(Name(module, name))

    def _stack_global(self, _: Any) -> None:
        name, module = self.pop(), self.pop()
        self.stack.append(Name(str(module), str(name)))

    def _reduce(self, _: Any) -> None:
        arguments, function = self.pop(), self.pop()
        self.stack.append(self._call(function, arguments))

    def _newobj(self, _: Any) -> None:
        self.pop()
        self.stack.append(Opaque(_name_of(self.pop())))

    def _newobj_ex(self, _: Any) -> None:
        self.pop()
        self._newobj(None)

    def _inst(self, argument: str) -> None:
        self.pop_to_mark()
        self.stack.append(Opaque(argument.replace(" ", ".")))

    def _obj(self, _: Any) -> None:
        items = self.pop_to_mark()
        self.stack.append(Opaque(_name_of(items[0] if items else None)))

    def _build(self, _: Any) -> None:
        state, made = self.pop(), self.stack[-1]
        if isinstance(made, Opaque):
            made.state = (
                state  # of an OrderedDict it is `_metadata`, which says nothing that is needed
            )

    def _binpersid(self, _: Any) -> None:
        self.stack.append(_storage(self.pop()))

    def _call(self, function: Any, arguments: Any) -> Any:
        """What a function of torch or collections would give, by our own rules; of any other an
        Opaque."""
        if not isinstance(function, Name) or not isinstance(arguments, tuple):
            return Opaque(_name_of(function))
        name = str(function)
        if name == "collections.OrderedDict":
            made: dict[Any, Any] = {}
            for pair in arguments[0] if arguments else ():
                _set_items(made, list(pair))
            return made
        if name in ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"):
            return self._tensor(*arguments[:4], dtype=None)
        if name == "torch._utils._rebuild_tensor_v3":
            return self._tensor(*arguments[:4], dtype=arguments[6])
        if name in (
            "torch._utils._rebuild_parameter",
            "torch._utils._rebuild_parameter_with_state",
        ):
            return arguments[0]
        if name == "torch._tensor._rebuild_from_type_v2":
            return self._call(arguments[0], arguments[2])
        if name == "torch.Size":
            return tuple(arguments[0])
        return Opaque(name)

    def _tensor(
        self, storage: Any, offset: Any, shape: Any, stride: Any, dtype: Any
    ) -> StoredTensor | Opaque:
        if not isinstance(storage, Storage):
            return Opaque("a tensor of other storage")
        numbers = (offset, *shape, *stride)
        if len(shape) != len(stride) or not all(type(n) is int and 0 <= n < 2**62 for n in numbers):
            raise Damaged("a tensor has no possible shape")
        given = _dtype(dtype) or storage.dtype
        if given is None:
            return Opaque("a tensor of unknown type")
        made = StoredTensor(storage, offset + storage.offset, tuple(shape), tuple(stride), given)
        self.tensors.append(made)
        return made


def _set_items(target: Any, items: Sequence[Any]) -> None:
    """Keys and values in turn, into a dictionary; what is none stays as it is."""
    if isinstance(target, dict):
        for key, value in zip(items[::2], items[1::2]):
            target[key if isinstance(key, str | int | float | bool | None) else repr(type(key))] = (
                value
            )


def _extend(target: Any, items: list[Any]) -> None:
    if isinstance(target, list):
        target.extend(items)


def _name_of(value: Any) -> str:
    return str(value) if isinstance(value, Name) else getattr(value, "of", type(value).__name__)


def _storage(identity: Any) -> Storage | Opaque:
    """Of ("storage", type, key, device, count) and, in old files, what it is a view of."""
    if not isinstance(identity, tuple) or len(identity) < 5 or identity[0] != "storage":
        return Opaque("something outside the file")
    _, kind, key, _, numel, *view = identity
    offset = 0
    if view and view[0] is not None:
        offset = view[0][1]
    if not type(numel) is type(offset) is int or min(numel, offset) < 0:
        raise Damaged("tensor data has no possible size")
    return Storage(str(key), _dtype(kind), numel, offset)


def _dtype(value: Any) -> torch.dtype | None:
    """Of torch.FloatStorage or torch.float32, by name."""
    if not isinstance(value, Name) or value.module not in ("torch", "torch.storage", "torch.cuda"):
        return None
    plain = (
        getattr(torch, value.name, None)
        if value.module == "torch" and value.name.islower()
        else None
    )
    return (
        plain if isinstance(plain, torch.dtype) else DTYPES.get(value.name.removesuffix("Storage"))
    )
