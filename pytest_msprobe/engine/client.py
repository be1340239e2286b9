# SPDX-License-Identifier: Apache-2.0
"""Starts and stops captures on an engine from the test's side.

An engine is anything with `collective_rpc`: `vllm.LLM`, `LLMEngine`, or `AsyncLLM`,
whose calls are awaited. Each action is written once, as a generator that yields the
calls to make and is sent their replies.
"""

import inspect
import json
import os
from collections.abc import Generator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pytest_msprobe.config.debugger_config import DebuggerConfig
from pytest_msprobe.engine.faults import reply_of
from pytest_msprobe.engine.preflight import attach_problem, check_folder
from pytest_msprobe.errors import CaptureError, EngineError

METHOD = "msprobe_control"
# A conversation with the workers: yields (method, arguments), is sent the replies.
Conversation = Generator[tuple[str, tuple[Any, ...]], list[Any], Any]


def is_async(llm: Any) -> bool:
    """Whether an engine's calls are to be awaited."""
    return inspect.iscoroutinefunction(getattr(llm, "collective_rpc", None))


def converse(llm: Any, conversation: Conversation) -> Any:
    """Carries out a conversation with an engine whose calls block.

    Raises:
        EngineError: The engine is an asynchronous one.
    """
    if is_async(llm):
        conversation.close()
        message = f"{type(llm).__name__} is asynchronous"
        hint = "write: async with msprobe.capture(engine)"
        raise EngineError(message, slug="async-engine", hint=hint)
    try:
        method, arguments = next(conversation)
        while True:
            replies = llm.collective_rpc(method, args=arguments)
            method, arguments = conversation.send(replies)
    except StopIteration as end:
        return end.value


async def converse_async(llm: Any, conversation: Conversation) -> Any:
    """Carries out a conversation with an engine, awaiting what can be awaited."""
    try:
        method, arguments = next(conversation)
        while True:
            replies = llm.collective_rpc(method, args=arguments)
            if inspect.isawaitable(replies):
                replies = await reply_of(llm, replies)
            method, arguments = conversation.send(replies)
    except StopIteration as end:
        return end.value


def ask_workers(action: str, **arguments: Any) -> Conversation:
    """Asks every worker to do something; returns one reply a rank.

    Raises:
        CaptureError: A rank reports an error.
    """
    payload = json.dumps({"action": action, **arguments})
    replies = yield METHOD, (payload,)
    for rank, reply in enumerate(replies):
        if not reply.get("ok"):
            where = f"rank {reply.get('rank', rank)}: " if len(replies) > 1 else ""
            message = f"{where}{reply.get('error')}"
            raise CaptureError(message, slug=str(reply.get("slug", "worker")))
    return list(replies)


def check_attached() -> Conversation:
    """Checks that the workers have the control method.

    Asked by a method that every object has: one that is missing would raise, and with
    tensor parallelism a raising call leaves stale replies behind.

    Raises:
        EngineError: Some worker has not; the message says why and what to do.
    """
    replies = yield "__dir__", ()
    if all(METHOD in names for names in replies):
        return
    problem = attach_problem()
    if problem is not None:
        raise problem
    message = "the engine was started before pytest-msprobe was asked to attach"
    hint = (
        "start it after pytest has read --msprobe-config, or with MSPROBE_ATTACH=1 in "
        'its environment, or with additional_config={"msprobe": {}}'
    )
    raise EngineError(message, slug="not-attached", hint=hint)


def start_capture(
    config: DebuggerConfig,
    folder: Path,
    *,
    decode_steps: int,
    follow: Sequence[tuple[str, list[int]]] = (),
) -> Conversation:
    """Starts a capture on every rank.

    Args:
        config: What to record.
        folder: Where the files go.
        decode_steps: Decode steps behind the prefill to record.
        follow: Prompt hash and tokens of each request of another capture, by label,
            which are fed back in place of what is sampled.

    Raises:
        CaptureError: A rank could not start, or no rank is selected.
        EngineError: The workers do not listen, or the engine cannot be captured.
    """
    check_folder(folder)
    yield from check_attached()
    try:
        replies = yield from ask_workers(
            "start",
            config=asdict(config),
            folder=str(folder.resolve()),
            decode_steps=decode_steps,
            client=os.getpid(),
            **({"follow": list(follow)} if follow else {}),
        )
    except CaptureError:
        # Ranks that did start must not go on recording.
        yield from ask_workers("abandon", folder=str(folder.resolve()))
        raise
    if not any(reply.get("recording") for reply in replies):
        ranks = [reply.get("rank") for reply in replies]
        message = (
            f"rank {list(config.rank)} selects none of this engine's ranks {ranks}"
        )
        raise CaptureError(
            message, slug="no-rank", hint="change rank, or leave it empty"
        )


def stop_capture(test: str) -> Conversation:
    """Ends a capture on every rank; returns the replies of those that recorded.

    Raises:
        CaptureError: Recording failed, nothing was recorded, or the ranks recorded
            different steps.
    """
    replies = yield from ask_workers("stop", test=test)
    recorded = [reply for reply in replies if reply.get("recording")]
    for reply in recorded:
        if not reply.get("rows"):
            message = (
                f"rank {reply['rank']} recorded no row in {reply.get('steps', 0)} steps"
            )
            hint = "generate inside the capture; check step, scope and list"
            raise CaptureError(message, slug="empty-capture", hint=hint)
    recorded.sort(key=lambda reply: int(reply["rank"]))
    steps = {int(reply["rank"]): int(reply["steps"]) for reply in recorded}
    if len(set(steps.values())) > 1:
        text = ", ".join(f"rank {rank}: {count}" for rank, count in steps.items())
        message = f"the ranks recorded different numbers of steps ({text})"
        hint = "a step counts when all ranks have written it; run again"
        raise CaptureError(message, slug="ranks-differ", hint=hint)
    return recorded
