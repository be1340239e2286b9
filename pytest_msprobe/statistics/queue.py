# SPDX-License-Identifier: Apache-2.0
"""Measures many tensors of a GPU with few launches, and never waits for it.

What is to be measured is written into a table in pinned memory, which the kernels read
there; the rows stay on the GPU until a step ends, when one asynchronous copy brings
them home.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from pytest_msprobe.model.records import ROW_WIDTH
from pytest_msprobe.statistics import cuda
from pytest_msprobe.statistics.spec import Span

# Rows that a buffer holds: 4.8 MB, and there are two, here and on the GPU.
_ROWS = 8192


class Prepared(NamedTuple):
    """The spans of a tensor as a queue takes them."""

    dtype: torch.dtype
    forms: tuple[cuda.Form, ...]


@dataclass(slots=True)
class _Buffer:
    """Rows on the GPU, where they are copied to, and where they go in the end."""

    device: torch.Tensor
    pinned: torch.Tensor
    home: npt.NDArray[np.float64] | None = None
    used: int = 0
    event: Any = None

    def settle(self) -> None:
        """Waits for the copy and puts the rows where they belong."""
        if self.home is None:
            return
        if self.event is not None:
            self.event.synchronize()
        self.home[: self.used] = self.pinned.numpy()[: self.used]
        self.home, self.event, self.used = None, None, 0


def prepare(
    dtype: torch.dtype, spans: Sequence[Span], row_stride: int, size: int
) -> Prepared:
    """Spans of a tensor as a queue takes them.

    Args:
        dtype: One that `cuda.knows`.
        spans: None is empty.
        row_stride: Elements from row to row of the tensor.
        size: Bytes of an element.
    """
    return Prepared(
        dtype, tuple(cuda.form_of(span, row_stride, size) for span in spans)
    )


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
        self._buffers = [
            _Buffer(
                torch.empty(shape, dtype=torch.float64, device=device),
                torch.empty(shape, dtype=torch.float64, pin_memory=self._is_cuda),
            )
            for _ in range(2)
        ]
        self._current = 0
        self._out = 0
        self._home: npt.NDArray[np.float64] | None = None
        self._used = 0
        self._launcher = cuda.launcher(device)
        self._pending: dict[torch.dtype, cuda.Pending] = {}

    def add(
        self, address: int, prepared: Sequence[Any]
    ) -> tuple[npt.NDArray[np.float64], int]:
        """Notes a tensor to be measured; its owner keeps it until `launch`.

        Args:
            address: Of its first element.
            prepared: From `prepare`.

        Returns:
            Memory where a row for each span will be once `settle` has returned,
            (n, 73), and the first of them.
        """
        dtype, forms = prepared
        home = self._home
        if home is None or self._used + len(forms) > _ROWS:
            home = self._turn()
        pending = self._pending.get(dtype)
        if pending is None:
            pending = cuda.Pending(self._launcher, dtype)
            self._pending[dtype] = pending
        first = slot = self._used
        for form in forms:
            pending.add(address, slot, form, self._out)
            slot += 1
        self._used = slot
        return home, first

    def launch(self) -> None:
        """Starts the kernels for everything noted."""
        for pending in self._pending.values():
            pending.launch(self._out)

    def finish(self) -> None:
        """A step has ended: its rows are copied home, without waiting for them."""
        self.launch()
        if self._home is None:
            return
        buffer = self._buffers[self._current]
        buffer.used, buffer.home = self._used, self._home
        buffer.pinned[: self._used].copy_(
            buffer.device[: self._used], non_blocking=self._is_cuda
        )
        buffer.event = self._record()
        self._home, self._used = None, 0

    def settle(self) -> None:
        """Waits until all rows are home."""
        self.finish()
        for buffer in self._buffers:
            buffer.settle()

    def _turn(self) -> npt.NDArray[np.float64]:
        """Goes on with the other buffer."""
        self.finish()
        self._current = 1 - self._current
        self._buffers[self._current].settle()
        self._home = np.empty((_ROWS, ROW_WIDTH))
        self._used = 0
        self._out = self._buffers[self._current].device.data_ptr()
        return self._home

    def _record(self) -> Any:
        if not self._is_cuda:
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return event
