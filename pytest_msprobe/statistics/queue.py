# SPDX-License-Identifier: Apache-2.0
"""Measures many tensors of a GPU with few launches, and never waits for it.

What is to be measured is written into a table in pinned memory, which the kernels read
there; the rows stay on the GPU until a step ends, when one asynchronous copy brings
them home.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pytest_msprobe.model.records import ROW_WIDTH
from pytest_msprobe.statistics import cuda
from pytest_msprobe.statistics.spec import Span

# Rows that a buffer holds: 4.8 MB, and there are two, here and on the GPU.
_ROWS = 8192


@dataclass(slots=True)
class _Buffer:
    """Rows on the GPU, where they are copied to, and where they go in the end."""

    device: torch.Tensor
    pinned: torch.Tensor
    home: npt.NDArray[np.float64] | None = None
    event: Any = None

    def settle(self) -> None:
        """Waits for the copy and puts the rows where they belong."""
        if self.home is None:
            return
        if self.event is not None:
            self.event.synchronize()
        self.home[:] = self.pinned.numpy()[: len(self.home)]
        self.home, self.event = None, None


def prepare(
    dtype: torch.dtype, spans: Sequence[Span], row_stride: int, size: int
) -> cuda.Prepared:
    """Spans of a tensor as a queue takes them.

    Args:
        dtype: One that `cuda.knows`.
        spans: None is empty.
        row_stride: Elements from row to row of the tensor.
        size: Bytes of an element.

    Raises:
        ValueError: There are more than the rows of a queue.
    """
    if len(spans) > _ROWS:
        message = f"a tensor in {len(spans)} pieces: expected at most {_ROWS}"
        raise ValueError(message)
    return cuda.prepare(dtype, spans, row_stride, size)


class DeviceQueue:
    """What one GPU has still to measure, and the rows that are not home yet."""

    def __init__(self, device: torch.device) -> None:
        """Makes the buffers.

        Args:
            device: The GPU.
        """
        self._device = device
        self._is_cuda = device.type == "cuda"
        shape = (_ROWS, ROW_WIDTH)
        with torch.inference_mode(mode=False):  # they are written outside as well
            self._buffers = [
                _Buffer(
                    torch.empty(shape, dtype=torch.float64, device=device),
                    torch.empty(shape, dtype=torch.float64, pin_memory=self._is_cuda),
                )
                for _ in range(2)
            ]
        self._current = 0
        self._out = 0
        # Memory that the rows of steps share, and the first row of the running one.
        self._home = np.empty((_ROWS, ROW_WIDTH))
        self._first = 0
        # Rows of the running step; there is room for none before it has a buffer.
        self._used = self._room = 0
        self._usual = 0
        self._launcher = cuda.launcher(device)
        self._pending: dict[torch.dtype, cuda.Pending] = {}

    def add(
        self, address: int, prepared: cuda.Prepared
    ) -> tuple[npt.NDArray[np.float64], int]:
        """Notes a tensor to be measured; its owner keeps it until `launch`.

        Args:
            address: Of its first element.
            prepared: From `prepare`.

        Returns:
            Memory where a row for each span will be once `settle` has returned,
            (n, 73), and the first of them.
        """
        used = self._used
        end = used + prepared.count
        if end > self._room:
            self._turn(prepared.count)
            used, end = 0, prepared.count
        self._used = end
        pending = self._pending.get(prepared.dtype)
        if pending is None:
            pending = cuda.Pending(self._launcher, prepared.dtype)
            self._pending[prepared.dtype] = pending
        pending.add(address, used, prepared)
        return self._home, self._first + used

    def launch(self) -> None:
        """Starts the kernels for everything noted."""
        for pending in self._pending.values():
            pending.launch(self._out)

    def finish(self) -> None:
        """A step has ended: its rows are copied home, without waiting for them."""
        self.launch()
        used = self._used
        if not used:
            return
        buffer = self._buffers[self._current]
        buffer.home = self._home[self._first : self._first + used]
        buffer.pinned[:used].copy_(buffer.device[:used], non_blocking=self._is_cuda)
        buffer.event = self._record()
        self._first += used
        self._usual = used
        self._used = self._room = 0

    def settle(self) -> None:
        """Waits until all rows are home."""
        self.finish()
        for buffer in self._buffers:
            buffer.settle()

    def _turn(self, count: int) -> None:
        """Goes on with the other buffer, and with other memory if this is full.

        Args:
            count: Rows that are wanted.
        """
        self.finish()
        self._current = 1 - self._current
        buffer = self._buffers[self._current]
        buffer.settle()
        if self._first + max(count, self._usual) > _ROWS:
            self._home, self._first = np.empty((_ROWS, ROW_WIDTH)), 0
        self._room = _ROWS - self._first
        self._out = buffer.device.data_ptr()

    def _record(self) -> Any:
        if not self._is_cuda:
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return event
