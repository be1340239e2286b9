# SPDX-License-Identifier: Apache-2.0
"""The committed goldens judged under another numerics key.

These tests run in a process of their own with the instruction set capped to AVX2; see
tests/engine/test_capped.py, which starts it.
"""

import math
import os

import pytest
import tools
import torch

from pytest_msprobe.dump.capture import read_capture
from pytest_msprobe.model.limits import Rule

pytestmark = pytest.mark.skipif(
    os.environ.get("ONEDNN_MAX_CPU_ISA") != "AVX2",
    reason="the instruction set is not capped: started by tests/engine/test_capped.py",
)

PROMPTS = {
    "layer": "the first layer to differ is the one to look at",
    "inherit": "the others only inherit it",
}
# Half of every limit for another key, as docs/tolerances.md gives them.
HALF = {
    "rel_l2": 2.5e-2,
    "max": 3e-2,
    "min": 3e-2,
    "norm": 1e-2,
    "mean": 5e-3,
    "logprob": 2.5e-2,
}
LEAD = 20


def committed(name):
    """A golden of the repository, made with AVX512-bf16."""
    folder = tools.ROOT / "golden" / "examples" / "test_generation.py"
    return read_capture(folder / f"test_greedy[{name}]" / "cpu-avx512bf16-amd.jsonl")


@pytest.fixture(scope="module")
def candidates(engine, tmp_path_factory):
    """A clean capture of every prompt under the capped instruction set."""
    folder = tmp_path_factory.mktemp("cross")
    return {n: tools.capture(engine, folder, [p]) for n, p in PROMPTS.items()}


@pytest.mark.parametrize("name", PROMPTS)
def test_key_and_bits_differ(candidates, name):
    """The cap has an effect: another key, other checksums."""
    candidate = candidates[name]

    assert candidate.header.key != committed(name).header.key
    assert "avx2" in candidate.header.key
    assert len(tools.unequal_rows(committed(name), candidate)) > 100


@pytest.mark.parametrize("name", PROMPTS)
def test_clean_run_stays_below_half_of_every_limit(candidates, name):
    """A clean run under another key is within half of each cross limit."""
    half = Rule("half", limits=HALF)

    verdict = tools.verdict_of(committed(name), candidates[name], [half])

    assert verdict.mode == "cross"
    assert verdict.worst == []
    assert verdict.is_green
    assert verdict.tokens.largest < HALF["logprob"]
    assert verdict.tokens.flipped is None


@pytest.mark.parametrize("name", PROMPTS)
def test_greedy_tokens_have_a_clear_lead(candidates, name):
    """Each token's lead over the second is at least 20 times the numeric noise."""
    golden, candidate = committed(name).header.requests[0], candidates[name].header
    for old, new in zip(golden.top, candidate.requests[0].top, strict=True):
        here = dict(new)
        noise = max(abs(value - here[i]) for i, value in old if i in here)
        lead = old[0][1] - old[1][1]

        assert lead >= LEAD * noise


def _epsilon(model):
    norm = model.get_submodule("model.layers.0.input_layernorm")
    change = tools.changed_attribute(norm, "variance_epsilon", 1e-3)
    return change, "model.layers.0.input_layernorm"


def _scale(model):
    impl = model.get_submodule("model.layers.1.self_attn.attn").impl
    change = tools.changed_attribute(impl, "scale", impl.scale * 2)
    return change, "model.layers.1.self_attn.attn"


def _bias(model):
    qkv = model.get_submodule("model.layers.2.self_attn.qkv_proj")
    change = tools.changed_attribute(
        qkv, "bias", torch.nn.Parameter(torch.zeros_like(qkv.bias), requires_grad=False)
    )
    return change, "model.layers.2.self_attn.qkv_proj"


def _swapped(path, *, in_queries):
    def swap(tensor):
        head = 32
        return torch.cat(
            [tensor[:, head : 2 * head], tensor[:, :head], tensor[:, 2 * head :]], 1
        )

    def wrapper(original, *args, **kwargs):
        result = original(*args, **kwargs)
        return (swap(result[0]), *result[1:]) if in_queries else swap(result)

    return lambda model: (
        tools.wrapped_forward(model.get_submodule(path), wrapper),
        path,
    )


def _rows(model):
    path = "model.layers.2.mlp"

    def wrapper(original, *args, **kwargs):
        result = original(*args, **kwargs)
        if result.shape[0] < 8:
            return result
        order = list(range(result.shape[0]))
        order[3], order[6] = order[6], order[3]
        return result[order]

    return tools.wrapped_forward(model.get_submodule(path), wrapper), path


def _behind_the_sink(model):
    path = "model.layers.1.mlp.act_fn"

    def wrapper(original, *args, **kwargs):
        result = original(*args, **kwargs).clone()
        result[1:] *= 1.3
        return result

    return tools.wrapped_forward(model.get_submodule(path), wrapper), path


FAULTS = {
    "epsilon 1e-3": _epsilon,
    "scale x2": _scale,
    "qkv bias": _bias,
    "heads of q": _swapped("model.layers.1.self_attn.qkv_proj", in_queries=True),
    "heads of attention": _swapped("model.layers.2.self_attn.attn", in_queries=False),
    "prompt rows": _rows,
    "x1.3 behind the sink": _behind_the_sink,
}
LEAST = 3.0


def _assert_named(verdict, guilty):
    assert verdict.mode == "cross"
    assert verdict.status == "fail"
    assert verdict.divergence.module == guilty
    ratio = verdict.divergence.finding.ratio
    assert math.isinf(float(ratio)) or ratio >= LEAST


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_caught_across_keys(engine, candidates, tmp_path, fault):
    """A large fault is caught and named against a golden of another key."""
    change, guilty = FAULTS[fault](tools.model_of(engine))

    with change:
        candidate = tools.capture(engine, tmp_path, [PROMPTS["layer"]])

    tools.assert_changed(candidates["layer"], candidate, guilty)
    _assert_named(tools.verdict_of(committed("layer"), candidate), guilty)


def test_weight_row_is_caught_across_keys(engine, candidates, tmp_path):
    """One row x4 of o_proj, in a second checkpoint, is caught against another key."""
    from pytest_msprobe.engine.launch import stop_engine

    maker = tools.example("tiny_qwen2")
    weights = maker.make_weights()
    weights["model.layers.1.self_attn.o_proj.weight"][40] *= 4
    maker.write_model(tmp_path / "row", weights)
    llm = tools.start(tmp_path / "row")
    try:
        candidate = tools.capture(llm, tmp_path, [PROMPTS["layer"]])
    finally:
        stop_engine(llm)

    guilty = "model.layers.1.self_attn.o_proj"
    tools.assert_changed(candidates["layer"], candidate, guilty)
    verdict = tools.verdict_of(committed("layer"), candidate)
    assert verdict.divergence.kind == "weights"
    _assert_named(verdict, guilty)
    assert verdict.divergence.finding.row.call.startswith(f"Module.{guilty}.")
