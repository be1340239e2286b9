# SPDX-License-Identifier: Apache-2.0
"""Level debug: variables that the program hands to `save`, with their gradients."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pytest_msprobe.config.debugger_config import DebuggerConfig
from pytest_msprobe.debugger.calls import describe_value
from pytest_msprobe.debugger.collector import digest
from pytest_msprobe.debugger.measure import Measured, Measurer, to_value
from pytest_msprobe.dump.layout import DEBUG, TENSORS
from pytest_msprobe.dump.tensors import save_tensor
from pytest_msprobe.dump.writer import format_tree, write_atomically
from pytest_msprobe.model.calls import TensorValue, Tree

_PLAIN = (torch.Tensor, int, float, str, type(None))


def is_savable(variable: Any) -> bool:
    """Whether a variable is a tensor, a plain value or a nest of them."""
    if isinstance(variable, dict):
        return all(isinstance(k, str) and is_savable(v) for k, v in variable.items())
    if isinstance(variable, list | tuple):
        return all(is_savable(item) for item in variable)
    return isinstance(variable, _PLAIN)


class SavedVariables:
    """The variables saved in one step."""

    def __init__(self, config: DebuggerConfig, folder: Path) -> None:
        """Begins a step.

        Args:
            config: What to save: statistics, tensors, checksums.
            folder: Of the rank in the step.
        """
        self._config = config
        self._folder = folder
        self._measurer = Measurer()
        self._counts: dict[str, int] = {}
        self._entries: dict[str, Tree] = {}

    def save(self, variable: Any, name: str, *, with_gradient: bool) -> None:
        """Measures a variable now, and its gradient when backward delivers it."""
        number = self._counts.get(name, 0)
        self._counts[name] = number + 1
        full = f"{name}.{number}.debug"
        self._entries[full] = describe_value(variable, full, self._measure)
        if with_gradient:
            full = f"{name}_grad.{number}.debug"
            self._entries[full] = self._await_gradients(variable, full)

    def _measure(self, tensor: torch.Tensor, slot: str) -> Tree:
        measured = self._measurer.measure(tensor, set(), 0)
        self._measurer.launch()
        value = measured
        if isinstance(measured, Measured):
            value = to_value(measured, (), ())
        assert isinstance(value, TensorValue)
        if self._config.summary_mode != "statistics":
            value = replace(value, digest=digest(tensor, self._config.summary_mode))
        if self._config.task == "tensor":
            name = save_tensor(self._folder / TENSORS, f"{slot}.pt", tensor)
            value = replace(value, data_name=name)
        return value

    def _await_gradients(self, variable: Any, slot: str) -> Tree:
        """The variable's structure with nulls, filled while backward runs."""
        if isinstance(variable, dict):
            return self._await_items(dict(variable), variable.items(), slot)
        if isinstance(variable, list | tuple):
            return self._await_items([None] * len(variable), enumerate(variable), slot)
        if isinstance(variable, torch.Tensor) and variable.requires_grad:

            def note(gradient: torch.Tensor) -> None:
                self._entries[slot] = self._measure(gradient, slot)

            variable.register_hook(note)  # type: ignore[no-untyped-call]
        return None

    def _await_items(self, tree: Any, items: Any, slot: str) -> Tree:
        for key, item in items:
            inner = f"{slot}.{key}"
            tree[key] = None
            if isinstance(item, torch.Tensor):
                self._hook_item(tree, key, item, inner)
            else:
                tree[key] = self._await_gradients(item, inner)
        return tree

    def _hook_item(self, tree: Any, key: Any, tensor: torch.Tensor, slot: str) -> None:
        if not tensor.requires_grad:
            return

        def note(gradient: torch.Tensor) -> None:
            tree[key] = self._measure(gradient, slot)

        tensor.register_hook(note)  # type: ignore[no-untyped-call]

    def write(self) -> None:
        """Writes debug.json, where anything was saved.

        Raises:
            OSError: It could not be written.
        """
        if not self._entries:
            return
        self._measurer.finish_step()
        self._measurer.settle()
        self._folder.mkdir(parents=True, exist_ok=True)
        tensors = None
        if self._config.task == "tensor":
            tensors = str(self._folder / TENSORS)
        head = {
            "task": self._config.task,
            "level": "debug",
            "framework": "pytorch",
            "dump_data_dir": tensors,
        }
        lines = [f" {json.dumps(k)}: {json.dumps(v)}," for k, v in head.items()]
        mode = self._config.summary_mode
        entries = ",\n".join(
            f"  {json.dumps(name)}: {format_tree(tree, mode)}"
            for name, tree in self._entries.items()
        )
        body = "\n".join(lines) + f'\n "data": {{\n{entries}\n }}'
        write_atomically(self._folder / DEBUG, f"{{\n{body}\n}}\n")
