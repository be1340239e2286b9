# SPDX-License-Identifier: Apache-2.0
"""Writes steps in msProbe's format, in a thread with a bounded queue.

Every file is written under a temporary name and renamed, so that a file with its final
name is always whole.
"""

import json
import linecache
import logging
import math
import os
import queue
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pytest_msprobe.dump import layout
from pytest_msprobe.dump.nonfinite import count_nonfinite, find_first
from pytest_msprobe.errors import CaptureError
from pytest_msprobe.model import records
from pytest_msprobe.model.calls import (
    CallRecord,
    Frame,
    Scalar,
    StepRecord,
    TensorValue,
    Tree,
)
from pytest_msprobe.model.dtypes import element_type

_LOG = logging.getLogger("pytest_msprobe")
# Steps that may wait for the thread before the capture waits for it.
PENDING_STEPS = 8
_OWN_PACKAGE = str(Path(__file__).parents[1]) + os.sep

Summary = tuple[Any, Any, Any, Any]
MakeStep = Callable[[], StepRecord]


def format_number(value: Any) -> str:
    """A number as JSON text; NaN and infinities as the bare tokens msProbe writes."""
    if value is None:
        return "null"
    if value is True or value is False:
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return repr(float(value))


def _summarize_integers(value: TensorValue, kind: str) -> Summary:
    rows = value.rows
    assert rows is not None
    unsigned = value.dtype == "torch.uint64"
    bits = rows.view(np.uint64 if unsigned else np.int64)
    filled = rows.view(np.int64)[:, records.COUNT] > 0
    if not filled.any():
        return (None, None, None, None)
    high = bits[filled, records.MAXIMUM].max().item()
    low = bits[filled, records.MINIMUM].min().item()
    if kind == "bool":
        return (bool(high), bool(low), None, None)
    return (high, low, high, low) if not value.shape else (high, low, None, None)


def summarize(value: TensorValue) -> Summary:
    """MsProbe's Max, Min, Mean and Norm of a whole tensor, its pieces combined.

    A NaN makes all four NaN; integers and booleans have no Mean and Norm, complex
    tensors no Norm; the four of a 0-d tensor are its value.
    """
    rows = value.rows
    if rows is None or len(rows) == 0:
        return (None, None, None, None)
    kind = element_type(value.dtype).kind
    if kind in ("int", "bool"):
        return _summarize_integers(value, kind)
    counts = (
        rows.view(np.int64)[:, records.NAN : records.COUNT + 1].sum(axis=0).tolist()
    )
    nan, plus, minus, count = counts
    if count == 0:
        return (None, None, None, None)
    if nan:
        return (math.nan, math.nan, math.nan, math.nan)
    high = math.inf if plus else rows[:, records.MAXIMUM].max().item()
    low = -math.inf if minus else rows[:, records.MINIMUM].min().item()
    if not value.shape and kind == "float":
        return (high, high, high, high)
    if plus or minus:
        mean = math.nan if plus and minus else (math.inf if plus else -math.inf)
        norm = math.inf
    else:
        mean = rows[:, records.TOTAL].sum().item() / count
        norm = math.sqrt(rows[:, records.SQUARES].sum().item())
    return (high, low, mean, None if kind == "complex" else norm)


def format_tensor(value: TensorValue, summary_mode: str) -> str:
    """A tensor as msProbe's JSON object."""
    flag = "true" if value.requires_grad else "false"
    shape = ", ".join(map(str, value.shape))
    head = (
        f'{{"type": "{value.type_name}", "dtype": "{value.dtype}", "shape": [{shape}], '
    )
    digest = f'"md5": {json.dumps(value.digest)}'
    if summary_mode == "xor":
        return f'{head}{digest}, "requires_grad": {flag}}}'
    high, low, mean, norm = map(format_number, summarize(value))
    text = f'{head}"Max": {high}, "Min": {low}, "Mean": {mean}, "Norm": {norm}, '
    text += f'"requires_grad": {flag}'
    if value.data_name is not None:
        text += f', "data_name": {json.dumps(value.data_name)}'
    if summary_mode == "md5":
        text += f", {digest}"
    return text + "}"


def format_tree(tree: Tree, summary_mode: str) -> str:
    """An argument, nested or not, as JSON text."""
    if isinstance(tree, TensorValue):
        return format_tensor(tree, summary_mode)
    if isinstance(tree, list):
        return "[" + ", ".join(format_tree(item, summary_mode) for item in tree) + "]"
    if isinstance(tree, dict) and not isinstance(tree, Scalar):
        items = (
            f"{json.dumps(str(key))}: {format_tree(item, summary_mode)}"
            for key, item in tree.items()
        )
        return "{" + ", ".join(items) + "}"
    return json.dumps(tree)


def format_call(
    call: CallRecord, summary_mode: str, *, keeps: Callable[..., bool]
) -> str:
    """The record of one call as JSON text, sides left out by `keeps` omitted."""
    if call.kind == "parameters_grad":
        return format_tree(call.parameters, summary_mode)
    parts = []
    if call.kind == "backward":
        if keeps("input", "backward"):
            parts.append(f'"input": {format_tree(call.input_args, summary_mode)}')
        if keeps("output", "backward"):
            parts.append(f'"output": {format_tree(call.output, summary_mode)}')
        return "{" + ", ".join(parts) + "}"
    if keeps("input"):
        parts.append(f'"input_args": {format_tree(call.input_args, summary_mode)}')
        parts.append(f'"input_kwargs": {format_tree(call.input_kwargs, summary_mode)}')
    if keeps("output"):
        if call.output is not None:
            parts.append(f'"output": {format_tree(call.output, summary_mode)}')
        if call.parameters is not None:
            parts.append(f'"parameters": {format_tree(call.parameters, summary_mode)}')
    return "{" + ", ".join(parts) + "}"


def render_stack(frames: Iterable[Frame]) -> list[str]:
    """Frames as msProbe writes them, innermost first.

    Frames without source and those of this package are left out.
    """
    lines = []
    for code, offset in frames:
        filename = code.co_filename
        if filename.startswith(_OWN_PACKAGE):
            continue
        number = line_of(code, offset)
        source = linecache.getline(filename, number).strip()
        if source:
            lines.append(
                f"File {filename}, line {number}, in {code.co_name}, \n {source}"
            )
    return lines


def line_of(code: Any, offset: int) -> int:
    """Line of the instruction at a byte offset of a code object."""
    for start, end, line in code.co_lines():
        if start <= offset < end and line is not None:
            return int(line)
    return int(code.co_firstlineno)


def format_stacks(step: StepRecord) -> str:
    """stack.json: groups of calls that have the same stack."""
    groups: dict[tuple[Frame, ...], list[str]] = {}
    for call in step.calls:
        if call.stack is not None:
            groups.setdefault(call.stack, []).append(call.name)
    outer = render_stack(step.common_stack)
    content = {
        str(number): [names, render_stack(stack) + outer]
        for number, (stack, names) in enumerate(groups.items())
    }
    return json.dumps(content, indent=1)


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file so that its final name never stands for a part of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


class DumpWriter:
    """Writes the files of one rank, step by step, in a thread of its own."""

    def __init__(
        self,
        dump_path: Path,
        rank: str,
        *,
        task: str,
        level: str,
        summary_mode: str,
        keeps: Callable[..., bool],
        has_extra_info: bool,
        saves_tensors: bool,
    ) -> None:
        self._dump_path = dump_path
        self._rank = rank
        self._task = task
        self._level = level
        self._summary_mode = summary_mode
        self._keeps = keeps
        self._has_extra_info = has_extra_info
        self._saves_tensors = saves_tensors
        self._queue: queue.Queue[MakeStep | None] = queue.Queue(PENDING_STEPS)
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        self.bytes_written = 0
        self.steps_written: list[int] = []

    def folder(self, step: int) -> Path:
        """Folder of this rank in a step."""
        return layout.rank_folder(self._dump_path, step, self._rank)

    def write(self, make_step: MakeStep) -> None:
        """Hands a finished step to the thread; waits while too many are pending.

        Args:
            make_step: Called in the thread.

        Raises:
            CaptureError: An earlier step could not be written.
        """
        self._raise_error()
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._run, name="msprobe-dump-writer", daemon=True
            )
            self._thread.start()
        self._queue.put(make_step)

    def close(self) -> None:
        """Waits until everything is written.

        Raises:
            CaptureError: Some step could not be written.
        """
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None
        self._raise_error()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self.error_of(self._error) from self._error

    def error_of(self, error: BaseException) -> CaptureError:
        """The error to report where a file could not be written."""
        if isinstance(error, CaptureError):
            return error
        message = f"the dump could not be written: {error}"
        hint = f"free space or make {self._dump_path} writable, then run again"
        return CaptureError(message, slug="dump-write", hint=hint)

    def _run(self) -> None:
        while (make_step := self._queue.get()) is not None:
            if self._error is None:
                try:
                    self.write_now(make_step())
                except BaseException as error:  # noqa: BLE001 - raised by close()
                    self._error = error

    def write_now(self, step: StepRecord) -> None:
        """Writes a step in the calling thread."""
        if not self._keeps("input") and not self._keeps("output"):
            backward = [call for call in step.calls if call.kind != "forward"]
            step = replace(step, calls=backward)
        folder = self.folder(step.step)
        folder.mkdir(parents=True, exist_ok=True)
        if self._has_extra_info:
            self._write_file(folder / layout.STACK, format_stacks(step))
            parents = {}
            if self._level != "L1":
                parents = {
                    call.name: call.parent
                    for call in step.calls
                    if call.kind != "parameters_grad"
                }
                regions = {"optimizer", "clip_grad"} & set(parents.values())
                parents |= dict.fromkeys(sorted(regions))
            self._write_file(folder / layout.CONSTRUCT, json.dumps(parents, indent=1))
        self._write_file(folder / layout.DUMP, self._format_dump(folder, step))
        self.steps_written.append(step.step)

    def _format_dump(self, folder: Path, step: StepRecord) -> str:
        tensors = str(folder / layout.TENSORS) if self._saves_tensors else None
        head: dict[str, Any] = {
            "task": self._task,
            "level": self._level,
            "framework": "pytorch",
            "dump_data_dir": tensors,
        }
        calls = [] if self._task == "structure" else step.calls
        entries = ",\n".join(
            f"  {json.dumps(call.name)}: {self._format_call(call)}" for call in calls
        )
        if self._task == "nan_check":
            head["first_nonfinite"] = self._report_nonfinite(step)
        body = f"{{\n{entries}\n }}" if entries else "{}"
        lines = [
            f" {json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()
        ]
        return "{\n" + "\n".join(lines) + f'\n "data": {body}\n}}\n'

    def _format_call(self, call: CallRecord) -> str:
        text = format_call(call, self._summary_mode, keeps=self._keeps)
        if self._task != "nan_check" or call.kind == "parameters_grad":
            return text
        separator = ", " if len(text) > len("{}") else ""
        return f'{text[:-1]}{separator}"is_nan": {count_nonfinite(call.output)}}}'

    def _report_nonfinite(self, step: StepRecord) -> dict[str, Any] | None:
        """The first call with a NaN or Inf, for the file and the log."""
        first = find_first(step)
        if first is None:
            return None
        stack = render_stack((*(first.call.stack or ()), *step.common_stack))
        where = stack[0].replace(", \n", ":") if stack else "no stack (extra_info)"
        _LOG.error("msprobe: step %d: %s; %s", step.step, first.text, where)
        return {
            "name": first.call.name,
            "slot": first.slot,
            "nonfinite": first.nonfinite,
            "elements": first.elements,
            "has_finite_inputs": first.has_finite_inputs,
            "stack": stack,
        }

    def _write_file(self, path: Path, text: str) -> None:
        write_atomically(path, text)
        self.bytes_written += len(text)
