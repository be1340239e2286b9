# SPDX-License-Identifier: Apache-2.0
"""Finds the first call in execution order whose inputs agree while an output does not.

Descend from the root. Inside a disagreeing call take the first disagreement among its
children's inputs and outputs, in time order: an input means that this call's own code
is the origin, an output means to descend into that child, none means this call. A call
disagrees as well where something inside it does and it returns what it should. A call
whose error is below DRIFT times that of what its own code worked on (its inputs and
what its children had returned) is no origin but drift.

An input that is, bit by bit, what a call inside the same parent returned whose own rows
are not judged (ignored, renamed, new) was brought in by that call.

Only rows that are judged disagree. Across keys the inputs of modules are not judged;
they only tell, once a child's output disagrees, whether its input did so before.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pytest_msprobe.compare.match import Pairs
from pytest_msprobe.dump.call_table import CallName
from pytest_msprobe.dump.capture import CallLine
from pytest_msprobe.model.names import parse_call_name
from pytest_msprobe.model.verdict import Divergence, DivergenceKind, Finding, portable

DRIFT = 3.0
ROOT = -1
_F64 = npt.NDArray[np.float64]
_I64 = npt.NDArray[np.int64]
_Bools = npt.NDArray[np.bool_]
Weights = dict[str, dict[str, str]]


class RowErrors(Protocol):
    """Errors of the paired rows by index.

    Attributes:
        ratio: Worst observed / allowed of each row, 0 where it may not be used.
        rel_l2: Relative L2 error of each row, likewise.
    """

    ratio: _F64
    rel_l2: _F64

    def finding(self, i: int) -> Finding:
        """Worst metric of a row."""


@dataclass(slots=True)
class Side:
    """Pairs in the input or the output slots of calls, sorted by call.

    Attributes:
        calls: (m,) call.
        pairs: (m,) pair.
    """

    calls: _I64
    pairs: _I64

    def of(self, call: int) -> _I64:
        """Pairs of one call, in the order of its slots."""
        first, last = np.searchsorted(self.calls, [call, call + 1])
        found: _I64 = self.pairs[first:last]
        return found

    def largest(self, values: _F64, size: int) -> _F64:
        """The greatest value of each call's pairs, 0 for calls without any."""
        result = np.zeros(size)
        np.maximum.at(result, self.calls, values[self.pairs])
        return result


def enclosing_calls(calls: Sequence[CallLine] | Sequence[CallName]) -> _I64:
    """For each call the one around it, ROOT at the top.

    Calls stand in the order of their ends: it is the next one behind that is on a
    higher level.
    """
    parents = np.full(len(calls), ROOT, dtype=np.int64)
    around: list[tuple[int, int]] = []
    for index in range(len(calls) - 1, -1, -1):
        level = calls[index].l
        while around and around[-1][0] >= level:
            around.pop()
        if around:
            parents[index] = around[-1][1]
        around.append((level, index))
    return parents


def find_divergence(
    pairs: Pairs,
    errors: RowErrors,
    is_judged: _Bools,
    weights: tuple[Weights, Weights],
    search: "Search | None" = None,
) -> Divergence | None:
    """Where a failing candidate first computed something else.

    Args:
        pairs: Paired rows.
        errors: Their errors; only rows that may be used have any.
        is_judged: Rows that may disagree; the others may only accuse a parent's code.
        weights: Weight fingerprints of golden and candidate.
        search: Of the same rows, where there is one already.

    Returns:
        None where no judged row is outside its limits.
    """
    search = search or Search(pairs, errors, is_judged)
    divergence = search.descend()
    if divergence is not None and divergence.finding is not None:
        before, after = divergence.input_error, divergence.output_error
        divergence.finding.growth = portable(_grown(float(before), float(after)))
    changed = changed_weights(*weights)
    if not changed:
        return divergence
    module, parameter = _first_owner(pairs.candidate.calls, changed)
    finding = divergence.finding if divergence is not None else None
    return Divergence("weights", module, module, parameter=parameter, finding=finding)


class Search:
    """The candidate's calls as a tree, with the errors of their rows."""

    def __init__(self, pairs: Pairs, errors: RowErrors, is_judged: _Bools) -> None:
        self._calls = pairs.candidate.calls
        self._pairs = pairs
        self._errors = errors
        self._judged_ratio = np.where(is_judged, errors.ratio, 0.0)
        size = len(self._calls)
        self._parents = enclosing_calls(self._calls)
        partner = np.full(len(pairs.candidate.key), -1, dtype=np.int64)
        partner[pairs.new] = np.arange(len(pairs.new))
        uses = pairs.candidate.uses
        self._is_judged = np.zeros(len(partner), dtype=np.bool_)
        self._is_judged[pairs.new[is_judged]] = True
        calls, found = uses[:, 0], partner[uses[:, 1]]
        is_output = pairs.candidate.is_output[uses[:, 1]]
        is_in, is_out = ((found >= 0) & flag for flag in (~is_output, is_output))
        self._inputs = Side(calls[is_in], found[is_in])
        self._outputs = Side(calls[is_out], found[is_out])
        self._input_error = self._inputs.largest(errors.rel_l2, size)
        self._output_error = self._outputs.largest(errors.rel_l2, size)
        self._is_in_bad = self._inputs.largest(self._judged_ratio, size) > 1.0
        self._is_out_bad = self._outputs.largest(self._judged_ratio, size) > 1.0
        self._leads_on = self._with_guilty_children()

    def descend(self) -> Divergence | None:
        """Where it began; see the module."""
        node = ROOT
        while True:
            children = np.flatnonzero(self._parents == node)
            is_guilty = self._is_in_bad | self._is_out_bad | self._leads_on
            guilty = children[is_guilty[children]]
            if not len(guilty):
                break
            child = int(guilty[0])
            entered = self._entered(child)
            if entered is not None:
                return self._own_code(node, child, entered)
            node = child
        if node == ROOT:
            return None
        before, after = self._input_error[node], self._output_error[node]
        finding = self._worst_output(node)
        if after < DRIFT * self._worked_on(node, node):
            return self._drift(node, finding)
        return Divergence(
            "origin",
            self._name(node),
            self._module(node),
            finding=finding,
            input_error=portable(before),
            output_error=portable(after),
        )

    def growth(self) -> _F64:
        """Amplification by the call of each row that is outside its limits.

        Returns:
            (n,) error of an output / largest error of the call's inputs, infinite where
            these agree. 0 for rows that only hand on what another one has brought in:
            inputs, and outputs of calls inside which something disagrees.
        """
        rows, calls = self._outputs.pairs, self._outputs.calls
        is_own = (self._judged_ratio[rows] > 1.0) & ~self._leads_on[calls]
        rows, calls = rows[is_own], calls[is_own]
        before, after = self._input_error[calls], self._errors.rel_l2[rows]
        with np.errstate(divide="ignore", invalid="ignore"):
            grown = np.where(before > 0, after / before, np.inf)
        result = np.zeros(len(self._judged_ratio))
        # inf / inf: both are as wrong as can be.
        np.maximum.at(result, rows, np.nan_to_num(grown, nan=1.0, posinf=np.inf))
        return result

    def _with_guilty_children(self) -> _Bools:
        """Calls inside which something disagrees.

        What they return may be within its limits all the same, or, of calls that only
        one side has, not be judged at all.
        """
        leads_on = np.zeros(len(self._calls), dtype=np.bool_)
        inner = np.unique(self._parents[self._is_in_bad | self._is_out_bad])
        while len(inner := inner[inner != ROOT]):
            leads_on[inner] = True
            inner = np.unique(self._parents[inner])
        return leads_on

    def _entered(self, call: int) -> int | None:
        """The worst input outside its limits of a disagreeing call, or None."""
        rows = self._inputs.of(call)
        ratio = self._judged_ratio if self._is_in_bad[call] else self._errors.ratio
        return _worst(rows, ratio)

    def _worst_output(self, call: int) -> Finding:
        worst = _worst(self._outputs.of(call), self._judged_ratio)
        assert worst is not None
        return self._errors.finding(worst)

    def _own_code(self, node: int, child: int, row: int) -> Divergence:
        """A child's input differs although nothing before it did."""
        kind: DivergenceKind = "origin"
        if node == ROOT and not self._has_before(child):
            kind = "inputs"
        giver = self._giver(node, child, row)
        if giver is not None:
            return Divergence(
                "origin",
                self._name(giver),
                self._module(giver),
                handed_to=self._name(child),
                finding=self._errors.finding(row),
                output_error=portable(self._input_error[child]),
            )
        before = 0.0 if node == ROOT else self._input_error[node]
        if self._input_error[child] < DRIFT * self._worked_on(node, child):
            return self._drift(child, self._errors.finding(row))
        return Divergence(
            kind,
            self._name(node),
            self._module(node),
            between=self._name(child),
            finding=self._errors.finding(row),
            input_error=portable(before),
            output_error=portable(self._input_error[child]),
        )

    def _worked_on(self, node: int, end: int) -> float:
        """Largest error of what a call's own code has worked on before another one.

        Args:
            node: The call, ROOT for the code around all modules.
            end: One of its children, or itself for all of them.
        """
        steps = self._pairs.candidate.steps
        children = np.flatnonzero(self._parents[:end] == node)
        children = children[steps[children] == steps[end]]
        own = 0.0 if node == ROOT else self._input_error[node]
        return float(max(self._output_error[children].max(initial=0.0), own))

    def _has_before(self, call: int) -> bool:
        """Whether another call has ended before one in the same step."""
        steps = self._pairs.candidate.steps
        inside = np.flatnonzero(steps[:call] == steps[call]).tolist()
        return any(not self._is_inside(other, call) for other in inside)

    def _is_inside(self, call: int, around: int) -> bool:
        while call not in (around, ROOT):
            call = int(self._parents[call])
        return call == around

    def _giver(self, node: int, child: int, row: int) -> int | None:
        """The call inside a parent that returned what a child was given.

        None where there is none, or where its own rows are judged.
        """
        rows = self._pairs.candidate
        _, given = self._pairs.line_pair(row)
        if not given.c:
            return None
        known = rows.uses[rows.is_output[rows.uses[:, 1]]]
        known = known[(known[:, 0] < child) & (rows.steps[known[:, 0]]
                                               == rows.steps[child])]  # fmt: skip
        for call, other in known.tolist():
            line = rows.lines[rows.tensor[other]]
            if (line.c, line.d, line.g) != (given.c, given.d, given.g):
                continue
            if self._is_inside(call, child):
                continue
            if node != ROOT and not self._is_inside(call, node):
                continue
            return None if self._is_judged[other] else int(call)
        return None

    def _drift(self, last: int, finding: Finding) -> Divergence:
        """No single call: names the leaf whose error grew most, up to this one.

        Args:
            last: The call.
            finding: The row that is outside its limits there.
        """
        is_leaf = np.ones(len(self._calls), dtype=np.bool_)
        is_leaf[self._parents[self._parents != ROOT]] = False
        before = self._input_error[: last + 1]
        after = self._output_error[: last + 1]
        with np.errstate(invalid="ignore"):
            growth = after - before
        growth[~(is_leaf[: last + 1] & np.isfinite(after))] = -np.inf
        best = int(growth.argmax())
        best = best if np.isfinite(growth[best]) else last
        return Divergence(
            "drift",
            self._name(best),
            self._module(best),
            finding=finding,
            input_error=portable(self._input_error[best]),
            output_error=portable(self._output_error[best]),
        )

    def _name(self, node: int) -> str:
        return self._calls[node].c if node != ROOT else ""

    def _module(self, node: int) -> str:
        """Path of the innermost module around a call, itself included."""
        while node != ROOT:
            name = parse_call_name(self._name(node))
            if name is not None and name.is_module:
                return name.module_path or name.class_name
            node = int(self._parents[node])
        return ""


def _grown(before: float, after: float) -> float:
    """Error of outputs / error of inputs; infinite where only outputs are off."""
    if before == after:  # both infinite, too
        return 1.0 if before else 0.0
    return after / before if before else math.inf


def _worst(rows: _I64, ratio: _F64) -> int | None:
    """The worst row outside its limits, or None."""
    if not len(rows):
        return None
    worst = int(rows[ratio[rows].argmax()])
    return worst if ratio[worst] > 1.0 else None


def changed_weights(golden: Weights, candidate: Weights) -> dict[str, list[str]]:
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


def _first_owner(
    calls: Sequence[CallName], changed: dict[str, list[str]]
) -> tuple[str, str]:
    """The first module in execution order that owns a changed parameter."""
    for call in calls:
        name = parse_call_name(call.c)
        if name is not None and name.is_module and name.module_path in changed:
            return name.module_path, changed[name.module_path][0]
    module = min(changed)
    return module, changed[module][0]
