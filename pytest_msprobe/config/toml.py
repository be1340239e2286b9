# SPDX-License-Identifier: Apache-2.0
"""Reads `[tool.msprobe]` of a pyproject.toml, with the lines of its keys.

tomllib tells no lines: they are found again in the text. A key that cannot be found
(inside an inline table) has the line of the nearest one around it.
"""

import re
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

from pytest_msprobe.errors import ConfigError

KeyPath = tuple[str | int, ...]
TABLE = ("tool", "msprobe")
_HEADER = re.compile(r"\s*(\[{1,2})\s*([\w.\s\"'-]+?)\s*\]{1,2}\s*(#.*)?")
_KEY = re.compile(r"\s*([\w.\s\"'-]+?)\s*=")


def has_table(path: Path) -> bool:
    """Whether a pyproject.toml holds settings of ours."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    return re.search(r"^\s*\[+\s*tool\s*\.\s*msprobe\b", text, re.MULTILINE) is not None


def read_table(path: Path, text: str) -> tuple[dict[str, Any], dict[KeyPath, int]]:
    """The table and the lines of its keys.

    Args:
        path: For messages.
        text: Content of the file.

    Raises:
        ConfigError: It is not valid TOML or has no such table.
    """
    try:
        content: Any = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        message = f"{path}: not valid TOML ({error})"
        raise ConfigError(message, slug="config-syntax") from error
    for name in TABLE:
        content = content.get(name) if isinstance(content, dict) else None
    if not isinstance(content, dict):
        message = f"{path}: [tool.msprobe]: not there; expected sections capture, "
        raise ConfigError(message + "engine, tolerances, golden", slug="config-type")
    return content, _lines(text)


def _parts(text: str) -> list[str]:
    return [part.strip().strip("\"'") for part in text.split(".")]


def _lines(text: str) -> dict[KeyPath, int]:
    found: dict[KeyPath, int] = {}
    counts: Counter[KeyPath] = Counter()
    table: KeyPath = ()
    for number, line in enumerate(text.splitlines(), start=1):
        header = _HEADER.fullmatch(line)
        if header is not None:
            table = tuple(_parts(header[2]))
            if header[1] == "[[":
                counts[table] += 1
                table = (*table, counts[table] - 1)
            _note(found, table, number)
            continue
        key = _KEY.match(line)
        if key is not None:
            _note(found, (*table, *_parts(key[1])), number)
    return found


def _note(found: dict[KeyPath, int], key: KeyPath, line: int) -> None:
    if key[: len(TABLE)] == TABLE:
        for length in range(len(TABLE) + 1, len(key) + 1):
            found.setdefault(key[len(TABLE) : length], line)
