# SPDX-License-Identifier: Apache-2.0
"""Element types by name, without torch.

A type is written with torch's short name (`bfloat16`, `int64`); a dump adds msProbe's
`torch.` in front.
"""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["float", "int", "bool", "complex"]


@dataclass(frozen=True, slots=True)
class ElementType:
    """One element type.

    Attributes:
        name: torch's short name.
        code: Short code used in capture files.
        kind: Family of the type.
        size_bytes: Bytes of one element.
    """

    name: str
    code: str
    kind: Kind
    size_bytes: int


_TYPES = (
    ElementType("float16", "f16", "float", 2),
    ElementType("bfloat16", "bf16", "float", 2),
    ElementType("float32", "f32", "float", 4),
    ElementType("float64", "f64", "float", 8),
    ElementType("float8_e4m3fn", "f8e4m3fn", "float", 1),
    ElementType("float8_e4m3fnuz", "f8e4m3fnuz", "float", 1),
    ElementType("float8_e5m2", "f8e5m2", "float", 1),
    ElementType("float8_e5m2fnuz", "f8e5m2fnuz", "float", 1),
    ElementType("float8_e8m0fnu", "f8e8m0fnu", "float", 1),
    ElementType("int8", "i8", "int", 1),
    ElementType("int16", "i16", "int", 2),
    ElementType("int32", "i32", "int", 4),
    ElementType("int64", "i64", "int", 8),
    ElementType("uint8", "u8", "int", 1),
    ElementType("uint16", "u16", "int", 2),
    ElementType("uint32", "u32", "int", 4),
    ElementType("uint64", "u64", "int", 8),
    ElementType("bool", "b8", "bool", 1),
    ElementType("complex32", "c32", "complex", 4),
    ElementType("complex64", "c64", "complex", 8),
    ElementType("complex128", "c128", "complex", 16),
)
BY_NAME = {t.name: t for t in _TYPES}
BY_CODE = {t.code: t for t in _TYPES}


def element_type(name: str) -> ElementType:
    """Looks a type up by name, with or without `torch.`; unknown names get kind int.

    An unknown type (quantized, sub-byte) is measured by its bytes only.
    """
    short = name.removeprefix("torch.")
    return BY_NAME.get(short) or ElementType(short, short, "int", 1)


def is_sketched(name: str) -> bool:
    """Whether rows of this type carry sums and a sketch: floats and complex."""
    return element_type(name).kind in ("float", "complex")


def is_narrow(name: str) -> bool:
    """Whether a type has at most 16 bits, so its sketch is stored as 64 int16."""
    return element_type(name).size_bytes <= 2  # noqa: PLR2004 - 16 bits
