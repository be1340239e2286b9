# SPDX-License-Identifier: Apache-2.0
"""What judging costs: reading two captures and comparing their rows.

    python benchmarks/judging.py [--rows N] [--rounds N] [--save FILE]

The captures look like those of level mix: modules with operators in them, bfloat16,
every row with numbers of its own. Three cases: no row has the golden's bits and all are
within their limits, none is within them, all are bit-identical. Figures are medians of
processor time: judging runs in one thread, other work on the machine does not count.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from pytest_msprobe.compare.judge import judge
from pytest_msprobe.dump.capture import (
    FORMAT,
    CallLine,
    Header,
    StepLine,
    TensorLine,
    encode,
    read_capture,
)
from pytest_msprobe.statistics.sketch import pack_int16

PROMPT = 16
OPERATORS = 4
MODULES = 60
# Rows of a step: each operator and each module has an input and an output.
ROWS_A_STEP = MODULES * (OPERATORS + 1) * 2
WIDTH = 256
SHIFTS = {"within limits": 1e-4, "all rows fail": 1e-2, "bit-identical": 0.0}


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--save", type=Path)
    return parser.parse_args()


def names():
    """The calls of a step: (name, depth), operators before the module around them."""
    for module in range(MODULES):
        for operator in range(OPERATORS):
            yield f"Functional.op{operator}.{module}.forward", 1
        yield f"Module.model.layers.{module}.mlp.MLP.forward.0", 0


class Numbers:
    """Numbers of tensors: a fixed sequence, off by a relative shift."""

    def __init__(self, shift):
        self._generator = np.random.default_rng(0)
        self._noise = np.random.default_rng(1)
        self._shift = shift

    def line(self, number, segment):
        """The next tensor."""
        sums = self._generator.standard_normal(64)
        if self._shift:
            sums = sums * (1 + self._shift) + self._noise.standard_normal(64) * 1e-6
        scale = 1 + self._shift
        text, unit = pack_int16(sums)
        squares = float(WIDTH) * scale * scale
        values = [3.0 * scale, -3.0 * scale, 2.0 * scale, squares]
        checksum = f"{number * 2 + bool(self._shift):016x}"
        return TensorLine(number, "bf16", [1, WIDTH], segment, values, checksum,
                          q=text, a=unit)  # fmt: skip


def lines(rows, shift):
    """Lines of a capture with about so many rows."""
    numbers, count = Numbers(shift), 0
    step = 0
    while count < rows:
        segment = f"0.g{step}" if step else "0.prompt"
        yield StepLine(step, 1, [(0, 1, step)])
        for name, depth in names():
            if count >= rows:
                break
            yield numbers.line(count, segment)
            yield numbers.line(count + 1, segment)
            yield CallLine(name, depth, {"input_args.0": [count]},
                           {"output.0": [count + 1]})  # fmt: skip
            count += 2
        step += 1


def write(path, rows, shift):
    signature = {"level": "mix", "model": {"dtype": "bfloat16"}}
    header = Header(FORMAT, "capture", key="benchmark", signature=signature)
    path.write_bytes(encode(header, lines(rows, shift)))


def seconds(action, rounds):
    """Median processor seconds of an action, and its last result."""
    taken = []
    for _ in range(rounds):
        start = time.process_time()
        result = action()
        taken.append(time.process_time() - start)
    return statistics.median(taken), result


def measure(folder, rows, rounds):
    """One line a case."""
    write(folder / "golden.jsonl", rows, 0.0)
    table = []
    for name, shift in SHIFTS.items():
        path = folder / f"{name}.jsonl"
        write(path, rows, shift)
        reading, captures = seconds(
            lambda path=path: [
                read_capture(folder / "golden.jsonl"),
                read_capture(path),
            ],
            rounds,
        )
        judging, judgement = seconds(lambda pair=captures: judge(*pair), rounds)
        verdict = judgement.verdict
        table.append(
            {
                "case": name,
                "rows": verdict.judged,
                "failed": verdict.failed,
                "reading_s": round(reading, 2),
                "judging_s": round(judging, 2),
            }
        )
    return table


def main():
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        table = measure(Path(folder), arguments.rows, arguments.rounds)
    print("| case | rows | failed | reading both, s | judging, s |")
    print("| --- | --- | --- | --- | --- |")
    for line in table:
        print("| " + " | ".join(str(value) for value in line.values()) + " |")
    if arguments.save:
        result = {
            "what": "two captures of level mix, bfloat16, every row its own numbers",
            "python": platform.python_version(),
            "numpy": np.__version__,
            "date": time.strftime("%Y-%m-%d"),
            "rounds": arguments.rounds,
            "cases": table,
        }
        arguments.save.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
