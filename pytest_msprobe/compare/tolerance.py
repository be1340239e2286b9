# SPDX-License-Identifier: Apache-2.0
"""Which limit applies to which row, and where the limit comes from.

Order: default by the model's dtype and the numerics key, then the configuration's
rules in the order of the file, then a test's marker, then the call. A later rule wins.
"""

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import translate

import numpy as np
import numpy.typing as npt

from pytest_msprobe.dump.columns import Columns
from pytest_msprobe.errors import ConfigError
from pytest_msprobe.model.limits import ROW_METRICS, KeyMode, Rule
from pytest_msprobe.statistics.sketch import STORAGE_FLOOR

_F64 = npt.NDArray[np.float64]
_I64 = npt.NDArray[np.int64]
DEFAULT = "default"
_NEAREST = 3
# One unit in the last place, relative, of the types that a mean is rounded to.
_ROUNDING = {"bf16": 2.0**-7, "f16": 2.0**-10, "f32": 2.0**-23}
# docs/tolerances.md says what was measured (benchmarks/noise.py).
_SAME = {
    "float16": {"rel_l2": 1e-3, "max": 1e-3, "min": 1e-3, "norm": 1e-3, "mean": 1e-3},
    "bfloat16": {"rel_l2": 1e-3, "max": 1e-3, "min": 1e-3, "norm": 1e-3, "mean": 1e-3},
    "float32": {"rel_l2": 1e-5, "max": 1e-5, "min": 1e-5, "norm": 1e-5, "mean": 1e-5},
}
_RESCHEDULED = {
    "float16": dict.fromkeys(ROW_METRICS, 2e-3),
    "bfloat16": {"rel_l2": 2e-2, "max": 2e-2, "min": 2e-2, "norm": 1e-2, "mean": 1e-2},
    "float32": dict.fromkeys(ROW_METRICS, 1e-4),
}
_CROSS = {
    # An eighth of bfloat16's, as its rounding is, but no less than for the same key.
    "float16": {"rel_l2": 6e-3, "max": 5e-3, "min": 5e-3, "norm": 3e-3, "mean": 2e-3},
    "bfloat16": {"rel_l2": 5e-2, "max": 6e-2, "min": 6e-2, "norm": 2e-2, "mean": 1e-2},
    "float32": {"rel_l2": 1e-3, "max": 1e-3, "min": 1e-3, "norm": 1e-3, "mean": 1e-3},
}
# Of a mixture of experts: the experts' shares of an output come from a softmax of the
# router's logits, whose noise they carry on.
_CROSS_MIXTURE = {
    "bfloat16": {"rel_l2": 1e-1, "max": 0.12, "min": 0.12, "norm": 6e-2, "mean": 1e-2},
}
_CROSS_MIXTURE_LOGPROB = {"bfloat16": 1e-1}
# Times that for the same scheduling. In bfloat16 as across keys: once a rounding has
# become another one, what follows no longer depends on why.
_RESCHEDULED_LOGPROB = {"bfloat16": 50, "float16": 10, "float32": 10}
_LOGPROB = {
    ("same", "bfloat16"): 1e-3,
    ("cross", "bfloat16"): 5e-2,
    ("same", "float16"): 1e-3,
    ("cross", "float16"): 1e-2,
    ("same", "float32"): 1e-4,
    ("cross", "float32"): 5e-3,
}
# Of a token behind another choice of a router: another computation, in whatever dtype.
REROUTED_LOGPROB = 0.4


def dtype_class(model_dtype: str) -> str:
    """Which defaults a model's rows have: those of its dtype, whatever the row's is.

    Inside a bfloat16 model a float32 row is computed from bfloat16 values.
    """
    if model_dtype in ("float32", "float64"):
        return "float32"
    return "float16" if model_dtype == "float16" else "bfloat16"


def default_limits(
    mode: KeyMode,
    model_dtype: str,
    *,
    is_rescheduled: bool = False,
    is_mixture: bool = False,
) -> dict[str, float]:
    """Default limit of every metric.

    Args:
        mode: Same or another numerics key.
        model_dtype: The model's dtype, torch's short name.
        is_rescheduled: Batches or chunks differ from the golden's.
        is_mixture: The model has routers that tell which experts they chose.
    """
    kind = dtype_class(model_dtype)
    if mode == "cross" and is_mixture and kind in _CROSS_MIXTURE:
        return {**_CROSS_MIXTURE[kind], "logprob": _CROSS_MIXTURE_LOGPROB[kind]}
    if mode == "cross":
        rows = _CROSS[kind]
    else:
        rows = _RESCHEDULED[kind] if is_rescheduled else _SAME[kind]
    logprob = _LOGPROB[mode, kind]
    if mode == "same" and is_rescheduled:
        logprob *= _RESCHEDULED_LOGPROB[kind]
    return {**rows, "logprob": logprob}


@dataclass(slots=True)
class ResolvedLimits:
    """Limits of some rows.

    Attributes:
        limits: (n,) by metric, storage floor not included.
        absolute: (n,) by metric, what each element may differ by in addition, in the
            tensors' unit.
        origins: (n,) index into `sources` by metric.
        sources: Origins of limits.
        is_ignored: (n,) rows that are not judged: a rule ignores them, or there are
            `only` rules and none names them.
        is_exact: (n,) rows that must have equal checksums.
        exact_origins: (n,) index into `sources` of the rule that says so.
        logprob: Limit of the difference of log-probabilities.
        moved_logprob: The same for tokens computed under another scheduling.
        rerouted_logprob: The same for tokens behind another choice of a router.
        unmatched: Rules whose glob matches none of the rows.
        element: (n,) what an element may be off by default: that of `rel_l2`.
    """

    limits: dict[str, npt.NDArray[np.float64]]
    absolute: dict[str, npt.NDArray[np.float64]]
    origins: dict[str, npt.NDArray[np.int64]]
    sources: list[str]
    is_ignored: npt.NDArray[np.bool_]
    is_exact: npt.NDArray[np.bool_]
    exact_origins: npt.NDArray[np.int64]
    logprob: float
    moved_logprob: float
    rerouted_logprob: float
    unmatched: list[Rule]
    element: npt.NDArray[np.float64]

    def origin(self, metric: str, row: int) -> str:
        """Origin of the limit of one row and metric."""
        return self.sources[int(self.origins[metric][row])]

    def exact_origin(self, row: int) -> str:
        """Origin of the rule that one row must be exactly equal."""
        return self.sources[int(self.exact_origins[row])]


def least_limits(limits: ResolvedLimits, metric: str, rows: _I64, count: _F64) -> _F64:
    """Limits of some rows, tensors of few elements considered.

    Norms, means and extremes of a few elements are hardly averages: by default they
    may be off by what an element may, rel_l2 / sqrt(elements), at least. A rule that
    allows a row less of rel_l2 allows an element less; one that allows more does not.

    Args:
        limits: Of all rows.
        metric: One of ROW_METRICS.
        rows: The rows.
        count: Their numbers of elements.

    Returns:
        (n,) limits, storage floor not included.
    """
    rule: _F64 = limits.limits[metric][rows]
    is_default = limits.origins[metric][rows] == 0
    element = np.minimum(limits.limits["rel_l2"], limits.element)[rows]
    least = element / np.sqrt(np.maximum(count, 1.0))
    return np.where(is_default, np.maximum(rule, least), rule)


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
        {m: np.zeros(size) for m in ROW_METRICS},
        {m: np.zeros(size, dtype=np.int64) for m in ROW_METRICS},
        sources,
        np.zeros(size, dtype=np.bool_),
        np.zeros(size, dtype=np.bool_),
        np.zeros(size, dtype=np.int64),
        defaults["logprob"],
        moved_defaults["logprob"],
        REROUTED_LOGPROB,
        [],
        np.where(is_moved, moved_defaults["rel_l2"], defaults["rel_l2"]),
    )
    only: npt.NDArray[np.bool_] | None = None
    for rule in rules:
        mask = matching(rule, names)
        if not mask.any():
            result.unmatched.append(rule)
        if rule.mode not in (None, mode):
            continue
        # Across keys bits differ: only a rule that is meant for it asks for them.
        is_exact = rule.exact and mode in ("same", rule.mode)
        _apply(rule, mask, result, is_exact=is_exact)
        if rule.only:
            only = mask if only is None else only | mask
    if only is not None:
        result.is_ignored |= ~only
    return result


def _apply(
    rule: Rule, mask: npt.NDArray[np.bool_], result: ResolvedLimits, *, is_exact: bool
) -> None:
    """Applies one rule to the rows that it names.

    A capture has one limit of log-probabilities: a rule that names any of its rows
    sets it, one that is meant for other tests does not.
    """
    result.sources.append(rule.origin)
    if "logprob" in rule.limits and mask.any():
        result.logprob = result.moved_logprob = rule.limits["logprob"]
        result.rerouted_logprob = rule.limits["logprob"]
    limits = {**dict.fromkeys(ROW_METRICS, rule.limits.get("rtol")), **rule.limits}
    for metric in ROW_METRICS:
        limit = limits[metric]
        if limit is None:
            continue
        is_pair = metric not in rule.limits
        result.limits[metric][mask] = limit
        result.absolute[metric][mask] = rule.limits["atol"] if is_pair else 0.0
        result.origins[metric][mask] = len(result.sources) - 1
    if rule.ignore:
        result.is_ignored |= mask
    if is_exact:
        result.is_exact |= mask
        result.exact_origins[mask] = len(result.sources) - 1


def matching(rule: Rule, names: Sequence[str]) -> npt.NDArray[np.bool_]:
    """Which rows a rule's glob names."""
    if rule.rows == "*":
        return np.ones(len(names), dtype=np.bool_)
    match = re.compile(translate(rule.rows)).match
    matches = (match(name) is not None for name in names)
    return np.fromiter(matches, np.bool_, len(names))


def unmatched_rules(rules: Iterable[Rule], names: Sequence[str]) -> list[Rule]:
    """Rules whose glob names none of the rows."""
    return [rule for rule in rules if not matching(rule, names).any()]


def unmatched_error(rule: Rule, names: Sequence[str]) -> ConfigError:
    """The error for a rule that matches no row, with the nearest row names."""
    # Layers and steps repeat the same names with other numbers: one of each is enough.
    kinds = list({re.sub(r"\d+", "0", name): name for name in reversed(names)}.values())
    near = difflib.get_close_matches(rule.rows, kinds, n=_NEAREST, cutoff=0.0)
    message = f"{rule.origin}: rows {rule.rows!r} matches no row"
    hint = f"the nearest rows are {', '.join(near)}" if near else "there are no rows"
    return ConfigError(message, slug="rule-unmatched", hint=hint)


def floors(
    old: Columns, new: Columns, *, is_dump: bool
) -> dict[str, npt.NDArray[np.float64]]:
    """What storing numbers adds to the limit of each metric.

    Args:
        old: The golden's rows.
        new: The candidate's.
        is_dump: One side is a dump, whose means and norms may be rounded to the dtype.
    """
    size = len(old.codes)
    is_coarse = ~(np.isnan(old.scales) & np.isnan(new.scales))
    result = {metric: np.zeros(size) for metric in ROW_METRICS}
    result["rel_l2"] = np.where(is_coarse, STORAGE_FLOOR, 0.0)
    if is_dump:
        steps = [_ROUNDING.get(code, 0.0) for code in old.codes]
        result["norm"] = result["mean"] = np.array(steps)
    return result


def common_glob(names: Sequence[str]) -> str:
    """A glob that names all of some rows: what they begin and end with."""
    first = _common_start(names)
    if all(name == first for name in names):
        return _escape(first)
    last = min(names, key=len)[len(first) :]
    for name in names:
        while not name.endswith(last):
            last = last[1:]
    return f"{_escape(first)}*{_escape(last)}"


def _common_start(texts: Sequence[str]) -> str:
    low, high = min(texts), max(texts)
    pairs = enumerate(zip(low, high, strict=False))
    size = next((i for i, (a, b) in pairs if a != b), len(low))
    return low[:size]


def _escape(text: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", text)


def rule_text(rows: str, mode: KeyMode, limits: Mapping[str, float]) -> str:
    """An entry of `tolerances: rules:` as YAML, its limits rounded up.

    Rounding adds less than 0.1 %, so that 99 % of a limit no longer suffices.
    """
    parts = [f'rows: "{rows}"', f"mode: {mode}"]
    parts += [f"{name}: {_round_up(limit)}" for name, limit in limits.items()]
    return f"- {{{', '.join(parts)}}}"


def _round_up(value: float) -> str:
    """A number with at most four digits that is not below the value."""
    if not math.isfinite(value) or value == 0.0:
        return ".inf" if value else "0.0"
    unit = 10.0 ** (math.floor(math.log10(value)) - 3)
    text = f"{math.ceil(value / unit) * unit:.3e}"
    while float(text) < value:
        text = f"{float(text) + unit:.3e}"
    return text
