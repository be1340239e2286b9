# SPDX-License-Identifier: Apache-2.0
"""What a capture of a real engine holds."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import tools
import torch

from pytest_msprobe.model.segments import WHOLE

PROMPTS = (tools.PROMPT, "the others only inherit it")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the captures of this file lie."""
    return tmp_path_factory.mktemp("captures")


@pytest.fixture(scope="module")
def l0(engine, folder):
    """A capture at L0."""
    return tools.capture(engine, folder)


@pytest.fixture(scope="module")
def mix(engine, folder):
    """A capture at mix."""
    return tools.capture(engine, folder, level="mix")


def dump_of(capture, step):
    """The data of one step's dump."""
    path = capture.path.parent / f"step{step}" / "rank0" / "dump.json"
    return json.loads(path.read_text())["data"]


def names_of(capture, step=0):
    """Names of the calls of one step."""
    return [call.c for s, call in capture.calls() if s == step]


def test_steps_are_the_prefill_and_two_decodes(l0):
    """Real steps only: the prefill and as many decode steps as the golden holds."""
    assert [(step.tokens, step.requests) for step in l0.steps] == [
        (25, [(0, 25, 0)]),
        (1, [(0, 1, 25)]),
        (1, [(0, 1, 26)]),
    ]


def test_decode_steps_beyond_the_golden_are_not_recorded(engine, folder):
    """A longer generation records no more than asked for."""
    capture = tools.capture(engine, folder, tokens=8, decode_steps=1)

    assert [step.tokens for step in capture.steps] == [25, 1]
    assert len(capture.header.requests[0].tokens) == 2


def test_every_module_that_ran_is_there(l0, engine):
    """All submodules that are called have a row, the compiled model class too."""
    names = {name.removeprefix("Module.").rsplit(".", 3)[0] for name in names_of(l0)}
    silent = {"lm_head", "model.layers", "sampler"}
    expected = {
        path
        for path, module in tools.model_of(engine).named_modules()
        if path and path not in silent and not isinstance(module, torch.nn.ModuleList)
    }

    assert "model" in names
    assert {n for n in expected if not n.endswith("apply_rotary_emb")} <= names


def test_shared_module_is_named_below_its_parent(l0):
    """The one rotary embedding has a row in every layer, with msProbe's name beside."""
    calls = {call.c: call.m for step, call in l0.calls() if step == 0}

    for layer in range(4):
        end = "self_attn.rotary_emb.RotaryEmbedding.forward"
        name = f"Module.model.layers.{layer}.{end}.0"
        shared = f"Module.model.layers.0.{end}.{layer}"
        assert calls[name] == (shared if layer else "")
        assert shared in dump_of(l0, 0)


def test_operators_of_vllm_are_there(mix):
    """Attention, KV-cache update and rotary embedding appear without any list."""
    names = names_of(mix)
    counts = {
        api: sum(name.startswith(f"{api}.") for name in names)
        for api in (
            "Vllm.unified_attention_with_output",
            "Vllm.unified_kv_cache_update",
            "_C.rotary_embedding",
        )
    }

    assert counts == dict.fromkeys(counts, 4)


def test_l1_has_the_same_operators_without_modules(engine, folder, mix):
    """At L1 the calls of APIs are those of mix."""
    capture = tools.capture(engine, folder, level="L1")

    assert names_of(capture) == [
        n for n in names_of(mix) if not n.startswith("Module.")
    ]


def test_parameters_are_measured_once(engine, folder):
    """A parameter's numbers are computed once a capture, however many steps run."""
    from pytest_msprobe.debugger.measure import Measurer

    seen = []
    original = Measurer.measure

    def measure(self, tensor, *args, **kwargs):
        if isinstance(tensor, torch.nn.Parameter) and tensor.numel():
            seen.append(tensor.data_ptr())
        return original(self, tensor, *args, **kwargs)

    with tools.changed_attribute(Measurer, "measure", measure):
        capture = tools.capture(engine, folder)

    assert len(seen) == len(set(seen)) > 5
    linear = "Module.model.layers.0.input_layernorm.RMSNorm.forward.0"
    weights = [dump_of(capture, s)[linear]["parameters"]["weight"] for s in range(3)]
    assert weights[0]["Max"] is not None
    assert weights[0] == weights[1] == weights[2]


def test_undefined_and_opaque_slots_are_listed(mix):
    """What cannot be judged is counted by its reason, not hidden in a tolerance."""
    roles = {
        (call.c.rpartition(".")[0].rpartition(".")[0], slot, role)
        for _, call in mix.calls()
        for slot, role in call.r.items()
    }

    assert ("Vllm.unified_attention_with_output", "input_args.3", "undefined") in roles
    for name, slot, role in roles:
        if name == "_C.onednn_mm":
            assert (slot, role) in {
                ("input_args.0", "undefined"),
                ("input_args.3", "opaque"),
            }
    counted = sum(len(call.r) for _, call in mix.calls())
    left_out = mix.header.left_out
    assert left_out["undefined"] + left_out.get("opaque", 0) == counted
    assert left_out["preparation"] > 0


def test_tokens_and_log_probabilities_come_from_the_worker(l0, engine):
    """Ids are those generated, log-probabilities those vLLM reports of raw logits."""
    from vllm import SamplingParams

    parameters = SamplingParams(
        max_tokens=3, temperature=0, ignore_eos=True, logprobs=1
    )
    (output,) = engine.generate([tools.PROMPT], parameters, use_tqdm=False)
    (request,) = l0.header.requests

    assert request.tokens == list(output.outputs[0].token_ids)
    reported = [
        steps[token].logprob
        for token, steps in zip(request.tokens, output.outputs[0].logprobs, strict=True)
    ]
    assert request.logprobs == pytest.approx(reported, abs=1e-4)
    assert [top[0][0] for top in request.top] == request.tokens
    assert all(len(top) == 20 for top in request.top)
    assert request.prompt_tokens == 25


def test_log_probabilities_ignore_sampling_parameters(engine, folder, l0):
    """Temperature and penalties of the user do not change what is recorded."""
    from vllm import SamplingParams

    place = folder / "sampled"
    settings = {"level": "L0", "task": "statistics"}
    reply = tools.control(engine, "start", config=settings, folder=str(place))
    assert reply["ok"], reply
    parameters = SamplingParams(
        max_tokens=1, temperature=2.0, seed=3, presence_penalty=1.5, ignore_eos=True
    )
    try:
        engine.generate([tools.PROMPT], parameters, use_tqdm=False)
    finally:
        reply = tools.control(engine, "stop")
    from pytest_msprobe.dump.capture import read_capture

    sampled = read_capture(Path(reply["file"])).header.requests[0]

    assert sampled.top[0] == l0.header.requests[0].top[0]


def test_batch_mates_do_not_change_a_requests_rows(demo_model, folder, l0):
    """A request has the same rows alone and in a batch with others."""
    from pytest_msprobe.engine.launch import stop_engine

    llm = tools.start(demo_model, max_num_seqs=4, max_num_batched_tokens=512)
    try:
        batched = tools.capture(llm, folder, PROMPTS)
    finally:
        stop_engine(llm)
    alone = {
        (call.c, slot, l0.tensors[n].g): l0.tensors[n].s
        for _, call in l0.calls()
        for slot, ids in call.o.items()
        for n in ids
    }
    together = {
        (call.c, slot, batched.tensors[n].g): batched.tensors[n].s
        for _, call in batched.calls()
        for slot, ids in call.o.items()
        for n in ids
    }

    assert batched.steps[0].tokens == 25 + 15
    assert {key: together.get(key) for key in alone} == alone
    assert {g.partition(".")[0] for _, _, g in together} == {"0", "1"}


def test_chunked_prefill_is_added_up(demo_model, folder, l0):
    """A prompt computed in chunks has the golden's segments, within rounding."""
    from pytest_msprobe.engine.launch import stop_engine

    llm = tools.start(
        demo_model,
        max_num_batched_tokens=8,
        enable_chunked_prefill=True,
        max_num_seqs=1,
    )
    try:
        chunked = tools.capture(llm, folder)
    finally:
        stop_engine(llm)

    assert [step.tokens for step in chunked.steps] == [8, 8, 8, 1, 1, 1]
    verdict = tools.verdict_of(l0, chunked)
    assert verdict.is_green, verdict
    assert verdict.missing == 0
    assert verdict.judged > 500
    assert any("chunked differently" in note for note in verdict.notes)


def test_capture_that_records_nothing_is_an_error(engine, tmp_path):
    """A capture without a step is refused, never an empty pass."""
    from pytest_msprobe.config.debugger_config import DebuggerConfig
    from pytest_msprobe.engine.client import converse, start_capture, stop_capture
    from pytest_msprobe.errors import CaptureError

    config = DebuggerConfig(level="L0")
    converse(engine, start_capture(config, tmp_path, decode_steps=2))
    with pytest.raises(CaptureError, match="recorded no row in 0 steps"):
        converse(engine, stop_capture("test"))


def test_rank_that_matches_none_is_an_error(engine, tmp_path):
    """A selection of ranks that this engine does not have is refused."""
    from pytest_msprobe.config.debugger_config import DebuggerConfig
    from pytest_msprobe.engine.client import converse, start_capture
    from pytest_msprobe.errors import CaptureError

    config = DebuggerConfig(level="L0", rank=(4, 5))
    with pytest.raises(CaptureError, match=r"rank \[4, 5\] selects none"):
        converse(engine, start_capture(config, tmp_path, decode_steps=2))


def test_nothing_is_left_on_the_engine(engine, l0, mix):
    """After a capture the runner and the model are as they were."""
    runner, model = tools.runner_of(engine), tools.model_of(engine)

    assert "execute_model" not in runner.__dict__
    assert "sample_tokens" not in runner.__dict__
    assert "forward" not in runner.sampler.__dict__
    for module in model.modules():
        assert "forward" not in module.__dict__
        assert "compute_logits" not in module.__dict__


def test_a_second_start_is_refused_and_harmless(engine, folder):
    """Only one capture runs on an engine; the first one is not disturbed."""
    import dataclasses

    from pytest_msprobe.config.debugger_config import DebuggerConfig

    config = dataclasses.asdict(DebuggerConfig(level="L0"))
    first = tools.control(
        engine, "start", config=config, folder=str(folder / "x"), decode_steps=2
    )
    second = tools.control(engine, "start", config=config, folder=str(folder / "y"))
    tools.generate(engine, [tools.PROMPT])
    stopped = tools.control(engine, "stop")

    assert first["ok"]
    assert not second["ok"]
    assert "already running" in second["error"]
    assert stopped["steps"] == 3


@pytest.mark.parametrize(
    "payload", ["", "[]", "{}", '{"action": "dance"}', '{"action": "start"}']
)
def test_control_never_raises(engine, payload):
    """Whatever is sent, the worker answers with JSON."""
    (reply,) = engine.collective_rpc("msprobe_control", args=(payload,))

    assert reply["ok"] is False
    assert reply["error"]
    json.dumps(reply)


def expected_of(tensor):
    """MsProbe's four from a saved tensor, computed anew in float64."""
    wide = tensor.double()
    return {
        "Max": wide.max().item(),
        "Min": wide.min().item(),
        "Mean": wide.mean().item(),
        "Norm": math.sqrt((wide * wide).sum().item()),
    }


def check_numbers(entry, tensor):
    if tensor.is_floating_point() and tensor.ndim:
        for name, value in expected_of(tensor).items():
            scale = max(abs(value), entry["Norm"] / max(tensor.numel(), 1) ** 0.5)
            assert entry[name] == pytest.approx(
                value, abs=1e-6 * scale + 1e-12, nan_ok=True
            )
    elif not tensor.is_floating_point() and tensor.ndim:
        assert (entry["Max"], entry["Min"]) == (
            tensor.max().item(),
            tensor.min().item(),
        )


@pytest.mark.parametrize("level", ["L0", "mix"])
def test_every_statistic_is_that_of_the_saved_tensor(engine, folder, level):
    """Each number of a dump is recomputed in float64 from tensors of the same run."""
    capture = tools.capture(engine, folder, level=level, task="tensor")
    checked = unwritten = 0

    def check(entry, place):
        nonlocal checked, unwritten
        if isinstance(entry, list):
            for item in entry:
                check(item, place)
        elif isinstance(entry, dict) and entry.get("type") != "torch.Tensor":
            for item in entry.values():
                check(item, place)
        elif isinstance(entry, dict) and entry.get("data_name"):
            if entry["Max"] is None:  # given to an operator before anybody wrote it
                assert ".forward.input" in entry["data_name"]
                unwritten += 1
                return
            tensor = torch.load(place / entry["data_name"], weights_only=True)
            assert list(tensor.shape) == entry["shape"]
            assert str(tensor.dtype) == entry["dtype"]
            check_numbers(entry, tensor)
            checked += 1

    for step in range(3):
        for record in dump_of(capture, step).values():
            folder_ = capture.path.parent / f"step{step}" / "rank0" / "dump_tensor_data"
            check([v for k, v in record.items() if k != "x"], folder_)
    assert checked > (500 if level == "L0" else 1400)
    assert unwritten == 0 if level == "L0" else 0 < unwritten < checked / 10


def test_segments_add_up_to_the_dump(l0):
    """The whole-tensor numbers of the dump are the segments of the capture combined."""
    name = "Module.model.layers.2.mlp.down_proj.RowParallelLinear.forward.0"
    line = next(call for s, call in l0.calls() if s == 0 and call.c == name)
    parts = [l0.tensors[n] for n in line.o["output.0"]]
    entry = dump_of(l0, 0)[name]["output"][0]

    assert [part.g for part in parts] == ["0.first", "0.prompt"]
    assert entry["Max"] == max(part.v[0] for part in parts)
    assert entry["Norm"] ** 2 == pytest.approx(sum(part.v[3] for part in parts))


def test_rows_have_their_class(mix):
    """Activations are token-major, logits sample-major, the rest neither."""
    logits = next(
        c for _, c in mix.calls() if c.c.startswith("Module.logits_processor")
    )
    norm = next(c for _, c in mix.calls() if ".norm.RMSNorm" in c.c)
    embedding = next(
        c for _, c in mix.calls() if c.c.startswith("Functional.embedding")
    )

    assert {mix.tensors[n].k for n in logits.o["output.0"]} == {"s"}
    assert {mix.tensors[n].k for n in norm.o["output.0"]} == {"t"}
    (weight,) = embedding.i["input_args.1"]
    assert (mix.tensors[weight].k, mix.tensors[weight].g) == ("n", WHOLE)


def test_sizes_are_small(l0, mix, tmp_path):
    """A default golden is below the stated bytes a tensor line and a row."""
    from pytest_msprobe.golden.store import golden_bytes

    limits = ((l0, 230), (mix, 150))
    for capture, bytes_a_row in limits:
        content = golden_bytes(capture, "t", "k")
        lines = [line for line in content.split(b"\n") if line.startswith(b'{"t"')]
        rows = sum(
            len(ids)
            for _, call in capture.calls()
            for side in (call.i, call.o)
            for ids in side.values()
        )
        assert np.median([len(line) for line in lines]) <= 320
        assert len(content) / rows <= bytes_a_row
