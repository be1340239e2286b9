# SPDX-License-Identifier: Apache-2.0
"""Measures the tensors of calls and keeps the records of the running step.

Module wrappers and the function mode report calls here. Nothing in this module raises
into the model: the first error is kept, recording stops, and whoever ends the capture
raises it.
"""

import threading
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from pytest_msprobe.config.debugger_config import DebuggerConfig
from pytest_msprobe.debugger.calls import describe_value
from pytest_msprobe.debugger.selection import Selection
from pytest_msprobe.debugger.stacks import capture_stack
from pytest_msprobe.dump.tensors import file_name, save_tensor
from pytest_msprobe.errors import CaptureError
from pytest_msprobe.model.calls import (
    CallRecord,
    Role,
    StepRecord,
    TensorValue,
)
from pytest_msprobe.model.records import ROW_WIDTH
from pytest_msprobe.model.segments import (
    Piece,
    RowClass,
    RowClassifier,
    StepLayout,
    split_samples,
    split_tokens,
)
from pytest_msprobe.statistics.select import select_backend
from pytest_msprobe.statistics.spec import Backend, Span, rows_of, whole

Phase = Literal["outside", "forward", "logits", "sample"]
LayoutSource = Callable[[int | None], StepLayout | None]
_CHUNK_ROWS = 1024
_SUBCLASS_NAMES = {"FakeTensor": "torch._subclasses.fake_tensor.FakeTensor"}


class Collector:
    """Records of the calls of one step at a time.

    Attributes:
        config: What to record.
        error: First error met while recording, or None.
        phase: Which part of a step is running, set by the engine adapter.
        classifier: Tells token-major slots from others over the whole capture.
        measured_rows: Rows measured so far.
    """

    def __init__(self, config: DebuggerConfig) -> None:
        self.config = config
        self.selection = Selection(config)
        self.error: BaseException | None = None
        self.phase: Phase = "outside"
        self.classifier = RowClassifier()
        self.measured_rows = 0
        self.backends: dict[str, tuple[Backend, str]] = {}
        self._step: StepRecord | None = None
        self._is_recording = False
        self._stack: list[CallRecord] = []
        self._counters: dict[str, int] = {}
        self._layout: StepLayout | None = None
        self._layout_source: LayoutSource | None = None
        self._token_pieces: tuple[Piece, ...] = ()
        self._sample_pieces: tuple[Piece, ...] = ()
        self._undefined: dict[int, torch.Tensor] = {}
        self._opaque: frozenset[int] = frozenset()
        self._constants: dict[int, torch.Tensor] = {}
        self._measured_constants: dict[tuple[object, ...], TensorValue] = {}
        self._chunk: npt.NDArray[np.float64] = np.zeros((0, ROW_WIDTH))
        self._used = 0
        self._frame_limit: FrameType | None = None
        self._tensor_folder: Path | None = None
        self._current: CallRecord | None = None
        self._thread = 0

    # Steps ---------------------------------------------------------------------

    @property
    def is_recording(self) -> bool:
        """Whether calls are recorded now."""
        return self._is_recording

    def begin_step(
        self,
        number: int,
        *,
        layout_source: LayoutSource | None = None,
        frame: FrameType | None = None,
        tensor_folder: Path | None = None,
    ) -> None:
        """Opens a step; a step that is open already goes on (counters too).

        Args:
            number: Number of the step.
            layout_source: Called once inside the forward, when the rows are settled.
            frame: Frame outside of which stacks are common to all calls.
            tensor_folder: Where tensors are saved, None to save none.
        """
        if self._step is None or self._step.step != number:
            self._step = StepRecord(number)
            self._step.common_stack = capture_stack(frame, None)
            self._counters = {}
            self._stack = []
            self.selection.reset()
        self._layout = None
        self._layout_source = layout_source
        self._token_pieces = self._sample_pieces = ()
        self._frame_limit = frame
        self._tensor_folder = tensor_folder
        self._thread = threading.get_ident()
        self.phase = "outside"

    def end_step(self) -> StepRecord | None:
        """Closes the step and returns its records, None if none was open."""
        step = self._step
        self._step = None
        self._is_recording = False
        self._undefined.clear()
        self._stack = []
        if step is not None:
            step.layout = self._layout
        self._layout_source = None
        return step

    def resume(self) -> None:
        """Starts recording in the open step."""
        self._is_recording = self._step is not None and self.error is None

    def pause(self) -> None:
        """Stops recording, the step stays open."""
        self._is_recording = False

    def fail(self, error: BaseException) -> None:
        """Keeps the first error and stops recording."""
        if self.error is None:
            self.error = error
        self._is_recording = False

    def set_opaque(self, addresses: frozenset[int]) -> None:
        """Names the storages (by first byte) that are never measured: KV caches."""
        self._opaque = addresses

    def add_constants(self, tensors: Iterable[torch.Tensor]) -> None:
        """Names parameters and buffers: measured once a capture, until written."""
        for tensor in tensors:
            address = storage_address(tensor)
            if address:
                self._constants[address] = tensor

    def enter_forward(self, padded_tokens: int | None = None) -> None:
        """The model's forward starts: rows are settled from here on.

        Args:
            padded_tokens: Rows of the model's inputs, None where unknown.
        """
        self.phase = "forward"
        if self._layout is None and self._layout_source is not None:
            self._layout = self._layout_source(padded_tokens)
            if self._layout is not None:
                self._token_pieces = split_tokens(self._layout)
                self._sample_pieces = split_samples(self._layout)

    @property
    def layout(self) -> StepLayout | None:
        """Rows of the open step, None before the forward or where unknown."""
        return self._layout

    # Calls ---------------------------------------------------------------------

    @property
    def active_module(self) -> CallRecord | None:
        """Innermost module call that is running."""
        return self._stack[-1] if self._stack else None

    def begin_call(
        self, prefix: str, suffix: str, key_prefix: str, *, is_module: bool
    ) -> CallRecord:
        """A record for a call that starts, numbered within the step.

        Args:
            prefix: Text before the number.
            suffix: Text after it.
            key_prefix: As prefix, a shared module named after its parent.
            is_module: Whether calls inside it have it as their parent.
        """
        number = self._counters.get(prefix, 0)
        self._counters[prefix] = number + 1
        name = f"{prefix}{number}{suffix}"
        key = name
        if key_prefix != prefix:
            key_number = self._counters.get("@" + key_prefix, 0)
            self._counters["@" + key_prefix] = key_number + 1
            key = f"{key_prefix}{key_number}{suffix}"
        parent = self._stack[-1].name if self._stack else None
        call = CallRecord(name, key, len(self._stack), parent)
        if is_module:
            self._stack.append(call)
        return call

    def read_inputs(
        self, call: CallRecord, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> None:
        """Measures the arguments of a call."""
        if not self.config.keeps("input") and not self.config.has_modules:
            return
        self._current = call
        measure = self.measure
        call.input_args = [
            describe_value(value, f"input_args.{index}", measure)
            for index, value in enumerate(args)
        ]
        call.input_kwargs = {
            name: describe_value(value, f"input_kwargs.{name}", measure)
            for name, value in kwargs.items()
        }

    def read_outputs(
        self, call: CallRecord, result: Any, written: Sequence[torch.Tensor] = ()
    ) -> None:
        """Measures the results of a call and the tensors that it wrote in place."""
        self._current = call
        if isinstance(result, tuple) and hasattr(result, "_asdict"):
            call.output = describe_value(result, "output", self.measure)
            return
        values = list(result) if isinstance(result, tuple) else [result]
        values.extend(tensor for tensor in written if not _is_among(tensor, values))
        call.output = [
            describe_value(value, f"output.{index}", self.measure)
            for index, value in enumerate(values)
        ]

    def finish_call(self, call: CallRecord) -> None:
        """Adds a call that has ended to the step."""
        call.is_finished = True
        if self._step is not None:
            self._step.calls.append(call)

    def leave_module(self, call: CallRecord) -> None:
        """Takes a module call off the stack, with all calls left open inside it."""
        while self._stack:
            if self._stack.pop() is call:
                return

    def take_stack(self, call: CallRecord, frame: FrameType | None) -> None:
        """Keeps the call's stack, where the configuration asks for it."""
        if self.config.extra_info:
            call.stack = capture_stack(frame, self._frame_limit)

    # Tensors -------------------------------------------------------------------

    def read_parameters(self, call: CallRecord, module: torch.nn.Module) -> None:
        """Describes the direct parameters of a module, measured once a capture."""
        if self.config.task == "structure":
            call.parameters = {}
            return
        self._current = call
        call.parameters = {
            name: self.measure(parameter, f"parameters.{name}")
            for name, parameter in module.named_parameters(recurse=False)
        }

    def mark_undefined(self, tensor: torch.Tensor) -> None:
        """Notes that nobody has written a tensor's memory yet."""
        self._undefined[storage_address(tensor)] = tensor

    def mark_written(self, tensor: torch.Tensor) -> None:
        """Notes that a tensor's memory has been written."""
        address = storage_address(tensor)
        self._undefined.pop(address, None)
        if self._constants.pop(address, None) is not None:
            self._measured_constants.clear()

    def measure(self, tensor: torch.Tensor, slot: str) -> TensorValue:
        """Measures a tensor in a slot of the current call."""
        if self.config.task == "structure":
            return self._describe_only(tensor)
        role: Role = "read"
        address = storage_address(tensor)
        if address in self._opaque:
            return self._describe_only(tensor, "opaque")
        if address in self._undefined:
            role = "undefined"
        if address in self._constants:
            return self._measure_constant(tensor, slot)
        shape = tensor.shape
        pieces: tuple[Piece, ...] = ()
        row_class: RowClass = "neither"
        if shape and self._layout is not None:
            if self.phase == "forward":
                assert self._current is not None
                name = f"{self._current.key}:{slot}"
                tokens = self._layout.padded_tokens
                if self.classifier.observe(name, dimension_0=shape[0], tokens=tokens):
                    pieces, row_class = self._token_pieces, "token"
            elif self.phase != "outside" and shape[0] == len(self._sample_pieces):
                pieces, row_class = self._sample_pieces, "sample"
        value = self._measure_pieces(tensor, pieces, row_class)
        value.role = role
        self._save(tensor, slot, value)
        return value

    def _measure_constant(self, tensor: torch.Tensor, slot: str) -> TensorValue:
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        known = self._measured_constants.get(key)
        if known is None:
            known = self._measure_pieces(tensor, (), "neither")
            self._measured_constants[key] = known
        if self._tensor_folder is None:
            return known
        value = replace(known)
        self._save(tensor, slot, value)
        return value

    def _describe_only(self, tensor: torch.Tensor, role: Role = "read") -> TensorValue:
        return TensorValue(
            str(tensor.dtype),
            tuple(tensor.shape),
            tensor.requires_grad,
            None,
            role=role,
            type_name=_type_name(tensor),
        )

    def _measure_pieces(
        self, tensor: torch.Tensor, pieces: tuple[Piece, ...], row_class: RowClass
    ) -> TensorValue:
        value = self._describe_only(tensor)
        if not _is_measurable(tensor):
            return value
        shape = value.shape
        value.pieces, value.row_class = pieces, row_class
        parts: list[list[Span]]
        if pieces:
            parts = [[rows_of(shape, p.first_row, p.rows, p.position)] for p in pieces]
        else:
            parts = [[whole(shape)]]
        rows = self._take_rows(len(parts))
        backend = self._backend(tensor.device.type)
        try:
            backend.measure(tensor, parts, rows)
        except (NotImplementedError, TypeError, RuntimeError):
            # This kind of tensor has no numbers; its row says so by null statistics.
            value.pieces, value.row_class = (), "neither"
            return value
        value.rows = rows
        self.measured_rows += len(parts)
        if self.config.summary_mode != "statistics":
            value.digest = digest(tensor, self.config.summary_mode)
        return value

    def _take_rows(self, count: int) -> npt.NDArray[np.float64]:
        if self._used + count > len(self._chunk):
            self._chunk = np.zeros((max(_CHUNK_ROWS, count), ROW_WIDTH))
            self._used = 0
        rows = self._chunk[self._used : self._used + count]
        self._used += count
        return rows

    def _backend(self, device_type: str) -> Backend:
        known = self.backends.get(device_type)
        if known is None:
            known = self.backends[device_type] = select_backend(device_type)
        return known[0]

    def _save(self, tensor: torch.Tensor, slot: str, value: TensorValue) -> None:
        if self._tensor_folder is None or self._current is None:
            return
        name = self._current.name
        listed = any(entry in name for entry in self.config.tensor_list)
        if self.config.task == "tensor" or listed:
            value.data_name = save_tensor(
                self._tensor_folder, file_name(name, slot), tensor
            )

    def raise_error(self) -> None:
        """Raises the first error met while recording.

        Raises:
            CaptureError: There was one.
        """
        if self.error is not None:
            if isinstance(self.error, CaptureError):
                raise self.error
            kind = type(self.error).__name__
            message = f"recording stopped: {kind}: {self.error}"
            raise CaptureError(message, slug="recording") from self.error


def storage_address(tensor: torch.Tensor) -> int:
    """Address of the first byte of a tensor's storage, 0 where it has none."""
    try:
        offset = int(tensor.storage_offset()) * tensor.element_size()
        return tensor.data_ptr() - offset
    except (RuntimeError, NotImplementedError):
        return 0


def digest(tensor: torch.Tensor, summary_mode: str) -> str | None:
    """MsProbe's checksum texts of a tensor's bytes: CRC-32 (md5) or xor.

    Args:
        tensor: Any strided dtype; CUDA tensors are copied first.
        summary_mode: `md5` or `xor`.
    """
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    raw = flat.view(torch.uint8).numpy() if flat.numel() else np.zeros(0, np.uint8)
    if summary_mode == "md5":
        return f"{zlib.crc32(raw.tobytes()):08x}"
    if raw.size == 0:
        return None
    padded = np.zeros(-(-raw.size // 8) * 8, dtype=np.uint8)
    padded[: raw.size] = raw
    return f"0x{int(np.bitwise_xor.reduce(padded.view('<u8'))):016x}"


def _is_measurable(tensor: torch.Tensor) -> bool:
    return (
        tensor.layout is torch.strided
        and not tensor.is_meta
        and not tensor.is_quantized
        and tensor.numel() > 0
        and type(tensor).__name__ not in _SUBCLASS_NAMES
    )


def _type_name(tensor: torch.Tensor) -> str:
    return _SUBCLASS_NAMES.get(type(tensor).__name__, "torch.Tensor")


def _is_among(tensor: torch.Tensor, values: Sequence[Any]) -> bool:
    return any(value is tensor for value in values)
