# SPDX-License-Identifier: Apache-2.0
"""Hypothesis strategies: two captures of the same random calls, one of them changed."""

import captures
import numpy as np
from captures import OTHER_KEY, capture, module, request
from hypothesis import strategies as st

SEEDS = st.integers(0, 2**32 - 1)
SHAPES = [(4, 16), (3, 7), (1, 5), (6, 40)]
FORMS = [
    ["0.first", "0.prompt"],
    ["0.prompt", "1.prompt"],
    ["0.prompt"],
    [""],
]
PARTS = {"a": 1, "b.x": 2, "b.y": 2, "b": 1, "Functional.silu": 1, "c": 1, "model": 0}


def _scaled(x, size, _rng):
    return x * (1 + size)


def _noisy(x, size, rng):
    return x + size * rng.standard_normal(x.shape)


def _one_element(x, size, rng):
    y = x.copy()
    y.flat[rng.integers(x.size)] += size * np.linalg.norm(x)
    return y


def _shifted(x, size, _rng):
    return x + size


def _turned(x, _size, _rng):
    return x[:, ::-1]


CHANGES = [_scaled, _noisy, _one_element, _shifted, _turned]


@st.composite
def plans(draw):
    """Calls with their shapes and segments, and which outputs are changed and how."""
    names = draw(st.lists(st.sampled_from(sorted(PARTS)), min_size=1, unique=True))
    calls = [name for name in PARTS if name in names]
    forms = {name: draw(st.sampled_from(FORMS)) for name in calls}
    shapes = {name: draw(st.sampled_from(SHAPES)) for name in calls}
    changed = draw(st.sets(st.sampled_from(calls), min_size=1))
    change = draw(st.sampled_from(CHANGES))
    size = 10.0 ** draw(st.floats(-6, 0.5))
    return {
        "calls": calls,
        "forms": forms,
        "shapes": shapes,
        "changed": changed,
        "change": change,
        "size": size,
        "seed": draw(SEEDS),
        "unit": 10.0 ** draw(st.integers(-6, 6)),
        "shift": draw(st.sampled_from([0.0, 1e-4, 0.3])),
    }


def call_name(part):
    """Name of a call: a module, or an operator."""
    return f"{part}.0.forward" if part.startswith("Functional") else module(part)


def build(plan, *, is_changed, spoil=None, **header):
    """The capture of a plan.

    Args:
        plan: What is captured.
        is_changed: Whether outputs are changed as the plan says.
        spoil: Called with (call, segment, array), which it may change in place.
        header: Fields of the header.
    """
    rng, noise = (np.random.default_rng(plan["seed"] + n) for n in (0, 1))
    calls = []
    for part in plan["calls"]:
        inputs, outputs = [], []
        for segment in plan["forms"][part]:
            arrays = rng.standard_normal((2, *plan["shapes"][part])) * plan["unit"]
            x, y = arrays
            if is_changed and part in plan["changed"]:
                y = plan["change"](y / plan["unit"], plan["size"], noise)
                y = y * plan["unit"]
            if spoil is not None:
                y = y.copy()
                spoil(part, segment, y)
            inputs.append((segment, x))
            outputs.append((segment, y))
        calls.append(
            (call_name(part), PARTS[part], {"input_args.0": inputs},
             {"output.0": outputs})
        )  # fmt: skip
    shift = plan["shift"] if is_changed else 0.0
    requests = [request(logprobs=(-0.1, -0.2 - shift), label=label) for label in (0, 1)]
    result = capture(calls, requests=requests, **header)
    result.entries[0] = captures.StepLine(0, 8, [(0, 4, 0), (1, 4, 0)])
    return result


@st.composite
def pairs(draw):
    """A plan, its golden, with this key or another one, and its candidate."""
    plan = draw(plans())
    header = {"key": OTHER_KEY} if draw(st.booleans()) else {}
    return (
        plan,
        build(plan, is_changed=False, **header),
        build(plan, is_changed=True),
    )
