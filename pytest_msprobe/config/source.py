# SPDX-License-Identifier: Apache-2.0
"""Reads JSON and YAML files and remembers where every key stands.

A wrong value is then reported as `file:line: key: what was expected`, in one line.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pytest_msprobe.config.toml import KeyPath, read_table
from pytest_msprobe.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Source:
    """The content of a configuration file with the lines of its keys.

    Attributes:
        path: The file, or None for values that come from no file.
        data: Its content.
        lines: Line of each key path, 1-based; empty for JSON.
    """

    path: Path | None
    data: dict[str, Any]
    lines: dict[KeyPath, int] = field(default_factory=dict)

    def where(self, key: KeyPath) -> str:
        """`file:line: key` for a message."""
        text = ".".join(str(part) for part in key)
        line = self.lines.get(key)
        place = str(self.path) if self.path else "configuration"
        if line is not None:
            place = f"{place}:{line}"
        return f"{place}: {text}" if text else place

    def origin(self, key: KeyPath) -> str:
        """`file:line` of a key, or of the nearest one around it."""
        while key and key not in self.lines:
            key = key[:-1]
        name = self.path.name if self.path else "configuration"
        return f"{name}:{self.lines[key]}" if key else name

    def error(
        self, key: KeyPath, expected: str, *, slug: str = "config"
    ) -> ConfigError:
        """The error to raise for the value at a key."""
        return ConfigError(f"{self.where(key)}: {expected}", slug=slug)


def read_source(path: Path) -> Source:
    """Reads a configuration file by its ending: `.json`, `.yaml`, `.yml` or `.toml`.

    Raises:
        ConfigError: The file is missing, unreadable, not valid, holds a key twice
            (YAML) or is not an object; the message names file and line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        message = f"{path}: cannot be read ({reason}); expected a configuration file"
        raise ConfigError(message, slug="config-unreadable") from error
    if path.suffix == ".json":
        return _read_json(path, text)
    if path.suffix in (".yaml", ".yml"):
        return _read_yaml(path, text)
    if path.suffix == ".toml":
        return Source(path, *read_table(path, text))
    message = f"{path}: ending {path.suffix!r}; expected .json, .yaml, .yml or .toml"
    raise ConfigError(message, slug="config-ending")


def _read_json(path: Path, text: str) -> Source:
    try:
        data = json.loads(text)
    except ValueError as error:
        line = getattr(error, "lineno", None)
        place = f"{path}:{line}" if line else str(path)
        detail = getattr(error, "msg", str(error))
        message = f"{place}: not valid JSON ({detail})"
        raise ConfigError(message, slug="config-syntax") from error
    except RecursionError as error:
        message = f"{path}: nested too deeply"
        raise ConfigError(message, slug="config-syntax") from error
    if not isinstance(data, dict):
        message = f"{path}: expected a JSON object, found {_kind(data)}"
        raise ConfigError(message, slug="config-type")
    return Source(path, data)


def _read_yaml(path: Path, text: str) -> Source:
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        loader = yaml.SafeLoader("")
        lines: dict[KeyPath, int] = {}
        if node is not None:
            _collect_lines(path, node, (), lines)
            data = loader.construct_document(node)
        else:
            data = {}
    except ConfigError:
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        message = f"{place}: not valid YAML ({error.problem or error.context})"
        raise ConfigError(message, slug="config-syntax") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        message = f"{path}: not valid YAML ({str(error).splitlines()[0]})"
        raise ConfigError(message, slug="config-syntax") from error
    if not isinstance(data, dict):
        message = f"{path}: expected sections (capture, engine, tolerances, golden), "
        raise ConfigError(message + f"found {_kind(data)}", slug="config-type")
    return Source(path, data, lines)


def _collect_lines(
    path: Path, node: yaml.Node, key: KeyPath, lines: dict[KeyPath, int]
) -> None:
    """Fills `lines`; a duplicate key is an error, since plain YAML hides it."""
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for name_node, value_node in node.value:
            line = name_node.start_mark.line + 1
            if not isinstance(name_node, yaml.ScalarNode):
                message = f"{path}:{line}: a key must be a plain word"
                raise ConfigError(message, slug="config-type")
            name = str(name_node.value)
            if name in seen:
                text = ".".join(str(part) for part in (*key, name))
                message = f"{path}:{line}: {text}: duplicate key (first in line "
                raise ConfigError(message + f"{seen[name]})", slug="config-duplicate")
            seen[name] = line
            lines[(*key, name)] = line
            _collect_lines(path, value_node, (*key, name), lines)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[(*key, index)] = item.start_mark.line + 1
            _collect_lines(path, item, (*key, index), lines)


def _kind(value: object) -> str:
    names = {list: "a list", dict: "an object", str: "text", bool: "a boolean"}
    if value is None:
        return "nothing"
    return names.get(type(value), "a number" if isinstance(value, int | float) else "?")


def describe(value: object) -> str:
    """A value as it stands in a message: its kind, and itself where it is short."""
    text = json.dumps(value, default=str)
    return f"{_kind(value)} {text}" if len(text) <= 40 else _kind(value)  # noqa: PLR2004


def require_keys(
    source: Source, key: KeyPath, data: dict[str, Any], known: list[str]
) -> None:
    """Refuses keys that are not known, with the nearest known one.

    Raises:
        ConfigError: Some key is unknown.
    """
    import difflib

    for name in data:
        if name in known:
            continue
        near = difflib.get_close_matches(str(name), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
        raise source.error((*key, str(name)), f"unknown key; {hint}", slug="config-key")
