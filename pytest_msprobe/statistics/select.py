# SPDX-License-Identifier: Apache-2.0
"""Which backend measures tensors of a device, and why."""

from pytest_msprobe.compat import has_module
from pytest_msprobe.statistics.spec import Backend


def select_backend(device_type: str) -> tuple[Backend, str]:
    """The fastest backend for a device.

    Args:
        device_type: torch's name, e.g. `cpu` or `cuda`.

    Returns:
        The backend, and the reason of the choice for the provenance.
    """
    if device_type == "cpu" and has_module("numba"):
        from pytest_msprobe.statistics.cpu import CpuBackend

        return CpuBackend(), "cpu: compiled by numba"
    if device_type == "cuda" and has_module("triton"):
        from pytest_msprobe.statistics.cuda import CudaBackend

        return CudaBackend(), "cuda: compiled by Triton"
    from pytest_msprobe.statistics.reference import ReferenceBackend

    missing = {"cpu": "numba", "cuda": "Triton"}.get(device_type)
    reason = f"{missing} is not installed" if missing else "no kernel for it yet"
    return ReferenceBackend(), f"reference: {device_type}: {reason}"
