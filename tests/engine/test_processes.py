# SPDX-License-Identifier: Apache-2.0
"""Two runs in separate processes, and the edit of msProbe's own guide."""

import json
import os
import subprocess
import sys

import pytest
import tools

from pytest_msprobe.dump.capture import read_capture

CAPTURE = """
import sys
from pathlib import Path
import tools
llm = tools.start()
for level in ("L0", "mix"):
    print(tools.capture(llm, Path(sys.argv[1]), level=level).path)
"""


def run_python(program, *arguments, **environment):
    """Runs a program in a process of its own; returns what it printed.

    Args:
        program: Its text; the modules of the tests can be imported.
        arguments: Its command line.
        environment: Variables; PYTHONPATH stands before what is there already.
    """
    places = (environment.pop("PYTHONPATH", ""), tools.ROOT / "tests",
              os.environ.get("PYTHONPATH", ""))  # fmt: skip
    path = os.pathsep.join(str(place) for place in places if place)
    variables = tools.clean_environment(
        **{**tools.ENVIRONMENT, "PYTHONPATH": path, **environment}
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, *map(str, arguments)],
        env=variables,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def test_two_processes_are_bit_identical(demo_model, tmp_path):
    """Every judged row has the same checksum in two processes, at L0 and mix."""
    runs = []
    for name in ("one", "two"):
        lines = run_python(CAPTURE, tmp_path / name)
        runs.append([read_capture(tmp_path / name / p.split("/")[-2] / p.split("/")[-1])
                     for p in lines if p.endswith(".jsonl")])  # fmt: skip

    for first, second in zip(*runs, strict=True):
        verdict = tools.verdict_of(first, second)
        assert verdict.status == "pass"
        assert verdict.equal == verdict.judged > 500
        assert verdict.missing == verdict.extra == 0
        assert verdict.changes == []
        assert first.header.left_out == second.header.left_out


EDIT = '''
import importlib.abc, importlib.machinery, sys

NAME = "vllm.v1.worker.gpu_model_runner"
INIT = """
        ################################ msprobe ################################
        from pytest_msprobe import PrecisionDebugger, seed_all
        seed_all(mode=True)
        self.debugger = PrecisionDebugger(config_path={config!r})
        ################################ msprobe ################################
"""

def edit(source):
    """The guide's edit of GPUModelRunner, applied to vLLM's own source."""
    head = source.index("class GPUModelRunner(")
    init = source.index("def __init__(", head)
    body = source.index(":\\n", source.index("device: torch.device", init)) + 1
    source = source[:body] + INIT.format(config=sys.argv[1]) + source[body:]
    begin = source.index("    def execute_model(", head)
    start = source.index(":\\n", source.index(") ->", begin)) + 2
    end = source.index("\\n    def ", start)
    lines = source[start:end].rstrip().split("\\n")
    wrapped = ["        if hasattr(self, 'debugger'):",
               "            self.debugger.start(model=self.model)",
               "        try:"]
    wrapped += ["    " + line if line else "" for line in lines]
    wrapped += ["        finally:",
                "            if hasattr(self, 'debugger'):",
                "                self.debugger.stop()",
                "                self.debugger.step()"]
    return source[:start] + "\\n".join(wrapped) + "\\n" + source[end:]

class Editor(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != NAME:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        loader = spec.loader
        original = loader.get_source(name)
        loader.get_code = lambda _name: compile(edit(original), spec.origin, "exec")
        return spec

sys.meta_path.insert(0, Editor())
import tools
llm = tools.start()
tools.generate(llm, [tools.PROMPT])
print("generated")
'''


@pytest.mark.parametrize("level", ["mix"])
def test_the_guides_own_edit_works_as_written(demo_model, tmp_path, level):
    """GPUModelRunner edited as msProbe's guide says dumps with our package instead."""
    config = tmp_path / "config.json"
    config.write_text(
        json.dumps(
            {**tools.GUIDE, "dump_path": str(tmp_path / "data_dump"), "level": level}
        )
    )

    assert run_python(EDIT, config)[-1] == "generated"

    steps = sorted((tmp_path / "data_dump").iterdir())
    recorded = []
    for step in steps:
        (rank,) = step.iterdir()
        assert rank.name == "rank0"
        recorded.append(json.loads((rank / "dump.json").read_text())["data"])
        assert json.loads((rank / "construct.json").read_text())
        assert json.loads((rank / "stack.json").read_text())
    full = [data for data in recorded if data]
    assert len(full) == 3
    for data in full:
        assert "Module.model.Qwen2Model.forward.0" in data
        assert "Module.model.layers.3.mlp.Qwen2MLP.forward.0" in data
        assert "Vllm.unified_attention_with_output.3.forward" in data
        assert "_C.rotary_embedding.0.forward" in data
        assert "Module.logits_processor.LogitsProcessor.forward.0" in data
    shapes = [
        data["Module.model.norm.RMSNorm.forward.0"]["output"][0]["shape"]
        for data in full
    ]
    assert shapes == [[25, 128], [1, 128], [1, 128]]
