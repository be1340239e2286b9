# SPDX-License-Identifier: Apache-2.0
"""Which limit applies to which row, and where the limit comes from.

Order: default by the model's dtype and the numerics key, then the configuration's
rules in the order of the file, then a test's marker, then the call. A later rule wins.
"""

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import translate

import numpy as np
import numpy.typing as npt

from pytest_msprobe.errors import ConfigError
from pytest_msprobe.model.limits import ROW_METRICS, KeyMode, Rule
from pytest_msprobe.statistics.sketch import STORAGE_FLOOR

DEFAULT = "default"
# Starting points; docs/tolerances.md says what was measured.
_SAME = {
    "bfloat16": {"rel_l2": 1e-3, "max": 1e-3, "min": 1e-3, "norm": 1e-3, "mean": 1e-3},
    "float32": {"rel_l2": 1e-5, "max": 1e-5, "min": 1e-5, "norm": 1e-5, "mean": 1e-5},
}
_RESCHEDULED = {
    "bfloat16": dict.fromkeys(ROW_METRICS, 1e-2),
    "float32": dict.fromkeys(ROW_METRICS, 1e-4),
}
_CROSS = {
    "bfloat16": {"rel_l2": 5e-2, "max": 4e-2, "min": 4e-2, "norm": 2e-2, "mean": 1e-2},
    "float32": {"rel_l2": 1e-3, "max": 1e-3, "min": 1e-3, "norm": 1e-3, "mean": 1e-3},
}
_LOGPROB = {
    ("same", "bfloat16"): 1e-3,
    ("cross", "bfloat16"): 5e-2,
    ("same", "float32"): 1e-4,
    ("cross", "float32"): 5e-3,
}


def dtype_class(model_dtype: str) -> str:
    """Which defaults a model's rows have: those of its dtype, whatever the row's is.

    Inside a bfloat16 model a float32 row is computed from bfloat16 values.
    """
    return "float32" if model_dtype in ("float32", "float64") else "bfloat16"


def default_limits(
    mode: KeyMode, model_dtype: str, *, is_rescheduled: bool = False
) -> dict[str, float]:
    """Default limit of every metric.

    Args:
        mode: Same or another numerics key.
        model_dtype: The model's dtype, torch's short name.
        is_rescheduled: Batches or chunks differ from the golden's.
    """
    kind = dtype_class(model_dtype)
    if mode == "cross":
        rows = _CROSS[kind]
    else:
        rows = _RESCHEDULED[kind] if is_rescheduled else _SAME[kind]
    logprob = _LOGPROB[mode, kind]
    if mode == "same" and is_rescheduled:
        logprob *= 10
    return {**rows, "logprob": logprob}


@dataclass(slots=True)
class ResolvedLimits:
    """Limits of some rows.

    Attributes:
        limits: (n,) by metric, storage floor not included.
        origins: (n,) index into `sources` by metric.
        sources: Origins of limits.
        is_ignored: (n,) rows that are not judged.
        is_exact: (n,) rows that must have equal checksums.
        logprob: Limit of the difference of log-probabilities.
        moved_logprob: The same for tokens computed under another scheduling.
        unmatched: Rules whose glob matches none of the rows.
    """

    limits: dict[str, npt.NDArray[np.float64]]
    origins: dict[str, npt.NDArray[np.int64]]
    sources: list[str]
    is_ignored: npt.NDArray[np.bool_]
    is_exact: npt.NDArray[np.bool_]
    logprob: float
    moved_logprob: float
    unmatched: list[Rule]

    def origin(self, metric: str, row: int) -> str:
        """Origin of the limit of one row and metric."""
        return self.sources[int(self.origins[metric][row])]


def resolve_limits(
    names: Sequence[str],
    rules: Iterable[Rule],
    defaults: dict[str, float],
    mode: KeyMode,
    *,
    moved: tuple[npt.NDArray[np.bool_], dict[str, float]] | None = None,
) -> ResolvedLimits:
    """Applies rules to rows.

    Args:
        names: Row names.
        rules: In order; a later one wins.
        defaults: Limit of every metric.
        mode: Rules for the other mode are left out.
        moved: (n,) rows computed under another scheduling than the golden's, and
            their defaults.
    """
    size = len(names)
    sources = [DEFAULT]
    is_moved, moved_defaults = moved or (np.zeros(size, np.bool_), defaults)
    result = ResolvedLimits(
        {m: np.where(is_moved, moved_defaults[m], defaults[m]) for m in ROW_METRICS},
        {m: np.zeros(size, dtype=np.int64) for m in ROW_METRICS},
        sources,
        np.zeros(size, dtype=np.bool_),
        np.zeros(size, dtype=np.bool_),
        defaults["logprob"],
        moved_defaults["logprob"],
        [],
    )
    for rule in rules:
        mask = _matching(rule, names)
        if not mask.any():
            result.unmatched.append(rule)
        if rule.mode not in (None, mode):
            continue
        sources.append(rule.origin)
        for metric, limit in rule.limits.items():
            if metric == "logprob":
                result.logprob = result.moved_logprob = limit
                continue
            result.limits[metric][mask] = limit
            result.origins[metric][mask] = len(sources) - 1
        if rule.ignore:
            result.is_ignored |= mask
        if rule.exact:
            result.is_exact |= mask
    return result


def _matching(rule: Rule, names: Sequence[str]) -> npt.NDArray[np.bool_]:
    if rule.rows == "*":
        return np.ones(len(names), dtype=np.bool_)
    match = re.compile(translate(rule.rows)).match
    matches = (match(name) is not None for name in names)
    return np.fromiter(matches, np.bool_, len(names))


def unmatched_error(rule: Rule, names: Sequence[str]) -> ConfigError:
    """The error for a rule that matches no row, with the nearest row name."""
    near = difflib.get_close_matches(rule.rows, names, n=1, cutoff=0.0)
    message = f"{rule.origin}: rows {rule.rows!r} matches no row"
    hint = f"the nearest row is {near[0]}" if near else "there are no rows"
    return ConfigError(message, slug="rule-unmatched", hint=hint)


def with_floor(
    limit: npt.NDArray[np.float64], metric: str, is_coarse: npt.NDArray[np.bool_]
) -> npt.NDArray[np.float64]:
    """A limit with the error of stored sketches added where it plays a part.

    Args:
        limit: (n,) limits.
        metric: Only rel_l2 is computed from sketches.
        is_coarse: (n,) rows where one side has a sketch of int16.
    """
    if metric != "rel_l2":
        return limit
    return np.where(is_coarse, limit + STORAGE_FLOOR, limit)
