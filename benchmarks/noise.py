# SPDX-License-Identifier: Apache-2.0
"""How far clean runs are apart: what the default tolerances have to absorb.

    python benchmarks/noise.py [--models NAME ...] [--variations NAME ...] [--save FILE]

Each model is captured at level mix in a process of its own, then again in others in
which something benign is different: nothing but the process, the number of threads, the
requests in the batch, the chunks of a prompt, the instruction set, on a GPU the
attention backend. Every run is compared with the first one: the greatest error of each
metric over all rows that would be judged, and over all tokens.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "MSPROBE_ATTACH": "1",
}
PROMPTS = (16, 24, 40)
TOKENS = 3
# Name: shape of the model, dtype.
MODELS = {
    "tiny bf16": ("tiny", "bfloat16"),
    "tiny f16": ("tiny", "float16"),
    "tiny f32": ("tiny", "float32"),
    "wide bf16": ("wide", "bfloat16"),
    "wide f32": ("wide", "float32"),
    "deep bf16": ("deep", "bfloat16"),
    "experts bf16": ("experts", "bfloat16"),
}
SHAPES = {
    "tiny": {},
    "wide": {"HIDDEN": 512, "HEADS": 8, "HEAD_SIZE": 64, "INTERMEDIATE": 1408},
    "deep": {"LAYERS": 16},
    "experts": {},
}
# Name: environment, engine arguments, cap of the instruction set.
VARIATIONS = {
    "another process": ({}, {}, None),
    "2 threads": ({"OMP_NUM_THREADS": "2"}, {}, None),
    "batched": ({}, {"max_num_seqs": 4}, None),
    "chunked prefill": (
        {},
        {"enable_chunked_prefill": True, "max_num_batched_tokens": 8},
        None,
    ),
    "AVX512 without bf16": (
        {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"},
        {},
        ["_is_avx512_bf16_supported", "_is_amx_tile_supported"],
    ),
    "AVX2": (
        {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
        {},
        [
            "_is_avx512_supported",
            "_is_avx512_bf16_supported",
            "_is_amx_tile_supported",
        ],
    ),
    "attention TRITON_ATTN": ({}, {"attention_backend": "TRITON_ATTN"}, None),
    "attention FLEX_ATTENTION": ({}, {"attention_backend": "FLEX_ATTENTION"}, None),
}
CPU_ONLY = {"2 threads", "AVX512 without bf16", "AVX2"}
GPU_ONLY = {name for name in VARIATIONS if name.startswith("attention")}


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--variations", nargs="+", choices=VARIATIONS)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--save", type=Path)
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args()


def write_model(folder, shape):
    """A model with seeded weights; its folder."""
    sys.path.insert(0, str(ROOT / "examples"))
    import tiny_qwen2 as maker

    before = {name: getattr(maker, name) for name in SHAPES[shape]}
    for name, value in SHAPES[shape].items():
        setattr(maker, name, value)
    try:
        weights = maker.make_weights()
        config = {}
        if shape == "experts":
            config = add_experts(maker, weights)
        maker.write_model(folder, weights)
    finally:
        for name, value in before.items():
            setattr(maker, name, value)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def add_experts(maker, weights):
    """Makes it a mixture of four experts; returns what config.json adds."""
    stream, width = maker.Stream(11), 64
    for layer in range(maker.LAYERS):
        prefix = f"model.layers.{layer}.mlp."
        for name in ("gate_proj", "up_proj", "down_proj"):
            del weights[f"{prefix}{name}.weight"]
        weights[f"{prefix}gate.weight"] = stream(4, maker.HIDDEN, std=0.5)
        weights[f"{prefix}shared_expert_gate.weight"] = stream(1, maker.HIDDEN, std=0.1)
        for expert in [*(f"experts.{n}." for n in range(4)), "shared_expert."]:
            for name in ("gate_proj", "up_proj"):
                weights[f"{prefix}{expert}{name}.weight"] = stream(
                    width, maker.HIDDEN, std=maker.HIDDEN**-0.5
                )
            weights[f"{prefix}{expert}down_proj.weight"] = stream(
                maker.HIDDEN, width, std=0.02 * width**-0.5
            )
    return {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": width,
        "shared_expert_intermediate_size": width,
        "decoder_sparse_step": 1,
        "norm_topk_prob": False,
        "mlp_only_layers": [],
    }


def run_child(task):
    """In a process of its own: captures one run."""
    import torch

    for name in task["cap"] or ():
        setattr(torch.cpu, name, lambda: False)

    from pytest_msprobe.config.debugger_config import DebuggerConfig
    from pytest_msprobe.engine.client import converse, start_capture, stop_capture
    from pytest_msprobe.engine.launch import (
        engine_arguments,
        start_engine,
        stop_engine,
    )

    arguments = {"model": task["model"], "dtype": task["dtype"], "max_model_len": 128}
    if task["device"] == "cuda":
        arguments["gpu_memory_utilization"] = 0.1
    llm = start_engine(engine_arguments({**arguments, **task["engine"]}, "noise"))
    try:
        from vllm import SamplingParams

        parameters = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True)
        prompts = [
            {"prompt_token_ids": [0, *range(20, 19 + length)]} for length in PROMPTS
        ]
        config = DebuggerConfig(level="mix", extra_info=False)
        folder = Path(task["folder"])
        converse(llm, start_capture(config, folder, decode_steps=TOKENS - 1))
        llm.generate(prompts, parameters, use_tqdm=False)
        (reply,) = converse(llm, stop_capture("noise"))
    finally:
        stop_engine(llm)
    (folder / "file").write_text(str(reply["file"]))


def capture(folder, name, model, device, variation):
    """The capture of one run, or the reason why there is none."""
    from pytest_msprobe.dump.capture import read_capture

    changes, engine, cap = variation
    task = {
        "model": str(model),
        "dtype": MODELS[name][1],
        "folder": str(folder),
        "engine": engine,
        "cap": cap,
        "device": device,
    }
    folder.mkdir(parents=True)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, "--child", json.dumps(task)],
        env={**os.environ, **ENVIRONMENT, **changes},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["no message"])[-1]
    return read_capture(Path((folder / "file").read_text()))


def compare(golden, candidate):
    """Greatest error of each metric, and what else came of two runs."""
    import numpy as np

    from pytest_msprobe.compare.judge import measure_noise

    noise = measure_noise(golden, candidate)
    pairs, rows = noise.pairs, noise.rows
    is_float = pairs.candidate.has_sums(pairs.new[rows])
    names = pairs.candidate.names(pairs.new[rows])
    found = {}
    for metric, errors in noise.errors.items():
        values = np.where(is_float, errors, 0.0)  # integers have none
        worst = int(values.argmax()) if len(values) else -1
        found[metric] = {
            "greatest": float(values[worst]) if len(values) else 0.0,
            "row": names[worst] if len(values) and values[worst] else "",
        }
    return {
        "key": candidate.header.key,
        "mode": "same" if candidate.header.key == golden.header.key else "cross",
        "threads": candidate.header.provenance["threads"],
        "attention": candidate.header.provenance["attention"],
        "rows": noise.judged,
        "unequal": len(rows),
        "rerouted": noise.rerouted,
        "integers": [n for n, f in zip(names, is_float, strict=True) if not f][:5],
        "metrics": found,
        "logprob": float(noise.tokens.largest),
        "flipped": noise.tokens.flipped,
    }


def measure(arguments, folder):
    """One line a model and variation."""
    names = arguments.variations or [
        name
        for name in VARIATIONS
        if name not in (GPU_ONLY if arguments.device == "cpu" else CPU_ONLY)
    ]
    lines = []
    for name in arguments.models:
        label = name.replace(" ", "-")
        model = write_model(folder / f"{label}.model", MODELS[name][0])
        first = capture(folder / label, name, model, arguments.device, ({}, {}, None))
        if isinstance(first, str):
            raise SystemExit(f"{name}: {first}")
        for number, variation in enumerate(names):
            place = folder / f"{label}.{number}"
            other = capture(place, name, model, arguments.device, VARIATIONS[variation])
            line = {"model": name, "variation": variation}
            if isinstance(other, str):
                line["error"] = other
            else:
                line |= compare(first, other)
            lines.append(line)
            print(as_row(line), flush=True)
    return first.header.provenance, lines


def as_row(line):
    """A line of the table."""
    cells = [line["model"], line["variation"]]
    if "error" in line:
        return "| " + " | ".join([*cells, line["error"]]) + " |"
    cells += [line["mode"], str(line["rows"]), str(line["unequal"])]
    cells += [f"{m['greatest']:.2g}" for m in line["metrics"].values()]
    cells += [f"{line['logprob']:.2g}", "yes" if line["flipped"] else "no"]
    return "| " + " | ".join(cells) + " |"


def main():
    arguments = parse_arguments()
    if arguments.child:
        run_child(arguments.child)
        return
    print(
        "| model | what differs | key | rows | unequal | rel_l2 | max | min | norm "
        "| mean | logprob | flip |"
    )
    print("| --- " * 12 + "|")
    with tempfile.TemporaryDirectory() as folder:
        provenance, lines = measure(arguments, Path(folder))
    if arguments.save:
        result = {
            "what": "greatest errors between clean runs, level mix, prompts of "
            f"{PROMPTS} tokens, {TOKENS} tokens generated",
            "provenance": provenance,
            "python": platform.python_version(),
            "date": time.strftime("%Y-%m-%d"),
            "lines": lines,
        }
        arguments.save.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
