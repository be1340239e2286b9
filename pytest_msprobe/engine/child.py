# SPDX-License-Identifier: Apache-2.0
"""Records a generation by an engine in a process of its own, in any environment.

Two engines must not live in one process, and variables that decide how numbers are
computed are read when torch and vLLM are imported: so each side of a comparison has
its own process, of this Python or of another one that has another vLLM.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pytest_msprobe.compat import package_path
from pytest_msprobe.config.debugger_config import DebuggerConfig, config_from_json
from pytest_msprobe.errors import EngineError, MsprobeError

_ERROR_LINES = 12


@dataclass(frozen=True, slots=True)
class Job:
    """What a child does.

    Attributes:
        arguments: Of `vllm.LLM`.
        prompts: Of `LLM.generate`: texts, or dicts with `prompt_token_ids`.
        sampling: Fields of `SamplingParams`.
        config: A `DebuggerConfig` as JSON.
        folder: Where the capture goes.
        decode_steps: Decode steps behind the prefill to record.
        test: Node id of the test.
        follow: Prompt hash and tokens of each request of a capture that is followed.
    """

    arguments: dict[str, Any]
    prompts: list[Any]
    sampling: dict[str, Any]
    config: dict[str, Any]
    folder: str
    decode_steps: int
    test: str
    follow: tuple[tuple[str, list[int]], ...] = ()


def record_in_child(
    job: Job, *, python: str | None = None, environment: dict[str, str]
) -> list[Path]:
    """Records in a process of its own.

    Args:
        job: What to record.
        python: Interpreter of the environment, None for this one.
        environment: Variables on top of this process's.

    Returns:
        Capture files by rank.

    Raises:
        EngineError: The child failed; the message holds its last lines.
    """
    folder = Path(job.folder)
    folder.mkdir(parents=True, exist_ok=True)
    order, answer = folder / "job.json", folder / "answer.json"
    answer.unlink(missing_ok=True)
    order.write_text(_as_json(asdict(job)), encoding="utf-8")
    program = python or sys.executable
    with package_path() as path:
        paths = [path, environment.get("PYTHONPATH", os.environ.get("PYTHONPATH"))]
        variables = {
            **os.environ,
            **environment,
            "MSPROBE_ATTACH": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        }
        command = [program, "-m", __name__, str(order), str(answer)]
        try:
            done = subprocess.run(  # noqa: S603 - the user's own interpreter
                command, env=variables, capture_output=True, text=True, check=False
            )
        except OSError as error:
            message = f"python {program!r}: cannot be run ({error.strerror})"
            raise EngineError(message, slug="child-python") from error
    (folder / "child.log").write_text(done.stdout + done.stderr, encoding="utf-8")
    if not answer.is_file():
        last = "\n".join(done.stderr.strip().splitlines()[-_ERROR_LINES:])
        message = f"{program}: exit code {done.returncode} while recording:\n{last}"
        raise EngineError(message, slug="child")
    reply = json.loads(answer.read_text(encoding="utf-8"))
    if "error" in reply:
        message = f"in a process of its own ({program}): {reply['error']}"
        raise EngineError(message, slug="child")
    return [Path(name) for name in reply["files"]]


def _as_json(job: dict[str, Any]) -> str:
    try:
        return json.dumps(job)
    except TypeError as error:
        message = f"cannot be handed to another process: {error}"
        hint = "engine arguments, prompts and sampling are to be plain values"
        raise EngineError(message, slug="child-arguments", hint=hint) from error


def plain_sampling(sampling: Any) -> dict[str, Any]:
    """The fields of a `SamplingParams` that are not the defaults; a dict is kept.

    Another vLLM may lack some of the fields.
    """
    if isinstance(sampling, dict):
        return sampling
    default = type(sampling)()
    names = [name for name in sampling.__struct_fields__ if name[:1] != "_"]
    return {
        name: getattr(sampling, name)
        for name in names
        if getattr(sampling, name) != getattr(default, name)
    }


def _run(job: Job) -> list[str]:
    """In the child: starts the engine, records, ends it; returns the capture files."""
    from pytest_msprobe.engine.client import converse, start_capture, stop_capture
    from pytest_msprobe.engine.launch import start_engine, stop_engine

    llm = start_engine(job.arguments)
    try:
        from vllm import SamplingParams

        config: DebuggerConfig = config_from_json(job.config)
        start = start_capture(
            config,
            Path(job.folder),
            decode_steps=job.decode_steps,
            follow=job.follow,
        )
        converse(llm, start)
        llm.generate(job.prompts, SamplingParams(**job.sampling), use_tqdm=False)
        replies = converse(llm, stop_capture(job.test))
    finally:
        stop_engine(llm)
    return [reply["file"] for reply in replies]


def main(arguments: Sequence[str]) -> int:
    """Carries out a job; the answer goes to a file."""
    order, answer = (Path(name) for name in arguments)
    job = Job(**json.loads(order.read_text(encoding="utf-8")))
    reply: dict[str, Any]
    try:
        reply = {"files": _run(job)}
    except MsprobeError as error:
        reply = {"error": str(error)}
    answer.write_text(json.dumps(reply), encoding="utf-8")
    return int("error" in reply)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
