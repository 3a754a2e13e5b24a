"""Read a pickle of plain data and numpy arrays without running it.

A pickle is a program that may call anything. This is another machine for it: it knows the opcodes that plain data
needs, and its REDUCE calls nothing. A "call" of one of a dozen names becomes a value that this file builds from checked
arguments; every other name, opcode or argument is refused. Memory is bounded by the size of the file, since arrays are
views of bytes that stand in it.

The opcodes are those of Python's ``pickletools``; the names and states are what numpy 1.x and 2.x write for arrays,
scalars and dtypes in protocols 0-5 (``ndarray.__reduce__``, ``dtype.__reduce__``).
"""

from __future__ import annotations

import pickletools
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import CheckpointError, refusal
from .files import file_size, open_for_reading, refuse_pointer

# A public dataset_stats.pkl has 29 kB and 200 opcodes; a hundred tasks with long examples stay far below these.
MAX_BYTES = 16 << 20
MAX_OPCODES = 1_000_000
MAX_DEPTH = 16


class _Global(Enum):
    """What a name in a pickle may stand for."""

    RECONSTRUCT = "an empty array, filled by BUILD"
    FROMBUFFER = "an array of protocol 5"
    NDARRAY = "the type that RECONSTRUCT is told to make"
    DTYPE = "an element type"
    SCALAR = "one number of an element type"
    ENCODE = "bytes, as protocols 0-2 spell them"
    BYTES = "no bytes, as protocols 0-2 spell them"
    DICT = "an ordered dict, which is a dict"


_GLOBALS = {
    "numpy.core.multiarray._reconstruct": _Global.RECONSTRUCT,
    "numpy._core.multiarray._reconstruct": _Global.RECONSTRUCT,
    "numpy.core.numeric._frombuffer": _Global.FROMBUFFER,
    "numpy._core.numeric._frombuffer": _Global.FROMBUFFER,
    "numpy.core.multiarray.scalar": _Global.SCALAR,
    "numpy._core.multiarray.scalar": _Global.SCALAR,
    "numpy.ndarray": _Global.NDARRAY,
    "numpy.dtype": _Global.DTYPE,
    "_codecs.encode": _Global.ENCODE,
    "builtins.bytes": _Global.BYTES,
    "__builtin__.bytes": _Global.BYTES,
    "collections.OrderedDict": _Global.DICT,
}
# Numbers only: element types of objects, text or records are refused.
_ELEMENTS = frozenset(["b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"])


class _RefusedError(Exception):
    """What was found, while the file's name is not at hand."""


@dataclass(eq=False)
class _Array:
    """An array between its REDUCE and its BUILD; references to it are taken in between."""

    value: npt.NDArray[Any] | None = None


@dataclass(eq=False)
class _DType:
    """An element type; BUILD sets its byte order."""

    value: np.dtype[Any]


class _Mark:
    """The opcode MARK on the stack."""


_MARK = _Mark()


def load_plain_pickle(path: str | Path) -> Any:
    """Return the data of a pickle file: dicts, lists, tuples, strings, bytes, numbers, None and numpy arrays.

    Arrays are read-only views; the same object referred to twice is one object. Dicts have string or integer keys.

    Raises:
        CheckpointError: the file cannot be read, is larger than 16 MB or damaged, or holds anything else: the message
            names the global (e.g. ``posix.system``) or the opcode.
    """
    path = Path(path)
    refuse_pointer(path)
    with open_for_reading(path) as file:
        size = file_size(file)
        if size > MAX_BYTES:
            raise refusal(
                path,
                found=f"{size} bytes",
                expected=f"at most {MAX_BYTES} for statistics",
                do="Pass the file that the training script wrote.",
            )
        data = file.read(MAX_BYTES)
    try:
        return _plain(_Machine(data).run(), {}, 0)
    except _RefusedError as error:
        found = str(error)
    # pickletools raises these for cut-off or impossible arguments, depending on the opcode.
    except (ValueError, IndexError, OverflowError) as error:
        found = f"damaged bytes ({error})"
    raise refusal(
        path,
        found=found,
        expected="a pickle of dicts, lists, numbers and numeric numpy arrays",
        do="Nothing in it was run. If you trust its author, load it where it was made and save its arrays anew.",
    )


class _Machine:
    """The stack, the memo and the opcodes that plain data needs."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.encoded = 0

    def run(self) -> Any:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(self.data)):
            if count >= MAX_OPCODES:
                raise _RefusedError(f"more than {MAX_OPCODES} opcodes")
            if opcode.name == "STOP":
                break
            self.step(opcode.name, argument)
        value = self.pop()
        if self.stack:
            raise _RefusedError("more than one value")
        return value

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        match name:
            case "PROTO" | "FRAME":
                pass
            case (
                "INT" | "BININT" | "BININT1" | "BININT2" | "LONG" | "LONG1" | "LONG4" | "FLOAT" | "BINFLOAT"
                | "STRING" | "BINSTRING" | "SHORT_BINSTRING" | "UNICODE" | "BINUNICODE" | "SHORT_BINUNICODE"
                | "BINUNICODE8" | "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8" | "BYTEARRAY8"
            ):  # fmt: skip
                stack.append(bytes(argument) if isinstance(argument, bytearray) else argument)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
            case "MARK":
                stack.append(_MARK)
            case "EMPTY_LIST" | "EMPTY_TUPLE" | "EMPTY_DICT":
                stack.append({"EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_DICT": dict}[name]())
            case "LIST":
                stack.append(self.pop_to_mark())
            case "TUPLE":
                stack.append(tuple(self.pop_to_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(reversed([self.pop() for _ in range(int(name[-1]))])))
            case "DICT":
                stack.append(_fill({}, self.pop_to_mark()))
            case "APPEND":
                items = [self.pop()]
                self.top(list).extend(items)
            case "APPENDS":
                items = self.pop_to_mark()
                self.top(list).extend(items)
            case "SETITEM":
                items = [self.pop(), self.pop()][::-1]
                _fill(self.top(dict), items)
            case "SETITEMS":
                items = self.pop_to_mark()
                _fill(self.top(dict), items)
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self.top(object)
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.top(object)
            case "GET" | "BINGET" | "LONG_BINGET":
                if argument not in self.memo:
                    raise _RefusedError(f"a reference to the unknown value {argument}")
                stack.append(self.memo[argument])
            case "GLOBAL":
                stack.append(_global(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                attribute, module = self.pop(), self.pop()
                stack.append(_global(module, attribute))
            case "REDUCE":
                arguments, function = self.pop(), self.pop()
                stack.append(self.reduce(function, arguments))
            case "BUILD":
                state = self.pop()
                _build(self.top(object), state)
            case _:
                raise _RefusedError(f"the opcode {name}{'' if argument is None else f' {argument!r:.80}'}")

    def pop(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise _RefusedError("damaged bytes (a value is missing)")
        return self.stack.pop()

    def pop_to_mark(self) -> list[Any]:
        items: list[Any] = []
        while self.stack:
            item = self.stack.pop()
            if item is _MARK:
                return items[::-1]
            items.append(item)
        raise _RefusedError("damaged bytes (a mark is missing)")

    def top(self, kind: type) -> Any:
        if not self.stack or self.stack[-1] is _MARK or not isinstance(self.stack[-1], kind):
            raise _RefusedError(f"damaged bytes (no {kind.__name__} where one is used)")
        return self.stack[-1]

    def reduce(self, function: Any, arguments: Any) -> Any:
        """Return what the call stands for; nothing is called."""
        match function, arguments:
            case _Global.RECONSTRUCT, (_Global.NDARRAY, (0,), b"b" | "b"):
                return _Array()
            case _Global.FROMBUFFER, (bytes() as data, _DType() as dtype, shape, "C" | "F" as order, *_):
                return _Array(_view(data, dtype, shape, order == "F"))
            case _Global.FROMBUFFER, (bytes() as data, _DType() as dtype, shape, "K", axes):
                array = _view(data, dtype, shape, False)
                if not isinstance(axes, tuple) or not all(type(axis) is int for axis in axes):
                    raise _RefusedError("an order of axes that is none")
                return _Array(array.transpose(axes))
            case _Global.SCALAR, (_DType() as dtype, bytes() | str() as data):
                return _view(_as_bytes(data), dtype, (), False)[()]
            case _Global.DTYPE, (str() as code, 0, 1) if code in _ELEMENTS:
                return _DType(np.dtype(code))
            case _Global.DTYPE, (str() as code, *_):
                raise _RefusedError(f"an array of element type {code[:20]!r}")
            case _Global.ENCODE, (str() as text, "latin1" | "latin-1"):
                # Each text in the file is encoded once by an honest pickle, so the sum never exceeds the file.
                self.encoded += len(text)
                if self.encoded > len(self.data):
                    raise _RefusedError("one text turned into bytes again and again")
                return text.encode("latin-1")
            case _Global.BYTES, ():
                return b""
            case _Global.DICT, ():
                return {}
        name = f"the use of {function.name} with" if isinstance(function, _Global) else "a call of no function with"
        raise _RefusedError(f"{name} arguments that no array has")


def _global(module: Any, attribute: Any) -> _Global:
    if not isinstance(module, str) or not isinstance(attribute, str):
        raise _RefusedError("a global without a name")
    name = f"{module}.{attribute}"
    if name not in _GLOBALS:
        raise _RefusedError(f"the global {name[:120]}")
    return _GLOBALS[name]


def _build(value: Any, state: Any) -> None:
    """Complete an array or an element type from its state."""
    match value, state:
        case _Array(value=None), (1, shape, _DType() as dtype, bool() | 0 | 1 as fortran, bytes() | str() as data):
            value.value = _view(_as_bytes(data), dtype, shape, bool(fortran))
        case _DType(), (3, "<" | ">" | "|" | "=" as order, None, None, None, -1, -1, 0):
            value.value = value.value.newbyteorder(order)
        case _:
            raise _RefusedError(f"a state that {type(value).__name__.strip('_').lower()} does not have")


def _view(data: bytes, dtype: _DType, shape: Any, fortran: bool) -> npt.NDArray[Any]:
    """Return an array over the bytes themselves, after checking that they are as many as the shape says."""
    # Not printed: shared tuples inside tuples could spell out to any length. 2**31 bounds the case of a zero beside.
    if not isinstance(shape, tuple) or len(shape) > 8 or not all(type(n) is int and 0 <= n < 1 << 31 for n in shape):
        raise _RefusedError("an array whose shape is none")
    expected = prod(shape) * dtype.value.itemsize
    if expected != len(data):
        raise _RefusedError(f"an array {dtype.value} {list(shape)} of {expected} bytes with {len(data)} bytes of data")
    if not data:
        return np.empty(shape, dtype.value)
    return np.frombuffer(data, dtype.value).reshape(shape, order="F" if fortran else "C")


def _as_bytes(data: bytes | str) -> bytes:
    # Python 2 wrote bytes as text; pickletools reads them as Latin-1. Anything wider fails here as damaged.
    return data.encode("latin-1") if isinstance(data, str) else data


def _fill(table: dict[Any, Any], items: Sequence[Any]) -> dict[Any, Any]:
    if len(items) % 2:
        raise _RefusedError("damaged bytes (a key without a value)")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if type(key) not in (str, int):
            raise _RefusedError(f"a dict key of type {type(key).__name__.strip('_')}")
        table[key] = value
    return table


def _plain(value: Any, done: dict[int, Any], depth: int) -> Any:
    """Return the value with its arrays in place; `done` keeps shared values shared and finds cycles."""
    if isinstance(value, _Array):
        if value.value is None:
            raise _RefusedError("an array without data")
        return value.value
    if isinstance(value, (_Global, _DType, _Mark)):
        raise _RefusedError(f"a bare {type(value).__name__.strip('_').lower()}")
    if not isinstance(value, (dict, list, tuple)):
        return value
    if id(value) in done:
        if done[id(value)] is _MARK:
            raise _RefusedError("a value that contains itself")
        return done[id(value)]
    if depth >= MAX_DEPTH:
        raise _RefusedError(f"more than {MAX_DEPTH} levels")
    done[id(value)] = _MARK
    plain: Any
    if isinstance(value, dict):
        plain = {key: _plain(item, done, depth + 1) for key, item in value.items()}
    else:
        plain = type(value)(_plain(item, done, depth + 1) for item in value)
    done[id(value)] = plain
    return plain


__all__ = ["CheckpointError", "load_plain_pickle"]
