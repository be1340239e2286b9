# SPDX-License-Identifier: Apache-2.0
"""The `vllm.general_plugins` entry point: lets a worker be controlled, if asked to.

vLLM calls `register` in every one of its processes. It replaces one method,
`WorkerWrapperBase.init_device`, and imports nothing heavy; a worker gets our control
method only if the environment variable or the engine's additional_config asks for it.
"""

import functools
import sys
from typing import Any

_MARK = "_msprobe_wrapped"
_WORKER_BASE = "vllm.v1.worker.worker_base"


def register() -> None:
    """Wraps the one method, once a process; does nothing where there are no workers."""
    module = sys.modules.get(_WORKER_BASE)
    wrapper_class = getattr(module, "WorkerWrapperBase", None)
    original = getattr(wrapper_class, "init_device", None)
    if wrapper_class is None or original is None or hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def init_device(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        _attach(self)
        return result

    setattr(init_device, _MARK, True)
    wrapper_class.init_device = init_device


def _attach(wrapper: Any) -> None:
    import os

    additional = getattr(wrapper.vllm_config, "additional_config", None)
    asks = isinstance(additional, dict) and any(
        key in additional for key in ("dump_config", "dump_config_path", "msprobe")
    )
    if not asks and not os.environ.get("MSPROBE_ATTACH"):
        return
    from pytest_msprobe.engine.worker_rpc import attach_control

    attach_control(wrapper.worker)
