# SPDX-License-Identifier: Apache-2.0
"""Index hash, sketch and checksum of docs/formats.md in plain Python.

A second implementation: it shares no code with the package and uses only integers and
floats, so that the written definition, not one program, is what the tests hold.
"""

M32 = (1 << 32) - 1
M64 = (1 << 64) - 1
SEED = 0x6D737072


def mix(h):
    h &= M32
    h ^= h >> 16
    h = h * 0x7FEB352D & M32
    h ^= h >> 15
    h = h * 0x846CA68B & M32
    return h ^ (h >> 16)


def base(block):
    return mix((block & M32) ^ mix((block >> 32) + SEED))


def bucket_and_sign(index):
    b, c = index >> 6, index & 63
    h = mix(base(b) + (0x9E3779B9 if c < 32 else 0x3C6EF372))
    return c ^ (base(b) >> 26), 1 if h >> (c & 31) & 1 else -1


def sketch(values, first=0):
    sums = [0.0] * 64
    for offset, value in enumerate(values):
        bucket, sign = bucket_and_sign(first + offset)
        sums[bucket] += sign * value
    return sums


def block_factor(block):
    b = base(block)
    return ((mix(b + 0xDAA66D2B) << 32) + mix(b + 0x78DDE6E4)) | 1


def word_factor(j):
    return ((mix(j + 0x1715609D) << 32) + mix(j + 0xB54CDA56)) | 1


def checksum(elements, size, first=0):
    """Checksum of elements given as unsigned integers of `size` bytes."""
    total = 0
    for offset, bits in enumerate(elements):
        index = first + offset
        b, c = index >> 6, index & 63
        bucket = c ^ (base(b) >> 26)
        if size <= 4:
            term = (bits << 8 * (c * size % 4)) * word_factor(bucket * size // 4)
        else:
            words = size // 4
            term = sum(
                (bits >> 32 * w & M32) * word_factor(bucket * words + w)
                for w in range(words)
            )
        total += term * block_factor(b)
    return total & M64
