# SPDX-License-Identifier: Apache-2.0
"""Reads tensors that `torch.save` wrote, without torch and without unpickling.

Such a file is an uncompressed zip archive: a pickle that names dtype, shape, strides,
and the bytes. The pickle's instructions are read as data: those that build a tensor are
understood, anything else is refused, nothing is ever called.
"""

import math
import pickletools
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pytest_msprobe.errors import DumpFormatError

# numpy's type that holds the bits of a torch type; 16-bit brain floats have none.
_BITS: dict[str, str] = {
    "float16": "<f2",
    "bfloat16": "<u2",
    "float32": "<f4",
    "float64": "<f8",
    "float8_e4m3fn": "|u1",
    "float8_e4m3fnuz": "|u1",
    "float8_e5m2": "|u1",
    "float8_e5m2fnuz": "|u1",
    "float8_e8m0fnu": "|u1",
    "int8": "|i1",
    "int16": "<i2",
    "int32": "<i4",
    "int64": "<i8",
    "uint8": "|u1",
    "uint16": "<u2",
    "uint32": "<u4",
    "uint64": "<u8",
    "bool": "|u1",
    "complex64": "<c8",
    "complex128": "<c16",
}
_STORAGES = {
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "CharStorage": "int8",
    "ShortStorage": "int16",
    "IntStorage": "int32",
    "LongStorage": "int64",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}
_LOCAL_HEADER = 30


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """A tensor in a file.

    Attributes:
        dtype: torch's short name.
        bits: Its elements, mapped from the file; bfloat16 and float8 as unsigned
            integers, bool as uint8.
    """

    dtype: str
    bits: npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class _Global:
    name: str


@dataclass(frozen=True, slots=True)
class _Call:
    function: _Global
    arguments: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class _Persistent:
    content: tuple[Any, ...]


_MARK = object()
_PLAIN = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_VALUES = {
    "BINUNICODE",
    "SHORT_BINUNICODE",
    "BININT",
    "BININT1",
    "BININT2",
    "LONG1",
    "BINFLOAT",
}
_IGNORED = {"PROTO", "FRAME", "STOP"}


def _interpret(program: bytes) -> Any:
    """What a pickle describes, calls as data.

    Raises:
        ValueError: It holds an instruction that no tensor needs.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    for opcode, argument, _ in pickletools.genops(program):
        name = opcode.name
        if name in _IGNORED:
            continue
        if name in _PLAIN:
            stack.append(_PLAIN[name])
        elif name in _VALUES:
            stack.append(argument)
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[int(str(argument))] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[int(str(argument))])
        elif name == "MARK":
            stack.append(_MARK)
        else:
            _build(name, argument, stack)
    return stack[-1]


def _build(name: str, argument: Any, stack: list[Any]) -> None:
    """Instructions that put values together."""
    if name == "GLOBAL":
        stack.append(_Global(str(argument)))
    elif name == "TUPLE":
        place = len(stack) - 1 - stack[::-1].index(_MARK)
        stack[place:] = [tuple(stack[place + 1 :])]
    elif name in _TUPLES:
        size = _TUPLES[name]
        stack[-size:] = [tuple(stack[-size:])]
    elif name == "REDUCE":
        function, arguments = stack[-2:]
        stack[-2:] = [_Call(function, arguments)]
    elif name == "BINPERSID":
        stack[-1] = _Persistent(stack[-1])
    else:
        message = f"unexpected instruction {name}"
        raise ValueError(message)


def read_tensor(path: Path) -> SavedTensor:
    """Maps a tensor from a file that `torch.save` wrote.

    Raises:
        DumpFormatError: It cannot be read or holds something else than one tensor.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            (pickled,) = (n for n in archive.namelist() if n.endswith("/data.pkl"))
            value = _interpret(archive.read(pickled))
            folder = pickled.removesuffix("data.pkl")
            return _map(path, archive, folder, value)
    except (OSError, zipfile.BadZipFile) as error:
        message = f"{path}: not a readable tensor file ({error})"
        raise DumpFormatError(message, slug="tensor-unreadable") from error
    except (ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        message = f"{path}: holds something else than one tensor ({error})"
        raise DumpFormatError(message, slug="tensor-format") from error


def _map(path: Path, archive: zipfile.ZipFile, folder: str, value: Any) -> SavedTensor:
    call = value
    if call.function.name == "torch._utils _rebuild_parameter":
        call = call.arguments[0]
    kind = call.function.name.rpartition(" ")[2]
    if kind not in ("_rebuild_tensor_v2", "_rebuild_tensor_v3"):
        raise ValueError(call.function.name)
    storage, offset, shape, strides = call.arguments[:4]
    _, storage_type, key, *_ = storage.content
    dtype = _STORAGES.get(storage_type.name.rpartition(" ")[2], "")
    if kind == "_rebuild_tensor_v3":
        dtype = call.arguments[6].name.rpartition(" ")[2]
    bits = np.dtype(_BITS[dtype])
    entry = archive.getinfo(f"{folder}data/{key}")
    if entry.compress_type != zipfile.ZIP_STORED:
        message = "compressed"
        raise ValueError(message)
    first = _data_offset(path, entry) + offset * bits.itemsize
    size = math.prod(shape)
    extent = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if size == 0:
        return SavedTensor(dtype, np.zeros(shape, bits))
    if (offset + extent) * bits.itemsize > entry.file_size:
        message = "shorter than its shape"
        raise ValueError(message)
    flat = np.memmap(path, bits, "r", first, (extent,))
    steps = [stride * bits.itemsize for stride in strides]
    return SavedTensor(dtype, np.lib.stride_tricks.as_strided(flat, shape, steps))


def _data_offset(path: Path, entry: zipfile.ZipInfo) -> int:
    """Where the bytes of an entry begin: behind its own header, name and padding."""
    with path.open("rb") as stream:
        stream.seek(entry.header_offset)
        header = stream.read(_LOCAL_HEADER)
    name, extra = struct.unpack("<HH", header[26:30])
    return int(entry.header_offset) + _LOCAL_HEADER + int(name) + int(extra)
