# SPDX-License-Identifier: Apache-2.0
"""Judges a candidate capture against a golden. Pure: two captures in, a verdict out."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pytest_msprobe.compare.divergence import find_divergence
from pytest_msprobe.compare.match import (
    Pairs,
    columns_of,
    is_module_row,
    is_output,
    pair_rows,
)
from pytest_msprobe.compare.metrics import row_errors
from pytest_msprobe.compare.signature import differences, incomparable_reasons
from pytest_msprobe.compare.tokens import compare_tokens, positions_behind_flips
from pytest_msprobe.compare.tolerance import (
    ResolvedLimits,
    default_limits,
    resolve_limits,
    with_floor,
)
from pytest_msprobe.dump.capture import CaptureFile
from pytest_msprobe.model.dtypes import BY_CODE
from pytest_msprobe.model.limits import ROW_METRICS, KeyMode, Rule
from pytest_msprobe.model.verdict import Finding, RowId, Verdict

WORST = 20


@dataclass(slots=True)
class Judgement:
    """A verdict with what the session needs beyond it.

    Attributes:
        verdict: The verdict.
        unmatched: Rules that matched no row.
        names: Names of all rows that both captures have.
    """

    verdict: Verdict
    unmatched: list[Rule]
    names: list[str]


def judge(
    golden: CaptureFile,
    candidate: CaptureFile,
    rules: Sequence[Rule] = (),
    *,
    mode: KeyMode | None = None,
) -> Judgement:
    """Judges a candidate.

    Args:
        golden: The golden.
        candidate: What was captured now.
        rules: Tolerances beyond the defaults, in order.
        mode: Same or another numerics key; taken from the headers if not given.
    """
    if mode is None:
        mode = "same" if golden.header.key == candidate.header.key else "cross"
    verdict = Verdict(
        test=candidate.header.test,
        status="pass",
        golden=str(golden.path or ""),
        capture=str(candidate.path or ""),
        mode=mode,
        golden_key=golden.header.key,
        key=candidate.header.key,
        left_out=dict(candidate.header.left_out),
        rank=candidate.header.rank,
    )
    verdict.changes = differences(golden.header.provenance, candidate.header.provenance)
    verdict.reasons = incomparable_reasons(golden.header, candidate.header)
    if verdict.reasons:
        verdict.status = "incomparable"
        return Judgement(verdict, [], [])
    return _Judge(golden, candidate, rules, mode, verdict).run()


class _Judge:
    def __init__(
        self,
        golden: CaptureFile,
        candidate: CaptureFile,
        rules: Sequence[Rule],
        mode: KeyMode,
        verdict: Verdict,
    ) -> None:
        self._golden = golden
        self._candidate = candidate
        self._rules = rules
        self._mode = mode
        self._verdict = verdict
        self._is_rescheduled = _schedule(golden) != _schedule(candidate)

    def run(self) -> Judgement:
        verdict = self._verdict
        pairs = pair_rows(self._golden, self._candidate)
        names = [row.text for row in pairs.ids]
        dtype = str(self._candidate.header.signature.get("model", {}).get("dtype", ""))
        limits = resolve_limits(
            names,
            self._rules,
            default_limits(self._mode, dtype, is_rescheduled=self._is_rescheduled),
            self._mode,
        )
        requests = self._golden.header.requests, self._candidate.header.requests
        verdict.tokens = compare_tokens(*requests, limits.logprob)
        behind = positions_behind_flips(*requests)
        is_behind = np.fromiter(
            (_is_behind(row.segment, behind) for row in pairs.ids), np.bool_, len(names)
        )
        errors = _Errors(pairs, limits, ~is_behind)
        judged = self._judged(pairs, limits) & ~is_behind
        failed = judged & (errors.ratio > 1.0)
        verdict.judged = int(judged.sum())
        verdict.equal = int((judged & pairs.is_equal).sum())
        verdict.unjudged = int(is_behind.sum())
        verdict.failed = int(failed.sum())
        self._note_missing(pairs, behind)
        verdict.worst = [errors.finding(i) for i in _worst(pairs, errors, failed)]
        self._settle(pairs, errors, is_failing=bool(failed.any()))
        return Judgement(verdict, limits.unmatched, names)

    def _judged(self, pairs: Pairs, limits: ResolvedLimits) -> npt.NDArray[np.bool_]:
        """Rows that count: across keys only outputs of modules do."""
        judged = ~limits.is_ignored
        if self._mode == "cross":
            counts = (is_module_row(row) and is_output(row) for row in pairs.ids)
            judged &= np.fromiter(counts, np.bool_, len(pairs.ids))
        if self._is_rescheduled:
            has_segment = (bool(row.segment) for row in pairs.ids)
            judged &= np.fromiter(has_segment, np.bool_, len(pairs.ids))
        return judged

    def _note_missing(self, pairs: Pairs, behind: dict[int, int]) -> None:
        verdict = self._verdict
        missing = [
            row
            for row in pairs.missing
            if self._is_required(row) and not _is_behind(row.segment, behind)
        ]
        verdict.missing = len(missing)
        verdict.missing_rows = [row.text for row in missing[:WORST]]
        verdict.extra = len(pairs.extra)

    def _is_required(self, row: RowId) -> bool:
        if self._mode == "cross" and not (is_module_row(row) and is_output(row)):
            return False
        return bool(row.segment) or not self._is_rescheduled

    def _settle(self, pairs: Pairs, errors: "_Errors", *, is_failing: bool) -> None:
        """Status, reasons, divergence and notes."""
        verdict = self._verdict
        tokens = verdict.tokens
        if verdict.judged == 0:
            verdict.reasons.append("no row of the golden was computed here")
        if verdict.missing:
            verdict.reasons.append(f"{verdict.missing} rows of the golden are missing")
        largest = math.inf if isinstance(tokens.largest, str) else tokens.largest
        if largest > tokens.allowed:
            verdict.reasons.append("log-probabilities moved by more than is allowed")
        is_red = is_failing or bool(verdict.reasons)
        if is_red:
            verdict.status = "fail"
            verdict.divergence = find_divergence(
                self._candidate,
                {key: index for index, key in enumerate(pairs.keys)},
                errors,
                (self._golden.header.weights, self._candidate.header.weights),
            )
        elif verdict.equal < verdict.judged or tokens.flipped or largest > 0:
            verdict.status = "changed"
        self._note(tokens.flipped is not None)

    def _note(self, has_flip: bool) -> None:  # noqa: FBT001 - private
        verdict = self._verdict
        if self._mode == "cross":
            verdict.notes.append(
                f"the golden is of {verdict.golden_key}, this is {verdict.key}: only "
                "module outputs, logits and tokens are judged, with the limits for "
                "another key"
            )
        if self._is_rescheduled:
            verdict.notes.append(
                "requests were batched or chunked differently than in the golden: "
                "limits for other scheduling, rows without a token dimension not judged"
            )
        if has_flip:
            verdict.notes.append(
                "decode is judged up to the first other token; "
                f"{verdict.unjudged} rows behind it are not judged"
            )


class _Errors:
    """Errors, limits and ratios of the paired rows; only unequal rows are computed."""

    def __init__(
        self, pairs: Pairs, limits: ResolvedLimits, is_wanted: npt.NDArray[np.bool_]
    ) -> None:
        self._pairs = pairs
        self._limits = limits
        size = len(pairs.ids)
        self.ratio = np.zeros(size)
        self.rel_l2 = np.zeros(size)
        self._metric = np.full(size, -1, dtype=np.int64)
        self._values = {name: np.zeros(size) for name in ROW_METRICS}
        self._details: dict[int, tuple[str, str]] = {}
        index = np.flatnonzero(~pairs.is_equal & is_wanted)
        if len(index):
            self._compute(index)

    def _compute(self, index: npt.NDArray[np.int64]) -> None:
        old = [self._pairs.golden[i] for i in index]
        new = [self._pairs.candidate[i] for i in index]
        a, b = columns_of(old), columns_of(new)
        with np.errstate(all="ignore"):
            errors = row_errors(a, b, old, new)
        ratios = np.zeros((len(ROW_METRICS), len(index)))
        for place, name in enumerate(ROW_METRICS):
            limit = with_floor(self._limits.limits[name][index], name)
            observed = errors[name]
            self._values[name][index] = observed
            with np.errstate(divide="ignore", invalid="ignore"):
                ratio = np.where(observed > 0, observed / limit, 0.0)
            ratios[place] = np.nan_to_num(ratio, nan=np.inf, posinf=np.inf)
        self.ratio[index] = ratios.max(axis=0)
        self._metric[index] = ratios.argmax(axis=0)
        self.rel_l2[index] = np.nan_to_num(errors["rel_l2"], nan=np.inf, posinf=np.inf)
        for place, i in enumerate(index):
            self._check_exactly(int(i), place, a.nonfinite, b.nonfinite)

    def _check_exactly(
        self,
        i: int,
        place: int,
        nonfinite_old: npt.NDArray[np.int64],
        nonfinite_new: npt.NDArray[np.int64],
    ) -> None:
        """What no tolerance allows: other dtype, shape, NaN counts, integers."""
        old, new = self._pairs.golden[i], self._pairs.candidate[i]
        names = [BY_CODE[t.d].name if t.d in BY_CODE else t.d for t in (old, new)]
        counts = nonfinite_old[place], nonfinite_new[place]
        if old.d != new.d:
            self._fail(i, "dtype", f"{names[0]} became {names[1]}")
        elif old.s != new.s:
            self._fail(i, "shape", f"{old.s} became {new.s}")
        elif (counts[0] != counts[1]).any():
            texts = [f"{c[0]} NaN, {c[1]} +Inf, {c[2]} -Inf" for c in counts]
            self._fail(i, "nonfinite", f"{texts[0]} became {texts[1]}")
        elif len(old.v) == 2:  # noqa: PLR2004 - integers have no sums
            self._fail(i, "checksum", "integers differ")
        elif self._limits.is_exact[i]:
            self._fail(i, "checksum", "exact rows must have equal checksums")

    def _fail(self, i: int, metric: str, detail: str) -> None:
        self.ratio[i] = np.inf
        if not self.rel_l2[i] > 0:
            self.rel_l2[i] = np.inf
        self._details[i] = (metric, detail)

    def finding(self, i: int) -> Finding:
        """The worst metric of one row."""
        row, ratio = self._pairs.ids[i], _portable(float(self.ratio[i]))
        if i in self._details:
            metric, detail = self._details[i]
            return Finding(row, metric, "differs", 0.0, ratio, "always", detail)
        metric = ROW_METRICS[int(self._metric[i])]
        limit = with_floor(self._limits.limits[metric][i : i + 1], metric)
        return Finding(
            row,
            metric,
            _portable(float(self._values[metric][i])),
            float(limit[0]),
            ratio,
            self._limits.origin(metric, i),
        )


def _worst(pairs: Pairs, errors: _Errors, failed: npt.NDArray[np.bool_]) -> list[int]:
    """Failing rows to show, worst first: outputs before inputs, each tensor once."""
    order = [int(i) for i in np.argsort(-errors.ratio, kind="stable") if failed[i]]
    order.sort(key=lambda i: not is_output(pairs.ids[i]))
    seen: set[int] = set()
    shown: list[int] = []
    for i in order:
        tensor = pairs.candidate[i].t
        if tensor not in seen:
            seen.add(tensor)
            shown.append(i)
    return shown[:WORST]


def _portable(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _schedule(capture: CaptureFile) -> list[tuple[object, ...]]:
    return [(step.tokens, *step.requests) for step in capture.steps]


def _is_behind(segment: str, behind: dict[int, int]) -> bool:
    """Whether a segment lies behind its request's first flipped token."""
    label, _, part = segment.partition(".")
    if not part.startswith("g") or not label.isdigit():
        return False
    limit = behind.get(int(label))
    return limit is not None and int(part[1:]) > limit


def failing_names(findings: Iterable[Finding]) -> list[str]:
    """Names of the rows of some findings."""
    return [finding.row.text for finding in findings]
