# SPDX-License-Identifier: Apache-2.0
"""Precision regression testing of vLLM models as a pytest plugin."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_msprobe.debugger.debugger import (
        PrecisionDebugger,
        module_dump,
        module_dump_end,
    )
    from pytest_msprobe.debugger.seed import seed_all

__all__ = [
    "PrecisionDebugger",
    "__version__",
    "module_dump",
    "module_dump_end",
    "seed_all",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Imports the debugger, and with it torch, only when it is asked for."""
    if name in ("PrecisionDebugger", "module_dump", "module_dump_end"):
        _require_torch()
        from pytest_msprobe.debugger import debugger

        return getattr(debugger, name)
    if name == "seed_all":
        _require_torch()
        from pytest_msprobe.debugger.seed import seed_all

        return seed_all
    message = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(message)


def _require_torch() -> None:
    """Says what is missing where torch is not installed.

    Raises:
        MissingDependencyError: It is not.
    """
    from pytest_msprobe.compat import has_module, missing_message
    from pytest_msprobe.errors import MissingDependencyError

    if not has_module("torch"):
        message, hint = missing_message("torch")
        raise MissingDependencyError(message, slug="missing-dependency", hint=hint)
