# SPDX-License-Identifier: Apache-2.0
"""`pytest-msprobe doctor`: proves that the gate sees faults, or what runs here.

The engine is started in a process of its own; this one imports neither torch nor vLLM.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from pytest_msprobe.cli.explain import find_config
from pytest_msprobe.compat import package_path
from pytest_msprobe.config.settings import read_settings
from pytest_msprobe.errors import ConfigError, EngineError

FINDING = 1
_REPORT_MODULE = "pytest_msprobe.engine.doctor"
_TRIAL_MODULE = "pytest_msprobe.engine.trial"
_TIMEOUT_S = 60
_LAST_LINES = 12


@dataclass(frozen=True, slots=True)
class Options:
    """What is asked for.

    Attributes:
        config: The configuration file, None for the one in this folder.
        faults: Kinds of fault, separated by commas; None for all.
        places: Places of each kind.
        runs: Clean runs that must pass.
        power: Relative L2 change that must be caught, None for the stated power.
        seed: Of the choice of places and prompts.
        is_quick: Whether the smallest size that is caught is not searched for.
        is_json: Whether to print JSON.
    """

    config: str | None = None
    faults: str | None = None
    places: int = 1
    runs: int = 3
    power: float | None = None
    seed: int = 0
    is_quick: bool = False
    is_json: bool = False


@dataclass(slots=True)
class Examination:
    """What was found.

    Attributes:
        begin: Model, level, power.
        clean: Clean runs.
        faults: Faults that were tried.
        absent: Faults that could not be planted.
    """

    begin: dict[str, Any] = field(default_factory=dict)
    clean: list[dict[str, Any]] = field(default_factory=list)
    faults: list[dict[str, Any]] = field(default_factory=list)
    absent: list[dict[str, Any]] = field(default_factory=list)

    def problems(self) -> list[str]:
        """What makes the doctor fail, a line each."""
        found = [
            f"clean run {run['run']} did not pass: {_why(run)}"
            for run in self.clean
            if run["status"] not in ("pass", "changed")
        ]
        power = float(self.begin.get("power", 0.0))
        for fault in self.faults:
            missed = fault["missed"]
            if missed is not None:
                found.append(
                    f"{fault['fault']} in {fault['module']}, size {missed['size']:.3g}:"
                    f" moved its tensor by {float(missed['moved']):.2g}, above the "
                    f"power {power:.2g}, and was not caught"
                )
        if not any(fault["is_above"] for fault in self.faults):
            found.append(
                f"no fault moved its tensor by {power:.2g} or more: nothing is proven"
            )
        return found


def _why(run: dict[str, Any]) -> str:
    named = f"{run['metric']} in {run['named']}" if run["metric"] else ""
    return "; ".join(filter(None, [named, run["why"]])) or run["status"]


def examine(options: Options) -> int:
    """Plants faults into the configured engine; prints what the gate saw of them.

    Returns:
        0; 1 where a fault above the stated power was not caught, a clean run did not
        pass, or no fault could be planted.

    Raises:
        ConfigError: The configuration or an option is wrong.
        EngineError: The engine could not be started.
    """
    path = find_config(options.config)
    variables = read_settings(path).engine.environment
    if options.places < 1 or options.runs < 0:
        message = "doctor: --places: expected 1 or more, --runs: 0 or more"
        raise ConfigError(message, slug="doctor-options")
    order = {
        "config": str(path.resolve()),
        "faults": [name for name in (options.faults or "").split(",") if name],
        "places": options.places,
        "runs": options.runs,
        "power": options.power,
        "seed": options.seed,
        "has_search": not options.is_quick,
    }
    found = Examination()
    for record in _records(order, variables):
        event = record.pop("event")
        if event == "begin":
            found.begin = record
        elif event == "clean":
            found.clean.append(record)
        elif event == "fault":
            found.faults.append(record)
        elif event == "absent":
            found.absent.append(record)
        elif event == "error":
            raise EngineError(record["error"], slug="doctor")
        if not options.is_json:
            _print(event, record)
    problems = found.problems()
    if options.is_json:
        print(json.dumps({**asdict(found), "problems": problems}, indent=1))
    else:
        _print_result(found, problems)
    return FINDING if problems else 0


def _records(
    order: dict[str, Any], variables: dict[str, str]
) -> Iterator[dict[str, Any]]:
    """What the process with the engine tells, as it comes.

    Raises:
        EngineError: It ended before it was done.
    """
    reading, writing = os.pipe()
    with package_path() as folder, tempfile.TemporaryFile() as log:
        inherited = variables.get("PYTHONPATH", os.environ.get("PYTHONPATH"))
        paths = os.pathsep.join(filter(None, [folder, inherited]))
        environment = {**os.environ, **variables, "PYTHONPATH": paths}
        command = [sys.executable, "-W", "ignore", "-m", _TRIAL_MODULE]
        child = subprocess.Popen(  # noqa: S603 - this interpreter, a module of ours
            [*command, json.dumps(order), str(writing)],
            env=environment,
            stdout=log,
            stderr=log,
            pass_fds=(writing,),
        )
        os.close(writing)
        is_done = False
        try:
            with os.fdopen(reading, encoding="utf-8") as stream:
                for line in stream:
                    record = json.loads(line)
                    is_done = record["event"] in ("end", "error")
                    yield record
                    if is_done:
                        break
        finally:
            if not is_done:
                child.terminate()
            child.wait()
        if not is_done:
            log.seek(0)
            lines = log.read().decode(errors="replace").strip().splitlines()
            last = "\n".join(lines[-_LAST_LINES:])
            message = f"the doctor's engine ended with code {child.returncode}:\n{last}"
            raise EngineError(message, slug="doctor")


def _print(event: str, record: dict[str, Any]) -> None:
    if event == "begin":
        print(
            f"{record['model']}, {record['dtype']}, level {record['level']}; faults "
            f"that move a row by {record['power']:.2g} or more have to be caught"
        )
    elif event == "clean":
        text = f"{record['equal']} of {record['judged']} rows equal"
        print(f"clean run {record['run']}: {record['status']}, {text}", flush=True)
    elif event == "absent":
        print(f"{record['fault']}: not planted: {record['why']}", flush=True)
    elif event == "fault":
        for line in _describe(record):
            print(line, flush=True)


def _describe(record: dict[str, Any]) -> Iterator[str]:
    """Lines on one fault."""
    first, smallest = record["first"], record["smallest"]
    between = f", before {record['between']}" if record["between"] else ""
    moved = f"moved {float(first['moved']):.2g}"
    yield f"{record['fault']}: {record['text']} in {record['module']}{between}: {moved}"
    if first["is_caught"]:
        where = "right" if record["is_right"] else "WRONG"
        named = first["named"] or "no module"
        yield f"    caught by {first['metric']}, named {named} ({where})"
    elif record["is_above"]:
        yield "    NOT CAUGHT"
    else:
        yield "    not caught; below the power"
    if smallest is not None and smallest["size"] != first["size"]:
        moved = f"moves {float(smallest['moved']):.2g}"
        least = min(attempt["size"] for attempt in record["attempts"])
        more = ", the smallest tried" if smallest["size"] == least else ""
        yield f"    smallest caught: {smallest['size']:.3g}{more}, {moved}"


def _print_result(found: Examination, problems: list[str]) -> None:
    above = [fault for fault in found.faults if fault["is_above"]]
    caught = [fault for fault in above if fault["first"]["is_caught"]]
    right = [fault for fault in caught if fault["is_right"]]
    print(
        f"doctor: {len(caught)} of {len(above)} faults above the power caught, "
        f"{len(right)} named at the right module; "
        f"{len(found.faults) - len(above)} below the power; "
        f"{len(found.absent)} not planted"
    )
    for problem in problems:
        print(f"PROBLEM: {problem}")
    if problems:
        print("a rule that allows too much? state another power with --power")
    else:
        print("the gate is alive")


def environment() -> int:
    """Prints versions, device, model runner and what would fail; 1 if anything would.

    Raises:
        EngineError: torch or vLLM cannot be imported.
    """
    try:
        done = subprocess.run(  # noqa: S603 - this interpreter, a module of ours
            [sys.executable, "-W", "ignore", "-m", _REPORT_MODULE],
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
