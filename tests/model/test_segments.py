# SPDX-License-Identifier: Apache-2.0
"""Cutting tensors into segments, and classes of tensors."""

import pytest
from hypothesis import given
from strategies import layouts

from pytest_msprobe.model.segments import (
    PADDING,
    RequestRows,
    RowClassifier,
    SampleRow,
    StepLayout,
    segment_name,
    split_samples,
    split_tokens,
)


@given(layouts())
def test_pieces_cover_every_row_once(layout):
    """The pieces of a token-major tensor are its rows, in order, without a gap."""
    rows = [
        row
        for piece in split_tokens(layout)
        for row in range(piece.first_row, piece.first_row + piece.rows)
    ]

    assert rows == list(range(layout.padded_tokens))


@given(layouts())
def test_pieces_keep_positions(layout):
    """A piece's position is that of its first row in its request, and no two mix."""
    for request in layout.requests:
        positions = []
        for piece in split_tokens(layout):
            if piece.segment.startswith(f"{request.label}."):
                positions += range(piece.position, piece.position + piece.rows)
                names = {
                    segment_name(request.label, p, request.prompt_tokens)
                    for p in range(piece.position, piece.position + piece.rows)
                }
                assert names == {piece.segment}
        first = request.position
        assert positions == list(range(first, first + request.rows))


def test_a_prefill_and_its_segments():
    """Position 0, the rest of the prompt and each generated token stand alone."""
    layout = StepLayout(6, 8, (RequestRows(0, 0, 5, 0, 5), RequestRows(1, 5, 1, 7, 6)))

    assert [(p.segment, p.rows, p.position) for p in split_tokens(layout)] == [
        ("0.first", 1, 0),
        ("0.prompt", 4, 1),
        ("1.g2", 1, 7),
        (PADDING, 2, 0),
    ]
    assert [p.is_defined for p in split_tokens(layout)] == [True, True, True, False]


def test_sample_rows_of_an_unfinished_prefill_are_undefined():
    """The logits of a request whose prompt is not through are thrown away."""
    samples = (SampleRow(0, 4, 10, is_defined=False), SampleRow(1, 5, 6))
    layout = StepLayout(2, 2, (), samples)

    assert [(p.segment, p.is_defined) for p in split_samples(layout)] == [
        ("0.prompt", False),
        ("1.prompt", True),
    ]


@pytest.mark.parametrize(
    ("sightings", "dimensions", "expected"),
    [
        ([(17, 17), (1, 1)], {1, 17}, True),
        ([(17, 17)], {128}, True),
        ([(128, 128)], {128}, False),
        ([(1, 1), (1, 1)], set(), False),
        ([(17, 17), (17, 1)], set(), False),
        ([(4, 17), (1, 1)], set(), False),
        ([(None, 17)], set(), False),
        ([], set(), False),
    ],
)
def test_token_major_needs_every_step(sightings, dimensions, expected):
    """Equality in every step with two counts, or one count that is no dimension."""
    classifier = RowClassifier(frozenset(dimensions))
    for first, tokens in sightings:
        classifier.observe("slot", dimension_0=first, tokens=tokens)

    assert classifier.is_token_major("slot") is expected


def test_observe_tells_what_is_refuted():
    """Once a slot was refuted it stays so."""
    classifier = RowClassifier()

    assert classifier.observe("a", dimension_0=5, tokens=5)
    assert not classifier.observe("a", dimension_0=4, tokens=5)
    assert not classifier.observe("a", dimension_0=5, tokens=5)
