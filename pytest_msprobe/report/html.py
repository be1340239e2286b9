# SPDX-License-Identifier: Apache-2.0
"""Verdicts as one HTML page without scripts or anything to load."""

from collections.abc import Sequence
from html import escape

from pytest_msprobe.model.verdict import Finding, Verdict
from pytest_msprobe.report.terminal import (
    describe_structure,
    describe_tokens,
    number,
    summary_line,
    times,
)

_STYLE = """
body { font: 14px/1.5 system-ui, sans-serif; margin: 2rem; max-width: 75rem; }
h2 { margin-top: 2rem; font-size: 1rem; }
table { border-collapse: collapse; }
td, th { padding: 0.15rem 0.6rem; text-align: left; border-bottom: 1px solid #ddd; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
.red { color: #a40000; } .green { color: #1a6b1a; }
code { font-size: 12px; }
"""


def _finding_row(finding: Finding) -> str:
    cells = (
        f"<td><code>{escape(finding.row.text)}</code></td>",
        f"<td>{escape(finding.metric)}</td>",
        f'<td class="number">{escape(finding.detail or number(finding.observed))}</td>',
        f'<td class="number">{number(finding.allowed)}</td>',
        f'<td class="number">{escape(times(finding.ratio))}</td>',
        f"<td>{escape(finding.rule)}</td>",
        f'<td class="number">{finding.noise:.0%}</td>',
    )
    return f"<tr>{''.join(cells)}</tr>"


def _section(verdict: Verdict) -> str:
    color = "green" if verdict.is_green else "red"
    status = f'<span class="{color}">{verdict.status}</span>'
    parts = [
        f"<h2>{escape(verdict.test)} {status}</h2>",
        f"<p>{escape(summary_line(verdict))}</p>",
        f"<p>{escape(describe_tokens(verdict.tokens))}</p>",
    ]
    parts += [f"<p>{escape(text)}</p>" for text in [*verdict.notes, *verdict.reasons]]
    structure = [describe_structure(change) for change in verdict.structure]
    parts += [f"<p>{escape(text)}</p>" for text in structure]
    if verdict.inherited:
        parts.append(f"<p>{verdict.inherited} failing rows are inherited</p>")
    if verdict.worst:
        names = ("row", "metric", "observed", "allowed", "ratio", "rule", "noise/limit")
        head = "".join(f"<th>{name}</th>" for name in names)
        rows = "".join(_finding_row(finding) for finding in verdict.worst)
        parts.append(f"<table><tr>{head}</tr>{rows}</table>")
    if verdict.would_pass:
        text = f"<code>{escape(verdict.would_pass)}</code>"
        parts.append(f"<p>It would pass with, under tolerances: rules: {text}</p>")
    if verdict.changes:
        items = "".join(
            f"<li>{escape(str(name))}: {escape(str(old))} → {escape(str(new))}</li>"
            for name, old, new in verdict.changes
        )
        parts.append(f"<p>Made differently:</p><ul>{items}</ul>")
    parts.append(f"<p>golden <code>{escape(verdict.golden)}</code></p>")
    return "\n".join(parts)


def render_page(verdicts: Sequence[Verdict]) -> str:
    """A page with a section for each verdict, red ones first."""
    ordered = sorted(verdicts, key=lambda verdict: verdict.is_green)
    red = sum(not verdict.is_green for verdict in verdicts)
    body = "\n".join(_section(verdict) for verdict in ordered)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>Precision gate</title><style>{_STYLE}</style></head><body>\n"
        f"<h1>Precision gate: {red} of {len(verdicts)} red</h1>\n"
        f"{body}\n</body></html>\n"
    )
