# SPDX-License-Identifier: Apache-2.0
"""R of healthy engines: how far vLLM's error is from that of transformers.

    python benchmarks/three_way.py

Each engine runs in a process of its own: the demo model and a tiny Llama with random
weights, by element type. Prints a table and saves it to results/three-way.json.
"""

import json
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pytest_msprobe.compare.three_way import LIMIT, r_of_rows
from pytest_msprobe.config.debugger_config import DebuggerConfig
from pytest_msprobe.dump.capture import read_capture
from pytest_msprobe.engine.child import Job, record_in_child
from pytest_msprobe.engine.launch import engine_arguments
from pytest_msprobe.engine.reference_captures import reference_captures

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / ".demo" / "tiny-qwen2"
OUTPUT = ROOT / "benchmarks" / "results" / "three-way.json"
PROMPTS = [
    "the first layer to differ is the one to look at",
    "explain gravity in one sentence",
    "numbers, numbers, numbers: sums, norms, means, and where the largest one was",
]
SAMPLING = {"max_tokens": 9, "temperature": 0, "ignore_eos": True}
VARIABLES = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


def write_llama(folder, seed, spread):
    """A tiny Llama with random weights and the demo model's tokenizer."""
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=320,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=spread,
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, folder)
    return folder


def measure(name, model, dtype, folder):
    """R over all rows of one healthy engine."""
    given = {"model": str(model), "dtype": dtype, "max_model_len": 128}
    job = Job(
        engine_arguments(given, "benchmark"),
        PROMPTS,
        SAMPLING,
        asdict(DebuggerConfig(level="L0")),
        str(folder),
        -1,
        name,
    )
    (path,) = record_in_child(job, environment=VARIABLES)
    candidate = read_capture(path)
    values = r_of_rows(*reference_captures(candidate, str(model)), candidate)
    return {
        "model": name,
        "dtype": dtype,
        "rows": len(values),
        "median": round(float(np.median(values)), 3),
        "99 %": round(float(np.quantile(values, 0.99)), 3),
        "largest": round(float(values.max()), 3),
    }


def main():
    torch.set_num_threads(1)
    results = []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        models = {"demo Qwen2": DEMO}
        for spread in (0.02, 0.2):
            place = write_llama(root / f"llama-{spread}", 7, spread)
            models[f"random Llama, std {spread}"] = place
        for number, (title, model) in enumerate(models.items()):
            for dtype in ("bfloat16", "float16", "float32"):
                place = root / f"{number}-{dtype}"
                results.append(measure(title, model, dtype, place))
                print(results[-1], flush=True)
    found = {"limit": LIMIT, "torch": torch.__version__, "results": results}
    OUTPUT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
