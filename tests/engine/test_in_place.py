# SPDX-License-Identifier: Apache-2.0
"""vLLM's own operators that write their arguments: before and after are kept apart."""

import json

import pytest
import torch

from pytest_msprobe import PrecisionDebugger

pytest.importorskip("vllm._C")
pytestmark = pytest.mark.engine
OPS = torch.ops._C


@pytest.fixture(autouse=True)
def no_debugger():
    """Every test starts and ends without an object."""
    PrecisionDebugger.reset()
    yield
    PrecisionDebugger.reset()


def record(folder, call, arguments):
    """Tensors that a call's record holds: inputs by place, and outputs in order."""
    debugger = PrecisionDebugger(dump_path=str(folder), task="tensor", level="L1")
    debugger.start()
    call(**arguments)
    debugger.stop()
    debugger.step()
    PrecisionDebugger.reset()
    assert debugger.error is None
    (rank,) = (folder / "step0").iterdir()
    ((name, entry),) = json.loads((rank / "dump.json").read_text())["data"].items()

    def load(value):
        return torch.load(rank / "dump_tensor_data" / value["data_name"])

    inputs = {
        key: load(value)
        for key, value in entry["input_kwargs"].items()
        if value and "data_name" in value
    }
    return name, inputs, [load(v) for v in entry["output"] if v and "data_name" in v]


def random(*shape):
    """A bfloat16 tensor of random numbers."""
    return torch.randn(*shape, dtype=torch.bfloat16)


def norm():
    """fused_add_rms_norm writes input and residual."""
    arguments = {
        "input": random(3, 16),
        "residual": random(3, 16),
        "weight": random(16),
        "epsilon": 1e-6,
    }
    return OPS.fused_add_rms_norm, arguments, ("input", "residual")


def rotary():
    """rotary_embedding writes query and key."""
    arguments = {
        "positions": torch.arange(3),
        "query": random(3, 64),
        "key": random(3, 32),
        "head_size": 32,
        "cos_sin_cache": random(8, 32),
        "is_neox": True,
    }
    return OPS.rotary_embedding, arguments, ("query", "key")


def gate():
    """silu_and_mul writes the tensor given as out."""
    arguments = {"out": torch.zeros(3, 16, dtype=torch.bfloat16)}
    arguments["input"] = random(3, 32)
    return OPS.silu_and_mul, arguments, ("out",)


def cache():
    """The operator that fills the KV cache writes both caches."""
    arguments = {
        "key": random(3, 2, 32),
        "value": random(3, 2, 32),
        "key_cache": torch.zeros(4, 2, 32, 32, dtype=torch.bfloat16),
        "value_cache": torch.zeros(4, 2, 32, 32, dtype=torch.bfloat16),
        "slot_mapping": torch.tensor([0, 5, 33]),
        "isa": "vec",
    }
    return OPS.cpu_attn_reshape_and_cache, arguments, ("key_cache", "value_cache")


@pytest.mark.parametrize("case", [norm, rotary, gate, cache])
def test_inputs_are_before_and_outputs_after(tmp_path, case):
    """Arguments are kept as before the call, and what it wrote as after it."""
    torch.manual_seed(0)
    call, arguments, written = case()
    before = {
        name: value.clone() if isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
    }

    name, inputs, outputs = record(tmp_path, call, arguments)

    again = {
        name: value.clone() if isinstance(value, torch.Tensor) else value
        for name, value in before.items()
    }
    call(**again)
    assert name == f"_C.{call.__name__}.0.forward"
    for key, value in inputs.items():
        assert torch.equal(value, before[key]), key
    assert len(outputs) == len(written)
    for key, value in zip(written, outputs, strict=True):
        assert torch.equal(value, again[key]), key
        assert not torch.equal(value, before[key]), key


def test_intermediate_tensors_are_opened(tmp_path):
    """VLLM's container between pipeline stages shows its tensors by name."""
    from vllm.sequence import IntermediateTensors

    class Stage(torch.nn.Module):
        def forward(self, tensors):
            return IntermediateTensors({k: v + 1 for k, v in tensors.tensors.items()})

    model = torch.nn.Sequential(Stage())
    debugger = PrecisionDebugger(dump_path=str(tmp_path), level="L0")
    debugger.start(model=model)
    model(
        IntermediateTensors(
            {"hidden_states": torch.ones(2), "residual": torch.zeros(1)}
        )
    )
    debugger.stop()
    debugger.step()
    PrecisionDebugger.reset()

    (rank,) = (tmp_path / "step0").iterdir()
    (entry,) = json.loads((rank / "dump.json").read_text())["data"].values()
    assert entry["input_args"][0]["tensors"]["hidden_states"]["Max"] == 1.0
    assert entry["output"][0]["tensors"]["residual"]["Max"] == 1.0
