# SPDX-License-Identifier: Apache-2.0
"""Capture files and goldens."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_msprobe.dump.capture import (
    FORMAT,
    CallLine,
    Header,
    Request,
    StepLine,
    TensorLine,
    encode,
    read_capture,
    read_header,
)
from pytest_msprobe.errors import DumpFormatError

texts = st.text("abc.0@", max_size=12)
floats = st.floats(allow_nan=False, allow_infinity=False)


def tensor(number, **changes):
    """A `t` line of a bfloat16 tensor."""
    values = {
        "d": "bf16",
        "s": [2, 3],
        "k": "t",
        "g": "0.prompt",
        "v": [1.5, -1.0, 0.1, 2.0],
    }
    return TensorLine(t=number, c="00ff", q="x", a=1e-5, **{**values, **changes})


@st.composite
def captures(draw):
    """Headers with lines that refer to tensors that stand before them."""
    header = Header(
        msprobe=FORMAT,
        kind="capture",
        test=draw(texts),
        key=draw(texts),
        provenance={"a": draw(st.none() | floats | texts)},
        requests=[
            Request(0, draw(texts), 3, [1], [draw(floats)], [[(1, draw(floats))]])
        ],
    )
    lines, count = [], 0
    for step in range(draw(st.integers(0, 3))):
        lines.append(StepLine(step, 4, [(0, 4, 0)]))
        for _ in range(draw(st.integers(0, 3))):
            v = [draw(st.none() | floats) for _ in range(4)]
            lines.append(tensor(count, v=v, g=draw(texts)))
            count += 1
            ids = draw(st.lists(st.integers(0, count - 1), max_size=3))
            slots = {"output.0": ids} if ids else {}
            lines.append(CallLine(draw(texts), draw(st.integers(0, 4)), {}, slots))
    return header, lines


@given(captures())
def test_written_is_read_back(tmp_path_factory, capture):
    """Reading gives what was written, floats exactly."""
    header, lines = capture
    path = tmp_path_factory.mktemp("c") / "c.jsonl"
    content = encode(header, lines)
    path.write_bytes(content)

    found = read_capture(path)

    assert found.header == header
    assert list(found.entries) == [x for x in lines if not isinstance(x, TensorLine)]
    assert list(found.tensors.values()) == [
        x for x in lines if isinstance(x, TensorLine)
    ]
    assert read_header(path) == header
    again = [x for x in lines if isinstance(x, TensorLine)] + list(found.entries)
    assert sorted(encode(found.header, again).split()) == sorted(content.split())


def damaged(**changes):
    """A capture file with something wrong in it."""
    header = Header(msprobe=FORMAT, kind="golden")
    return encode(header, [tensor(0, **changes), CallLine("Module.a.A.forward.0")])


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", ":1: not the header"),
        (b"{}\n", ":1: not the header"),
        (b"[1]\n", ":1: not the header"),
        (b'{"msprobe":99,"kind":"golden"}\n', "format 99; this version reads"),
        (b'{"msprobe":"1","kind":"golden"}\n', "format 1; this version"),
        (b'{"msprobe":1,"kind":"golden","color":1}\n', ":1: "),
        (b'{"msprobe":1,"kind":"golden"}\nhello\n', ":2: unknown kind"),
        (b'{"msprobe":1,"kind":"golden"}\n{"t":"a"}\n', ":2: "),
        (damaged(k="z"), ":2: tensor 0 has a wrong class"),
        (damaged(v=[1.0]), ":2: tensor 0 has a wrong class"),
        (damaged(d="i64"), ":2: tensor 0 has a wrong class"),
        (damaged()[:-9], ":3: "),
        (
            b'{"msprobe":1,"kind":"golden"}\n{"c":"a","o":{"output.0":[7]}}\n',
            ":2: tensor 7 does not stand before it",
        ),
    ],
)
def test_damage_is_reported_with_its_line(tmp_path, content, expected):
    """A file of another format, cut off or changed is refused, naming the line."""
    path = tmp_path / "c.jsonl"
    path.write_bytes(content)

    with pytest.raises(DumpFormatError) as caught:
        read_capture(path)

    assert str(path) in str(caught.value)
    assert expected in str(caught.value)


def test_missing_file_is_refused(tmp_path):
    """A file that is not there is named."""
    with pytest.raises(DumpFormatError, match="cannot be read"):
        read_capture(tmp_path / "none.jsonl")
    with pytest.raises(DumpFormatError, match="cannot be read"):
        read_header(tmp_path / "none.jsonl")
