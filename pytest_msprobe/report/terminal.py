# SPDX-License-Identifier: Apache-2.0
"""A verdict as text for people: at most 40 lines, the guilty module first."""

from collections.abc import Sequence

from pytest_msprobe.model.names import display_name, parse_call_name
from pytest_msprobe.model.verdict import (
    Divergence,
    Finding,
    StructureChange,
    TokenDifference,
    Verdict,
)

MAX_LINES = 40
_WORST = 12
_CHANGES = 6
_REASONS = 6


def number(value: float | str) -> str:
    """A number with three digits."""
    return value if isinstance(value, str) else f"{value:.3g}"


def times(ratio: float | str) -> str:
    """A ratio as `5.2x`."""
    return f"{ratio}x" if isinstance(ratio, str) else f"{ratio:.3g}x"


def summary_line(verdict: Verdict) -> str:
    """One line that starts with the module: pytest's short summary shows it."""
    divergence = verdict.divergence
    if verdict.status == "missing":
        return f"no golden for {verdict.test}"
    if verdict.status == "incomparable":
        return f"cannot be compared with the golden: {verdict.reasons[0]}"
    if divergence is not None:
        return describe_divergence(divergence)
    if verdict.worst:
        return f"{verdict.worst[0].row.text}: {describe_finding(verdict.worst[0])}"
    if verdict.reasons:
        return verdict.reasons[0]
    return f"{verdict.judged} rows within their limits, {verdict.equal} bit-identical"


def describe_divergence(divergence: Divergence) -> str:
    """Where the candidate first computed something else, module first."""
    place = divergence.module or (
        "the model's inputs"
        if divergence.kind == "inputs"
        else "the code around the modules"
    )
    finding = divergence.finding
    shown = f" ({describe_finding(finding)})" if finding is not None else ""
    if divergence.kind == "weights":
        return (
            f"{place}: weights differ from the golden's: {divergence.parameter}{shown}"
        )
    if divergence.kind == "drift":
        return f"{place}: no single origin, the error grew most here{shown}"
    if divergence.kind == "inputs":
        return f"{place}: differ from the golden's before any module ran{shown}"
    if divergence.between:
        child = display_name(divergence.between)
        return f"{place}: its own code changed the input of {child}{shown}"
    if divergence.handed_to:
        child = display_name(divergence.handed_to)
        return (
            f"{place}: gave {child} something else; its own rows are not judged{shown}"
        )
    call = display_name(divergence.call)
    operator = "" if call == place else f" in {call}"
    return f"{place}: first to compute something else{operator}{shown}"


def describe_finding(finding: Finding) -> str:
    """Observed, allowed and ratio of a row's worst metric."""
    if finding.detail:
        return f"{finding.metric}: {finding.detail}"
    return (
        f"{finding.metric} {number(finding.observed)}, allowed "
        f"{number(finding.allowed)}, {times(finding.ratio)}"
    )


def describe_tokens(tokens: TokenDifference) -> str:
    """The headline: how far log-probabilities moved, and the first other token."""
    if not tokens.compared:
        return "tokens: none compared"
    bound = "at least " if tokens.is_at_least else ""
    text = f"tokens: {tokens.compared} compared, greatest |Δlogprob| {bound}"
    text += f"{number(tokens.largest)} (allowed {number(tokens.allowed)})"
    if tokens.at is not None:
        text += f" at token {tokens.at[1]} of request {tokens.at[0]}"
    if tokens.flipped is None:
        return text + "; no token flipped"
    request, index = tokens.flipped
    text += f"; first flipped: token {index} of request {request}"
    if tokens.token is None:
        return text + " (one side ends there)"
    return text + f", {tokens.golden_token} became {tokens.token}"


def _growth(finding: Finding) -> str:
    """How much a call has made of its inputs' error."""
    if finding.growth == "inf":
        return "own"
    return times(finding.growth) if finding.growth else "-"


def _table(findings: Sequence[Finding], first: Finding | None) -> list[str]:
    shown = [first] if first is not None else []
    shown += [f for f in findings if first is None or f.row != first.row][:_WORST]
    if not shown:
        return []
    head = ["row", "metric", "observed", "allowed", "ratio", "growth", "rule"]
    has_noise = any(finding.noise for finding in shown)
    has_elements = any(finding.element is not None for finding in shown)
    head += ["noise/limit"] * has_noise + ["worst element"] * has_elements
    rows = [tuple(head)]
    for finding in shown:
        name = display_name(finding.row.call)
        cells = [
            f"{name} {finding.row.slot} {finding.row.segment}".rstrip(),
            finding.metric,
            finding.detail or number(finding.observed),
            "-" if finding.detail else number(finding.allowed),
            "-" if finding.detail else times(finding.ratio),
            _growth(finding),
            finding.rule,
        ]
        cells += [f"{finding.noise:.0%}"] * has_noise
        cells += [str(finding.element or "-")] * has_elements
        rows.append(tuple(cells))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  "
        + "  ".join(
            cell.ljust(width) for cell, width in zip(row, widths, strict=True)
        ).rstrip()
        for row in rows
    ]


def _counts(verdict: Verdict) -> str:
    text = (
        f"{verdict.judged} rows judged, {verdict.failed} outside their limits, "
        f"{verdict.equal} bit-identical"
    )
    if verdict.inherited:
        text = text.replace(
            " outside their limits",
            f" outside their limits ({verdict.inherited} inherited)",
        )
    if verdict.missing:
        text += f", {verdict.missing} missing"
    if verdict.extra:
        text += f", {verdict.extra} new"
    if verdict.unjudged:
        text += f", {verdict.unjudged} behind a flipped token"
    if verdict.rerouted:
        text += f", {verdict.rerouted} behind other experts"
    for reason, count in sorted(verdict.left_out.items()):
        text += f", {count} {reason}"
    return text


def describe_structure(change: StructureChange) -> str:
    """A call that only one side has, and the other side's nearest."""
    old, new = _described(change.gone), _described(change.new)
    if not change.gone:
        return f"new: {new}"
    if not change.new:
        return f"gone: {old}"
    tail = ", with the same numbers" if change.is_equal else ""
    return f"gone: {old}; nearest here: {new}{tail}"


def _described(call: str) -> str:
    """A call with its class, which may be all that has changed."""
    name = parse_call_name(call)
    kind = f" ({name.class_name})" if name is not None and name.is_module else ""
    return f"{display_name(call)}{kind}"


def _provenance(verdict: Verdict) -> list[str]:
    lines = []
    for name, old, new in verdict.changes[:_CHANGES]:
        lines.append(f"  {name}: golden {old}, here {new}")
    if len(verdict.changes) > _CHANGES:
        lines.append(f"  and {len(verdict.changes) - _CHANGES} more")
    return ["made differently:", *lines] if lines else []


def _in_brackets(text: str) -> str:
    return f" ({text})" if text else ""


def render_failure(verdict: Verdict, *, update_command: str | None) -> str:
    """The message of a failing test.

    Args:
        verdict: A verdict that is not green.
        update_command: The command that accepts what was captured, if there is one.
    """
    if verdict.status == "missing":
        lines = [summary_line(verdict), f"it would be {verdict.golden}"]
        if update_command is not None:
            lines.append(f"write it and review it: {update_command}")
        lines.append(f"captured: {verdict.capture}")
        return "\n".join(lines)
    meant = []
    if update_command is not None:
        meant = [f"if this is meant, update it: {update_command}"]
    lines = [summary_line(verdict)]
    if verdict.status == "incomparable":
        lines += [f"  {reason}" for reason in verdict.reasons[:_REASONS]]
        return "\n".join([*lines, f"golden: {verdict.golden}", *meant])
    lines.append(describe_tokens(verdict.tokens))
    lines += verdict.notes
    lines.append(_counts(verdict))
    lines += [f"  {reason}" for reason in verdict.reasons[:_REASONS]]
    if verdict.structure:
        shown = verdict.structure[:_REASONS]
        lines += [f"  {describe_structure(change)}" for change in shown]
    else:
        lines += [f"  missing: {name}" for name in verdict.missing_rows[:_REASONS]]
    first = verdict.divergence.finding if verdict.divergence is not None else None
    lines += _table(verdict.worst, first)
    lines += _provenance(verdict)
    allowed = []
    if verdict.would_pass:
        allowed = [f"it would pass with, under tolerances: rules: {verdict.would_pass}"]
    ends = [
        *allowed,
        f"golden:  {verdict.golden}{_in_brackets(verdict.golden_key)}",
        f"capture: {verdict.capture}{_in_brackets(verdict.key)}",
        *meant,
    ]
    return "\n".join([*lines[: MAX_LINES - len(ends)], *ends])


def render_green(verdict: Verdict) -> str:
    """A line about a verdict that is green, and one for each of its notes."""
    text = f"{verdict.test}: {verdict.status}: {_counts(verdict)}"
    if verdict.mode == "cross":
        text += "; golden of another key"
    largest = verdict.tokens.largest
    if largest:
        text += f"; greatest |Δlogprob| {number(largest)}"
    return "\n".join([text, *(f"  {note}" for note in verdict.notes)])
