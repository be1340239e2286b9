# SPDX-License-Identifier: Apache-2.0
"""How the values of calls were read, to read values of the same form alike.

Steps of a model repeat themselves: the same calls are given other numbers in tensors of
the same form. Torch's own guard, made for compiled code, tells that for all tensors of
many calls at once.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from itertools import chain
from operator import attrgetter, itemgetter, methodcaller
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from pytest_msprobe.debugger.calls import describe_value, holds_others
from pytest_msprobe.debugger.measure import PLAIN_TYPES, Measured, Plan, Unwritten
from pytest_msprobe.model.calls import Role, TensorValue, Tree

if TYPE_CHECKING:
    from pytest_msprobe.model.segments import RowClass

_TensorGuards: Any = None
with contextlib.suppress(ImportError):  # another torch: nothing is remembered
    from torch._C._dynamo.guards import TensorGuards as _TensorGuards


class Form(NamedTuple):
    """How a tensor is read.

    Attributes:
        plan: Of its form.
        row_class: How it is divided.
        is_result: A module returns it: it has been written, by whatever means.
    """

    plan: Plan
    row_class: "RowClass"
    is_result: bool


@dataclass(slots=True)
class Slot:
    """One value to remember.

    Attributes:
        name: As in a dump, e.g. `input_args.0`.
        value: What was given.
        node: What it was read as.
        shown: The same with its role.
        role: That the call's function gives it, None for that of its memory.
        is_result: As in `Form`.
    """

    name: str
    value: Any
    node: Tree
    shown: Tree
    role: Role | None = None
    is_result: bool = False


@dataclass(slots=True)
class Recipe:
    """How the values of some calls were read.

    Attributes:
        state: Which slots were known not to be token-major.
        version: Of the constants as a whole.
        nodes: What the values were read as; tensors that are measured are None.
        same: Places of values that are no tensors, the values, and their slots.
        constants: Picks parameters and buffers, None where there are none.
        constant_ids: Theirs.
        owners: Parameters of modules, as the modules hold them.
        owned_ids: Theirs.
        watched: Constants and parameters that count their writes.
        writes: How often they had been written.
        parameters: What the parameters of each call were read as.
        pick: Picks the tensors that are measured, each once; None where there are none.
        places: Theirs.
        forms: How they are read.
        check: Whether other tensors have their form, and are different ones; tensors
            without elements are asked too.
        roles: Places of those to which the call's function gives a role, and the role.
        copies: Picks the same tensors where they are given again.
        originals: Picks where they are given first.
        copied: Places of both.
        again: Tensors of memory that nobody had written, and where they are measured.
    """

    state: int
    version: int
    nodes: list[Tree] = field(default_factory=list)
    same: list[tuple[int, Any, str]] = field(default_factory=list)
    constants: Callable[[Sequence[Any]], tuple[Any, ...]] | None = None
    constant_ids: list[int] = field(default_factory=list)
    owners: list[Mapping[str, Any]] = field(default_factory=list)
    owned_ids: list[int] = field(default_factory=list)
    watched: list[torch.Tensor] = field(default_factory=list)
    writes: list[int] = field(default_factory=list)
    parameters: list[dict[str, Tree] | None] = field(default_factory=list)
    pick: Callable[[Sequence[Any]], tuple[Any, ...]] | None = None
    places: list[int] = field(default_factory=list)
    forms: list[Form] = field(default_factory=list)
    check: Callable[..., bool] | None = None
    roles: list[tuple[int, Role]] = field(default_factory=list)
    copies: Callable[[Sequence[Any]], tuple[Any, ...]] | None = None
    originals: Callable[[Sequence[Any]], tuple[Any, ...]] | None = None
    copied: list[tuple[int, int]] = field(default_factory=list)
    again: list[tuple[int, int]] = field(default_factory=list)

    def fits(
        self, values: Sequence[Any], state: int, version: int
    ) -> tuple[tuple[torch.Tensor, ...], list[Tree]] | None:
        """The tensors to measure and all other nodes, None where the form is another.

        Args:
            values: Of the calls, as many as there are nodes.
            state: As of the recipe.
            version: Of the constants.
        """
        is_known = state == self.state and version == self.version
        if not (is_known and self._owns_the_same() and self._has_constants(values)):
            return None
        tensors: tuple[torch.Tensor, ...] = ()
        if self.pick is not None:
            tensors = self.pick(values)
            if not self._has_forms(tensors, values):
                return None
        nodes = self.nodes.copy()
        for place, expected, name in self.same:
            value = values[place]
            if value is not expected:
                if type(value) is not type(expected):
                    return None
                nodes[place] = describe_value(value, name, _no_tensor)
        return tensors, nodes

    def _owns_the_same(self) -> bool:
        """Whether parameters are the same ones, and were not written."""
        if self.owners:
            owned = chain.from_iterable(map(_values_of, self.owners))
            if list(map(id, owned)) != self.owned_ids:
                return False
        return list(map(_writes_of, self.watched)) == self.writes

    def _has_constants(self, values: Sequence[Any]) -> bool:
        return self.constants is None or (
            list(map(id, self.constants(values))) == self.constant_ids
        )

    def _has_forms(
        self, tensors: tuple[torch.Tensor, ...], values: Sequence[Any]
    ) -> bool:
        """Whether tensors have the forms, and are given again where they were."""
        try:
            if any(map(_is_nested, tensors)):  # torch's guard would abort
                return False
        except AttributeError:
            return False
        if self.check is None or not self.check(*tensors):
            return False
        if self.copies is None or self.originals is None:
            return True
        copies = map(id, self.copies(values))
        return list(copies) == list(map(id, self.originals(values)))


def _no_tensor(tensor: torch.Tensor, slot: str) -> TensorValue:
    raise AssertionError(f"{slot}: a tensor {tuple(tensor.shape)} inside a plain value")


_values_of = methodcaller("values")
_writes_of = attrgetter("_version")
_is_nested = attrgetter("is_nested")


def _picker(places: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]] | None:
    if not places:
        return None
    if len(places) == 1:
        (place,) = places
        return lambda values: (values[place],)
    return itemgetter(*places)


def make_recipe(
    slots: Sequence[Slot],
    parameters: Sequence[tuple[torch.nn.Module | None, dict[str, Tree] | None]],
    *,
    state: int,
    version: int,
    constants: Mapping[int, tuple[int, Tree]],
    lasting: AbstractSet[Any],
) -> Recipe | None:
    """Remembers how values were read.

    Args:
        slots: The values and what they were read as.
        parameters: Of each call, with the module that owns them.
        state: As of a recipe.
        version: Of the constants.
        constants: Version and node by id of a tensor; others are measured each time.
        lasting: Types of values that cannot change.

    Returns:
        None where values must be looked at each time.
    """
    if _TensorGuards is None:
        return None
    maker = _Maker(Recipe(state, version), constants, lasting)
    for place, slot in enumerate(slots):
        if not maker.add(place, slot):
            return None
    for module, nodes in parameters:
        maker.recipe.parameters.append(nodes)
        if module is not None and module._parameters:  # noqa: SLF001 - fast
            maker.own(module._parameters)  # noqa: SLF001
    return maker.finish()


class _Maker:
    """Adds slots to a recipe."""

    def __init__(
        self,
        recipe: Recipe,
        constants: Mapping[int, tuple[int, Tree]],
        lasting: AbstractSet[Any],
    ) -> None:
        self.recipe = recipe
        self._constants = constants
        self._lasting = lasting
        self._constant_places: list[int] = []
        self._tensors: list[torch.Tensor] = []
        self._measured: set[int] = set()
        self._empty: list[tuple[int, torch.Tensor]] = []
        self._unwritten: list[tuple[int, torch.Tensor]] = []
        self._firsts: dict[tuple[int, Any, Any], int] = {}

    def add(self, place: int, slot: Slot) -> bool:
        """Adds a slot; whether that could be done."""
        value, node = slot.value, slot.node
        known = self._constants.get(id(value))
        if type(value) is Unwritten:
            if not isinstance(node, Measured):
                return False
            self._unwritten.append((place, value.tensor))
        elif known is not None and known[1] is node:
            self._constant_places.append(place)
            self.recipe.constant_ids.append(id(value))
            self._watch(value)
        elif type(value) in PLAIN_TYPES and _is_empty(value):
            self._add_empty(place, value)
        elif type(value) in PLAIN_TYPES:
            if not self._add_tensor(place, slot):
                return False
        elif type(value) in self._lasting or not holds_others(type(value)):
            self.recipe.same.append((place, value, slot.name))
        else:
            return False
        self.recipe.nodes.append(slot.shown)
        return True

    def _add_empty(self, place: int, value: torch.Tensor) -> None:
        """It is not measured, but others have to be empty as well."""
        for first, other in self._empty:
            if other is value:
                self.recipe.copied.append((place, first))
                return
        self._empty.append((place, value))

    def _add_tensor(self, place: int, slot: Slot) -> bool:
        value, node, shown = slot.value, slot.node, slot.shown
        if not isinstance(node, Measured) or node.plan.kind < 0:
            return False
        assert isinstance(shown, Measured)
        # Two rows of one tensor may be divided otherwise, or have other roles.
        first = self._firsts.setdefault((id(value), node.row_class, shown.role), place)
        if first != place:
            self.recipe.copied.append((place, first))
            return True
        if id(value) in self._measured:
            return False
        self._measured.add(id(value))
        form = Form(node.plan, node.row_class, slot.is_result)
        if slot.role is not None:
            self.recipe.roles.append((place, slot.role))
        self.recipe.places.append(place)
        self.recipe.forms.append(form)
        self._tensors.append(value)
        return True

    def own(self, parameters: Mapping[str, Any]) -> None:
        """Adds the parameters of a module."""
        self.recipe.owners.append(parameters)
        for parameter in parameters.values():
            self.recipe.owned_ids.append(id(parameter))
            if parameter is not None:
                self._watch(parameter)

    def _watch(self, tensor: torch.Tensor) -> None:
        if not tensor.is_inference():
            self.recipe.watched.append(tensor)
            self.recipe.writes.append(tensor._version)  # noqa: SLF001 - torch has no other

    def finish(self) -> Recipe:
        """The recipe."""
        recipe = self.recipe
        for place, value in self._unwritten:
            given = zip(recipe.places, self._tensors, strict=True)
            known = [first for first, other in (*given, *self._empty) if other is value]
            if known:
                recipe.again.append((place, known[0]))
            else:
                self._empty.append((place, value))
        recipe.constants = _picker(self._constant_places)
        recipe.pick = _picker([*recipe.places, *(place for place, _ in self._empty)])
        same = recipe.copied + recipe.again
        recipe.copies = _picker([place for place, _ in same])
        recipe.originals = _picker([first for _, first in same])
        tensors = [*self._tensors, *(value for _, value in self._empty)]
        if tensors:
            # Torch would not look at a size or stride that is given as None.
            guards = _TensorGuards(
                *tensors,
                dynamic_dims_sizes=[list(tensor.shape) for tensor in tensors],
                dynamic_dims_strides=[list(tensor.stride()) for tensor in tensors],
            )
            recipe.check = guards.check
        return recipe


def _is_empty(tensor: torch.Tensor) -> bool:
    is_strided = tensor.layout is torch.strided and not tensor.is_quantized
    return is_strided and not tensor.is_meta and not tensor.numel()
