# SPDX-License-Identifier: Apache-2.0
"""msProbe's `bench_path`: tensors are saved where they differ from an earlier dump."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pytest_msprobe.debugger.measure import Measured
from pytest_msprobe.dump import layout
from pytest_msprobe.dump.reader import read_dump
from pytest_msprobe.dump.tensors import file_name, save_tensor
from pytest_msprobe.errors import CaptureError
from pytest_msprobe.model.calls import Scalar, TensorValue, Tree

if TYPE_CHECKING:
    from pytest_msprobe.debugger.raw import RawCall

_LOG = logging.getLogger("pytest_msprobe")


class Bench:
    """Holds every call against the same call of an earlier dump.

    A call differs where all its inputs have the shapes and checksums of the reference
    and some result has not: the difference began in it.

    Attributes:
        differences: Names of the calls that differ.
    """

    def __init__(self, path: Path, limit: int, rank: str) -> None:
        """Prepares; reads nothing yet.

        Args:
            path: Folder of the reference.
            limit: After so many differences recording ends, -1 for no end.
            rank: Name of this rank's folder.
        """
        self.differences: list[str] = []
        self._path = path
        self._limit = limit
        self._rank = rank
        self._records: dict[str, Any] = {}
        self._held: dict[int, list[tuple[str, torch.Tensor]]] = {}

    @property
    def is_finished(self) -> bool:
        """Whether enough differences were found."""
        return 0 <= self._limit <= len(self.differences)

    def begin_step(self, number: int) -> None:
        """Reads the reference of a step.

        Raises:
            CaptureError: There is none for this step and rank.
            DumpFormatError: It is not readable.
        """
        self._held.clear()
        step = self._path / f"step{number}"
        ranks = layout.ranks_of(step) if step.is_dir() else {}
        folder = ranks.get(self._rank)
        if folder is None and len(ranks) == 1 and "proc" in min(ranks):
            folder = next(iter(ranks.values()))
        if folder is None:
            message = f"bench_path: {step / self._rank}: no dump there"
            hint = "name a dump of the same steps and ranks"
            raise CaptureError(message, slug="bench-path", hint=hint)
        self._records = read_dump(folder).data

    def hold(self, call: "RawCall", slot: str, tensor: torch.Tensor) -> None:
        """Keeps a tensor as it is now, until its call has ended."""
        copy = tensor.detach().clone()
        self._held.setdefault(id(call), []).append((slot, copy))

    def finish(self, call: "RawCall", folder: Path | None) -> int:
        """Judges a call that has ended and saves its tensors if it differs.

        Returns:
            Bytes of the tensors saved.
        """
        held = self._held.pop(id(call), [])
        reference = self._records.get(call.name)
        if folder is None or reference is None or not _differs(call, reference):
            return 0
        self.differences.append(call.name)
        _LOG.warning("msprobe: %s differs from %s", call.name, self._path)
        names: dict[str, str] = {}
        for slot, tensor in held:
            name = save_tensor(folder, file_name(call.name, slot), tensor)
            if name is not None:
                names[slot] = name
        inputs, kwargs = ("input", "") if call.kind == "backward" else _SIDES
        call.input_args = _named(call.input_args, inputs, names)
        call.input_kwargs = _named(call.input_kwargs, kwargs, names)
        call.output = _named(call.output, "output", names)
        call.parameters = _named(call.parameters, "parameters", names)
        return sum(t.numel() * t.element_size() for _, t in held)


_SIDES = ("input_args", "input_kwargs")


def _differs(call: "RawCall", reference: dict[str, Any]) -> bool:
    if call.kind == "parameters_grad":
        return False
    sides = ("input",) if call.kind == "backward" else _SIDES
    arguments = (call.input_args, call.input_kwargs)
    for tree, side in zip(arguments, sides, strict=False):
        if any(not _is_equal(a, b) for a, b in _pairs(tree, reference.get(side))):
            return False
    return any(
        not _is_equal(a, b) for a, b in _pairs(call.output, reference.get("output"))
    )


def _pairs(tree: Tree, reference: Any) -> Iterator[tuple[Any, Any]]:
    """The tensors of a tree with what stands at their places in the reference."""
    if isinstance(tree, Measured | TensorValue):
        yield tree, reference
    elif isinstance(tree, list):
        others = reference if isinstance(reference, list) else []
        for item, other in zip_longest(tree, others[: len(tree)]):
            yield from _pairs(item, other)
    elif isinstance(tree, dict) and not isinstance(tree, Scalar):
        known = reference if isinstance(reference, dict) else {}
        for key, item in tree.items():
            yield from _pairs(item, known.get(key))


def _is_equal(value: Measured | TensorValue, reference: Any) -> bool:
    if not isinstance(reference, dict):
        return False
    shape = value.plan.shape if isinstance(value, Measured) else value.shape
    return list(shape) == reference.get("shape") and value.digest == reference.get(
        "md5"
    )


def _named(tree: Tree, slot: str, names: dict[str, str]) -> Tree:
    """The tree with the names of the files of its tensors."""
    if isinstance(tree, Measured):
        return tree._replace(data_name=names.get(slot))
    if isinstance(tree, TensorValue):
        return replace(tree, data_name=names.get(slot))
    if isinstance(tree, list):
        return [_named(item, f"{slot}.{i}", names) for i, item in enumerate(tree)]
    if isinstance(tree, dict) and not isinstance(tree, Scalar):
        return {key: _named(v, f"{slot}.{key}", names) for key, v in tree.items()}
    return tree
