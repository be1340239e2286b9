# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the tests."""

import os

import pytest
import tools

from pytest_msprobe.compat import has_module

# Before anything imports torch: the engines of the tests run with one thread.
os.environ.update(tools.ENVIRONMENT)


def pytest_collection_modifyitems(items):
    """Runs engine tests last, one folder at a time, and skips what cannot run."""
    for item in items:
        if "engine" in item.path.parts or item.get_closest_marker("engine"):
            item.add_marker(pytest.mark.engine)
            if not has_module("vllm"):
                item.add_marker(pytest.mark.skip(reason="vLLM is not installed"))
    items.sort(key=lambda item: item.get_closest_marker("engine") is not None)


@pytest.fixture(scope="session")
def demo_model():
    """Folder of the demo model, made if it is missing."""
    if not (tools.MODEL / "model.safetensors").is_file():
        tools.example("tiny_qwen2").write_model(tools.MODEL)
    return tools.MODEL


@pytest.fixture(scope="session")
def engine(demo_model):
    """A real vLLM engine with the demo model, shared by the tests."""
    from pytest_msprobe.engine.launch import stop_engine

    llm = tools.start(demo_model)
    yield llm
    stop_engine(llm)
