"""Read a PyTorch checkpoint's tensors and plain values without running anything that it names.

A pickle is a program: it names functions and calls them. Published checkpoints hold whole modules and argument objects,
    so `weights_only` cannot load them. Here the opcodes are parsed (with `pickletools` of the standard library) and
    evaluated on inert records: nothing is imported, called or built, whatever the file names.
"""

from __future__ import annotations

import io
import math
import pickletools
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from r2l_nerfstudio.errors import ZIP_ERRORS, InputError, one_line

MOST_PICKLE_BYTES = 64 << 20
"""Maximum bytes of the pickle beside the tensors; published ones have about a megabyte."""
MOST_DEPTH = 6
"""Maximum dimensions of a tensor."""
DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class UnreadableError(Exception):
    """An error in a checkpoint file; the message finishes a sentence about the file."""


@dataclass(frozen=True)
class Named:
    """A class or function that the file names; it is never looked up."""

    name: str


@dataclass(eq=False)
class Record:
    """An object that the file would have built or called, kept as data."""

    name: str
    args: Any
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StorageRef:
    """A tensor's numbers, in a separate file of the archive."""

    key: str
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True)
class TensorRef:
    """A tensor that has not been read yet."""

    storage: StorageRef
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class Checkpoint:
    """A PyTorch archive, opened for reading; a context manager.

    Args:
        path: the file.

    Raises:
        InputError: if it is missing, or not an archive that `torch.save` wrote.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        try:
            self._archive = zipfile.ZipFile(self.path)
            try:
                self.content = self._read_content()
            except BaseException:
                self._archive.close()
                raise
        except UnreadableError as error:
            raise InputError(f"The checkpoint {self.path} cannot be read: {error}") from error
        except FileNotFoundError as error:
            raise InputError(f"There is no checkpoint at {self.path}: give a published .tar or .onnx file.") from error
        except (OSError, *ZIP_ERRORS) as error:
            raise InputError(
                f"The checkpoint {self.path} is truncated, or not an archive of torch 1.6 or newer"
                f" ({type(error).__name__}: {one_line(error)}): download it again, or save it again with a current"
                " PyTorch."
            ) from error

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self._archive.close()

    def _read_content(self) -> Any:
        entries = self._archive.infolist()
        names = [entry.filename for entry in entries]
        if len(set(names)) != len(names):
            raise UnreadableError("the archive has two entries of one name.")
        pickles = [entry for entry in entries if entry.filename.split("/")[1:] == ["data.pkl"]]
        if len(pickles) != 1:
            raise UnreadableError("the archive has no data.pkl, so torch.save did not write it.")
        (entry,) = pickles
        self._folder = entry.filename.split("/")[0]
        order = f"{self._folder}/byteorder"
        if order in names and self._bytes(order, 64).strip() != b"little":
            raise UnreadableError("its numbers are big-endian.")
        return interpret(self._bytes(entry.filename, MOST_PICKLE_BYTES))

    def _bytes(self, name: str, most: int) -> bytes:
        entry = self._archive.getinfo(name)
        if entry.compress_type != zipfile.ZIP_STORED:
            # PyTorch stores entries uncompressed; a compressed one may unpack to any size.
            raise UnreadableError(f"its entry {name} is compressed, which torch.save never does.")
        if entry.file_size > most:
            raise UnreadableError(f"its entry {name} has {entry.file_size} bytes; at most {most} were expected.")
        return self._archive.read(entry)

    def tensor(self, ref: TensorRef, name: str) -> Tensor:
        """Read one tensor.

        Args:
            ref: reference from the content.
            name: name for messages.

        Raises:
            InputError: if its numbers are missing or too few, or do not fit its shape.
        """
        storage = ref.storage
        reach = ref.offset + sum((size - 1) * step for size, step in zip(ref.shape, ref.stride, strict=True)) + 1
        try:
            if ref.numel > storage.numel or (ref.numel and reach > storage.numel):
                raise UnreadableError(f"{name} of shape {list(ref.shape)} reaches beyond its {storage.numel} numbers.")
            size = storage.numel * storage.dtype.itemsize
            entry = f"{self._folder}/data/{storage.key}"
            content = self._bytes(entry, size)
            if len(content) != size:
                raise UnreadableError(f"{name} should have {size} bytes, but its entry holds {len(content)}.")
        except UnreadableError as error:
            raise InputError(f"The checkpoint {self.path} cannot be read: {error}") from error
        except (KeyError, OSError, *ZIP_ERRORS) as error:
            raise InputError(
                f"The checkpoint {self.path} is truncated: the numbers of {name} cannot be read"
                f" ({type(error).__name__}: {one_line(error)}). Download it again."
            ) from error
        if not content:
            return torch.zeros(ref.shape, dtype=storage.dtype)
        flat = torch.frombuffer(bytearray(content), dtype=storage.dtype)
        return flat.as_strided(ref.shape, ref.stride, ref.offset).clone()


def interpret(content: bytes) -> Any:
    """Evaluate a pickle on inert records.

    Args:
        content: the pickle.

    Returns:
        Plain values and containers, `TensorRef` for tensors, `Record` for everything else that the file would have
        built.

    Raises:
        UnreadableError: if it is damaged, or uses features that no checkpoint needs.
    """
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(io.BytesIO(content)):
            if machine.step(opcode.name, argument):
                return machine.result
    except UnreadableError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError, RecursionError) as error:
        raise UnreadableError(f"its pickle is damaged ({type(error).__name__}: {one_line(error)}).") from error
    raise UnreadableError("its pickle ends before its end.")


_MARK = object()
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_SET": list}
_LITERALS = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "UNICODE", "BINUNICODE",
    "SHORT_BINUNICODE", "BINUNICODE8",
}  # fmt: skip
_PUTS, _GETS = {"PUT", "BINPUT", "LONG_BINPUT"}, {"GET", "BINGET", "LONG_BINGET"}


class _Machine:
    """The stack, the memo, and the effect of each opcode on them."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.result: Any = None

    def step(self, name: str, argument: Any) -> bool:
        """Evaluate one opcode; return True when the pickle is finished."""
        stack = self.stack
        if name in _LITERALS:
            stack.append(argument)
        elif name in _PUTS:
            self.memo[int(argument)] = self._top()
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = self._top()
        elif name in _GETS:
            stack.append(self.memo[int(argument)])
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name in _TUPLES:
            count = _TUPLES[name]
            stack.append(tuple(reversed([self._pop() for _ in range(count)])))
        elif name == "MARK":
            stack.append(_MARK)
        elif name in ("TUPLE", "LIST", "FROZENSET"):
            values = self._to_mark()
            stack.append(tuple(values) if name == "TUPLE" else values)
        elif name == "DICT":
            values = self._to_mark()
            stack.append({})
            self._set(stack[-1], values)
        elif name == "APPEND":
            value = self._pop()
            self._extend(self._top(), [value])
        elif name in ("APPENDS", "ADDITEMS"):
            values = self._to_mark()
            self._extend(self._top(), values)
        elif name == "SETITEM":
            value, key = self._pop(), self._pop()
            self._set(self._top(), [key, value])
        elif name == "SETITEMS":
            values = self._to_mark()
            self._set(self._top(), values)
        elif name == "GLOBAL":
            stack.append(Named(".".join(str(argument).split(" "))))
        elif name == "STACK_GLOBAL":
            attribute, module = self._pop(), self._pop()
            stack.append(Named(f"{module}.{attribute}"))
        elif name in ("REDUCE", "NEWOBJ"):
            args, function = self._pop(), self._pop()
            stack.append(_call(function, args))
        elif name == "NEWOBJ_EX":
            _, args, function = self._pop(), self._pop(), self._pop()
            stack.append(_call(function, args))
        elif name == "BUILD":
            state = self._pop()
            if isinstance(self._top(), Record):
                self._top().state = state
        elif name == "BINPERSID":
            stack.append(_storage(self._pop()))
        elif name == "POP":
            self._pop(or_mark=True)
        elif name == "POP_MARK":
            self._to_mark()
        elif name == "DUP":
            stack.append(self._top())
        elif name == "STOP":
            self.result = self._pop()
            return True
        elif name not in ("PROTO", "FRAME"):
            raise UnreadableError(f"its pickle uses {name}, which no PyTorch checkpoint needs.")
        return False

    def _pop(self, or_mark: bool = False) -> Any:
        value = self.stack.pop()
        if value is _MARK and not or_mark:
            raise UnreadableError("its pickle is damaged (a value is missing).")
        return value

    def _top(self) -> Any:
        if self.stack[-1] is _MARK:
            raise UnreadableError("its pickle is damaged (a value is missing).")
        return self.stack[-1]

    def _to_mark(self) -> list[Any]:
        values = []
        while (value := self.stack.pop()) is not _MARK:
            values.append(value)
        return values[::-1]

    @staticmethod
    def _extend(target: Any, values: list[Any]) -> None:
        if isinstance(target, list):
            target.extend(values)

    @staticmethod
    def _set(target: Any, values: list[Any]) -> None:
        into = target.items if isinstance(target, Record) else target
        if not isinstance(into, dict) or len(values) % 2:
            raise UnreadableError("its pickle is damaged (an item without its dictionary).")
        for key, value in zip(values[::2], values[1::2], strict=True):
            # Other keys are not needed, and a crafted key may be slow to hash.
            if isinstance(key, str | int):
                into[key] = value


def _call(function: Any, args: Any) -> Any:
    """Return what the file would have called: a reference for tensors, a record for everything else, dictionaries
    included."""
    name = function.name if isinstance(function, Named) else "?"
    if name == "torch._utils._rebuild_tensor_v2":
        return _tensor(args)
    if name == "torch._utils._rebuild_parameter" and isinstance(args, tuple) and args:
        return args[0]
    return Record(name, args)


def _tensor(args: Any) -> TensorRef:
    storage, offset, shape, stride = args[:4]
    whole = [offset, *shape, *stride]
    if not (
        isinstance(storage, StorageRef)
        and all(type(value) is int and 0 <= value < 1 << 40 for value in whole)
        and len(shape) == len(stride) <= MOST_DEPTH
    ):
        raise UnreadableError("it has a tensor with an invalid shape.")
    return TensorRef(storage, offset, tuple(shape), tuple(stride))


def _storage(args: Any) -> StorageRef:
    if not (isinstance(args, tuple) and len(args) == 5 and args[0] == "storage" and isinstance(args[1], Named)):
        raise UnreadableError("it refers to something outside the file that is not a tensor.")
    _, kind, key, _, numel = args
    dtype = DTYPES.get(kind.name.removeprefix("torch.").removeprefix("storage."))
    if dtype is None:
        raise UnreadableError(f"it has numbers of type {kind.name}, which PyTorch does not have.")
    if not (isinstance(key, str) and key.isalnum() and type(numel) is int and 0 <= numel < 1 << 40):
        raise UnreadableError("it has a tensor whose numbers are not in the file.")
    return StorageRef(key, dtype, numel)


def plain(value: Any) -> dict[str, Any]:
    """Return the items of a dictionary of any class, or the attributes of an object; empty for anything else."""
    if isinstance(value, dict):
        return {key: item for key, item in value.items() if isinstance(key, str)}
    if isinstance(value, Record):
        # PyTorch keeps versions of modules as an attribute of a state dictionary.
        state = value.state if isinstance(value.state, dict) and value.name != "collections.OrderedDict" else {}
        return {key: item for key, item in {**state, **value.items}.items() if isinstance(key, str)}
    return {}
