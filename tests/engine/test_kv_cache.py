# SPDX-License-Identifier: Apache-2.0
"""What each layer wrote into its KV cache, as rows of its own."""

from types import SimpleNamespace

import pytest
import tools
import torch

from pytest_msprobe.engine import kv_cache

LAYER = "model.layers.1.self_attn.attn"
PROMPTS = (tools.PROMPT, "explain gravity in one sentence")


def capture(engine, folder, **config):
    """A capture with the rows of the cache."""
    return tools.capture(engine, folder, PROMPTS, kv_cache=True, **config)


def checksums(capture, call, slot):
    """Checksum of each segment of a slot."""
    return {
        capture.tensors[number].g: capture.tensors[number].c
        for _, line in capture.calls()
        if f".{call}." in line.c
        for number in line.o.get(slot, [])
    }


@pytest.mark.parametrize("owner", ["layer", "impl"])
@pytest.mark.parametrize("isa", ["vec", "vec16", "amx"])
def test_layouts_of_the_cpu(isa, owner):
    """What vLLM's own operator writes for some slots is read back in their order."""
    from vllm import _custom_ops as ops

    heads, tokens, size = 3, 32, 64
    cache = torch.zeros(4, heads, tokens, 2 * size, dtype=torch.bfloat16)
    whole = cache.view(4, heads, 2 * tokens, size)
    key, value = torch.randn(2, 7, heads, size).to(torch.bfloat16)
    slots = torch.tensor([33, 34, 35, 3 * tokens, 5, 127, 64])
    ops.cpu_attn_reshape_and_cache(
        *(key, value, *whole.chunk(2, dim=2), slots, isa),
        k_scale=1.0,
        v_scale=1.0,
        kv_cache_dtype="auto",
    )
    layer = torch.nn.Module()
    layer.impl = SimpleNamespace()
    (layer if owner == "layer" else layer.impl).isa = isa  # as newer and older vLLM

    sides, orders = kv_cache._sides(cache, "CPU_ATTN", layer)

    assert torch.equal(kv_cache._gather(sides[0], slots, orders[0]), key)
    assert torch.equal(kv_cache._gather(sides[1], slots, orders[1]), value)


def test_layouts_of_gpu_backends():
    """Caches that hold tokens as they are are read in each of their shapes."""
    cache = torch.arange(2 * 3 * 4 * 5 * 6).reshape(2, 3, 4, 5, 6)
    slots = torch.tensor([0, 5, 11])
    wanted = cache[0].reshape(12, 5, 6)[slots]

    for shape in (cache, cache.transpose(0, 1)):
        sides, orders = kv_cache._sides(shape, "FLASH_ATTN", None)
        assert torch.equal(kv_cache._gather(sides[0], slots, orders[0]), wanted)
    together = torch.cat([cache[0], cache[1]], dim=-1).transpose(1, 2)
    sides, orders = kv_cache._sides(together, "TRITON_ATTN", None)
    assert torch.equal(kv_cache._gather(sides[0], slots, orders[0]), wanted)


def test_unknown_layout_is_refused():
    """A backend whose layout is not known is said in one line."""
    with pytest.raises(kv_cache.EngineError, match="layout of OTHER's cache"):
        kv_cache._sides(torch.zeros(2, 2, 2, 2, 2), "OTHER", None)
    with pytest.raises(kv_cache.EngineError, match="layout of CPU_ATTN's cache"):
        kv_cache._sides(torch.zeros(2, 2, 2, 2, 2), "CPU_ATTN", torch.nn.Module())


@pytest.mark.parametrize("level", ["L0", "mix"])
def test_rows_are_what_was_computed(engine, tmp_path, level):
    """The cache holds the turned keys of every position, in any step."""
    recorded = capture(engine, tmp_path, level=level)

    keys = checksums(recorded, f"{LAYER}.cache", "output.0")
    assert keys == checksums(
        recorded, "model.layers.1.self_attn.rotary_emb", "output.1"
    )
    assert {"0.first", "0.prompt", "0.g1", "1.first", "1.prompt", "1.g1"} <= set(keys)
    assert len(checksums(recorded, f"{LAYER}.cache", "output.1")) == len(keys)
    again = capture(engine, tmp_path, level=level)
    assert tools.verdict_of(recorded, again).status == "pass"
    layer = tools.model_of(engine).get_submodule(LAYER)
    assert not list(layer.named_children())
    assert "forward" not in layer.__dict__
    assert "do_kv_cache_update" not in layer.impl.__dict__


def test_off_by_default(engine, tmp_path):
    """Without the key there are no such rows."""
    recorded = tools.capture(engine, tmp_path)

    assert not checksums(recorded, f"{LAYER}.cache", "output.0")


def stale_slot(original, layer, key, value, cache, slots):
    """The last token of a prompt is not written."""
    count = len(slots) - (len(slots) > 1)
    return original(layer, key[:count], value[:count], cache, slots[:count])


def swapped_layout(original, layer, key, value, cache, slots):
    """Keys are written where values belong."""
    return original(layer, value, key, cache, slots)


@pytest.mark.parametrize("level", ["L0", "mix"])
@pytest.mark.parametrize("fault", [stale_slot, swapped_layout])
def test_wrong_write_is_named(engine, tmp_path, fault, level):
    """A slot that is not written and a swapped layout are found in the cache."""
    golden = capture(engine, tmp_path, level=level)
    impl = tools.model_of(engine).get_submodule(LAYER).impl
    original = impl.do_kv_cache_update

    def update(*args):
        return fault(original, *args)

    with tools.changed_attribute(impl, "do_kv_cache_update", update):
        candidate = capture(engine, tmp_path, level=level)

    tools.assert_changed(golden, candidate, f"{LAYER}.cache")
    verdict = tools.verdict_of(golden, candidate)
    assert verdict.status == "fail"
    assert verdict.divergence.module == f"{LAYER}.cache"
