# SPDX-License-Identifier: Apache-2.0
"""Keeps what the calls of the running step computed.

Module wrappers and the function mode report calls here. A call is only noted, with its
arguments as they are; what the noted calls hold is read together, before anything is
written to a tensor, so that the model's own code stays in the processor's caches and a
tensor seen again is not measured again. Nothing in this module raises into the model:
the first error is kept, recording stops, and whoever ends the capture raises it.
Records are kept raw and turned into plain ones when they are written.
"""

import sys
import threading
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pytest_msprobe.config.debugger_config import Cut, DebuggerConfig
from pytest_msprobe.debugger.calls import describe_value, holds_others
from pytest_msprobe.debugger.measure import (
    PLAIN_TYPES,
    UNWRITTEN,
    Addition,
    Measured,
    Measurer,
    Unwritten,
    is_suspicious,
    storage_address,
    with_role,
)
from pytest_msprobe.debugger.raw import CallSite, Numbering, RawCall, RawStep
from pytest_msprobe.debugger.recipes import Recipe, Slot, make_recipe
from pytest_msprobe.debugger.selection import Selection
from pytest_msprobe.debugger.slices import cut_tensor
from pytest_msprobe.debugger.stacks import capture_stack
from pytest_msprobe.debugger.trace import Chunk, Event, Point, Trace
from pytest_msprobe.dump.tensors import file_name, save_array, save_tensor
from pytest_msprobe.errors import CaptureError
from pytest_msprobe.model.calls import (
    Phase,
    Role,
    TensorValue,
    Tree,
)
from pytest_msprobe.model.records import CHECKSUM
from pytest_msprobe.model.segments import (
    StepLayout,
    split_samples,
    split_tokens,
)

if TYPE_CHECKING:
    from pytest_msprobe.debugger.backward import Backward
    from pytest_msprobe.debugger.bench import Bench
    from pytest_msprobe.debugger.functions import FunctionMode
    from pytest_msprobe.debugger.load import Loader
    from pytest_msprobe.debugger.progress import Progress
    from pytest_msprobe.model.shards import Places

LayoutSource = Callable[[int | None], StepLayout | None]

_LASTING = frozenset(
    {
        *PLAIN_TYPES,
        *(type(None), bool, int, float, str, slice, type(...)),
        *(torch.Size, torch.dtype, torch.device, torch.layout),
    }
)
# Smaller tensors are measured as quickly as they are looked up.
_LEAST_WEIGHTS = 4096
# So many calls are noted before they are read, memory permitting.
_MOST_NOTED = 256
# What may be held once it was read, of all that may be held; the rest may be noted.
_HELD_SHARE = 3
# Weights and KV caches are looked for among tensors of at least so many bytes.
_LEAST_LASTING = 1 << 16
# What may be held in copies of tensors that are written, of all that may be held.
_COPIED_SHARE = 4
# Of a call for each token and column of the model, roughly: a few tensors of 16 bits.
_BYTES_AN_ELEMENT = 8


class Collector:
    """Records of the calls of one step at a time.

    Attributes:
        config: What to record.
        selection: Which calls.
        measurer: Measures tensors.
        error: First error met while recording, or None.
        is_recording: Whether calls are recorded now.
        thread: The thread whose calls are recorded, which runs the model.
        layout: Rows of the open step, None before the forward or where unknown.
        model_dimensions: Sizes that parameters of the model have.
        width: Columns of the widest activations, roughly.
        places: Of the slots of modules, by path.
        progress: Where the running call is noted, None to note nothing.
        saved_bytes: Bytes of tensors saved to files.
        keeps_weights: Weights that are no parameters are measured once as well.
        unseen: How many calls run inside which writes are not seen.
        forward_range: First and last forward that are recorded, None for all.
        generation: How many steps have begun.
        mode: Sees the functions of the thread in which it is entered; None for none.
        has_regions: Calls may be made by others than modules.
        has_steady_stacks: Whether calls of one name come from the same place each step.
        region: Stands for the parent of calls that no module makes, empty for none.
        backward: Records gradients, None where there are none to record.
        bench: An earlier dump that calls are held against, None for none.
        loader: Replaces inputs of modules, None where none are.
        numbering: Of the open step's calls where they are recorded one by one.
        trace: Calls of the open step where they are only noted.
        is_traced: Whether they are.
    """

    keeps_weights = False
    has_regions = False
    has_steady_stacks = True
    width = 1
    region = ""
    _is_trying = False
    _trace_limit = _MOST_NOTED  # of traced calls, that are noted before they are read
    _counts_bytes = True  # and of their tensors, unless it is known that they are few

    def __init__(self, config: DebuggerConfig) -> None:
        self.config = config
        self.selection = Selection(config)
        held = config.pending_bytes // _HELD_SHARE
        self.measurer = Measurer(held, is_once=config.measure_once)
        self.error: BaseException | None = None
        self.is_recording = False
        self.thread = threading.get_ident()
        self.layout: StepLayout | None = None
        self.model_dimensions: frozenset[int] = frozenset()
        self.places: dict[str, Places] = {}
        self.progress: Progress | None = None
        self.saved_bytes = 0
        self.unseen = 0
        self.forward_range: tuple[int, int] | None = None
        self._forwards = 0
        self.mode: FunctionMode | None = None
        self.backward: Backward | None = None
        self.bench: Bench | None = None
        self.loader: Loader | None = None
        self.numbering = Numbering()
        self.trace = Trace()
        self.is_traced = False
        self._module_sites: dict[str, CallSite] = {}
        self._function_sites: dict[str, CallSite] = {}
        self._measures = config.task != "structure"
        self._cuts = config.slice
        cuts = bool(config.slice or config.request_id)
        self._is_plain = not config.saves_tensors and (
            config.summary_mode == "statistics" and self._measures and not cuts
        )
        if cuts:
            self._measure_at = self._measure_cut  # type: ignore[method-assign]
        self._reads_inputs = config.keeps("input") or config.has_modules
        # Types of values that stay what they are after a call has been noted.
        self._lasting: set[Any] = set(_LASTING)
        self._log: list[RawCall] = []
        self._log_limit = self._most_noted = self._limit_of(1)
        self._most_counted = config.pending_bytes - held
        self._step: RawStep | None = None
        self.generation = 0
        self._keeps_stacks = config.extra_info
        # Arguments of a module that has just ended without a result.
        self._silent: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self._layout_source: LayoutSource | None = None
        self._undefined: dict[int, torch.Tensor] = {}
        self._opaque: frozenset[int] = frozenset()
        self._constants: dict[int, torch.Tensor] = {}
        self._constant_ids: dict[int, tuple[int, Tree]] = {}
        self._constant_version = 0
        self._measured_constants: dict[Any, Measured | TensorValue] = {}
        self._frame_limit: FrameType | None = None
        self._tensor_folder: Path | None = None
        self._current: RawCall | None = None
        self._current_measure = self._measure_in_slot

    # Steps ---------------------------------------------------------------------

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
            self._step = RawStep(number)
            if self.config.extra_info:
                self._step.common_stack = capture_stack(frame, None)
            self.generation += 1
            self.numbering = Numbering()
            self.trace.begin_step()
            self.selection.reset()
        self.is_traced = (
            self._is_plain
            and self._reads_inputs
            and self.selection.is_trivial
            and not self.has_regions
            and (self.has_steady_stacks or not self._keeps_stacks)
            and self.backward is None
            and self.bench is None
            and self.loader is None
        )
        if self.progress is not None:
            self.progress.begin_step(number)
        self.layout = None
        self.measurer.clear_layout()
        self._layout_source = layout_source
        self._frame_limit = frame
        self._tensor_folder = tensor_folder

    def end_step(self) -> RawStep | None:
        """Closes the step and returns its records, None if none was open."""
        self.read_log()
        self.measurer.finish_step()
        step = self._step
        for call in reversed(
            self.numbering.stack
        ):  # what began in this step ends in no other
            if step is not None and call.is_taken and call.is_read:
                step.calls.append(call)
            call.is_taken = False
            call.args, call.kwargs = (), {}
        self._step = None
        self.is_recording = False
        self._undefined.clear()
        self.trace.clear()
        self._frame_limit = None
        self._layout_source = None
        if step is not None:
            step.layout = self.layout
            step.token_pieces = self.measurer.token_pieces
            step.sample_pieces = self.measurer.sample_pieces
        return step

    def resume(self) -> None:
        """Starts recording in the open step what this thread calls."""
        self.thread = threading.get_ident()
        self.is_recording = (
            self._step is not None
            and self.error is None
            and (self.bench is None or not self.bench.is_finished)
        )

    def enter_thread(self) -> int | None:
        """The model runs in this thread; returns the one whose calls were recorded.

        None where it is the same. Only one thread at a time may run the model.
        """
        before, own = self.thread, threading.get_ident()
        if before == own:
            return None
        self.thread = own
        if self.mode is not None:
            self.mode.enter()
        return before

    def leave_thread(self, before: int | None) -> None:
        """It runs here no more.

        Args:
            before: What `enter_thread` returned.
        """
        if before is not None:
            self.thread = before
            if self.mode is not None:
                self.mode.leave()

    def pause(self) -> None:
        """Stops recording, the step stays open."""
        self.before_any_write()
        self.is_recording = False

    def fail(self, error: BaseException) -> None:
        """Keeps the first error and stops recording."""
        if self.error is None:
            self.error = error
        self.is_recording = False
        self._log.clear()
        self.trace.clear()

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

    def set_request(self, cut: Cut | None) -> None:
        """Keeps only the rows of one request besides what `slice` keeps."""
        self._cuts = (*self.config.slice, cut) if cut else self.config.slice

    def count_forward(self) -> None:
        """A forward of the model starts; only those of `forward_range` are recorded."""
        assert self.forward_range is not None
        first, last = self.forward_range
        number, self._forwards = self._forwards, self._forwards + 1
        if first <= number <= last:
            self.resume()
        else:
            self.pause()

    def set_forward_range(self, bounds: tuple[int, int] | None) -> None:
        """Records only these forwards from now on, None for everything."""
        self.forward_range = bounds
        self._forwards = 0
        if bounds is not None:
            self.pause()

    def set_opaque(self, addresses: frozenset[int]) -> None:
        """Names the storages (by first byte) that are never measured: KV caches."""
        self._opaque = addresses

    def add_constants(self, tensors: Iterable[torch.Tensor]) -> None:
        """Names parameters and buffers: measured once a capture, until written."""
        for tensor in tensors:
            address = storage_address(tensor)
            if address:
                self._constants[address] = tensor
                self._constant_ids[id(tensor)] = (-1, None)

    def add_modules(self, modules: Iterable[torch.nn.Module]) -> None:
        """Names the modules of a model, which are given to each other."""
        self._lasting.update(map(type, modules))

    def enter_forward(self, padded_tokens: int | None = None) -> None:
        """The model's forward starts: rows are settled from here on.

        Args:
            padded_tokens: Rows of the model's inputs, None where unknown.
        """
        self.set_phase("forward")
        if self.layout is None and self._layout_source is not None:
            self.layout = self._layout_source(padded_tokens)
            if self.layout is not None:
                self.measurer.set_layout(
                    self.layout.padded_tokens,
                    split_tokens(self.layout),
                    split_samples(self.layout),
                )
                self._most_noted = self._limit_of(self.layout.padded_tokens)
                self._log_limit = self._most_noted
                self._counts_bytes = self._most_noted < _MOST_NOTED

    # Calls ---------------------------------------------------------------------

    def module_site(self, prefix: str) -> CallSite:
        """The site of a module's calls; what has the same name shares its numbers."""
        site = self._module_sites.get(prefix)
        if site is None:
            site = CallSite(prefix, "", is_module=True)
            self._module_sites[prefix] = site
        return site

    def function_site(self, prefix: str) -> CallSite:
        """The site of a function's calls; what has the same name shares its numbers."""
        site = self._function_sites.get(prefix)
        if site is None:
            site = CallSite(prefix, ".forward", is_module=False)
            self._function_sites[prefix] = site
        return site

    def begin_call(self, site: CallSite, key_prefix: str = "") -> RawCall:
        """A record for a call that starts, numbered within the step.

        Args:
            site: What is called.
            key_prefix: Of a shared module: its name below the parent that calls it.
        """
        call = self.numbering.begin(site, key_prefix)
        if call.parent is None and self.region:
            call.region = self.region
        if self.progress is not None:
            self.progress.note(call.name)
        return call

    def make_call(self, site: CallSite, number: int) -> RawCall:
        """A record that is not numbered by the collector and encloses nothing."""
        call = RawCall(site, number, 0)
        call.phase = self.measurer.phase
        return call

    def add_call(self, call: RawCall) -> None:
        """Adds a record that was read when it was made, behind what was noted."""
        self.read_log()
        if self._step is not None:
            self._step.calls.append(call)

    def read_values(self, call: RawCall, side: str, values: Any) -> Any:
        """Measures values that are neither arguments nor results: gradients.

        They are read at once: autograd adds to them where no write is seen.

        Args:
            call: Where they belong.
            side: Name of their slot.
            values: A list of tensors and None, or one tensor.
        """
        self.read_log()
        self.measurer.forget()
        self._current = call
        if isinstance(values, torch.Tensor):
            tree = [self._read_one(values, side, call, side)]
        else:
            tree = self._read(values, side, call, 128 if side == "output" else 0)
        self.measurer.launch()
        self.measurer.forget()
        return tree

    def log_inputs(
        self, call: RawCall, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Notes that a call starts, to be read before anything is written."""
        call.is_taken = True
        call.args = args
        call.kwargs = kwargs
        log = self._log
        log.append(call)
        if (
            len(log) >= self._log_limit
            or not self._lasting.issuperset(map(type, args))
            or (kwargs and not self._lasting.issuperset(map(type, kwargs.values())))
        ):
            self.read_log()

    def log_outputs(
        self, call: RawCall, result: Any, written: Sequence[torch.Tensor] = ()
    ) -> None:
        """Notes that a call has ended.

        Args:
            call: The call.
            result: What it returned.
            written: Tensors that it wrote in place.
        """
        call.result = result
        if written:
            call.written = written
        log = self._log
        log.append(call)
        if len(log) >= self._log_limit or not (
            type(result) in self._lasting
            or (type(result) is tuple and self._lasting.issuperset(map(type, result)))
        ):
            self.read_log()

    def log_failure(self, call: RawCall) -> None:
        """Notes that a call has ended with an exception, or while recording was off.

        Its record has no results.
        """
        is_finished = self.bench is not None and self.bench.is_finished
        if not call.is_taken or self.error is not None or is_finished:
            return
        self.read_log()
        if not call.is_read:
            return
        call.args, call.kwargs = (), {}
        if self._step is not None:
            self._step.calls.append(call)

    def note_start(
        self,
        point: Point,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        frame: FrameType | None = None,
    ) -> None:
        """Notes that a traced call starts, to be read before anything is written.

        Args:
            point: What is called.
            args: Positional arguments.
            kwargs: Keyword arguments.
            frame: Where stacks start, the caller's if None.
        """
        trace = self.trace
        try:
            if self._keeps_stacks and trace.next_start() is not point:
                frame = frame or sys._getframe(1)  # noqa: SLF001 - the wrapper
                trace.add_stack(capture_stack(frame, self._frame_limit))
            if self.progress is not None:
                self.progress.note(point.site.prefix)
            trace.keys.append(point)
            values, sizes = trace.values, trace.sizes
            values.extend(args)
            is_lasting = self._lasting.issuperset(map(type, args))
            if kwargs:
                trace.keys.append(tuple(kwargs))
                values.extend(kwargs.values())
                is_lasting &= self._lasting.issuperset(map(type, kwargs.values()))
            sizes.append(len(values))
            if not (is_lasting or self._may_last((*args, *kwargs.values()))) or (
                len(sizes) >= self._trace_limit
                or (self._counts_bytes and self._is_full(len(sizes) - 1))
            ):
                self.read_log()
        except Exception as error:  # noqa: BLE001 - never into the model
            self.fail(error)

    def note_end(
        self, point: Point, result: Any, written: Sequence[torch.Tensor] = ()
    ) -> None:
        """Notes that a traced call has ended.

        Args:
            point: What was called.
            result: What it returned.
            written: Tensors that it wrote in place.
        """
        if not self.is_recording:
            self.note_failure(point)
            return
        trace = self.trace
        try:
            trace.keys.append(point.marks[0])
            values, sizes = trace.values, trace.sizes
            if type(result) is tuple:
                values.extend(result)
                is_lasting = self._lasting.issuperset(map(type, result))
            else:
                values.append(result)
                is_lasting = type(result) in self._lasting
            if written:
                given = values[sizes[-1] if sizes else 0 :]
                values.extend(t for t in written if all(t is not v for v in given))
            sizes.append(len(values))
            if (
                not is_lasting
                or len(sizes) >= self._trace_limit
                or (self._counts_bytes and self._is_full(len(sizes) - 1))
            ):
                self.read_log()
        except Exception as error:  # noqa: BLE001 - never into the model
            self.fail(error)

    def _is_full(self, event: int) -> bool:
        """Whether the noted tensors have to be read, so many bytes do they hold.

        It depends on nothing but what was noted, so that sequences end where they have
        ended before.

        Args:
            event: The start or end whose values are new.
        """
        trace = self.trace
        first = trace.sizes[event - 1] if event else 0
        counted = trace.counted
        new: list[torch.Tensor] = []
        for value in trace.values[first:]:
            key = id(value)
            if key not in counted and type(value) in PLAIN_TYPES:
                counted.add(key)
                new.append(value)
        if new:
            with torch._C.DisableTorchFunction():  # noqa: SLF001 - not recorded
                trace.counted_bytes += sum(map(self._bytes_of, new))
        return trace.counted_bytes > self._most_counted

    def _bytes_of(self, tensor: torch.Tensor) -> int:
        """Bytes that a tensor holds and those noted before it do not.

        What lasts longer than it is held counts nothing.
        """
        size = tensor.numel() * tensor.element_size()
        address = storage_address(tensor)
        if size >= _LEAST_LASTING and (
            address in self._constants or address in self._opaque
        ):
            return 0
        return self.trace.held.add(tensor, address, size) if address else size

    def _may_last(self, values: Iterable[Any]) -> bool:
        """Whether values can be read later; types not met before are looked at.

        A weight may have a class of its own; what writes it is met as for others.
        """
        constants = self._constant_ids
        kinds = {type(value) for value in values if id(value) not in constants}
        kinds -= self._lasting
        lasting = {kind for kind in kinds if not holds_others(kind)}
        self._lasting |= lasting
        return lasting == kinds

    def note_silent_end(
        self, point: Point, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Notes that a traced module has ended and returned nothing."""
        given = (*args, *kwargs.values())
        if not any(isinstance(value, torch.Tensor) for value in given):
            self.note_end(point, None)
            return
        self.read_log()
        if not self.is_recording:
            self.note_failure(point)
            return
        self._silent = (args, kwargs)
        self.trace.keys.append(point.marks[1])
        self.trace.values.append(None)
        self.trace.sizes.append(1)
        self.read_log()
        self._silent = ((), {})

    def note_failure(self, point: Point) -> None:
        """Notes that a traced call has ended with an exception, or unseen."""
        if self._step is not None and self.error is None:
            self.trace.keys.append(point.marks[2])
            self.trace.sizes.append(len(self.trace.values))

    def read_log(self) -> None:
        """Reads what the calls noted so far hold; never raises."""
        log = self._log
        if not (log or self.trace.sizes):
            return
        if not self.is_recording:
            log.clear()
            return
        self._log = []
        was_recording, self.is_recording = self.is_recording, False
        try:
            if self.config.has_functions:
                with torch._C.DisableTorchFunction():  # noqa: SLF001 - not recorded
                    self._read_calls(log)
            else:
                self._read_calls(log)
            if self.unseen:  # the next write comes unannounced
                self.measurer.forget()
        except Exception as error:  # noqa: BLE001 - never into the model
            self.fail(error)
        else:
            is_finished = self.bench is not None and self.bench.is_finished
            self.is_recording = was_recording and not is_finished

    def _read_calls(self, log: list[RawCall]) -> None:
        if self.trace.sizes:
            self._read_trace()
        for call in log:
            if not call.is_read:
                call.is_read = True
                call.phase = self.measurer.phase
                if self._reads_inputs:
                    self._read_inputs(call)
            else:
                self._read_outputs(call)
                if self.bench is not None:
                    self.saved_bytes += self.bench.finish(call, self._tensor_folder)
                if self._step is not None:
                    self._step.calls.append(call)

    def _read_trace(self) -> None:
        """Reads what traced calls hold, as such calls were read last if that fits."""
        node, values = self.trace.take()
        measurer = self.measurer
        state = (measurer.phase, measurer.padded_tokens, measurer.sample_rows)
        chunk = Chunk(node, measurer.phase)
        recipe = node.recipes.get(state)
        if recipe is not None:
            chunk.nodes = self._read_alike(recipe, values)
            chunk.parameters = recipe.parameters
        if chunk.nodes is None:
            recipe = self._read_anew(chunk, values)
            if recipe is not None:
                node.recipes[state] = recipe
            else:
                node.recipes.pop(state, None)
        if self._step is not None:
            self._step.calls.append(chunk)

    def _read_alike(self, recipe: Recipe, values: Sequence[Any]) -> list[Tree] | None:
        """Reads values as they were read last, None where they have another form."""
        measurer = self.measurer
        fit = recipe.fits(values, measurer.refutations, self._constant_version)
        if fit is None:
            return None
        tensors, nodes = fit
        opaque, undefined = self._opaque, self._undefined
        constants = self._constants if self.config.has_functions else ()
        new: list[Addition] = []
        places: list[int] = []
        knowns = map(measurer.seen.get, map(id, tensors))
        for place, tensor, known, (plan, row_class, is_result) in zip(
            recipe.places, tensors, knowns, recipe.forms, strict=False
        ):
            if known is not None:
                measured = known[1]
                if measured[1] == row_class and measured[5] == "read":
                    nodes[place] = measured
                    continue
            address = tensor.data_ptr()
            storage = address - int(tensor.storage_offset()) * plan.size
            if is_result:
                undefined.pop(storage, None)
            own: Role = UNWRITTEN if storage in undefined else "read"
            if storage in opaque:
                return None
            if storage in constants:
                nodes[place] = self._measure_constant(tensor)
            else:
                new.append((tensor, plan, row_class, address, storage, own))
                places.append(place)
        for place, measured in zip(places, measurer.add_all(new), strict=True):
            nodes[place] = measured
        for place, role in recipe.roles:
            if isinstance(nodes[place], Measured):
                nodes[place] = with_role(nodes[place], role)
        for place, first in recipe.copied:
            nodes[place] = nodes[first]
        return nodes

    def _read_anew(self, chunk: Chunk, values: list[Any]) -> Recipe | None:
        """Reads values one by one; returns how they were read, if that can be told."""
        slots: list[Slot] = []
        parameters: list[tuple[torch.nn.Module | None, dict[str, Tree] | None]] = []
        can_repeat = True
        for place in chunk.node.unwritten:
            values[place] = Unwritten(values[place])
        for event in chunk.node.events:
            given = values[event.first : event.last]
            call = RawCall(event.call.site, event.call.number, event.call.depth)
            call.phase = chunk.phase
            owner = None
            if event.way == "start":
                chunk.trees.append(self._read_start(event, call, given, slots))
            elif event.way == "failure":
                chunk.trees.append(None)
            else:
                owner = call.module = event.point.module
                if event.way == "none":
                    self._prepare_silent(call, event)
                    can_repeat = False
                self._read_end(call, given, slots)
                chunk.trees.append(call.output)
            parameters.append((owner, call.parameters))
            can_repeat = can_repeat and not event.point.site.places
        chunk.parameters = [nodes for _, nodes in parameters]
        if not can_repeat or len(slots) != len(values):
            return None
        return make_recipe(
            slots,
            parameters,
            state=self.measurer.refutations,
            version=self._constant_version,
            constants=self._constant_ids,
            lasting=self._lasting,
        )

    def _read_start(
        self, event: Event, call: RawCall, given: list[Any], slots: list[Slot]
    ) -> tuple[list[Tree], dict[str, Tree]]:
        """Inputs of a traced call; slots are added."""
        count = len(given) - len(event.names)
        call.args = tuple(given[:count])
        call.kwargs = dict(zip(event.names, given[count:], strict=True))
        self._read_inputs(call)
        read = [*call.input_args, *call.input_kwargs.values()]
        event.point.adjust(call)
        shown = [*call.input_args, *call.input_kwargs.values()]
        names = [f"input_args.{index}" for index in range(count)]
        names += [f"input_kwargs.{name}" for name in event.names]
        for name, value, node, final in zip(names, given, read, shown, strict=True):
            role = None
            if final is not node and isinstance(final, Measured | TensorValue):
                role = "undefined" if final.role == UNWRITTEN else final.role
            slots.append(Slot(name, value, node, final, role))
        return call.input_args, call.input_kwargs

    def _read_end(self, call: RawCall, given: list[Any], slots: list[Slot]) -> None:
        """Outputs of a traced call; slots are added."""
        call.result = given[0] if len(given) == 1 else tuple(given)
        is_result = call.module is not None
        self._read_outputs(call)
        if isinstance(call.output, list) and len(call.output) == len(given):
            for index, (value, node) in enumerate(zip(given, call.output, strict=True)):
                name = f"output.{index}"
                slots.append(Slot(name, value, node, node, None, is_result))

    def _prepare_silent(self, call: RawCall, event: Event) -> None:
        """Gives the end of a call the inputs that were read at its start."""
        call.args, call.kwargs = self._silent
        call.is_taken = True
        assert self._step is not None
        for item in reversed(self._step.calls):
            if isinstance(item, Chunk):
                for tree, other in zip(item.freeze(), item.node.events, strict=True):
                    if other.call is event.call and other.way == "start":
                        call.input_args, call.input_kwargs = tree
                        return

    def begin_unseen(self, *, writes_others: bool = True) -> None:
        """A call starts inside which no write is seen: all in it is read at once.

        Args:
            writes_others: Whether it may write tensors that were made before it, of
                which `before_write` has not been told.
        """
        if writes_others:
            self.before_any_write()
        self.unseen += 1
        self._log_limit = self._trace_limit = 1

    def end_unseen(self, *, writes_others: bool = True) -> None:
        """It has ended."""
        self.unseen -= 1
        if writes_others:
            self.measurer.forget()
        if not self.unseen:
            self._log_limit, self._trace_limit = self._most_noted, _MOST_NOTED

    def _limit_of(self, tokens: int) -> int:
        """How many calls are noted before they are read, to bound what they hold."""
        if not self._is_plain:
            return 1
        row_bytes = self.width * _BYTES_AN_ELEMENT
        calls = self.config.pending_bytes // (tokens * row_bytes)
        return int(max(1, min(_MOST_NOTED, calls)))

    def before_write(self, tensor: torch.Tensor) -> None:
        """Something is about to write a tensor: what was noted is kept or read."""
        address = storage_address(tensor)
        if address in self._opaque:
            return
        if self._log or not address or address in self._constants:
            self.read_log()
        elif self.trace.holds(address):
            if address in self._undefined:
                is_settled = self.trace.define(address)
            else:
                is_settled = self.trace.keep(
                    address, self.config.pending_bytes // _COPIED_SHARE
                )
            if not is_settled:
                self.read_log()
        self._undefined.pop(address, None)
        self.measurer.release(address)
        if address in self._constants:
            del self._constants[address]
            self._measured_constants.clear()
            self._constant_ids.clear()
            self._constant_version += 1

    def before_any_write(self) -> None:
        """Something is about to write, and nobody knows what."""
        self.read_log()
        self.measurer.forget()

    def set_phase(self, phase: Phase) -> None:
        """Another part of the step begins."""
        self.before_any_write()
        self.measurer.phase = phase

    def _read_inputs(self, call: RawCall) -> None:
        """Measures the arguments of a call."""
        self._current = call
        call.input_args = self._read(call.args, "input_args", call, 0)
        for name, value in call.kwargs.items():
            slot = f"input_kwargs.{name}"
            call.input_kwargs[name] = self._read_one(value, slot, call, name)
        if call.adjust is not None:
            call.adjust(call)

    def _read_outputs(self, call: RawCall) -> None:
        """Measures the results of a call and the tensors that it wrote in place."""
        result = call.result
        if call.site.is_module and self._undefined:
            self._define(result)
        self._current = call
        if isinstance(result, tuple) and hasattr(result, "_asdict"):
            call.output = self._describe(result, "output")
        else:
            values = tuple(result) if isinstance(result, tuple) else (result,)
            if call.written:
                extra = [t for t in call.written if all(t is not v for v in values)]
                values = (*values, *extra)
            call.output = self._read(values, "output", call, 128)
        if call.module is not None:
            if result is None:
                self.read_changed(call, call.args, call.kwargs)
            call.parameters = self._read_parameters(call, call.module)
        call.args, call.kwargs, call.result, call.written = (), {}, None, ()

    def read_changed(
        self, call: RawCall, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> None:
        """Takes the arguments that a module without a result has written as outputs.

        What they held before is not judged: it may be memory that nobody had written.
        """
        if not self._measures or not call.is_taken:
            return
        self._current = call
        places: list[tuple[Any, Any, Any]] = [
            (call.input_args, index, value) for index, value in enumerate(args)
        ]
        places += [(call.input_kwargs, name, kwargs[name]) for name in kwargs]
        changed: list[Tree] = []
        for inputs, place, value in places:
            before = inputs[place] if call.input_args or call.input_kwargs else None
            if not isinstance(value, torch.Tensor) or not isinstance(before, Measured):
                continue
            slot = f"output.{len(changed)}"
            self._is_trying = True  # nothing is saved of what was not written
            after = self._read_one(value, slot, call, 128 + len(changed))
            self._is_trying = False
            self.measurer.settle()
            if isinstance(after, Measured) and checksums(after) != checksums(before):
                inputs[place] = before._replace(role="undefined")
                if not self._is_plain:
                    after = self._read_one(value, slot, call, 128 + len(changed))
                changed.append(after)
        if changed:
            call.output = changed

    def _define(self, result: Any) -> None:
        """What a module returns has been written, by whatever means."""
        if isinstance(result, torch.Tensor):
            self._undefined.pop(storage_address(result), None)
        elif isinstance(result, list | tuple):
            for item in result:
                self._define(item)
        elif isinstance(result, dict):
            for item in result.values():
                self._define(item)

    def take_stack(self, call: RawCall, frame: FrameType | None) -> None:
        """Keeps the call's stack.

        Where `has_steady_stacks` it is that of the first call of its name.
        """
        if self.config.extra_info:
            stacks = call.site.stacks
            stack = stacks.get(call.number)
            if stack is None or not self.has_steady_stacks:
                stack = stacks[call.number] = capture_stack(frame, self._frame_limit)
            call.stack = stack

    def _read_parameters(
        self, call: RawCall, module: torch.nn.Module
    ) -> dict[str, Tree]:
        """Describes the direct parameters of a module, again only when one changed."""
        parameters = module._parameters  # noqa: SLF001 - fast
        if not parameters:
            return {}
        owned = list(parameters.values())
        writes = [0 if item is None else _version_of(item) for item in owned]
        known = call.site.parameters
        if known is not None:
            version, before, written, nodes = known
            is_same = version == self._constant_version and written == writes
            if is_same and list(map(id, before)) == list(map(id, owned)):
                return nodes
        nodes = {
            name: self._read_one(parameter, f"parameters.{name}", call, name)
            for name, parameter in parameters.items()
            if parameter is not None
        }
        if self._is_plain:
            call.site.parameters = (self._constant_version, owned, writes, nodes)
        return nodes

    # Tensors -------------------------------------------------------------------

    def mark_undefined(self, tensor: torch.Tensor) -> None:
        """Notes that nobody has written a tensor's memory yet."""
        self._undefined[storage_address(tensor)] = tensor

    def _read(
        self, values: Sequence[Any], side: str, call: RawCall, base: int
    ) -> list[Tree]:
        """Trees of positional values; plain tensors take the short way."""
        nodes: list[Tree] = []
        site = call.site
        base += call.number << 8
        refuted = site.refuted
        is_plain = self._is_plain and not site.places
        is_short = is_plain and not self.config.has_functions
        measurer = self.measurer
        for index, value in enumerate(values):
            place = base + index
            if value is None:
                nodes.append(None)
            elif is_plain and type(value) in PLAIN_TYPES:
                known = measurer.seen.get(id(value))
                if known is not None and known[1].role == "read":
                    node: Tree = measurer.again(known[1], refuted, place)
                elif is_short and not (self._opaque and is_suspicious(value)):
                    node = measurer.measure(value, refuted, place)
                else:
                    node = self._measure_at(value, f"{side}.{index}", call, place)
                nodes.append(node or self._measure_at(value, "", call, place))
            else:
                nodes.append(self._read_one(value, f"{side}.{index}", call, place))
        return nodes

    def _read_one(self, value: Any, slot: str, call: RawCall, place: Any) -> Tree:
        if type(value) is Unwritten:
            return self.measurer.form(value.tensor)
        if isinstance(value, torch.Tensor):
            return self._measure_at(value, slot, call, (call.number, place))
        return self._describe(value, slot)

    def _describe(self, value: Any, slot: str) -> Tree:
        """A value that is no tensor, in a slot of the current call."""
        keep = None if self._is_plain else self._save_array
        return describe_value(value, slot, self._current_measure, keep=keep)

    def _save_array(self, array: Any, slot: str) -> str | None:
        """Saves an array of numpy as the configuration asks."""
        call = self._current
        if call is None or self._tensor_folder is None:
            return None
        if not self._is_saved(call, slot):
            return None
        name = save_array(self._tensor_folder, file_name(call.name, slot), array)
        if name is not None:
            self.saved_bytes += array.nbytes
        return name

    def _is_saved(self, call: RawCall, slot: str) -> bool:
        """Whether what a call holds in a slot is saved to files."""
        if call.kind == "forward" and not self.config.keeps(
            "input" if slot.startswith("input") else "output"
        ):
            return False
        listed = any(entry in call.name for entry in self.config.tensor_list)
        is_wanted = self.config.task == "tensor" or listed
        return is_wanted and self.bench is None and not self._is_trying

    def _measure_in_slot(self, tensor: torch.Tensor, slot: str) -> Tree:
        """Measures a tensor nested somewhere in the current call's arguments."""
        assert self._current is not None
        call = self._current
        return self._measure_at(tensor, slot, call, (call.number, slot))

    def _measure_at(
        self, tensor: torch.Tensor, slot: str, call: RawCall, place: Any
    ) -> Tree:
        if not self._measures:
            return self.measurer.describe_only(tensor, "read")
        known = self._constant_ids.get(id(tensor))
        if known is not None and known[0] == _version_of(tensor) and self._is_plain:
            return known[1]
        address = storage_address(tensor)
        if address in self._opaque:
            return self.measurer.describe_only(tensor, "opaque")
        if self.keeps_weights and known is None and _is_weight(tensor):
            self.add_constants([tensor])
            known = self._constant_ids.get(id(tensor))
        value: Measured | TensorValue
        if address in self._constants:
            value = self._measure_constant(tensor)
            if known is not None:
                self._constant_ids[id(tensor)] = (_version_of(tensor), value)
        else:
            role: Role = UNWRITTEN if address in self._undefined else "read"
            value = self.measurer.measure(
                tensor, call.site.refuted, place, role, call.site.places.get(slot)
            )
        return value if self._is_plain else self._add_data(tensor, slot, call, value)

    def _measure_cut(
        self, tensor: torch.Tensor, slot: str, call: RawCall, place: Any
    ) -> Tree:
        part = cut_tensor(tensor, self._cuts)
        return Collector._measure_at(self, part, slot, call, place)

    def _measure_constant(self, tensor: torch.Tensor) -> Measured | TensorValue:
        """Parameters and buffers: the same numbers until somebody writes them."""
        form = (tensor.shape, tensor.stride(), tensor.dtype)
        key = (tensor.data_ptr(), _version_of(tensor), *form)
        known = self._measured_constants.get(key)
        if known is None:
            phase, self.measurer.phase = self.measurer.phase, "outside"
            known = self.measurer.measure(tensor, set(), 0)
            self.measurer.phase = phase
            self._measured_constants[key] = known
        return known

    def _add_data(
        self,
        tensor: torch.Tensor,
        slot: str,
        call: RawCall,
        value: Measured | TensorValue,
    ) -> Measured | TensorValue:
        """Saves the tensor and computes its digest, as the configuration asks."""
        changes: dict[str, Any] = {}
        if self.config.summary_mode != "statistics":
            changes["digest"] = digest(tensor, self.config.summary_mode)
        if self.bench is not None:
            self.bench.hold(call, slot, tensor)
        elif self._tensor_folder and self._is_saved(call, slot):
            name = file_name(call.name, slot)
            changes["data_name"] = save_tensor(self._tensor_folder, name, tensor)
            self.saved_bytes += tensor.numel() * tensor.element_size()
        if isinstance(value, Measured):
            return value._replace(**changes)
        return replace(value, **changes)


def _is_weight(tensor: torch.Tensor) -> bool:
    """Whether a tensor was made before the model ran and looks like weights.

    Packed weights are no parameters; they would be measured in every step.
    """
    return (
        torch.is_inference_mode_enabled()
        and not tensor.is_inference()
        and tensor.is_floating_point()
        and tensor.ndim > 1
        and tensor.numel() >= _LEAST_WEIGHTS
    )


def _version_of(tensor: torch.Tensor) -> int:
    """Torch's count of a tensor's writes; inference tensors count none."""
    return 0 if tensor.is_inference() else tensor._version  # noqa: SLF001


def checksums(measured: Measured) -> list[int]:
    """Checksums of a measured tensor's pieces."""
    if measured.chunk is None:
        return []
    rows = measured.chunk[measured.first_row : measured.first_row + measured.rows]
    return [int(value) for value in rows.view(np.uint64)[:, CHECKSUM]]


def digest(tensor: torch.Tensor, summary_mode: str) -> str | None:
    """MsProbe's checksum texts of a tensor's bytes: CRC-32 (md5) or xor.

    Args:
        tensor: Any strided dtype; CUDA tensors are copied first.
        summary_mode: `md5` or `xor`.
    """
    is_odd = tensor.is_meta or tensor.is_quantized or tensor.is_nested
    if is_odd or tensor.layout is not torch.strided:
        return None
    try:
        plain = tensor.detach().resolve_conj().resolve_neg()
        flat = plain.cpu().contiguous().reshape(-1)
        raw = flat.view(torch.uint8).numpy() if flat.numel() else np.zeros(0, np.uint8)
    except (RuntimeError, NotImplementedError, TypeError):
        return None  # a kind without bytes, as inside vmap
    if summary_mode == "md5":
        return f"{zlib.crc32(raw.tobytes()):08x}"
    if raw.size == 0:
        return None
    padded = np.zeros(-(-raw.size // 8) * 8, dtype=np.uint8)
    padded[: raw.size] = raw
    return f"0x{int(np.bitwise_xor.reduce(padded.view('<u8'))):016x}"
