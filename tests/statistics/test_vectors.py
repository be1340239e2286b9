# SPDX-License-Identifier: Apache-2.0
"""The test vectors of docs/formats.md, by the package and by plain Python."""

import numpy as np
import plain_formats
import pytest
import tools

from pytest_msprobe.statistics.checksum import checksum
from pytest_msprobe.statistics.sketch import fold, sketch

VALUES = [321 * n % 65536 for n in range(1, 201)]
FIRST = [-319, -256, -255, 98, -253, 304, 37, -94]
FAR = 2**33 + 5


@pytest.mark.parametrize("implementation", ["package", "plain Python"])
def test_checksum_vector(implementation):
    """The checksum of 200 known 16-bit values at index 7 is the documented one."""
    if implementation == "package":
        found = checksum(np.array(VALUES, dtype=np.uint16), 7)
    else:
        found = plain_formats.checksum(VALUES, 2, 7)

    assert found == 0xCE9A8BFCBBA5C908


@pytest.mark.parametrize("implementation", [sketch, plain_formats.sketch])
def test_sketch_vector(implementation):
    """The sketch of 1..200 at index 7 has the documented sums."""
    found = np.array(implementation(range(1, 201), 7))

    assert found[:8].tolist() == FIRST
    assert found.sum() == -2760
    assert (found**2).sum() == 2565372
    assert fold(found)[:4].tolist() == [-95, -318, -480, 320]


@pytest.mark.parametrize("implementation", [sketch, plain_formats.sketch])
def test_sketch_vector_beyond_32_bits(implementation):
    """The sketch of 1, 2, 3 at index 2**33 + 5 fills three documented buckets."""
    found = np.array(implementation([1, 2, 3], FAR))

    assert {int(i): found[i] for i in np.flatnonzero(found)} == {57: 1, 58: 2, 59: -3}


def test_documented_vectors_are_these():
    """docs/formats.md states the very numbers that the tests hold."""
    text = (tools.ROOT / "docs" / "formats.md").read_text(encoding="utf-8")

    assert "ce9a8bfcbba5c908" in text
    numbers = text.replace("\u2212", "-")
    assert ", ".join(str(n) for n in FIRST) in numbers
    assert "2565372" in text
