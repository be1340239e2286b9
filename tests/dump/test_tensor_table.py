# SPDX-License-Identifier: Apache-2.0
"""Columns of a file's tensors: what its lines say, also after they were changed."""

from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_msprobe.dump import columns
from pytest_msprobe.dump.capture import (
    FORMAT,
    Header,
    TensorLine,
    encode,
    read_capture,
)
from pytest_msprobe.dump.columns import columns_of
from pytest_msprobe.errors import DumpFormatError

numbers = st.none() | st.floats(-1e6, 1e6)


@st.composite
def lines(draw, number):
    """A `t` line of a float or an integer type, with or without a sketch and noise."""
    is_float = draw(st.booleans())
    sketch = draw(st.sampled_from(["", "abcde"])) if is_float else ""
    return TensorLine(
        number,
        draw(st.sampled_from(["bf16", "f32"])) if is_float else "i64",
        draw(st.lists(st.integers(0, 5), max_size=3)),
        draw(st.sampled_from(["", "0.first", "0.prompt", "1.g1"])),
        draw(
            st.lists(numbers, min_size=4, max_size=4) if is_float else st.just([1, 0])
        ),
        draw(st.sampled_from(["00", "ff"])),
        draw(st.sampled_from("tsn")),
        draw(st.sampled_from([[], [1, 0, 2]])),
        sketch,
        draw(st.sampled_from([None, 0.5])) if sketch else None,
        draw(st.sampled_from([[], [0.1, 0.2, 0.3, 0.4, 0.5]])),
    )


@st.composite
def tables(draw):
    """Some `t` lines with ids of any order."""
    ids = draw(st.lists(st.integers(0, 99), max_size=8, unique=True))
    return [draw(lines(number)) for number in ids]


def read(folder, tensors):
    """The tensors of a file that holds these lines."""
    path = folder.mktemp("c") / "c.jsonl"
    path.write_bytes(encode(Header(msprobe=FORMAT, kind="capture"), tensors))
    return read_capture(path).tensors


def assert_equal(found, expected):
    """Two sets of columns say the same."""
    for field in fields(expected):
        a, b = (getattr(side, field.name) for side in (found, expected))
        if isinstance(b, list):
            assert a == b, field.name
        else:
            np.testing.assert_array_equal(a, b, err_msg=field.name)


@settings(deadline=None)
@given(tables(), st.integers(1, 4))
def test_columns_of_a_file_are_those_of_its_lines(tmp_path_factory, tensors, chunk):
    """Whatever the size of the parts in which a file is read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columns, "_CHUNK", chunk)
        table = read(tmp_path_factory, tensors)

    assert_equal(table.columns(), columns_of(tensors))
    assert list(table.values()) == tensors
    assert_equal(table.columns(), columns_of(tensors))


@settings(deadline=None)
@given(tables().filter(len), st.data())
def test_columns_follow_changes_of_lines(tmp_path_factory, tensors, data):
    """A line that is changed, replaced, removed or added changes the columns."""
    table = read(tmp_path_factory, tensors)
    known = {line.t: line for line in tensors}
    number = data.draw(st.sampled_from(sorted(known)))
    how = data.draw(st.sampled_from(["change", "replace", "remove", "add"]))
    if how == "change":
        table[number].c = known[number].c = "changed"
    elif how == "remove":
        del table[number], known[number]
    else:
        number = number if how == "replace" else 100
        table[number] = known[number] = data.draw(lines(number))

    assert dict(table) == known
    assert len(table) == len(known)
    assert (number in table) == (how != "remove")
    assert_equal(table.columns(), columns_of(list(known.values())))


@settings(deadline=None)
@given(tables().filter(len), st.data())
def test_columns_of_some_lines(tmp_path_factory, tensors, data):
    """Lines may be taken in any order, more than once."""
    places = data.draw(st.lists(st.integers(0, len(tensors) - 1)))
    table = read(tmp_path_factory, tensors)

    found = table.columns().at(np.array(places, dtype=np.int64))

    assert_equal(found, columns_of([tensors[place] for place in places]))


def test_an_id_stands_once(tmp_path_factory):
    """Two tensors of one id are refused: a call could mean either."""
    line = TensorLine(3, "i64", [1], "", [1, 0], "00")

    with pytest.raises(DumpFormatError, match=":3: tensor 3 stands twice"):
        read(tmp_path_factory, [line, line])
