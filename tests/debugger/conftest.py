# SPDX-License-Identifier: Apache-2.0
"""What the tests of the debugger share."""

from dataclasses import replace

import pytest


@pytest.fixture(params=["gradients", "traced", "replaced"])
def ways(request, monkeypatch):
    """Calls are recorded one by one where a backward may run, else only noted."""
    original = request.module.Recorder

    def recorder(config, *args, **options):
        if request.param == "replaced":
            config = replace(config, function_hooks="replace")
        has_gradients = request.param == "gradients"
        return original(config, *args, has_gradients=has_gradients, **options)

    monkeypatch.setattr(request.module, "Recorder", recorder)
    return request.param
