# SPDX-License-Identifier: Apache-2.0
"""Numerics keys as text: `cpu-avx512bf16-amd`, `cuda-sm90`."""


def device_kind(key: str) -> str:
    """Kind of device that a key is of."""
    return key.partition("-")[0]
