# SPDX-License-Identifier: Apache-2.0
# LLVM's builder takes code apart into many small steps.
# mypy: disable-error-code="untyped-decorator"
"""What the CPU kernel does with the 64 elements of a block, as vectors of LLVM.

Loops over memory that may overlap are compiled with checks, or not into vectors at all;
here a block is one value, which LLVM cuts into registers. All functions are for kernels
of numba and take addresses; memory needs no alignment. Numba keeps compiled kernels by
the file they stand in, so after a change here the hash in cpu.py changes as well.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

LANES = 64
_GROUP = 8  # lanes that stay together
_I16, _I32, _I64 = (ir.IntType(bits) for bits in (16, 32, 64))
_F32, _F64 = ir.FloatType(), ir.DoubleType()
_SIGN = 1 << 31


def _vector(element: Any, count: int = LANES) -> Any:
    return ir.VectorType(element, count)


def _all(kind: Any, value: Any) -> Any:
    """The same value in all lanes."""
    return ir.Constant(kind, [value] * kind.count)


def _load(builder: Any, address: Any, kind: Any) -> Any:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=1)


def _store(builder: Any, value: Any, address: Any) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=1)


def _at(builder: Any, address: Any, offset: int) -> Any:
    return builder.add(address, ir.Constant(_I64, offset))


# Numba looks at the names of an intrinsic's parameters.
_TAKES: dict[int, Callable[..., Any]] = {
    1: lambda *found: lambda _context, _a: found,
    2: lambda *found: lambda _context, _a, _b: found,
    3: lambda *found: lambda _context, _a, _b, _c: found,
}


def _function(arguments: tuple[Any, ...], result: Any = types.void) -> Any:
    """Makes an intrinsic of a function that writes its code."""

    def make(write: Callable[..., Any]) -> Any:
        def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            value = write(builder, *args)
            return context.get_dummy_value() if result is types.void else value

        return intrinsic(_TAKES[len(arguments)](result(*arguments), generate))

    return make


@_function((types.int64, types.int64))
def widen_bfloat16(builder: Any, source: Any, target: Any) -> None:
    """64 bfloat16 as float32."""
    wide = builder.zext(_load(builder, source, _vector(_I16)), _vector(_I32))
    bits = builder.shl(wide, _all(_vector(_I32), 16))
    _store(builder, bits, target)


@_function((types.int64, types.int64))
def widen_float16(builder: Any, source: Any, target: Any) -> None:
    """64 float16 as float32."""
    kind, floats = _vector(_I32), _vector(_F32)
    half = builder.zext(_load(builder, source, _vector(_I16)), kind)
    body = builder.shl(builder.and_(half, _all(kind, 0x7FFF)), _all(kind, 13))
    scale = builder.bitcast(_all(kind, 0x77800000), floats)
    number = builder.fmul(builder.bitcast(body, floats), scale)
    infinite = builder.or_(body, _all(kind, 0x7F800000))
    exponent = builder.and_(half, _all(kind, 0x7C00))
    is_special = builder.icmp_unsigned("==", exponent, _all(kind, 0x7C00))
    chosen = builder.select(is_special, infinite, builder.bitcast(number, kind))
    sign = builder.shl(builder.and_(half, _all(kind, 0x8000)), _all(kind, 16))
    _store(builder, builder.or_(chosen, sign), target)


@_function((types.int64, types.int64))
def add_extremes(builder: Any, source: Any, extremes: Any) -> None:
    """Maxima and minima of 64 lanes, one behind the other, over 64 more float32."""
    kind = _vector(_F32)
    x = _load(builder, source, kind)
    for offset, sign in ((0, ">"), (4 * LANES, "<")):
        place = _at(builder, extremes, offset)
        known = _load(builder, place, kind)
        is_new = builder.fcmp_ordered(sign, x, known)
        _store(builder, builder.select(is_new, x, known), place)


@_function((types.int64, types.int64))
def add_sums(builder: Any, source: Any, sums: Any) -> None:
    """Sums and sums of squares of 64 lanes, one behind the other, and 64 more."""
    kind = _vector(_F32)
    x = _load(builder, source, kind)
    for offset, value in ((0, x), (4 * LANES, builder.fmul(x, x))):
        place = _at(builder, sums, offset)
        _store(builder, builder.fadd(_load(builder, place, kind), value), place)


@_function((types.int64, types.int64, types.int64))
def give_signs(builder: Any, lanes: Any, first: Any, second: Any) -> None:
    """Changes the signs of 64 float32 where a bit of two words of 32 is 0."""
    kind = _vector(_I32)
    bits = _load(builder, lanes, kind)
    shifts = ir.Constant(kind, [31 - lane % 32 for lane in range(LANES)])
    words = []
    for word in (first, second):
        one = builder.not_(builder.trunc(word, _I32))
        single = builder.insert_element(
            ir.Constant(_vector(_I32, 32), ir.Undefined), one, ir.Constant(_I32, 0)
        )
        same = ir.Constant(_vector(_I32, 32), [0] * 32)
        words.append(builder.shuffle_vector(single, single, same))
    order = ir.Constant(kind, list(range(LANES)))
    flips = builder.shl(builder.shuffle_vector(*words, order), shifts)
    flips = builder.and_(flips, _all(kind, _SIGN))
    _store(builder, builder.xor(bits, flips), lanes)


@_function((types.int64, types.int64, types.int64))
def add_groups(builder: Any, lanes: Any, sums: Any, turn: Any) -> None:
    """Adds groups of 8 float32 to those of 64 sums, group i to group i ^ turn."""
    kind = _vector(_F32, _GROUP)
    for group in range(LANES // _GROUP):
        x = _load(builder, _at(builder, lanes, 4 * _GROUP * group), kind)
        place = builder.xor(turn, ir.Constant(_I64, group))
        place = builder.add(sums, builder.mul(place, ir.Constant(_I64, 4 * _GROUP)))
        _store(builder, builder.fadd(_load(builder, place, kind), x), place)


@_function((types.int64, types.int64))
def flush(builder: Any, sums: Any, wide: Any) -> None:
    """Adds 64 float32 to 64 float64, and sets them to 0."""
    kind = _vector(_F32)
    x = builder.fpext(_load(builder, sums, kind), _vector(_F64))
    known = _load(builder, wide, _vector(_F64))
    _store(builder, builder.fadd(known, x), wide)
    _store(builder, _all(kind, 0.0), sums)


def _halved(builder: Any, value: Any, join: Callable[[Any, Any], Any]) -> Any:
    """One value of all lanes: the upper half joins the lower until one is left."""
    count = value.type.count
    while count > 1:
        count //= 2
        undefined = ir.Constant(value.type, ir.Undefined)
        low, high = (
            builder.shuffle_vector(
                value, undefined, ir.Constant(_vector(_I32, count), order)
            )
            for order in (list(range(count)), list(range(count, 2 * count)))
        )
        value = join(low, high)
    return builder.extract_element(value, ir.Constant(_I32, 0))


@_function((types.int64,), types.float64)
def sum_lanes(builder: Any, lanes: Any) -> Any:
    """Sum of 64 float32."""
    x = builder.fpext(_load(builder, lanes, _vector(_F32)), _vector(_F64))
    return _halved(builder, x, builder.fadd)


@_function((types.int64,), types.float64)
def sum_wide_lanes(builder: Any, lanes: Any) -> Any:
    """Sum of 64 float64."""
    return _halved(builder, _load(builder, lanes, _vector(_F64)), builder.fadd)


def _extreme(sign: str) -> Callable[..., Any]:
    def write(builder: Any, lanes: Any) -> Any:
        def join(low: Any, high: Any) -> Any:
            return builder.select(builder.fcmp_ordered(sign, low, high), low, high)

        value = _halved(builder, _load(builder, lanes, _vector(_F32)), join)
        return builder.fpext(value, _F64)

    return write


# Of 64 float32, as float64.
maximum = _function((types.int64,), types.float64)(_extreme(">"))
minimum = _function((types.int64,), types.float64)(_extreme("<"))


def _fold(element: Any) -> Callable[..., None]:
    def write(builder: Any, rows: Any, sums: Any) -> None:
        kind = _vector(element)
        total = _load(builder, sums, _vector(_F64))
        size = 4 if element is _F32 else 8
        for turn in range(_GROUP):
            row = _load(builder, _at(builder, rows, turn * LANES * size), kind)
            order = [lane ^ turn for lane in range(LANES)]
            row = builder.shuffle_vector(row, row, ir.Constant(_vector(_I32), order))
            if element is _F32:
                row = builder.fpext(row, _vector(_F64))
            total = builder.fadd(total, row)
        _store(builder, total, sums)

    return write


# Adds 8 rows of 64 float32 or float64 to 64 float64, lane i of row k to sum i ^ k.
fold = _function((types.int64, types.int64))(_fold(_F32))
fold_wide = _function((types.int64, types.int64))(_fold(_F64))


def _words_summed(count: int) -> Callable[..., Any]:
    def write(builder: Any, words: Any, factors: Any) -> Any:
        kind = _vector(_I64, count)
        wide = builder.zext(_load(builder, words, _vector(_I32, count)), kind)
        products = builder.mul(wide, _load(builder, factors, kind))
        return _halved(builder, products, builder.add)

    return write


_SUMMED = _function((types.int64, types.int64), types.uint64)
# Sum of the products of 32 or 64 words of 32 bits and as many factors of 64 bits.
sum_32_words = _SUMMED(_words_summed(32))
sum_64_words = _SUMMED(_words_summed(64))
