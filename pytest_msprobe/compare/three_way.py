# SPDX-License-Identifier: Apache-2.0
"""Judges a capture without a golden or a tolerance, by two references.

One reference is exact next to the engine's type, the other computes in that type as
well. R of a row is the engine's error relative to the honest one:

    R = error(candidate, exact) / error(reference of the same type, exact)

Near 1 the engine rounds like anybody else. The first R far above it is the bug.
"""

from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from pytest_msprobe.compare.divergence import find_divergence
from pytest_msprobe.compare.match import Pairs, pair_rows
from pytest_msprobe.compare.metrics import rel_l2_error
from pytest_msprobe.compare.tokens import compare_tokens
from pytest_msprobe.dump.capture import CallLine, CaptureFile, StepLine, TensorLine
from pytest_msprobe.dump.columns import columns_of
from pytest_msprobe.model.verdict import Finding, Verdict, portable
from pytest_msprobe.statistics.sketch import pack_float32, pack_int16, unpack

# Far above 1: honest rows stay below half of it (benchmarks/three_way.py).
LIMIT = 8.0
METRIC = "R"
RULE = "error / honest error"
WORST = 20
# Files of the references beside the capture.
EXACT_NAME = "reference.exact.jsonl"
HONEST_NAME = "reference.honest.jsonl"
# Relative error of rounding once, root mean square, in units of the type's epsilon.
_ONE_ROUNDING = 0.29
_EPSILON = {"bfloat16": 2.0**-7, "float16": 2.0**-10, "float32": 2.0**-23}
_F64 = npt.NDArray[np.float64]


class RelativeErrors:
    """R of the paired rows.

    Attributes:
        ratio: R / LIMIT.
        rel_l2: R: a divergence's errors of inputs and outputs are in units of the
            honest error.
    """

    def __init__(self, pairs: Pairs, noise: CaptureFile, floor: float) -> None:
        truth, own = pairs.line_pairs(np.arange(len(pairs.new)))
        exact, honest = (
            columns_of(truth),
            columns_of([noise.tensors[t.t] for t in truth]),
        )
        with np.errstate(all="ignore"):
            self.error = rel_l2_error(exact, columns_of(own)).relative
            self.honest = np.maximum(rel_l2_error(exact, honest).relative, floor)
            ratio: _F64 = np.nan_to_num(self.error / self.honest, nan=np.inf)
            self.rel_l2 = ratio
        self.ratio = self.rel_l2 / LIMIT
        self._pairs = pairs

    def finding(self, i: int) -> Finding:
        """R of one row."""
        (row,) = self._pairs.candidate.row_ids(self._pairs.new[i : i + 1])
        ratio, observed = portable(self.ratio[i]), portable(self.rel_l2[i])
        return Finding(row, METRIC, observed, LIMIT, ratio, RULE)


def _errors(
    truth: CaptureFile, noise: CaptureFile, candidate: CaptureFile
) -> tuple[Pairs, RelativeErrors]:
    """Rows that all three have, with their errors."""
    dtype = str(candidate.header.signature.get("model", {}).get("dtype", ""))
    pairs = pair_rows(truth, _in_form_of(truth, candidate))
    floor = _ONE_ROUNDING * _EPSILON.get(dtype, 0.0)
    return pairs, RelativeErrors(pairs, noise, floor)


def r_of_rows(truth: CaptureFile, noise: CaptureFile, candidate: CaptureFile) -> _F64:
    """(n,) R of every row; arguments as of `judge_three_ways`."""
    _, errors = _errors(truth, noise, candidate)
    return errors.rel_l2


def judge_three_ways(
    truth: CaptureFile, noise: CaptureFile, candidate: CaptureFile
) -> Verdict:
    """The verdict on a candidate between an exact reference and an honest one.

    Args:
        truth: Exact; its slots are the candidate's, or two of them with `+` between
            them for their sum.
        noise: The same rows under the same ids, in the candidate's type.
        candidate: What is judged.
    """
    header = candidate.header
    dtype = str(header.signature.get("model", {}).get("dtype", ""))
    pairs, errors = _errors(truth, noise, candidate)
    is_judged = np.ones(len(pairs.new), dtype=np.bool_)
    failed = errors.ratio > 1.0
    verdict = Verdict(
        test=header.test,
        status="fail" if failed.any() or not len(failed) else "pass",
        golden=str(truth.path or ""),
        capture=str(candidate.path or ""),
        golden_key="exact",
        key=header.key,
        rank=header.rank,
        judged=len(failed),
        failed=int(failed.sum()),
        tokens=compare_tokens(truth.header.requests, header.requests, float("inf")),
        notes=[_describe(errors, pairs, dtype)],
    )
    if not len(failed):
        verdict.reasons.append("no row has a counterpart in the references")
    if failed.any():
        verdict.divergence = find_divergence(pairs, errors, is_judged, ({}, {}))
        worst = np.argsort(-errors.ratio, kind="stable")[: min(WORST, failed.sum())]
        verdict.worst = [errors.finding(int(i)) for i in worst]
    return verdict


def _describe(errors: RelativeErrors, pairs: Pairs, dtype: str) -> str:
    """What R is, and how large it is over all rows."""
    text = f"R is the error relative to that of transformers in {dtype}"
    if not len(errors.ratio):
        return text
    worst = int(errors.rel_l2.argmax())
    (row,) = pairs.candidate.row_ids(pairs.new[worst : worst + 1])
    middle = float(np.median(errors.rel_l2))
    largest = float(errors.rel_l2[worst])
    return f"{text}: median {middle:.2g}, largest {largest:.3g} at {row.text}"


def _in_form_of(truth: CaptureFile, candidate: CaptureFile) -> CaptureFile:
    """The candidate with the slots of the reference, sums of two among them."""
    wanted = {(step, call.c): call for step, call in truth.calls()}
    result = CaptureFile(candidate.header, dict(candidate.tensors))
    step = 0
    for entry in candidate.entries:
        if isinstance(entry, StepLine):
            step = entry.step
            result.entries.append(entry)
            continue
        like = wanted.get((step, entry.c), CallLine(entry.c))
        line = CallLine(entry.c, entry.l)
        for slots, target, chosen in (
            (entry.i, line.i, like.i),
            (entry.o, line.o, like.o),
        ):
            for slot in chosen:
                first, plus, second = slot.partition("+")
                ids = slots[first]
                target[slot] = _sums(result, ids, slots[second]) if plus else ids
        result.entries.append(line)
    return result


def _sums(
    capture: CaptureFile, first: Sequence[int], second: Sequence[int]
) -> list[int]:
    """Ids of the sums of two tensors, segment by segment; only sketches are added."""
    added = []
    for a, b in zip(first, second, strict=True):
        number = -len(capture.tensors) - 1
        capture.tensors[number] = _sum(capture.tensors[a], capture.tensors[b], number)
        added.append(number)
    return added


def _sum(a: TensorLine, b: TensorLine, number: int) -> TensorLine:
    total = unpack(a.q, a.a) + unpack(b.q, b.a)
    if a.a is not None:
        text, scale = pack_int16(total)
        return msgspec.structs.replace(a, t=number, q=text, a=scale, c="")
    text = pack_float32(np.concatenate((total, np.zeros(len(total)))))
    return msgspec.structs.replace(a, t=number, q=text, c="")
