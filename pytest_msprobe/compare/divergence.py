# SPDX-License-Identifier: Apache-2.0
"""Finds the first call in execution order whose inputs agree while an output does not.

Descend from the root. Inside a disagreeing call take the first disagreement among its
children's inputs and outputs, in time order: an input means that this call's own code
is the origin, an output means to descend into that child, none means this call. A leaf
whose output error is below DRIFT times its input error is no origin but drift.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pytest_msprobe.compare.match import Key, key_of, places_of
from pytest_msprobe.dump.capture import CallLine, CaptureFile
from pytest_msprobe.model.names import parse_call_name
from pytest_msprobe.model.verdict import Divergence, DivergenceKind, Finding

DRIFT = 3.0


class RowErrors(Protocol):
    """Errors of the paired rows by index.

    Attributes:
        ratio: Worst observed / allowed of each row.
        rel_l2: Relative L2 error of each row.
    """

    ratio: npt.NDArray[np.float64]
    rel_l2: npt.NDArray[np.float64]

    def finding(self, i: int) -> Finding:
        """Worst metric of a row."""


@dataclass(slots=True)
class Node:
    """A call with its children, both in execution order.

    Attributes:
        line: The call, None for the root over all steps.
        inputs: Indices of its paired input rows.
        outputs: Indices of its paired output rows.
        children: Calls made inside it.
    """

    line: CallLine | None
    inputs: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    children: list["Node"] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Name of the call; empty for the root."""
        return self.line.c if self.line is not None else ""


def build_tree(capture: CaptureFile, index: Mapping[Key, int]) -> Node:
    """The calls of a capture as a tree; they are stored in the order of their ends."""
    pending: list[tuple[int, Node]] = []
    calls = list(capture.calls())
    for (step, line), place in zip(calls, places_of(calls), strict=True):
        node = Node(
            line,
            _rows(capture, place, line.i, step, index),
            _rows(capture, place, line.o, step, index),
        )
        children = []
        while pending and pending[-1][0] > line.l:
            children.append(pending.pop()[1])
        node.children = children[::-1]
        pending.append((line.l, node))
    return Node(None, children=[node for _, node in pending])


def _rows(
    capture: CaptureFile,
    place: str,
    side: dict[str, list[int]],
    step: int,
    index: Mapping[Key, int],
) -> list[int]:
    found = []
    for slot, ids in side.items():
        for number in ids:
            row = index.get(key_of(place, slot, capture.tensors[number], step))
            if row is not None:
                found.append(row)
    return found


def _disagreement(rows: list[int], errors: RowErrors) -> int | None:
    """The worst row outside its limits, or None."""
    worst = max(rows, key=lambda i: errors.ratio[i], default=None)
    return worst if worst is not None and errors.ratio[worst] > 1.0 else None


def _error(rows: list[int], errors: RowErrors) -> float:
    return float(max((errors.rel_l2[i] for i in rows), default=0.0))


def find_divergence(
    candidate: CaptureFile,
    index: Mapping[Key, int],
    errors: RowErrors,
    weights: tuple[dict[str, dict[str, str]], dict[str, dict[str, str]]],
) -> Divergence | None:
    """Where a failing candidate first computed something else.

    Args:
        candidate: The candidate's calls.
        index: Paired rows by key.
        errors: Their errors.
        weights: Weight fingerprints of golden and candidate.

    Returns:
        None where no row is outside its limits.
    """
    root = build_tree(candidate, index)
    divergence = _descend(root, errors)
    changed = changed_weights(*weights)
    if not changed:
        return divergence
    module, parameter = _first_owner(root, changed)
    finding = divergence.finding if divergence is not None else None
    return Divergence("weights", module, module, parameter=parameter, finding=finding)


def _descend(root: Node, errors: RowErrors) -> Divergence | None:
    path = [root]
    while True:
        node = path[-1]
        guilty: Node | None = None
        for child in node.children:
            entered = _disagreement(child.inputs, errors)
            if entered is not None:
                return _own_code(path, child, entered, errors)
            if _disagreement(child.outputs, errors) is not None:
                guilty = child
                break
        if guilty is None:
            break
        path.append(guilty)
    if len(path) == 1:
        return None
    leaf = path[-1]
    worst = _disagreement(leaf.outputs, errors)
    assert worst is not None
    before, after = _error(leaf.inputs, errors), _error(leaf.outputs, errors)
    if not leaf.children and after < DRIFT * before:
        return _drift(root, leaf, errors)
    return Divergence(
        "origin",
        leaf.name,
        module_of(path),
        finding=errors.finding(worst),
        input_error=_finite(before),
        output_error=_finite(after),
    )


def _own_code(path: list[Node], child: Node, row: int, errors: RowErrors) -> Divergence:
    """A child's input differs although nothing before it did."""
    node = path[-1]
    kind: DivergenceKind = "origin" if node.line is not None else "inputs"
    return Divergence(
        kind,
        node.name,
        module_of(path),
        between=child.name,
        finding=errors.finding(row),
        input_error=_finite(_error(node.inputs, errors)),
        output_error=_finite(_error(child.inputs, errors)),
    )


def _drift(root: Node, leaf: Node, errors: RowErrors) -> Divergence:
    """No single call: names the one whose error grew most, up to the leaf."""
    best, growth, path = leaf, -math.inf, [root, leaf]
    for node, ancestors in _walk(root, [root]):
        before, after = _error(node.inputs, errors), _error(node.outputs, errors)
        if not node.children and math.isfinite(after) and after - before > growth:
            best, growth, path = node, after - before, [*ancestors, node]
        if node is leaf:
            break
    worst = _disagreement(leaf.outputs, errors)
    assert worst is not None
    return Divergence(
        "drift",
        best.name,
        module_of(path),
        finding=errors.finding(worst),
        input_error=_finite(_error(best.inputs, errors)),
        output_error=_finite(_error(best.outputs, errors)),
    )


def _walk(node: Node, ancestors: list[Node]) -> "list[tuple[Node, list[Node]]]":
    found: list[tuple[Node, list[Node]]] = []
    for child in node.children:
        found.extend(_walk(child, [*ancestors, child]))
        found.append((child, ancestors))
    return found


def module_of(path: list[Node]) -> str:
    """Path of the innermost module on a path of calls."""
    for node in reversed(path):
        if node.line is None:
            continue
        name = parse_call_name(node.line.c)
        if name is not None and name.is_module:
            return name.module_path or name.class_name
    return ""


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 1e308


def changed_weights(
    golden: dict[str, dict[str, str]], candidate: dict[str, dict[str, str]]
) -> dict[str, list[str]]:
    """Parameters whose fingerprints differ, by module; empty where a side has none."""
    if not golden or not candidate:
        return {}
    changed: dict[str, list[str]] = {}
    for module in {**golden, **candidate}:
        old, new = golden.get(module, {}), candidate.get(module, {})
        names = sorted(n for n in {**old, **new} if old.get(n) != new.get(n))
        if names:
            changed[module] = names
    return changed


def _first_owner(root: Node, changed: dict[str, list[str]]) -> tuple[str, str]:
    """The first module in execution order that owns a changed parameter."""
    for node, _ in _walk(root, [root]):
        name = parse_call_name(node.name)
        if name is not None and name.is_module and name.module_path in changed:
            return name.module_path, changed[name.module_path][0]
    module = min(changed)
    return module, changed[module][0]
