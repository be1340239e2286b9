# SPDX-License-Identifier: Apache-2.0
"""Verdicts for GitHub Actions: error annotations and the step summary."""

from collections.abc import Iterable, Iterator, Sequence

from pytest_msprobe.model.verdict import Verdict
from pytest_msprobe.report.terminal import describe_tokens, summary_line

# GitHub shows ten annotations of a kind a step and drops summaries above 1 MiB.
MAX_ANNOTATIONS = 10
MAX_SUMMARY_BYTES = 900_000


def _escape(text: str, *, is_property: bool = False) -> str:
    escaped = text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    if is_property:
        escaped = escaped.replace(":", "%3A").replace(",", "%2C")
    return escaped


def render_annotations(verdicts: Iterable[Verdict]) -> Iterator[str]:
    """One `::error` line for each red verdict, at most ten."""
    red = [verdict for verdict in verdicts if not verdict.is_green]
    for verdict in red[:MAX_ANNOTATIONS]:
        file = _escape(verdict.test.partition("::")[0], is_property=True)
        title = _escape(f"precision: {verdict.test}", is_property=True)
        message = f"{summary_line(verdict)}\n{describe_tokens(verdict.tokens)}"
        yield f"::error file={file},title={title}::{_escape(message)}"


def render_summary(verdicts: Sequence[Verdict]) -> str:
    """A Markdown table, red verdicts first."""
    red = [verdict for verdict in verdicts if not verdict.is_green]
    green = [verdict for verdict in verdicts if verdict.is_green]
    lines = [
        f"### Precision gate: {len(red)} of {len(verdicts)} red",
        "",
        "| test | status | finding | rows judged |",
        "| --- | --- | --- | --- |",
    ]
    size = 0
    for verdict in [*red, *green]:
        cells = (
            f"`{verdict.test}`",
            verdict.status,
            summary_line(verdict),
            str(verdict.judged),
        )
        line = "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
        size += len(line.encode())
        if size > MAX_SUMMARY_BYTES:
            lines.append("| and more | | | |")
            break
        lines.append(line)
    return "\n".join(lines) + "\n"
