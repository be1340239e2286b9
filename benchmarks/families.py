# SPDX-License-Identifier: Apache-2.0
"""Four families of models with seeded random weights, for benchmarks/verdicts.py.

Qwen2 (biases in attention, a first token with one huge channel), Llama (no biases, no
such token), a mixture of experts (Qwen2-MoE, shared expert), and one with attention
sinks (gpt-oss: learnt sinks, sliding windows, experts with biases, YaRN).
"""

import json
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "examples"), str(Path(__file__).parent)]

import noise  # noqa: E402 - beside this script
import tiny_qwen2 as maker  # noqa: E402 - the examples' maker

FAMILIES = ("Qwen2", "Llama", "Qwen2-MoE", "gpt-oss")
EXPERTS, WIDTH = 4, 64


def write_family(name, folder):
    """The files of a family's model; its folder."""
    weights = maker.make_weights()
    config = {}
    if name == "Llama":
        config = as_llama(weights)
    elif name == "Qwen2-MoE":
        config = noise.add_experts(maker, weights)
    elif name == "gpt-oss":
        weights, config = gpt_oss()
    maker.write_model(folder, weights)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def as_llama(weights):
    """Takes biases and the huge channel away; returns what config.json changes."""
    for name in [name for name in weights if name.endswith(".bias")]:
        del weights[name]
    weights["model.embed_tokens.weight"][maker.BOS] = 0.0
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "mlp_bias": False,
    }


def gpt_oss():
    """Weights and what config.json changes."""
    stream, hidden = maker.Stream(23), maker.HIDDEN
    queries, keys = maker.HEADS * maker.HEAD_SIZE, maker.KV_HEADS * maker.HEAD_SIZE
    wide, small = hidden**-0.5, 0.02 * queries**-0.5
    weights = {"model.embed_tokens.weight": stream(maker.VOCABULARY, hidden, std=0.02)}
    for layer in range(maker.LAYERS):
        own = {
            "input_layernorm.weight": 1.0 + stream(hidden, std=0.15),
            "post_attention_layernorm.weight": 1.0 + stream(hidden, std=0.15),
            "self_attn.sinks": stream(maker.HEADS, std=1.0),
            "mlp.router.weight": stream(EXPERTS, hidden, std=0.5),
            "mlp.router.bias": stream(EXPERTS, std=0.2),
            "mlp.experts.gate_up_proj": stream(EXPERTS, hidden, 2 * WIDTH, std=wide),
            "mlp.experts.gate_up_proj_bias": stream(EXPERTS, 2 * WIDTH, std=0.1),
            "mlp.experts.down_proj": stream(EXPERTS, WIDTH, hidden, std=small),
            "mlp.experts.down_proj_bias": stream(EXPERTS, hidden, std=0.002),
        }
        for name, rows in (("q", queries), ("k", keys), ("v", keys)):
            own[f"self_attn.{name}_proj.weight"] = stream(rows, hidden, std=wide)
            own[f"self_attn.{name}_proj.bias"] = stream(rows, std=0.3)
        own["self_attn.o_proj.weight"] = stream(hidden, queries, std=small)
        own["self_attn.o_proj.bias"] = stream(hidden, std=0.004)
        prefix = f"model.layers.{layer}."
        weights |= {prefix + name: np.asarray(value) for name, value in own.items()}
    weights["model.norm.weight"] = 1.0 + stream(hidden, std=0.15)
    weights["lm_head.weight"] = stream(maker.VOCABULARY, hidden, std=wide)
    config = {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "attention_bias": True,
        "head_dim": maker.HEAD_SIZE,
        "intermediate_size": WIDTH,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "sliding_window": 32,
        "layer_types": ["sliding_attention", "full_attention"] * (maker.LAYERS // 2),
        "rms_norm_eps": 1e-05,
        "swiglu_limit": 7.0,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 128,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
        },
    }
    return weights, config
