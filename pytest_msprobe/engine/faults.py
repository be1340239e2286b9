# SPDX-License-Identifier: Apache-2.0
"""What is left of a capture whose engine failed, and whether the engine still works."""

import contextlib
import os
from pathlib import Path
from typing import Any

from pytest_msprobe.debugger.progress import LastSeen, read_progress

PROGRESS = ".progress.rank{rank}"


def is_alive(pid: int) -> bool:
    """Whether a process of this machine runs; a zombie does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    with contextlib.suppress(OSError):
        state = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
        return state.rpartition(")")[2].split()[0] not in ("Z", "X")
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
    resources = getattr(client, "resources", None)
    if getattr(resources, "engine_dead", False):
        return False
    core = getattr(client, "engine_core", None)
    executor = getattr(core, "model_executor", None)
    if getattr(executor, "is_failed", False):
        return False
    try:
        return not engine.has_unfinished_requests()  # type: ignore[union-attr]
    except Exception:  # noqa: BLE001 - an engine that cannot tell is not usable
        return False
