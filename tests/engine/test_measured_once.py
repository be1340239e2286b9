# SPDX-License-Identifier: Apache-2.0
"""Rows are the same whether tensors are measured at once, together, or once only."""

import json

import pytest
import tools
from engines import started

pytestmark = pytest.mark.engine

COMMON = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 320,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
# A process that has had another engine starts none with experts.
OWN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
PROMPTS = ({"prompt_token_ids": [0, 7, 8, 9, 10, 7, 3]},)
FAMILIES = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    "gemma2": {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 32,
        "sliding_window": 128,
        "hidden_activation": "gelu_pytorch_tanh",
    },
    "olmo2": {"architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2"},
    "mixtral": {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
}
SETTINGS = {
    "at once": {"pending_bytes": 0, "measure_once": False},
    "together": {"measure_once": False},
    "bounded": {"pending_bytes": 4096},
    "once": {},
    "call by call": {"summary_mode": "md5"},
    "replaced": {"function_hooks": "replace"},
}


def rows_of(llm, folder, level, **config):
    """Every row of a capture as data."""
    file = tools.capture(llm, folder, PROMPTS, level=level, **config)
    return [json.loads(line) for line in file.path.read_text("utf-8").splitlines()[1:]]


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_do_not_depend_on_when_they_are_measured(family, tmp_path):
    """Deferring, reusing and noting change no row of a model family, at L0 and mix."""
    model = tmp_path / "model"
    model.mkdir()
    config = {**COMMON, **FAMILIES[family]}
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with started(
        model, OWN_PROCESS, load_format="dummy", skip_tokenizer_init=True
    ) as llm:
        for level in ("L0", "mix"):
            found = {
                name: rows_of(llm, tmp_path / level / name, level, **setting)
                for name, setting in SETTINGS.items()
            }
            assert len(found["at once"]) > 40
            for name, rows in found.items():
                assert rows == found["at once"], (family, level, name)
