# SPDX-License-Identifier: Apache-2.0
"""What the documents claim to be caught, and by what."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from pytest_msprobe.model.limits import ROW_METRICS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def detectable():
    """The benchmark as a module."""
    path = ROOT / "benchmarks" / "detectable.py"
    spec = importlib.util.spec_from_file_location("detectable", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_picture_is_of_the_committed_figures(detectable):
    """The SVG in the documents is what the JSON beside the benchmarks gives."""
    saved = json.loads(
        (ROOT / "benchmarks" / "results" / "detectable.json").read_text("utf-8")
    )

    drawn = detectable.Plot(saved["smallest"]).svg()

    assert drawn == (ROOT / "docs" / "detectable.svg").read_text("utf-8")
    limits = saved["limits"]
    for dtype, kinds in saved["smallest"].items():
        for kind, sizes in kinds.items():
            own = min(sizes[name] for name in ROW_METRICS if sizes[name] is not None)
            assert own < 1.5 * limits[dtype]["rel_l2"], (dtype, kind)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("kind", ["swapped rows", "swapped heads"])
def test_exchanged_parts_are_seen_by_the_distance_alone(detectable, kind, dtype):
    """At twice the limit an exchange fails by rel_l2, and moves no other statistic."""
    start = np.random.default_rng(5).standard_normal(
        (detectable.ROWS, detectable.WIDTH)
    )
    size = 2 * detectable.default_limits("same", dtype)["rel_l2"]
    pair = detectable.KINDS[kind](start, size, np.random.default_rng(6))
    old, new = (detectable.round_to(side, dtype) for side in pair)

    ratios = detectable.ratios(old, new, dtype)

    assert ratios["rel_l2"] > 1
    assert all(ratios[name] < 0.1 for name in ("max", "min", "norm", "mean"))
    assert all(ratios[f"{n} at 10 %"] < 0.1 for n in detectable.STATISTICS)
