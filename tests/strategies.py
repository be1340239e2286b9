# SPDX-License-Identifier: Apache-2.0
"""Hypothesis strategies shared by the tests."""

from hypothesis import strategies as st

from pytest_msprobe.model.segments import RequestRows, SampleRow, StepLayout

segment_words = st.text("abcdefghij_0123456789", min_size=1, max_size=8)
module_paths = st.lists(segment_words, min_size=1, max_size=5).map(".".join)
finite = st.floats(-1e4, 1e4, allow_nan=False, width=32)


@st.composite
def layouts(draw):
    """Step layouts with a few requests somewhere in prefill or decode, and padding."""
    requests, samples, row = [], [], 0
    for label in range(draw(st.integers(1, 4))):
        prompt = draw(st.integers(1, 20))
        position = draw(st.integers(0, prompt + 3))
        rows = 1 if position >= prompt else draw(st.integers(1, prompt - position))
        requests.append(RequestRows(label, row, rows, position, prompt))
        last = position + rows - 1
        samples.append(SampleRow(label, last, prompt, is_defined=last >= prompt - 1))
        row += rows
    padding = draw(st.integers(0, 3))
    return StepLayout(row, row + padding, tuple(requests), tuple(samples))
