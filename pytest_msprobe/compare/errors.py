# SPDX-License-Identifier: Apache-2.0
"""Errors, limits and ratios of paired rows; only unequal rows are computed.

Rows often share their tensors (an input is the output of an earlier call), so errors
are computed once for each pair of tensors and then spread over the rows.
"""

import numpy as np
import numpy.typing as npt

from pytest_msprobe.compare.match import Columns, Pairs, columns_of, differs, distinct
from pytest_msprobe.compare.metrics import row_errors
from pytest_msprobe.compare.tolerance import ResolvedLimits, with_floor
from pytest_msprobe.dump.capture import TensorLine
from pytest_msprobe.model.dtypes import BY_CODE
from pytest_msprobe.model.limits import ROW_METRICS
from pytest_msprobe.model.verdict import Finding, portable

# What no tolerance allows, in the order in which it is reported.
_TOLERATED, _DTYPE, _SHAPE, _NONFINITE, _INTEGERS, _EXACT = range(6)
_I64 = npt.NDArray[np.int64]
_Bools = npt.NDArray[np.bool_]


class Errors:
    """Errors of the paired rows by index.

    Attributes:
        ratio: Worst observed / allowed of each row, 0 for equal and unwanted ones.
        rel_l2: Relative L2 error of each row, likewise.
    """

    def __init__(self, pairs: Pairs, limits: ResolvedLimits, is_wanted: _Bools) -> None:
        """Computes the errors.

        Args:
            pairs: The rows.
            limits: Their limits.
            is_wanted: Rows whose errors are of interest.
        """
        size = len(pairs.new)
        self._pairs = pairs
        self._limits = limits
        self.ratio = np.zeros(size)
        self.rel_l2 = np.zeros(size)
        self._metric = np.zeros(size, dtype=np.int8)
        self._observed = np.zeros(size)
        self._allowed = np.zeros(size)
        self._reason = np.zeros(size, dtype=np.int8)
        index = np.flatnonzero(~pairs.is_equal & is_wanted)
        if len(index):
            self._compute(index)

    def _compute(self, index: _I64) -> None:
        first, place = distinct(self._pairs, index)
        old, new = (columns_of(side) for side in self._pairs.line_pairs(first))
        with np.errstate(all="ignore"):
            errors = row_errors(old, new)
        is_coarse = ~(np.isnan(old.scales) & np.isnan(new.scales))[place]
        worst = np.full(len(index), -1.0)
        for number, name in enumerate(ROW_METRICS):
            observed = errors[name][place]
            limit = with_floor(self._limits.limits[name][index], name, is_coarse)
            with np.errstate(divide="ignore", invalid="ignore"):
                ratio = np.where(observed > 0, observed / limit, 0.0)
            ratio = np.nan_to_num(ratio, nan=np.inf, posinf=np.inf)
            is_worse = ratio > worst
            worst[is_worse] = ratio[is_worse]
            rows = index[is_worse]
            self._metric[rows] = number
            self._observed[rows] = observed[is_worse]
            self._allowed[rows] = limit[is_worse]
        self.ratio[index] = worst
        self.rel_l2[index] = np.nan_to_num(errors["rel_l2"], nan=np.inf, posinf=np.inf)[
            place
        ]
        self._check_exactly(index, _reasons(old, new)[place])

    def _check_exactly(self, index: _I64, reasons: npt.NDArray[np.int8]) -> None:
        """What no tolerance allows: other dtype, shape, NaN counts, integers."""
        is_exact = self._limits.is_exact[index] & (reasons == _TOLERATED)
        reasons[is_exact] = _EXACT
        self._reason[index] = reasons
        failed = index[reasons != _TOLERATED]
        self.ratio[failed] = np.inf
        self.rel_l2[failed[self.rel_l2[failed] == 0]] = np.inf

    def finding(self, i: int) -> Finding:
        """The worst metric of one row."""
        (row,) = self._pairs.candidate.row_ids(self._pairs.new[i : i + 1])
        ratio = portable(self.ratio[i])
        if self._reason[i] != _TOLERATED:
            metric, detail = _describe(int(self._reason[i]), *self._pairs.line_pair(i))
            return Finding(row, metric, "differs", 0.0, ratio, "always", detail)
        metric = ROW_METRICS[int(self._metric[i])]
        return Finding(
            row,
            metric,
            portable(self._observed[i]),
            portable(self._allowed[i]),
            ratio,
            self._limits.origin(metric, i),
        )


def _reasons(old: Columns, new: Columns) -> npt.NDArray[np.int8]:
    """What no tolerance allows, for each pair of tensors that are not equal."""
    reasons = np.full(len(old.codes), _TOLERATED, dtype=np.int8)
    reasons[~old.has_sums] = _INTEGERS
    reasons[(old.nonfinite != new.nonfinite).any(axis=1)] = _NONFINITE
    reasons[differs(old.shapes, new.shapes)] = _SHAPE
    reasons[differs(old.codes, new.codes)] = _DTYPE
    return reasons


def _describe(reason: int, old: TensorLine, new: TensorLine) -> tuple[str, str]:
    """Metric and detail of a difference that no tolerance allows."""
    if reason == _DTYPE:
        names = [BY_CODE[t.d].name if t.d in BY_CODE else t.d for t in (old, new)]
        return "dtype", f"{names[0]} became {names[1]}"
    if reason == _SHAPE:
        return "shape", f"{old.s} became {new.s}"
    if reason == _NONFINITE:
        counts = [t.x or [0, 0, 0] for t in (old, new)]
        texts = [f"{c[0]} NaN, {c[1]} +Inf, {c[2]} -Inf" for c in counts]
        return "nonfinite", f"{texts[0]} became {texts[1]}"
    if reason == _INTEGERS:
        return "checksum", "integers differ"
    return "checksum", "exact rows must have equal checksums"
