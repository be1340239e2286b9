# SPDX-License-Identifier: Apache-2.0
"""Tolerances as data: which metrics exist, and a rule with its origin."""

from dataclasses import dataclass, field
from typing import Literal

KeyMode = Literal["same", "cross"]

# Metrics that a limit can be set for, in the order in which reports show them.
ROW_METRICS = ("rel_l2", "max", "min", "norm", "mean")
OUTPUT_METRICS = ("logprob",)
LIMIT_NAMES = (*ROW_METRICS, *OUTPUT_METRICS)


@dataclass(frozen=True, slots=True)
class Rule:
    """A tolerance and where it comes from.

    Attributes:
        origin: `file:line`, `default` or the place in a test.
        rows: Glob over row names that the rule applies to.
        mode: The numerics key relation it applies to, None for both.
        limits: Limit of each metric it sets, unitless, >= 0.
        ignore: Rows are not judged.
        exact: Rows must have equal checksums.
    """

    origin: str
    rows: str = "*"
    mode: KeyMode | None = None
    limits: dict[str, float] = field(default_factory=dict)
    ignore: bool = False
    exact: bool = False
