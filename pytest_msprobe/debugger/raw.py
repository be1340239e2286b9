# SPDX-License-Identifier: Apache-2.0
"""Calls as they are kept until they are written."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from pytest_msprobe.model.calls import Frame, Kind, Phase, Tree

if TYPE_CHECKING:
    from pytest_msprobe.debugger.recipes import Recipe
    from pytest_msprobe.model.segments import Piece, StepLayout
    from pytest_msprobe.model.shards import Places


class CallSite:
    """A module, or an API under one name: what all of its calls share.

    Attributes:
        prefix: Text of a call's name before the number.
        suffix: Text after it.
        is_module: Whether calls inside it have it as their parent.
        places: Where the columns of its slots stand in unsharded tensors.
        parameters: Of a module: how they were read last.
        recipes: How inputs (by the call's number) and outputs (by its complement) were
            read last.
        refuted: Slots that were seen not to be token-major.
        stacks: Stacks of its calls by number, taken at their first time.
    """

    __slots__ = (
        "_names",
        "count",
        "generation",
        "is_module",
        "parameters",
        "places",
        "prefix",
        "recipes",
        "refuted",
        "stacks",
        "suffix",
    )

    def __init__(self, prefix: str, suffix: str, *, is_module: bool) -> None:
        self.prefix = prefix
        self.suffix = suffix
        self.is_module = is_module
        self.parameters: Recipe | None = None
        self.recipes: dict[int, Recipe] = {}
        self.places: Places = {}
        self.refuted: set[Any] = set()
        self.stacks: dict[int, tuple[Frame, ...]] = {}
        self.count = 0
        self.generation = -1
        self._names: list[str] = []

    def name(self, number: int) -> str:
        """Name of its call with this number in a step."""
        names = self._names
        while len(names) <= number:
            names.append(f"{self.prefix}{len(names)}{self.suffix}")
        return names[number]


class RawCall:
    """One call as it is kept until it is written; trees hold `Measured` leaves.

    It is made when the call starts, with its arguments as they are; what they held is
    read when the collector's log is, before anything can have written them.
    """

    kind: Kind = "forward"
    key = ""
    parent: "RawCall | None" = None
    phase: Phase = "outside"
    adjust: "Callable[[RawCall], None] | None" = None
    module: torch.nn.Module | None = None
    result: Any = None
    written: Sequence[torch.Tensor] = ()
    output: list[Tree] | dict[str, Tree] | None = None
    parameters: dict[str, Tree] | None = None
    stack: tuple[Frame, ...] | None = None
    is_read = False
    is_taken = False

    def __init__(self, site: CallSite, number: int, depth: int) -> None:
        self.site = site
        self.number = number
        self.depth = depth
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}
        self.input_args: list[Tree] = []
        self.input_kwargs: dict[str, Tree] = {}

    @property
    def name(self) -> str:
        """Name as msProbe writes it."""
        return self.site.name(self.number)


class RawStep:
    """The calls of one step with its pieces.

    Attributes:
        step: Number.
        layout: Rows, None where unknown.
        calls: In the order in which they ended.
        common_stack: Frames outside the step.
        token_pieces: Pieces of token-major tensors.
        sample_pieces: Pieces of sample-major tensors.
    """

    __slots__ = (
        "calls",
        "common_stack",
        "layout",
        "sample_pieces",
        "step",
        "token_pieces",
    )

    def __init__(self, step: int) -> None:
        self.step = step
        self.layout: StepLayout | None = None
        self.calls: list[RawCall] = []
        self.common_stack: tuple[Frame, ...] = ()
        self.token_pieces: tuple[Piece, ...] = ()
        self.sample_pieces: tuple[Piece, ...] = ()
