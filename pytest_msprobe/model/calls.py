# SPDX-License-Identifier: Apache-2.0
"""What was recorded of one call and of one step: plain records."""

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pytest_msprobe.model.segments import Piece, RowClass, StepLayout
from pytest_msprobe.model.shards import Shard

# While a step runs, what is undefined because nobody has written it is `unwritten`.
Role = Literal["read", "written", "undefined", "unwritten", "opaque"]
# Where in a step a call was made: before the model's forward, in it, between it and the
# end of execute_model (pooling), in compute_logits, in sample_tokens.
Phase = Literal["outside", "forward", "after", "logits", "sample"]

# A call, the gradients of one, or those of a module's parameters.
Kind = Literal["forward", "backward", "parameters_grad"]
# Values of arguments are trees: lists, dicts and the leaves TensorValue, Scalar, None.
Tree = Any
# One frame of a call stack: code object and offset of the instruction.
Frame = tuple[Any, int]


class Scalar(dict[str, Any]):
    """A value that is no tensor, as msProbe's JSON object: `{"type", "value"}`."""


@dataclass(slots=True)
class TensorValue:
    """A tensor in a slot of a call.

    Attributes:
        dtype: Name with `torch.`.
        shape: Sizes.
        requires_grad: As in torch.
        rows: (n, 73) float64, one row a piece, or None where nothing was measured.
        pieces: What each row covers; empty for one row over the whole tensor.
        row_class: What dimension 0 counts, as far as this step tells.
        role: Whether the slot may be judged.
        data_name: File name of the saved tensor, or None.
        type_name: Type as msProbe writes it.
        digest: CRC-32 or xor text, where the summary mode asks for it.
        place: Of its columns in the unsharded tensor, None where unknown.
    """

    dtype: str
    shape: tuple[int, ...]
    requires_grad: bool
    rows: npt.NDArray[np.float64] | None
    pieces: tuple[Piece, ...] = ()
    row_class: RowClass = "neither"
    role: Role = "read"
    data_name: str | None = None
    type_name: str = "torch.Tensor"
    digest: str | None = None
    place: Shard | None = None


@dataclass(slots=True)
class CallRecord:
    """One call of a module or API.

    Attributes:
        name: Name as msProbe writes it.
        key: The same with a shared module named after the parent that called it.
        depth: Number of recorded modules around the call.
        parent: Name of the innermost of them, or None.
        input_args: Positional arguments.
        input_kwargs: Keyword arguments.
        output: Results, then tensors that the call wrote in place.
        parameters: Direct parameters of a module, None for an API.
        stack: Frames from the caller outwards, or None.
        phase: Where in the step it was made.
        kind: In a backward, `input_args` are the gradients of the results and `output`
            those of the arguments; of parameters' gradients there are `parameters`.
    """

    name: str
    key: str
    depth: int
    parent: str | None
    input_args: list[Tree] = field(default_factory=list)
    input_kwargs: dict[str, Tree] = field(default_factory=dict)
    output: list[Tree] | dict[str, Tree] | None = None
    parameters: dict[str, Tree] | None = None
    stack: tuple[Frame, ...] | None = None
    phase: Phase = "outside"
    kind: Kind = "forward"


@dataclass(slots=True)
class StepRecord:
    """One step: all calls in the order in which they ended.

    Attributes:
        step: Number of the step.
        layout: Which rows belong to which request, None where unknown.
        calls: The calls.
        common_stack: Frames outside the step, appended to every call's stack.
    """

    step: int
    layout: StepLayout | None = None
    calls: list[CallRecord] = field(default_factory=list)
    common_stack: tuple[Frame, ...] = ()
