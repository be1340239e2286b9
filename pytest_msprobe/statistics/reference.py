# SPDX-License-Identifier: Apache-2.0
"""The statistics in plain torch, on any device: the definition the others are held to.

Slow and simple; also the fallback for element types that a faster backend leaves out.
"""

from collections.abc import Sequence

import numpy as np
import torch

from pytest_msprobe.model import records
from pytest_msprobe.statistics.checksum import word_factors
from pytest_msprobe.statistics.sketch import SEED
from pytest_msprobe.statistics.spec import Span

_MASK = 0xFFFFFFFF
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _mix(h: torch.Tensor) -> torch.Tensor:
    h = h ^ (h >> 16)
    h = (h * 0x7FEB352D) & _MASK
    h = h ^ (h >> 15)
    h = (h * 0x846CA68B) & _MASK
    return h ^ (h >> 16)


def _factor(base: torch.Tensor, high: int, low: int) -> torch.Tensor:
    return ((_mix((base + high) & _MASK) << 32) + _mix((base + low) & _MASK)) | 1


def _words(flat: torch.Tensor) -> torch.Tensor:
    """Unsigned words of each element as (n, words) int64, words of at most 32 bits."""
    size = flat.element_size()
    if size <= 4:  # noqa: PLR2004 - bytes of a word
        raw = flat.contiguous().view(_BITS[size]).to(torch.int64)
        return (raw & ((1 << 8 * size) - 1)).reshape(-1, 1)
    raw = flat.contiguous().view(torch.int32).to(torch.int64) & _MASK
    return raw.reshape(flat.shape[0], size // 4)


def flatten_span(tensor: torch.Tensor, span: Span) -> torch.Tensor:
    """The elements of a span as a one-dimensional tensor, row-major."""
    rows = tensor.shape[0] if tensor.ndim else 1
    flat = tensor.reshape(rows, -1) if tensor.numel() else tensor.reshape(0, 1)
    part = flat[span.first_row : span.first_row + span.rows]
    return part[:, span.first_column : span.first_column + span.columns].reshape(-1)


def span_index(span: Span, device: torch.device) -> torch.Tensor:
    """The index of every element of a span, int64, row-major."""
    rows = torch.arange(span.rows, device=device, dtype=torch.int64)
    columns = torch.arange(span.columns, device=device, dtype=torch.int64)
    start = span.first_index + rows[:, None] * span.index_stride
    return (start + columns[None, :]).reshape(-1)


def _as_float(flat: torch.Tensor) -> torch.Tensor:
    """Elements as float32 or float64; complex ones by magnitude."""
    if flat.is_complex():
        if flat.dtype == torch.complex32:
            flat = flat.to(torch.complex64)
        return flat.abs()
    return flat if flat.dtype == torch.float64 else flat.to(torch.float32)


def _fill_floats(
    values: torch.Tensor, index: torch.Tensor, base: torch.Tensor, row: records.Row
) -> None:
    bits = row.view(np.int64)
    finite = torch.isfinite(values)
    bits[records.NAN] += int(torch.isnan(values).sum())
    bits[records.POSITIVE_INF] += int(torch.isposinf(values).sum())
    bits[records.NEGATIVE_INF] += int(torch.isneginf(values).sum())
    if not bool(finite.any()):
        return
    good = values[finite]
    row[records.MAXIMUM] = max(row[records.MAXIMUM], float(good.max()))
    row[records.MINIMUM] = min(row[records.MINIMUM], float(good.min()))
    row[records.TOTAL] += float(good.double().sum())
    row[records.SQUARES] += float((good * good).double().sum())
    column = index & 63
    first = _mix((base + 0x9E3779B9) & _MASK)
    second = _mix((base + 0x3C6EF372) & _MASK)
    word = torch.where(column < 32, first, second)  # noqa: PLR2004 - bits of a word
    sign = ((word >> (column & 31)) & 1) * 2 - 1
    bucket = column ^ (base >> 26)
    signed = torch.where(finite, values, torch.zeros_like(values)).double() * sign
    sums = torch.zeros(records.SKETCH_SIZE, dtype=torch.float64, device=values.device)
    row[records.SKETCH :] += sums.index_add_(0, bucket, signed).cpu().numpy()


def _fill_checksum(
    flat: torch.Tensor, index: torch.Tensor, base: torch.Tensor, row: records.Row
) -> None:
    words = _words(flat)
    count, size = words.shape[1], flat.element_size()
    column = index & 63
    bucket = column ^ (base >> 26)
    factors = torch.from_numpy(word_factors().view(np.int64)).to(flat.device)
    if size <= 4:  # noqa: PLR2004 - bytes of a word
        shift = 8 * ((column * size) & 3)
        terms = (words[:, 0] << shift) * factors[(bucket * size) >> 2]
    else:
        place = bucket[:, None] * count + torch.arange(count, device=flat.device)
        terms = (words * factors[place]).sum(dim=1)
    total = (terms * _factor(base, 0xDAA66D2B, 0x78DDE6E4)).sum()
    bits = row.view(np.uint64)
    with np.errstate(over="ignore"):
        bits[records.CHECKSUM] += np.uint64(int(total) & 0xFFFF_FFFF_FFFF_FFFF)


def _fill_integers(flat: torch.Tensor, row: records.Row) -> None:
    bits = row.view(np.uint64 if flat.dtype == torch.uint64 else np.int64)
    if flat.dtype in (torch.uint16, torch.uint32, torch.uint64):
        values = flat.cpu().numpy()
        high, low = int(values.max()), int(values.min())
    else:
        wide = flat.to(torch.int64)
        high, low = int(wide.max()), int(wide.min())
    if row.view(np.int64)[records.COUNT] == 0:
        bits[records.MAXIMUM], bits[records.MINIMUM] = high, low
    else:
        bits[records.MAXIMUM] = max(int(bits[records.MAXIMUM]), high)
        bits[records.MINIMUM] = min(int(bits[records.MINIMUM]), low)


class ReferenceBackend:
    """Statistics by torch operations, any device, any dtype with a byte view."""

    name = "reference"

    def measure(
        self, tensor: torch.Tensor, parts: Sequence[Sequence[Span]], rows: records.Row
    ) -> None:
        """See `spec.Backend.measure`."""
        detached = tensor.detach()
        if detached.is_conj() or detached.is_neg():
            detached = detached.resolve_conj().resolve_neg()
        for spans, row in zip(parts, rows, strict=True):
            self._measure_part(detached, spans, row)

    def _measure_part(
        self, tensor: torch.Tensor, spans: Sequence[Span], row: records.Row
    ) -> None:
        row[:] = 0.0
        is_sketched = tensor.is_floating_point() or tensor.is_complex()
        if is_sketched:
            row[records.MAXIMUM], row[records.MINIMUM] = -np.inf, np.inf
        for span in spans:
            flat = flatten_span(tensor, span)
            if flat.numel() == 0:
                continue
            index = span_index(span, flat.device)
            block = index >> 6
            base = _mix((block & _MASK) ^ _mix(((block >> 32) + SEED) & _MASK))
            if is_sketched:
                _fill_floats(_as_float(flat), index, base, row)
            else:
                _fill_integers(flat, row)
            _fill_checksum(flat, index, base, row)
            row.view(np.int64)[records.COUNT] += flat.numel()
