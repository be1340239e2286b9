# SPDX-License-Identifier: Apache-2.0
"""One capture in one process: collector, wrappers, function mode and writer."""

import contextlib
import gc
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from pytest_msprobe.config.debugger_config import DebuggerConfig
from pytest_msprobe.debugger.collector import Collector, LayoutSource, RawStep
from pytest_msprobe.debugger.functions import (
    FunctionMode,
    FunctionTable,
    WrappedFunctions,
    read_op_list,
)
from pytest_msprobe.debugger.materialize import materialize
from pytest_msprobe.debugger.modules import ModuleWrappers, root_models
from pytest_msprobe.debugger.writes import TritonWatch, WriteBarriers
from pytest_msprobe.dump.layout import TENSORS, rank_name
from pytest_msprobe.dump.writer import DumpWriter
from pytest_msprobe.errors import CaptureError
from pytest_msprobe.model.calls import StepRecord
from pytest_msprobe.model.records import ROW_WIDTH

_LOG = logging.getLogger("pytest_msprobe")
Models = torch.nn.Module | Sequence[torch.nn.Module]


@dataclass(frozen=True, slots=True)
class Estimate:
    """What recording takes, from its first step.

    Attributes:
        rows: Rows measured in it.
        taken: Bytes that it took.
        limit: Bytes at which recording stops.
    """

    rows: int
    taken: int
    limit: int

    @property
    def text(self) -> str:
        """One line for a log."""
        steps = self.limit // max(self.taken, 1)
        return (
            f"{self.rows} rows and {self.taken} bytes in the first step; max_bytes "
            f"{self.limit} is enough for about {steps} such steps"
        )


class Recording:
    """Records while it is entered; can be entered again and again.

    Functions compiled with plain torch.compile survive eager engines; they run eagerly
    meanwhile, since a function mode would make them recompile.
    """

    def __init__(self, recorder: "Recorder") -> None:
        self._recorder = recorder
        self._mode: FunctionMode | None = None
        self._stance: Any = None

    def __enter__(self) -> None:
        """Starts recording."""
        # The stance takes effect when it is made, so only its exit is left to call.
        self._stance = torch.compiler.set_stance("force_eager")
        self._mode = self._recorder.mode
        if self._mode is not None:
            self._mode.__enter__()  # type: ignore[no-untyped-call]
        self._recorder.collector.resume()

    def __exit__(self, *error: object) -> None:
        """Stops recording."""
        self._recorder.collector.pause()
        if self._mode is not None:
            self._mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        self._stance.__exit__(None, None, None)


class Recorder:
    """Records steps of a model and writes their dump.

    Attributes:
        config: What to record.
        folder: Of the dump.
        estimate: What a step takes, known once the first one has ended.
        collector: Where calls are reported.
        mode: The function mode of level L1, None at L0.
        recording: Context manager that records while it is entered.
    """

    def __init__(
        self,
        config: DebuggerConfig,
        dump_path: Path,
        *,
        rank: int | None,
        is_kept: bool,
        is_deferred: bool = False,
    ) -> None:
        """Makes a recorder.

        Args:
            config: What to record.
            dump_path: Folder of the dump.
            rank: Rank of this process, None where unknown.
            is_kept: Keep all steps in memory as well, for `close` to return.
            is_deferred: Write the steps when recording has ended, so that writing does
                not slow the model; else each step is written when it has ended: before
                its results leave the process, or by a thread (async_dump).
        """
        self.config = config
        self.folder = dump_path
        self.estimate: Estimate | None = None
        self.collector = Collector(config)
        self.mode: FunctionMode | None = None
        self.recording = Recording(self)
        self._is_kept = is_kept
        self._is_deferred = is_deferred
        self._deferred: list[RawStep] = []
        self._kept: list[StepRecord] = []
        self._writer = DumpWriter(
            dump_path,
            rank_name(rank, os.getpid()),
            task=config.task,
            level=config.level,
            summary_mode=config.summary_mode,
            keeps=config.keeps,  # type: ignore[arg-type]
            has_extra_info=config.extra_info,
            saves_tensors=config.saves_tensors,
        )
        self._wrappers: dict[int, ModuleWrappers] = {}
        self._wrapped: WrappedFunctions | None = None
        self._barriers: WriteBarriers | None = None
        self._watch: TritonWatch | None = None

    @property
    def bytes_written(self) -> int:
        """Bytes of JSON written so far."""
        return self._writer.bytes_written

    @property
    def steps_written(self) -> list[int]:
        """Numbers of the steps whose files are complete."""
        return list(self._writer.steps_written)

    def attach(self, model: Models | None) -> None:
        """Prepares for a model: wraps its modules, builds the table of functions.

        Raises:
            CaptureError: The level needs a model and there is none.
            ConfigError: The list of APIs cannot be read.
        """
        if self.config.has_modules and model is None:
            message = (
                f"level {self.config.level} records modules, and no model was given"
            )
            raise CaptureError(message, slug="no-model", hint="use start(model=...)")
        if model is not None and id(model) not in self._wrappers:
            wrappers = ModuleWrappers(self.collector, model)
            self._wrappers[id(model)] = wrappers
            for _, root in root_models(model):
                self.collector.add_constants(root.parameters())
                self.collector.add_constants(root.buffers())
            wrappers.install(has_modules=self.config.has_modules)
        if self._watch is None:
            self._watch = TritonWatch(self.collector)
            self._watch.install()
        if self.config.has_functions and self._wrapped is None:
            path = self.config.support_wrap_ops
            table = FunctionTable(
                self.collector,
                read_op_list(Path(path) if path else None),
                self.config.custom_op_namespaces,
            )
            self._wrapped = WrappedFunctions(self.collector, table)
            self._wrapped.install()
            self.mode = FunctionMode(self.collector, table)
        elif self._barriers is None and not self.config.has_functions:
            self._barriers = WriteBarriers(self.collector)
            self._barriers.install()

    def detach(self) -> None:
        """Takes every wrapper off again."""
        if self.collector.progress is not None:
            self.collector.progress.close()
            self.collector.progress = None
        for wrappers in self._wrappers.values():
            wrappers.remove()
        self._wrappers.clear()
        if self._wrapped is not None:
            self._wrapped.remove()
        self._wrapped = self.mode = None
        if self._barriers is not None:
            self._barriers.remove()
        if self._watch is not None:
            self._watch.remove()
        self._barriers = self._watch = None

    def begin_step(
        self,
        number: int,
        *,
        layout_source: LayoutSource | None = None,
        frame: FrameType | None = None,
    ) -> None:
        """Opens a step, or goes on with it if it is open."""
        folder = None
        if self.config.saves_tensors:
            folder = self._writer.folder(number) / TENSORS
        self.collector.begin_step(
            number, layout_source=layout_source, frame=frame, tensor_folder=folder
        )

    def end_step(self) -> None:
        """Closes the step and sees to its files."""
        step = self.collector.end_step()
        if step is None:
            return
        if self.recorded_bytes > self.config.max_bytes:
            self.collector.fail(self._limit_error(step.step))
        if self._is_deferred:
            self._deferred.append(step)
            gc.freeze()  # what is kept would be looked through again and again
            self._note_estimate()
            return
        self.collector.measurer.settle()
        try:
            if self.config.async_dump:
                self._writer.write(partial(self._make, step))
            else:
                self._writer.write_now(self._make(step))
        except (OSError, CaptureError) as error:
            self.collector.fail(self._writer.error_of(error))
        self._note_estimate()

    def _note_estimate(self) -> None:
        if self.estimate is None:
            rows = self.collector.measurer.measured_rows
            self.estimate = Estimate(rows, self.recorded_bytes, self.config.max_bytes)
            _LOG.info("msprobe: %s", self.estimate.text)

    def drop_step(self) -> None:
        """Forgets the open step, which has not come to its end."""
        self.collector.end_step()

    @property
    def recorded_bytes(self) -> int:
        """Bytes that the recording has taken so far: files, and rows in memory."""
        held = self.collector.measurer.measured_rows * ROW_WIDTH * 8
        return (
            held if self._is_deferred else self.bytes_written
        ) + self.collector.saved_bytes

    def _limit_error(self, step: int) -> CaptureError:
        message = (
            f"recording stopped behind step {step}: {self.recorded_bytes} bytes, "
            f"max_bytes is {self.config.max_bytes}"
        )
        hint = "record fewer steps (step, list, level), or raise max_bytes"
        return CaptureError(message, slug="max-bytes", hint=hint)

    def _make(self, raw: RawStep) -> StepRecord:
        step = materialize(raw)
        if self._is_kept:
            self._kept.append(step)
        return step

    def close(self) -> list[StepRecord]:
        """Takes the wrappers off, waits for the files, returns the steps kept.

        Raises:
            CaptureError: Recording or writing failed.
        """
        self.detach()
        self.collector.measurer.settle()
        deferred, self._deferred = self._deferred, []
        try:
            for step in deferred:
                self._writer.write_now(self._make(step))
            self._writer.close()
        except (OSError, CaptureError) as error:
            self.collector.fail(self._writer.error_of(error))
        self.collector.raise_error()
        steps, self._kept = self._kept, []
        return steps

    def abandon(self) -> None:
        """Takes the wrappers off and forgets what was not written yet."""
        self.detach()
        self._deferred.clear()
        with contextlib.suppress(CaptureError):
            self._writer.close()

    def backend_reasons(self) -> dict[str, str]:
        """Which statistics backend was used for each device, and why."""
        backends = self.collector.measurer.backends
        return {device: reason for device, (_, reason) in backends.items()}
