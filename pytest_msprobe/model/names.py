# SPDX-License-Identifier: Apache-2.0
"""Names of calls as msProbe writes them, and back.

`Module.<path>.<Class>.forward.<n>` for a module, `<Prefix>.<api>.<n>.forward` for an
API. The pair `parse_call_name` / `format_call_name` is a round trip for every name
that this package writes.
"""

import re
from dataclasses import dataclass
from typing import Literal

Direction = Literal["forward", "backward"]
MODULE_PREFIX = "Module"
# Class of the modules that tell which experts a router chose.
CHOICE_CLASS = "ExpertChoice"

_MODULE = re.compile(
    r"(?P<prefix>Module|Cell)\.(?P<path>.+)\.(?P<direction>forward|backward)\.(?P<number>\d+)"
)
_API = re.compile(
    r"(?P<prefix>[^.]+)\.(?P<path>.+)\.(?P<number>\d+)\.(?P<direction>forward|backward)"
)


@dataclass(frozen=True, slots=True)
class CallName:
    """The parts of a call's name.

    Attributes:
        prefix: `Module`, `Functional`, `Tensor`, `Torch` or an operator namespace.
        path: For a module its dotted path and class, for an API its name.
        number: How many calls of that name came before it in the step.
        direction: `forward` or `backward`.
    """

    prefix: str
    path: str
    number: int
    direction: Direction = "forward"

    @property
    def is_module(self) -> bool:
        """Whether this is a call of a module (L0) rather than of an API (L1)."""
        return self.prefix in (MODULE_PREFIX, "Cell")

    @property
    def module_path(self) -> str:
        """Dotted path of a module without its class; empty for the root."""
        return self.path.rpartition(".")[0]

    @property
    def class_name(self) -> str:
        """Class of a module, the last part of its path."""
        return self.path.rpartition(".")[2]


def format_call_name(name: CallName) -> str:
    """Text of a call's name, as it stands in dump.json."""
    if name.is_module:
        return f"{name.prefix}.{name.path}.{name.direction}.{name.number}"
    return f"{name.prefix}.{name.path}.{name.number}.{name.direction}"


def parse_call_name(text: str) -> CallName | None:
    """Parts of a call's name, or None where the text is no such name."""
    match = _MODULE.fullmatch(text) or _API.fullmatch(text)
    if match is None:
        return None
    direction: Direction = "forward" if match["direction"] == "forward" else "backward"
    return CallName(match["prefix"], match["path"], int(match["number"]), direction)


def display_name(text: str) -> str:
    """Short form for people: a module's path, or the API with its number.

    `Module.model.layers.0.mlp.Qwen2MLP.forward.0` becomes `model.layers.0.mlp`.
    """
    name = parse_call_name(text)
    if name is None:
        return text
    if name.is_module:
        return name.module_path or name.class_name
    return f"{name.prefix}.{name.path}.{name.number}"
