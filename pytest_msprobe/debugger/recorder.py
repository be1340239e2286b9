# SPDX-License-Identifier: Apache-2.0
"""One capture in one process: collector, wrappers, function mode and writer."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import torch

from pytest_msprobe.config.debugger_config import DebuggerConfig
from pytest_msprobe.debugger.collector import Collector, LayoutSource
from pytest_msprobe.debugger.functions import (
    FunctionMode,
    FunctionTable,
    WrappedFunctions,
    read_op_list,
)
from pytest_msprobe.debugger.modules import ModuleWrappers, root_models
from pytest_msprobe.dump.layout import TENSORS, rank_name
from pytest_msprobe.dump.writer import DumpWriter
from pytest_msprobe.errors import CaptureError

if TYPE_CHECKING:
    from pytest_msprobe.model.calls import StepRecord

Models = torch.nn.Module | Sequence[torch.nn.Module]


class Recorder:
    """Records steps of a model and writes their dump.

    Attributes:
        collector: Where calls are reported.
        steps: Finished steps, kept only if asked for.
    """

    def __init__(
        self,
        config: DebuggerConfig,
        dump_path: Path,
        *,
        rank: int | None,
        keeps_steps: bool,
    ) -> None:
        self.config = config
        self.collector = Collector(config)
        self.steps: list[StepRecord] = []
        self._keeps_steps = keeps_steps
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
        self._table: FunctionTable | None = None
        self._wrapped: WrappedFunctions | None = None
        self._mode: FunctionMode | None = None

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
            if self.config.has_modules:
                wrappers.install()
        if self.config.has_functions and self._table is None:
            path = self.config.support_wrap_ops
            self._table = FunctionTable(
                self.collector,
                read_op_list(Path(path) if path else None),
                self.config.custom_op_namespaces,
            )
            self._wrapped = WrappedFunctions(self.collector, self._table)
            self._wrapped.install()
            self._mode = FunctionMode(self.collector, self._table)

    def detach(self) -> None:
        """Takes every wrapper off again."""
        for wrappers in self._wrappers.values():
            wrappers.remove()
        self._wrappers.clear()
        if self._wrapped is not None:
            self._wrapped.remove()
        self._table = self._wrapped = self._mode = None

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
        """Closes the step and hands it to the writer."""
        step = self.collector.end_step()
        if step is None:
            return
        if self._keeps_steps:
            self.steps.append(step)
        try:
            self._writer.write(step)
        except CaptureError as error:
            self.collector.fail(error)

    def start_recording(self) -> contextlib.ExitStack:
        """Starts recording; closing the returned stack stops it.

        Functions compiled with plain torch.compile survive eager engines; they run
        eagerly meanwhile, since a function mode would make them recompile.
        """
        stack = contextlib.ExitStack()
        # It takes effect when made, so only its exit is left to call.
        stack.push(torch.compiler.set_stance("force_eager"))
        if self._mode is not None:
            stack.enter_context(self._mode)
        self.collector.resume()
        stack.callback(self.collector.pause)
        return stack

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Records while the block runs."""
        with self.start_recording():
            yield

    def close(self) -> None:
        """Takes the wrappers off and waits for the files.

        Raises:
            CaptureError: Recording or writing failed.
        """
        self.detach()
        try:
            self._writer.close()
        except CaptureError as error:
            self.collector.fail(error)
        self.collector.raise_error()

    def backend_reasons(self) -> dict[str, str]:
        """Which statistics backend was used for each device, and why."""
        return {
            device: reason for device, (_, reason) in self.collector.backends.items()
        }
