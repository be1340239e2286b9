# SPDX-License-Identifier: Apache-2.0
"""What a capture costs: steps of a real engine with and without one, side by side.

    python benchmarks/overhead.py [--model DIR | --shape NAME] [--rounds N]
        [--variants NAME ...] [--tokens N] [--plain] [--msprobe DIR] [--save FILE]

Every tool has a process and an engine of its own; they take turns, so that a slow spell
of the machine hits all of them. Figures are medians over the rounds, and ratios to the
engine that has no tool installed. A golden's default capture records L0 of a prefill
and two decode steps: of the decode steps timed, only these. Writing files happens when
a capture ends and is not in the figures, for msProbe as little as it allows: it writes
while the model runs. Rows, rows measured and bytes of the dump are those of a recorded
step.
With --msprobe, the real tool (mindstudio-probe, in the site-packages given) runs as
well, put around execute_model as its guide for vLLM says: its guide does so with the
class of model runner V1, here it is done with that of V2 as well.
"""

import argparse
import contextlib
import importlib
import json
import os
import platform
import statistics
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
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "MSPROBE_LOG_LEVEL": "4",
}
GOLDEN = "golden's default"
OURS = {
    GOLDEN: {"level": "L0"},
    "L0": {"level": "L0"},
    "L0, each tensor at once": {"level": "L0", "pending_bytes": 0},
    "L0, md5": {"level": "L0", "summary_mode": "md5"},
    "L1": {"level": "L1"},
    "L1, replaced": {"level": "L1", "function_hooks": "replace"},
    "mix": {"level": "mix"},
    "mix, replaced": {"level": "mix", "function_hooks": "replace"},
    "mix, md5": {"level": "mix", "summary_mode": "md5"},
}
SHAPES = {
    "qwen2.5-0.5b": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    },
    "llama-8b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e5,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    },
}
SHORT = 1  # tokens of the generation that is taken off a longer one
CACHE_BYTES = 2 << 30
RUNNERS = ("vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.model_runner")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(ROOT / ".demo" / "tiny-qwen2"))
    parser.add_argument("--shape", choices=SHAPES, help="dummy weights of this shape")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--prefill", type=int, default=3000, help="tokens, 0 for none")
    parser.add_argument("--variants", nargs="*", choices=OURS, default=list(OURS))
    parser.add_argument("--tokens", type=int, default=32, help="decode steps timed")
    parser.add_argument("--plain", action="store_true", help="no stance, no idle")
    parser.add_argument("--msprobe", help="site-packages that hold the real msProbe")
    parser.add_argument("--save", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


# A process with an engine -------------------------------------------------------------


def start_engine(arguments):
    import torch
    from vllm import LLM

    options = {"model": arguments.model, "max_model_len": arguments.prefill + 128}
    if arguments.shape:
        folder = tempfile.mkdtemp()
        text = json.dumps(SHAPES[arguments.shape])
        Path(folder, "config.json").write_text(text, encoding="utf-8")
        options.update(model=folder, load_format="dummy", skip_tokenizer_init=True)
    else:  # the demo model has fewer positions; what it says does not matter here
        options["hf_overrides"] = {"max_position_embeddings": 8192}
    if torch.cuda.is_available():
        # No engine looks how much memory the others have left.
        options["gpu_memory_utilization"] = 0.01
        options["kv_cache_memory_bytes"] = CACHE_BYTES
    return LLM(
        enforce_eager=True,
        max_num_seqs=max(arguments.batches),
        max_num_batched_tokens=arguments.prefill + 128,
        enable_prefix_caching=False,
        disable_log_stats=True,
        **options,
    )


def generation_s(llm, tokens, *, batch=1, prompt=16):
    """Seconds of one greedy generation of a fixed length."""
    from vllm import SamplingParams

    parameters = SamplingParams(
        max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False
    )
    ids = [20 + i % 200 for i in range(prompt)]
    prompts = [{"prompt_token_ids": [n + 1, *ids]} for n in range(batch)]
    start = time.perf_counter()
    llm.generate(prompts, parameters, use_tqdm=False)
    return time.perf_counter() - start


def milliseconds(llm, what, number, steps):
    """Milliseconds of one step: a decode step of a batch, or a prefill."""
    if what == "prefill":
        generation_s(llm, 1, prompt=number)
        return generation_s(llm, 1, prompt=number) * 1e3
    generation_s(llm, 2, batch=number)
    short = generation_s(llm, SHORT, batch=number)
    return (generation_s(llm, SHORT + steps, batch=number) - short) / steps * 1e3


def control(llm, action, **arguments):
    """One reply of our worker's control method."""
    payload = json.dumps({"action": action, **arguments})
    (reply,) = llm.collective_rpc("msprobe_control", args=(payload,))
    if not reply["ok"]:
        raise SystemExit(reply["error"])
    return reply


def measure_ours(llm, variant, *what):
    import dataclasses

    from pytest_msprobe.config.debugger_config import DebuggerConfig
    from pytest_msprobe.config.settings import ALL_STEPS, DEFAULT_DECODE_STEPS

    if variant == "idle":
        return {"ms": milliseconds(llm, *what)}
    with tempfile.TemporaryDirectory() as folder:
        config = dataclasses.asdict(DebuggerConfig(**OURS[variant]))
        steps = DEFAULT_DECODE_STEPS if variant == GOLDEN else ALL_STEPS
        control(llm, "start", config=config, folder=folder, decode_steps=steps)
        ms = milliseconds(llm, *what)
        start = time.perf_counter()
        reply = control(llm, "stop", test="overhead")
        seconds = time.perf_counter() - start
    steps = reply["steps"]
    return {
        "ms": ms,
        **{name: reply[name] // steps for name in ("rows", "measured", "bytes")},
        "written_later_ms": seconds / steps * 1e3,
    }


def install_msprobe(level, folder):
    """Puts the real tool around execute_model, as its guide says."""
    config = {
        "task": "statistics",
        "dump_path": f"{folder}/dump",
        "rank": [],
        "step": [],
        "level": level,
        "statistics": {"scope": [], "list": [], "data_mode": ["all"]},
    }
    path = Path(folder, "config.json")
    path.write_text(json.dumps(config), encoding="utf-8")
    from msprobe.pytorch import PrecisionDebugger, seed_all

    state = {"is_on": False}

    def put_around(runner):
        first, execute = runner.__init__, runner.execute_model

        def begin(self, *args, **kwargs):
            seed_all(mode=True)
            self.debugger = PrecisionDebugger(config_path=str(path))
            first(self, *args, **kwargs)

        def execute_model(self, *args, **kwargs):
            if not state["is_on"]:
                return execute(self, *args, **kwargs)
            self.debugger.start(model=self.model)
            try:
                return execute(self, *args, **kwargs)
            finally:
                self.debugger.stop()
                self.debugger.step()

        runner.__init__, runner.execute_model = begin, execute_model

    for name in RUNNERS:
        with contextlib.suppress(ImportError):
            put_around(importlib.import_module(name).GPUModelRunner)
    return state


def runner_of(llm):
    """The model runner of an engine in this process."""
    core = llm.llm_engine.engine_core.engine_core
    return core.model_executor.driver_worker.worker.model_runner


def install_stance(llm):
    """Runs steps with functions compiled by plain torch.compile run eagerly."""
    import torch

    runner = runner_of(llm)
    execute, sample = runner.execute_model, runner.sample_tokens

    def eager(function):
        def run(*args, **kwargs):
            with torch.compiler.set_stance("force_eager"):
                return function(*args, **kwargs)

        return run

    runner.execute_model, runner.sample_tokens = eager(execute), eager(sample)


def serve(arguments):
    """Answers the parent's requests, a line each."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not get between the answers
    tool, _, level = arguments.child.partition(" ")
    state, folder = None, tempfile.mkdtemp()
    if tool == "msprobe":
        sys.path.append(arguments.msprobe)
        state = install_msprobe(level, folder)
    llm = start_engine(arguments)
    if tool == "stance":
        install_stance(llm)
    answers.write(json.dumps(facts(llm)) + "\n")
    answers.flush()
    for line in sys.stdin:
        request = json.loads(line)
        what = request["what"], request["number"], arguments.tokens
        if tool == "ours":
            reply = measure_ours(llm, request["variant"], *what)
        else:
            if state is not None:
                state["is_on"] = True
            reply = {"ms": milliseconds(llm, *what)}
            if state is not None:
                state["is_on"] = False
        answers.write(json.dumps(reply) + "\n")
        answers.flush()


def facts(llm):
    """What the figures were measured with."""
    import torch
    import vllm

    device = platform.processor() or platform.machine()
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    return {
        "device": device,
        "threads": torch.get_num_threads(),
        "vllm": vllm.__version__,
        "runner": type(runner_of(llm)).__module__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


# The parent ---------------------------------------------------------------------------


class Child:
    """A process with an engine and at most one tool."""

    def __init__(self, tool):
        self.tool = tool
        plugins = "msprobe" if tool == "ours" else "none"
        command = [sys.executable, __file__, "--child", tool, *sys.argv[1:]]
        self.process = subprocess.Popen(
            command,
            env={
                **os.environ,
                **ENVIRONMENT,
                "VLLM_PLUGINS": plugins,
                **({"MSPROBE_ATTACH": "1"} if tool == "ours" else {}),
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def facts(self):
        """What it measures with, once its engine has started."""
        return self._read()

    def _read(self):
        line = self.process.stdout.readline()
        if not line:
            message = f"the process of {self.tool} ended: see what it printed above"
            raise SystemExit(message)
        return json.loads(line)

    def ask(self, **request):
        """The child's reply to a request."""
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._read()

    def close(self):
        """Ends the child."""
        self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(60)
        self.process.kill()


def summarize(samples):
    """One row a variant and kind of step."""
    base = {}
    for (name, what, number), replies in samples.items():
        if name == "off":
            base[what, number] = statistics.median(r["ms"] for r in replies)
    rows = []
    for (name, what, number), replies in samples.items():
        ms = statistics.median(r["ms"] for r in replies)
        # Pairs of one round were measured one behind the other.
        offs = samples["off", what, number]
        ratio = statistics.median(
            reply["ms"] / off["ms"] for reply, off in zip(replies, offs, strict=True)
        )
        rows.append(
            {
                "step": f"{what} {number}",
                "variant": name,
                "ms": round(ms, 3),
                "ratio": round(ratio, 2),
                "added_ms": round(ms - base[what, number], 3),
                "rows": replies[0].get("rows", 0),
                "measured": replies[0].get("measured", 0),
                "bytes": replies[0].get("bytes", 0),
                "written_later_ms": round(replies[0].get("written_later_ms", 0.0), 2),
            }
        )
    return sorted(rows, key=lambda row: row["step"])


def run(arguments):
    """After each round, replies by variant and kind of step, and what was measured."""
    tools = {"off": ("none", "off")}
    names = arguments.variants
    if not arguments.plain:
        tools["stance"] = ("stance", "stance")
        names = ["idle", *names]
    tools |= {name: ("ours", name) for name in names}
    if arguments.msprobe:
        tools |= {f"msProbe {n}": (f"msprobe {n}", n) for n in ("L0", "mix")}
    children = {}
    for tool, _ in tools.values():
        if tool not in children:
            children[tool] = Child(tool)
    found = {tool: child.facts() for tool, child in children.items()}
    steps = [("decode", batch) for batch in arguments.batches]
    if arguments.prefill:
        steps.append(("prefill", arguments.prefill))
    samples = {}
    for _ in range(arguments.rounds):
        for what, number in steps:
            for name, (tool, variant) in tools.items():
                reply = children[tool].ask(variant=variant, what=what, number=number)
                samples.setdefault((name, what, number), []).append(reply)
        yield samples, found["none"]
    for child in children.values():
        child.close()


def save(arguments, result):
    if arguments.save:
        arguments.save.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def main():
    arguments = parse_arguments()
    if arguments.child:
        serve(arguments)
        return
    for number, (samples, with_what) in enumerate(run(arguments), 1):
        result = {
            "model": arguments.shape or Path(arguments.model).name,
            **with_what,
            "date": time.strftime("%Y-%m-%d"),
            "rounds": number,
            "rows": summarize(samples),
        }
        save(arguments, result)  # whatever becomes of the next round
    print("| " + " | ".join(result["rows"][0]) + " |")
    print("| --- " * len(result["rows"][0]) + "|")
    for row in result["rows"]:
        print("| " + " | ".join(str(value) for value in row.values()) + " |")


if __name__ == "__main__":
    main()
