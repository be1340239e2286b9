# SPDX-License-Identifier: Apache-2.0
"""Calls of a file: columns that say what its lines say, also after changes."""

from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_msprobe.dump.call_table import call_columns, columns_of
from pytest_msprobe.dump.capture import (
    FORMAT,
    CallLine,
    CaptureFile,
    Header,
    StepLine,
    TensorLine,
    encode,
    read_capture,
)

IDS = range(4)
INPUTS = ("input_args.0", "input_args.1.0", "input_kwargs.x", "input_kwargs.output")
OUTPUTS = ("output", "output.0", "output.a")


def slots_of(names):
    """Some slots with the ids of their tensors."""
    return st.dictionaries(
        st.sampled_from(names), st.lists(st.sampled_from(IDS), max_size=3), max_size=3
    )


calls = st.builds(
    CallLine,
    st.sampled_from(["Module.a.A.forward.0", "Functional.f.0.forward", ""]),
    st.integers(0, 2),
    slots_of(INPUTS),
    slots_of(OUTPUTS),
    st.dictionaries(st.sampled_from(INPUTS), st.integers(0, 3), max_size=1),
)
steps = st.builds(StepLine, st.integers(0, 3), st.integers(0, 9))
entries = st.lists(calls | steps, max_size=8)


def read(folder, lines):
    """The entries of a file that holds these lines."""
    path = folder.mktemp("c") / "c.jsonl"
    tensors = [TensorLine(number, "i64", [1], "", [1, 0], "00") for number in IDS]
    header = Header(msprobe=FORMAT, kind="capture")
    path.write_bytes(encode(header, [*tensors, *lines]))
    return read_capture(path).entries


def contents(columns):
    """What columns say, call by call, whatever the numbers of their slots are."""
    words = list(columns.words)
    slots = zip(columns.slots, columns.sizes, strict=True)
    used, found = iter(columns.used), []
    per_slot = [
        (words[slot >> 1], slot & 1, [next(used) for _ in range(n)])
        for slot, n in slots
    ]
    for name, step, end in zip(columns.names, columns.steps, columns.ends, strict=True):
        found.append((name.c, name.l, step, end))
    return found, per_slot


@settings(deadline=None)
@given(entries)
def test_columns_of_a_file_are_those_of_its_calls(tmp_path_factory, lines):
    """Whether its calls were looked at or not."""
    table = read(tmp_path_factory, lines)
    expected = contents(columns_of(lines))

    assert contents(table.columns()) == expected
    assert table.steps() == [line for line in lines if isinstance(line, StepLine)]
    assert [*table] == lines
    assert contents(table.columns()) == expected
    assert contents(call_columns(list(table))) == expected


@settings(deadline=None)
@given(entries.filter(len), calls, steps, st.data())
def test_columns_follow_changes(tmp_path_factory, lines, call, step, data):
    """The table is changed as a list is, and its columns with it."""
    table = read(tmp_path_factory, lines)
    known = list(table) if data.draw(st.booleans()) else [*lines]
    place = data.draw(st.integers(0, len(lines) - 1))
    how = data.draw(st.sampled_from(["change", "set", "delete", "insert", "slice"]))
    for target in (table, known):
        if how == "change" and isinstance(target[place], StepLine):
            target[place].step = 7
        elif how == "change":
            target[place].o = {"output.b": [0]}
        elif how == "set":
            target[place] = call
        elif how == "delete":
            del target[place]
        elif how == "insert":
            target.insert(place, step)
        else:
            target[place:] = [call, step]

    assert [*table] == known
    assert table[-1:] == known[-1:]
    assert len(table) == len(known)
    assert contents(table.columns()) == contents(columns_of(known))
    capture = CaptureFile(Header(msprobe=FORMAT, kind="capture"), {}, table)
    assert capture.steps == [line for line in known if isinstance(line, StepLine)]
