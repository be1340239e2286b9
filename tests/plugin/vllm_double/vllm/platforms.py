# SPDX-License-Identifier: Apache-2.0
"""What the engine's preflight reads of vLLM."""

from types import SimpleNamespace

current_platform = SimpleNamespace(device_type="cpu")
