# SPDX-License-Identifier: Apache-2.0
"""One capture in one process: collector, wrappers, function mode and writer."""

import contextlib
import gc
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from pytest_msprobe.config.debugger_config import DebuggerConfig
from pytest_msprobe.debugger.backward import Backward, Regions
from pytest_msprobe.debugger.bench import Bench
from pytest_msprobe.debugger.collector import Collector, LayoutSource
from pytest_msprobe.debugger.functions import (
    FunctionMode,
    FunctionTable,
    WrappedFunctions,
    read_op_list,
)
from pytest_msprobe.debugger.load import Loader
from pytest_msprobe.debugger.materialize import materialize
from pytest_msprobe.debugger.modules import ModuleWrappers, root_models
from pytest_msprobe.debugger.raw import RawStep
from pytest_msprobe.debugger.replaced import ReplacedFunctions
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
        free: Bytes free where the dump is written.
        steps: Steps that are to be expected, this one among them; 0 where unknown.
    """

    rows: int
    taken: int
    limit: int
    free: int
    steps: int = 0

    @property
    def is_too_much(self) -> bool:
        """Whether the steps to be expected go beyond what there is room for."""
        return self.steps * self.taken > min(self.limit, self.free)

    @property
    def text(self) -> str:
        """One line for a log."""
        room = min(self.limit, self.free)
        name = f"max_bytes {room}" if room == self.limit else f"{room} bytes free"
        text = (
            f"{self.rows} rows and {self.taken} bytes in the first step; {name} "
            f"is enough for about {room // max(self.taken, 1)} such steps"
        )
        if self.steps:
            text += (
                f"; {self.steps} are expected: about {self.steps * self.rows} rows and "
                f"{self.steps * self.taken} bytes"
            )
        if self.is_too_much:
            text += "; record less (step, list, level) or make room"
        return text


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
        self.enter_functions()
        self._recorder.collector.resume()

    def leave_functions(self) -> None:
        """Stops recording functions; modules go on."""
        mode, self._mode = self._mode, None
        self._recorder.collector.mode = None
        if mode is not None:
            mode.leave()

    def enter_functions(self) -> None:
        """Records functions again."""
        self._mode = self._recorder.collector.mode = self._recorder.mode
        if self._mode is not None:
            self._mode.enter()

    def __exit__(self, *error: object) -> None:
        """Stops recording."""
        self._recorder.collector.pause()
        self.leave_functions()
        self._stance.__exit__(None, None, None)


class Recorder:
    """Records steps of a model and writes their dump.

    Attributes:
        config: What to record.
        folder: Of the dump.
        estimate: What a step takes, known once the first one has ended.
        expected_steps: Steps that will be recorded, 0 where unknown.
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
        has_gradients: bool = True,
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
            has_gradients: Whether a backward may run, and calls may come from other
                places at each step; engines have neither.
        """
        self.config = config
        self.folder = dump_path
        self.estimate: Estimate | None = None
        self.expected_steps = 0
        self.collector = Collector(config)
        self.collector.keeps_weights = not has_gradients and config.measure_once
        if has_gradients and config.has_backward:
            self.collector.backward = Backward(self.collector)
        self.collector.has_steady_stacks = not has_gradients
        self._regions = None
        if has_gradients and config.level == "mix":
            self._regions = Regions(self.collector)
            self.collector.has_regions = True
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
            keeps=config.keeps,
            has_extra_info=config.extra_info,
            saves_tensors=config.saves_tensors,
        )
        self._wrappers: dict[tuple[int, ...], ModuleWrappers] = {}
        self._wrapped: WrappedFunctions | None = None
        self._replaced: ReplacedFunctions | None = None
        self._has_gradients = has_gradients
        self._barriers: WriteBarriers | None = None
        self._watch: TritonWatch | None = None
        self._single: ModuleWrappers | None = None
        if config.bench_path is not None:
            bench = Bench(
                Path(config.bench_path), config.diff_nums, rank_name(rank, os.getpid())
            )
            self.collector.bench = bench
        if config.load is not None:
            self.collector.loader = Loader(config.load, rank_name(rank, os.getpid()))
        self._dumps = config.load is None or config.load.dumps

    @property
    def is_finished(self) -> bool:
        """Whether nothing more will be recorded, though nothing went wrong."""
        bench = self.collector.bench
        return bench is not None and bench.is_finished

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
            ConfigError: It is no model, or the list of APIs cannot be read.
        """
        roots = root_models(model) if model is not None else []
        if self.config.has_modules and not roots:
            message = (
                f"level {self.config.level} records modules, and no model was given"
            )
            raise CaptureError(message, slug="no-model", hint="use start(model=...)")
        key = tuple(id(root) for _, root in roots)
        if model is not None:
            wrappers = self._wrappers.get(key)
            others = [other for other in self._wrappers.values() if other != wrappers]
            if wrappers is None:
                self._wrappers[key] = wrappers = ModuleWrappers(self.collector, model)
                for _, root in roots:
                    self.collector.add_constants(root.parameters())
                    self.collector.add_constants(root.buffers())
            for _, root in roots:
                self.collector.add_modules(root.modules())
            wrappers.install(has_modules=self.config.has_modules, others=others)
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
            if self.config.function_hooks == "replace" and not self._has_gradients:
                self._replaced = ReplacedFunctions(self.collector, table)
                self._replaced.install()
            else:
                self.mode = FunctionMode(self.collector, table)
            if self._regions is not None:
                self._regions.install()
        elif self._barriers is None and not self.config.has_functions:
            self._barriers = WriteBarriers(self.collector)
            self._barriers.install()

    def begin_module(self, module: torch.nn.Module, name: str) -> bool:
        """Records one module and no function, until `end_module`.

        Args:
            module: The module; what it calls is not recorded.
            name: In place of its path.

        Returns:
            False where the module is recorded already.
        """
        if any(wrappers.has(module) for wrappers in self._wrappers.values()):
            return False
        self.end_module()
        self.recording.leave_functions()
        if self.config.has_functions:  # the mode that sees writes is off
            self.collector.begin_unseen()
        if self._wrapped is not None:
            self._wrapped.remove()
        if self._replaced is not None:
            self._replaced.remove()
        self._single = ModuleWrappers(self.collector, module)
        self._single.install_one(name)
        return True

    def end_module(self) -> None:
        """Takes the module of `begin_module` off; functions are recorded again."""
        single, self._single = self._single, None
        if single is None:
            return
        single.remove()
        if self.config.has_functions:
            self.collector.end_unseen()
        if self._wrapped is not None:
            self._wrapped.install()
        if self._replaced is not None:
            self._replaced.install()
        if self.collector.is_recording:
            self.recording.enter_functions()

    def detach(self) -> None:
        """Takes every wrapper off again."""
        self.end_module()
        if self.collector.progress is not None:
            self.collector.progress.close()
            self.collector.progress = None
        for wrappers in self._wrappers.values():
            wrappers.remove()
        self._wrappers.clear()
        if self.collector.backward is not None:
            self.collector.backward.remove()
        if self._wrapped is not None:
            self._wrapped.remove()
        if self._regions is not None:
            self._regions.remove()
        if self.mode is not None:
            self.mode.leave()
        if self._replaced is not None:
            self._replaced.remove()
        self._wrapped = self._replaced = self.mode = None
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
        """Opens a step, or goes on with it if it is open.

        Raises:
            CaptureError: The dump of `bench_path` or `load` has no such step.
            DumpFormatError: It is not readable.
        """
        if self.collector.bench is not None:
            self.collector.bench.begin_step(number)
        if self.collector.loader is not None:
            self.collector.loader.begin_step(number)
        folder = None
        if self.config.saves_tensors and self._dumps:
            folder = self._writer.folder(number) / TENSORS
        self.collector.begin_step(
            number, layout_source=layout_source, frame=frame, tensor_folder=folder
        )

    def end_step(self) -> None:
        """Closes the step and sees to its files."""
        step = self.collector.end_step()
        if step is None or not self._dumps:
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
        if self.estimate is not None:
            return
        rows = self.collector.measurer.measured_rows
        folder = next(p for p in (self.folder, *self.folder.parents) if p.is_dir())
        self.estimate = Estimate(
            rows,
            self.recorded_bytes,
            self.config.max_bytes,
            shutil.disk_usage(folder).free,
            self.expected_steps,
        )
        level = logging.WARNING if self.estimate.is_too_much else logging.INFO
        _LOG.log(level, "msprobe: %s", self.estimate.text)

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
        loader = self.collector.loader
        if loader is not None and loader.unused:
            _LOG.warning("msprobe: load: never called: %s", ", ".join(loader.unused))
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
