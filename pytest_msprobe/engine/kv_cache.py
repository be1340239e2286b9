# SPDX-License-Identifier: Apache-2.0
"""What each attention layer wrote into its KV cache, as rows of its own.

For the time of a capture every attention layer has one more module, `cache`, that is
called once the cache has been written and returns what it now holds for the tokens of
this step. Only blocks that this step wrote are read. A slot that was not written, or
not as the backend's layout has it, so differs from the golden there.
"""

from collections.abc import Callable
from typing import Any

import torch

from pytest_msprobe.debugger.collector import Collector
from pytest_msprobe.errors import EngineError

NAME = "cache"
_PAIR = 2
_CPU = "CPU_ATTN"
# Tokens, and columns of values, that the AMX kernel keeps together.
_TILE = 16
# Backends whose caches hold keys and values of a token side by side, as they are.
_PLAIN = ("FLASH_ATTN", "TRITON_ATTN", "FLASHINFER")


class KVCache(torch.nn.Module):
    """Reads the cache of one attention layer."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        # Not as a submodule: the layer holds this one.
        object.__setattr__(self, "_layer", layer)

    def forward(self, rows: int) -> tuple[torch.Tensor, ...]:
        """Keys and values of this step's tokens.

        Args:
            rows: Tokens of the step, padding included.

        Returns:
            Two tensors of shape (rows, heads, size); padding repeats some slot.
        """
        layer: Any = self._layer
        with torch._C.DisableTorchFunction():  # noqa: SLF001 - not recorded
            slots = _slots(layer)
            used = torch.zeros(rows, dtype=torch.int64, device=slots.device)
            count = min(rows, slots.numel())
            used[:count] = slots[:count].to(torch.int64).clamp(min=0)
            sides, order = _sides(layer.kv_cache, layer.attn_backend.get_name(), layer)
            return tuple(
                _gather(side, used, order[number]) for number, side in enumerate(sides)
            )


# From blocks as they lie in memory to (blocks, tokens, heads, size).
_Order = Callable[[torch.Tensor], torch.Tensor]


def add_readers(
    model: torch.nn.Module,
    collector: Collector,
    replace: Callable[[Any, str, Callable[..., Any]], None],
) -> list[torch.nn.Module]:
    """Gives every attention layer a reader that runs behind it.

    Args:
        model: The model.
        collector: Says whether a step is recorded, and keeps errors.
        replace: Replaces a method of an instance until the capture ends.

    Returns:
        The layers, whose readers are to be taken off.

    Raises:
        EngineError: A layer's backend keeps its cache in a layout that is not known.
    """
    layers = [
        module
        for module in model.modules()
        if isinstance(getattr(module, "kv_cache", None), torch.Tensor | list)
        and hasattr(module, "attn_backend")
    ]
    for layer in layers:
        reader = KVCache(layer)
        if isinstance(layer.kv_cache, torch.Tensor) and layer.kv_cache.numel():
            _sides(layer.kv_cache, layer.attn_backend.get_name(), layer)  # type: ignore[operator, union-attr]
        layer.add_module(NAME, reader)
        impl: Any = getattr(layer, "impl", None)
        if getattr(layer.attn_backend, "forward_includes_kv_cache_update", True):
            replace(layer, "forward", _reading(reader, collector, "query", 0))
        else:  # vLLM writes before it attends
            hook = _reading(reader, collector, "key", 1)
            replace(impl, "do_kv_cache_update", hook)
    return layers


def remove_readers(layers: list[torch.nn.Module]) -> None:
    """Takes the readers off."""
    for layer in layers:
        layer._modules.pop(NAME, None)  # noqa: SLF001 - there is no public way
    layers.clear()


def _reading(
    reader: KVCache, collector: Collector, name: str, place: int
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A hook for a function that writes the cache, and is then read.

    Args:
        reader: Reads it.
        collector: Says whether a step is recorded, and keeps errors.
        name: Argument of the function that has a row for each token.
        place: Where it stands among the positional ones.
    """

    def hook(original: Callable[..., Any]) -> Callable[..., Any]:
        def write(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            if collector.is_recording:
                try:
                    by_token = kwargs[name] if name in kwargs else args[place]
                    reader(by_token.shape[0])
                except Exception as error:  # noqa: BLE001 - never into the model
                    collector.fail(error)
            return result

        return write

    return hook


def block_sides(layer: Any) -> list[torch.Tensor]:
    """Keys and values of a layer's cache by block, as they lie in memory.

    Raises:
        EngineError: The layout is not known, or it has no cache.
    """
    cache = getattr(layer, "kv_cache", None)
    if not isinstance(cache, torch.Tensor) or not cache.numel():
        raise EngineError("the layer has no KV cache", slug="kv-cache")
    sides, _ = _sides(cache, layer.attn_backend.get_name(), layer)
    return sides


def _slots(layer: Any) -> torch.Tensor:
    """The slot that each token of this step is written to."""
    from vllm.forward_context import get_forward_context

    context = get_forward_context()
    name = layer.layer_name
    slots = getattr(context, "slot_mapping", None)
    found = slots.get(name) if isinstance(slots, dict) else None
    if found is None:
        metadata = context.attn_metadata
        if isinstance(metadata, dict):
            metadata = metadata[name]
        found = metadata.slot_mapping
    assert isinstance(found, torch.Tensor)
    return found.reshape(-1)


def _sides(
    cache: torch.Tensor, backend: str, layer: Any
) -> tuple[list[torch.Tensor], list[_Order]]:
    """Keys and values of a cache by block, and how each lies within one.

    Raises:
        EngineError: The layout is not known.
    """
    if backend == _CPU:
        # Keys of a block and head, then its values; (blocks, heads, tokens, size).
        if cache.ndim == 4:  # noqa: PLR2004
            blocks, heads, tokens, _ = cache.shape
            whole = cache.view(blocks, heads, _PAIR * tokens, -1)
            sides = list(whole.chunk(_PAIR, dim=2))
        else:
            sides = [cache[0], cache[1]]
        orders = _CPU_ORDERS.get(_instruction_set(layer))
        if orders is not None:
            return sides, list(orders)
    elif backend in _PLAIN:
        if cache.ndim == 4:  # noqa: PLR2004 - (blocks, heads, tokens, 2 * size)
            size = cache.shape[-1] // _PAIR
            sides = [cache[..., :size], cache[..., size:]]
            return sides, [_heads_first, _heads_first]
        dimension = 0 if cache.shape[0] == _PAIR else 1
        return list(cache.unbind(dimension)), [_as_it_is, _as_it_is]
    message = f"kv_cache: the layout of {backend}'s cache is not known"
    hint = "leave kv_cache out of the capture section"
    raise EngineError(message, slug="kv-cache-layout", hint=hint)


def _instruction_set(layer: Any) -> str:
    """For which instructions vLLM's CPU backend lays its cache out.

    Until 0.27 its implementation knows, later the layer does.
    """
    found = getattr(layer, "isa", None)
    if found is None:
        found = getattr(getattr(layer, "impl", None), "isa", "unknown")
    return str(found)


def _gather(side: torch.Tensor, slots: torch.Tensor, order: _Order) -> torch.Tensor:
    """What some slots hold: (slots, heads, size)."""
    is_head_first = order is not _as_it_is
    tokens = side.shape[2 if is_head_first else 1]
    numbers, place = torch.unique(slots // tokens, return_inverse=True)
    return order(side[numbers])[place, slots % tokens]


def _as_it_is(blocks: torch.Tensor) -> torch.Tensor:
    """From (blocks, tokens, heads, size)."""
    return blocks


def _heads_first(blocks: torch.Tensor) -> torch.Tensor:
    """From (blocks, heads, tokens, size)."""
    return blocks.transpose(1, 2)


def _transposed(blocks: torch.Tensor) -> torch.Tensor:
    """Keys of the CPU's vector kernels: sizes before tokens within a head."""
    count, heads, tokens, size = blocks.shape
    inner = blocks.reshape(count, heads, size, tokens)
    return inner.permute(0, 3, 1, 2)


def _tiled_keys(blocks: torch.Tensor) -> torch.Tensor:
    """Keys of the AMX kernel: tiles of 16 tokens, two elements of each together."""
    count, heads, tokens, size = blocks.shape
    tiles = tokens // _TILE, size // _PAIR, _TILE, _PAIR
    inner = blocks.reshape(count, heads, *tiles)
    # (count, heads, tile, pair, token, element) to (count, tile, token, heads, ...)
    ordered = inner.permute(0, 2, 4, 1, 3, 5)
    return ordered.reshape(count, tokens, heads, size)


def _tiled_values(blocks: torch.Tensor) -> torch.Tensor:
    """Values of the AMX kernel: tiles of 16 columns, two tokens of each together."""
    count, heads, tokens, size = blocks.shape
    tiles = size // _TILE, tokens // _PAIR, _TILE, _PAIR
    inner = blocks.reshape(count, heads, *tiles)
    # (count, heads, tile, pair, column, token) to (count, pair, token, heads, ...)
    ordered = inner.permute(0, 3, 5, 1, 2, 4)
    return ordered.reshape(count, tokens, heads, size)


_CPU_ORDERS = {
    "vec": (_transposed, _heads_first),
    "vec16": (_transposed, _heads_first),
    "amx": (_tiled_keys, _tiled_values),
}
