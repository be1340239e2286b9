# SPDX-License-Identifier: Apache-2.0
"""What a capture costs: decode steps with and without one, side by side in one process.

    python benchmarks/overhead.py [--model DIR] [--rounds N] [--save FILE]

Variants alternate within a process, so that a slow spell of the machine hits all of
them; the figures are medians over the rounds and ratios to the same engine without a
capture. Writing the files happens when a capture ends and is shown apart.
"""

import argparse
import dataclasses
import json
import os
import platform
import statistics
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
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "MSPROBE_ATTACH": "1",
}
LEVELS = ("L0", "L1", "mix")
SHORT, LONG = 1, 33


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(ROOT / ".demo" / "tiny-qwen2"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--save", type=Path)
    return parser.parse_args()


def control(llm, action, **arguments):
    """One reply of the worker's control method."""
    payload = json.dumps({"action": action, **arguments})
    (reply,) = llm.collective_rpc("msprobe_control", args=(payload,))
    if not reply["ok"]:
        raise SystemExit(reply["error"])
    return reply


def generation_s(llm, tokens):
    """Seconds of one greedy generation of a fixed length."""
    from vllm import SamplingParams

    parameters = SamplingParams(
        max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False
    )
    prompt = {"prompt_token_ids": [0, *range(20, 36)]}
    start = time.perf_counter()
    llm.generate([prompt], parameters, use_tqdm=False)
    return time.perf_counter() - start


def decode_step_ms(llm):
    """Milliseconds of one decode step: a long generation less a short one."""
    generation_s(llm, 2)
    short, long = generation_s(llm, SHORT), generation_s(llm, LONG)
    return (long - short) / (LONG - SHORT) * 1e3


def measure(llm, rounds):
    """Milliseconds a step and what was recorded, by variant."""
    from pytest_msprobe.config.debugger_config import DebuggerConfig

    samples = {"off": [], **{level: [] for level in LEVELS}}
    replies, stops = {}, {level: [] for level in LEVELS}
    for _ in range(rounds):
        samples["off"].append(decode_step_ms(llm))
        for level in LEVELS:
            with tempfile.TemporaryDirectory() as folder:
                config = dataclasses.asdict(DebuggerConfig(level=level))
                control(llm, "start", config=config, folder=folder)
                samples[level].append(decode_step_ms(llm))
                start = time.perf_counter()
                replies[level] = control(llm, "stop", test="overhead")
                seconds = time.perf_counter() - start
                stops[level].append(seconds / replies[level]["steps"] * 1e3)
    return samples, replies, stops


def main():
    arguments = parse_arguments()
    os.environ.update(ENVIRONMENT)
    import torch
    from vllm import LLM

    from pytest_msprobe.compat import vllm_version
    from pytest_msprobe.engine.environment import numerics_key

    llm = LLM(
        model=arguments.model,
        enforce_eager=True,
        max_model_len=128,
        max_num_seqs=1,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    samples, replies, stops = measure(llm, arguments.rounds)
    base = statistics.median(samples["off"])
    rows = []
    for name, values in samples.items():
        reply = replies.get(name)
        steps = reply["steps"] if reply else 1
        rows.append(
            {
                "variant": name,
                "step_ms": round(statistics.median(values), 3),
                "ratio": round(statistics.median(values) / base, 2),
                "rows_a_step": reply["rows"] // steps if reply else 0,
                "measured_a_step": reply["measured"] // steps if reply else 0,
                "bytes_a_step": reply["bytes"] // steps if reply else 0,
                "written_later_ms_a_step": (
                    round(statistics.median(stops[name]), 2) if reply else 0.0
                ),
            }
        )
    result = {
        "what": "decode, batch 1, tiny Qwen2 (4 layers, hidden 128, bfloat16)",
        "device": numerics_key("cpu"),
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "vllm": vllm_version(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        "rounds": arguments.rounds,
        "rows": rows,
    }
    print("| variant | ms a step | ratio | rows | measured | bytes | written later |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        print("| " + " | ".join(str(value) for value in row.values()) + " |")
    if arguments.save:
        arguments.save.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
