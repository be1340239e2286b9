# SPDX-License-Identifier: Apache-2.0
"""What is left of a capture whose engine failed, and whether the engine still works."""

import asyncio
import contextlib
import os
import threading
from collections.abc import Awaitable
from concurrent.futures import Future, InvalidStateError
from pathlib import Path
from typing import Any

from pytest_msprobe.debugger.progress import LastSeen, read_progress

PROGRESS = ".progress.rank{rank}"
_WATCH_SECONDS = 0.25
_EXITING = 0x4  # PF_EXITING of the kernel's task flags


def is_alive(pid: int) -> bool:
    """Whether a process of this machine runs; one on its way out does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    with contextlib.suppress(OSError):
        state = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
        fields = state.rpartition(")")[2].split()
        return fields[0] not in ("Z", "X") and not int(fields[6]) & _EXITING
    return True


def describe_ranks(folder: Path) -> list[str]:
    """One line for each rank that did not end its capture, the first to stop first.

    Args:
        folder: Of the capture.
    """
    found: list[tuple[LastSeen, int]] = []
    for path in folder.glob(PROGRESS.format(rank="*")):
        with contextlib.suppress(OSError, ValueError):
            found.append((read_progress(path), int(path.name.rpartition("rank")[2])))
    found.sort(key=lambda item: item[0].when)
    return [_describe(rank, seen) for seen, rank in found]


def _describe(rank: int, seen: LastSeen) -> str:
    state = "is alive" if is_alive(seen.pid) else "died"
    if seen.step is None:
        return f"rank {rank} (process {seen.pid}) {state}, before its first step"
    call = f"last call {seen.call}" if seen.call else "before the first call"
    return f"rank {rank} (process {seen.pid}) {state} in step {seen.step}, {call}"


def clear_progress(folder: Path) -> None:
    """Removes what dead ranks noted."""
    for path in folder.glob(PROGRESS.format(rank="*")):
        path.unlink(missing_ok=True)


def is_core_dead(llm: Any) -> bool:
    """Whether an engine's core in another process has died.

    Args:
        llm: A `vllm.LLM` or `AsyncLLM`.
    """
    client = getattr(getattr(llm, "llm_engine", llm), "engine_core", None)
    return bool(getattr(getattr(client, "resources", None), "engine_dead", False))


def is_usable(llm: Any) -> bool:
    """Whether an engine can take the next test's requests.

    Not if it or one of its workers has died, or if it still holds requests: an
    exception in the middle of a step leaves them, and the model runner between two of
    its calls.

    Args:
        llm: A `vllm.LLM`.
    """
    engine = getattr(llm, "llm_engine", None)
    client = getattr(engine, "engine_core", None)
    if is_core_dead(llm):
        return False
    core = getattr(client, "engine_core", None)
    executor = getattr(core, "model_executor", None)
    if getattr(executor, "is_failed", False):
        return False
    try:
        return not engine.has_unfinished_requests()  # type: ignore[union-attr]
    except Exception:  # noqa: BLE001 - an engine that cannot tell is not usable
        return False


async def reply_of(llm: Any, call: Awaitable[Any]) -> Any:
    """Awaits the reply of an asynchronous engine.

    For a core that has been killed vLLM itself would wait for ever.

    Args:
        llm: An `AsyncLLM`.
        call: What its method returned.

    Raises:
        EngineDeadError: VLLM's error; its core has died.
    """
    task = asyncio.ensure_future(call)
    try:
        while not (await asyncio.wait({task}, timeout=_WATCH_SECONDS))[0]:
            if is_core_dead(llm):
                from vllm.v1.engine.exceptions import EngineDeadError

                raise EngineDeadError
        return task.result()
    finally:
        task.cancel()


class EngineWatch:
    """Wakes a test that waits for an engine whose core has been killed.

    vLLM's blocking client notices that its core has gone and goes on waiting for it,
    for tokens or for the reply to a call; the error that it would raise is put where it
    waits. Engines without a core in another process, and asynchronous ones, need none
    of this.
    """

    def __init__(self, llm: Any) -> None:
        """Watches from now on.

        Args:
            llm: A `vllm.LLM`.
        """
        client = getattr(getattr(llm, "llm_engine", None), "engine_core", None)
        self._resources = getattr(client, "resources", None)
        self._queue = getattr(client, "outputs_queue", None)
        self._calls: dict[Any, Future[Any]] = getattr(client, "utility_results", {})
        self._end = threading.Event()
        if self._resources is not None and hasattr(self._queue, "put_nowait"):
            name = "msprobe-engine-watch"
            threading.Thread(target=self._run, name=name, daemon=True).start()

    def _run(self) -> None:
        while not self._end.wait(_WATCH_SECONDS):
            if getattr(self._resources, "engine_dead", False):
                from vllm.v1.engine.exceptions import EngineDeadError

                self._queue.put_nowait(EngineDeadError())  # type: ignore[union-attr]
                for call in list(self._calls.values()):
                    with contextlib.suppress(InvalidStateError):
                        call.set_exception(EngineDeadError())
                return

    def stop(self) -> None:
        """Watches no more."""
        self._end.set()
