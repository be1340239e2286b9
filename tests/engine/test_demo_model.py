# SPDX-License-Identifier: Apache-2.0
"""The demo model has the properties that make faults show."""

import subprocess
import sys

import numpy as np
import pytest
import tools
import torch


@pytest.fixture(scope="module")
def maker():
    """The script that makes the model."""
    return tools.example("tiny_qwen2")


def test_model_has_its_known_hash(maker, tmp_path):
    """The files are the same bytes on every machine."""
    assert maker.write_model(tmp_path) == maker.SHA256


def test_script_checks_the_hash(tmp_path):
    """The script fails where the bytes are others."""
    script = tools.ROOT / "examples" / "tiny_qwen2.py"
    good = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    changed = script.read_text().replace("SEED = 2", "SEED = 3")
    other = tmp_path / "other.py"
    other.write_text(changed)
    bad = subprocess.run(
        [sys.executable, str(other), str(tmp_path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert good.returncode == 0, good.stderr
    assert bad.returncode == 1
    assert "expected" in bad.stderr


def test_weights_let_faults_show(maker):
    """Biases are not 0, norm weights not 1, embeddings small, one channel is huge."""
    weights = maker.make_weights()
    embedding = weights["model.embed_tokens.weight"]

    for name, value in weights.items():
        if name.endswith(".bias"):
            assert np.abs(value).min() > 0
            assert value.std() > 0.1
        elif "norm" in name:
            assert np.abs(value - 1).max() > 0.2
    ordinary = np.delete(embedding[1:], maker.SINK_CHANNEL, axis=1)
    assert ordinary.std() == pytest.approx(0.02, rel=0.02)
    assert embedding[0, maker.SINK_CHANNEL] > 100 * ordinary.std()
    assert maker.HEADS > maker.KV_HEADS
    assert maker.LAYERS >= 4


def test_tokenizer_round_trips_and_begins_with_the_sink(demo_model):
    """Text survives the tokenizer, and every prompt begins with the sink token."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    text = "rounding is not an error; \u00fcber 7!"

    ids = tokenizer(text)["input_ids"]

    assert ids[0] == 0
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert max(ids) < 320


def test_attention_scores_have_standard_deviation_two(engine):
    """Scores spread enough for a wrong scale to matter, and position 0 is a sink."""
    seen = []

    def note(original, query, key, value, *args, **kwargs):
        seen.append((query.clone(), key.clone()))
        return original(query, key, value, *args, **kwargs)

    attention = tools.model_of(engine).get_submodule("model.layers.1.self_attn.attn")
    with tools.wrapped_forward(attention, note):
        tools.generate(engine, [tools.PROMPT], 1)
    query, key = seen[0]
    q = query.float().reshape(-1, 4, 32)
    k = key.float().reshape(-1, 2, 32).repeat_interleave(2, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q, k) / 32**0.5

    assert scores[:, 1:, 1:].std().item() == pytest.approx(2.0, abs=0.35)


def test_position_0_carries_huge_activations(engine, tmp_path):
    """The residual stream at position 0 is far larger than elsewhere."""
    capture = tools.capture(engine, tmp_path)
    name = "Module.model.layers.3.Qwen2DecoderLayer.forward.0"
    line = next(call for s, call in capture.calls() if s == 0 and call.c == name)
    first, rest = (capture.tensors[n] for n in line.o["output.1"])

    assert (first.g, rest.g) == ("0.first", "0.prompt")
    assert first.v[0] > 20 * rest.v[0]


def test_engines_of_the_tests_run_with_one_thread(engine):
    """The number of threads is fixed, so that bits can be compared."""
    assert torch.get_num_threads() == 1
