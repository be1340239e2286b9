# SPDX-License-Identifier: Apache-2.0
"""Gradients of the recorded calls and parameters.

Nothing of the graph is exchanged: tensor and node hooks read the gradients that pass.
A module gets views of its inputs, so that what flows back through the module can be
told from what flows back to the same tensor by other ways (a residual).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from pytest_msprobe.debugger.calls import MAX_DEPTH
from pytest_msprobe.debugger.collector import Collector
from pytest_msprobe.debugger.raw import CallSite, RawCall

Gradients = Sequence[torch.Tensor | None]


class Backward:
    """Records gradients while backward runs."""

    def __init__(self, collector: Collector) -> None:
        self._collector = collector
        self._handles: list[Any] = []
        self._sites: dict[CallSite, CallSite] = {}
        self._names: set[str] = set()
        self._generation = -1
        self._parameters: dict[str, RawCall] = {}
        config = collector.config
        self._keeps_input = config.keeps("input", "backward")
        self._keeps_output = config.keeps("output", "backward")

    # Functions -----------------------------------------------------------------

    def watch_function(
        self, forward: RawCall, result: Any, *, args: Gradients, written: Gradients
    ) -> None:
        """Records the backward of a function's call: of its first output's node.

        A result that is an argument as it was (dropout of nothing) has no node of its
        own.

        Args:
            forward: The call.
            result: What it returned.
            args: Its positional arguments.
            written: Those that it wrote.
        """
        first = next(iter(_tensors(result)), None)
        node = first.grad_fn if first is not None else None
        if node is None:
            return
        if any(first is a for a in args) and not any(first is w for w in written):
            return

        def note(inputs: Gradients, outputs: Gradients) -> None:
            call = self.begin(forward)
            self.read_input(call, outputs)
            self.end(call, inputs)

        node.register_hook(self.guarded(note))

    # Parameters ----------------------------------------------------------------

    def watch_parameters(self, module: torch.nn.Module, prefix: str) -> None:
        """Records the gradients of a module's own parameters once accumulated.

        Args:
            module: The module.
            prefix: `Module.<path>.<Class>`.
        """
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or not parameter.is_leaf:
                continue

            def note(parameter: torch.Tensor, name: str = name) -> None:
                self._add_gradient(prefix, name, parameter)

            hook = self.guarded(note)
            self._handles.append(
                parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
            )

    def _add_gradient(self, prefix: str, name: str, parameter: torch.Tensor) -> None:
        self._renew()
        gradient = parameter.grad
        if gradient is None:
            return
        call = self._parameters.get(prefix)
        if call is None or name in (call.parameters or {}):
            site = self._collector.module_site(f"{prefix}.parameters_grad.")
            call = self._collector.make_call(site, self._unused(site, 0))
            call.kind = "parameters_grad"
            call.parameters = {}
            self._parameters[prefix] = call
            call.is_taken = self._select(call, is_module=False)
            if call.is_taken:
                self._collector.add_call(call)
        if call.is_taken:
            assert call.parameters is not None
            call.parameters[name] = self._collector.read_values(call, name, gradient)

    # Records -------------------------------------------------------------------

    def remove(self) -> None:
        """Takes the hooks off that outlive a graph."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def guarded(self, note: Callable[..., None]) -> Callable[..., None]:
        """A hook that never raises into backward and is seen by no mode."""
        collector = self._collector

        def hook(*gradients: Any) -> None:
            if not collector.is_recording:
                return
            try:
                with torch._C.DisableTorchFunction(), torch.no_grad():  # noqa: SLF001
                    note(*gradients)
            except Exception as error:  # noqa: BLE001 - never into the model
                collector.fail(error)

        return hook

    def _renew(self) -> None:
        """Forgets names and records of an earlier step."""
        if self._generation != self._collector.generation:
            self._generation = self._collector.generation
            self._names.clear()
            self._parameters.clear()

    def _unused(self, site: CallSite, number: int) -> int:
        """A number that no call of this step has; a graph may run twice."""
        while site.name(number) in self._names:
            number += 1
        self._names.add(site.name(number))
        return number

    def _site_of(self, forward: CallSite) -> CallSite:
        """The site of the backward of a site's calls."""
        site = self._sites.get(forward)
        if site is None:
            prefix, suffix = forward.prefix, ".backward"
            if forward.is_module:
                prefix, suffix = f"{prefix.removesuffix('forward.')}backward.", ""
            site = CallSite(prefix, suffix, is_module=forward.is_module)
            self._sites[forward] = site
        return site

    def begin(self, forward: RawCall) -> RawCall:
        """A record for the backward of a call."""
        self._renew()
        site = self._site_of(forward.site)
        call = self._collector.make_call(site, self._unused(site, forward.number))
        call.kind = "backward"
        call.depth = forward.depth
        if forward.parent is not None:
            parent = forward.parent
            call.parent = self._collector.make_call(
                self._site_of(parent.site), parent.number
            )
        call.is_taken = self._collector.selection.enter(
            call.name, is_module=site.is_module
        )
        return call

    def read_input(self, call: RawCall, values: Sequence[Any]) -> None:
        """Measures the gradients of a call's results."""
        if call.is_taken and self._keeps_input:
            call.input_args = self._collector.read_values(call, "input", list(values))

    def end(self, call: RawCall, values: Sequence[Any]) -> None:
        """Measures the gradients of a call's arguments and adds its record."""
        if call.is_taken:
            if self._keeps_output:
                kept = list(values)
                call.output = self._collector.read_values(call, "output", kept)
            self._collector.add_call(call)
        self._collector.selection.leave(call.name, is_module=call.site.is_module)

    def _select(self, call: RawCall, *, is_module: bool) -> bool:
        selection = self._collector.selection
        is_taken = selection.enter(call.name, is_module=is_module)
        selection.leave(call.name, is_module=is_module)
        return is_taken


class ModulePass:
    """One call of a module on its way to its backward.

    A module that writes its input in place leaves no view of the old value in the
    graph; the gradients of the tensors behind the views are taken then.

    Attributes:
        args: Positional arguments, views in place of tensors that need a gradient.
    """

    def __init__(
        self, backward: Backward, forward: RawCall, args: tuple[Any, ...]
    ) -> None:
        self._backward = backward
        self._forward = forward
        self._running: RawCall | None = None
        self._needs = [
            isinstance(a, torch.Tensor)
            and a.requires_grad
            and a.layout is torch.strided
            for a in args
        ]
        self.args = args
        self._views: list[torch.Tensor] = []
        self._versions: list[int] = []
        self._outputs: list[bool] = []
        self._behind: Any = None
        if not any(self._needs):
            return
        self.args = tuple(
            a.view_as(a) if needs else a
            for a, needs in zip(args, self._needs, strict=True)
        )
        self._views = [
            a for a, needs in zip(self.args, self._needs, strict=True) if needs
        ]
        self._versions = [view._version for view in self._views]  # noqa: SLF001
        behind = [
            view if view._base is None else view._base  # noqa: SLF001
            for view in self._views
        ]
        watch = torch.autograd.graph.register_multi_grad_hook
        self._behind = watch(behind, backward.guarded(self._end))

    def cancel(self) -> None:
        """The call has ended with an exception: it will have no backward."""
        if self._behind is not None:
            self._behind.remove()

    def watch(self, result: Any) -> None:
        """The call has ended."""
        outputs = _tensors(result)
        self._outputs = [t.requires_grad for t in outputs]
        is_in_place = any(
            view._version != version  # noqa: SLF001
            for view, version in zip(self._views, self._versions, strict=True)
        )
        wanted = [t for t in outputs if t.requires_grad]
        if is_in_place:
            wanted = [_behind(t) for t in wanted]
        watch = torch.autograd.graph.register_multi_grad_hook
        if wanted:
            watch(wanted, self._backward.guarded(self._begin))
        if self._behind is not None and not is_in_place:
            # Behind `_begin`: what a module returns may be the very view it was given.
            self._behind.remove()
            watch(self._views, self._backward.guarded(self._end))

    def _begin(self, gradients: Gradients) -> None:
        self._running = self._backward.begin(self._forward)
        self._backward.read_input(self._running, _spread(gradients, self._outputs))
        if not self._views:
            self._end(())

    def _end(self, gradients: Gradients) -> None:
        if self._running is None:
            self._running = self._backward.begin(self._forward)
        call, self._running = self._running, None
        values = _spread(gradients, self._needs) if self._views else []
        self._backward.end(call, values)


def _spread(gradients: Gradients, needs: list[bool]) -> list[torch.Tensor | None]:
    """Gradients at the places that have one, None elsewhere."""
    found = iter(gradients)
    return [next(found) if is_needed else None for is_needed in needs]


def _behind(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor that a view shows whole, the tensor itself where it is none."""
    base = tensor._base  # noqa: SLF001 - torch has no other access
    if base is not None and base.shape == tensor.shape and base.requires_grad:
        return base
    return tensor


def _tensors(value: Any, depth: int = 0) -> list[torch.Tensor]:
    """The tensors of a result, nested ones included, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if depth >= MAX_DEPTH:
        return []
    items: Any = ()
    if isinstance(value, dict):
        items = value.values()
    elif isinstance(value, list | tuple):
        items = value
    return [tensor for item in items for tensor in _tensors(item, depth + 1)]


_CLIPPING = "clip_grad_norm_"


class Regions:
    """Marks calls of optimizers and of gradient clipping, which no module makes."""

    def __init__(self, collector: Collector) -> None:
        self._collector = collector
        self._handles: list[Any] = []
        self._originals: list[tuple[Any, str, Any]] = []

    def install(self) -> None:
        """Marks them from now on."""
        enter, leave = self._turn("optimizer"), self._turn("")
        self._handles = [
            register_optimizer_step_pre_hook(enter),
            register_optimizer_step_post_hook(leave),
        ]
        for place in (torch.nn.utils, torch.nn.utils.clip_grad):
            original = getattr(place, _CLIPPING)
            self._originals.append((place, _CLIPPING, original))
            setattr(place, _CLIPPING, self._clipping(original))

    def remove(self) -> None:
        """Takes everything off again."""
        for handle in self._handles:
            handle.remove()
        for place, name, original in self._originals:
            setattr(place, name, original)
        self._handles, self._originals = [], []

    def _turn(self, region: str) -> Callable[..., None]:
        def turn(*_arguments: Any) -> None:
            self._collector.region = region

        return turn

    def _clipping(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def clip_grad_norm_(*args: Any, **kwargs: Any) -> Any:
            self._collector.region = "clip_grad"
            try:
                return original(*args, **kwargs)
            finally:
                self._collector.region = ""

        return clip_grad_norm_
