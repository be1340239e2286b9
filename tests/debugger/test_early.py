# SPDX-License-Identifier: Apache-2.0
"""Tensors that are measured because something is about to write them."""

import pytest
import test_programs
import torch
from hypothesis import given, settings

from pytest_msprobe.config.debugger_config import DebuggerConfig
from pytest_msprobe.debugger.collector import Collector
from pytest_msprobe.debugger.measure import Measurer
from pytest_msprobe.model.segments import Piece


@pytest.mark.parametrize("level", ["L1", "mix"])
@settings(max_examples=12, deadline=None)
@given(program=test_programs.programs)
def test_what_is_written_is_recorded_as_it_was(tmp_path_factory, level, program):
    """Measured before a write, calls are recorded as those that are read at once."""
    folder = tmp_path_factory.mktemp("dump")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Collector, "measures_early", frozenset(("cpu",)))
        early = test_programs.recorded(
            folder / "early", program, has_gradients=False, level=level
        )
    at_once = test_programs.recorded(
        folder / "at once", program, has_gradients=True, level=level
    )

    assert early == at_once


def test_a_slot_may_divide_it_either_way():
    """Rows of tokens and of the whole are there, whichever a slot asks for."""
    measurer = Measurer(1 << 20)
    x = torch.arange(12.0).reshape(3, 4)
    measurer.measure(x, set(), 0)
    measurer.forget()
    tokens = tuple(Piece("r", row, 1, row) for row in range(3))
    measurer.set_layout(3, tokens, ())
    measurer.phase = "forward"

    early = measurer.measure_early(x)
    measurer.release(x.data_ptr())
    x.zero_()

    by_token = measurer.early(early, set(), 5)
    whole = measurer.early(early, {5}, 5)
    assert (by_token.row_class, by_token.rows) == ("token", 3)
    sums = by_token.chunk[by_token.first_row :, 2][:3]
    assert sums.tolist() == [6.0, 22.0, 38.0]
    assert (whole.row_class, whole.chunk[whole.first_row, 2]) == ("neither", 66.0)
    assert not measurer.seen


def test_an_unknown_form_is_not_measured_early():
    """A form that was never measured is left to whoever keeps copies."""
    assert Measurer(1 << 20).measure_early(torch.ones(3)) is None
    assert Collector(DebuggerConfig()).measures_early == {"cuda"}
