# SPDX-License-Identifier: Apache-2.0
"""Tolerances that a test gives in its marker or in a call of `check`."""

from typing import Any

from pytest_msprobe.config.settings import FLAGS
from pytest_msprobe.errors import ConfigError
from pytest_msprobe.model.limits import RULE_KEYS, Rule, has_half_a_pair

_MODES = (None, "same", "cross")


def read_code_rules(value: Any, where: str, origin: str) -> tuple[Rule, ...]:
    """Rules from Python values.

    Args:
        value: A dict of limits and, as in the configuration's rules, `rows`, `mode`,
            `ignore`, `exact` and `only`; or a list of such dicts.
        where: Place for messages.
        origin: `file:line` that reports name.

    Raises:
        ConfigError: Something in it is wrong.
    """
    items = value if isinstance(value, list | tuple) else [value]
    return tuple(_read(item, f"{where}: tolerances", origin) for item in items)


def _error(where: str, text: str) -> ConfigError:
    return ConfigError(f"{where}: {text}", slug="marker")


def _read(value: Any, where: str, origin: str) -> Rule:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise _error(where, f"expected a dict with texts as keys, found {value!r}")
    values = dict(value)
    rows, mode = values.pop("rows", "*"), values.pop("mode", None)
    if not isinstance(rows, str) or not rows:
        raise _error(where, f"rows {rows!r}: expected a glob over row names")
    if mode not in _MODES:
        raise _error(where, f"mode {mode!r}: expected same or cross")
    flags = {name: values.pop(name, False) for name in FLAGS}
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise _error(where, f"{name} {flag!r}: expected True or False")
    for name, limit in values.items():
        if name not in RULE_KEYS:
            known = ", ".join((*RULE_KEYS, "rows", "mode", *FLAGS))
            raise _error(where, f"{name}: unknown metric; known: {known}")
        is_number = isinstance(limit, int | float) and not isinstance(limit, bool)
        if not is_number or not limit >= 0:
            raise _error(where, f"{name} {limit!r}: expected a number >= 0")
    if has_half_a_pair(values):
        raise _error(where, "expected both rtol and atol, or neither")
    limits = {name: float(limit) for name, limit in values.items()}
    return Rule(origin, rows, mode, limits, **flags)
