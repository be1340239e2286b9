# SPDX-License-Identifier: Apache-2.0
"""Lays what transformers computed out like a capture of vLLM's model."""

import math

import msgspec

from pytest_msprobe.debugger.assemble import tensor_line
from pytest_msprobe.dump.capture import CallLine, CaptureFile, StepLine, TensorLine
from pytest_msprobe.engine.transformers_reference import (
    INPUT,
    STREAM,
    Key,
    Measured,
    run_model,
)
from pytest_msprobe.errors import CaptureError
from pytest_msprobe.model.dtypes import BY_CODE
from pytest_msprobe.model.names import parse_call_name

# A type that is exact next to the one that the engine computes in.
EXACT = {"bfloat16": "float32", "float16": "float32", "float32": "float64"}
_WITH_SUMS = 4
# Hidden states and residual.
_SUMMED = 2


def reference_captures(
    candidate: CaptureFile, model: str
) -> tuple[CaptureFile, CaptureFile]:
    """What transformers computes for the tokens of a capture.

    Args:
        candidate: A capture with the prompts of its requests, of level L0 or mix.
        model: Folder or name of the checkpoint.

    Returns:
        Two captures with those rows of the candidate that transformers has as well,
        under equal ids: of an exact type, and of the type that the engine has.

    Raises:
        CaptureError: The model cannot be run, or none of its modules is known.
    """
    dtype = str(candidate.header.signature["model"]["dtype"])
    exact = EXACT.get(dtype)
    if exact is None:
        message = f"a model of {dtype} has no exact reference"
        raise CaptureError(message, slug="reference-dtype")
    requests = candidate.header.requests
    (truth, true_requests), (noise, noisy_requests) = (
        run_model(model, name, requests) for name in (exact, dtype)
    )
    builder = _Builder(candidate, truth, noise)
    for entry in candidate.entries:
        if isinstance(entry, CallLine):
            builder.add(entry)
        else:
            builder.entries.append(entry)
    if not builder.tensors[0]:
        message = f"no module of {model!r} in transformers is called as one in vLLM"
        raise CaptureError(message, slug="reference-modules")
    sides = zip(builder.tensors, (true_requests, noisy_requests), strict=True)
    first, second = (
        CaptureFile(
            msgspec.structs.replace(
                candidate.header, requests=answers, provenance={}, weights={}
            ),
            tensors,
            builder.entries,
        )
        for tensors, answers in sides
    )
    return first, second


class _Builder:
    """Collects the rows that both models have."""

    def __init__(
        self,
        candidate: CaptureFile,
        truth: dict[Key, Measured],
        noise: dict[Key, Measured],
    ) -> None:
        self.entries: list[CallLine | StepLine] = []
        self.tensors: tuple[dict[int, TensorLine], dict[int, TensorLine]] = ({}, {})
        self._candidate = candidate
        self._sides = truth, noise
        self._places = {(path, place) for path, place, _ in truth}
        # What stands for the tensors of the candidate that have been met.
        self._known: dict[tuple[int, ...], list[int]] = {}

    def add(self, call: CallLine) -> None:
        """Adds a call with those of its slots that have a counterpart."""
        line = CallLine(call.c, call.l)
        name = parse_call_name(call.c)
        if name is not None and name.is_module:
            path = name.module_path
            line.i = self._find_inputs(path, call.i)
            line.o = self._find_outputs(path, call.o)
        self.entries.append(line)

    def _find_inputs(
        self, path: str, slots: dict[str, list[int]]
    ) -> dict[str, list[int]]:
        """Tensors that were met as outputs, and what the module of transformers got."""
        found = {
            slot: self._known[tuple(ids)]
            for slot, ids in slots.items()
            if tuple(ids) in self._known
        }
        floats = self._floats(slots)
        if (path, f"{INPUT}.0") in self._places:
            for index, slot in enumerate(floats):
                self._take(found, path, slot, f"{INPUT}.{index}", slots)
        elif floats and len(floats) <= _SUMMED and not set(floats) <= set(found):
            self._take(found, path, "+".join(floats), INPUT, slots)
        return found

    def _find_outputs(
        self, path: str, slots: dict[str, list[int]]
    ) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        floats = self._floats(slots)
        if len(floats) != _SUMMED or (path, "output.1") in self._places:
            for slot in floats:
                self._take(found, path, slot, slot, slots)
        elif (path, STREAM) in self._places:
            self._take(found, path, "+".join(floats), STREAM, slots)
        else:  # a norm, which returns what it was given as well
            for slot, place in zip(floats, ("output.0", INPUT), strict=True):
                self._take(found, path, slot, place, slots)
        return found

    def _floats(self, slots: dict[str, list[int]]) -> list[str]:
        """Slots that hold floats."""
        tensors = self._candidate.tensors
        return [
            slot
            for slot, ids in slots.items()
            if ids and len(tensors[ids[0]].v) == _WITH_SUMS
        ]

    def _take(
        self,
        found: dict[str, list[int]],
        path: str,
        slot: str,
        place: str,
        slots: dict[str, list[int]],
    ) -> None:
        """Adds the rows of a slot, if both models have them in the same form.

        Args:
            found: Slots so far.
            path: Path of the module.
            slot: The slot, or two with a `+` between them.
            place: What stands in it.
            slots: Ids of the candidate's slots.
        """
        ids = slots[slot.partition("+")[0]]
        lines = [self._candidate.tensors[number] for number in ids]
        keys = [(path, place, line.g) for line in lines]
        rows = [[side.get(key) for key in keys] for side in self._sides]
        for line, row in zip(lines, rows[0], strict=True):
            if row is None or math.prod(line.s[1:]) != row.columns:
                return
        taken = []
        for line, *both in zip(lines, *rows, strict=True):
            number = len(self.tensors[0])
            for tensors, row in zip(self.tensors, both, strict=True):
                assert row is not None
                tensors[number] = self._line(line, row, number)
            taken.append(number)
        found[slot] = taken
        if "+" not in slot:
            self._known[tuple(ids)] = taken

    @staticmethod
    def _line(line: TensorLine, row: Measured, number: int) -> TensorLine:
        """The row of a reference in the form of the candidate's."""
        dtype = BY_CODE[line.d].name
        row_class = line.row_class
        made = tensor_line(row.numbers, dtype, line.s, row_class, line.g, is_part=True)
        return msgspec.structs.replace(made, t=number)
