# SPDX-License-Identifier: Apache-2.0
"""The judgement of one test as data; every report renders this record."""

import math
from typing import Any, Literal, Self

import msgspec

from pytest_msprobe.model.limits import KeyMode, Rule

SCHEMA = 3
OLDEST_READABLE = 2

Status = Literal["pass", "changed", "fail", "incomparable", "missing"]
DivergenceKind = Literal["origin", "drift", "weights", "inputs"]


def portable(value: float) -> float | str:
    """A number that JSON holds: `inf`, `-inf` and `nan` as text."""
    value = float(value)
    return value if math.isfinite(value) else str(value)


class RowId(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which row: a slot of a call, for one segment.

    Attributes:
        call: Name of the call.
        slot: E.g. `output.0`.
        segment: E.g. `0.prompt`, empty for a whole tensor.
        step: Step of the candidate in which the call ran.
    """

    call: str
    slot: str
    segment: str
    step: int

    @property
    def text(self) -> str:
        """The name that globs in rules are matched with."""
        name = f"{self.call}.{self.slot}"
        return f"{name}@{self.segment}" if self.segment else name


class Finding(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """One row's worst metric.

    Attributes:
        row: The row.
        metric: The metric with the largest ratio.
        observed: Its value, unitless; infinity as text.
        allowed: The limit, storage floor included; infinity as text.
        ratio: Observed / allowed.
        rule: Origin of the limit, file:line or `default`.
        detail: What differs where a number does not tell, e.g. dtypes.
        noise: The golden's own noise as a share of the limit, unitless.
        element: Index of the worst element, where whole tensors were compared.
        growth: Of an output that is off: its relative L2 error / the largest one of the
            call's inputs; infinity as text; 0 where it is not known.
    """

    row: RowId
    metric: str
    observed: float | str
    allowed: float | str
    ratio: float | str
    rule: str
    detail: str = ""
    noise: float = 0.0
    element: list[int] | None = None
    growth: float | str = 0.0


class Divergence(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """Where the candidate first computed something else.

    Attributes:
        kind: origin, drift (no single call), weights, or inputs of the model.
        call: Name of the call; empty for the model itself.
        module: Path of the module, or of the module around an API.
        between: Child whose input already differed, if the call's own code is guilty.
        handed_to: Call that was given its output, if its own rows are not judged.
        finding: The row that shows it.
        parameter: The first parameter that differs, for weights.
        input_error: Largest relative L2 error of the call's inputs; infinity as text.
        output_error: Largest relative L2 error of its outputs, likewise.
    """

    kind: DivergenceKind
    call: str
    module: str
    between: str = ""
    finding: Finding | None = None
    parameter: str = ""
    input_error: float | str = 0.0
    output_error: float | str = 0.0
    handed_to: str = ""


class StructureChange(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """A call that only one side has.

    Attributes:
        gone: Name of the golden's call; empty where something is new.
        new: Name of the candidate's call that is most like it; empty where none is.
        is_equal: Their outputs are bit-identical.
    """

    gone: str = ""
    new: str = ""
    is_equal: bool = False


class TokenDifference(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """How the generated tokens moved, over all requests.

    Attributes:
        compared: Tokens compared.
        largest: Greatest difference of the log-probability of a golden token.
        is_at_least: The token left the candidate's top 20: the difference is a bound.
        at: (request, token number) of the largest, or None.
        allowed: Its limit; infinity as text.
        flipped: (request, token number) of the first other token, or None.
        golden_token: The golden's token there.
        token: The candidate's token there.
    """

    compared: int = 0
    largest: float | str = 0.0
    is_at_least: bool = False
    at: tuple[int, int] | None = None
    allowed: float | str = 0.0
    flipped: tuple[int, int] | None = None
    golden_token: int | None = None
    token: int | None = None


class AppliedRule(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """A tolerance as it was applied; fields as in `model.limits.Rule`.

    Attributes:
        origin: Where it comes from.
        rows: Glob over row names.
        mode: The numerics key relation it applies to, None for both.
        limits: Limit of each metric it sets; infinity as text.
        ignore: Rows are not judged.
        exact: Rows must have equal checksums.
        only: Rows that no such rule names are not judged.
    """

    origin: str
    rows: str = "*"
    mode: KeyMode | None = None
    limits: dict[str, float | str] = {}
    ignore: bool = False
    exact: bool = False
    only: bool = False

    @classmethod
    def of(cls, rule: Rule) -> Self:
        """The record of a rule."""
        limits = {name: portable(limit) for name, limit in rule.limits.items()}
        flags = rule.ignore, rule.exact, rule.only
        return cls(rule.origin, rule.rows, rule.mode, limits, *flags)

    def rule(self) -> Rule:
        """The rule that was recorded."""
        limits = {name: float(limit) for name, limit in self.limits.items()}
        flags = self.ignore, self.exact, self.only
        return Rule(self.origin, self.rows, self.mode, limits, *flags)


class Verdict(msgspec.Struct, forbid_unknown_fields=True):
    """The judgement of one test on one rank.

    Attributes:
        schema: Version of this record.
        test: Node id.
        status: pass; changed (within limits, other checksums); fail; incomparable;
            missing (no golden).
        golden: Path of the golden; in a file relative to the file's folder.
        capture: Path of the candidate's capture file, likewise.
        mode: same or cross numerics key.
        golden_key: Numerics key of the golden.
        key: Numerics key of the candidate.
        judged: Rows judged.
        equal: Rows among them with equal checksums.
        failed: Rows outside their limits.
        missing: Rows of the golden that the candidate lacks.
        extra: Rows of the candidate that the golden lacks.
        unjudged: Rows behind the first flipped token, and the flipped tokens as rows.
        left_out: Slots that cannot be judged, by reason.
        tokens: How the generated tokens moved.
        divergence: Where it began, for a failure.
        inherited: Failing rows that only hand on what came before them; not listed.
        structure: Calls that only one side has, at most 20.
        worst: Other failing rows, worst first, at most 20: outputs before inputs, each
            tensor once.
        missing_rows: Names of missing rows, at most 20.
        reasons: Why it is incomparable or failed apart from rows.
        changes: What else made the two captures: name, golden's and candidate's value.
        notes: Remarks for the reader.
        rank: Rank.
        rules: Tolerances beyond the defaults, in the order in which they apply.
        command: Command that accepts what was captured; empty where it is not known.
        would_pass: Entry of `tolerances: rules:` with which it would pass, empty where
            no tolerance could let it.
        noisy: Rows whose limit is raised by the golden's noise.
        rerouted: Rows not judged because a router of a mixture chose other experts.
    """

    test: str
    status: Status
    schema: int = SCHEMA
    golden: str = ""
    capture: str = ""
    mode: str = "same"
    golden_key: str = ""
    key: str = ""
    judged: int = 0
    equal: int = 0
    failed: int = 0
    missing: int = 0
    extra: int = 0
    unjudged: int = 0
    left_out: dict[str, int] = {}
    tokens: TokenDifference = msgspec.field(default_factory=TokenDifference)
    divergence: Divergence | None = None
    worst: list[Finding] = []
    missing_rows: list[str] = []
    reasons: list[str] = []
    changes: list[tuple[str, Any, Any]] = []
    notes: list[str] = []
    rank: int = 0
    rules: list[AppliedRule] = []
    command: str = ""
    would_pass: str = ""
    noisy: int = 0
    inherited: int = 0
    structure: list[StructureChange] = []
    rerouted: int = 0

    @property
    def is_green(self) -> bool:
        """Whether the gate passes."""
        return self.status in ("pass", "changed")
