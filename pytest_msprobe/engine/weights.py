# SPDX-License-Identifier: Apache-2.0
"""Fingerprints of a model's weights, by the module that owns them.

They are taken from the checkpoint files, because engines pack, fuse and drop weights
after loading (vLLM's CPU build leaves linear weights with shape (0,)).
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pytest_msprobe.compat import has_module
from pytest_msprobe.statistics.checksum import checksum

_UNITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_SIZES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2,
    "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
# Elements that are hashed at a time: bounds the memory a large weight takes.
_CHUNK = 1 << 22


def read_checkpoint(path: Path) -> Iterator[tuple[str, int]]:
    """Checksums of the tensors in one safetensors file, by name.

    Args:
        path: The file.

    Yields:
        (name, 64-bit checksum over the tensor's elements).
    """
    with path.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
    data = np.memmap(path, dtype=np.uint8, mode="r", offset=8 + length)
    for name, entry in sorted(header.items()):
        if name == "__metadata__":
            continue
        first, last = entry["data_offsets"]
        size = _SIZES.get(entry["dtype"], 1)
        elements = data[first:last].view(_UNITS[size])
        yield name, _checksum(elements)


def _checksum(elements: "np.ndarray[Any, Any]") -> int:
    """Checksum of a one-dimensional array of unsigned integers."""
    if has_module("numba"):
        from pytest_msprobe.statistics.cpu import checksum_memory

        return checksum_memory(elements.ctypes.data, elements.size, elements.itemsize)
    total = 0
    for start in range(0, len(elements), _CHUNK):
        total += checksum(elements[start : start + _CHUNK], start)
    return total & 0xFFFF_FFFF_FFFF_FFFF


def owner_of(name: str, modules: set[str], packed: dict[str, list[str]]) -> str:
    """Path of the module that a checkpoint's tensor ends up in.

    Args:
        name: Name in the checkpoint, e.g. `model.layers.0.self_attn.q_proj.weight`.
        modules: Paths of the model's modules.
        packed: Packed layers and their parts, e.g. `{"qkv_proj": ["q_proj", ...]}`.

    Returns:
        The path, or that of the nearest enclosing module; empty for the root.
    """
    path = name.rpartition(".")[0]
    while path:
        if path in modules:
            return path
        parent, _, last = path.rpartition(".")
        for whole, parts in packed.items():
            fused = f"{parent}.{whole}" if parent else whole
            if last in parts and fused in modules:
                return fused
        path = parent
    return ""


def checkpoint_folder(model_config: Any) -> Path | None:
    """Folder of a model's files: its own, or that of the hub's local copy.

    Args:
        model_config: vLLM's model configuration.
    """
    folder = Path(model_config.model)
    if folder.is_dir():
        return folder
    try:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(
            model_config.model, "config.json", revision=model_config.revision
        )
    except (ImportError, ValueError):
        return None
    return Path(found).parent if isinstance(found, str) else None


def weight_fingerprints(runner: Any) -> dict[str, dict[str, str]]:
    """Fingerprints by module path and tensor name; empty where no file is at hand.

    Args:
        runner: vLLM's model runner.
    """
    folder = checkpoint_folder(runner.vllm_config.model_config)
    if runner.vllm_config.load_config.load_format == "dummy" or folder is None:
        return {}
    model = runner.get_model()
    modules = {path for path, _ in model.named_modules() if path}
    packed = getattr(model, "packed_modules_mapping", None) or {}
    found: dict[str, dict[str, str]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, value in read_checkpoint(path):
            owner = owner_of(name, modules, packed)
            found.setdefault(owner, {})[name] = f"{value:016x}"
    return found
