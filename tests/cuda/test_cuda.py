# SPDX-License-Identifier: Apache-2.0
"""Real engines on CUDA: model runner V2, fused kernels that write in place, goldens.

    pytest tests/cuda -p no:cacheprovider

needs one GPU, and two for tests/cuda/test_cuda_parallel.py. The log of the last run is
in tests/cuda/log-*.txt.
"""

import os

import engines
import pytest
import tools

torch = pytest.importorskip("torch", reason="torch missing")
if not torch.cuda.is_available():
    pytest.skip("no CUDA device here", allow_module_level=True)

from pytest_msprobe.engine.client import ask_workers, converse  # noqa: E402

ARGUMENTS = {"gpu_memory_utilization": 0.1}


@pytest.fixture(scope="module")
def llm(demo_model):
    """An engine on the first GPU, in this process."""
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    with engines.started(demo_model, **ARGUMENTS) as engine:
        yield engine


@pytest.fixture(scope="module")
def captures(llm, tmp_path_factory):
    """A capture at each level."""
    folder = tmp_path_factory.mktemp("captures")
    return {
        level: tools.capture(llm, folder, level=level) for level in ("L0", "L1", "mix")
    }


def names_of(capture):
    """Names of all calls of a capture."""
    return {call.c for _, call in capture.calls()}


def test_the_runner_is_v2(llm):
    """VLLM takes model runner V2 here, and its own adapter is chosen."""
    (status,) = converse(llm, ask_workers("status"))

    assert status["runner_version"] == 2


def test_modules_and_logits_are_recorded(captures):
    """At L0 every module is there, logits included, though V2 computes them apart."""
    names = names_of(captures["L0"])

    assert "Module.model.Qwen2Model.forward.0" in names
    assert "Module.logits_processor.LogitsProcessor.forward.0" in names
    for layer in range(4):
        for path in ("input_layernorm.RMSNorm", "self_attn.o_proj.RowParallelLinear"):
            assert f"Module.model.layers.{layer}.{path}.forward.0" in names
    (request,) = captures["L0"].header.requests
    assert len(request.tokens) == len(request.logprobs) == 3


def test_rows_have_the_names_of_model_runner_v1(captures):
    """Modules are named as in the golden that a CPU wrote with model runner V1."""
    golden = cpu_golden()

    assert names_of(golden) == names_of(captures["L0"])


def cpu_golden():
    """The committed golden of the demo, written on a CPU."""
    from pytest_msprobe.dump.capture import read_capture

    folder = tools.ROOT / "golden" / "examples" / "test_generation.py"
    (path,) = folder.glob("test_greedy?layer?/*.jsonl")
    return read_capture(path)


@pytest.mark.parametrize("level", ["L1", "mix"])
def test_vllms_kernels_are_recorded(captures, level):
    """Operators of vLLM's own appear, in forward and in sampling."""
    names = " ".join(names_of(captures[level]))

    for kernel in (
        "unified_attention_with_output",
        "unified_kv_cache_update",
        "rotary_embedding",
        "fused_add_rms_norm",
        "silu_and_mul",
        "Functional.linear",
    ):
        assert kernel in names, kernel


@pytest.mark.parametrize("level", ["L0", "L1", "mix"])
def test_a_golden_passes_on_the_machine_that_made_it(llm, captures, tmp_path, level):
    """A second capture has the same checksum in every judged row."""
    verdict = tools.verdict_of(
        captures[level], tools.capture(llm, tmp_path, level=level)
    )

    assert verdict.status == "pass"
    assert verdict.equal == verdict.judged > 200
    assert verdict.missing == verdict.extra == 0


def test_inputs_are_read_before_a_kernel_overwrites_them(captures):
    """fused_add_rms_norm writes its arguments; rows hold what was there before it."""
    capture = captures["mix"]
    calls = {(step, call.c): call for step, call in capture.calls()}
    norm = calls[0, "Module.model.layers.1.input_layernorm.RMSNorm.forward.0"]
    before = calls[0, "Module.model.layers.0.mlp.down_proj.RowParallelLinear.forward.0"]

    assert norm.i["input_args.0"] == before.o["output.0"]
    assert norm.i["input_args.0"] != norm.o["output.0"]
    assert norm.i["input_args.1"] != norm.o["output.1"]


def test_the_cpus_golden_passes_across_keys(llm, tmp_path):
    """The golden of a CPU judges a GPU with the limits for another numerics key."""
    golden = cpu_golden()
    candidate = tools.capture(llm, tmp_path)

    verdict = tools.verdict_of(golden, candidate)
    assert verdict.mode == "cross"
    assert verdict.is_green, verdict
    assert verdict.judged > 200


def test_faults_are_named(llm, captures, tmp_path):
    """A norm's epsilon, attention's scale and a weight row are named at each level."""
    model = tools.model_of(llm)
    layers = model.model.layers
    places = {
        "model.layers.1.post_attention_layernorm": (
            lambda: tools.changed_attribute(
                layers[1].post_attention_layernorm, "variance_epsilon", 1e-5
            )
        ),
        "model.layers.2.self_attn.attn": (
            lambda: tools.changed_attribute(
                layers[2].self_attn.attn.impl,
                "scale",
                layers[2].self_attn.attn.impl.scale * 1.01,
            )
        ),
        "model.layers.3.mlp.down_proj": lambda: scaled_row(layers[3].mlp.down_proj),
    }
    for place, plant in places.items():
        for level in ("L0", "mix"):
            with plant():
                candidate = tools.capture(llm, tmp_path, level=level)
            verdict = tools.verdict_of(captures[level], candidate)
            assert verdict.status == "fail", place
            assert verdict.divergence.module == place, (place, verdict.divergence)
            clean = tools.capture(llm, tmp_path, level=level)
            assert tools.verdict_of(captures[level], clean).status == "pass"


class scaled_row:  # noqa: N801 - used as a function
    """One row of a layer's weight multiplied by 1.05 for a while."""

    def __init__(self, layer):
        self.row = layer.weight.data[7]

    def __enter__(self):
        self.before = self.row.clone()
        self.row.mul_(1.05)

    def __exit__(self, *_):
        self.row.copy_(self.before)


def test_async_scheduling_gives_the_same_rows(captures, demo_model, llm, tmp_path):
    """With async scheduling, vLLM's default on CUDA, rows are those of a plain run."""
    with engines.started(demo_model, async_scheduling=True, **ARGUMENTS) as other:
        candidate = tools.capture(other, tmp_path)

    verdict = tools.verdict_of(captures["L0"], candidate)
    assert verdict.is_green
    assert verdict.missing == 0
    tokens = [request.tokens for request in candidate.header.requests]
    assert tokens == [request.tokens for request in captures["L0"].header.requests]


def test_a_batch_in_v2s_own_order(captures, llm, demo_model, tmp_path):
    """V2 sorts a batch by length; each request's rows are those it has alone."""
    other = "the others only inherit it"
    with engines.started(demo_model, max_num_seqs=4, **ARGUMENTS) as batched:
        together = tools.capture(batched, tmp_path, prompts=[tools.PROMPT, other])
    alone = tools.capture(llm, tmp_path)

    rows = {
        (step > 0, call.c, slot, alone.tensors[i].g)
        for step, call in alone.calls()
        for slot, ids in call.o.items()
        for i in ids
    }
    found = {
        (step > 0, call.c, slot, together.tensors[i].g)
        for step, call in together.calls()
        for slot, ids in call.o.items()
        for i in ids
    }
    assert {row for row in rows if row[3].startswith("0.")} <= found
    assert next(r.tokens for r in together.header.requests) == (
        alone.header.requests[0].tokens
    )
