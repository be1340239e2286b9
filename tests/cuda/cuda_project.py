# SPDX-License-Identifier: Apache-2.0
"""A user's project with goldens, run by pytest in processes of their own on a GPU."""

import json
import re
import subprocess
import sys

import tools

# Not in this build of vLLM; and reductions go through NCCL, nothing of vLLM's own.
VARIABLES = {"VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_ALLREDUCE_USE_SYMM_MEM": "0"}
PLANTER = """
class Planter:
    def msprobe_plant(self, ranks, factor):
        layer = self.model_runner.get_model().model.layers[2].mlp.down_proj
        original = type(layer).forward
        def forward(*args, **kwargs):
            result = original(layer, *args, **kwargs)
            if layer.tp_rank in ranks:
                result[0].mul_(factor)
            return result
        layer.forward = forward
        return True
    def msprobe_heal(self):
        del self.model_runner.get_model().model.layers[2].mlp.down_proj.forward
        return True
"""
PLANTED = "model.layers.2.mlp.down_proj"
# The second test changes the layer where PLANT is set.
TESTS = f"""
import os
from vllm import SamplingParams

GREEDY = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)

def test_clean(msprobe_engine):
    msprobe_engine.generate([{tools.PROMPT!r}], GREEDY, use_tqdm=False)

def test_planted(msprobe_engine, msprobe):
    if os.environ.get("PLANT"):
        msprobe_engine.collective_rpc("msprobe_plant", args=([0, 1], 1.5))
    with msprobe.capture(msprobe_engine):
        msprobe_engine.generate([{tools.PROMPT!r}], GREEDY, use_tqdm=False)
"""


def write_project(folder, model, *, size=1, golden=None):
    """Writes a configuration and two tests.

    Args:
        folder: Where.
        model: Folder of the checkpoint.
        size: Tensor-parallel size.
        golden: Section golden of the configuration.
    """
    (folder / "msprobe_planter.py").write_text(PLANTER)
    (folder / "test_project.py").write_text(TESTS)
    engine = {
        "model": str(model),
        "dtype": "bfloat16",
        "max_model_len": 128,
        "gpu_memory_utilization": 0.1,
        "tensor_parallel_size": size,
        "disable_custom_all_reduce": True,
        "worker_extension_cls": "msprobe_planter.Planter",
        "env": VARIABLES,
    }
    settings = {"engine": engine, "golden": golden or {}}
    (folder / "msprobe.yaml").write_text(json.dumps(settings))


def run(folder, *arguments, **variables):
    """Runs pytest there: (exit code, outcome of each test, output)."""
    environment = tools.clean_environment(**{**tools.ENVIRONMENT, **variables})
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "pytest", "-p", "no:cacheprovider",
         "-q", "-rA", "--msprobe-config", "msprobe.yaml", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )  # fmt: skip
    line = re.compile(r"^(PASSED|FAILED|ERROR) test_project\.py::(\w+)", re.MULTILINE)
    outcomes = {name: outcome for outcome, name in line.findall(done.stdout)}
    return done.returncode, outcomes, done.stdout + done.stderr[-3000:]
