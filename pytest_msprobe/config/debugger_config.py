# SPDX-License-Identifier: Apache-2.0
"""msProbe's config.json: its keys, defaults and checks.

The keys and their meaning follow msProbe 26.2's documentation, so that a user's file
works as it is. Unknown keys are ignored in a JSON file, as msProbe does.
"""

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from pytest_msprobe.config.source import Source, describe
from pytest_msprobe.config.toml import KeyPath

Task = Literal["statistics", "tensor", "structure", "nan_check"]
Level = Literal["L0", "L1", "mix", "debug"]
SummaryMode = Literal["statistics", "md5", "xor"]
RiskLevel = Literal["ALL", "FOCUS", "CORE"]
FunctionHooks = Literal["mode", "replace"]

# Names in a file: overflow_check is the older name of nan_check, diff_check is the task
# tensor with bench_path.
TASKS = (
    *("statistics", "tensor", "structure"),
    *("nan_check", "overflow_check", "diff_check"),
)
_SAME_TASK: dict[str, Task] = {"overflow_check": "nan_check", "diff_check": "tensor"}
# Of captures; `debug` records nothing by itself.
LEVELS = ("L0", "L1", "mix")
SUMMARY_MODES = ("statistics", "md5", "xor")
FUNCTION_HOOKS = ("mode", "replace")
RISK_LEVELS = ("ALL", "FOCUS", "CORE")
DATA_MODES = ("all", "forward", "backward", "input", "output")
_KNOWN_ELSEWHERE = {
    "task": {
        "acc_check": "it re-runs APIs offline and records nothing",
        "free_benchmark": "msProbe has removed it",
    },
    "level": {"L2": "it drives the NPU's own dumper"},
}
MAX_STEP = 10**6
_MODULE_CALL = re.compile(r"Module\..+\.forward\.\d+")
_SLICE_KEYS = ("dim", "size", "begin", "end")
DEFAULT_MAX_BYTES = 10 * 2**30
DEFAULT_PENDING_BYTES = 48 * 2**20


@dataclass(frozen=True, slots=True)
class Cut:
    """One rule of `slice`: which part of a dimension is recorded.

    Attributes:
        dim: The dimension.
        size: Only tensors with exactly this size there, None for all.
        begin: First index, negative ones count from the end.
        end: Index behind the last one, None for the end.
    """

    dim: int = 0
    size: int | None = None
    begin: int = 0
    end: int | None = None


@dataclass(frozen=True, slots=True)
class Load:
    """Inputs of modules that are replaced by those of an earlier dump.

    Attributes:
        path: Folder of that dump; its task is tensor.
        modules: Full names of the calls.
        step: Step of the dump, None for the running one.
        rank: Rank of the dump, None for the running one.
        dumps: Whether this run records as well.
    """

    path: str
    modules: tuple[str, ...]
    step: int | None = None
    rank: int | None = None
    dumps: bool = False


@dataclass(frozen=True, slots=True)
class DebuggerConfig:
    """What to record and where to.

    Attributes:
        task: What is written: statistics, tensors as well, names only, or how many
            NaN and infinite elements each call gave.
        dump_path: Folder of the dump, None where the caller decides.
        rank: Ranks to record, empty for all.
        step: Steps to record, empty for all.
        level: L0 modules, L1 APIs, mix both, debug what is handed to `save`.
        async_dump: Whether a thread writes the files, while the next step runs.
        extra_info: Whether stack.json and construct.json are filled.
        precision: Accepted; sums are always accumulated in more than the dtype.
        risk_level: Which classes of API are recorded when scope and list are empty.
        custom_op_namespaces: Operator namespaces written with msProbe's own prefix.
        support_wrap_ops: A list of APIs in place of the packaged one, or None.
        scope: First and last name to record, or empty.
        names: The key `list`: substrings of names to record, or empty.
        tensor_list: Substrings of names whose tensors are saved as well.
        data_mode: Directions and sides that are kept.
        summary_mode: Statistics, with a CRC-32 (md5), or a checksum instead (xor).
        slice: Which parts of tensors are recorded.
        request_id: Only the rows of this request, by `scheduled_tokens`; or None.
        bench_path: An earlier dump; tensors are saved where they differ from it.
        diff_nums: After so many such calls recording ends, -1 for no end.
        load: Inputs that are replaced, None for none.
        dump_enable: Whether recording is on; None where the file has no such key and
            is therefore not watched.
        max_bytes: Recording stops when a rank has written so much. Not a key of
            msProbe's.
        pending_bytes: Tensors that are kept alive to be measured later, or not again,
            in bytes; 0 measures everything at once. Not a key of msProbe's.
        measure_once: Whether a tensor seen again, and not written in between, keeps its
            numbers. Not a key of msProbe's.
        kv_cache: Whether what each layer wrote into its KV cache is recorded as well.
            Not a key of msProbe's.
        function_hooks: How calls of functions are met: by torch's function mode, or by
            replacing the functions, which costs less and misses those that somebody
            imported by name. Not a key of msProbe's.
    """

    task: Task = "statistics"
    dump_path: str | None = None
    rank: tuple[int, ...] = ()
    step: tuple[int, ...] = ()
    level: Level = "L1"
    async_dump: bool = False
    extra_info: bool = True
    precision: Literal["low", "high"] = "low"
    risk_level: RiskLevel = "FOCUS"
    custom_op_namespaces: tuple[str, ...] = ()
    support_wrap_ops: str | None = None
    scope: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    tensor_list: tuple[str, ...] = ()
    data_mode: tuple[str, ...] = ("all",)
    summary_mode: SummaryMode = "statistics"
    slice: tuple[Cut, ...] = ()
    request_id: str | None = None
    bench_path: str | None = None
    diff_nums: int = 1
    load: Load | None = None
    dump_enable: bool | None = None
    max_bytes: int = DEFAULT_MAX_BYTES
    pending_bytes: int = DEFAULT_PENDING_BYTES
    measure_once: bool = True
    kv_cache: bool = False
    function_hooks: FunctionHooks = "mode"

    @property
    def has_modules(self) -> bool:
        """Whether calls of modules are recorded."""
        return self.level in ("L0", "mix")

    @property
    def has_functions(self) -> bool:
        """Whether calls of APIs are recorded."""
        return self.level in ("L1", "mix")

    @property
    def saves_tensors(self) -> bool:
        """Whether any tensor is written to a file."""
        return self.task == "tensor" or bool(self.tensor_list)

    @property
    def has_backward(self) -> bool:
        """Whether gradients are recorded where there are any."""
        return self._has_direction("backward")

    def keeps(
        self,
        side: Literal["input", "output"],
        direction: Literal["forward", "backward"] = "forward",
    ) -> bool:
        """Whether the data of one side of a direction is kept (`data_mode`)."""
        sides = set(self.data_mode) & {"input", "output"}
        return self._has_direction(direction) and (not sides or side in sides)

    def _has_direction(self, direction: str) -> bool:
        directions = set(self.data_mode) & {"forward", "backward"}
        return not directions or direction in directions


@dataclass(slots=True)
class _Reader:
    """Checked access to the keys of one object of a source."""

    source: Source
    key: KeyPath
    data: dict[str, Any]

    def error(self, name: str, expected: str) -> Exception:
        value = describe(self.data.get(name))
        return self.source.error((*self.key, name), f"{expected}, found {value}")

    def has(self, name: str) -> bool:
        return name in self.data

    def text(self, name: str, default: str | None) -> str | None:
        value = self.data.get(name, default)
        if value is not None and not isinstance(value, str):
            raise self.error(name, "expected text")
        return value

    def flag(self, name: str, *, default: bool) -> bool:
        value = self.data.get(name, default)
        if not isinstance(value, bool):
            raise self.error(name, "expected true or false")
        return value

    def choice(self, name: str, allowed: tuple[str, ...], default: str) -> str:
        value = self.data.get(name, default)
        if value in ("", None) and name != "precision":
            return default if name != "risk_level" else "ALL"
        if isinstance(value, str) and value in _KNOWN_ELSEWHERE.get(name, {}):
            reason = _KNOWN_ELSEWHERE[name][value]
            options = ", ".join(allowed)
            raise self.error(name, f"{reason}; expected one of {options}")
        if value not in allowed:
            raise self.error(name, f"expected one of {', '.join(allowed)}")
        return str(value)

    def texts(self, name: str, default: tuple[str, ...] = ()) -> tuple[str, ...]:
        value = self.data.get(name, list(default))
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise self.error(name, "expected a list of texts")
        return tuple(value)

    def numbers(self, name: str) -> tuple[int, ...]:
        """A list of whole numbers and ranges `"a-b"`, sorted, without repetition."""
        value = self.data.get(name, [])
        if not isinstance(value, list):
            raise self.error(name, 'expected a list such as [0, "4-6"]')
        try:
            return parse_numbers(value)
        except ValueError as error:
            raise self.error(name, str(error)) from None


def parse_numbers(items: list[Any]) -> tuple[int, ...]:
    """Expands msProbe's lists of numbers: `[0, "4-6"]` becomes (0, 4, 5, 6).

    Raises:
        ValueError: An item is not a whole number, `"n"` or `"a-b"` with a <= b, or
            lies outside 0..10**6; the text says what was expected.
    """
    found: set[int] = set()
    for item in items:
        if isinstance(item, str):
            first, dash, last = item.partition("-")
            if not first.isdecimal() or (dash and not last.isdecimal()):
                message = f'expected whole numbers or "a-b", not {item!r}'
                raise ValueError(message)
            low, high = int(first), int(last) if dash else int(first)
            if low > high:
                message = f'expected "a-b" with a <= b, not {item!r}'
                raise ValueError(message)
        elif isinstance(item, int) and not isinstance(item, bool):
            low = high = item
        else:
            message = f'expected whole numbers or "a-b", not {item!r}'
            raise ValueError(message)  # noqa: TRY004 - one kind for all wrong items
        if low < 0 or high > MAX_STEP:
            message = f"expected numbers from 0 to {MAX_STEP}, not {item!r}"
            raise ValueError(message)
        found.update(range(low, high + 1))
    return tuple(sorted(found))


def _check_scope(reader: _Reader, scope: tuple[str, ...], level: str) -> None:
    from pytest_msprobe.model.names import parse_call_name

    if len(scope) not in (0, 2):
        raise reader.error("scope", "expected two names, first and last")
    for text in scope:
        name = parse_call_name(text)
        wanted = {"L0": "modules", "L1": "APIs"}.get(level, "calls")
        if (
            name is None
            or (level == "L0" and not name.is_module)
            or (level == "L1" and name.is_module)
        ):
            raise reader.error("scope", f"expected full names of {wanted}")


def _check_data_mode(reader: _Reader, modes: tuple[str, ...]) -> tuple[str, ...]:
    if any(mode not in DATA_MODES for mode in modes):
        raise reader.error("data_mode", f"expected some of {', '.join(DATA_MODES)}")
    if "all" in modes and len(modes) > 1:
        raise reader.error("data_mode", "expected 'all' to stand alone")
    return modes or ("all",)


def parse_debugger_config(
    source: Source,
    key: KeyPath = (),
    *,
    overrides: dict[str, Any] | None = None,
    default_level: Level = "L1",
) -> DebuggerConfig:
    """Reads msProbe's keys from a source.

    Args:
        source: A config.json, or a YAML file holding the same keys in a section.
        key: Path of that section, () for a config.json.
        overrides: Values given in code (task, dump_path, level, step), which win.
        default_level: Level where the key is absent.

    Raises:
        ConfigError: A value is wrong or asks for something that cannot be done; the
            message names file, line or key and what was expected.
    """
    data: Any = source.data
    for part in key:
        data = data.get(part, {})
    if not isinstance(data, dict):
        raise source.error(key, f"expected keys and values, found {describe(data)}")
    given = {
        name: value for name, value in (overrides or {}).items() if value is not None
    }
    general = _Reader(source, key, {**data, **given})
    task = general.choice("task", TASKS, "statistics")
    level = general.choice("level", (*LEVELS, "debug"), default_level)
    raw_section = data.get(task, {})
    if not isinstance(raw_section, dict):
        raise general.error(task, "expected keys and values")
    section = _Reader(source, (*key, task), raw_section)
    scope = section.texts("scope")
    _check_scope(section, scope, level)
    values: dict[str, Any] = {
        "task": _SAME_TASK.get(task, task),
        "level": level,
        "dump_path": general.text("dump_path", None),
        "rank": general.numbers("rank"),
        "step": general.numbers("step"),
        "async_dump": general.flag("async_dump", default=False),
        "extra_info": general.flag("extra_info", default=True),
        "precision": general.choice("precision", ("low", "high"), "low"),
        "risk_level": general.choice("risk_level", RISK_LEVELS, "FOCUS"),
        "custom_op_namespaces": general.texts("custom_op_namespaces"),
        "support_wrap_ops": _read_op_list_path(general),
        "scope": scope,
        "names": section.texts("list"),
        "tensor_list": section.texts("tensor_list"),
        "data_mode": _check_data_mode(section, section.texts("data_mode", ("all",))),
        "summary_mode": section.choice("summary_mode", SUMMARY_MODES, "statistics"),
        "max_bytes": _read_bytes(general, "max_bytes", DEFAULT_MAX_BYTES, least=1),
        "pending_bytes": _read_bytes(general, "pending_bytes", DEFAULT_PENDING_BYTES),
        "measure_once": general.flag("measure_once", default=True),
        "load": _read_load(general, level),
        "kv_cache": general.flag("kv_cache", default=False),
        "function_hooks": general.choice("function_hooks", FUNCTION_HOOKS, "mode"),
    }
    if level != "debug":
        values["slice"] = _read_slice(section)
        values["request_id"] = section.text("request_id", None) or None
        values.update(_read_bench(section, task, values["summary_mode"]))
    if general.has("dump_enable"):
        values["dump_enable"] = general.flag("dump_enable", default=True)
    if values["kv_cache"] and level == "L1":
        raise general.error("kv_cache", "expected level L0 or mix, which record it")
    if task == "structure" and level == "L1":
        values["level"] = "mix"
    return DebuggerConfig(**values)


def _read_op_list_path(reader: _Reader) -> str | None:
    """Path of the user's list of APIs, relative to the configuration file."""
    text = reader.text("support_wrap_ops", None)
    if text is None:
        return None
    root = reader.source.path.parent if reader.source.path else Path()
    path = root / text
    if not path.is_file():
        raise reader.error("support_wrap_ops", "expected an existing file")
    return str(path)


def _read_bytes(reader: _Reader, name: str, default: int, *, least: int = 0) -> int:
    value = reader.data.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise reader.error(name, f"expected a number of bytes >= {least}")
    return value


def _read_slice(reader: _Reader) -> tuple[Cut, ...]:
    """Rules of `slice`; of two for one dimension the last one counts."""
    value = reader.data.get("slice") or []
    if not isinstance(value, list):
        raise reader.error("slice", 'expected a list such as [{"dim": 0, "end": 8}]')
    cuts: dict[int, Cut] = {}
    for item in value:
        is_known = isinstance(item, dict) and all(
            name in _SLICE_KEYS and _is_whole(number) for name, number in item.items()
        )
        if not is_known or any(item.get(name, 0) < 0 for name in ("dim", "size")):
            expected = "expected whole numbers dim, size (>= 0), begin and end"
            raise reader.error("slice", expected)
        cut = Cut(**item)
        cuts[cut.dim] = cut
    return tuple(cuts.values())


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _read_bench(reader: _Reader, task: str, summary_mode: str) -> dict[str, Any]:
    """Keys of a comparison with an earlier dump."""
    path = reader.text("bench_path", None)
    if path is None:
        if task == "diff_check":
            raise reader.error("bench_path", "expected the folder of an earlier dump")
        if reader.has("diff_nums") and task != "tensor":
            raise reader.error("diff_nums", "it belongs to the task tensor")
        return {}
    if task not in ("tensor", "diff_check"):
        raise reader.error("bench_path", "it belongs to the task tensor")
    if not Path(path).is_dir():
        raise reader.error("bench_path", "expected an existing folder")
    if task == "diff_check":
        summary_mode = "md5"
    if summary_mode != "md5":
        raise reader.error("summary_mode", "expected md5, which bench_path compares")
    number = reader.data.get("diff_nums") or 1
    if not _is_whole(number) or (number < 1 and number != -1):
        raise reader.error("diff_nums", "expected a whole number >= 1, or -1")
    return {"bench_path": path, "diff_nums": number, "summary_mode": "md5"}


def _read_load(reader: _Reader, level: str) -> Load | None:
    """The object `load`: inputs of modules that are replaced."""
    data = reader.data.get("load")
    if data is None:
        return None
    if not isinstance(data, dict):
        raise reader.error("load", "expected an object with path and modules")
    if level not in ("L0", "mix"):
        raise reader.error("load", "it needs level L0 or mix")
    inner = _Reader(reader.source, (*reader.key, "load"), data)
    path = inner.text("path", None)
    if path is None or not Path(path).is_dir():
        raise inner.error("path", "expected the folder of an earlier dump")
    modules = inner.texts("modules")
    if not modules or len(set(modules)) < len(modules):
        raise inner.error("modules", "expected names of module calls, each once")
    if any(_MODULE_CALL.fullmatch(name) is None for name in modules):
        raise inner.error("modules", "expected names such as Module.a.B.forward.0")
    numbers = {name: inner.numbers(name) for name in ("step", "rank")}
    for name, found in numbers.items():
        if len(found) > 1:
            raise inner.error(name, "expected at most one number")
    step, rank = (found[0] if found else None for found in numbers.values())
    dumps = inner.flag("dump_after_load", default=False)
    return Load(path, modules, step, rank, dumps)


def refuse_own_program(source: Source, key: KeyPath, config: DebuggerConfig) -> None:
    """Refuses what only a program that drives the debugger itself can do.

    Raises:
        ConfigError: The configuration asks for such a thing.
    """
    expected = "it needs a program that calls PrecisionDebugger itself"
    if config.level == "debug":
        raise source.error((*key, "level"), f"debug: {expected}")
    for name in ("load", "bench_path", "request_id"):
        if getattr(config, name) is not None:
            raise source.error((*key, name), expected)


def config_from_json(values: dict[str, Any]) -> DebuggerConfig:
    """The inverse of `dataclasses.asdict` and JSON: lists become tuples again."""
    fields_: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list | tuple) else value
        for name, value in values.items()
    }
    fields_["slice"] = tuple(Cut(**cut) for cut in fields_.get("slice", ()))
    if fields_.get("load") is not None:
        load = dict(fields_["load"])
        fields_["load"] = Load(**{**load, "modules": tuple(load["modules"])})
    return DebuggerConfig(**fields_)


def known_keys() -> list[str]:
    """Keys of the `capture` section: msProbe's general keys and the task sections."""
    own = {"names", "scope", "tensor_list", "data_mode", "summary_mode"}
    own |= {"slice", "request_id", "bench_path", "diff_nums"}
    general = [f.name for f in fields(DebuggerConfig) if f.name not in own]
    return [*general, *TASKS]
