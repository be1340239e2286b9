# SPDX-License-Identifier: Apache-2.0
"""Tolerances as data: which metrics exist, and a rule with its origin."""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal

KeyMode = Literal["same", "cross"]

# Metrics that a limit can be set for, in the order in which reports show them.
ROW_METRICS = ("rel_l2", "max", "min", "norm", "mean")
OUTPUT_METRICS = ("logprob",)
LIMIT_NAMES = (*ROW_METRICS, *OUTPUT_METRICS)
# Set together: they stand for all row metrics at once.
PAIR = ("rtol", "atol")
RULE_KEYS = (*LIMIT_NAMES, *PAIR)
# A row's limit is the rule's, or so many times the noise that its golden holds.
NOISE_MULTIPLE = 4.0


@dataclass(frozen=True, slots=True)
class Rule:
    """A tolerance and where it comes from.

    Attributes:
        origin: `file:line`, `default` or the place in a test.
        rows: Glob over row names that the rule applies to.
        mode: The numerics key relation it applies to, None for both.
        limits: Limit of each metric it sets, unitless, >= 0. `rtol` (unitless) and
            `atol` (in the tensors' unit) stand together, and for all row metrics: what
            they allow each element is allowed.
        ignore: Rows are not judged.
        exact: Rows must have equal checksums.
        only: Rows that no such rule names are not judged.
    """

    origin: str
    rows: str = "*"
    mode: KeyMode | None = None
    limits: dict[str, float] = field(default_factory=dict)
    ignore: bool = False
    exact: bool = False
    only: bool = False


def has_half_a_pair(limits: Collection[str]) -> bool:
    """Whether `rtol` stands without `atol`, or `atol` without `rtol`."""
    return sum(name in limits for name in PAIR) == 1
