# SPDX-License-Identifier: Apache-2.0
"""Faults planted into a real engine, judged under the same numerics key.

Every fault is asserted to have changed the tensor where it was planted; then it must
be caught and the right module named, at L0 and at mix.
"""

import contextlib
from dataclasses import asdict

import pytest
import tools

from pytest_msprobe.engine.plants import Place

LAYER = "model.layers.1"
EQUAL_LEVELS = ("L0", "mix")


@pytest.fixture(scope="module")
def goldens(engine, tmp_path_factory):
    """A clean capture at each level, made in this run."""
    folder = tmp_path_factory.mktemp("goldens")
    return {level: tools.capture(engine, folder, level=level) for level in EQUAL_LEVELS}


def scaled_behind_the_sink(original, *args, **kwargs):
    """All rows but the first are 10 % larger."""
    result = original(*args, **kwargs).clone()
    result[1:] *= 1.1
    return result


ATTENTION = f"{LAYER}.self_attn"
# Faults of the library that `pytest-msprobe doctor` plants, with their sizes.
PLANTS = {
    "epsilon": (Place("epsilon", f"{LAYER}.input_layernorm"), 9e-6),
    "scale": (Place("attention_scale", f"{ATTENTION}.attn"), 0.01),
    "bias": (Place("bias", f"{ATTENTION}.qkv_proj"), 1.0),
    "own code": (Place("argument", ATTENTION, "rotary_emb", 1), 0.02),
    "fp8": (Place("precision", f"{LAYER}.mlp.act_fn"), 2.0**-3),
    "heads": (Place("heads", f"{ATTENTION}.attn"), 1.0),
    "rows": (Place("rows", f"{LAYER}.mlp.act_fn"), 1.0),
}


@contextlib.contextmanager
def planted(engine, place, size):
    """A fault in the engine for a while."""
    tools.control(engine, "plant", place=asdict(place), size=size)
    try:
        yield
    finally:
        tools.control(engine, "unplant")


def plant(engine, name):
    """The context manager that plants a fault, and the module that is guilty."""
    if name in PLANTS:
        place, size = PLANTS[name]
        return planted(engine, place, size), place.guilty
    path = f"{LAYER}.mlp.act_fn"
    module = tools.model_of(engine).get_submodule(path)
    return tools.wrapped_forward(module, scaled_behind_the_sink), path


FAULTS = (*PLANTS, "behind the sink")


@pytest.mark.parametrize("level", EQUAL_LEVELS)
@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_caught_and_named(engine, goldens, tmp_path, fault, level):
    """A planted fault fails the gate, and the guilty module is named first."""
    change, guilty = plant(engine, fault)

    with change:
        candidate = tools.capture(engine, tmp_path, level=level)
    verdict = tools.verdict_of(goldens[level], candidate)

    place = f"{guilty}.rotary_emb" if fault == "own code" else guilty
    slot = "input_args.1" if fault == "own code" else "output.0"
    tools.assert_changed(goldens[level], candidate, place, slot)
    assert verdict.status == "fail"
    assert verdict.divergence.module == guilty
    assert verdict.divergence.kind == "origin"


@pytest.mark.parametrize("level", EQUAL_LEVELS)
def test_clean_run_is_bit_identical(engine, goldens, tmp_path, level):
    """Without a fault every judged row has the golden's checksum."""
    verdict = tools.verdict_of(
        goldens[level], tools.capture(engine, tmp_path, level=level)
    )

    assert verdict.status == "pass"
    assert verdict.equal == verdict.judged > 0


def test_swapped_heads_move_no_statistic(engine, goldens, tmp_path):
    """Only the sketch sees swapped heads: Max, Min, Mean and Norm stay."""
    change, guilty = plant(engine, "heads")

    with change:
        candidate = tools.capture(engine, tmp_path)
    finding = tools.verdict_of(goldens["L0"], candidate).divergence.finding

    assert finding.row.call.startswith(f"Module.{guilty}.")
    assert finding.metric == "rel_l2"
    old, new = (
        {
            tensor.g: tensor
            for _, call in side.calls()
            if call.c == finding.row.call
            for number in call.o["output.0"]
            for tensor in [side.tensors[number]]
        }["0.prompt"]
        for side in (goldens["L0"], candidate)
    )
    assert old.v[:2] == new.v[:2]
    assert old.v[2:] == pytest.approx(new.v[2:], rel=1e-6)
    assert old.q != new.q


@pytest.fixture(scope="module")
def engine_with_row(engine, tmp_path_factory):
    """An engine with one weight row 5 % larger, from a second checkpoint."""
    from pytest_msprobe.engine.launch import stop_engine

    maker = tools.example("tiny_qwen2")
    weights = maker.make_weights()
    weights[f"{LAYER}.mlp.up_proj.weight"][17] *= 1.05
    folder = tmp_path_factory.mktemp("row")
    maker.write_model(folder, weights)
    llm = tools.start(folder)
    yield llm
    stop_engine(llm)


@pytest.mark.parametrize("level", EQUAL_LEVELS)
def test_weight_row_is_caught_and_named(engine_with_row, goldens, tmp_path, level):
    """One weight row x1.05 is found as a change of weights in its module."""
    candidate = tools.capture(engine_with_row, tmp_path, level=level)

    verdict = tools.verdict_of(goldens[level], candidate)

    guilty = f"{LAYER}.mlp.gate_up_proj"
    tools.assert_changed(goldens[level], candidate, guilty)
    assert verdict.status == "fail"
    assert verdict.divergence.kind == "weights"
    assert verdict.divergence.module == guilty
    assert verdict.divergence.parameter == f"{LAYER}.mlp.up_proj.weight"
    assert verdict.divergence.finding.row.call.startswith(f"Module.{guilty}.") or (
        level == "mix"
    )
