# SPDX-License-Identifier: Apache-2.0
"""Task nan_check: which calls gave NaN or infinite elements, and which one first."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pytest_msprobe.model import records
from pytest_msprobe.model.calls import CallRecord, Scalar, StepRecord, TensorValue, Tree
from pytest_msprobe.model.dtypes import is_sketched

_UNJUDGED = ("undefined", "opaque")


@dataclass(frozen=True, slots=True)
class FirstNonfinite:
    """The first call of a step with a NaN or infinite element in its results.

    Attributes:
        call: The call.
        slot: The result.
        nonfinite: NaN and infinite elements in it.
        elements: All elements in it.
        has_finite_inputs: Whether it began here: no argument had any.
    """

    call: CallRecord
    slot: str
    nonfinite: int
    elements: int
    has_finite_inputs: bool

    @property
    def text(self) -> str:
        """One line for a log."""
        origin = "all inputs finite" if self.has_finite_inputs else "inputs had them"
        return (
            f"first NaN or Inf: {self.call.name} {self.slot}: {self.nonfinite} of "
            f"{self.elements} elements, {origin}"
        )


def count_nonfinite(tree: Tree) -> int:
    """NaN and infinite elements of all tensors of a tree."""
    return sum(count for _, count, _ in _counts(tree, ""))


def find_first(step: StepRecord) -> FirstNonfinite | None:
    """The first call whose results have such elements, one with finite inputs first."""
    fallback = None
    for call in step.calls:
        if call.kind == "parameters_grad":
            continue
        for slot, count, elements in _counts(call.output, "output"):
            if not count:
                continue
            arguments = [call.input_args, call.input_kwargs]
            is_origin = count_nonfinite(arguments) == 0
            found = FirstNonfinite(call, slot, count, elements, is_origin)
            if is_origin:
                return found
            fallback = fallback or found
            break
    return fallback


def _counts(tree: Tree, slot: str) -> Iterator[tuple[str, int, int]]:
    """Slot, NaN and infinite elements, and all elements of every judged tensor."""
    if isinstance(tree, TensorValue):
        if tree.rows is None or tree.role in _UNJUDGED or not is_sketched(tree.dtype):
            return
        counts = tree.rows.view(np.int64)[:, records.NAN : records.COUNT + 1]
        nan, plus, minus, elements = counts.sum(axis=0).tolist()
        yield slot, nan + plus + minus, elements
    elif isinstance(tree, list):
        for index, item in enumerate(tree):
            yield from _counts(item, f"{slot}.{index}")
    elif isinstance(tree, dict) and not isinstance(tree, Scalar):
        for key, item in tree.items():
            yield from _counts(item, f"{slot}.{key}")
