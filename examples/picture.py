# SPDX-License-Identifier: Apache-2.0
"""Draws what a failing gate prints as an SVG, for the README.

With MSPROBE_DEMO_FAULT=model.layers.2.post_attention_layernorm and COLUMNS=150 set:

pytest --msprobe-config msprobe.yaml examples -k layer | python examples/picture.py OUT
"""

import sys
from html import escape
from pathlib import Path

LINE_HEIGHT = 18
CHARACTER_WIDTH = 7.25
MARGIN = 16
COMMAND = "$ pytest --msprobe-config msprobe.yaml examples"


def interesting(lines: list[str]) -> list[str]:
    """The verdict and pytest's summary, without paths of this machine."""
    first = next(i for i, line in enumerate(lines) if "first to compute" in line)
    last = next(i for i, line in enumerate(lines) if line.startswith("golden:"))
    summary = [line for line in lines if line.startswith("FAILED")]
    return [COMMAND, "", *lines[first:last], "", *summary[:1]]


def render(lines: list[str]) -> str:
    """An SVG of some lines of text; failing ones are red."""
    width = max(len(line) for line in lines) * CHARACTER_WIDTH + 2 * MARGIN
    height = len(lines) * LINE_HEIGHT + 2 * MARGIN
    rows = []
    for number, line in enumerate(lines):
        y = MARGIN + LINE_HEIGHT * (number + 0.75)
        is_red = "first to compute" in line or line.startswith("FAILED")
        color = "#ff7b72" if is_red else "#e6edf3"
        rows.append(
            f'<text x="{MARGIN}" y="{y:g}" fill="{color}" xml:space="preserve">'
            f"{escape(line)}</text>"
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height}" '
        'font-family="ui-monospace, monospace" font-size="12">\n'
        '<rect width="100%" height="100%" rx="8" fill="#0d1117"/>\n'
        + "\n".join(rows)
        + "\n</svg>\n"
    )


def main() -> None:
    """Reads pytest's output and writes the picture."""
    lines = sys.stdin.read().splitlines()
    Path(sys.argv[1]).write_text(render(interesting(lines)), encoding="utf-8")


if __name__ == "__main__":
    main()
