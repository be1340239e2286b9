# SPDX-License-Identifier: Apache-2.0
"""Faults planted into a real engine, judged under the same numerics key.

Every fault is asserted to have changed the tensor where it was planted; then it must
be caught and the right module named, at L0 and at mix.
"""

import copy

import pytest
import tools
import torch

LAYER = "model.layers.1"
EQUAL_LEVELS = ("L0", "mix")


@pytest.fixture(scope="module")
def goldens(engine, tmp_path_factory):
    """A clean capture at each level, made in this run."""
    folder = tmp_path_factory.mktemp("goldens")
    return {level: tools.capture(engine, folder, level=level) for level in EQUAL_LEVELS}


def scale_rows(first):
    """A wrapper that makes all rows from `first` on 10 % larger."""

    def wrapper(original, *args, **kwargs):
        result = original(*args, **kwargs).clone()
        result[first:] *= 1.1
        return result

    return wrapper


def swap_heads(original, *args, **kwargs):
    """The first two heads of attention's output change places."""
    result = original(*args, **kwargs)
    size = 32
    return torch.cat(
        [result[:, size : 2 * size], result[:, :size], result[:, 2 * size :]], dim=1
    )


def swap_rows(original, *args, **kwargs):
    """Two prompt rows change places in the prefill."""
    result = original(*args, **kwargs)
    if result.shape[0] < 8:
        return result
    order = list(range(result.shape[0]))
    order[3], order[6] = order[6], order[3]
    return result[order]


def through_fp8(original, *args, **kwargs):
    """The operator's result is rounded to 8 bits."""
    result = original(*args, **kwargs)
    return result.to(torch.float8_e4m3fn).to(result.dtype)


def scaled_queries(module, factor=1.02):
    """The parent's own code: q is larger between two children."""

    def wrapper(_original, positions, hidden_states):
        qkv, _ = module.qkv_proj(hidden_states)
        sizes = [module.q_size, module.kv_size, module.kv_size]
        q, k, v = qkv.split(sizes, dim=-1)
        q, k = module.rotary_emb(positions, q * factor, k)
        output, _ = module.o_proj(module.attn(q, k, v))
        return output

    return wrapper


def without_v_bias(module):
    """The bias with the part of v set to zero."""
    bias = copy.deepcopy(module.bias)
    bias.data[128 + 64 :] = 0
    return bias


def plant(model, name):
    """The context manager that plants a fault, and the module that is guilty."""
    attention = model.get_submodule(f"{LAYER}.self_attn")
    if name == "epsilon":
        norm = model.get_submodule(f"{LAYER}.input_layernorm")
        return tools.changed_attribute(norm, "variance_epsilon", 1e-5), (
            f"{LAYER}.input_layernorm"
        )
    if name == "scale":
        scale = attention.attn.impl.scale * 1.01
        change = tools.changed_attribute(attention.attn.impl, "scale", scale)
        return change, f"{LAYER}.self_attn.attn"
    if name == "bias":
        qkv = attention.qkv_proj
        change = tools.changed_attribute(qkv, "bias", without_v_bias(qkv))
        return change, f"{LAYER}.self_attn.qkv_proj"
    if name == "own code":
        change = tools.wrapped_forward(attention, scaled_queries(attention))
        return change, f"{LAYER}.self_attn"
    wrappers = {
        "fp8": ("mlp.act_fn", through_fp8),
        "heads": ("self_attn.attn", swap_heads),
        "rows": ("mlp.act_fn", swap_rows),
        "behind the sink": ("mlp.act_fn", scale_rows(1)),
    }
    path, wrapper = wrappers[name]
    module = model.get_submodule(f"{LAYER}.{path}")
    return tools.wrapped_forward(module, wrapper), f"{LAYER}.{path}"


FAULTS = (
    "epsilon",
    "scale",
    "bias",
    "own code",
    "fp8",
    "heads",
    "rows",
    "behind the sink",
)


@pytest.mark.parametrize("level", EQUAL_LEVELS)
@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_caught_and_named(engine, goldens, tmp_path, fault, level):
    """A planted fault fails the gate, and the guilty module is named first."""
    change, guilty = plant(tools.model_of(engine), fault)

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
    change, guilty = plant(tools.model_of(engine), "heads")

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
