# SPDX-License-Identifier: Apache-2.0
"""A golden on CUDA, written and judged by pytest in processes of their own.

pytest tests/cuda/test_cuda_golden.py -p no:cacheprovider
"""

import json

import cuda_project
import pytest

torch = pytest.importorskip("torch", reason="torch missing")
if not torch.cuda.is_available():
    pytest.skip("no CUDA device here", allow_module_level=True)


def test_a_golden_round_trip(demo_model, tmp_path):
    """What one process wrote another one passes bit for bit; a planted fault fails."""
    cuda_project.write_project(tmp_path, demo_model)

    code, outcomes, text = cuda_project.run(tmp_path, "--msprobe-update=new")
    assert (code, set(outcomes.values())) == (0, {"PASSED"}), text
    goldens = sorted((tmp_path / "golden").rglob("*.jsonl"))
    assert [path.parent.name for path in goldens] == ["test_clean", "test_planted"]
    assert goldens[0].name.startswith("cuda-sm")

    code, outcomes, text = cuda_project.run(tmp_path, PLANT="1")
    assert code == 1, text
    assert outcomes == {"test_clean": "PASSED", "test_planted": "FAILED"}, text
    assert f"test_planted - {cuda_project.PLANTED}: first to" in text
    paths = (tmp_path / ".msprobe" / "runs").rglob("test_clean/verdict.json")
    verdicts = [json.loads(path.read_text()) for path in paths]
    (judged,) = (v for v in verdicts if v["judged"])
    assert judged["equal"] == judged["judged"] > 200
