# SPDX-License-Identifier: Apache-2.0
"""Errors, limits and ratios of paired rows; only unequal rows are computed.

Rows often share their tensors (an input is the output of an earlier call), so errors
are computed once for each pair of tensors and then spread over the rows.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pytest_msprobe.compare.match import Pairs, Rows, distinct
from pytest_msprobe.compare.metrics import Error, row_errors
from pytest_msprobe.compare.tolerance import ResolvedLimits, floors, least_limits
from pytest_msprobe.dump.capture import TensorLine
from pytest_msprobe.dump.columns import Columns, differs
from pytest_msprobe.model.dtypes import BY_CODE
from pytest_msprobe.model.limits import NOISE_MULTIPLE, ROW_METRICS
from pytest_msprobe.model.segments import FIRST
from pytest_msprobe.model.verdict import Finding, portable

# What no tolerance allows, in the order in which it is reported.
_TOLERATED, _DTYPE, _SHAPE, _NONFINITE, _INTEGERS, _EXACT = range(6)
_F64 = npt.NDArray[np.float64]
_I64 = npt.NDArray[np.int64]
_Bools = npt.NDArray[np.bool_]
_NOISE = f"noise x{NOISE_MULTIPLE:g}"
# Up to so many elements a row's own size may be near 0 by chance.
FEW = 16


@dataclass(slots=True)
class Elements:
    """What was found element by element, for pairs whose tensors are saved.

    Attributes:
        distance: (n,) L2 distance, NaN where it was not computed.
        worst: (n,) index of the element that differs most, None where unknown.
    """

    distance: _F64
    worst: list[list[int] | None]


@dataclass(slots=True)
class _Measured:
    """Errors of some rows, spread from their pairs of tensors.

    Attributes:
        errors: By metric.
        noise: (m, 5) noise of the golden's tensors, metrics in their order.
        count: (m,) elements of the golden's tensors.
        floor: By metric, what storing the numbers adds to the limit.
        reasons: What no tolerance allows.
    """

    errors: dict[str, Error]
    noise: _F64
    count: _F64
    floor: dict[str, _F64]
    reasons: npt.NDArray[np.int8]


class Errors:
    """Errors of the paired rows by index.

    Attributes:
        ratio: Worst observed / allowed of each row, 0 for equal and unwanted ones.
        rel_l2: Relative L2 error of each row, likewise.
        is_raised: Rows whose limit is raised by the golden's noise.
    """

    def __init__(
        self,
        pairs: Pairs,
        limits: ResolvedLimits,
        is_wanted: _Bools,
        elements: Elements | None = None,
        is_loose: _Bools | None = None,
    ) -> None:
        """Computes the errors.

        Args:
            pairs: The rows.
            limits: Their limits.
            is_wanted: Rows whose errors are of interest.
            elements: Of pairs whose tensors are saved.
            is_loose: (n,) rows in which roundings may differ, None for none of them.
        """
        size = len(pairs.new)
        self._is_loose = np.zeros(size, np.bool_) if is_loose is None else is_loose
        self._pairs = pairs
        self._limits = limits
        self._elements = elements
        self.ratio = np.zeros(size)
        self.rel_l2 = np.zeros(size)
        self.is_raised = np.zeros(size, dtype=np.bool_)
        self._metric = np.zeros(size, dtype=np.int8)
        self._observed = np.zeros(size)
        self._allowed = np.zeros(size)
        self._share = np.zeros(size)
        self._is_noise = np.zeros(size, dtype=np.bool_)
        self._reason = np.zeros(size, dtype=np.int8)
        self._index = np.flatnonzero(~pairs.is_equal & is_wanted)
        # Limits that would let each row pass, by metric; of `_index`.
        self._needed: dict[str, _F64] = {}
        self._is_beyond: dict[str, _Bools] = {}
        if len(self._index):
            self._compute(self._index)

    def _measure(self, index: _I64) -> _Measured:
        first, place = distinct(self._pairs, index)
        old, new = self._pairs.numbers(first)
        with np.errstate(all="ignore"):
            errors = row_errors(old, new)
        self._use_elements(errors, first)
        reasons = _reasons(old, new)
        if self._pairs.is_dump:
            is_blank = np.isnan(old.high) & np.isnan(new.high)
            is_blank &= ~old.nonfinite.any(axis=1) & (reasons == _TOLERATED)
            reasons[is_blank] = _INTEGERS  # checksums are all that is known
        spread = {name: error.at(place) for name, error in errors.items()}
        self._widen_scales(spread, index, old.count[place])
        return _Measured(
            spread,
            old.noise[place],
            old.count[place],
            {
                n: v[place]
                for n, v in floors(old, new, is_dump=self._pairs.is_dump).items()
            },
            reasons[place],
        )

    def _widen_scales(self, errors: dict[str, Error], index: _I64, count: _F64) -> None:
        """Where roundings may differ, few elements have their slot's usual size.

        What one to a few elements come to may be near 0 by chance, a gate's output for
        one token say; a rounding is large beside that.
        """
        is_few = self._is_loose[index] & (count <= FEW) & ~self._pairs.is_dump
        if not is_few.any():
            return
        usual = usual_sizes(self._pairs.golden)[self._pairs.old[index]]
        usual = np.where(is_few, usual, 0.0)
        for name, error in errors.items():
            is_norm = name in ("rel_l2", "norm")
            least = usual * np.sqrt(count) if is_norm else usual
            error.scale = np.fmax(error.scale, least)

    def _use_elements(self, errors: dict[str, Error], first: _I64) -> None:
        """Takes exact distances where they are known.

        A dump leaves metrics out that its statistics do not tell.
        """
        if self._elements is not None:
            exact = self._elements.distance[first]
            is_known = ~np.isnan(exact)
            errors["rel_l2"].difference[is_known] = exact[is_known]
        if self._pairs.is_dump:
            for error in errors.values():
                is_unknown = np.isnan(error.difference)
                error.difference[is_unknown] = error.scale[is_unknown] = 0.0

    def _compute(self, index: _I64) -> None:
        measured = self._measure(index)
        worst = np.full(len(index), -1.0)
        for number, name in enumerate(ROW_METRICS):
            error = measured.errors[name]
            observed, floor = error.relative, measured.floor[name]
            rule = least_limits(self._limits, name, index, measured.count)
            absolute = self._limits.absolute[name][index]
            noise = measured.noise[:, number]
            is_open = np.isposinf(rule)
            with np.errstate(divide="ignore", invalid="ignore"):
                more = np.where(absolute > 0, absolute * error.spread, 0.0)
                rule = rule + np.where(more > 0, more / error.scale, 0.0)
                limit = np.maximum(rule, NOISE_MULTIPLE * noise)
                allowed = limit + floor
                ratio = np.where(observed > 0, observed / allowed, 0.0)
                # Where the golden is 0, only an absolute limit can tell.
                is_zero = (more > 0) & ~(error.scale > 0)
                ratio = np.where(is_zero, error.difference / more, ratio)
                ratio = np.where(is_open, 0.0, ratio)
                share = np.where(noise > 0, noise / allowed, 0.0)
            ratio = np.nan_to_num(ratio, nan=np.inf, posinf=np.inf)
            self._needed[name] = np.maximum(observed - floor, 0.0)
            self._is_beyond[name] = ratio > 1.0
            self.is_raised[index] |= limit > rule
            is_worse = ratio > worst
            worst[is_worse] = ratio[is_worse]
            rows = index[is_worse]
            self._metric[rows] = number
            self._observed[rows] = observed[is_worse]
            self._allowed[rows] = allowed[is_worse]
            self._share[rows] = share[is_worse]
            self._is_noise[rows] = (limit > rule)[is_worse]
        self.ratio[index] = worst
        self.rel_l2[index] = measured.errors["rel_l2"].relative
        self._check_exactly(index, measured.reasons)

    def _check_exactly(self, index: _I64, reasons: npt.NDArray[np.int8]) -> None:
        """What no tolerance allows: other dtype, shape, NaN counts, integers."""
        is_exact = self._limits.is_exact[index] & (reasons == _TOLERATED)
        reasons[is_exact] = _EXACT
        self._reason[index] = reasons
        failed = index[reasons != _TOLERATED]
        self.ratio[failed] = np.inf
        self.rel_l2[failed[self.rel_l2[failed] == 0]] = np.inf
        # What finite elements have in common tells nothing of these.
        is_other = np.isin(reasons, (_DTYPE, _SHAPE, _NONFINITE))
        self.rel_l2[index[is_other]] = np.inf

    def is_tolerable(self, rows: _I64) -> bool:
        """Whether some tolerance could let all of these rows pass."""
        return bool((self._reason[rows] == _TOLERATED).all())

    def needed(self, chosen: _Bools, *, beyond: _Bools) -> dict[str, float]:
        """Limits with which all chosen rows pass, storage floor not included.

        Args:
            chosen: (n,) rows.
            beyond: (n,) rows among them that are outside their limits now.

        Returns:
            For each metric that a row is outside of, the greatest error of all chosen
            rows; infinite where the golden is 0 and the candidate is not.
        """
        rows, failed = chosen[self._index], beyond[self._index]
        return {
            name: float(values[rows].max())
            for name, values in self._needed.items()
            if (failed & self._is_beyond[name]).any()
        }

    def relative(self, chosen: _Bools) -> tuple[_I64, dict[str, _F64]]:
        """Chosen rows that are not equal, and their errors by metric.

        Errors are infinite where no tolerance allows the difference.
        """
        index = np.flatnonzero(chosen & ~self._pairs.is_equal)
        if not len(index):
            return index, {name: np.zeros(0) for name in ROW_METRICS}
        measured = self._measure(index)
        found = {n: error.relative for n, error in measured.errors.items()}
        for values in found.values():
            values[measured.reasons != _TOLERATED] = np.inf
        return index, found

    def finding(self, i: int) -> Finding:
        """The worst metric of one row."""
        (row,) = self._pairs.candidate.row_ids(self._pairs.new[i : i + 1])
        ratio = portable(self.ratio[i])
        element = self._elements.worst[i] if self._elements is not None else None
        if self._reason[i] != _TOLERATED:
            metric, detail = _describe(int(self._reason[i]), *self._pairs.line_pair(i))
            origin = "always"
            if self._reason[i] == _EXACT:
                origin = self._limits.exact_origin(i)
            return Finding(
                row, metric, "differs", 0.0, ratio, origin, detail, element=element
            )
        metric = ROW_METRICS[int(self._metric[i])]
        origin = self._limits.origin(metric, i)
        return Finding(
            row,
            metric,
            portable(self._observed[i]),
            portable(self._allowed[i]),
            ratio,
            f"{_NOISE}, above {origin}" if self._is_noise[i] else origin,
            noise=float(self._share[i]),
            element=element,
        )


def usual_sizes(rows: Rows) -> _F64:
    """Root mean square of each row's slot, over all its rows.

    That of each request's first position, of huge activations often, does not count.

    Returns:
        (n,) in the tensors' unit, 0 where it is unknown.
    """
    _, slot = np.unique(rows.slot_key, return_inverse=True)
    slot = slot.reshape(-1)
    columns, tensors = rows.columns, rows.tensor
    counts = ~rows.in_segments(np.arange(len(slot)), _is_first)
    counts &= np.isfinite(columns.squares[tensors])
    sums = [
        np.bincount(slot, weights=np.where(counts, column[tensors], 0.0))
        for column in (columns.squares, columns.count)
    ]
    usual: _F64 = np.sqrt(sums[0] / np.maximum(sums[1], 1.0))
    return usual[slot]


def _is_first(segment: str) -> bool:
    return segment.endswith(f".{FIRST}")


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
