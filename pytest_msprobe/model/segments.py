# SPDX-License-Identifier: Apache-2.0
"""Which tokens of a step belong to which request, and how a tensor is cut by it.

These are plain records. An engine adapter fills them from the scheduler's output and
hands them down, so that nothing below it knows vLLM.
"""

from dataclasses import dataclass, field
from typing import Literal

RowClass = Literal["token", "sample", "neither"]

WHOLE = ""
PADDING = "pad"
FIRST = "first"
PROMPT = "prompt"


@dataclass(frozen=True, slots=True)
class RequestRows:
    """The consecutive rows of one request in the token-major tensors of a step.

    Attributes:
        label: Number of the request in order of first scheduling.
        first_row: Row of its first token in this step.
        rows: Tokens scheduled in this step.
        position: Position in the request of its first token in this step.
        prompt_tokens: Length of its prompt.
    """

    label: int
    first_row: int
    rows: int
    position: int
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class SampleRow:
    """One row of the sample-major tensors of a step (the logits).

    Attributes:
        label: Number of the request.
        position: Position whose hidden state is projected.
        prompt_tokens: Length of the request's prompt.
        is_defined: False while the prefill is unfinished: the row is thrown away.
    """

    label: int
    position: int
    prompt_tokens: int
    is_defined: bool = True


@dataclass(frozen=True, slots=True)
class StepLayout:
    """The rows of all tensors of one step.

    Attributes:
        tokens: Tokens scheduled.
        padded_tokens: Rows of a token-major tensor, padding included.
        requests: In row order.
        samples: In row order.
    """

    tokens: int
    padded_tokens: int
    requests: tuple[RequestRows, ...]
    samples: tuple[SampleRow, ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive rows of a tensor that are judged together.

    Attributes:
        segment: Name, `<request>.<part>`, `pad` or empty for a whole tensor.
        first_row: First row of the piece.
        rows: Number of rows.
        position: Position of the first row in its request.
        is_defined: False for padding and rows of an unfinished prefill.
    """

    segment: str
    first_row: int
    rows: int
    position: int
    is_defined: bool = True


def segment_name(label: int, position: int, prompt_tokens: int) -> str:
    """Name of the segment that a position belongs to.

    Position 0 is a segment of its own, because its huge activations hide everything
    else; then the rest of the prompt; then every generated token for itself.
    """
    if position == 0:
        return f"{label}.{FIRST}"
    if position < prompt_tokens:
        return f"{label}.{PROMPT}"
    return f"{label}.g{position - prompt_tokens + 1}"


def split_tokens(layout: StepLayout) -> tuple[Piece, ...]:
    """Pieces of a token-major tensor, in row order; padding comes last."""
    pieces: list[Piece] = []
    for request in layout.requests:
        done = 0
        while done < request.rows:
            position = request.position + done
            count = 1
            if 0 < position < request.prompt_tokens:
                count = min(request.rows - done, request.prompt_tokens - position)
            name = segment_name(request.label, position, request.prompt_tokens)
            pieces.append(Piece(name, request.first_row + done, count, position))
            done += count
    if layout.padded_tokens > layout.tokens:
        rows = layout.padded_tokens - layout.tokens
        pieces.append(Piece(PADDING, layout.tokens, rows, 0, is_defined=False))
    return tuple(pieces)


def split_samples(layout: StepLayout) -> tuple[Piece, ...]:
    """Pieces of a sample-major tensor, one a row."""
    return tuple(
        Piece(
            segment_name(sample.label, sample.position, sample.prompt_tokens),
            row,
            1,
            sample.position,
            is_defined=sample.is_defined,
        )
        for row, sample in enumerate(layout.samples)
    )


@dataclass(slots=True)
class RowClassifier:
    """Decides whether a slot's tensors are token-major over a whole capture.

    A tensor is token-major when its dimension 0 equals the step's padded tokens in
    every step, with at least two different counts seen. Where only one count was
    seen, equality counts unless that number is also a dimension of a parameter.

    Attributes:
        model_dimensions: Sizes that parameters of the model have.
    """

    model_dimensions: frozenset[int] = frozenset()
    _counts: dict[str, set[int]] = field(default_factory=dict)
    _refuted: set[str] = field(default_factory=set)

    def observe(self, slot: str, *, dimension_0: int | None, tokens: int) -> bool:
        """Records one sighting; returns whether the slot may still be token-major."""
        if slot in self._refuted:
            return False
        if dimension_0 != tokens:
            self._refuted.add(slot)
            return False
        self._counts.setdefault(slot, set()).add(tokens)
        return True

    def is_token_major(self, slot: str) -> bool:
        """The verdict over everything observed so far."""
        counts = self._counts.get(slot)
        if slot in self._refuted or not counts:
            return False
        return len(counts) > 1 or not counts & (self.model_dimensions | {1})
