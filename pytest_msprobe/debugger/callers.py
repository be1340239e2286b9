# SPDX-License-Identifier: Apache-2.0
"""What the caller's bytecode tells of a call that a function mode sees.

A mode is told the function and the values. Which operator was written, whether its
operands were swapped, and which arguments were given by keyword stands only in the
caller's code. Every place is read once and kept.
"""

import dis
from types import CodeType, FrameType
from typing import Any, NamedTuple

# Operators of `BINARY_OP` whose swapped form reaches a mode as the plain one.
_SWAPPED = {
    "+": "__radd__",
    "*": "__rmul__",
    "&": "__rand__",
    "|": "__ror__",
    "^": "__rxor__",
}
_OPERATORS = {
    "UNARY_NEGATIVE": "__neg__",
    "UNARY_INVERT": "__invert__",
    "UNARY_POSITIVE": "__pos__",
}


class Place(NamedTuple):
    """What an instruction of a caller does.

    Attributes:
        is_operator: Whether it is a binary operator.
        unary: Name of a unary operator's method, empty for everything else.
        swapped: Method of the swapped operator, empty where there is none.
        left: Last instruction of the left operand, None where unknown.
        right: The right operand's instruction where it is a single one.
        positional: Number of positional arguments, -1 where unknown.
        keywords: Names of the arguments given by keyword.
    """

    is_operator: bool = False
    unary: str = ""
    swapped: str = ""
    left: dis.Instruction | None = None
    right: dis.Instruction | None = None
    positional: int = -1
    keywords: tuple[str, ...] = ()


class Callers:
    """Places of callers, each read once."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], Place] = {}
        # Code objects are kept so that no id can be taken by another one.
        self._codes: dict[int, CodeType] = {}

    def place(self, frame: FrameType) -> Place:
        """What the frame's current instruction does."""
        code, offset = frame.f_code, frame.f_lasti
        key = (id(code), offset)
        known = self._known.get(key)
        if known is None:
            self._codes[id(code)] = code
            known = self._known[key] = read_place(code, offset)
        return known

    def is_swapped(self, frame: FrameType, place: Place, args: tuple[Any, ...]) -> bool:
        """Whether a tensor was the right operand and no tensor the left one.

        Args:
            frame: The caller.
            place: Its current instruction.
            args: As the mode got them: the tensor first.
        """
        if not place.swapped or len(args) != 2:  # noqa: PLR2004 - two operands
            return False
        tensor, other = args
        if hasattr(other, "__torch_function__"):
            return False
        for operand, is_swapped in ((place.right, False), (place.left, True)):
            if operand is not None and operand.opname == "LOAD_CONST":
                return is_swapped
        for operand, is_swapped in ((place.right, True), (place.left, False)):
            if operand is not None and operand.opname == "LOAD_FAST":
                value = frame.f_locals.get(operand.argval)
                return is_swapped if value is tensor else not is_swapped
        return False


def read_place(code: CodeType, offset: int) -> Place:
    """What the instruction at a byte offset of a code object does.

    The offset may lie in the inline cache behind the instruction.
    """
    before = [
        item
        for item in dis.get_instructions(code)
        if item.offset <= offset and item.opname not in ("PRECALL", "EXTENDED_ARG")
    ]
    instruction = before.pop()
    name = instruction.opname
    if name in ("BINARY_OP", "COMPARE_OP"):
        left, right = _operands(before)
        swapped = _SWAPPED.get(instruction.argrepr, "") if name == "BINARY_OP" else ""
        return Place(is_operator=True, swapped=swapped, left=left, right=right)
    if name in _OPERATORS:
        return Place(unary=_OPERATORS[name])
    if name in ("CALL", "CALL_KW"):
        keywords: tuple[str, ...] = ()
        if before and (before[-1].opname == "KW_NAMES" or name == "CALL_KW"):
            keywords = tuple(code.co_consts[before[-1].arg or 0])
        return Place(
            positional=(instruction.arg or 0) - len(keywords), keywords=keywords
        )
    return Place()


def _operands(
    before: list[dis.Instruction],
) -> tuple[dis.Instruction | None, dis.Instruction | None]:
    """Last instructions of a binary operator's operands, as far as they are plain."""
    if not before or before[-1].opname not in ("LOAD_FAST", "LOAD_CONST"):
        return _left_of(before), None
    left = before[-2] if len(before) > 1 else None
    return left, before[-1]


def _left_of(before: list[dis.Instruction]) -> dis.Instruction | None:
    """Last instruction of the left operand, found by the depth of the stack."""
    depth = 0
    for index in range(len(before) - 1, 0, -1):
        instruction = before[index]
        if instruction.is_jump_target or "JUMP" in instruction.opname:
            return None
        depth += dis.stack_effect(instruction.opcode, instruction.arg, jump=False)
        if depth == 1:
            return before[index - 1]
    return None
