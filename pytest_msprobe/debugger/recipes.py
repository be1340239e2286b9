# SPDX-License-Identifier: Apache-2.0
"""How the values of a call were read, to read values of the same form alike.

Steps of a model repeat themselves: the same call is given other numbers in tensors of
the same form. Torch's own guard, made for compiled code, tells that with one call.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from pytest_msprobe.debugger.measure import PLAIN_TYPES, Measured, Plan
from pytest_msprobe.model.calls import Tree

if TYPE_CHECKING:
    from pytest_msprobe.model.segments import RowClass

_TensorGuards: Any = None
with contextlib.suppress(ImportError):  # another torch: nothing is remembered
    from torch._C._dynamo.guards import TensorGuards as _TensorGuards

# What a recipe holds for, besides the values: phase and rows of the step.
State = tuple[Any, ...]


class Recipe:
    """How a list of values was read.

    Attributes:
        state: Of the step.
        names: Of the values that were given by keyword, at the end of the list.
        nodes: What they were read as; tensors that are measured each time are None.
        same: Places of values that are no tensors, and the values.
        constants: Places of parameters, buffers and tensors without elements, the
            tensors, and their versions.
        version: Of the constants as a whole.
        places: Of tensors that are measured.
        forms: Plan and class of rows of each of them.
        check: Whether other tensors have their form.
    """

    __slots__ = (
        "check",
        "constants",
        "forms",
        "names",
        "nodes",
        "places",
        "same",
        "state",
        "version",
    )

    def __init__(self, state: State, names: tuple[str, ...], version: int) -> None:
        self.state = state
        self.names = names
        self.version = version
        self.nodes: list[Tree] = []
        self.same: list[tuple[int, Any]] = []
        self.constants: list[tuple[int, torch.Tensor, int]] = []
        self.places: list[int] = []
        self.forms: list[tuple[Plan, RowClass]] = []
        self.check: Callable[..., bool] = _is_empty

    def fits(
        self, values: Sequence[Any], names: tuple[str, ...], state: State, version: int
    ) -> list[torch.Tensor] | None:
        """The tensors to measure, None where the values have another form.

        Args:
            values: Positional values, then those given by keyword.
            names: Of the latter.
            state: Of the step.
            version: Of the constants.
        """
        if state != self.state or len(values) != len(self.nodes) or names != self.names:
            return None
        for place, expected in self.same:
            value = values[place]
            if value is not expected and (
                type(value) is not type(expected) or repr(value) != repr(expected)
            ):
                return None
        if self.constants:
            if version != self.version:
                return None
            for place, constant, written in self.constants:
                value = values[place]
                if value is not constant or (
                    written >= 0 and value._version != written  # noqa: SLF001 - torch has no other
                ):
                    return None
        tensors = [values[place] for place in self.places]
        return tensors if self.check(*tensors) else None


def _is_empty(*tensors: torch.Tensor) -> bool:
    return not tensors


def make_recipe(
    values: Sequence[Any],
    nodes: Sequence[Tree],
    names: tuple[str, ...],
    state: State,
    version: int,
    constants: Mapping[int, tuple[int, Tree]],
    lasting: frozenset[Any],
) -> Recipe | None:
    """Remembers how values were read.

    Args:
        values: Positional values, then those given by keyword.
        nodes: What they were read as.
        names: Of values given by keyword.
        state: Of the step.
        version: Of the constants.
        constants: Version and node by id of a tensor; others are measured each time.
        lasting: Types of values that are equal if they look equal.

    Returns:
        None where values must be looked at each time.
    """
    if _TensorGuards is None:
        return None
    recipe = Recipe(state, names, version)
    tensors = []
    for place, (value, node) in enumerate(zip(values, nodes, strict=True)):
        known = constants.get(id(value))
        is_empty = isinstance(value, torch.Tensor) and not value.numel()
        if is_empty or (known is not None and known[1] is node):
            written = -1 if value.is_inference() else value._version  # noqa: SLF001
            recipe.constants.append((place, value, written))
        elif type(value) in PLAIN_TYPES:
            if not isinstance(node, Measured) or node.plan.kind < 0:
                return None
            recipe.places.append(place)
            recipe.forms.append((node.plan, node.row_class))
            tensors.append(value)
            recipe.nodes.append(None)
            continue
        elif type(value) in lasting:
            recipe.same.append((place, value))
        else:
            return None
        recipe.nodes.append(node)
    if tensors:
        every = [[None] * tensor.ndim for tensor in tensors]
        guards = _TensorGuards(
            *tensors, dynamic_dims_sizes=every, dynamic_dims_strides=every
        )
        recipe.check = guards.check
    return recipe
