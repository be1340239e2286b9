# SPDX-License-Identifier: Apache-2.0
"""Tensor parallelism on two GPUs: ranks, shards, and one golden for every size.

pytest tests/cuda/test_cuda_parallel.py -p no:cacheprovider
"""

import cuda_project
import engines
import pytest
import tools

torch = pytest.importorskip("torch", reason="torch missing")
if torch.cuda.device_count() < 2:
    pytest.skip("no two CUDA devices here", allow_module_level=True)

from pytest_msprobe.compare.ranks import (  # noqa: E402
    combine_ranks,
    find_disagreement,
    without_sharded,
)
from pytest_msprobe.dump.capture import read_capture  # noqa: E402
from pytest_msprobe.dump.layout import ranks_of, steps_of  # noqa: E402
from pytest_msprobe.engine.client import ask_workers, converse  # noqa: E402

ARGUMENTS = {"gpu_memory_utilization": 0.1}


@pytest.fixture(scope="module")
def single(demo_model, tmp_path_factory):
    """A capture of an engine on one GPU."""
    with engines.started(
        demo_model, variables=cuda_project.VARIABLES, **ARGUMENTS
    ) as llm:
        return tools.capture(llm, tmp_path_factory.mktemp("single"))


@pytest.fixture(scope="module")
def parallel(single, demo_model, tmp_path_factory):
    """An engine with a worker on each GPU, whose core is a process of its own."""
    folder = tmp_path_factory.mktemp("planter")
    (folder / "msprobe_planter.py").write_text(cuda_project.PLANTER)
    variables = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", **cuda_project.VARIABLES}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        with engines.started(
            demo_model,
            variables=variables,
            tensor_parallel_size=2,
            disable_custom_all_reduce=True,
            worker_extension_cls="msprobe_planter.Planter",
            **ARGUMENTS,
        ) as llm:
            yield llm


@pytest.fixture(scope="module")
def ranks(parallel, tmp_path_factory):
    """The captures of both ranks."""
    return engines.capture_ranks(parallel, tmp_path_factory.mktemp("ranks"))


def test_both_workers_run_v2(parallel):
    """Each GPU has a worker of its own, with model runner V2."""
    replies = converse(parallel, ask_workers("status"))

    assert [reply["rank"] for reply in replies] == [0, 1]
    assert [reply["runner_version"] for reply in replies] == [2, 2]
    assert len({reply["pid"] for reply in replies}) == 2


def test_ranks_repeat_their_own_numbers(parallel, ranks, tmp_path):
    """A second capture of each rank has the same checksum in every judged row."""
    again = engines.capture_ranks(parallel, tmp_path)

    for number, step in steps_of(tmp_path).items():
        assert list(ranks_of(step)) == ["rank0", "rank1"], number
    assert len(steps_of(tmp_path)) == 3
    for first, second in zip(ranks, again, strict=True):
        verdict = tools.verdict_of(first, second)
        assert verdict.status == "pass"
        assert verdict.equal == verdict.judged > 200
        assert verdict.missing == verdict.extra == 0


def test_kernels_and_reductions_are_recorded(parallel, tmp_path):
    """At mix both ranks have vLLM's kernels and its all-reduce."""
    files = engines.capture_ranks(parallel, tmp_path, level="mix")

    for file in files:
        names = " ".join(call.c for _, call in file.calls())
        for kernel in ("unified_attention_with_output", "all_reduce", "rotary"):
            assert kernel in names, kernel
    assert find_disagreement(files) is None


def test_copies_agree_and_shards_add_up(single, ranks):
    """NCCL leaves equal copies; shards combine to the rows of one GPU."""
    marked = [
        slot for _, call in ranks[0].calls() for slot in call.p if not call.p[slot]
    ]
    assert len(marked) > 40
    assert find_disagreement(ranks) is None

    golden, candidate = without_sharded(combine_ranks([single]), combine_ranks(ranks))
    verdict = tools.verdict_of(golden, candidate, mode="cross")
    assert verdict.is_green, verdict
    assert verdict.missing == verdict.extra == 0
    assert verdict.judged > 200
    tokens = [request.tokens for request in candidate.header.requests]
    assert tokens == [request.tokens for request in single.header.requests]


def test_a_rank_that_drifts_away_is_named(parallel, tmp_path):
    """A fault on one GPU behind an all-reduce is a finding of its own."""
    assert parallel.collective_rpc("msprobe_plant", args=([1], 1.01)) == [True, True]
    try:
        files = engines.capture_ranks(parallel, tmp_path)
    finally:
        parallel.collective_rpc("msprobe_heal")

    found = find_disagreement(files)
    assert found is not None
    assert found.row.call.startswith(f"Module.{cuda_project.PLANTED}.")
    assert 0.005 < found.error < 0.02


def test_one_golden_judges_one_gpu_and_two(demo_model, tmp_path):
    """A tp_invariant golden of one GPU passes on two, and names a fault there."""
    golden = {"tp_invariant": True}
    cuda_project.write_project(tmp_path, demo_model, golden=golden)
    code, outcomes, text = cuda_project.run(tmp_path, "--msprobe-update=new")
    assert (code, set(outcomes.values())) == (0, {"PASSED"}), text

    cuda_project.write_project(tmp_path, demo_model, size=2, golden=golden)
    code, outcomes, text = cuda_project.run(tmp_path, PLANT="1")
    assert code == 1, text
    assert outcomes == {"test_clean": "PASSED", "test_planted": "FAILED"}, text
    assert f"test_planted - {cuda_project.PLANTED}: first to" in text
    combined = (tmp_path / ".msprobe" / "runs").rglob("capture.combined.jsonl")
    sizes = {read_capture(path).header.provenance["ranks"] for path in combined}
    assert sizes == {1, 2}
