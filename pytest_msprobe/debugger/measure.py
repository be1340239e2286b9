# SPDX-License-Identifier: Apache-2.0
"""Measures tensors on the hot path.

Everything that depends on a tensor's form only is worked out once and kept in a plan;
a call then costs a lookup and the kernel.
"""

import array
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import KeyedRef

import numpy as np
import numpy.typing as npt
import torch

from pytest_msprobe.model.calls import Phase, Role, TensorValue
from pytest_msprobe.model.records import ROW_WIDTH
from pytest_msprobe.model.segments import PADDING, Piece, RowClass
from pytest_msprobe.model.shards import WHOLE_ON_ALL, Shard
from pytest_msprobe.statistics.select import select_backend
from pytest_msprobe.statistics.spec import Backend, Span, as_rows, rows_of, whole

if TYPE_CHECKING:
    from pytest_msprobe.statistics.queue import DeviceQueue

_CHUNK_ROWS = 1024
# Numbers a tensor in the kernel's batch.
BATCH_WIDTH = 5
_ROW_BYTES = ROW_WIDTH * 8
PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)
_TYPE_NAMES = {"FakeTensor": "torch._subclasses.fake_tensor.FakeTensor"}
# Role of memory that nobody has written: *undefined*, and its numbers are not shown.
UNWRITTEN: Role = "unwritten"
# Columns that are copies of another rank's: dumped, never judged.
COPIES = Piece(PADDING, 0, 0, 0, is_defined=False)
# A tensor passed to a module may be a KV cache if it has so many elements.
_SUSPICIOUS_ELEMENTS = 1 << 22


class Table(NamedTuple):
    """The kernel's table of spans for one form of tensor.

    Attributes:
        array: (n, 8) int64; kept alive here, the kernel gets its address.
        address: Of the array.
        spans: n.
        rows: Rows that it fills.
        prepared: On a GPU, the spans as its queue takes them.
    """

    array: npt.NDArray[np.int64]
    address: int
    spans: int
    rows: int
    prepared: Any = None


class Plan:
    """What is known of all tensors of one dtype, shape and strides.

    Attributes:
        dtype: Name with `torch.`.
        shape: Sizes.
        requires_grad: As in torch.
        first: Size of dimension 0, -1 for a 0-d tensor.
        elements: Number of elements.
        kind: The CPU kernel's number of the type, 0 on a GPU, -1 where no kernel can
            measure it.
        queue: Of the GPU where it lies, None elsewhere.
        row_stride: Elements from row to row.
        size: Bytes of an element.
        whole: Table for one row over everything.
        tokens: Table for the token-major pieces of the open step.
        samples: Table for the sample-major pieces of the open step.
        tables: Tables of steps whose pieces had the same rows.
    """

    __slots__ = (
        "dtype",
        "elements",
        "first",
        "kind",
        "queue",
        "requires_grad",
        "row_stride",
        "samples",
        "shape",
        "size",
        "tables",
        "tokens",
        "whole",
    )

    def __init__(self, tensor: torch.Tensor) -> None:
        self.dtype = str(tensor.dtype)
        self.shape = tuple(int(size) for size in tensor.shape)
        self.requires_grad = tensor.requires_grad
        self.first = self.shape[0] if self.shape else -1
        self.elements = tensor.numel()
        self.size = tensor.element_size()
        self.kind = -1
        self.queue: DeviceQueue | None = None
        self.row_stride = 0
        self.whole: Table | None = None
        self.tokens: Table | None = None
        self.samples: Table | None = None
        self.tables: dict[tuple[Any, ...], Table] = {}


class Measured(NamedTuple):
    """A tensor that was measured; turned into a `TensorValue` when it is needed.

    Attributes:
        plan: Its form.
        row_class: Which pieces the rows stand for.
        chunk: Memory that holds the rows, None where nothing was measured.
        first_row: First of them.
        rows: How many.
        role: Whether the slot may be judged.
        data_name: File name of the saved tensor.
        digest: CRC-32 or xor text.
        place: Of its columns in the unsharded tensor, None where unknown.
    """

    plan: Plan
    row_class: RowClass
    chunk: npt.NDArray[np.float64] | None
    first_row: int
    rows: int
    role: Role = "read"
    data_name: str | None = None
    digest: str | None = None
    place: Shard | None = None


def to_value(
    measured: Measured, tokens: tuple[Piece, ...], samples: tuple[Piece, ...]
) -> TensorValue:
    """The record of a measured tensor.

    Args:
        measured: The tensor.
        tokens: Pieces of token-major tensors in its step.
        samples: Pieces of sample-major tensors in its step.
    """
    plan, role = measured.plan, measured.role
    rows = None
    if role == UNWRITTEN:
        role = "undefined"
    elif measured.chunk is not None:
        first = measured.first_row
        rows = measured.chunk[first : first + measured.rows]
    pieces = {"token": tokens, "sample": samples, "neither": ()}[measured.row_class]
    if measured.place is not None and measured.place.copies and pieces:
        pieces = (*pieces, COPIES)
    return TensorValue(
        plan.dtype,
        plan.shape,
        plan.requires_grad,
        rows,
        pieces,
        measured.row_class,
        role,
        measured.data_name,
        "torch.Tensor",
        measured.digest,
        measured.place,
    )


def with_role(measured: Measured, role: Role) -> Measured:
    """A measured tensor in a role that the call's function gives it."""
    if measured.role == UNWRITTEN and role == "undefined":
        return measured._replace()
    return measured._replace(role=role)


class Unwritten:
    """A tensor that was given when nobody had written its memory.

    Attributes:
        tensor: What it is now.
    """

    __slots__ = ("tensor",)

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


class HeldMemory:
    """Bytes that tensors hold; what they share counts once."""

    __slots__ = ("_bytes",)

    def __init__(self) -> None:
        self._bytes: dict[int, int] = {}  # by the first byte of a storage

    def add(self, tensor: torch.Tensor, storage: int, size: int) -> int:
        """Adds a tensor; returns how many bytes it holds beyond those known.

        Args:
            tensor: One with a storage.
            storage: Its first byte.
            size: Bytes of the tensor's elements.
        """
        known = self._bytes.get(storage, 0)
        if known:  # no more than there is
            size = max(0, min(size, tensor.untyped_storage().nbytes() - known))
        self._bytes[storage] = known + size
        return size

    def drop(self, storage: int) -> int:
        """Forgets a storage; returns its bytes."""
        return self._bytes.pop(storage, 0)

    def clear(self) -> None:
        """Forgets all."""
        self._bytes.clear()


# A tensor, its plan, how it is divided, address of its first element, first byte of its
# storage, and whether its slot may be judged.
Addition = tuple[torch.Tensor, Plan, RowClass, int, int, Role]


# A tensor or a weak reference to it, what was measured, and its storage's first byte.
Seen = tuple[torch.Tensor | KeyedRef[int, torch.Tensor], Measured, int]


class Measurer:
    """Measures tensors into chunks of rows.

    Attributes:
        phase: Which part of a step is running.
        padded_tokens: Rows of token-major tensors, -1 where unknown.
        sample_rows: Rows of sample-major tensors, -1 where unknown.
        token_pieces: Their pieces in the open step.
        sample_pieces: The same for sample-major tensors.
        measured_rows: Rows measured so far.
        refutations: How many slots turned out not to be token-major.
        is_launching: Whether its own kernels are being started.
        backends: Backend and reason by kind of device.
        seen: Tensors measured, or soon, and not written since, by id. Measured ones may
            be kept weakly, so that they can end; then they are no longer in here.
        seen_storages: Their keys in `seen` by the first byte of their storage.
        held_bytes: Of those that are kept alive.
    """

    def __init__(self, held_bytes: int = 0, *, is_once: bool = True) -> None:
        """Makes a measurer.

        Args:
            held_bytes: Of tensors that are kept, to be measured later together.
            is_once: Whether a tensor seen again keeps its numbers.
        """
        self.phase: Phase = "outside"
        self.padded_tokens = -1
        self.sample_rows = -1
        self.token_pieces: tuple[Piece, ...] = ()
        self.sample_pieces: tuple[Piece, ...] = ()
        self.measured_rows = 0
        self.refutations = 0
        self.is_launching = False
        self.backends: dict[str, tuple[Backend, str]] = {}
        self._plans: dict[Any, Plan] = {}
        self._layout_plans: list[Plan] = []
        self._forms: dict[RowClass, tuple[Any, ...]] = {}
        self._chunk: npt.NDArray[np.float64] = np.zeros((0, ROW_WIDTH))
        self._chunk_address = 0
        self._used = 0
        self._kernel: Any = None
        self._large_kernel: Any = None
        self._scratch = 0
        self._large_elements = 0
        # What the kernel has still to do; the tensors are kept alive by who asked.
        self._batch = array.array("q")
        self._batch_elements = 0
        self.seen: dict[int, Seen] = {}
        self.seen_storages: dict[int, list[int]] = {}
        # Storages that the next launch reads.
        self._unlaunched: set[int] = set()
        self.held_bytes = 0
        self._held = HeldMemory()
        self._held_keys: list[int] = []  # in `seen`, of those that were kept
        self._most_held = held_bytes
        self._is_once = is_once
        self._queues: dict[torch.device, DeviceQueue] = {}

    def set_layout(
        self, padded_tokens: int, tokens: tuple[Piece, ...], samples: tuple[Piece, ...]
    ) -> None:
        """The rows of the open step are settled."""
        self.padded_tokens = padded_tokens
        self.sample_rows = len(samples)
        self.token_pieces, self.sample_pieces = tokens, samples
        self._forms = {"token": _rows_of(tokens), "sample": _rows_of(samples)}

    def clear_layout(self) -> None:
        """A step begins: its rows are not known yet."""
        self.phase = "outside"
        self.padded_tokens = self.sample_rows = -1
        self.token_pieces = self.sample_pieces = ()
        for plan in self._layout_plans:
            plan.tokens = plan.samples = None
        self._layout_plans.clear()

    def measure(
        self,
        tensor: torch.Tensor,
        refuted: set[Any],
        slot: Any,
        role: Role = "read",
        place: Shard | None = None,
    ) -> Measured | TensorValue:
        """Measures a tensor in a slot.

        Args:
            tensor: Any tensor.
            refuted: Slots of the call's site known not to be token-major; added to.
            slot: Identity of the slot within the site.
            role: Whether the slot may be judged.
            place: Of its columns in the unsharded tensor, None where unknown.
        """
        if place is not None:
            return self._measure_placed(tensor, refuted, slot, role, place)
        if type(tensor) not in PLAIN_TYPES:
            return self._measure_unusual(tensor, role)
        try:
            key = _form_of(tensor)
            plan = self._plans.get(key)
        except (RuntimeError, NotImplementedError, TypeError):
            return self._measure_unusual(tensor, role)
        if plan is None:
            plan = self._plans[key] = self._make_plan(tensor)
        row_class = self._classify(plan.first, refuted, slot)
        if plan.kind < 0 or tensor.is_neg():
            return self._measure_slowly(tensor, plan, row_class, role)
        try:
            address = tensor.data_ptr()
        except RuntimeError:
            return self._measure_transformed(tensor, role)
        storage = address - int(tensor.storage_offset()) * plan.size
        addition = (tensor, plan, row_class, address, storage, role)
        return self.add_all((addition,))[0]

    def add_all(self, additions: Sequence["Addition"]) -> list[Measured]:
        """Notes tensors to be measured by the next launch.

        Args:
            additions: The tensors, each of a form with a kernel.
        """
        result: list[Measured] = []
        seen, storages = self.seen, self.seen_storages
        for tensor, plan, row_class, address, storage, role in additions:
            if row_class == "neither":
                table = plan.whole
            else:
                table = plan.tokens if row_class == "token" else plan.samples
                if table is None:
                    table = self._add_layout_table(tensor.dtype, plan, row_class)
            assert table is not None
            rows = table.rows
            self.measured_rows += rows
            if plan.queue is not None:
                chunk, first = plan.queue.add(address, table.prepared)
            else:
                first = self._used
                if first + rows > len(self._chunk):
                    self._new_chunk(rows)
                    first = 0
                chunk = self._chunk
                self._used = first + rows
                self._batch.extend(
                    (table.address, table.spans, self._chunk_address, address, first)
                )
                self._batch_elements += plan.elements
            fields = (plan, row_class, chunk, first, rows, role, None, None, None)
            measured = tuple.__new__(Measured, fields)  # without its slower constructor
            result.append(measured)
            self._unlaunched.add(storage)
            key = id(tensor) if self._is_once else -1 - self.measured_rows
            known = seen.get(key)
            if known is None:  # else it was divided otherwise
                keys = storages.get(storage)
                if keys is None:
                    storages[storage] = [key]
                else:
                    keys.append(key)
            seen[key] = (tensor, measured, storage)
            self._held_keys.append(key)
            size = plan.elements * plan.size
            self.held_bytes += self._held.add(tensor, storage, size)
            if self.held_bytes > self._most_held:
                self._let_go()
        return result

    def _let_go(self) -> None:
        """Measures what is held, and holds it no longer."""
        self.launch()
        seen = self.seen
        for key in self._held_keys:
            known = seen.get(key)
            if known is None:
                continue
            tensor, measured, storage = known
            if isinstance(tensor, KeyedRef):
                continue
            if self._is_once:
                seen[key] = (KeyedRef(tensor, self._drop, key), measured, storage)
            else:
                del seen[key]
        self._forget_held()

    def _forget_held(self) -> None:
        self._held.clear()
        self._held_keys.clear()
        self.held_bytes = 0

    def _drop(self, reference: KeyedRef[int, torch.Tensor]) -> None:
        """A tensor that was kept weakly has ended."""
        known = self.seen.get(reference.key)
        if known is not None and known[0] is reference:
            del self.seen[reference.key]

    def launch(self) -> None:
        """Measures the tensors of the calls of `measure` since the last launch."""
        self._unlaunched.clear()
        if self._queues:
            self.is_launching = True
            for queue in self._queues.values():
                queue.launch()
            self.is_launching = False
        batch = self._batch
        if not batch:
            return
        is_large = self._batch_elements >= self._large_elements
        kernel = self._large_kernel if is_large else self._kernel
        kernel(batch.buffer_info()[0], len(batch) // BATCH_WIDTH, self._scratch)
        del batch[:]
        self._batch_elements = 0

    def finish_step(self) -> None:
        """A step has ended: its rows are on their way home."""
        self.forget()
        for queue in self._queues.values():
            queue.finish()

    def settle(self) -> None:
        """Waits until all rows can be read."""
        self.launch()
        for queue in self._queues.values():
            queue.settle()

    def again(self, known: Measured, refuted: set[Any], slot: Any) -> Measured | None:
        """The numbers of a tensor in `seen`, None if this slot divides it otherwise.

        Args:
            known: Of the tensor.
            refuted: As for `measure`.
            slot: As for `measure`.
        """
        if self._classify(known.plan.first, refuted, slot) == known.row_class:
            return known
        return None

    def forget(self) -> None:
        """Tensors are measured now, and again when they are seen again."""
        self.launch()
        if self.seen:
            self.seen.clear()
            self.seen_storages.clear()
        self._forget_held()

    def release(self, storage: int) -> None:
        """A storage is about to be written: its tensors are measured, and forgotten.

        Args:
            storage: Its first byte.
        """
        keys = self.seen_storages.pop(storage, None)
        if keys is None:
            return
        if storage in self._unlaunched:
            self.launch()
        for key in keys:
            known = self.seen.get(key)
            if known is None or known[2] != storage:
                continue  # it has ended, and another one may have its id
            del self.seen[key]
        self.held_bytes -= self._held.drop(storage)

    def _measure_placed(
        self,
        tensor: torch.Tensor,
        refuted: set[Any],
        slot: Any,
        role: Role,
        place: Shard,
    ) -> Measured | TensorValue:
        """Measures a tensor of a parallel layer."""
        width = tensor.numel() // tensor.shape[0] if tensor.ndim and len(tensor) else 0
        if place is WHOLE_ON_ALL or place.local_columns != width:
            measured = self.measure(tensor, refuted, slot, role)
            if place is WHOLE_ON_ALL and isinstance(measured, Measured):
                return measured._replace(place=place)
            return measured
        plan = Plan(tensor)
        row_class = self._classify(plan.first, refuted, slot)
        pieces = self._pieces(row_class) or (Piece("", 0, plan.first, 0),)
        if row_class == "neither":
            pieces = (Piece("", 0, plan.first, 0),)
        parts = [
            [
                Span(
                    piece.first_row,
                    piece.rows,
                    local,
                    length,
                    piece.position * place.columns + start,
                    place.columns,
                )
                for local, length, start in place.runs
            ]
            for piece in pieces
        ]
        if place.copies:
            parts.append(
                [
                    Span(0, plan.first, local, length, local, place.columns)
                    for local, length in place.copies
                ]
            )
        rows = np.zeros((len(parts), ROW_WIDTH))
        self.backend(tensor.device.type).measure(tensor, parts, rows)
        self.measured_rows += len(parts)
        return Measured(plan, row_class, rows, 0, len(parts), role, place=place)

    def _classify(self, first: int, refuted: set[Any], slot: Any) -> RowClass:
        """What dimension 0 of a tensor counts, as far as is known by now."""
        if first < 0 or self.padded_tokens < 0:
            return "neither"
        if self.phase == "forward":
            if first != self.padded_tokens:
                if slot not in refuted:
                    refuted.add(slot)
                    self.refutations += 1
            elif slot not in refuted:
                return "token"
        elif self.phase != "outside":
            if first == self.sample_rows:
                return "sample"
            if self.phase == "after" and first == self.padded_tokens:
                return "token"
        return "neither"

    def form(self, tensor: torch.Tensor) -> Measured:
        """A tensor of memory that nobody had written, without numbers."""
        key = _form_of(tensor)
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = self._make_plan(tensor)
        return Measured(plan, "neither", None, 0, 0, UNWRITTEN)

    def describe_only(self, tensor: torch.Tensor, role: Role) -> TensorValue:
        """A tensor's form without numbers."""
        name = type(tensor).__name__
        try:
            shape = tuple(tensor.shape)
        except RuntimeError:  # a nested tensor has none
            shape = ()
        return TensorValue(
            str(tensor.dtype),
            shape,
            tensor.requires_grad,
            None,
            role=role,
            type_name=_TYPE_NAMES.get(name, "torch.Tensor"),
        )

    def _make_plan(self, tensor: torch.Tensor) -> Plan:
        plan = Plan(tensor)
        is_plain = tensor.layout is torch.strided and not tensor.is_quantized
        if tensor.is_meta or not is_plain or not plan.elements:
            return plan
        layout = as_rows(plan.shape, tensor.stride())
        name = self.backend(tensor.device.type).name
        if layout is None or name == "reference":
            return plan
        plan.row_stride = layout[1]
        if name == "cpu":
            from pytest_msprobe.statistics import cpu

            plan.kind = cpu.KINDS.get(tensor.dtype, -1)
        else:
            plan.queue = self._queue(tensor)
            plan.kind = -1 if plan.queue is None else 0
        if plan.kind >= 0:
            plan.whole = self._table(tensor.dtype, plan, [[whole(plan.shape)]])
        return plan

    def _queue(self, tensor: torch.Tensor) -> "DeviceQueue | None":
        from pytest_msprobe.statistics import cuda
        from pytest_msprobe.statistics.queue import DeviceQueue

        if not cuda.knows(tensor.dtype):
            return None
        queue = self._queues.get(tensor.device)
        if queue is None:
            queue = self._queues[tensor.device] = DeviceQueue(tensor.device)
        return queue

    def _table(self, dtype: torch.dtype, plan: Plan, parts: list[list[Span]]) -> Table:
        if plan.queue is not None:
            from pytest_msprobe.statistics.queue import prepare

            spans = [span for part in parts for span in part]
            prepared = prepare(dtype, spans, plan.row_stride, plan.size)
            return Table(np.empty((0, 8), np.int64), 0, 0, len(parts), prepared)
        from pytest_msprobe.statistics import cpu

        array = cpu.build_table(parts, plan.row_stride, plan.size, plan.kind)
        return Table(array, array.ctypes.data, len(array), len(parts))

    def _pieces(self, row_class: RowClass) -> tuple[Piece, ...]:
        return self.token_pieces if row_class == "token" else self.sample_pieces

    def _add_layout_table(
        self, dtype: torch.dtype, plan: Plan, row_class: RowClass
    ) -> Table:
        if plan.tokens is None and plan.samples is None:
            self._layout_plans.append(plan)
        pieces = self._pieces(row_class)
        key = (row_class, *self._forms[row_class])
        table = plan.tables.get(key)
        if table is None:
            table = self._table(dtype, plan, _parts(plan.shape, pieces))
            plan.tables[key] = table
        elif plan.queue is not None:
            width = plan.elements // plan.first
            table.prepared.move([piece.position * width for piece in pieces])
        elif table.spans:
            from pytest_msprobe.statistics import cpu

            width = plan.elements // plan.first
            positions = [piece.position * width for piece in pieces if piece.rows]
            table.array[:, cpu.FIRST_INDEX] = positions
        if row_class == "token":
            plan.tokens = table
        else:
            plan.samples = table
        return table

    def _new_chunk(self, rows: int) -> None:
        self._chunk = np.zeros((max(_CHUNK_ROWS, rows), ROW_WIDTH))
        self._chunk_address = self._chunk.ctypes.data
        self._used = 0

    def _measure_slowly(
        self, tensor: torch.Tensor, plan: Plan, row_class: RowClass, role: Role
    ) -> Measured | TensorValue:
        """Tensors of other devices, types and layouts, through the backend protocol."""
        if not plan.elements or tensor.is_meta or tensor.is_quantized:
            return self.describe_only(tensor, role)
        parts = [[whole(plan.shape)]]
        if row_class != "neither":
            parts = _parts(plan.shape, self._pieces(row_class))
        rows = np.zeros((len(parts), ROW_WIDTH))
        try:
            self.backend(tensor.device.type).measure(tensor, parts, rows)
        except (NotImplementedError, TypeError, RuntimeError):
            # This kind of tensor has no numbers; its row says so by null statistics.
            return self.describe_only(tensor, role)
        self.measured_rows += len(parts)
        return Measured(plan, row_class, rows, 0, len(parts), role)

    def _measure_unusual(
        self, tensor: torch.Tensor, role: Role
    ) -> Measured | TensorValue:
        """Subclasses, sparse and nested tensors."""
        is_plain = tensor.layout is torch.strided and not tensor.is_quantized
        if not is_plain or type(tensor).__name__ in _TYPE_NAMES:
            return self.describe_only(tensor, role)
        try:
            plain = tensor.as_subclass(torch.Tensor)
            return self._measure_slowly(plain, Plan(plain), "neither", role)
        except (RuntimeError, NotImplementedError, TypeError):
            return self.describe_only(tensor, role)

    def _measure_transformed(
        self, tensor: torch.Tensor, role: Role
    ) -> Measured | TensorValue:
        """A tensor inside vmap or grad: what it stands for, under its own name."""
        functorch = torch._C._functorch  # noqa: SLF001 - torch has no other access
        plain = tensor
        while functorch.is_functorch_wrapped_tensor(plain):
            plain = functorch.get_unwrapped(plain)
        if plain is tensor:
            return self.describe_only(tensor, role)
        is_batched = functorch.is_batchedtensor(tensor)
        name = "BatchedTensor" if is_batched else "GradTrackingTensor"
        value = self.measure(plain, {0}, 0, role)
        if isinstance(value, Measured):
            value = to_value(value, self.token_pieces, self.sample_pieces)
        return replace(value, type_name=name, requires_grad=tensor.requires_grad)

    def backend(self, device_type: str) -> Backend:
        """The backend for a kind of device."""
        known = self.backends.get(device_type)
        if known is None:
            known = self.backends[device_type] = select_backend(device_type)
            if known[0].name == "cpu":
                from pytest_msprobe.statistics import cpu

                assert isinstance(known[0], cpu.CpuBackend)
                self._kernel = cpu.measure_batch
                self._large_kernel = cpu.measure_large_batch
                self._large_elements = cpu.LARGE_ELEMENTS
                self._scratch = known[0].scratch_address
        return known[0]


def _form_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    return (
        tensor.dtype,
        tensor.shape,
        tensor.stride(),
        tensor.requires_grad,
        tensor.device,
    )


def storage_address(tensor: torch.Tensor) -> int:
    """Address of the first byte of a tensor's storage, 0 where it has none."""
    if type(tensor) not in PLAIN_TYPES and type(tensor).__name__ == "FakeTensor":
        return 0  # which warns when it is asked
    try:
        offset = int(tensor.storage_offset()) * tensor.element_size()
        return tensor.data_ptr() - offset
    except (RuntimeError, NotImplementedError):
        return 0


def is_suspicious(tensor: torch.Tensor) -> bool:
    """Whether a tensor is so large that it may be a KV cache."""
    return tensor.numel() >= _SUSPICIOUS_ELEMENTS


def _rows_of(pieces: tuple[Piece, ...]) -> tuple[tuple[int, int], ...]:
    return tuple((piece.first_row, piece.rows) for piece in pieces)


def _parts(shape: tuple[int, ...], pieces: tuple[Piece, ...]) -> list[list[Span]]:
    return [[rows_of(shape, p.first_row, p.rows, p.position)] for p in pieces]
