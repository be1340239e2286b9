# SPDX-License-Identifier: Apache-2.0
"""What would make a capture fail, found before it starts.

The checks of the environment import neither torch nor vLLM unless vLLM is imported
anyway; those of an engine run in its workers when a capture starts.
"""

import os
import shutil
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from pytest_msprobe.compat import vllm_version
from pytest_msprobe.errors import CaptureError, EngineError

PLUGIN = "msprobe"
GROUP = "vllm.general_plugins"
# Recording needs room for at least one step of a large model.
LEAST_FREE_BYTES = 64 * 2**20


def is_plugin_installed() -> bool:
    """Whether the installed package has told vLLM of its entry point."""
    return any(entry.name == PLUGIN for entry in entry_points(group=GROUP))


def is_plugin_allowed() -> bool:
    """Whether `VLLM_PLUGINS` lets vLLM load the entry point."""
    allowed = os.environ.get("VLLM_PLUGINS")
    return allowed is None or PLUGIN in allowed.split(",")


def attach_problem() -> EngineError | None:
    """Why workers started from this process would not listen, None if they will."""
    if not is_plugin_installed():
        message = f"the entry point {PLUGIN!r} of {GROUP} is not installed"
        hint = "install pytest-msprobe in the environment that runs vLLM"
        return EngineError(message, slug="no-entry-point", hint=hint)
    if not is_plugin_allowed():
        value = os.environ["VLLM_PLUGINS"]
        message = f"VLLM_PLUGINS={value!r} keeps vLLM from loading pytest-msprobe"
        hint = f"add {PLUGIN!r} to it before the engine starts, or unset it"
        return EngineError(message, slug="plugins-exclude", hint=hint)
    return None


def environment_problems(*, device: str, has_triton: bool) -> list[EngineError]:
    """Settings of the environment with which no engine would run.

    Args:
        device: vLLM's platform: cpu, cuda, rocm, xpu…
        has_triton: Whether Triton can compile for that device.
    """
    found = []
    problem = attach_problem()
    if problem is not None:
        found.append(problem)
    if _flag("VLLM_BATCH_INVARIANT") and device == "cpu":
        message = "VLLM_BATCH_INVARIANT=1: vLLM has no batch-invariant kernels for cpu"
        hint = "unset it; on the CPU results do not depend on the batch"
        found.append(EngineError(message, slug="batch-invariant", hint=hint))
    if _flag("VLLM_USE_V2_MODEL_RUNNER") and not has_triton:
        message = (
            f"VLLM_USE_V2_MODEL_RUNNER=1: model runner V2 needs Triton, which has no "
            f"backend for {device} here"
        )
        hint = "unset it; model runner V1 is used then"
        found.append(EngineError(message, slug="no-triton", hint=hint))
    return found


def _flag(name: str) -> bool:
    return os.environ.get(name, "").strip().lower() in ("1", "true")


def check_environment() -> None:
    """Checks the environment of an engine that starts now.

    Raises:
        EngineError: vLLM would fail with a message that says less.
    """
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON

    device = str(current_platform.device_type)
    for problem in environment_problems(device=device, has_triton=bool(HAS_TRITON)):
        raise problem


def is_eager(vllm_config: Any) -> bool:
    """Whether an engine runs Python for every module: neither compiled nor graphs."""
    if vllm_config.model_config.enforce_eager:
        return True
    compilation = vllm_config.compilation_config
    graphs = getattr(compilation, "cudagraph_mode", None)
    mode = getattr(compilation, "mode", getattr(compilation, "level", None))
    return _is_none(graphs) and _is_none(mode)


def _is_none(setting: Any) -> bool:
    """Whether an enumeration stands at NONE."""
    return setting is None or getattr(setting, "name", str(setting)) in ("NONE", "0")


def check_engine(vllm_config: Any) -> None:
    """Checks that what an engine computes can be captured right.

    Args:
        vllm_config: vLLM's configuration, read in a worker.

    Raises:
        EngineError: It cannot; the message names the setting.
    """
    if not is_eager(vllm_config):
        message = (
            "the engine runs compiled code or graphs, in which modules and operators "
            "cannot be seen"
        )
        hint = "start it with enforce_eager=True (--enforce-eager)"
        raise EngineError(message, slug="not-eager", hint=hint)
    if getattr(vllm_config, "speculative_config", None) is not None:
        message = (
            "the engine speculates: one step verifies several tokens a request, which "
            "captures cannot tell apart yet"
        )
        hint = "start it without speculative_config"
        raise EngineError(message, slug="speculative", hint=hint)
    parallel = vllm_config.parallel_config
    for name in ("prefill_context_parallel_size", "decode_context_parallel_size"):
        size = getattr(parallel, name, 1)
        if size > 1:
            message = (
                f"{name}={size}: rows are spread over ranks in an order that vLLM "
                f"{vllm_version()} does not tell"
            )
            hint = f"start the engine with {name}=1"
            raise EngineError(message, slug="context-parallel", hint=hint)


def check_folder(folder: Path) -> None:
    """Checks that a dump can be written into a folder, and makes it.

    Raises:
        CaptureError: It cannot be made or written, or its disk is full.
    """
    probe = folder / f".write-test.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        message = f"{folder}: cannot be written ({error.strerror})"
        hint = "make it writable, or change dump_path"
        raise CaptureError(message, slug="dump-unwritable", hint=hint) from error
    free = shutil.disk_usage(folder).free
    if free < LEAST_FREE_BYTES:
        message = f"{folder}: {free} bytes free, at least {LEAST_FREE_BYTES} are needed"
        hint = "free space, or change dump_path"
        raise CaptureError(message, slug="disk-full", hint=hint)
