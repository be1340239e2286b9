# SPDX-License-Identifier: Apache-2.0
"""Pairs calls that have other names on the two sides: mapping files, fuzzy names."""

import re
from collections.abc import Callable, Collection, Mapping
from difflib import get_close_matches
from pathlib import Path

import msgspec
import yaml

from pytest_msprobe.dump.capture import CallLine, CaptureFile
from pytest_msprobe.errors import ConfigError
from pytest_msprobe.model.names import CallName, format_call_name, parse_call_name

_NEAREST = 3
_SIDES = {"input_args": "input", "input_kwargs": "input"}


def read_mapping(path: Path) -> dict[str, str]:
    """A YAML file of names of the candidate with names of the golden.

    Raises:
        ConfigError: It cannot be read or is no such mapping.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        message = f"{path}: not a readable mapping ({reason})"
        raise ConfigError(message, slug="mapping") from error
    if not isinstance(content, dict) or not all(
        isinstance(text, str) for pair in content.items() for text in pair
    ):
        message = f"{path}: expected lines `name of the candidate: name of the golden`"
        raise ConfigError(message, slug="mapping")
    return content


def row_renames(
    mapping: Mapping[str, str], golden: CaptureFile, candidate: CaptureFile
) -> dict[str, str]:
    """Rows of a data mapping, which may be written as msProbe's tables have them.

    There `input_args.0` is `input.0` and `input_kwargs.x` is `input.x`.

    Raises:
        ConfigError: A row is on neither side.
    """
    sides = [_by_short_name(capture) for capture in (candidate, golden)]
    renames = {}
    for pair in mapping.items():
        found = [side.get(name) for side, name in zip(sides, pair, strict=True)]
        for name, row in zip(pair, found, strict=True):
            if row is None:
                raise _unknown("data mapping", name, "row", sides[pair.index(name)])
        renames[str(found[0])] = str(found[1])
    return renames


def _unknown(mapping: str, name: str, what: str, known: Collection[str]) -> ConfigError:
    """The error for a name of a mapping that a side has not, with the nearest ones."""
    near = get_close_matches(name, list(known), n=_NEAREST, cutoff=0.0)
    hint = f"the nearest are {', '.join(near)}" if near else f"there is no {what}"
    message = f"{mapping}: {name}: no such {what}"
    return ConfigError(message, slug="mapping", hint=hint)


def unknown_layers(
    mapping: Mapping[str, str], golden: CaptureFile, candidate: CaptureFile
) -> dict[str, ConfigError]:
    """Names of a layer mapping that no module of their side has, with what to say."""
    sides = [_modules(capture) for capture in (candidate, golden)]
    return {
        name: _unknown("layer mapping", name, "module", known)
        for pair in mapping.items()
        for name, known in zip(pair, sides, strict=True)
        if not any(name in module for module in known)
    }


def _modules(capture: CaptureFile) -> list[str]:
    """`path.Class` of every module, each once."""
    names = (parse_call_name(call.c) for _, call in capture.calls())
    return list(
        dict.fromkeys(
            name.path for name in names if name is not None and name.is_module
        )
    )


def _by_short_name(capture: CaptureFile) -> dict[str, str]:
    rows: dict[str, str] = {}
    for _, call in capture.calls():
        for slot in (*call.i, *call.o):
            row = f"{call.c}.{slot}"
            rows.setdefault(row, row)
            rows.setdefault(msprobe_row(call.c, slot), row)
    return rows


def msprobe_row(call: str, slot: str) -> str:
    """Name of a row in msProbe's tables."""
    side, dot, rest = slot.partition(".")
    return f"{call}.{_SIDES.get(side, side)}{dot}{rest}"


def renamed(capture: CaptureFile, convert: Callable[[CallName], CallName]) -> None:
    """Renames the calls of a capture in place; names that cannot be read stay."""
    for number, entry in enumerate(capture.entries):
        if isinstance(entry, CallLine):
            name = parse_call_name(entry.c)
            if name is not None:
                text = format_call_name(convert(name))
                capture.entries[number] = msgspec.structs.replace(entry, c=text)


def by_layers(mapping: Mapping[str, str]) -> Callable[[CallName], CallName]:
    """Renames modules by `path.Class`: an exact name first, else parts of names."""

    def convert(name: CallName) -> CallName:
        if not name.is_module:
            return name
        path = mapping.get(name.path)
        if path is None:
            path = name.path
            for old, new in mapping.items():
                path = path.replace(old, new, 1)
        return CallName("Module", path, name.number, name.direction)

    return convert


def without_class(name: CallName) -> CallName:
    """A module without the name of its class; operators are paired by place anyway."""
    if not name.is_module:
        return name
    path = re.sub(r"\.[^.]+$", "", name.path)
    return CallName("Module", f"{path}.*", name.number, name.direction)
