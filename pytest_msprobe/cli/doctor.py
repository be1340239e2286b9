# SPDX-License-Identifier: Apache-2.0
"""`pytest-msprobe doctor --env`: what runs here and what will not."""

import json
import subprocess
import sys

from pytest_msprobe.errors import EngineError

_MODULE = "pytest_msprobe.engine.doctor"
_TIMEOUT_S = 60


def environment() -> int:
    """Prints versions, device, model runner and what would fail; 1 if anything would.

    Raises:
        EngineError: torch or vLLM cannot be imported.
    """
    try:
        done = subprocess.run(  # noqa: S603 - this interpreter, a module of ours
            [sys.executable, "-W", "ignore", "-m", _MODULE],
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        message = f"importing torch and vLLM took more than {_TIMEOUT_S} s"
        raise EngineError(message, slug="doctor") from error
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        message = f"torch or vLLM cannot be imported: {last}"
        hint = 'run: python -c "import vllm"'
        raise EngineError(message, slug="doctor", hint=hint)
    found = json.loads(done.stdout.splitlines()[-1])
    width = max(len(name) for name in found["facts"])
    for name, value in found["facts"].items():
        print(f"{name:<{width}}  {value}")
    for problem in found["problems"]:
        print(f"PROBLEM: {problem}")
    if not found["problems"]:
        print("captures can be made here")
    return 1 if found["problems"] else 0
