# SPDX-License-Identifier: Apache-2.0
"""Features of vLLM: each is captured right, or refused with a line that says why."""

import json
import re

import engines
import numpy as np
import pytest
import tools

from pytest_msprobe.config.debugger_config import DebuggerConfig
from pytest_msprobe.engine.client import converse, start_capture
from pytest_msprobe.engine.preflight import check_engine
from pytest_msprobe.errors import EngineError

LONG = " ".join([tools.PROMPT] * 6)


def outputs(capture):
    """Checksums of all output segments that requests own."""
    return {
        (call.c.rpartition(".")[0], slot, capture.tensors[i].g): capture.tensors[i].c
        for _, call in capture.calls()
        for slot, ids in call.o.items()
        for i in ids
        if capture.tensors[i].g
    }


def test_prefix_caching_is_explained(demo_model, tmp_path):
    """Rows that the prefix cache saved are a reason of their own, no failing rows."""
    with engines.started(
        demo_model, enable_prefix_caching=True, max_model_len=512, block_size=32
    ) as llm:
        first, second = (tools.capture(llm, tmp_path, prompts=[LONG]) for _ in range(2))

    assert first.steps[0].requests[0][2] == 0
    hit = second.steps[0].requests[0][2]
    assert hit > 0
    verdict = tools.verdict_of(first, second)
    assert verdict.status == "incomparable"
    (reason,) = verdict.reasons
    assert f"from position {hit} on" in reason
    assert "enable_prefix_caching" in reason
    common = outputs(first).keys() & outputs(second).keys()
    generated = [key for key in common if key[2].startswith("0.g")]
    assert len(generated) > 50
    assert all(outputs(first)[key] == outputs(second)[key] for key in generated)


def test_batch_mates_do_not_change_a_requests_rows(demo_model, engine, tmp_path):
    """In a batch each request's segments are those that it has alone."""
    mates = [tools.PROMPT, "the others only inherit it", "numbers"]
    with engines.started(demo_model, max_num_seqs=4) as llm:
        together = tools.capture(llm, tmp_path, prompts=mates)
    alone = tools.capture(engine, tmp_path)

    expected, found = outputs(alone), outputs(together)
    shared = [key for key in expected if key in found]
    assert len(shared) == len(expected)
    equal = sum(expected[key] == found[key] for key in shared)
    assert equal > 0.95 * len(shared)
    assert len(together.header.requests) == 3


def write_moe(maker, folder):
    """A tiny Qwen2-MoE: four experts, two a token, one shared."""
    weights = maker.make_weights()
    stream = maker.Stream(11)
    hidden, width = maker.HIDDEN, 64
    for layer in range(maker.LAYERS):
        prefix = f"model.layers.{layer}.mlp."
        for name in ("gate_proj", "up_proj", "down_proj"):
            del weights[f"{prefix}{name}.weight"]
        weights[f"{prefix}gate.weight"] = stream(4, hidden, std=0.5)
        weights[f"{prefix}shared_expert_gate.weight"] = stream(1, hidden, std=0.1)
        for expert in [*(f"experts.{n}." for n in range(4)), "shared_expert."]:
            for name in ("gate_proj", "up_proj"):
                weights[f"{prefix}{expert}{name}.weight"] = stream(
                    width, hidden, std=1 / np.sqrt(hidden)
                )
            weights[f"{prefix}{expert}down_proj.weight"] = stream(
                hidden, width, std=0.02 / np.sqrt(width)
            )
    maker.write_model(folder, weights)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": width,
        "shared_expert_intermediate_size": width,
        "decoder_sparse_step": 1,
        "norm_topk_prob": False,
        "mlp_only_layers": [],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_mixture_of_experts(demo_model, tmp_path):
    """Routers and experts are captured, twice the same; a changed router is named."""
    folder = write_moe(tools.example("tiny_qwen2"), tmp_path / "moe")
    with engines.started(folder) as llm:
        first, second = (tools.capture(llm, tmp_path, level="mix") for _ in range(2))
        gate = tools.model_of(llm).model.layers[1].mlp.gate

        def shifted(original, *args, **kwargs):
            logits, bias = original(*args, **kwargs)
            return logits * 1.05, bias

        with tools.wrapped_forward(gate, shifted):
            faulty = tools.capture(llm, tmp_path, level="mix")
        golden, rerouted = capture_rerouted(llm, tmp_path)

    verdict = tools.verdict_of(first, second)
    assert verdict.status == "pass"
    assert verdict.equal == verdict.judged > 500
    names = {call.c for _, call in first.calls()}
    assert any("mlp.gate." in name for name in names)
    assert any("mlp.experts." in name for name in names)
    tools.assert_changed(first, faulty, "model.layers.1.mlp.gate")
    verdict = tools.verdict_of(first, faulty)
    assert verdict.status == "fail"
    assert verdict.divergence.module.startswith("model.layers.1.mlp")

    # With the same key another choice fails. Across keys it is no fault, and what
    # depends on it is not judged.
    choice = "model.layers.2.mlp.experts.choice"
    tools.assert_changed(golden, rerouted, choice)
    verdict = tools.verdict_of(golden, rerouted)
    assert (verdict.status, verdict.divergence.module) == ("fail", choice)
    crossed = tools.verdict_of(golden, rerouted, mode="cross")
    assert (crossed.failed, crossed.missing) == (0, 0)
    assert crossed.equal == crossed.judged > 50
    assert crossed.rerouted > 20
    assert any("other experts from model.layers.2.mlp" in n for n in crossed.notes)


def capture_rerouted(llm, folder):
    """A capture, and one in which a router of layer 2 chooses other experts."""
    golden = tools.capture(llm, folder)
    layer = tools.model_of(llm).model.layers[2].mlp.experts

    def shifted(original, hidden_states, router_logits, *args, **kwargs):
        # Behind the layer's inputs, before any way of choosing that a vLLM has.
        other = router_logits.roll(1, dims=-1)
        return original(hidden_states, other, *args, **kwargs)

    with tools.wrapped_forward(layer, shifted):
        rerouted = tools.capture(llm, folder)
    assert "choice" not in dict(layer.named_children())
    assert "forward" not in vars(layer)
    return golden, rerouted


def write_adapter(maker, folder):
    """A LoRA adapter of rank 8 for the down projections."""
    folder.mkdir()
    stream = maker.Stream(5)
    weights = {}
    for layer in range(maker.LAYERS):
        prefix = f"base_model.model.model.layers.{layer}.mlp.down_proj."
        weights[f"{prefix}lora_A.weight"] = stream(8, maker.INTERMEDIATE, std=0.3)
        weights[f"{prefix}lora_B.weight"] = stream(maker.HIDDEN, 8, std=0.01)
    maker.write_safetensors(folder / "adapter_model.safetensors", weights)
    (folder / "adapter_config.json").write_text(
        json.dumps(
            {
                "peft_type": "LORA",
                "r": 8,
                "lora_alpha": 8,
                "target_modules": ["down_proj"],
                "bias": "none",
                "base_model_name_or_path": "tiny",
            }
        )
    )
    return folder


def test_lora(demo_model, tmp_path):
    """With an adapter the wrapped layer is captured; the adapter's change is named."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    adapter = write_adapter(tools.example("tiny_qwen2"), tmp_path / "adapter")
    parameters = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)
    files = []
    with engines.started(demo_model, enable_lora=True, max_lora_rank=8) as llm:
        for number in range(3):
            request = LoRARequest("tiny", 1, str(adapter)) if number else None
            with engines.recorded(llm, tmp_path / str(number), files):
                llm.generate(
                    [tools.PROMPT], parameters, use_tqdm=False, lora_request=request
                )

    plain, first, second = files
    assert tools.verdict_of(first, second).status == "pass"
    verdict = tools.verdict_of(plain, first)
    assert verdict.status == "fail"
    assert verdict.divergence.module.startswith("model.layers.0.mlp.down_proj")


def write_blip2(maker, folder):
    """A tiny BLIP-2 without weights: an encoder of images in front of OPT's layers."""
    files = maker.tokenizer_files()
    image = dict(files["tokenizer.json"]["added_tokens"][0])
    image |= {"id": maker.VOCABULARY, "content": "<image>"}
    files["tokenizer.json"]["added_tokens"].append(image)
    sizes = {
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    vision = {"model_type": "blip_2_vision_model", "image_size": 28, "patch_size": 14}
    between = {
        "model_type": "blip_2_qformer",
        "vocab_size": maker.VOCABULARY + 64,
        "cross_attention_frequency": 1,
        "encoder_hidden_size": 128,
    }
    text = {
        "model_type": "opt",
        "vocab_size": maker.VOCABULARY + 64,
        "ffn_dim": 192,
        "word_embed_proj_dim": 128,
        "max_position_embeddings": 256,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    files["config.json"] = {
        "architectures": ["Blip2ForConditionalGeneration"],
        "model_type": "blip-2",
        "num_query_tokens": 4,
        "image_token_index": image["id"],
        "use_decoder_only_language_model": True,
        "vision_config": {**vision, **sizes},
        "qformer_config": {**between, **sizes},
        "text_config": {**text, **sizes},
    }
    files["preprocessor_config.json"] = {
        "image_processor_type": "BlipImageProcessor",
        "size": {"height": 28, "width": 28},
    }
    files["processor_config.json"] = {
        "processor_class": "Blip2Processor",
        "num_query_tokens": 4,
    }
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def test_requests_with_images_are_refused(demo_model, tmp_path):
    """An image ends the capture with one line; texts to the same model are captured."""
    from PIL import Image
    from vllm import SamplingParams

    folder = write_blip2(tools.example("tiny_qwen2"), tmp_path / "model")
    parameters = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)
    prompt = {
        "prompt": "what is there",
        "multi_modal_data": {"image": Image.new("RGB", (40, 30), (200, 10, 10))},
    }
    with engines.started(folder, load_format="dummy") as llm:
        # The second time vLLM takes the encoder's output of the first.
        for number in range(2):
            start = {"action": "start", "config": {"level": "L0"}}
            start["folder"] = str(tmp_path / str(number))
            llm.collective_rpc("msprobe_control", args=(json.dumps(start),))
            (answer,) = llm.generate([prompt], parameters, use_tqdm=False)
            reply = tools.control(llm, "stop")
            assert len(answer.outputs[0].token_ids) == 3
            assert not reply["ok"]
            assert "a request has encoder inputs (images, audio)" in reply["error"]
            assert "leave them out" in reply["error"]
            assert not list((tmp_path / str(number)).rglob("dump.json"))
        texts = [tools.capture(llm, tmp_path) for _ in range(2)]

    verdict = tools.verdict_of(*texts)
    assert (verdict.status, verdict.missing) == ("pass", 0)
    assert verdict.equal == verdict.judged > 100


def test_speculative_decoding_is_refused(demo_model, tmp_path):
    """An engine that speculates is refused, saying why and what to change."""
    with engines.started(
        demo_model,
        speculative_config={
            "method": "ngram",
            "num_speculative_tokens": 2,
            "prompt_lookup_max": 3,
        },
    ) as llm:
        start = start_capture(DebuggerConfig(level="L0"), tmp_path, decode_steps=2)
        with pytest.raises(Exception, match="without speculative_config"):
            converse(llm, start)


@pytest.mark.parametrize(
    "name", ["prefill_context_parallel_size", "decode_context_parallel_size"]
)
def test_context_parallel_is_refused(demo_model, name):
    """VLLM's own configuration of such an engine is refused by the setting's name."""
    # No attention backend of the CPU supports it, so that no engine can be started.
    from vllm.engine.arg_utils import EngineArgs

    arguments = EngineArgs(
        model=str(demo_model),
        enforce_eager=True,
        tensor_parallel_size=4,  # more than the model's key-value heads
        decode_context_parallel_size=2 if name.startswith("decode") else 1,
        **tools.ARGUMENTS,
    )
    config = arguments.create_engine_config()
    if name.startswith("prefill"):
        # Only model runner V2 has it, so that here EngineArgs would not take it.
        check_engine(config)
        config.parallel_config.prefill_context_parallel_size = 2

    with pytest.raises(EngineError, match=f"{name}=2: rows are spread") as caught:
        check_engine(config)
    assert f"start the engine with {name}=1" in str(caught.value)


def test_nan_and_infinity_survive_every_file(engine, tmp_path):
    """NaN and infinities are in the dump, the capture and the verdict, as counts."""
    clean = tools.capture(engine, tmp_path)
    layer = tools.model_of(engine).model.layers[2].mlp

    def broken(original, *args, **kwargs):
        result = original(*args, **kwargs).clone()
        result[0, 3] = float("nan")
        result[-1, 5] = float("inf")
        return result

    with tools.wrapped_forward(layer, broken):
        faulty = tools.capture(engine, tmp_path)
        folder = str(tmp_path / "replies")
        tools.control(engine, "start", config={"level": "L0"}, folder=folder)
        tools.generate(engine, [tools.PROMPT])
        reply = tools.control(engine, "stop")
        assert json.dumps(reply, allow_nan=False)  # HTTP routes take nothing else

    name = "Module.model.layers.2.mlp.Qwen2MLP.forward.0"
    dump = json.loads((faulty.path.parent / "step0/rank0/dump.json").read_text())
    assert np.isnan(dump["data"][name]["output"][0]["Max"])
    calls = {call.c: call for step, call in faulty.calls() if step == 0}
    first, rest = (faulty.tensors[i] for i in calls[name].o["output.0"])
    assert first.x == [1, 0, 0]
    assert rest.x == [0, 1, 0]
    verdict = tools.verdict_of(clean, faulty)
    assert verdict.status == "fail"
    assert verdict.divergence.module == "model.layers.2.mlp"
    assert any(finding.metric == "nonfinite" for finding in verdict.worst)


def test_what_a_capture_will_take_is_estimated(engine, tmp_path, caplog):
    """Behind the first step it is said what all steps take; a warning if too much."""
    caplog.set_level("INFO", "pytest_msprobe")
    tools.capture(engine, tmp_path, tokens=8, decode_steps=2)
    tools.capture(engine, tmp_path, tokens=8, decode_steps=7)

    levels = [record.levelname for record in caplog.records]
    assert levels == ["INFO", "INFO"]
    taken = []
    for text, steps in zip(caplog.messages, (3, 8), strict=True):
        rows, size, count, all_rows, all_size = map(
            int,
            re.search(
                r"(\d+) rows and (\d+) bytes in the first step; .* (\d+) are expected: "
                r"about (\d+) rows and (\d+) bytes$",
                text,
            ).groups(),
        )
        assert (count, all_rows, all_size) == (steps, steps * rows, steps * size)
        taken.append(size)
    caplog.clear()
    room = {"max_bytes": 3 * taken[0]}
    tools.capture(engine, tmp_path, tokens=3, **room)
    start = {"level": "L0", **room}
    tools.control(engine, "start", config=start, folder=str(tmp_path), decode_steps=-1)
    tools.generate(engine, [tools.PROMPT], 60)
    assert not tools.control(engine, "stop")["ok"]
    levels = [record.levelname for record in caplog.records]
    assert levels == ["INFO", "WARNING"]
    assert "60 are expected" in caplog.messages[1]
    assert caplog.messages[1].endswith("record less (step, list, level) or make room")


def test_a_limit_of_bytes_ends_a_capture(engine, tmp_path):
    """A capture that grows beyond max_bytes fails, saying where and what to do."""
    reply = tools.control(
        engine,
        "start",
        config={"level": "mix", "max_bytes": 300_000},
        folder=str(tmp_path),
    )
    assert reply["ok"], reply
    tools.generate(engine, [tools.PROMPT], 5)
    reply = tools.control(engine, "stop")

    assert not reply["ok"]
    assert re.search(
        r"recording stopped behind step [12]: \d+ bytes, max_bytes is 300000",
        reply["error"],
    )
    assert tools.capture(engine, tmp_path).steps


@pytest.mark.parametrize(
    ("variable", "message"),
    [
        ("VLLM_BATCH_INVARIANT", "no batch-invariant kernels for cpu"),
        ("VLLM_USE_V2_MODEL_RUNNER", "V2 needs Triton"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_once(demo_model, variable, message):
    """VLLM's late or unclear failures are found before an engine is started."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("a CUDA device is here: these settings work")
    with (
        engines.environment(**{variable: "1"}),
        pytest.raises(EngineError, match=message),
    ):
        tools.start(demo_model)


def test_two_engines_of_one_process_do_not_mix(engine, demo_model, tmp_path):
    """Captures that run at the same time on two engines hold their own requests."""
    other_prompt = "numbers, numbers, numbers"
    with engines.started(demo_model) as other:
        files, others = [], []
        with (
            engines.recorded(engine, tmp_path / "one", files),
            engines.recorded(other, tmp_path / "two", others),
        ):
            tools.generate(other, [other_prompt])
            tools.generate(engine, [tools.PROMPT])
        alone = tools.capture(other, tmp_path, prompts=[other_prompt])

    verdict = tools.verdict_of(alone, others[0])
    assert (verdict.status, verdict.equal) == ("pass", verdict.judged)
    (one,), (two,) = files[0].header.requests, others[0].header.requests
    assert one.prompt_sha256 != two.prompt_sha256
    assert one.label == two.label == 0


def test_nothing_heavy_is_imported_unless_asked_for(demo_model):
    """Without variable and additional_config no worker is touched, no module loaded."""
    from test_processes import run_python

    program = """
import os, sys
os.environ.pop("MSPROBE_ATTACH")
from vllm.plugins import load_general_plugins
load_general_plugins()
ours = lambda: [name for name in sys.modules if name.startswith("pytest_msprobe.")]
print(ours(), [name for name in sys.modules if name.startswith("vllm.v1.worker")])
from vllm import LLM
llm = LLM(model=sys.argv[1], enforce_eager=True, max_model_len=64, dtype="bfloat16")
worker = llm.llm_engine.model_executor.driver_worker.worker
print(ours())
runner = worker.model_runner
print(hasattr(worker, "msprobe_control"), "execute_model" in runner.__dict__)
"""
    lines = run_python(program, demo_model)
    assert lines[-3] == "['pytest_msprobe.vllm_entry'] []"
    assert lines[-2] == "['pytest_msprobe.vllm_entry']"
    assert lines[-1] == "False False"
