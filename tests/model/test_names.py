# SPDX-License-Identifier: Apache-2.0
"""Names of calls."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import module_paths, segment_words

from pytest_msprobe.model.names import (
    CallName,
    display_name,
    format_call_name,
    parse_call_name,
)

names = st.builds(
    CallName,
    st.sampled_from(["Module", "Functional", "Tensor", "Torch", "_C", "Vllm"]),
    module_paths,
    st.integers(0, 5000),
    st.sampled_from(["forward", "backward"]),
)


@given(names)
def test_format_and_parse_are_inverse(name):
    """Every name that can be written is read back as it was."""
    assert parse_call_name(format_call_name(name)) == name


@given(segment_words)
def test_other_text_is_no_name(text):
    """A text without number and direction is no name."""
    assert parse_call_name(text) is None


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Module.model.layers.0.mlp.Qwen2MLP.forward.0", "model.layers.0.mlp"),
        ("Module.norm.RMSNorm.forward.12", "norm"),
        ("Functional.linear.3.forward", "Functional.linear.3"),
        ("something else", "something else"),
    ],
)
def test_display_name(text, shown):
    """People see the path of a module, or an API with its number."""
    assert display_name(text) == shown


def test_parts_of_a_module_name():
    """A module's path and class are told apart."""
    name = parse_call_name("Module.model.layers.0.mlp.Qwen2MLP.forward.3")

    assert name.module_path == "model.layers.0.mlp"
    assert name.class_name == "Qwen2MLP"
    assert name.is_module
