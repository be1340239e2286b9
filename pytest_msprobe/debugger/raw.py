# SPDX-License-Identifier: Apache-2.0
"""Calls as they are kept until they are written."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from pytest_msprobe.model.calls import Frame, Kind, Phase, Tree

if TYPE_CHECKING:
    from pytest_msprobe.debugger.trace import Chunk
    from pytest_msprobe.model.segments import Piece, StepLayout
    from pytest_msprobe.model.shards import Places


class CallSite:
    """A module, or an API under one name: what all of its calls share.

    Attributes:
        prefix: Text of a call's name before the number.
        suffix: Text after it.
        is_module: Whether calls inside it have it as their parent.
        places: Where the columns of its slots stand in unsharded tensors.
        parameters: Of a module, as they were read last: version of the constants,
            the parameters, how often they had been written, their nodes.
        refuted: Slots that were seen not to be token-major.
        stacks: Stacks of its calls by number, taken at their first time.
    """

    __slots__ = (
        "_names",
        "is_module",
        "parameters",
        "places",
        "prefix",
        "refuted",
        "stacks",
        "suffix",
    )

    def __init__(self, prefix: str, suffix: str, *, is_module: bool) -> None:
        self.prefix = prefix
        self.suffix = suffix
        self.is_module = is_module
        self.parameters: tuple[int, list[Any], list[int], dict[str, Tree]] | None = None
        self.places: Places = {}
        self.refuted: set[Any] = set()
        self.stacks: dict[int, tuple[Frame, ...]] = {}
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


class Numbering:
    """Numbers and nesting of the calls of a step.

    Attributes:
        stack: Calls of modules that are running, outermost first.
    """

    __slots__ = ("_counts", "_key_counts", "stack")

    def __init__(self) -> None:
        self._counts: dict[CallSite, int] = {}
        self._key_counts: dict[str, int] = {}
        self.stack: list[RawCall] = []

    def copy(self) -> "Numbering":
        """Another one that goes on from here."""
        other = Numbering()
        other._counts = self._counts.copy()
        other._key_counts = self._key_counts.copy()
        other.stack = self.stack.copy()
        return other

    def next_number(self, site: CallSite) -> int:
        """Number of the next call of a site."""
        return self._counts.get(site, 0)

    def begin(self, site: CallSite, key_prefix: str = "") -> RawCall:
        """A record for a call that starts.

        Args:
            site: What is called.
            key_prefix: Of a shared module: its name below the parent that calls it.
        """
        number = self._counts.get(site, 0)
        self._counts[site] = number + 1
        stack = self.stack
        call = RawCall(site, number, len(stack))
        if stack:
            call.parent = stack[-1]
        if key_prefix:
            key_number = self._key_counts.get(key_prefix, 0)
            self._key_counts[key_prefix] = key_number + 1
            call.key = f"{key_prefix}{key_number}{site.suffix}"
        if site.is_module:
            stack.append(call)
        return call

    def leave(self, call: RawCall) -> None:
        """Takes a module call off the stack, with all calls left open inside it."""
        stack = self.stack
        while stack:
            if stack.pop() is call:
                return

    @property
    def path(self) -> str:
        """Path of the innermost running module, empty for the root."""
        if not self.stack:
            return ""
        call = self.stack[-1]
        # Module.<path>.<Class>.forward.<n>
        return (call.key or call.name).removeprefix("Module.").rsplit(".", 3)[0]


class RawStep:
    """The calls of one step with its pieces.

    Attributes:
        step: Number.
        layout: Rows, None where unknown.
        calls: In the order in which they ended, or chunks of a trace.
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
        self.calls: list[RawCall | Chunk] = []
        self.common_stack: tuple[Frame, ...] = ()
        self.token_pieces: tuple[Piece, ...] = ()
        self.sample_pieces: tuple[Piece, ...] = ()
