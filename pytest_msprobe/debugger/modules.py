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

from pytest_msprobe.debugger.collector import CallSite, Collector, RawCall

_MISSING = object()
_T = TypeVar("_T")


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

    def install(self, *, has_modules: bool) -> None:
        """Wraps every submodule and notes where the model's forward begins.

        Args:
            has_modules: Whether calls of modules are recorded; else only the place
                where the forward begins is noted.
        """
        sizes: set[int] = set()
        for module, paths in module_paths(self._model).values():
            for parameter in module.parameters(recurse=False):
                sizes.update(parameter.shape)
            if has_modules:
                self._wrap(module, self._record(module, paths))
        for _, root in root_models(self._model):
            self._wrap(root, self._mark_forward(root))
        self._collector.model_dimensions |= sizes

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
                collector.measurer.phase = "after"

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
            hook.leave(entered, result, args, kwargs)
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
        self._site = CallSite(f"Module.{paths[0]}.{name}.forward.", "", is_module=True)
        self._site.places = collector.places.get(paths[0], {})
        self._aliases = {}
        if len(paths) > 1:
            self._aliases = {
                path.rpartition(".")[0]: f"Module.{path}.{name}.forward."
                for path in paths
            }
        self._has_parameters = bool(module._parameters)  # noqa: SLF001 - fast
        self._enter, self._leave = self._read_inputs, self._read_outputs
        if collector.config.has_functions:
            self._enter, self._leave = unobserved(self._enter), unobserved(self._leave)

    def enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> RawCall | None:
        """Records the inputs."""
        try:
            return self._enter(args, kwargs)
        except Exception as error:  # noqa: BLE001 - never into the model
            self.collector.fail(error)
            return None

    def leave(
        self,
        call: RawCall | None,
        result: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        """Records the outputs."""
        if call is None:
            return
        self.collector.leave_module(call)
        if not self.collector.is_recording:
            return
        try:
            self._leave(call, result, args, kwargs)
        except Exception as error:  # noqa: BLE001 - never into the model
            self.collector.fail(error)

    def abort(self, call: RawCall | None) -> None:
        """The call ended with an exception."""
        if call is not None:
            self.collector.leave_module(call)

    def _read_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> RawCall:
        collector = self.collector
        alias = ""
        if self._aliases:
            alias = self._aliases.get(running_path(collector), "")
        call = collector.begin_call(self._site, alias)
        if collector.selection.enter(call.name, is_module=True):
            call.is_taken = True
            collector.take_stack(call, sys._getframe(1))  # noqa: SLF001
            collector.read_inputs(call, args, kwargs)
        return call

    def _read_outputs(
        self,
        call: RawCall,
        result: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        collector = self.collector
        if call.is_taken:
            collector.read_outputs(call, result)
            if result is None:
                collector.read_changed(call, args, kwargs)
            if self._has_parameters:
                collector.read_parameters(call, self._module)
            else:
                call.parameters = {}
            collector.finish_call(call)
        collector.selection.leave(call.name, is_module=True)


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
