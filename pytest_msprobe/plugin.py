# SPDX-License-Identifier: Apache-2.0
"""pytest hooks. Loading this module imports none of torch, vllm and numpy."""

import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from pytest_msprobe.errors import MsprobeError
from pytest_msprobe.session import MARKER, SESSION, MsprobeSession

_FIXTURES = {"msprobe", "msprobe_engine"}
# Set by the command pytest-msprobe: a file to note the run folder in.
_POINTER = "MSPROBE_RUN_POINTER"
_MODES = ("new", "failing", "all")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the options of the plugin."""
    group = parser.getgroup("msprobe", "precision regression testing of vLLM models")
    group.addoption(
        "--msprobe-config",
        metavar="FILE",
        help="msProbe config.json, or YAML with capture, engine, tolerances, golden",
    )
    group.addoption(
        "--msprobe-update",
        nargs="?",
        const="failing",
        metavar="new|failing|all",
        help="write goldens: missing ones, also those of failing tests (default), or "
        "all that moved",
    )


def _fixture_names(item: pytest.Item) -> set[str]:
    """Fixtures that a test asks for, directly or not."""
    return set(getattr(item, "fixturenames", ()))


def _read(config: pytest.Config) -> MsprobeSession | None:
    """The session of a run with a configuration.

    Raises:
        UsageError: The options or the configuration are wrong: one line, exit code 4.
    """
    options = config.known_args_namespace
    path, update = options.msprobe_config, options.msprobe_update
    if path is None:
        if update is not None:
            raise pytest.UsageError("--msprobe-update needs --msprobe-config FILE")
        return None
    from pytest_msprobe.config.settings import read_settings
    from pytest_msprobe.golden.guard import is_ci

    if update is not None and update not in _MODES:
        message = (
            f"--msprobe-update={update}: expected one of {', '.join(_MODES)}; name "
            "paths before a bare --msprobe-update"
        )
        raise pytest.UsageError(message)
    if update is not None and is_ci():
        message = (
            "--msprobe-update: goldens are not written where CI is set; update on your "
            "own machine and commit the files"
        )
        raise pytest.UsageError(message)
    try:
        settings = read_settings(config.invocation_params.dir / Path(path))
    except MsprobeError as error:
        raise pytest.UsageError(str(error)) from None
    return MsprobeSession(settings, update, config)


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Reads the configuration before any conftest can import torch."""
    session = _read(early_config)
    early_config.stash[SESSION] = session
    if session is not None:
        from pytest_msprobe.engine.launch import (
            prepare_environment,
        )

        prepare_environment(session.settings.engine.environment)


def pytest_configure(config: pytest.Config) -> None:
    """Registers the marker."""
    config.addinivalue_line(
        "markers",
        f"{MARKER}(level, decode_steps, engine, tolerances): settings of one test",
    )
    if SESSION not in config.stash:  # loaded by -p: the early hook did not run
        config.stash[SESSION] = _read(config)


def pytest_report_header(config: pytest.Config) -> str | None:
    """Says which configuration is used."""
    session = config.stash.get(SESSION, None)
    if session is None:
        return None
    text = f"msprobe: {session.settings.path}"
    return f"{text}, updating goldens ({session.update})" if session.update else text


def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Sorts tests by the engine they need, so that each engine is started once.

    Raises:
        UsageError: A test asks for our fixtures and there is no configuration.
    """
    users = [item for item in items if _FIXTURES & _fixture_names(item)]
    if not users:
        return
    session = config.stash.get(SESSION, None)
    if session is None:
        message = (
            f"{users[0].nodeid} asks for a msprobe fixture and there is no "
            "configuration; add --msprobe-config FILE"
        )
        raise pytest.UsageError(message)
    try:
        keys = {
            item: session.engine_key(item)
            for item in users
            if "msprobe_engine" in _fixture_names(item)
        }
    except MsprobeError as error:
        raise pytest.UsageError(str(error)) from None
    order = {key: place for place, key in enumerate(dict.fromkeys(keys.values()))}
    places = [index for index, item in enumerate(items) if item in keys]
    sorted_users = sorted(keys, key=lambda item: order[keys[item]])
    for index, item in zip(places, sorted_users, strict=True):
        items[index] = item


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """Judges what the test recorded, once its own code has passed."""
    result = yield
    session = item.config.stash.get(SESSION, None)
    if session is not None and _FIXTURES & _fixture_names(item):
        try:
            session.finish_call(item)
        except MsprobeError as error:
            pytest.fail(str(error), pytrace=False)
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Writes goldens of tests that passed; shortens our own errors to one line."""
    report = yield
    session = item.config.stash.get(SESSION, None)
    if session is None or not _FIXTURES & _fixture_names(item):
        return report
    if call.excinfo is not None and isinstance(call.excinfo.value, MsprobeError):
        report.longrepr = str(call.excinfo.value)
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is not None and isinstance(call.excinfo.value, pytest.fail.Exception):  # type: ignore[union-attr]
        # pytest's short summary then starts with the module.
        crash.message = crash.message.removeprefix("Failed: ")
    if report.when == "call" and report.passed:
        try:
            session.commit(item)
        except MsprobeError as error:
            report.outcome, report.longrepr = "failed", str(error)
    if report.when == "call":
        session.abandon(item)
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Ends the engines and says where the run lies, to a command that asked."""
    state = session.config.stash.get(SESSION, None)
    if state is None:
        return
    state.stop_engines()
    pointer = os.environ.get(_POINTER)
    if pointer:
        Path(pointer).write_text(str(state.run_folder), encoding="utf-8")
    if session.exitstatus in (0, 1) and state.unmatched_rules():
        session.exitstatus = pytest.ExitCode.USAGE_ERROR


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Prints the verdicts of tests that passed, what was written, where files lie."""
    state = config.stash.get(SESSION, None)
    if state is None or not (state.verdicts or state.written):
        return
    from pytest_msprobe.report.terminal import render_green

    write = terminalreporter.write_line
    terminalreporter.section("msprobe")
    for verdict in state.verdicts:
        if verdict.is_green:
            write(render_green(verdict))
    for path in state.written:
        write(f"golden written: {path} ({path.stat().st_size} bytes)")
    for line in state.unmatched_rules():
        write(f"ERROR: {line}", red=True)
    write(f"run: {state.run_folder}")
