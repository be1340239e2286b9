# SPDX-License-Identifier: Apache-2.0
"""Which experts the routers of a mixture chose, as rows of their own.

For the time of a capture every layer with a router has one more module, `choice`, that
is called once the router has chosen and returns the experts of each token. Across
numerics keys a token may be routed to others; what follows is another computation,
and judging has to know where it began.

Some kernels are given the router's logits and choose themselves, and the router is
never asked: those of vLLM 0.27's CPU backend do so, and some for quantized
weights still do. They call a function in Python, which is met while the layer runs.
"""

import sys
import threading
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from pytest_msprobe.debugger.collector import Collector
from pytest_msprobe.debugger.writes import Replacements

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

NAME = "choice"
# Methods that choose. The first one gives the experts as the checkpoint numbers them,
# the second one as they lie in memory, where experts are moved between devices.
_METHODS = ("_compute_routing", "select_experts")
# The function of kernels that choose themselves, in vLLM's modules.
_FUNCTION = "select_experts"
_PACKAGE = "vllm."


class ExpertChoice(torch.nn.Module):
    """The experts of each token; compare/experts.py knows the class by its name.

    Attributes:
        ids: (tokens, experts a token), integers: what was chosen just now.
        handles: Hooks on the layer.
    """

    def __init__(self) -> None:
        super().__init__()
        self.handles: tuple[RemovableHandle, ...] = ()
        # Not as an argument: an input would be recorded, in the router's order.
        self.ids: torch.Tensor | None = None

    def forward(self) -> torch.Tensor:
        """(tokens, experts a token), int32: in order, for their order is no choice."""
        assert self.ids is not None
        with torch._C.DisableTorchFunction():  # noqa: SLF001 - not recorded
            return self.ids.to(torch.int32).sort(dim=-1).values


def add_choices(
    model: torch.nn.Module,
    collector: Collector,
    replace: Callable[[Any, str, Callable[..., Any]], None],
) -> list[torch.nn.Module]:
    """Gives every layer with a router a module that tells what it chose.

    Args:
        model: The model.
        collector: Says whether a step is recorded, and keeps errors.
        replace: Replaces a method of an instance until the capture ends.

    Returns:
        The layers, from which the modules are to be taken off.
    """
    layers = []
    hooked: set[int] = set()
    places = _places()
    for module in list(model.modules()):
        router = getattr(module, "router", None)
        method = next((n for n in _METHODS if callable(getattr(router, n, None))), None)
        if method is None or id(router) in hooked or hasattr(module, NAME):
            continue  # vLLM's layers and what runs them may share a router
        hooked.add(id(router))
        choice = ExpertChoice()
        module.add_module(NAME, choice)
        replace(router, method, _telling(choice, collector))
        _Listener(choice, collector, places).watch(module)
        layers.append(module)
    return layers


def remove_choices(layers: list[torch.nn.Module]) -> None:
    """Takes the modules off."""
    for layer in layers:
        choice = layer._modules.pop(NAME, None)  # noqa: SLF001 - there is no public way
        if isinstance(choice, ExpertChoice):
            for handle in choice.handles:
                handle.remove()
    layers.clear()


def _places() -> list[ModuleType]:
    """Modules by which a kernel may call the function that chooses."""
    return [
        module
        for name, module in list(sys.modules.items())
        if name.startswith(_PACKAGE) and callable(vars(module).get(_FUNCTION))
    ]


class _Listener:
    """While a layer runs, what its kernels call to choose tells that layer.

    Nothing stays replaced between the calls of layers, so that captures of several
    engines do not get between each other.
    """

    def __init__(
        self, choice: ExpertChoice, collector: Collector, places: Sequence[ModuleType]
    ) -> None:
        self._choice = choice
        self._collector = collector
        self._places = places
        # Of the layer's calls that run, what was replaced.
        self._running: list[Replacements] = []

    def watch(self, layer: torch.nn.Module) -> None:
        """Puts hooks around the calls of a layer."""
        self._choice.handles = (
            layer.register_forward_pre_hook(self._before),
            layer.register_forward_hook(self._after, always_call=True),
        )

    def _is_met(self) -> bool:
        collector = self._collector
        return collector.is_recording and threading.get_ident() == collector.thread

    def _before(self, _layer: torch.nn.Module, _args: Any) -> None:
        if not self._is_met():
            return
        replaced = Replacements()
        self._running.append(replaced)
        telling = _telling(self._choice, self._collector)
        try:
            for place in self._places:
                replaced.put(place, _FUNCTION, telling(getattr(place, _FUNCTION)))
        except Exception as error:  # noqa: BLE001 - never into the model
            self._collector.fail(error)

    def _after(self, _layer: torch.nn.Module, _args: Any, _result: Any) -> None:
        if self._running and threading.get_ident() == self._collector.thread:
            self._running.pop().remove()


def _telling(
    choice: ExpertChoice, collector: Collector
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A hook for what returns weights and ids of the experts."""

    def hook(original: Callable[..., Any]) -> Callable[..., Any]:
        def choose(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            if collector.is_recording:
                try:
                    choice.ids = result[1]
                    choice()
                except Exception as error:  # noqa: BLE001 - never into the model
                    collector.fail(error)
                finally:
                    choice.ids = None
            return result

        return choose

    return hook
