# SPDX-License-Identifier: Apache-2.0
"""A capture between two references of transformers: no golden, no tolerance."""

import shutil

import engines
import numpy as np
import pytest
import tools
import torch

from pytest_msprobe.compare.three_way import LIMIT, METRIC, judge_three_ways
from pytest_msprobe.engine.reference_captures import reference_captures
from pytest_msprobe.errors import CaptureError

LAYER = "model.layers.1"
PROMPTS = (tools.PROMPT, "explain gravity in one sentence")


def judged(engine, folder, model=tools.MODEL, **config):
    """The verdict on a generation."""
    candidate = tools.capture(engine, folder, PROMPTS, **config)
    return judge_three_ways(*reference_captures(candidate, str(model)), candidate)


def module_of(engine, path):
    """A module of the engine's model."""
    return tools.model_of(engine).get_submodule(path)


@pytest.mark.parametrize("level", ["L0", "mix"])
def test_healthy_engine_rounds_like_transformers(engine, tmp_path, level):
    """Without a fault R stays near 1 over all rows, below half of the limit."""
    candidate = tools.capture(engine, tmp_path, PROMPTS, level=level)
    truth, noise = reference_captures(candidate, str(tools.MODEL))

    verdict = judge_three_ways(truth, noise, candidate)

    assert verdict.status == "pass"
    assert verdict.judged > 800
    middle, largest = (
        float(verdict.notes[0].split(word)[1].split()[0].rstrip(","))
        for word in ("median", "largest")
    )
    assert 0.5 < middle < 1.5
    assert largest < LIMIT / 2
    assert 0 < verdict.tokens.largest < 0.05
    modules = {call.c for _, call in truth.calls() if call.o}
    for name in ("qkv_proj", "rotary_emb", "attn", "gate_up_proj", "act_fn", "norm"):
        assert any(f".{name}." in call for call in modules), name
    assert any("logits_processor" in call for call in modules)


FAULTS = {
    "norm": (f"{LAYER}.post_attention_layernorm", "variance_epsilon", 1e-3),
    "attention scale": (f"{LAYER}.self_attn.attn.impl", "scale", 0.5),
}


def swap_heads(original, *args, **kwargs):
    """The first two heads of attention's output change places."""
    result = original(*args, **kwargs)
    first, second, rest = result.split([32, 32, result.shape[1] - 64], dim=1)
    return torch.cat([second, first, rest], dim=1)


def scaled_queries(module, factor):
    """The parent's own code: q is larger between two children."""

    def wrapper(_original, positions, hidden_states):
        qkv, _ = module.qkv_proj(hidden_states)
        sizes = [module.q_size, module.kv_size, module.kv_size]
        q, k, v = qkv.split(sizes, dim=-1)
        q, k = module.rotary_emb(positions, q * factor, k)
        output, _ = module.o_proj(module.attn(q, k, v))
        return output

    return wrapper


@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_constant_is_named(engine, tmp_path, fault):
    """A constant that is off gives the first R far above 1 at its module."""
    path, name, value = FAULTS[fault]
    head, _, tail = path.partition(".impl")
    owner = module_of(engine, head)
    owner = owner.impl if path.endswith(".impl") else owner
    del tail
    assert getattr(owner, name) != value

    with tools.changed_attribute(owner, name, value):
        verdict = judged(engine, tmp_path)

    assert verdict.status == "fail"
    assert verdict.divergence.module == head
    assert verdict.divergence.finding.metric == METRIC
    assert verdict.divergence.finding.observed > LIMIT


@pytest.mark.parametrize(
    ("path", "wrapper"),
    [
        (f"{LAYER}.mlp.gate_up_proj", "tuple"),
        (f"{LAYER}.self_attn.attn", swap_heads),
        (f"{LAYER}.self_attn", "own code"),
        ("model.norm", "residual"),
    ],
)
def test_changed_output_is_named(engine, tmp_path, path, wrapper):
    """Fused outputs, swapped heads, a module's own code and residuals are seen."""
    module = module_of(engine, path)

    def scaled_tuple(original, *args, **kwargs):
        first, *rest = original(*args, **kwargs)
        return (first * 1.1, *rest)

    def lost_residual(original, x, residual):
        return original(x, residual * 0.9)

    wrappers = {
        "tuple": scaled_tuple,
        "own code": scaled_queries(module, 1.2) if path.endswith("self_attn") else None,
        "residual": lost_residual,
    }

    with tools.wrapped_forward(module, wrappers.get(wrapper, wrapper)):
        verdict = judged(engine, tmp_path)

    assert verdict.status == "fail"
    assert verdict.divergence.module == path


def test_model_without_counterparts_is_an_error(engine, tmp_path):
    """A checkpoint that cannot be loaded is said in one line."""
    candidate = tools.capture(engine, tmp_path)

    with pytest.raises(CaptureError, match="transformers cannot load"):
        reference_captures(candidate, str(tmp_path))


def test_prompt_must_be_known(engine, tmp_path):
    """A capture without its prompts, as goldens are, is refused."""
    candidate = tools.capture(engine, tmp_path)
    candidate.header.requests[0].prompt = []

    with pytest.raises(CaptureError, match="prompt or tokens are not known"):
        reference_captures(candidate, str(tools.MODEL))


@pytest.fixture(scope="module")
def llama(tmp_path_factory, demo_model):
    """Folder of a tiny Llama with random weights and the demo model's tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=320,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(7)
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_model / name, folder)
    return folder


def test_llama_like_model(llama, tmp_path):
    """A tiny Llama passes as it is and fails at the module that is made wrong."""
    with engines.started(llama) as llm:
        healthy = judged(llm, tmp_path, llama)
        norm = module_of(llm, f"{LAYER}.input_layernorm")
        with tools.changed_attribute(norm, "variance_epsilon", 1e3):
            ill = judged(llm, tmp_path, llama)

    assert healthy.status == "pass", healthy.notes
    assert np.isfinite(healthy.tokens.largest)
    assert ill.status == "fail"
    assert ill.divergence.module == f"{LAYER}.input_layernorm"
