# SPDX-License-Identifier: Apache-2.0
"""Rows of several ranks: added up, and held against one another."""

import captures
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pytest_msprobe.compare.judge import judge
from pytest_msprobe.compare.ranks import (
    add_shards,
    combine_ranks,
    find_disagreement,
    first_failure,
    without_sharded,
)
from pytest_msprobe.debugger.assemble import tensor_line
from pytest_msprobe.dump.capture import CallLine, CaptureFile, Header, StepLine
from pytest_msprobe.model.records import ROW_WIDTH, read_numbers
from pytest_msprobe.model.shards import even_runs
from pytest_msprobe.statistics.cpu import CpuBackend
from pytest_msprobe.statistics.sketch import unpack
from pytest_msprobe.statistics.spec import Span, rows_of

BACKEND = CpuBackend()
MODEL = {"tensor_parallel": 2, "hidden_size": 8}


def measure(tensor, parts):
    """The line of a token-major tensor measured with these spans."""
    rows = np.zeros((1, ROW_WIDTH))
    BACKEND.measure(tensor, [parts], rows)
    numbers = read_numbers(rows[0], str(tensor.dtype))
    return tensor_line(
        numbers,
        str(tensor.dtype),
        list(tensor.shape),
        "token",
        "0.prompt",
        is_part=True,
    )


def shards(whole, sizes, ranks, position):
    """The lines of each rank's columns of a tensor."""
    lines = []
    for rank in range(ranks):
        runs = even_runs(sizes, rank, ranks)
        columns = [whole[:, start : start + length] for _, length, start in runs]
        local = torch.cat(columns, dim=1).contiguous()
        width = whole.shape[1]
        spans = [
            Span(0, len(local), first, length, position * width + start, width)
            for first, length, start in runs
        ]
        lines.append(measure(local, spans))
    return lines


@given(
    blocks=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    ranks=st.sampled_from([2, 4]),
    rows=st.integers(1, 6),
    position=st.integers(0, 50),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float16]),
    seed=st.integers(0, 2**16),
)
def test_shards_add_up_to_the_whole(blocks, ranks, rows, position, dtype, seed):
    """Columns spread over ranks have together the checksum and sketch of the whole."""
    sizes = [block * ranks for block in blocks]
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randn(rows, sum(sizes), generator=generator).to(dtype)
    expected = measure(whole, [rows_of(whole.shape, 0, rows, position)])

    total = add_shards(shards(whole, sizes, ranks, position), whole.shape[1])

    assert total.c == expected.c
    assert total.s == expected.s
    assert total.v[:2] == expected.v[:2]
    assert total.v[2:] == pytest.approx(expected.v[2:], rel=1e-5, abs=1e-5)
    if expected.q:
        unit = (expected.a or 0.0) * (ranks + 1) + 1e-5
        difference = unpack(total.q, total.a) - unpack(expected.q, expected.a)
        assert np.abs(difference).max() <= unit


def test_the_place_decides_not_the_cut():
    """Cut in another way the sum is the same; columns in another order change it."""
    whole = torch.randn(3, 16)
    total = add_shards(shards(whole, [16], 2, 4), 16)
    moved = whole[:, torch.arange(15, -1, -1)]

    assert add_shards(shards(whole, [8, 8], 2, 4), 16).c == total.c
    assert add_shards(shards(moved, [16], 2, 4), 16).c != total.c


def capture(rank, tensors, places):
    """A capture with one call a tensor."""
    lines = {}
    entries = [StepLine(0, tokens=2)]
    for number, (name, line) in enumerate(tensors.items()):
        line.t = number
        lines[number] = line
        place = places.get(name)
        call = CallLine(f"Module.{name}.X.forward.0", 0, o={"output.0": [number]})
        if place is not None:
            call.p = {"output.0": place}
        entries.append(call)
    header = Header(1, "capture", rank=rank, world=2, signature={"model": MODEL})
    return CaptureFile(header, lines, entries)


def whole_line(values):
    """The line of a tensor that is not cut."""
    tensor = torch.tensor(values, dtype=torch.float32).reshape(2, -1)
    return measure(tensor, [rows_of(tensor.shape, 0, 2, 1)])


def test_ranks_are_combined():
    """Parts add up, copies are taken once, what has no known place is left out."""
    whole = torch.randn(2, 8)
    parts = shards(whole, [8], 2, 1)
    captures = []
    for rank in range(2):
        tensors = {
            "norm": whole_line([1.0, 2.0, 3.0, 4.0]),
            "proj": parts[rank],
            "act": whole_line([float(rank), 1.0, 2.0, 3.0]),
        }
        captures.append(capture(rank, tensors, {"norm": 0, "proj": 8}))

    combined = combine_ranks(captures)

    outputs = {call.c: call.o for _, call in combined.calls()}
    assert list(outputs["Module.norm.X.forward.0"]) == ["output.0"]
    assert outputs["Module.act.X.forward.0"] == {}
    assert combined.header.sharded == ["Module.act.X.forward.0:output.0"]
    (number,) = outputs["Module.proj.X.forward.0"]["output.0"]
    expected = measure(whole, [rows_of(whole.shape, 0, 2, 1)])
    assert combined.tensors[number].c == expected.c
    assert "tensor_parallel" not in combined.header.signature["model"]

    alone = capture(0, {"act": whole_line([5.0, 1.0, 2.0, 3.0])}, {})
    _, candidate = without_sharded(combined, alone)
    assert [call.o for _, call in candidate.calls()] == [{}]


def test_copies_that_differ_are_found_with_their_size():
    """The first tensor that all ranks should hold alike is named, with the error."""
    same, other = [3.0, 4.0, 0.0, 0.0], [3.0, 4.0, 0.0, 0.5]
    captures = [
        capture(
            rank,
            {"a": whole_line(same), "b": whole_line(other if rank else same)},
            {"a": 0, "b": 0},
        )
        for rank in range(2)
    ]

    found = find_disagreement(captures)

    assert found.row.call == "Module.b.X.forward.0"
    assert found.ranks == (0, 1)
    assert found.error == pytest.approx(0.1, rel=1e-3)
    assert "rel_l2 0.1" in found.text
    assert find_disagreement([captures[0], captures[0]]) is None


def test_parts_do_not_have_to_agree():
    """Ranks hold other columns of a sharded tensor; that is no disagreement."""
    parts = shards(torch.randn(2, 8), [8], 2, 1)
    captures = [capture(rank, {"proj": parts[rank]}, {"proj": 8}) for rank in range(2)]

    assert find_disagreement(captures) is None


def test_the_rank_that_diverged_first_is_shown():
    """Of several failing ranks the one whose fault comes first is taken."""
    network = captures.Network()
    golden = network.run()
    candidates = [network.run(after="c"), network.run(after="b.x", rank=1)]
    verdicts = [judge(golden, candidate).verdict for candidate in candidates]

    first = first_failure(verdicts, candidates)

    assert [verdict.divergence.module for verdict in verdicts] == ["c", "b.x"]
    assert first is verdicts[1]
