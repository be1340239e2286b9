# SPDX-License-Identifier: Apache-2.0
"""The `vllm.general_plugins` entry point: lets a worker be controlled, if asked to.

vLLM calls `register` in every one of its processes. It replaces one method,
`WorkerWrapperBase.init_device`, and imports nothing heavy; a worker gets our control
method only if the environment variable or the engine's additional_config asks for it.
"""

import functools
import os
import sys
from collections.abc import Iterator
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from typing import Any

_MARK = "_msprobe_wrapped"
_METHOD = "msprobe_control"
_WORKER_BASE = "vllm.v1.worker.worker_base"
_DUMP_KEYS = ("dump_config", "dump_config_path")
# As in compat, which is imported only where it is needed.
_FIRST_FOLDERS = "MSPROBE_FIRST_FOLDERS"


def register() -> None:
    """Wraps the one method, once a process, at once or when its module is imported."""
    if os.environ.get(_FIRST_FOLDERS):
        from pytest_msprobe.compat import import_first_folders

        import_first_folders()
    _check_command()
    module = sys.modules.get(_WORKER_BASE)
    if module is not None:
        _wrap(module)
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


class _AfterImport(MetaPathFinder):
    """Wraps the method as soon as its module has been imported.

    vLLM loads plugins once a process, which may be long before it imports its workers.
    """

    def find_spec(
        self, fullname: str, path: object = None, target: object = None
    ) -> ModuleSpec | None:
        del path, target
        if fullname != _WORKER_BASE:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        loader: Any = spec and spec.loader
        if loader is not None:
            execute = loader.exec_module

            def exec_module(module: Any) -> None:
                execute(module)
                _wrap(module)

            loader.exec_module = exec_module
        return spec


def _wrap(module: Any) -> None:
    base = getattr(module, "WorkerWrapperBase", None)
    if base is None:
        return
    # Ray's older executor derives a class with copies of all methods; a copy may have
    # the mark of the method that it copies, but it is not that method.
    for owner in _with_subclasses(base):
        method = vars(owner).get("init_device")
        if method is not None and getattr(method, _MARK, None) is not method:
            owner.init_device = _attaching(method)


def _with_subclasses(base: Any) -> Iterator[Any]:
    yield base
    for derived in base.__subclasses__():
        yield from _with_subclasses(derived)


def _attaching(original: Any) -> Any:
    @functools.wraps(original)
    def init_device(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        if _METHOD not in vars(self):
            _attach(self)
        return result

    setattr(init_device, _MARK, init_device)
    return init_device


def _attach(wrapper: Any) -> None:
    import os

    given = getattr(wrapper.vllm_config, "additional_config", None)
    additional: dict[str, Any] = given if isinstance(given, dict) else {}
    keys = {*_DUMP_KEYS, "msprobe"}.intersection(additional)
    if not keys and not os.environ.get("MSPROBE_ATTACH"):
        return
    from pytest_msprobe.engine.worker_rpc import attach_control

    attach_control(wrapper)
    if keys - {"msprobe"}:
        from pytest_msprobe.engine.server import start_dump

        start_dump(wrapper, additional)


def _check_command() -> None:
    """Refuses a server's wrong configuration of a dump in one line.

    Raises:
        SystemExit: It is wrong.
    """
    main = sys.modules.get("__main__")
    module = getattr(getattr(main, "__spec__", None), "name", "")
    if not module.startswith("vllm.") and not sys.argv[0].endswith("/vllm"):
        return
    if not any("additional" in argument for argument in sys.argv):
        return
    from pytest_msprobe.engine.server import check_command
    from pytest_msprobe.errors import MsprobeError

    try:
        check_command(sys.argv[1:])
    except MsprobeError as error:
        message = f"ERROR: msprobe: {error}"
        raise SystemExit(message) from None
