# SPDX-License-Identifier: Apache-2.0
"""What the engine's preflight reads of vLLM."""

HAS_TRITON = False
