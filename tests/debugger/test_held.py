# SPDX-License-Identifier: Apache-2.0
"""Which tensors are kept to be measured later, or not again."""

import pytest
import torch

from pytest_msprobe.config.debugger_config import DebuggerConfig
from pytest_msprobe.debugger.collector import Collector
from pytest_msprobe.debugger.functions import Action, Entry, FunctionPoint
from pytest_msprobe.debugger.materialize import materialize
from pytest_msprobe.debugger.measure import Measurer
from pytest_msprobe.debugger.modules import ModuleWrappers
from pytest_msprobe.debugger.raw import CallSite

HELD = 4000


@pytest.fixture
def measurer():
    """One that may keep a thousand float32."""
    return Measurer(HELD)


def is_held(measurer, tensor):
    """Whether a tensor is kept alive."""
    known = measurer.seen.get(id(tensor))
    return known is not None and known[0] is tensor


def test_a_tensor_too_large_to_keep_is_measured_at_once(measurer):
    """What is larger than all that may be kept is measured, known, and not kept."""
    large, later = torch.ones(2000), torch.ones(200)
    measured = measurer.measure(large, set(), 1)
    assert measured.chunk[measured.first_row, 2] == 2000.0
    assert measurer.held_bytes == 0

    measurer.measure(later, set(), 2)

    assert measurer.seen[id(large)][1] is measured
    assert is_held(measurer, later)
    key = id(large)
    del large
    assert key not in measurer.seen


def test_no_more_is_kept_than_may_be(measurer):
    """Tensors that would be too much together are measured and may end."""
    tensors = [torch.ones(400) for _ in range(5)]
    for index, tensor in enumerate(tensors):
        measurer.measure(tensor, set(), index)
        kept = sum(t.nbytes for t in tensors[: index + 1] if is_held(measurer, t))
        assert kept == measurer.held_bytes <= HELD
    assert all(id(tensor) in measurer.seen for tensor in tensors)


def test_memory_that_tensors_share_is_kept_once(measurer):
    """Parts of a tensor count together no more than it, and all end with a write."""
    tensor = torch.ones(400)
    for index, part in enumerate((*tensor.split(100), tensor, tensor[:300])):
        measurer.measure(part, set(), index)
        assert measurer.held_bytes == min(400 * (index + 1), 1600)

    measurer.release(tensor.data_ptr())

    assert measurer.held_bytes == 0
    assert not measurer.seen


def test_a_write_forgets_no_tensor_elsewhere(measurer):
    """Where a tensor has ended, one that got its id is not mistaken for it."""
    tensor = torch.ones(100)
    measurer.measure(tensor, set(), 0)
    elsewhere = tensor.data_ptr() + 4096
    measurer.seen_storages[elsewhere] = [id(tensor)]

    measurer.release(elsewhere)

    assert is_held(measurer, tensor)
    measurer.release(tensor.data_ptr())
    assert not measurer.seen
    assert measurer.held_bytes == 0


def test_what_is_noted_is_read_before_it_holds_too_much(monkeypatch):
    """Calls are read many at a time, and few where their tensors are large."""
    model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(20)))
    size = 100 * 64 * 4
    collector = Collector(DebuggerConfig(level="L0", pending_bytes=5 * size))
    wrappers = ModuleWrappers(collector, model)
    noted = []
    read_log = Collector.read_log

    def watched(self):
        noted.append(self.trace.counted_bytes)
        read_log(self)

    monkeypatch.setattr(Collector, "read_log", watched)
    wrappers.install(has_modules=True)
    collector.begin_step(0)
    collector.resume()
    with torch.inference_mode():
        model(torch.ones(100, 64))
    step = collector.end_step()
    wrappers.remove()

    collector.raise_error()
    assert len(step.calls) == len([n for n in noted if n])
    assert 4 <= len(step.calls) <= 10
    assert max(noted) <= 6 * size


def test_memory_that_tensors_share_is_noted_once():
    """Parts of a tensor count no bytes beside it, and do not end what is noted."""
    x = torch.ones(100, 64)
    config = DebuggerConfig(level="L1", pending_bytes=3 * x.nbytes)
    collector = Collector(config)
    site = CallSite("split.", "", is_module=False)
    point = FunctionPoint(site, Entry(Action.RECORD, site))
    collector.begin_step(0)
    collector.resume()

    for count in range(1, 8):
        collector.note_start(point, (x[:50] if count == 1 else x,), {})
        collector.note_end(point, x[50:].split(16, dim=1))
        assert len(collector.trace.sizes) == 2 * count
        assert collector.trace.counted_bytes == x.nbytes
    collector.note_start(point, (torch.ones(200, 64),), {})

    assert not collector.trace.sizes
    collector.end_step()
    collector.raise_error()


class Weight(torch.nn.Parameter):
    """A parameter with a class of its own, as vLLM's weights are."""


def test_a_weight_of_a_class_of_its_own_does_not_end_what_is_noted():
    """A weight is read with the calls that were noted before it, with its numbers."""
    x = torch.ones(3, 4)
    weight = Weight(torch.full((4, 4), 2.0), requires_grad=False)
    other = Weight(torch.ones(4, 4), requires_grad=False)
    collector = Collector(DebuggerConfig(level="L1"))
    collector.add_constants([weight])
    site = CallSite("linear.", "", is_module=False)
    point = FunctionPoint(site, Entry(Action.RECORD, site))
    for number in range(3):
        collector.begin_step(number)
        collector.resume()
        collector.note_start(point, (x, weight), {})
        collector.note_end(point, x)
        assert len(collector.trace.sizes) == 2
        collector.note_start(point, (x, other), {})
        assert not collector.trace.sizes  # it may be written where nobody sees it
        collector.note_end(point, x)
        calls = materialize(collector.end_step()).calls
        collector.raise_error()

        assert calls[0].input_args[1].rows[0, 2] == 32.0
        assert calls[1].input_args[1].rows[0, 2] == 16.0


def test_the_vocabulary_does_not_bound_what_is_noted():
    """Calls are noted by the width of activations, not by that of the vocabulary."""
    model = torch.nn.Sequential(
        torch.nn.Embedding(150_000, 8), *(torch.nn.Linear(8, 8) for _ in range(3))
    )
    collector = Collector(DebuggerConfig(level="L0"))

    ModuleWrappers(collector, torch.nn.ModuleList([model])).install(has_modules=False)

    assert collector.width == 8
    assert collector.model_dimensions >= {150_000, 8}
