# SPDX-License-Identifier: Apache-2.0
"""Every statistics backend against the definition in float64 and plain Python."""

import os

import numpy as np
import plain_formats
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_msprobe.compat import has_module
from pytest_msprobe.model.records import (
    CHECKSUM,
    COUNT,
    ROW_WIDTH,
    combine,
    read_numbers,
)
from pytest_msprobe.statistics.reference import ReferenceBackend
from pytest_msprobe.statistics.spec import Span, as_rows, rows_of, whole

BACKENDS = {"reference": ReferenceBackend()}
if has_module("numba"):
    from pytest_msprobe.statistics.cpu import CpuBackend

    BACKENDS["cpu"] = CpuBackend()
# Triton can run its kernels on the CPU, slowly, where there is no GPU.
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if IS_INTERPRETED else "cuda"
if torch.cuda.is_available() or IS_INTERPRETED:
    from pytest_msprobe.statistics import cuda
    from pytest_msprobe.statistics.cuda import CudaBackend
    from pytest_msprobe.statistics.queue import DeviceQueue, prepare

    BACKENDS["cuda"] = CudaBackend()
FLOATS = ("bfloat16", "float16", "float32", "float64", "float8_e4m3fn", "float8_e5m2")
INTEGERS = (
    "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool",
)  # fmt: skip
COMPLEX = ("complex64", "complex128")
EVERY = (*FLOATS, *INTEGERS, *COMPLEX)


each_backend = pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)


def make_tensor(dtype, shape, seed):
    """A tensor of any dtype with values over its range."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * 20
    kind = getattr(torch, dtype)
    if dtype == "bool":
        return x > 0
    if dtype.startswith("complex"):
        return torch.complex(x, x.flip(0)).to(kind)
    if dtype.startswith("uint"):
        return x.abs().to(torch.int64).to(kind)
    return x.to(kind)


def on_device(tensor, device):
    """A tensor on a device, a view of as much memory as here."""
    if device == "cpu":
        return tensor
    storage = tensor.untyped_storage().cuda()
    moved = torch.empty(0, dtype=tensor.dtype, device=device)
    moved = moved.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())
    moved = moved.conj() if tensor.is_conj() else moved
    return torch._neg_view(moved) if tensor.is_neg() else moved


def numbers_of(backend, tensor, parts):
    """Numbers of each part."""
    rows = np.full((len(parts), ROW_WIDTH), np.nan)
    # Copied with its strides: views stay views.
    device = DEVICE if backend.name == "cuda" else "cpu"
    backend.measure(on_device(tensor, device), parts, rows)
    return [read_numbers(row, str(tensor.dtype)) for row in rows]


def elements(tensor, span):
    """The elements of a span and their indices, the slow and sure way."""
    rows = tensor.shape[0] if tensor.ndim else 1
    flat = tensor.reshape(rows, -1)
    for r in range(span.rows):
        for c in range(span.columns):
            value = flat[span.first_row + r, span.first_column + c]
            yield span.first_index + r * span.index_stride + c, value


def bits_of(value):
    """The bits of one element as an unsigned integer."""
    raw = value.reshape(1).contiguous().view(torch.uint8).tolist()
    return int.from_bytes(bytes(raw), "little")


def check_against_definition(tensor, span, numbers):
    """One span against plain Python, element by element."""
    pairs = list(elements(tensor, span))
    size = tensor.element_size()
    total = sum(plain_formats.checksum([bits_of(v)], size, i) for i, v in pairs)
    assert numbers.checksum == total & plain_formats.M64
    assert numbers.count == len(pairs)
    if not (tensor.is_floating_point() or tensor.is_complex()):
        values = [int(v.item()) for _, v in pairs]
        assert numbers.maximum == max(values)
        assert numbers.minimum == min(values)
        assert numbers.total is numbers.squares is numbers.sketch is None
        return
    values = [abs(v.item()) if tensor.is_complex() else v.item() for _, v in pairs]
    finite = [v for v in values if np.isfinite(v)]
    assert numbers.nan == sum(np.isnan(values))
    assert numbers.positive_inf == sum(np.isposinf(values))
    assert numbers.negative_inf == sum(np.isneginf(values))
    if not finite:
        assert numbers.maximum is numbers.minimum is None
        return
    assert numbers.maximum == pytest.approx(max(finite), rel=1e-6)
    assert numbers.minimum == pytest.approx(min(finite), rel=1e-6)
    scale = max(sum(abs(v) for v in finite), 1e-30)
    assert numbers.total == pytest.approx(sum(finite), abs=1e-6 * scale)
    assert numbers.squares == pytest.approx(sum(v * v for v in finite), rel=1e-6)
    sums = [0.0] * 64
    for (index, _), value in zip(pairs, values, strict=True):
        if np.isfinite(value):
            bucket, sign = plain_formats.bucket_and_sign(index)
            sums[bucket] += sign * value
    assert numbers.sketch == pytest.approx(np.array(sums), abs=1e-6 * scale)


@each_backend
@pytest.mark.parametrize("dtype", EVERY)
@settings(max_examples=12, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 80),
    position=st.integers(0, 300),
    seed=st.integers(0, 999),
    layout=st.sampled_from(["contiguous", "view", "transposed", "expanded"]),
)
def test_numbers_match_the_definition(
    backend, dtype, rows, columns, position, seed, layout
):
    """All numbers of rows at any position and stride are those of plain Python."""
    tensor = make_tensor(dtype, (rows, columns + 3), seed)
    if layout == "contiguous":
        tensor = tensor[:, :columns].contiguous()
    elif layout == "view":
        tensor = tensor[:, 2 : 2 + columns]
    elif layout == "transposed":
        tensor = make_tensor(dtype, (columns, rows), seed).t()
    else:
        tensor = tensor[:1, :columns].expand(rows, columns)
    span = rows_of(tensor.shape, 0, rows, position)

    (numbers,) = numbers_of(backend, tensor, [[span]])

    check_against_definition(tensor, span, numbers)


@each_backend
@pytest.mark.parametrize("dtype", FLOATS)
def test_nonfinite_elements_are_counted_apart(backend, dtype):
    """NaN and infinities are counted and leave the other numbers alone."""
    tensor = make_tensor(dtype, (5, 70), 1)
    special = [float("nan"), float("inf"), float("-inf")]
    for place, value in enumerate(special):
        tensor[place, 10 * place] = torch.tensor(value).to(tensor.dtype)

    (numbers,) = numbers_of(backend, tensor, [[whole(tensor.shape)]])

    check_against_definition(tensor, whole(tensor.shape), numbers)
    assert numbers.nonfinite >= 1


@each_backend
@pytest.mark.parametrize("dtype", EVERY)
def test_pieces_add_up(backend, dtype):
    """Numbers of disjoint rows combine to those of the whole."""
    tensor = make_tensor(dtype, (13, 50), 3)
    parts = [
        [rows_of(tensor.shape, first, n, 4 + first)] for first, n in ((0, 5), (5, 8))
    ]

    left, right = numbers_of(backend, tensor, parts)
    (together,) = numbers_of(backend, tensor, [[parts[0][0], parts[1][0]]])
    combined = combine(left, right)

    assert combined.checksum == together.checksum
    assert combined.count == together.count == 650
    assert (combined.maximum, combined.minimum) == (together.maximum, together.minimum)
    if combined.sketch is not None:
        assert combined.sketch == pytest.approx(together.sketch, rel=1e-5, abs=1e-4)
        assert combined.squares == pytest.approx(together.squares, rel=1e-6)


@each_backend
def test_column_shards_add_up(backend):
    """Shards that carry their place in the unsharded tensor combine to the whole."""
    tensor = make_tensor("bfloat16", (7, 96), 5)
    left, right = tensor[:, :32], tensor[:, 32:]
    spans = [
        Span(0, 7, 0, 32, 2 * 96, 96),
        Span(0, 7, 0, 64, 2 * 96 + 32, 96),
    ]

    (a,), (b,) = (
        numbers_of(backend, t, [[s]]) for t, s in zip((left, right), spans, strict=True)
    )
    (together,) = numbers_of(backend, tensor, [[rows_of(tensor.shape, 0, 7, 2)]])

    assert combine(a, b).checksum == together.checksum
    assert combine(a, b).sketch == pytest.approx(together.sketch, abs=1e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "int64"])
def test_backends_agree(dtype):
    """The compiled backends give the reference's numbers on a large tensor."""
    tensor = make_tensor(dtype, (300, 1000), 7)
    parts = [[rows_of(tensor.shape, 0, 1, 0)], [rows_of(tensor.shape, 1, 299, 1)]]

    found = {name: numbers_of(b, tensor, parts) for name, b in BACKENDS.items()}

    expected = found.pop("reference")
    pairs = [
        (a, b) for rows in found.values() for a, b in zip(rows, expected, strict=True)
    ]
    for a, b in pairs:
        assert a.checksum == b.checksum
        assert (a.maximum, a.minimum) == (b.maximum, b.minimum)
        if a.sketch is not None:
            assert a.squares == pytest.approx(b.squares, rel=1e-6)
            assert a.sketch == pytest.approx(b.sketch, rel=1e-4, abs=1e-2)


# Tensors of whole and broken blocks, aligned or not: rows, columns, first column,
# columns of the span, position of the first row, width of an unsharded row.
FORMS = {
    "one line": (1, 9000, 0, 9000, 0, 9000),
    "a line that begins within a block": (9, 1000, 0, 1000, 7, 1000),
    "rows of one block": (150, 192, 64, 64, 3, 64),
    "rows of three blocks": (60, 256, 64, 192, 3, 192),
    "columns of a shard": (60, 192, 64, 128, 3, 512),
    "rows at odd addresses": (9, 1001, 1, 1000, 0, 1000),
}


@each_backend
@pytest.mark.parametrize(
    ("dtype", "form", "is_finite"),
    [
        *(("bfloat16", form, True) for form in FORMS),
        ("bfloat16", "one line", False),
        ("bfloat16", "columns of a shard", False),
        ("float16", "one line", True),
        ("float16", "rows of three blocks", False),
        ("float32", "a line that begins within a block", True),
        ("float32", "rows of three blocks", True),
        ("float32", "one line", False),
    ],
)
def test_large_tensors_of_any_form(backend, dtype, form, is_finite):
    """However the blocks of a span lie in memory, the numbers are the reference's."""
    rows, width, first, columns, position, whole_width = FORMS[form]
    tensor = make_tensor(dtype, (rows, width), 11)
    if not is_finite:
        tensor[rows // 2, first + 3] = float("nan")
        tensor[rows - 1, first + columns - 1] = float("-inf")
    span = Span(0, rows, first, columns, position * whole_width, whole_width)

    (found,) = numbers_of(backend, tensor, [[span]])
    (expected,) = numbers_of(BACKENDS["reference"], tensor, [[span]])

    assert (found.checksum, found.count) == (expected.checksum, expected.count)
    assert (found.maximum, found.minimum) == (expected.maximum, expected.minimum)
    assert (found.nan, found.negative_inf) == (expected.nan, expected.negative_inf)
    assert found.squares == pytest.approx(expected.squares, rel=1e-6)
    scale = max(abs(expected.sketch).max(), 1.0)
    assert found.sketch == pytest.approx(expected.sketch, abs=1e-5 * scale)


@pytest.mark.skipif("cuda" not in BACKENDS, reason="no CUDA device here")
@pytest.mark.parametrize(
    ("dtype", "parts"), [("bfloat16", 40), ("bfloat16", 3), ("int32", 3)]
)
def test_programs_of_a_span_add_up(monkeypatch, dtype, parts):
    """What many programs read of a span is what one reads, and the same every time."""
    monkeypatch.setattr(cuda, "_ALONE_TILES", 1)
    monkeypatch.setattr(cuda, "_PART_TILES", 1)
    monkeypatch.setattr(cuda, "MOST_PARTS", parts)
    tensor = make_tensor(dtype, (parts + 1, 4096), 3)
    span = rows_of(tensor.shape, 0, parts + 1, 5)

    first, again = (numbers_of(BACKENDS["cuda"], tensor, [[span]])[0] for _ in "12")
    (expected,) = numbers_of(BACKENDS["reference"], tensor, [[span]])

    assert (first.checksum, first.count) == (expected.checksum, expected.count)
    assert (first.maximum, first.minimum) == (expected.maximum, expected.minimum)
    assert (first.total, first.squares) == (again.total, again.squares)
    if first.sketch is not None:
        assert first.sketch.tolist() == again.sketch.tolist()
        assert first.sketch == pytest.approx(expected.sketch, abs=1e-2)


def test_sum_of_squares_of_many_elements():
    """The squares of 1e7 bfloat16 elements are right to 1e-6."""
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(10_000_000, generator=generator).bfloat16()

    (numbers,) = numbers_of(BACKENDS["cpu"], tensor, [[whole(tensor.shape)]])

    exact = float((tensor.double() ** 2).sum())
    assert numbers.squares == pytest.approx(exact, rel=1e-6)
    assert numbers.total == pytest.approx(float(tensor.double().sum()), abs=1e-2)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="numba is not installed")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("value", [1e19, -3e38])
@pytest.mark.parametrize("count", [200, 20_000])
def test_sums_of_huge_elements_are_the_definitions(dtype, value, count):
    """Sums that float32 could not hold are finite, also where products are not."""
    tensor = torch.full((count,), value).to(getattr(torch, dtype))
    parts = [[whole(tensor.shape)]]

    (own,) = numbers_of(BACKENDS["cpu"], tensor, parts)
    (exact,) = numbers_of(BACKENDS["reference"], tensor, parts)

    assert own.total == pytest.approx(exact.total, rel=1e-9)
    assert own.squares == pytest.approx(exact.squares, rel=1e-6)
    assert own.sketch == pytest.approx(exact.sketch, rel=1e-6)
    assert own.checksum == exact.checksum


@each_backend
@pytest.mark.parametrize("shape", [(), (1,), (0,), (4, 0), (2, 3, 4, 5)])
def test_any_shape(backend, shape):
    """0-d, empty and many-dimensional tensors are measured."""
    tensor = make_tensor("float32", shape, 2)

    (numbers,) = numbers_of(backend, tensor, [[whole(tensor.shape)]])

    assert numbers.count == tensor.numel()
    if numbers.count:
        check_against_definition(tensor, whole(tensor.shape), numbers)


@each_backend
def test_negative_bit_is_resolved(backend):
    """A lazily negated view has the numbers of its values, not of its memory."""
    z = torch.complex(torch.arange(1.0, 5.0), torch.arange(1.0, 5.0))
    tensor = z.conj().imag
    assert tensor.is_neg()

    (numbers,) = numbers_of(backend, tensor, [[whole(tensor.shape)]])

    assert numbers.maximum == -1.0
    assert numbers.total == -10.0


@each_backend
def test_row_is_overwritten(backend):
    """What stood in a row before does not get into the numbers."""
    device = DEVICE if backend.name == "cuda" else "cpu"
    tensor = make_tensor("float32", (3, 10), 2).to(device)
    rows = np.full((1, ROW_WIDTH), 7.0)

    backend.measure(tensor, [[whole(tensor.shape)]], rows)

    assert rows.view(np.int64)[0, COUNT] == 30


@pytest.mark.skipif("cuda" not in BACKENDS, reason="no CUDA device here")
def test_queue_measures_many_tensors_together():
    """Rows of a queue are those of single measurements, over several steps."""
    queue = DeviceQueue(torch.device(DEVICE))
    shapes = [(1, 5), (3, 70), (40, 900), (2, 64), (7,)]
    expected, found = [], []
    for step in range(3):
        for number, dtype in enumerate(("bfloat16", "float32", "int64", "bool")):
            held = []
            for shape in shapes:
                tensor = on_device(
                    make_tensor(dtype, shape, 10 * step + number), DEVICE
                )
                spans = [whole(tensor.shape)]
                if tensor.ndim > 1 and len(tensor) > 1:
                    rest = len(tensor) - 1
                    spans = [rows_of(shape, 0, 1, 0), rows_of(shape, 1, rest, 1)]
                layout = as_rows(tensor.shape, tensor.stride())
                size = tensor.element_size()
                prepared = prepare(tensor.dtype, spans, layout[1], size)
                found.append((*queue.add(tensor.data_ptr(), prepared), len(spans)))
                rows = np.zeros((len(spans), ROW_WIDTH))
                ReferenceBackend().measure(tensor, [[span] for span in spans], rows)
                expected.append((rows, str(tensor.dtype)))
                held.append(tensor)
            queue.launch()
        queue.finish()
    queue.settle()

    for (home, first, count), (rows, dtype) in zip(found, expected, strict=True):
        for row, wanted in zip(home[first : first + count], rows, strict=True):
            a, b = read_numbers(row, dtype), read_numbers(wanted, dtype)
            assert (a.checksum, a.count) == (b.checksum, b.count)
            assert (a.maximum, a.minimum) == (b.maximum, b.minimum)
            if b.sketch is not None:
                assert a.sketch == pytest.approx(b.sketch, rel=1e-4, abs=1e-2)


@pytest.mark.skipif("cuda" not in BACKENDS, reason="no CUDA device here")
def test_queue_has_room_for_steps_of_any_size(monkeypatch):
    """Rows come home where tables and memory are too small for what a step measures."""
    monkeypatch.setattr("pytest_msprobe.statistics.queue._ROWS", 16)
    monkeypatch.setattr(cuda, "_HALF", 4)
    queue = DeviceQueue(torch.device(DEVICE))
    tensor = on_device(make_tensor("float32", (6, 70), 5), DEVICE)
    prepared = prepare(
        tensor.dtype, [rows_of((6, 70), r, 1, r) for r in range(6)], 70, 4
    )
    found = []
    for step in range(3):
        places = [queue.add(tensor.data_ptr(), prepared) for _ in range(2 + step)]
        found += [(step, *place) for place in places]
        queue.finish()
        prepared.move([70 * (row + step + 1) for row in range(6)])
    queue.settle()

    for step, home, first in found:
        rows = np.zeros((6, ROW_WIDTH))
        spans = [[rows_of((6, 70), row, 1, row + step)] for row in range(6)]
        ReferenceBackend().measure(tensor, spans, rows)
        sums = home.view(np.uint64)[first : first + 6, CHECKSUM]
        assert sums.tolist() == rows.view(np.uint64)[:, CHECKSUM].tolist()


@pytest.mark.skipif("cuda" not in BACKENDS, reason="no CUDA device here")
def test_queue_serves_inside_and_outside_of_inference_mode(monkeypatch):
    """Buffers that were made while a model ran are written when it no longer does."""
    monkeypatch.setattr(cuda, "_COPIED_PROGRAMS", 1)
    cuda.launcher.cache_clear()
    tensor = on_device(make_tensor("float32", (70, 300), 5), DEVICE)
    prepared = prepare(tensor.dtype, [whole(tensor.shape)], 300, 4)
    assert prepared.shared
    with torch.inference_mode():
        queue = DeviceQueue(torch.device(DEVICE))
        first = queue.add(tensor.data_ptr(), prepared)
        queue.launch()
    second = queue.add(tensor.data_ptr(), prepared)
    queue.finish()
    queue.settle()

    rows = np.zeros((1, ROW_WIDTH))
    ReferenceBackend().measure(tensor, [[whole(tensor.shape)]], rows)
    wanted = rows.view(np.uint64)[0, CHECKSUM]
    for home, row in (first, second):
        assert home.view(np.uint64)[row, CHECKSUM] == wanted
