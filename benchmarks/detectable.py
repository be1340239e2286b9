# SPDX-License-Identifier: Apache-2.0
"""The smallest change of a tensor that each metric catches, beside msProbe's four.

    python benchmarks/detectable.py [--seeds N] [--save FILE] [--plot FILE]

A tensor of 64 tokens and 512 channels, eight heads of 64, normally distributed and
rounded to its type, is changed in six ways, each from very small to large. Its numbers
are stored and judged as those of a golden of a model of that type with the same
numerics key. A metric catches a size if it is outside its limit there and at all larger
sizes. The size is the relative L2 change of the rounded tensor; figures are medians
over the seeds, null where no size is caught.

msProbe's compare flags a row by one statistic only: a norm that moved by more than 10 %
while the inputs did not. Here each of its four (Max, Min, Mean, Norm, relative to
themselves) is given those 10 %, and, apart from that, pytest-msprobe's limit.
"""

import argparse
import json
import math
import statistics
import time
from pathlib import Path

import numpy as np

from pytest_msprobe.compare.metrics import row_errors
from pytest_msprobe.compare.tolerance import default_limits, floors
from pytest_msprobe.dump.capture import TensorLine
from pytest_msprobe.dump.columns import columns_of
from pytest_msprobe.model.limits import ROW_METRICS
from pytest_msprobe.statistics.sketch import pack_float32, pack_int16, sketch

ROWS, WIDTH, HEAD = 64, 512, 64
DTYPES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
STATISTICS = ("Max", "Min", "Mean", "Norm")
# msProbe 26.2.0: a norm that moved by more is a warning (docs/msprobe.md).
MSPROBE = 0.1
SIZES = np.geomspace(1e-7, 3.0, 151)


def round_to(x, dtype):
    """Values as a type holds them, as float32."""
    single = np.asarray(x, dtype=np.float32)
    if dtype == "float32":
        return single
    if dtype == "float16":
        return single.astype(np.float16).astype(np.float32)
    bits = single.view(np.uint32)
    half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return ((bits + half) & np.uint32(0xFFFF0000)).view(np.float32)


def scaled(x, size, _generator):
    return x, x * (1 + size)


def one_element(x, size, generator):
    y = x.copy()
    y.flat[generator.integers(x.size)] += size * np.linalg.norm(x)
    return x, y


def one_row(x, size, generator):
    y = x.copy()
    row = generator.integers(ROWS)
    y[row] *= 1 + size * np.linalg.norm(x) / np.linalg.norm(x[row])
    return x, y


def swapped_rows(x, size, generator):
    """Two rows that differ by the size are exchanged."""
    x = x.copy()
    step = generator.standard_normal(WIDTH)
    step *= size * np.linalg.norm(x) / np.linalg.norm(step) / np.sqrt(2)
    x[20], x[21] = x[20] - step / 2, x[20] + step / 2
    y = x.copy()
    y[[20, 21]] = x[[21, 20]]
    return x, y


def swapped_heads(x, size, generator):
    """Two heads that differ by the size are exchanged."""
    x = x.copy()
    step = generator.standard_normal((ROWS, HEAD))
    step *= size * np.linalg.norm(x) / np.linalg.norm(step) / np.sqrt(2)
    first, second = np.s_[:, :HEAD], np.s_[:, HEAD : 2 * HEAD]
    middle = x[first].copy()
    x[first], x[second] = middle - step / 2, middle + step / 2
    y = x.copy()
    y[first], y[second] = x[second], x[first]
    return x, y


def noise(x, size, generator):
    step = generator.standard_normal(x.shape)
    return x, x + step * (size * np.linalg.norm(x) / np.linalg.norm(step))


KINDS = {
    "scale": scaled,
    "one element": one_element,
    "one row": one_row,
    "swapped rows": swapped_rows,
    "swapped heads": swapped_heads,
    "noise": noise,
}


def line(x, dtype):
    """The tensor as a golden holds it."""
    wide = x.astype(np.float64)
    values = [wide.max(), wide.min(), wide.sum(), (wide**2).sum()]
    sums = sketch(x)
    text, unit = pack_float32(sums), None
    if dtype != "float32":
        text, unit = pack_int16(sums)
    return TensorLine(0, DTYPES[dtype], list(x.shape), "0.prompt",
                      [float(v) for v in values], "", q=text, a=unit)  # fmt: skip


def own_ratios(old, new, dtype):
    """Error / limit by metric."""
    a, b = columns_of([line(old, dtype)]), columns_of([line(new, dtype)])
    errors, extra = row_errors(a, b), floors(a, b, is_dump=False)
    limits = default_limits("same", dtype)
    return {
        name: errors[name].relative[0] / (limits[name] + extra[name][0])
        for name in ROW_METRICS
    }


def msprobe_errors(old, new):
    """Relative errors of msProbe's four statistics."""

    def numbers(x):
        return x.max(), x.min(), x.mean(), np.linalg.norm(x)

    pairs = zip(STATISTICS, numbers(old), numbers(new), strict=True)
    return {name: float(abs((b - a) / a)) for name, a, b in pairs}


def ratios(old, new, dtype):
    """What is above 1 is caught: every metric, and both ways to read msProbe's."""
    found = own_ratios(old, new, dtype)
    limits = default_limits("same", dtype)
    for name, error in msprobe_errors(old, new).items():
        found[f"{name} at 10 %"] = error / MSPROBE
        found[f"{name} at our limit"] = error / limits[name.lower()]
    found["any of ours"] = max(found[name] for name in ROW_METRICS)
    return found


def smallest(kind, dtype, seed):
    """The smallest size that each metric catches, None where it catches none."""
    start = np.random.default_rng(seed).standard_normal((ROWS, WIDTH))
    caught = {}
    for size in SIZES[::-1]:
        pair = KINDS[kind](start, size, np.random.default_rng(seed + 1))
        old, new = (round_to(side, dtype) for side in pair)
        moved = float(np.linalg.norm(new - old) / np.linalg.norm(old))
        for name, ratio in ratios(old, new, dtype).items():
            sizes = caught.setdefault(name, [None, True])
            sizes[1] = sizes[1] and ratio > 1
            if sizes[1]:
                sizes[0] = moved
    return {name: size for name, (size, _) in caught.items()}


def measure(seeds):
    """By type and kind of change: the smallest size by metric."""
    table = {}
    for dtype in DTYPES:
        for kind in KINDS:
            runs = [smallest(kind, dtype, 10 * seed) for seed in range(seeds)]
            table.setdefault(dtype, {})[kind] = {
                name: middle([run[name] for run in runs]) for name in runs[0]
            }
    return table


def middle(sizes):
    """Median with three digits; None where most seeds caught none."""
    value = statistics.median(float("inf") if s is None else s for s in sizes)
    return None if value == float("inf") else float(f"{value:.2e}")


# The plot ------------------------------------------------------------------------

STYLE = """
.panel { fill: #ffffff; } .text { fill: #1f2328; } .quiet { fill: #59636e; }
.grid { stroke: #d1d9e0; } .rule { stroke: #59636e; stroke-dasharray: 3 3; }
.own { fill: #0969da; } .theirs { fill: none; stroke: #bc4c00; stroke-width: 1.6; }
.never { stroke: #bc4c00; stroke-width: 1.6; } .ownnever { stroke: #0969da; }
.tick { stroke: #bc4c00; stroke-width: 2.2; } .band { fill: #f6f8fa; }
@media (prefers-color-scheme: dark) {
.panel { fill: #0d1117; } .text { fill: #e6edf3; } .quiet { fill: #9198a1; }
.grid { stroke: #30363d; } .rule { stroke: #9198a1; } .own { fill: #58a6ff; }
.theirs, .never, .tick { stroke: #f0883e; } .ownnever { stroke: #58a6ff; }
.band { fill: #151b23; }
}"""
LEFT, TOP, ROW, PANEL, GAP, NEVER = 166, 112, 15, 222, 18, 24
LOW, HIGH = -6.5, 0.5
NAMES = (*ROW_METRICS, *STATISTICS)


class Plot:
    """An SVG of the table: one panel a type, one band a kind of change."""

    def __init__(self, table):
        self._table = table
        self._parts = []
        self._width = LEFT + len(table) * (PANEL + GAP)
        self._band = len(NAMES) * ROW + 8
        self._height = TOP + len(KINDS) * self._band + 34

    def svg(self):
        """The whole picture."""
        self._legend()
        for number, kind in enumerate(KINDS):
            self._kind(number, kind)
        for number, dtype in enumerate(self._table):
            self._panel(LEFT + number * (PANEL + GAP), dtype)
        size = f'width="{self._width}" height="{self._height}"'
        box = f'viewBox="0 0 {self._width} {self._height}"'
        font = 'font-family="system-ui, sans-serif" font-size="11"'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} {box} {font}>'
        title = "<title>Smallest change that each metric catches</title>"
        back = '<rect width="100%" height="100%" rx="8" class="panel"/>'
        style = f"<style>{STYLE}</style>"
        return "\n".join([head, title, style, back, *self._parts, "</svg>", ""])

    def _text(self, x, y, text, *, style="text", anchor="start", bold=False):
        weight = ' font-weight="600"' if bold else ""
        self._parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" class="{style}" text-anchor="{anchor}"'
            f"{weight}>{text}</text>"
        )

    def _line(self, a, b, style):
        (x1, y1), (x2, y2) = a, b
        self._parts.append(
            f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" '
            f'class="{style}"/>'
        )

    def _legend(self):
        self._text(14, 24, "Smallest change that is caught", bold=True)
        text = "relative L2 change of the tensor; further left is better; "
        self._text(14, 41, f"{text}dashed: limit of rel_l2", style="quiet")
        x = 14
        for draw, text, width in (
            (self._own, "pytest-msprobe, default limits", 200),
            (self._theirs, "msProbe's statistic at 10 %, where its compare warns", 330),
            (self._tick, "the same at pytest-msprobe's limit", 226),
            (self._never, "never", 40),
        ):
            draw(x + 5, 60)
            self._text(x + 15, 64, text)
            x += width

    def _kind(self, number, kind):
        top = TOP + number * self._band
        if number % 2 == 0:
            self._parts.append(
                f'<rect x="6" y="{top}" width="{self._width - 12}" '
                f'height="{self._band}" class="band"/>'
            )
        self._text(14, top + 18, kind, bold=True)
        for place, name in enumerate(NAMES):
            style = "text" if name in ROW_METRICS else "quiet"
            self._text(LEFT - 10, self._y(number, place) + 4, name, style=style,
                       anchor="end")  # fmt: skip

    def _y(self, number, place):
        return TOP + number * self._band + 4 + (place + 0.5) * ROW

    def _panel(self, left, dtype):
        right = left + PANEL - NEVER
        bottom = TOP + len(KINDS) * self._band

        def x_of(size):
            share = (np.log10(size) - LOW) / (HIGH - LOW)
            return left + share * (right - left)

        self._text(left, TOP - 26, dtype, bold=True)
        for power in range(math.ceil(LOW), 1):
            x = x_of(10.0**power)
            self._line((x, TOP - 4), (x, bottom), "grid")
            if power % 2 == 0:
                label = f'10<tspan dy="-4" font-size="8">{power}</tspan>'
                for y in (TOP - 10, bottom + 14):
                    self._text(x, y, "1" if power == 0 else label, style="quiet",
                               anchor="middle")  # fmt: skip
        limit = x_of(default_limits("same", dtype)["rel_l2"])
        self._line((limit, TOP - 4), (limit, bottom), "rule")
        for number, kind in enumerate(KINDS):
            sizes = self._table[dtype][kind]
            for place, name in enumerate(NAMES):
                y = self._y(number, place)
                marks = [(self._own, self._own_never, name)]
                if name in STATISTICS:
                    marks = [
                        (self._tick, None, f"{name} at our limit"),
                        (self._theirs, self._never, f"{name} at 10 %"),
                    ]
                for draw, never, key in marks:
                    if sizes[key] is not None:
                        draw(x_of(sizes[key]), y)
                    elif never is not None:
                        never(right + NEVER / 2, y)

    def _own(self, x, y):
        self._parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" class="own"/>')

    def _theirs(self, x, y):
        points = f"{x - 5:.1f},{y:.1f} {x:.1f},{y - 5:.1f} {x + 5:.1f},{y:.1f}"
        self._parts.append(
            f'<polygon points="{points} {x:.1f},{y + 5:.1f}" class="theirs"/>'
        )

    def _tick(self, x, y):
        self._line((x, y - 5), (x, y + 5), "tick")

    def _never(self, x, y, style="never"):
        self._line((x - 3, y - 3), (x + 3, y + 3), style)
        self._line((x - 3, y + 3), (x + 3, y - 3), style)

    def _own_never(self, x, y):
        self._never(x, y, "ownnever")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=7)
    parser.add_argument("--save", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    table = measure(arguments.seeds)
    print("| type | change | ours | by | msProbe at 10 % | by |")
    print("| --- | --- | --- | --- | --- | --- |")
    for dtype, kinds in table.items():
        for kind, sizes in kinds.items():
            own = best(sizes, ROW_METRICS)
            theirs = best(sizes, [f"{name} at 10 %" for name in STATISTICS])
            print(f"| {dtype} | {kind} | {own} | {theirs} |")
    if arguments.save:
        result = {
            "what": f"smallest relative L2 change caught, {ROWS} x {WIDTH} elements",
            "numpy": np.__version__,
            "date": time.strftime("%Y-%m-%d"),
            "seeds": arguments.seeds,
            "msprobe_limit": MSPROBE,
            "limits": {dtype: default_limits("same", dtype) for dtype in DTYPES},
            "smallest": table,
        }
        arguments.save.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if arguments.plot:
        arguments.plot.write_text(Plot(table).svg(), encoding="utf-8")


def best(sizes, names):
    """The smallest size that any of some metrics catches, and which."""
    known = [(sizes[name], name) for name in names if sizes[name] is not None]
    if not known:
        return "never | -"
    size, name = min(known)
    return f"{size:.1e} | {name.partition(' ')[0]}"


if __name__ == "__main__":
    main()
