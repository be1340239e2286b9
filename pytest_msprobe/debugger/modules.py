# SPDX-License-Identifier: Apache-2.0
"""Level L0: the `forward` of every submodule's instance is wrapped for a capture.

A wrapper on the instance keeps `nn.Module.__call__` on its fast path and is also met
by classes whose `__call__` goes around it (vLLM's support_torch_compile).
"""

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from pytest_msprobe.debugger.collector import Collector
from pytest_msprobe.model.calls import CallRecord

_MISSING = object()
_T = TypeVar("_T")
# A call that has started, and whether it is recorded.
_Entered = tuple[CallRecord, bool]


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
        hook = _ModuleHook(self._collector, module, paths)
        original = module.forward

        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if not hook.collector.is_recording:
                return original(*args, **kwargs)
            entered = hook.enter(args, kwargs)
            try:
                result = original(*args, **kwargs)
            except BaseException:
                hook.abort(entered)
                raise
            hook.leave(entered, result)
            return result

        return forward


class _ModuleHook:
    """What is done around each call of one module; nothing raises."""

    def __init__(
        self, collector: Collector, module: torch.nn.Module, paths: list[str]
    ) -> None:
        name = type(module).__name__
        self.collector = collector
        self._module = module
        self._prefix = f"Module.{paths[0]}.{name}.forward."
        self._aliases = {
            path.rpartition(".")[0]: f"Module.{path}.{name}.forward." for path in paths
        }
        self._enter, self._leave = self._read_inputs, self._read_outputs
        if collector.config.has_functions:
            self._enter, self._leave = unobserved(self._enter), unobserved(self._leave)

    def enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Entered | None:
        """Records the inputs."""
        try:
            return self._enter(args, kwargs)
        except Exception as error:  # noqa: BLE001 - never into the model
            self.collector.fail(error)
            return None

    def leave(self, entered: _Entered | None, result: Any) -> None:
        """Records the outputs."""
        if entered is None:
            return
        self.collector.leave_module(entered[0])
        if not self.collector.is_recording:
            return
        try:
            self._leave(entered, result)
        except Exception as error:  # noqa: BLE001 - never into the model
            self.collector.fail(error)

    def abort(self, entered: _Entered | None) -> None:
        """The call ended with an exception."""
        if entered is not None:
            self.collector.leave_module(entered[0])

    def _read_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Entered:
        key_prefix = self._prefix
        if len(self._aliases) > 1:
            parent = running_path(self.collector)
            key_prefix = self._aliases.get(parent, key_prefix)
        call = self.collector.begin_call(self._prefix, "", key_prefix, is_module=True)
        is_taken = self.collector.selection.enter(call.name, is_module=True)
        if is_taken:
            self.collector.take_stack(call, sys._getframe(1))  # noqa: SLF001
            self.collector.read_inputs(call, args, kwargs)
        return call, is_taken

    def _read_outputs(self, entered: _Entered, result: Any) -> None:
        call, is_taken = entered
        if is_taken:
            self.collector.read_outputs(call, result)
            self.collector.read_parameters(call, self._module)
            self.collector.finish_call(call)
        self.collector.selection.leave(call.name, is_module=True)


def _input_rows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """Rows of a vLLM model's inputs, padding included."""
    for name, dimension in (("input_ids", 0), ("inputs_embeds", 0), ("positions", -1)):
        value = kwargs.get(name)
        if isinstance(value, torch.Tensor) and value.ndim:
            return int(value.shape[dimension])
    if args and isinstance(args[0], torch.Tensor) and args[0].ndim:
        return int(args[0].shape[0])
    return None


def running_path(collector: Collector) -> str:
    """Path of the innermost running module, empty for the root."""
    call = collector.active_module
    if call is None:
        return ""
    # Module.<path>.<Class>.forward.<n>
    return call.key.removeprefix("Module.").rsplit(".", 3)[0]


def unobserved(function: Callable[..., _T]) -> Callable[..., _T]:
    """The function with torch's function modes switched off while it runs."""

    def run(*args: Any, **kwargs: Any) -> _T:
        with torch._C.DisableTorchFunction():  # noqa: SLF001 - the documented switch
            return function(*args, **kwargs)

    return run
