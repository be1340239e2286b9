# SPDX-License-Identifier: Apache-2.0
"""Tensor and pipeline parallel engines on the CPU: ranks, places, agreement."""

import json
import subprocess
import sys

import engines
import pytest
import tools

from pytest_msprobe.compare.ranks import (
    combine_ranks,
    find_disagreement,
    without_sharded,
)
from pytest_msprobe.dump.capture import read_capture
from pytest_msprobe.dump.layout import ranks_of, steps_of
from pytest_msprobe.engine.client import METHOD, ask_workers, converse

pytest_plugins = ["pytester"]


@pytest.fixture(scope="module")
def single(engine, tmp_path_factory):
    """A capture with one rank."""
    return tools.capture(engine, tmp_path_factory.mktemp("single"))


@pytest.fixture(scope="module")
def parallel(single, demo_model):
    """An engine with two tensor-parallel workers."""
    with engines.started(variables=engines.PARALLEL, tensor_parallel_size=2) as llm:
        yield llm


@pytest.fixture(scope="module")
def ranks(parallel, tmp_path_factory):
    """The captures of both ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    return engines.capture_ranks(parallel, folder)


def test_every_rank_has_its_folder_and_its_capture(parallel, tmp_path):
    """Both ranks write every step, and a capture file each."""
    files = engines.capture_ranks(parallel, tmp_path, level="mix")

    assert [file.header.rank for file in files] == [0, 1]
    assert {file.header.world for file in files} == {2}
    for number, step in steps_of(tmp_path).items():
        assert list(ranks_of(step)) == ["rank0", "rank1"], number
    assert len(steps_of(tmp_path)) == 3


def test_two_captures_agree_rank_by_rank(parallel, ranks, tmp_path):
    """Each rank repeats its own numbers exactly; a golden per rank can be exact."""
    again = engines.capture_ranks(parallel, tmp_path)

    for first, second in zip(ranks, again, strict=True):
        verdict = tools.verdict_of(first, second)
        assert verdict.status == "pass"
        assert verdict.equal == verdict.judged > 500


def test_copies_agree_between_ranks(ranks):
    """What an all-reduce leaves on every rank is the same there, to the bit."""
    marked = [
        slot for _, call in ranks[0].calls() for slot in call.p if not call.p[slot]
    ]
    assert len(marked) > 50
    assert find_disagreement(ranks) is None


def test_shards_combine_to_the_capture_of_one_rank(single, ranks):
    """Rows of parallel layers add up to those of the unsharded model."""
    golden, candidate = without_sharded(combine_ranks([single]), combine_ranks(ranks))

    verdict = tools.verdict_of(golden, candidate, mode="cross")
    assert verdict.is_green, verdict
    assert verdict.missing == verdict.extra == 0
    assert verdict.judged > 200
    left_out = candidate.header.sharded
    assert all("act_fn" in name or ".attn." in name or "rotary" in name
               for name in left_out), left_out  # fmt: skip
    projections = [
        (call.c, slot)
        for _, call in candidate.calls()
        for slot in call.o
        if "qkv_proj" in call.c or "gate_up_proj" in call.c
    ]
    assert len(projections) == 2 * 4 * 3


def test_a_wrong_place_would_be_seen(single, ranks):
    """Halves swapped between ranks change the combined rows of that layer."""
    from pytest_msprobe.compare.ranks import relative_error

    right, swapped = combine_ranks(ranks), combine_ranks([ranks[0], ranks[0]])
    name = "Module.model.layers.1.mlp.gate_up_proj.MergedColumnParallelLinear.forward.0"

    def output(capture):
        calls = {call.c: call for _, call in reversed(list(capture.calls()))}
        return capture.tensors[calls[name].o["output.0"][1]]

    reference = output(combine_ranks([single]))
    assert relative_error(reference, output(right)) < 0.05
    assert relative_error(reference, output(swapped)) > 0.5


def test_replies_stay_aligned_after_an_error(parallel, tmp_path):
    """An action that fails on both ranks leaves no stale reply behind."""
    bad = json.dumps({"action": "start", "config": {"level": "L9"}})
    for _ in range(2):
        replies = parallel.collective_rpc(METHOD, args=(bad,))
        assert [reply["ok"] for reply in replies] == [False, False]

    status = converse(parallel, ask_workers("status"))
    assert [reply["rank"] for reply in status] == [0, 1]
    assert all(not reply["capturing"] for reply in status)
    assert len(engines.capture_ranks(parallel, tmp_path)) == 2


def test_an_error_on_one_rank_leaves_no_reply_behind(parallel, tmp_path):
    """Where only rank 1 refuses, each later call still gets its own replies."""
    start = {"action": "start", "config": {"level": "L0", "rank": [1]}}
    payload = json.dumps({**start, "folder": str(tmp_path)})
    first, second = (parallel.collective_rpc(METHOD, args=(payload,)) for _ in range(2))

    assert [reply["ok"] for reply in first] == [True, True]
    assert [reply["ok"] for reply in second] == [True, False]
    assert "already running" in second[1]["error"]
    status = converse(parallel, ask_workers("status"))
    assert [reply["rank"] for reply in status] == [0, 1]
    assert [reply["capturing"] for reply in status] == [False, True]
    converse(parallel, ask_workers("abandon", folder=str(tmp_path)))
    assert not any(r["capturing"] for r in converse(parallel, ask_workers("status")))


def test_one_rank_can_be_selected(parallel, tmp_path):
    """The key rank limits a capture to some ranks."""
    (file,) = engines.capture_ranks(parallel, tmp_path, rank=(1,))

    assert file.header.rank == 1
    assert all(
        list(ranks_of(step)) == ["rank1"] for step in steps_of(tmp_path).values()
    )


def test_a_rank_that_drifts_away_is_named(demo_model, tmp_path, monkeypatch):
    """A fault on one rank behind an all-reduce is a finding of its own."""
    plant = """
import torch
def msprobe_plant(self):
    model = self.model_runner.get_model()
    layer = model.model.layers[2].mlp.down_proj
    original = layer.forward
    def forward(*args, **kwargs):
        result = original(*args, **kwargs)
        if layer.tp_rank == 1:
            result[0].mul_(1.01)
        return result
    layer.forward = forward
    return True
class Planter:
    msprobe_plant = msprobe_plant
"""
    (tmp_path / "msprobe_planter.py").write_text(plant)
    monkeypatch.syspath_prepend(tmp_path)  # handed on to spawned processes
    with engines.started(
        variables=engines.PARALLEL,
        tensor_parallel_size=2,
        worker_extension_cls="msprobe_planter.Planter",
    ) as llm:
        assert llm.collective_rpc("msprobe_plant") == [True, True]
        files = engines.capture_ranks(llm, tmp_path / "capture")

    found = find_disagreement(files)
    assert found is not None
    assert found.row.call.startswith("Module.model.layers.2.mlp.down_proj.")
    assert found.row.slot == "output.0"
    assert 0.005 < found.error < 0.02


# The CPU worker of vLLM 0.32 skips the dummy run in which a later pipeline stage makes
# the buffers for what it receives, and then fails an assertion; this makes them.
BUFFERS = """
class Buffers:
    def msprobe_make_buffers(self):
        runner = self.model_runner
        if runner.intermediate_tensors is None:
            model = runner.get_model()
            runner.intermediate_tensors = model.make_empty_intermediate_tensors(
                batch_size=runner.max_num_tokens,
                dtype=runner.model_config.dtype,
                device=runner.device,
            )
        return True
"""


def test_pipeline_parallel(single, demo_model, tmp_path, monkeypatch):
    """Each stage records its own layers; together they are the whole model's."""
    (tmp_path / "msprobe_buffers.py").write_text(BUFFERS)
    monkeypatch.syspath_prepend(tmp_path)
    with engines.started(
        variables=engines.PARALLEL,
        pipeline_parallel_size=2,
        worker_extension_cls="msprobe_buffers.Buffers",
    ) as llm:
        assert llm.collective_rpc("msprobe_make_buffers") == [True, True]
        files = engines.capture_ranks(llm, tmp_path / "capture")

    layers = [
        {call.c.split(".")[3] for _, call in file.calls() if ".layers." in call.c}
        for file in files
    ]
    assert layers == [{"0", "1"}, {"2", "3"}]
    tokens = [request.tokens for request in files[1].header.requests]
    assert tokens == [request.tokens for request in single.header.requests]
    golden = {(call.c, step): call for step, call in single.calls()}
    equal = compared = 0
    for file in files:
        for step, call in file.calls():
            twin = golden[call.c, step]
            for slot, ids in call.o.items():
                # What one stage hands to the next is no output of the whole model.
                for own, its in zip(ids, twin.o.get(slot, []), strict=False):
                    compared += 1
                    equal += file.tensors[own].c == single.tensors[its].c
    assert equal == compared > 250


INVARIANT = """
capture: {{level: L0}}
engine:
  model: {model}
  dtype: bfloat16
  max_model_len: 128
  tensor_parallel_size: {size}
golden: {{tp_invariant: true}}
"""
TEST = f"""
from vllm import SamplingParams

def test_greedy(msprobe_engine):
    parameters = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)
    msprobe_engine.generate([{tools.PROMPT!r}], parameters, use_tqdm=False)
"""


def test_one_golden_judges_every_size(pytester, demo_model):
    """A tp_invariant golden of one rank judges two ranks, and says how."""
    pytester.makepyfile(test_it=TEST)
    outputs = []
    for size, update in ((1, ["--msprobe-update=new"]), (2, [])):
        pytester.makefile(
            ".yaml", msprobe=INVARIANT.format(model=demo_model, size=size)
        )
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "--msprobe-config", "msprobe.yaml",
             *update],
            cwd=pytester.path,
            env=tools.clean_environment(**{**tools.ENVIRONMENT, **engines.PARALLEL}),
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
        outputs.append(done.stdout)

    (golden,) = (pytester.path / "golden").rglob("*.jsonl")
    assert ".rank" not in golden.name
    runs = pytester.path / ".msprobe" / "runs"
    combined = [read_capture(path) for path in runs.rglob("capture.combined.jsonl")]
    assert {file.header.provenance["ranks"] for file in combined} == {1, 2}
    assert "sharded" in outputs[1]
