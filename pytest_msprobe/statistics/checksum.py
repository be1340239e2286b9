# SPDX-License-Identifier: Apache-2.0
"""The 64-bit checksum of a tensor in numpy, the tables that every backend needs.

A checksum is a sum over elements, so those of segments, chunks and shards add up
(modulo 2**64), whatever the strides were.
"""

import numpy as np
import numpy.typing as npt

from pytest_msprobe.statistics.sketch import block_base, mix

TABLE_SIZE = 256

_U64 = npt.NDArray[np.uint64]


def _widen(high: npt.NDArray[np.uint32], low: npt.NDArray[np.uint32]) -> _U64:
    return ((high.astype(np.uint64) << np.uint64(32)) + low) | np.uint64(1)


def word_factors() -> _U64:
    """The 256 factors K of the words of a block, odd uint64."""
    j = np.arange(TABLE_SIZE, dtype=np.uint32)
    return _widen(mix(j + np.uint32(0x1715609D)), mix(j + np.uint32(0xB54CDA56)))


def block_factors(block: _U64) -> _U64:
    """The factors A of blocks, odd uint64, elementwise."""
    base = block_base(block)
    return _widen(mix(base + np.uint32(0xDAA66D2B)), mix(base + np.uint32(0x78DDE6E4)))


def checksum(bits: npt.NDArray[np.unsignedinteger], first_index: int = 0) -> int:
    """Checksum of consecutive elements.

    Args:
        bits: (n,) uint8, uint16, uint32 or uint64, or (n, words) uint64 for elements
            of 8 bytes and more given as little-endian 32-bit words.
        first_index: Index of the first element.

    Returns:
        An integer of 64 bits.
    """
    if bits.ndim == 1 and bits.dtype.itemsize == 8:  # noqa: PLR2004 - bytes
        words = np.stack([bits & np.uint64(0xFFFFFFFF), bits >> np.uint64(32)], axis=1)
        return checksum(words, first_index)
    index = np.arange(bits.shape[0], dtype=np.uint64) + np.uint64(first_index)
    column = index & np.uint64(63)
    block = index >> np.uint64(6)
    bucket = column ^ (block_base(block) >> np.uint32(26)).astype(np.uint64)
    factors = word_factors()
    if bits.ndim == 1:
        size = np.uint64(bits.dtype.itemsize)
        shift = np.uint64(8) * ((column * size) & np.uint64(3))
        terms = (bits.astype(np.uint64) << shift) * factors[
            (bucket * size) >> np.uint64(2)
        ]
    else:
        count = bits.shape[1]
        place = bucket[:, None] * np.uint64(count) + np.arange(count, dtype=np.uint64)
        terms = (bits.astype(np.uint64) * factors[place]).sum(axis=1, dtype=np.uint64)
    return int((terms * block_factors(block)).sum(dtype=np.uint64))
