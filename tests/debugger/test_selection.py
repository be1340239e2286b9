# SPDX-License-Identifier: Apache-2.0
"""scope, list and risk_level."""

from pytest_msprobe.config.debugger_config import DebuggerConfig
from pytest_msprobe.debugger.risk import CORE, LOW, is_recorded
from pytest_msprobe.debugger.selection import Selection


def taken(config, calls):
    """Names that are taken; `calls` is a nested list of (name, children)."""
    selection = Selection(config)
    found = []

    def run(items):
        for name, children in items:
            is_module = name.startswith("Module.")
            if selection.enter(name, is_module=is_module):
                found.append(name)
            run(children)
            selection.leave(name, is_module=is_module)

    run(calls)
    return found


A, B, C = (f"Module.{name}.M.forward.0" for name in "abc")
ADD, MUL = "Torch.add.0.forward", "Torch.mul.0.forward"


def test_everything_is_taken_by_default():
    """Without scope and list every call is taken."""
    assert taken(DebuggerConfig(level="mix"), [(A, [(ADD, [])])]) == [A, ADD]


def test_scope_takes_both_ends_whole():
    """From the first name to the end of the last one, everything inside included."""
    config = DebuggerConfig(level="mix", scope=(B, C))

    assert taken(config, [(A, []), (B, [(ADD, [])]), (C, [(MUL, [])]), (A, [])]) == [
        B,
        ADD,
        C,
        MUL,
    ]


def test_scope_of_one_module():
    """First and last may be the same."""
    config = DebuggerConfig(level="L0", scope=(B, B))

    assert taken(config, [(A, []), (B, [(C, [])]), (A, [])]) == [B, C]


def test_list_is_a_substring():
    """Any entry that stands in the name takes the call."""
    config = DebuggerConfig(level="L1", names=("add",))

    assert taken(config, [(ADD, []), (MUL, [])]) == [ADD]


def test_list_expands_modules_at_mix_only():
    """At mix everything inside a listed module is taken, at L0 only the module."""
    calls = [(A, [(B, []), (ADD, [])]), (MUL, [])]

    assert taken(DebuggerConfig(level="mix", names=("Module.a.",)), calls) == [
        A,
        B,
        ADD,
    ]
    assert taken(DebuggerConfig(level="L0", names=("Module.a.",)), calls) == [A]


def test_scope_and_list_must_both_accept():
    """A call outside the scope is not taken, listed or not."""
    config = DebuggerConfig(level="L1", scope=(ADD, ADD), names=("mul", "add"))

    assert taken(config, [(MUL, []), (ADD, [])]) == [ADD]


def test_reset_starts_a_new_step():
    """A scope left open does not reach into the next step."""
    selection = Selection(DebuggerConfig(level="L1", scope=(ADD, MUL)))
    selection.enter(ADD, is_module=False)
    selection.reset()

    assert not selection.enter("Torch.exp.0.forward", is_module=False)


def test_risk_levels():
    """ALL takes everything, FOCUS leaves the cheap ones out, CORE takes the heavy."""
    assert is_recorded("view", "Tensor", "ALL")
    assert not is_recorded("view", "Tensor", "FOCUS")
    assert is_recorded("exp", "Tensor", "FOCUS")
    assert not is_recorded("exp", "Tensor", "CORE")
    assert is_recorded("linear", "Functional", "CORE")
    assert is_recorded("all_reduce", "Distributed", "CORE")
    assert not CORE & LOW
