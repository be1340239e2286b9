# SPDX-License-Identifier: Apache-2.0
"""Level L0: the `forward` of every submodule's instance is wrapped for a capture.

A wrapper on the instance keeps `nn.Module.__call__` on its fast path and is also met
by classes whose `__call__` goes around it (vLLM's support_torch_compile).
"""

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from pytest_msprobe.debugger.collector import Collector

_MISSING = object()


def root_models(
    model: torch.nn.Module | Sequence[torch.nn.Module],
) -> list[tuple[str, torch.nn.Module]]:
    """The models given to `start` with the prefix of their submodules' paths."""
    if isinstance(model, torch.nn.Module):
        return [("", model)]
    return [(f"{index}.", item) for index, item in enumerate(model)]


def module_paths(
    model: torch.nn.Module | Sequence[torch.nn.Module],
) -> dict[int, tuple[torch.nn.Module, list[str]]]:
    """Every submodule, by id, with all the paths that lead to it; roots left out."""
    found: dict[int, tuple[torch.nn.Module, list[str]]] = {}
    for prefix, root in root_models(model):
        for path, module in root.named_modules(remove_duplicate=False):
            if path:
                entry = found.setdefault(id(module), (module, []))
                entry[1].append(prefix + path)
    return found


class ModuleWrappers:
    """Puts wrappers on the submodules of a model and takes them off again."""

    def __init__(
        self, collector: Collector, model: torch.nn.Module | Sequence[torch.nn.Module]
    ) -> None:
        self._collector = collector
        self._model = model
        self._originals: list[tuple[torch.nn.Module, object]] = []

    def install(self) -> None:
        """Wraps every submodule and notes where the model's forward begins."""
        sizes: set[int] = set()
        for module, paths in module_paths(self._model).values():
            for parameter in module.parameters(recurse=False):
                sizes.update(parameter.shape)
            self._wrap(module, self._record(module, paths))
        for _, root in root_models(self._model):
            self._wrap(root, self._mark_forward(root))
        known = self._collector.classifier.model_dimensions
        self._collector.classifier.model_dimensions = known | sizes

    def remove(self) -> None:
        """Restores every module as it was."""
        for module, original in reversed(self._originals):
            if original is _MISSING:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = original
        self._originals.clear()

    def _wrap(self, module: torch.nn.Module, wrapper: Callable[..., Any]) -> None:
        self._originals.append((module, module.__dict__.get("forward", _MISSING)))
        module.__dict__["forward"] = wrapper

    def _mark_forward(self, root: torch.nn.Module) -> Callable[..., Any]:
        collector, original = self._collector, root.forward

        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if not collector.is_recording:
                return original(*args, **kwargs)
            try:
                collector.enter_forward(_input_rows(args, kwargs))
            except Exception as error:  # noqa: BLE001 - never into the model
                collector.fail(error)
            try:
                return original(*args, **kwargs)
            finally:
                collector.phase = "outside"

        return forward

    def _record(self, module: torch.nn.Module, paths: list[str]) -> Callable[..., Any]:
        collector, original = self._collector, module.forward
        name = type(module).__name__
        prefix = f"Module.{paths[0]}.{name}.forward."
        aliases = {
            path.rpartition(".")[0]: f"Module.{path}.{name}.forward." for path in paths
        }
        with_functions = collector.config.has_functions

        def enter(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            key_prefix = prefix
            if len(aliases) > 1:
                key_prefix = _alias(collector, aliases) or prefix
            call = collector.begin_call(prefix, "", key_prefix, is_module=True)
            call.is_finished = False
            if collector.selection.enter(call.name, is_module=True):
                collector.take_stack(call, sys._getframe(1))  # noqa: SLF001
                collector.read_inputs(call, args, kwargs)
                return call, True
            return call, False

        def leave(call: Any, result: Any, *, is_taken: bool) -> None:
            if is_taken:
                collector.read_outputs(call, result)
                collector.read_parameters(call, module)
                collector.finish_call(call)
            collector.selection.leave(call.name, is_module=True)

        if with_functions:
            enter, leave = _unobserved(enter), _unobserved(leave)

        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if not collector.is_recording:
                return original(*args, **kwargs)
            call, is_taken = None, False
            try:
                call, is_taken = enter(args, kwargs)
            except Exception as error:  # noqa: BLE001 - never into the model
                collector.fail(error)
            try:
                result = original(*args, **kwargs)
            except BaseException:
                if call is not None:
                    collector.leave_module(call)
                raise
            if call is not None:
                collector.leave_module(call)
                try:
                    if collector.is_recording:
                        leave(call, result, is_taken=is_taken)
                except Exception as error:  # noqa: BLE001 - never into the model
                    collector.fail(error)
            return result

        return forward


def _input_rows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """Rows of a vLLM model's inputs, padding included."""
    for name, dimension in (("input_ids", 0), ("inputs_embeds", 0), ("positions", -1)):
        value = kwargs.get(name)
        if isinstance(value, torch.Tensor) and value.ndim:
            return int(value.shape[dimension])
    if args and isinstance(args[0], torch.Tensor) and args[0].ndim:
        return int(args[0].shape[0])
    return None


def _alias(collector: Collector, aliases: dict[str, str]) -> str | None:
    """Name of a shared module below the innermost running module that holds it."""
    for path in _running_paths(collector):
        if path in aliases:
            return aliases[path]
    return None


def _running_paths(collector: Collector) -> Iterator[str]:
    call = collector.active_module
    if call is None:
        yield ""
    else:
        # Module.<path>.<Class>.forward.<n>
        yield call.key.removeprefix("Module.").rsplit(".", 3)[0]


def _unobserved(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with torch's function modes switched off while it runs."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction():  # noqa: SLF001 - the documented switch
            return function(*args, **kwargs)

    return run
