# SPDX-License-Identifier: Apache-2.0
"""Which tensors are kept to be measured later, or not again."""

import pytest
import torch

from pytest_msprobe.config.debugger_config import DebuggerConfig
from pytest_msprobe.debugger.collector import Collector
from pytest_msprobe.debugger.measure import Measurer
from pytest_msprobe.debugger.modules import ModuleWrappers

HELD = 4000


@pytest.fixture
def measurer():
    """One that may keep a thousand float32."""
    return Measurer(HELD)


def test_a_tensor_too_large_to_keep_leaves_the_others_kept(measurer):
    """What is larger than all that may be kept is measured at once and not kept."""
    small, large = torch.ones(100), torch.ones(2000)
    measurer.measure(small, set(), 0)
    measured = measurer.measure(large, set(), 1)
    later = torch.ones(200)
    measurer.measure(later, set(), 2)

    assert id(small) in measurer.seen
    assert id(later) in measurer.seen
    assert id(large) not in measurer.seen
    assert measured.chunk[measured.first_row, 2] == 2000.0


def test_no_more_is_kept_than_may_be(measurer):
    """Tensors that would be too much together end what was kept before them."""
    tensors = [torch.ones(400) for _ in range(5)]
    for index, tensor in enumerate(tensors):
        measurer.measure(tensor, set(), index)
        kept = sum(t.numel() * t.element_size() for t, _ in measurer.seen.values())
        assert kept <= HELD
        assert id(tensor) in measurer.seen


def test_the_vocabulary_does_not_bound_what_is_noted():
    """Calls are noted by the width of activations, not by that of the vocabulary."""
    model = torch.nn.Sequential(
        torch.nn.Embedding(150_000, 8), *(torch.nn.Linear(8, 8) for _ in range(3))
    )
    collector = Collector(DebuggerConfig(level="L0"))

    ModuleWrappers(collector, torch.nn.ModuleList([model])).install(has_modules=False)

    assert collector.width == 8
    assert collector.model_dimensions >= {150_000, 8}
