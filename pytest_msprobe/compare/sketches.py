# SPDX-License-Identifier: Apache-2.0
"""Decodes stored sketches in bulk: `statistics.sketch.unpack` over whole columns."""

import sys
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pytest_msprobe.model.records import SKETCH_SIZE
from pytest_msprobe.statistics.sketch import fold, unpack

_F64 = npt.NDArray[np.float64]

# 128 bytes in base 85: five characters for every four bytes.
_CHARACTERS = 160
_WORDS = _CHARACTERS // 5
_ALPHABET = (
    "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
    "!#$%&()*+-;<=>?@^_`{|}~"
)
_INVALID = 255
_IS_LITTLE = sys.byteorder == "little"
_DIGITS = bytes(
    _ALPHABET.find(chr(code)) if chr(code) in _ALPHABET else _INVALID
    for code in range(256)
)
# The largest word: 32 bits.
_FIRST, _REST = divmod(2**32 - 1, 85**4)
# So many sketches at once that the intermediate arrays stay in the cache.
_CHUNK = 1024


def decode(texts: Sequence[str], scales: _F64 | None) -> _F64:
    """Stored sketches of one kind.

    Args:
        texts: Sketches in base 85.
        scales: (n,) what one unit of each int16 stands for, or None for float32.

    Returns:
        (n, 64) float64 for int16, (n, 32) for float32.

    Raises:
        DumpFormatError: One of them is not base 85 of 128 bytes.
    """
    size = SKETCH_SIZE if scales is not None else SKETCH_SIZE // 2
    result = np.empty((len(texts), size))
    for first in range(0, len(texts), _CHUNK):
        part = slice(first, first + _CHUNK)
        result[part] = _decode_chunk(
            texts[part], None if scales is None else scales[part]
        )
    return result


def _decode_chunk(texts: Sequence[str], scales: _F64 | None) -> _F64:
    joined = "".join(texts)
    if not joined.isascii() or set(map(len, texts)) != {_CHARACTERS}:
        return _one_by_one(texts, scales)
    raw = joined.encode("ascii").translate(_DIGITS)
    digits = np.frombuffer(raw, np.uint8).reshape(-1, 5).T
    words = digits[1].astype(np.uint32)
    for place in digits[2:]:
        words *= np.uint32(85)
        words += place
    first = digits[0]
    is_wrong = (first > _FIRST) | ((first == _FIRST) & (words > _REST))
    if _INVALID in raw or is_wrong.any():
        return _one_by_one(texts, scales)
    words += first.astype(np.uint32) * np.uint32(85**4)
    stored = words.byteswap() if _IS_LITTLE else words
    shaped = stored.reshape(len(texts), _WORDS)
    if scales is None:
        wide: _F64 = shaped.view("<f4").astype(np.float64)
        return wide
    values: _F64 = shaped.view("<i2").astype(np.float64)
    values *= scales[:, None]
    return values


def _one_by_one(texts: Sequence[str], scales: _F64 | None) -> _F64:
    """Sketches of unusual length, or damaged ones: names what cannot be read."""
    units = [None] * len(texts) if scales is None else [float(unit) for unit in scales]
    return np.array([unpack(text, u) for text, u in zip(texts, units, strict=True)])


def distances(
    old: Sequence[str], new: Sequence[str], old_scales: _F64, new_scales: _F64
) -> _F64:
    """Estimated L2 distances of pairs of sketches.

    Where one side has 64 buckets and the other 32, the former is folded.

    Args:
        old: Sketches, empty where a row has none.
        new: Those of the other side.
        old_scales: (n,) scales of 16-bit sketches, NaN for 32-bit ones.
        new_scales: Those of the other side.

    Returns:
        (n,) distances; NaN where a side has no sketch.
    """
    result = np.full(len(old), np.nan)
    is_wide = np.isnan(old_scales), np.isnan(new_scales)
    has_both = np.fromiter(map(bool, old), np.bool_, len(old))
    has_both &= np.fromiter(map(bool, new), np.bool_, len(new))
    for kinds in ((False, False), (True, True), (False, True), (True, False)):
        chosen = has_both & (is_wide[0] == kinds[0]) & (is_wide[1] == kinds[1])
        rows = np.flatnonzero(chosen)
        for first in range(0, len(rows), _CHUNK):
            part = rows[first : first + _CHUNK]
            a = _side(old, old_scales, part, is_wide=kinds[0], is_folded=kinds[1])
            b = _side(new, new_scales, part, is_wide=kinds[1], is_folded=kinds[0])
            a -= b
            result[part] = np.sqrt(np.einsum("ij,ij->i", a, a))
    return result


def _side(
    texts: Sequence[str],
    scales: _F64,
    rows: npt.NDArray[np.int64],
    *,
    is_wide: bool,
    is_folded: bool,
) -> _F64:
    """Sketches of some rows, folded where the other side has 32 buckets."""
    values = decode([texts[i] for i in rows], None if is_wide else scales[rows])
    return fold(values) if is_folded and not is_wide else values
