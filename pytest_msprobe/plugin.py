# SPDX-License-Identifier: Apache-2.0
"""pytest hooks. Loading this module imports none of torch, vllm and numpy."""

import logging
import os
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import pytest

from pytest_msprobe.compat import import_first_folders
from pytest_msprobe.errors import MsprobeError
from pytest_msprobe.session import CALIBRATION, MARKER, SESSION, MsprobeSession

_FIXTURES = {"msprobe", "msprobe_engine"}
# Set by the command pytest-msprobe: a file to note the run folder in.
_POINTER = "MSPROBE_RUN_POINTER"
_LOGGER = "pytest_msprobe"
_MODES = ("new", "failing", "all")


class _LiveWarnings(logging.Handler):
    """Prints what is warned of while a test runs at once: a long capture waits."""

    def __init__(self, config: pytest.Config) -> None:
        super().__init__(logging.WARNING)
        self._plugins = config.pluginmanager

    def emit(self, record: logging.LogRecord) -> None:
        """Prints a line, past pytest's capturing of output."""
        reporter = self._plugins.get_plugin("terminalreporter")
        capturing = self._plugins.get_plugin("capturemanager")
        if reporter is None or capturing is None:
            return
        with capturing.global_and_fixture_disabled():
            reporter.ensure_newline()
            reporter.write_line(record.getMessage(), yellow=True)
            reporter.flush()


_LIVE = pytest.StashKey[_LiveWarnings]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the options of the plugin."""
    group = parser.getgroup("msprobe", "precision regression testing of vLLM models")
    group.addoption(
        "--msprobe-config",
        metavar="FILE",
        help="msProbe config.json, or YAML, or a pyproject.toml with [tool.msprobe], "
        "with capture, engine, tolerances, golden; default: the root's pyproject.toml",
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
    """Fixtures that a test asks for, directly or not, but not while it runs."""
    return set(getattr(item, "fixturenames", ()))


def _session_of(config: pytest.Config) -> MsprobeSession | None:
    return config.stash.get(SESSION, None)


def _own_table(config: pytest.Config) -> str | None:
    """The pyproject.toml of pytest's root, where it holds `[tool.msprobe]`."""
    path = config.rootpath / "pyproject.toml"
    if not path.is_file():
        return None
    from pytest_msprobe.config.toml import has_table

    return str(path) if has_table(path) else None


def _read(config: pytest.Config) -> MsprobeSession | None:
    """The session of a run with a configuration.

    Raises:
        UsageError: The options or the configuration are wrong: one line, exit code 4.
    """
    options = config.known_args_namespace
    path, update = options.msprobe_config, options.msprobe_update
    path = path or _own_table(config)
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
    if os.environ.get(CALIBRATION) and is_ci():
        message = f"{CALIBRATION} is set where CI is: nothing would fail; unset it"
        raise pytest.UsageError(message)
    try:
        settings = read_settings(config.invocation_params.dir / Path(path))
    except MsprobeError as error:
        raise pytest.UsageError(str(error)) from None
    return MsprobeSession(settings, update, config)


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Reads the configuration before any conftest can import torch."""
    import_first_folders()
    session = _read(early_config)
    early_config.stash[SESSION] = session
    if session is not None:
        from pytest_msprobe.engine.launch import (
            prepare_environment,
        )

        changes = session.calibration["env"] if session.calibration else {}
        prepare_environment({**session.settings.engine.environment, **changes})


def pytest_configure(config: pytest.Config) -> None:
    """Registers the marker."""
    config.addinivalue_line(
        "markers",
        f"{MARKER}(level, decode_steps, engine, tolerances): settings of one test",
    )
    if SESSION not in config.stash:  # loaded by -p: the early hook did not run
        config.stash[SESSION] = _read(config)
    if config.stash[SESSION] is not None:
        handler = config.stash[_LIVE] = _LiveWarnings(config)
        logging.getLogger(_LOGGER).addHandler(handler)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Takes back what the run has changed outside itself."""
    if _LIVE in config.stash:
        logging.getLogger(_LOGGER).removeHandler(config.stash[_LIVE])


def pytest_report_header(config: pytest.Config) -> str | None:
    """Says which configuration is used."""
    session = _session_of(config)
    if session is None:
        return None
    text = f"msprobe: {session.settings.path}"
    if session.calibration is not None:
        text += ", calibrating: no verdict fails"
    return f"{text}, updating goldens ({session.update})" if session.update else text


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Sorts tests by the engine they need, so that each engine is started once."""
    session = _session_of(config)
    if session is None:
        return
    if session.calibration is not None and session.calibration["reverse"]:
        items.reverse()
    keys = {}
    for item in items:
        if "msprobe_engine" in _fixture_names(item):
            try:
                keys[item] = session.engine_key(item)
            except MsprobeError:  # said later, if the test is not deselected
                keys[item] = ""
    order = {key: place for place, key in enumerate(dict.fromkeys(keys.values()))}
    places = [index for index, item in enumerate(items) if item in keys]
    sorted_users = sorted(keys, key=lambda item: order[keys[item]])
    for index, item in zip(places, sorted_users, strict=True):
        items[index] = item


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    """Notes that not all tests are run."""
    session = _session_of(items[0].config) if items else None
    if session is not None:
        session.is_selection = True


def pytest_collection_finish(session: pytest.Session) -> None:
    """Checks the settings of the tests that are about to run.

    Raises:
        UsageError: They are wrong, or a test asks for our fixtures and there is no
            configuration: one line, exit code 4.
    """
    users = [item for item in session.items if _FIXTURES & _fixture_names(item)]
    state = _session_of(session.config)
    if state is None:
        if users and not session.config.option.collectonly:
            message = (
                f"{users[0].nodeid} asks for a msprobe fixture and there is no "
                "configuration; add --msprobe-config FILE"
            )
            raise pytest.UsageError(message)
        return
    state.users = {item.nodeid for item in users}
    state.is_selection |= any("::" in argument for argument in session.config.args)
    try:
        for item in session.items:
            if item.nodeid in state.users or item.get_closest_marker(MARKER):
                needs_engine = "msprobe_engine" in _fixture_names(item)
                state.validate(item, needs_engine=needs_engine)
    except MsprobeError as error:
        message = str(error)
    else:
        return
    raise pytest.UsageError(message)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """Judges what the test recorded, once its own code has passed."""
    session = _session_of(item.config)
    try:
        result = yield
        if session is not None:
            session.finish_call(item)
    finally:
        if session is not None:
            session.end_call(item)
    return result


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Writes goldens of tests that passed; shortens our own errors to one line."""
    report = yield
    session = _session_of(item.config)
    if session is None or not session.is_used_by(item):
        return report
    if report.failed and call.excinfo is not None:
        _shorten(item, report, call.excinfo)
    state = session.state_of(item)
    # A part of a test (subtests) has a report of its own, before the test has ended.
    if report.when == "call" and not state.is_ended:
        state.has_failed_parts |= report.failed
    elif report.when == "call" and report.passed and not state.has_failed_parts:
        try:
            session.commit(item)
        except MsprobeError as error:
            report.outcome, report.longrepr = "failed", str(error)
    if report.when == "teardown":
        session.forget(item)
    return report


def _shorten(
    item: pytest.Item,
    report: pytest.TestReport,
    excinfo: pytest.ExceptionInfo[BaseException],
) -> None:
    """Makes an error of ours one line, which pytest's short summary then starts with.

    Args:
        item: The test.
        report: Of one of its phases, which failed.
        excinfo: Why.
    """
    error = excinfo.value
    if isinstance(error, MsprobeError):
        text = "\n".join((str(error), *getattr(error, "__notes__", ())))
        error = pytest.fail.Exception(text, pytrace=False)
        excinfo = pytest.ExceptionInfo.from_exc_info((type(error), error, excinfo.tb))
        report.longrepr = item.repr_failure(excinfo)
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is not None and isinstance(error, pytest.fail.Exception):
        crash.message = crash.message.removeprefix("Failed: ")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Ends the engines and says where the run lies, to a command that asked."""
    state = _session_of(session.config)
    if state is None:
        return
    state.end_run()
    pointer = os.environ.get(_POINTER)
    if pointer:
        Path(pointer).write_text(str(state.run_folder), encoding="utf-8")
    if session.exitstatus == 0 and state.unmatched_rules() and state.is_complete():
        session.exitstatus = pytest.ExitCode.USAGE_ERROR


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Prints the verdicts of tests that passed, what was written, where files lie."""
    state = _session_of(config)
    if state is None or not (state.verdicts or state.written):
        return
    from pytest_msprobe.report.terminal import render_green

    write = terminalreporter.write_line
    terminalreporter.section("msprobe")
    for verdict in state.verdicts:
        if verdict.is_green:
            write(render_green(verdict))
    limit = state.settings.golden.size_warning_bytes
    for path in state.written:
        size = path.stat().st_size
        write(f"golden written: {path} ({size} bytes)")
        if size > limit:
            text = f"more than golden.size_warning_bytes, {limit}; record fewer "
            write(f"WARNING: {path}: {text}decode_steps or level L0", yellow=True)
        if path in state.decalibrated:
            text = "it had been calibrated; run pytest-msprobe calibrate again"
            write(f"WARNING: {path}: {text}", yellow=True)
    for path in state.removed:
        write(f"golden removed: {path}")
    is_complete = state.is_complete()
    for line in state.unmatched_rules():
        if is_complete:
            write(f"ERROR: {line}", red=True)
        else:
            write(f"WARNING: {line}; not all tests were judged", yellow=True)
    write(f"run: {state.run_folder}")
