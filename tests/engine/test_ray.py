# SPDX-License-Identifier: Apache-2.0
"""Engines whose workers are Ray's.

    pip install ray
    pytest tests/engine/test_ray.py

VLLM's CPU platform names no resource of Ray's and so has no Ray executor; here an
out-of-tree platform, which is that of the CPU with such a name, lets both of vLLM's
Ray executors run.
"""

import engines
import pytest
import tools
from test_processes import run_python

from pytest_msprobe.compare.ranks import find_disagreement
from pytest_msprobe.compat import has_module
from pytest_msprobe.dump.capture import read_capture
from pytest_msprobe.errors import EngineError

needs_ray = pytest.mark.skipif(not has_module("ray"), reason="Ray is not installed")

PLATFORM = """
from vllm.platforms.cpu import CpuPlatform

class RayCpuPlatform(CpuPlatform):
    ray_device_key = "GPU"

def register():
    return "msprobe_ray_platform.RayCpuPlatform"
"""
ENTRY_POINT = "[vllm.platform_plugins]\nray_cpu = msprobe_ray_platform:register\n"
METADATA = "Metadata-Version: 2.1\nName: msprobe-ray-platform\nVersion: 1\n"

CAPTURE = """
import os, sys
from pathlib import Path
import engines, ray
cluster = ray.init(
    num_cpus=2, num_gpus=2, include_dashboard=False, log_to_driver=False
)
# Where the engine core is a process of its own, it is to use the same cluster.
os.environ["RAY_ADDRESS"] = cluster.address_info["address"]
with engines.started(
    distributed_executor_backend="ray", tensor_parallel_size=int(sys.argv[2])
) as llm:
    for file in engines.capture_ranks(llm, Path(sys.argv[1]) / "capture"):
        print(file.path)
"""


@pytest.fixture
def platform(tmp_path):
    """A folder that makes vLLM's CPU platform one that Ray can place workers on."""
    (tmp_path / "msprobe_ray_platform.py").write_text(PLATFORM)
    installed = tmp_path / "msprobe_ray_platform-1.dist-info"
    installed.mkdir()
    (installed / "entry_points.txt").write_text(ENTRY_POINT)
    (installed / "METADATA").write_text(METADATA)
    return tmp_path


@needs_ray
@pytest.mark.parametrize(
    ("newer", "size", "variables"), [("1", 2, engines.PARALLEL), ("0", 1, {})]
)
def test_workers_of_ray(engine, platform, tmp_path, newer, size, variables):
    """Workers of either Ray executor record what a worker in this process does."""
    run_python(
        CAPTURE,
        tmp_path,
        size,
        PYTHONPATH=str(platform),
        VLLM_USE_RAY_V2_EXECUTOR_BACKEND=newer,
        **variables,
    )

    files = [read_capture(tmp_path / "capture" / f"capture.rank{rank}.jsonl")
             for rank in range(size)]  # fmt: skip
    assert [file.header.rank for file in files] == list(range(size))
    assert {file.header.world for file in files} == {size}
    reference = tools.capture(engine, tmp_path)
    tokens = [request.tokens for request in reference.header.requests]
    for file in files:
        assert [request.tokens for request in file.header.requests] == tokens
    if size > 1:
        assert find_disagreement(files) is None
    else:
        verdict = tools.verdict_of(reference, files[0])
        assert (verdict.status, verdict.missing, verdict.extra) == ("pass", 0, 0)
        assert verdict.equal == verdict.judged > 500


REFUSED = """
import tools
try:
    tools.start(distributed_executor_backend="ray")
except Exception as error:
    print(type(error).__name__, error)
"""


@needs_ray
def test_the_cpu_platform_has_no_ray(demo_model):
    """Without such a platform the engine does not start, and vLLM's reason is said."""
    *_, line = run_python(REFUSED)

    assert line.startswith("EngineError vLLM ")
    assert "could not start the engine: current platform cpu does not support" in line


@pytest.mark.skipif(has_module("ray"), reason="Ray is installed")
def test_missing_ray_is_said(demo_model):
    """Where Ray is not installed one line says so, without what pydantic adds."""
    with pytest.raises(EngineError) as caught:
        tools.start(demo_model, distributed_executor_backend="ray")

    reason = str(caught.value).partition("arguments:")[0]
    assert "could not start the engine: " in reason
    assert "ray" in reason.lower()
    assert "pydantic" not in reason
    assert "input_value" not in reason
