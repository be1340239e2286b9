# SPDX-License-Identifier: Apache-2.0
"""Precision regression testing of vLLM models as a pytest plugin."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_msprobe.debugger.debugger import PrecisionDebugger
    from pytest_msprobe.debugger.seed import seed_all

__all__ = ["PrecisionDebugger", "__version__", "seed_all"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Imports the debugger, and with it torch, only when it is asked for."""
    if name == "PrecisionDebugger":
        from pytest_msprobe.debugger.debugger import PrecisionDebugger  # noqa: PLC0415

        return PrecisionDebugger
    if name == "seed_all":
        from pytest_msprobe.debugger.seed import seed_all  # noqa: PLC0415

        return seed_all
    message = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(message)
