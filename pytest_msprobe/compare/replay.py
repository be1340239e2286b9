# SPDX-License-Identifier: Apache-2.0
"""A module's own error apart from the one that it inherits.

The bad side is run twice: as it is, and with the inputs that the good side had in every
module that is suspicious. What a module's outputs are off then is its own doing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pytest_msprobe.compare.divergence import enclosing_calls
from pytest_msprobe.compare.match import pair_rows
from pytest_msprobe.compare.metrics import rel_l2_error
from pytest_msprobe.dump.capture import CaptureFile
from pytest_msprobe.model.names import MODULE_PREFIX

_F64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class OwnError:
    """What a module does to the numbers.

    Attributes:
        call: Name of the module's call.
        whole: Largest relative L2 error of its outputs on the bad side.
        own: The same where it is given the good side's inputs.
    """

    call: str
    whole: float
    own: float


def suspicious_modules(good: CaptureFile, bad: CaptureFile) -> list[str]:
    """Innermost module calls with outputs that are not bit-identical, in order."""
    errors = _output_errors(good, bad)
    calls = [call for _, call in bad.calls()]
    parents = enclosing_calls(calls)
    has_modules = {
        calls[parent].c
        for call, parent in zip(calls, parents, strict=True)
        if parent >= 0 and call.c.startswith(MODULE_PREFIX)
    }
    return [
        name for name, error in errors.items() if error > 0 and name not in has_modules
    ]


def own_errors(
    good: CaptureFile, bad: CaptureFile, replayed: CaptureFile, names: Sequence[str]
) -> list[OwnError]:
    """Own and whole errors of some module calls, in their order.

    Args:
        good: The good side.
        bad: The bad side as it is.
        replayed: The bad side with the good side's inputs in these calls.
        names: The calls.
    """
    whole, own = _output_errors(good, bad), _output_errors(good, replayed)
    return [
        OwnError(name, whole.get(name, 0.0), own[name]) for name in names if name in own
    ]


def _output_errors(golden: CaptureFile, candidate: CaptureFile) -> dict[str, float]:
    """Largest relative L2 error of the outputs of each module call, over all steps."""
    pairs = pair_rows(golden, candidate)
    rows = pairs.candidate
    wanted = rows.is_output[pairs.new] & rows.is_of_module(pairs.new)
    index = np.flatnonzero(wanted)
    old, new = pairs.numbers(index)
    with np.errstate(all="ignore"):
        errors: _F64 = np.nan_to_num(rel_l2_error(old, new).relative, nan=np.inf)
    errors[pairs.is_equal[index]] = 0.0
    found: dict[str, float] = {}
    for call, error in zip(rows.call[pairs.new[index]].tolist(), errors, strict=True):
        name = rows.calls[call].c
        found[name] = max(found.get(name, 0.0), float(error))
    return found
