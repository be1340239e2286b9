# SPDX-License-Identifier: Apache-2.0
"""Turns the arguments and results of a call into trees of plain records."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from pytest_msprobe.model.calls import Scalar, TensorValue, Tree

# Deeper values are cut off: a row says so instead of a crash.
MAX_DEPTH = 100

Measure = Callable[[torch.Tensor, str], TensorValue]
# Saves an array of numpy, and returns the name of its file if it has one.
Keep = Callable[["np.ndarray[Any, Any]", str], str | None]

_PLAIN = (bool, int, float, str)
# Of keyword arguments that stand for something else, by their last name.
_NAMED = {
    "dtype": "torch.dtype",
    "output_dtype": "torch.dtype",
    "device": "torch.device",
}


def describe_value(  # noqa: PLR0911 - one return a kind of value
    value: Any,
    slot: str,
    measure: Measure,
    depth: int = 0,
    keep: Keep | None = None,
) -> Tree:
    """A value as a tree: tensors measured, everything else as msProbe writes it.

    Args:
        value: Any argument or result.
        slot: Where it stands, e.g. `input_args.0`; nested places are appended.
        measure: Called for every tensor with its slot.
        depth: Nesting so far.
        keep: Called for every array of numpy with its slot, None to save none.
    """
    if isinstance(value, torch.Tensor):
        return measure(value, slot)
    if value is None:
        return None
    kind = type(value)
    if kind in _PLAIN:
        named = _NAMED.get(slot.rpartition(".")[2], kind.__name__)
        return Scalar(type=named, value=value)
    if depth >= MAX_DEPTH:
        return Scalar(type=kind.__name__, value=f"nested deeper than {MAX_DEPTH}")
    if isinstance(value, torch.Size):
        return Scalar(type="torch.Size", value=list(value))
    if isinstance(value, list | tuple | dict):
        return _describe_container(value, slot, measure, depth, keep)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return _describe_container(fields, slot, measure, depth, keep)
    return _describe_other(value, slot, keep)


def holds_others(kind: type) -> bool:
    """Whether what is told of values of a type may change, or tells of tensors."""
    kinds = (torch.Tensor, list, tuple, dict, np.ndarray)
    return issubclass(kind, kinds) or dataclasses.is_dataclass(kind)


def _describe_container(
    value: Any, slot: str, measure: Measure, depth: int, keep: Keep | None
) -> Tree:
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {
            str(key): describe_value(item, f"{slot}.{key}", measure, depth + 1, keep)
            for key, item in value.items()
        }
    return [
        describe_value(item, f"{slot}.{index}", measure, depth + 1, keep)
        for index, item in enumerate(value)
    ]


def _describe_other(  # noqa: PLR0911 - one return a kind of value
    value: Any, slot: str, keep: Keep | None
) -> Tree:
    """Values that are neither tensors, plain values nor containers."""
    name = slot.rpartition(".")[2]
    if isinstance(value, slice):
        parts = [
            part if isinstance(part, int) else None
            for part in (value.start, value.stop, value.step)
        ]
        return Scalar(type="slice", value=parts)
    if value is Ellipsis:
        return Scalar(type="ellipsis", value="...")
    if isinstance(value, torch.memory_format):
        text = str(value).removeprefix("torch.")
        return Scalar(type="torch.memory_format", format=text)
    if isinstance(value, torch.dtype):
        if name in ("dtype", "output_dtype"):
            return Scalar(type="torch.dtype", value=str(value))
        return Scalar()
    if isinstance(value, torch.device):
        if name == "device":
            return Scalar(type="torch.device", value=f"{value.type}:{value.index}")
        return Scalar()
    if isinstance(value, np.ndarray):
        described = _describe_array(value)
        file = keep(value, slot) if keep is not None else None
        if file is not None:
            described["data_name"] = file
        return described
    if isinstance(value, np.generic):
        item = value.item()
        plain = item if isinstance(item, bool | int | float | str) else None
        return Scalar(type=type(value).__name__, value=plain)
    if isinstance(value, _PLAIN):  # subclasses: enums of int and str, numpy float64
        base = next(kind for kind in _PLAIN if isinstance(value, kind))
        return Scalar(type=base.__name__, value=base(value))
    return None


def _describe_array(value: "np.ndarray[Any, Any]") -> Scalar:
    """A numpy array as msProbe writes it, statistics by numpy."""
    result = Scalar(
        type="numpy.ndarray", dtype=str(value.dtype), shape=list(value.shape)
    )
    numeric = value.dtype.kind in "biuf" and value.size > 0
    wide = value.astype(np.float64) if numeric else None
    result["Max"] = value.max().item() if wide is not None else None
    result["Min"] = value.min().item() if wide is not None else None
    result["Mean"] = float(wide.mean()) if wide is not None else None
    result["Norm"] = float(np.linalg.norm(wide)) if wide is not None else None
    return result


def walk_tensors(tree: Tree, slot: str) -> list[tuple[str, TensorValue]]:
    """All tensors of a tree with their slots, in order."""
    if isinstance(tree, TensorValue):
        return [(slot, tree)]
    items: Any
    if isinstance(tree, Scalar) or tree is None:
        return []
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    found = []
    for key, item in items:
        found.extend(walk_tensors(item, f"{slot}.{key}" if slot else str(key)))
    return found


def walk_scalars(tree: Tree, slot: str) -> list[tuple[str, Any]]:
    """All numbers, booleans and texts of a tree with their slots, in order."""
    if isinstance(tree, Scalar):
        return [(slot, tree["value"])] if "value" in tree else []
    if isinstance(tree, TensorValue) or tree is None:
        return []
    items: Any = tree.items() if isinstance(tree, dict) else enumerate(tree)
    found = []
    for key, item in items:
        found.extend(walk_scalars(item, f"{slot}.{key}" if slot else str(key)))
    return found
