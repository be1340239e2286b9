# SPDX-License-Identifier: Apache-2.0
"""Captures made from numpy arrays, for the tests of judging: no torch, no engine."""

import numpy as np

from pytest_msprobe.dump.capture import (
    FORMAT,
    CallLine,
    CaptureFile,
    Header,
    Request,
    StepLine,
    TensorLine,
)
from pytest_msprobe.statistics.checksum import checksum
from pytest_msprobe.statistics.sketch import pack_float32, pack_int16, sketch

KEY = "cpu-avx2-amd"
OTHER_KEY = "cpu-avx512bf16-amd"
SIGNATURE = {"level": "L0", "model": {"dtype": "bfloat16", "hidden_size": 8}}


def tensor_line(number, array, *, segment="0.prompt", kind="t"):
    """A `t` line of a float32 (shown as bfloat16) or int64 array."""
    array = np.asarray(array)
    common = {"t": number, "s": list(array.shape), "k": kind, "g": segment}
    flat = array.reshape(-1)
    if array.dtype.kind in "iu":
        words = flat.astype(np.int64).view(np.uint64)
        values = [int(flat.max()), int(flat.min())]
        return TensorLine(d="i64", v=values, c=f"{checksum(words):016x}", **common)
    single = flat.astype(np.float32)
    finite = single[np.isfinite(single)].astype(np.float64)
    counts = [np.isnan(single), np.isposinf(single), np.isneginf(single)]
    values = [None, None, 0.0, 0.0]
    if finite.size:
        values = [finite.max(), finite.min(), finite.sum(), (finite**2).sum()]
        values = [float(value) for value in values]
    clean = np.where(np.isfinite(single), single, 0.0)
    sums = sketch(clean)
    line = TensorLine(
        d="bf16" if kind != "n" else "f32",
        v=values,
        c=f"{checksum(single.view(np.uint32)):016x}",
        **common,
    )
    if any(c.any() for c in counts):
        line.x = [int(c.sum()) for c in counts]
    if kind == "n":
        line.q = pack_float32(sums)
    else:
        line.q, line.a = pack_int16(sums)
    return line


def capture(calls, *, requests=(), key=KEY, steps=1, **header):
    """A capture from calls in the order of their ends.

    Args:
        calls: (name, depth, inputs, outputs), slots as dicts of arrays, or of lists of
            (segment, array) or (segment, array, class), class `s` for sample-major.
        requests: Requests of the header.
        key: Numerics key.
        steps: The calls are repeated so many times: the prefill of a prompt of 4
            tokens, then decode steps.
        header: Other fields of the header.
    """
    fields = {"signature": SIGNATURE, **header}
    result = CaptureFile(
        Header(
            msprobe=FORMAT, kind="capture", key=key, requests=list(requests), **fields
        )
    )
    for step in range(steps):
        result.entries.append(step_line(step))
        for name, depth, inputs, outputs in calls:
            line = CallLine(name, depth)
            for slots, target in ((inputs, line.i), (outputs, line.o)):
                for slot, value in slots.items():
                    pairs = value if isinstance(value, list) else [("0.prompt", value)]
                    target[slot] = [_add(result, step, *pair) for pair in pairs]
            result.entries.append(line)
    return result


def step_line(step, label=0):
    """A step with one request: its prefill of 4 tokens, or a decode step."""
    rows, position = (1, 3 + step) if step else (4, 0)
    return StepLine(step, rows, [(label, rows, position)])


def _add(result, step, segment, array, kind=None):
    number = len(result.tensors)
    if step and segment:
        segment = f"0.g{step}"
    kind = kind or ("t" if segment else "n")
    result.tensors[number] = tensor_line(number, array, segment=segment, kind=kind)
    return number


def request(tokens=(5, 6), logprobs=(-0.1, -0.2), label=0, **changes):
    """A request with three candidates at each position."""
    top = [
        [(token, value), (token + 1, value - 2.0), (token + 2, value - 3.0)]
        for token, value in zip(tokens, logprobs, strict=True)
    ]
    values = {"prompt_sha256": "aa", "prompt_tokens": 4, "top": top}
    return Request(
        label, tokens=list(tokens), logprobs=list(logprobs), **{**values, **changes}
    )


def module(path, kind="M", number=0):
    """Name of a module's call."""
    return f"Module.{path}.{kind}.forward.{number}"


class Network:
    """A small network whose calls and values are known, to plant faults into.

    `model` holds `a`, `b` and `c`; `b` holds `b.x` and `b.y`. Values are random; a
    fault multiplies what a place gives from there on.
    """

    ORDER = ("a", "b.x", "b.y", "b", "c", "model")

    def __init__(self, seed=0, rows=6, width=32):
        generator = np.random.default_rng(seed)
        self.start = generator.standard_normal((rows, width))
        self.weights = {
            name: generator.standard_normal((width, width)) / np.sqrt(width)
            for name in ("a", "b.x", "b.y", "c")
        }

    def run(self, *, after=None, inside=None, factor=1.05, steps=1, **header):
        """The capture of one run.

        Args:
            after: Module whose output is off by `factor`.
            inside: `b` or `model`: their own code changes what they hand from their
                first child to the second.
            factor: The fault.
            steps: Steps.
            header: Fields of the capture's header.
        """

        def module_output(name, x):
            y = np.tanh(x @ self.weights[name])
            return y * factor if name == after else y

        x0 = self.start
        a = module_output("a", x0)
        a_handed = a * factor if inside == "model" else a
        x = module_output("b.x", a_handed)
        x_handed = x * factor if inside == "b" else x
        y = module_output("b.y", x_handed)
        b = y * factor if after == "b" else y
        c = module_output("c", b)
        out = c * factor if after == "model" else c
        calls = [
            (module("a"), 1, {"input_args.0": x0}, {"output.0": a}),
            (module("b.x"), 2, {"input_args.0": a_handed}, {"output.0": x}),
            (module("b.y"), 2, {"input_args.0": x_handed}, {"output.0": y}),
            (module("b"), 1, {"input_args.0": a_handed}, {"output.0": b}),
            (module("c"), 1, {"input_args.0": b}, {"output.0": c}),
            (module("model"), 0, {"input_args.0": x0}, {"output.0": out}),
        ]
        return capture(calls, steps=steps, **header)
