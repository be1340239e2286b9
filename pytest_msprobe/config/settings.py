# SPDX-License-Identifier: Apache-2.0
"""The settings of one pytest run: an msProbe config.json, or YAML in sections."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pytest_msprobe.config.debugger_config import (
    TASKS,
    DebuggerConfig,
    Level,
    known_keys,
    parse_debugger_config,
    refuse_own_program,
)
from pytest_msprobe.config.source import (
    Source,
    describe,
    read_source,
    require_keys,
)
from pytest_msprobe.config.toml import KeyPath, has_table
from pytest_msprobe.model.limits import (
    RULE_KEYS,
    KeyMode,
    Rule,
    has_half_a_pair,
)

SECTIONS = ("capture", "engine", "tolerances", "golden")
# Keys of the sections of the tasks.
TASK_KEYS = (
    *("scope", "list", "tensor_list", "data_mode", "summary_mode"),
    *("slice", "request_id", "bench_path", "diff_nums"),
)
# What a rule can say besides limits.
FLAGS = ("ignore", "exact", "only")
ALL_STEPS = -1
DEFAULT_DECODE_STEPS = 2
DEFAULT_SIZE_WARNING_BYTES = 1_000_000


@dataclass(frozen=True, slots=True)
class GoldenSettings:
    """Where goldens live and what they hold.

    Attributes:
        directory: Root of the golden tree.
        decode_steps: Decode steps behind the prefill that are captured, -1 for all.
        size_warning_bytes: A golden larger than this is reported.
        is_tp_invariant: One golden for every tensor-parallel size, from the rows of
            all ranks together.
        is_teacher_forced: Whether the golden's tokens are fed back in place of what is
            sampled.
    """

    directory: Path
    decode_steps: int = DEFAULT_DECODE_STEPS
    size_warning_bytes: int = DEFAULT_SIZE_WARNING_BYTES
    is_tp_invariant: bool = False
    is_teacher_forced: bool = False


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """How the fixture's engine is started.

    Attributes:
        arguments: Keyword arguments of `vllm.LLM`, model included.
        environment: Variables to set before torch and vLLM are imported.
    """

    arguments: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that a configuration file says.

    Attributes:
        path: The file.
        capture: What to record.
        engine: How to start the engine.
        rules: Tolerances in the order of the file.
        golden: Where goldens live.
    """

    path: Path
    capture: DebuggerConfig
    engine: EngineSettings
    rules: tuple[Rule, ...]
    golden: GoldenSettings

    @property
    def root(self) -> Path:
        """Folder of the file; relative paths in it start there."""
        return self.path.parent


def read_settings(path: Path) -> Settings:
    """Reads a configuration file.

    Args:
        path: An msProbe config.json, or YAML or `[tool.msprobe]` of a pyproject.toml
            with the sections `capture`, `engine`, `tolerances` and `golden`. Beside a
            config.json the last three may stand in a pyproject.toml.

    Raises:
        ConfigError: One line with file, line or key, and what was expected.
    """
    path = path.absolute()
    source = read_source(path)
    if path.suffix == ".json":
        return _read_config_json(source, path)
    _check_sections(source)
    require_keys(source, ("capture",), source.data["capture"], known_keys())
    _check_task_sections(source)
    capture = _read_capture(source, ("capture",), "L0")
    return _settings(path, capture, source)


def _read_config_json(source: Source, path: Path) -> Settings:
    """An msProbe config.json; its other sections stand in pyproject.toml beside it."""
    capture = _read_capture(source, (), "L1")
    beside = path.parent / "pyproject.toml"
    more = read_source(beside) if has_table(beside) else Source(beside, {})
    _check_sections(more)
    if more.data["capture"]:
        raise more.error(("capture",), f"stands in {path.name}; leave it out here")
    return _settings(path, capture, more)


def _settings(path: Path, capture: DebuggerConfig, source: Source) -> Settings:
    return Settings(
        path,
        capture,
        _read_engine(source),
        _read_tolerances(source),
        _read_golden(source, path.parent),
    )


def _check_sections(source: Source) -> None:
    """Refuses unknown sections; those that are left out become empty."""
    require_keys(source, (), source.data, list(SECTIONS))
    for section in SECTIONS:
        value = source.data.get(section)
        if value is None:
            source.data[section] = {}
        elif not isinstance(value, dict):
            raise source.error(
                (section,), f"expected keys and values, found {describe(value)}"
            )


def _read_capture(source: Source, key: KeyPath, level: Level) -> DebuggerConfig:
    """What captures record."""
    config = parse_debugger_config(source, key, default_level=level)
    refuse_own_program(source, key, config)
    return config


def _check_task_sections(source: Source) -> None:
    """Refuses unknown keys in the sections of all tasks, used or not."""
    capture = source.data["capture"]
    for task in TASKS:
        section = capture.get(task)
        if section is None:
            capture.pop(task, None)
            continue
        if not isinstance(section, dict):
            found = describe(section)
            raise source.error(
                ("capture", task), f"expected keys and values, found {found}"
            )
        require_keys(source, ("capture", task), section, list(TASK_KEYS))


def _read_engine(source: Source) -> EngineSettings:
    arguments = dict(source.data["engine"])
    for name in arguments:
        if not isinstance(name, str):
            raise source.error(
                ("engine", str(name)), "expected the name of an engine argument"
            )
    environment = arguments.pop("env", None) or {}
    if not isinstance(environment, dict):
        found = describe(environment)
        raise source.error(
            ("engine", "env"), f"expected variables and values, found {found}"
        )
    for name, value in environment.items():
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            key = ("engine", "env", str(name))
            raise source.error(
                key, f"expected text or a number, found {describe(value)}"
            )
    model = arguments.get("model")
    if model is not None:
        if not isinstance(model, str):
            raise source.error(
                ("engine", "model"), f"expected text, found {describe(model)}"
            )
        assert source.path is not None
        local = source.path.parent / model
        if local.exists():
            arguments["model"] = str(local)
    check_eager(arguments, source.where(("engine", "enforce_eager")))
    texts = {str(name): str(value) for name, value in environment.items()}
    return EngineSettings(arguments, texts)


def check_eager(arguments: dict[str, Any], where: str) -> None:
    """Refuses engine arguments that would run compiled or captured graphs.

    Raises:
        ConfigError: `enforce_eager` is set to something else than true.
    """
    from pytest_msprobe.errors import ConfigError

    if arguments.get("enforce_eager", True) is not True:
        message = (
            f"{where}: expected true (or no such key): in a compiled or captured graph "
            "no Python code runs between the modules, so nothing can be recorded"
        )
        raise ConfigError(message, slug="enforce-eager")


def _read_golden(source: Source, root: Path) -> GoldenSettings:
    data = source.data["golden"]
    require_keys(
        source,
        ("golden",),
        data,
        [
            "dir",
            "decode_steps",
            "size_warning_bytes",
            "tp_invariant",
            "teacher_forcing",
        ],
    )
    directory = data.get("dir", "golden")
    if not isinstance(directory, str) or not directory:
        raise source.error(
            ("golden", "dir"), f"expected a folder, found {describe(directory)}"
        )
    steps = data.get("decode_steps", DEFAULT_DECODE_STEPS)
    if steps == "all":
        steps = ALL_STEPS
    elif isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        key = ("golden", "decode_steps")
        raise source.error(
            key, f"expected a number >= 0 or 'all', found {describe(steps)}"
        )
    size = data.get("size_warning_bytes", DEFAULT_SIZE_WARNING_BYTES)
    if isinstance(size, bool) or not isinstance(size, int) or size <= 0:
        key = ("golden", "size_warning_bytes")
        raise source.error(key, f"expected a number > 0, found {describe(size)}")
    flags = [_read_flag(source, name) for name in ("tp_invariant", "teacher_forcing")]
    return GoldenSettings(root / directory, steps, size, *flags)


def _read_flag(source: Source, name: str) -> bool:
    value = source.data["golden"].get(name, False)
    if not isinstance(value, bool):
        key = ("golden", name)
        raise source.error(key, f"expected true or false, found {describe(value)}")
    return value


def _read_tolerances(source: Source) -> tuple[Rule, ...]:
    data = source.data["tolerances"]
    require_keys(source, ("tolerances",), data, ["same", "cross", "rules"])
    modes: tuple[KeyMode, ...] = ("same", "cross")
    rules = [
        _read_rule(source, ("tolerances", mode), data[mode], mode)
        for mode in modes
        if mode in data
    ]
    items = data.get("rules") or []
    if not isinstance(items, list):
        key: KeyPath = ("tolerances", "rules")
        raise source.error(key, f"expected a list, found {describe(items)}")
    for index, item in enumerate(items):
        rules.append(_read_rule(source, ("tolerances", "rules", index), item, None))
    return tuple(rules)


def _read_rule(source: Source, key: KeyPath, data: Any, mode: KeyMode | None) -> Rule:
    if not isinstance(data, dict):
        raise source.error(key, f"expected metrics and limits, found {describe(data)}")
    own = ["rows", "mode", *FLAGS] if mode is None else []
    require_keys(source, key, data, [*RULE_KEYS, *own])
    values = dict(data)
    rows = values.pop("rows", "*")
    if not isinstance(rows, str) or not rows:
        raise source.error(
            (*key, "rows"), f"expected a glob over row names, found {describe(rows)}"
        )
    if mode is None:
        mode = values.pop("mode", None)
        if mode not in (None, "same", "cross"):
            raise source.error(
                (*key, "mode"), f"expected same or cross, found {describe(mode)}"
            )
    flags = {}
    for name in FLAGS:
        flags[name] = values.pop(name, False)
        if not isinstance(flags[name], bool):
            found = describe(flags[name])
            raise source.error((*key, name), f"expected true or false, found {found}")
    limits = {name: _read_limit(source, (*key, name), v) for name, v in values.items()}
    if not limits and not any(flags.values()):
        raise source.error(key, f"expected a limit, {' or '.join(FLAGS)}")
    if has_half_a_pair(limits):
        raise source.error(key, "expected both rtol and atol, or neither")
    return Rule(source.origin(key), rows, mode, limits, **flags)


def _read_limit(source: Source, key: KeyPath, value: Any) -> float:
    """A limit; YAML reads `1e-3` as text, so text that is a number is taken."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            value = None
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
        raise source.error(key, "expected a number >= 0")
    return float(value)
