# SPDX-License-Identifier: Apache-2.0
"""Reads dumps written by this package or by msProbe."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_msprobe.dump import layout
from pytest_msprobe.errors import DumpFormatError


@dataclass(frozen=True, slots=True)
class DumpFile:
    """The content of one dump.json.

    Attributes:
        path: The file.
        task: What was written.
        level: L0, L1 or mix.
        data: Records by call name, in order.
    """

    path: Path
    task: str
    level: str
    data: dict[str, dict[str, Any]]


def read_dump(path: Path) -> DumpFile:
    """Reads a dump.json; bare NaN and Infinity are read as floats.

    Raises:
        DumpFormatError: The file is missing, not JSON or has no `data`.
    """
    if path.is_dir():
        path = path / layout.DUMP
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        message = f"{path}: not a readable dump ({error})"
        raise DumpFormatError(message, slug="dump-unreadable") from error
    if not isinstance(content, dict) or not isinstance(content.get("data"), dict):
        message = f"{path}: expected an object with the key data"
        raise DumpFormatError(message, slug="dump-format")
    return DumpFile(
        path,
        str(content.get("task", "")),
        str(content.get("level", "")),
        content["data"],
    )


def read_construct(folder: Path) -> dict[str, str | None]:
    """Names of the calls around each call, from construct.json; empty without one."""
    path = folder / layout.CONSTRUCT
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        message = f"{path}: not readable ({error})"
        raise DumpFormatError(message, slug="dump-unreadable") from error
    if not isinstance(content, dict):
        return {}
    # A parent may stand in a list with the number of a micro step.
    parents = {
        name: value[0] if isinstance(value, list) and value else value
        for name, value in content.items()
    }
    return {
        name: parent if isinstance(parent, str) else None
        for name, parent in parents.items()
    }
