# SPDX-License-Identifier: Apache-2.0
"""Starts and ends the engines of the fixture."""

import contextlib
import gc
import os
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_msprobe.compat import (
    has_module,
    make_llvmlite_scannable,
    missing_message,
    vllm_version,
)
from pytest_msprobe.config.settings import check_eager
from pytest_msprobe.errors import EngineError, MissingDependencyError

if TYPE_CHECKING:
    import psutil

# Settings that make a run repeatable; each can be overridden in the configuration.
DETERMINISTIC: dict[str, Any] = {
    "enforce_eager": True,
    "seed": 0,
    "enable_prefix_caching": False,
    "max_num_seqs": 1,
    "async_scheduling": False,
}
# What an engine's processes are given to end by themselves.
SHUTDOWN_SECONDS = 10
# Processes and shared memory of engines, by the engine's id.
_LEFT: dict[int, tuple[list["psutil.Process"], set[Path]]] = {}
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where POSIX shared memory lies
# What vLLM's processes name theirs; the last is of tensor parallelism on the CPU.
_SHARED_NAMES = re.compile(r"(vllm|psm)_|.*-cpushm_\d+$")
# What pydantic adds to the reason that vLLM gave.
_PYDANTIC_LINK = "For further information"
_PYDANTIC_TAIL = re.compile(r" \[type=\w+, input_value=.*\]$")
_ENVIRONMENT = {
    # The engine core runs in the test's process: scheduling does not depend on timing.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # Workers give themselves our control method.
    "MSPROBE_ATTACH": "1",
}


def prepare_environment(variables: dict[str, str]) -> None:
    """Sets variables before torch and vLLM are imported; those set win over ours.

    Args:
        variables: From the configuration; they replace what is set.
    """
    os.environ.update(variables)
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def engine_arguments(configured: dict[str, Any], where: str) -> dict[str, Any]:
    """Arguments of `vllm.LLM`, deterministic defaults under the user's.

    Raises:
        EngineError: No model is named.
        ConfigError: The engine would not be eager.
    """
    check_eager(configured, where)
    if not configured.get("model"):
        message = f"{where}: model: not set; expected the model of msprobe_engine"
        hint = "name one under engine, or capture an LLM of your own"
        raise EngineError(message, slug="no-model", hint=hint)
    return {**DETERMINISTIC, **configured}


def start_engine(arguments: dict[str, Any]) -> Any:
    """Starts a real `vllm.LLM`.

    Raises:
        MissingDependencyError: vLLM or torch is not installed.
        EngineError: vLLM could not start the engine; the message gives its reason.
    """
    for name in ("torch", "vllm"):
        if not has_module(name):
            message, hint = missing_message(name)
            raise MissingDependencyError(message, slug="missing-dependency", hint=hint)
    make_llvmlite_scannable()
    try:
        # What torch and vLLM warn of while they start is not the test's business.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import vllm

            from pytest_msprobe.engine.preflight import check_environment

            check_environment()
            before, memory = set(children()), shared_memory()
            llm = vllm.LLM(**arguments)
            started = [child for child in children() if child not in before]
            _LEFT[id(llm)] = (started, shared_memory() - memory)
            return llm
    except EngineError:
        raise
    except Exception as error:
        text = reason_of(error)
        message = f"vLLM {vllm_version()} could not start the engine: {text}"
        hint = f"arguments: {arguments}"
        raise EngineError(message, slug="engine-start", hint=hint) from error


def reason_of(error: Exception) -> str:
    """The line of an error that says why, without what pydantic writes around it."""
    lines = [line.strip() for line in str(error).splitlines()]
    telling = [line for line in lines if line and not line.startswith(_PYDANTIC_LINK)]
    if not telling:
        return type(error).__name__
    return _PYDANTIC_TAIL.sub("", telling[-1]).removeprefix("Value error, ")


def stop_engine(llm: Any) -> None:
    """Ends an engine with its processes and frees what it held.

    Engines in one process share vLLM's process groups; these are taken down with the
    last engine only, so that an engine of the user's goes on.
    """
    client = getattr(getattr(llm, "llm_engine", None), "engine_core", None)
    core = getattr(client, "engine_core", None)
    processes, memory = _LEFT.pop(id(llm), ([], set()))
    with contextlib.suppress(Exception):
        if core is not None and _has_other_workers(core):
            # EngineCore.shutdown would take the process groups down, now and when
            # the client is collected.
            finalizer = getattr(client, "_finalizer", None)
            if finalizer is not None:
                finalizer.detach()
            core.model_executor.shutdown()
            core.scheduler.shutdown()
        elif client is not None:
            client.shutdown()
    del client, core, llm
    gc.collect()
    end_processes(processes)
    free_memory(memory)


def children() -> list["psutil.Process"]:
    """All processes below this one, but for the interpreter's own helper."""
    import psutil

    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "resource_tracker" not in " ".join(child.cmdline()):
                found.append(child)
    return found


def end_processes(processes: list["psutil.Process"]) -> None:
    """Waits for processes that should be ending, and kills those that do not."""
    import psutil

    _, alive = psutil.wait_procs(processes, timeout=SHUTDOWN_SECONDS)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=SHUTDOWN_SECONDS)


def _has_other_workers(core: Any) -> bool:
    """Whether a worker of another engine lives in this process."""
    from pytest_msprobe.engine.worker_rpc import live_workers

    wrapper = getattr(core.model_executor, "driver_worker", None)
    own = getattr(wrapper, "worker", wrapper)
    workers = live_workers()
    workers.discard(own)
    return bool(workers)


def shared_memory() -> set[Path]:
    """Shared memory of this machine that may be vLLM's."""
    if not _SHARED_MEMORY.is_dir():
        return set()
    return {path for path in _SHARED_MEMORY.iterdir() if _SHARED_NAMES.match(path.name)}


def free_memory(memory: set[Path]) -> None:
    """Removes shared memory that killed processes left, if nobody maps it any more."""
    import psutil

    left = {path for path in memory if path.exists()}
    if not left:
        return
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            left -= {Path(entry.path) for entry in process.memory_maps()}
    for path in left:
        path.unlink(missing_ok=True)
