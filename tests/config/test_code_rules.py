# SPDX-License-Identifier: Apache-2.0
"""Tolerances given in a marker or a call."""

import pytest

from pytest_msprobe.config.code_rules import read_code_rules
from pytest_msprobe.errors import ConfigError


def test_limits_and_rules_are_taken():
    """A dict of limits is one rule for all rows; a list holds several."""
    (one,) = read_code_rules({"max": 1}, "t", "t.py:3")
    first, second = read_code_rules(
        [{"rows": "*a*", "ignore": True, "mode": "same"}, {"rtol": 0.1, "atol": 0}],
        "t",
        "t.py:4",
    )

    assert (one.rows, one.limits, one.origin) == ("*", {"max": 1.0}, "t.py:3")
    assert (first.rows, first.ignore, first.mode) == ("*a*", True, "same")
    assert second.limits == {"rtol": 0.1, "atol": 0.0}


@pytest.mark.parametrize(
    ("value", "phrase"),
    [
        (5, "expected a dict"),
        ({1: 2}, "expected a dict"),
        ({"maxx": 1}, "maxx: unknown metric"),
        ({"max": True}, "max True: expected a number"),
        ({"rows": 3}, "rows 3: expected a glob"),
        ({"mode": "all"}, "mode 'all': expected same or cross"),
        ({"exact": 1}, "exact 1: expected True or False"),
        ({"rtol": 1}, "both rtol and atol"),
    ],
)
def test_mistakes_are_named(value, phrase):
    """Wrong values are one line that starts with the place."""
    with pytest.raises(ConfigError) as error:
        read_code_rules(value, "t.py::test_a", "t.py:1")

    assert str(error.value).startswith("t.py::test_a: tolerances: ")
    assert phrase in str(error.value)
