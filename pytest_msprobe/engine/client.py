# SPDX-License-Identifier: Apache-2.0
"""Starts and stops captures on an engine from the test's side."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pytest_msprobe.config.debugger_config import DebuggerConfig
from pytest_msprobe.errors import CaptureError, EngineError

METHOD = "msprobe_control"


def call_workers(llm: Any, action: str, **arguments: Any) -> list[dict[str, Any]]:
    """Asks every worker to do something; one reply a rank.

    Raises:
        EngineError: The workers have no control method, or a rank reports an error.
    """
    payload = json.dumps({"action": action, **arguments})
    try:
        replies = llm.collective_rpc(METHOD, args=(payload,))
    except Exception as error:
        if METHOD in str(error):
            message = "the engine's workers do not listen to pytest-msprobe"
            hint = (
                "start the engine after pytest has loaded --msprobe-config (or with "
                'MSPROBE_ATTACH=1), and let VLLM_PLUGINS, if set, name "msprobe"'
            )
            raise EngineError(message, slug="not-attached", hint=hint) from error
        raise
    for rank, reply in enumerate(replies):
        if not reply.get("ok"):
            message = f"rank {reply.get('rank', rank)}: {reply.get('error')}"
            raise CaptureError(message, slug=str(reply.get("slug", "worker")))
    return list(replies)


def start_capture(
    llm: Any, config: DebuggerConfig, folder: Path, *, decode_steps: int
) -> None:
    """Starts a capture on every rank.

    Raises:
        CaptureError: A rank could not start, or no rank is selected.
    """
    folder.mkdir(parents=True, exist_ok=True)
    replies = call_workers(
        llm,
        "start",
        config=asdict(config),
        folder=str(folder),
        decode_steps=decode_steps,
    )
    if not any(reply.get("recording") for reply in replies):
        ranks = [reply.get("rank") for reply in replies]
        message = (
            f"rank {list(config.rank)} selects none of this engine's ranks {ranks}"
        )
        raise CaptureError(
            message, slug="no-rank", hint="change rank, or leave it empty"
        )


def stop_capture(llm: Any, test: str) -> list[dict[str, Any]]:
    """Ends a capture on every rank; the replies of those that recorded, by rank.

    Raises:
        CaptureError: Recording failed, or nothing was recorded.
    """
    replies = call_workers(llm, "stop", test=test)
    recorded = [reply for reply in replies if reply.get("recording")]
    for reply in recorded:
        if not reply.get("rows"):
            message = (
                f"rank {reply['rank']} recorded no row in {reply.get('steps', 0)} steps"
            )
            hint = "generate inside the capture; check step, scope and list"
            raise CaptureError(message, slug="empty-capture", hint=hint)
    return sorted(recorded, key=lambda reply: int(reply["rank"]))
