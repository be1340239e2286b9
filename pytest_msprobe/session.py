# SPDX-License-Identifier: Apache-2.0
"""The state of one pytest run: settings, engines, captures, verdicts.

Importing this module is cheap; what is heavy is imported where it is used.
"""

import json
import os
import shlex
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import pytest

from pytest_msprobe.errors import CaptureError, ConfigError, MsprobeError

if TYPE_CHECKING:
    from pytest_msprobe.config.settings import Settings
    from pytest_msprobe.dump.capture import CaptureFile
    from pytest_msprobe.golden.guard import UpdateMode
    from pytest_msprobe.model.limits import Rule
    from pytest_msprobe.model.verdict import Verdict

SESSION = pytest.StashKey["MsprobeSession | None"]()
MARKER = "msprobe"
_MARKER_KEYS = ("level", "decode_steps", "engine", "tolerances")


@dataclass(slots=True)
class Capture:
    """What one `with msprobe.capture(llm)` block records.

    Attributes:
        name: Empty for a test's first capture, else its name.
        folder: Where its files lie.
        files: Capture files by rank, once it has ended.
        is_checked: Whether it has been judged.
    """

    session: "MsprobeSession"
    item: pytest.Item
    llm: Any
    name: str
    folder: Path
    files: list[Path] = field(default_factory=list)
    is_checked: bool = False
    is_open: bool = False

    def __enter__(self) -> Self:
        """Starts recording."""
        from pytest_msprobe.engine.client import start_capture

        options = self.session.options_of(self.item)
        start_capture(
            self.llm,
            options.config,
            self.folder,
            decode_steps=options.decode_steps,
        )
        self.is_open = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Ends recording; an error of the block is not hidden by one of ours."""
        try:
            self.close()
        except MsprobeError:
            if error is None:
                raise

    def close(self) -> None:
        """Ends recording and notes the files."""
        from pytest_msprobe.engine.client import stop_capture

        if not self.is_open:
            return
        self.is_open = False
        replies = stop_capture(self.llm, self.item.nodeid)
        self.files = [Path(reply["file"]) for reply in replies]

    def check(self) -> None:
        """Judges the capture against its golden.

        Raises:
            Failed: pytest's failure, with the verdict as its message.
        """
        self.session.check(self)


@dataclass(frozen=True, slots=True)
class TestOptions:
    """Settings of one test: the configuration with its marker on top."""

    __test__ = False

    config: Any
    decode_steps: int
    engine: dict[str, Any]
    rules: tuple["Rule", ...]


@dataclass(slots=True)
class TestState:
    """What one running test has done so far."""

    __test__ = False

    captures: list[Capture] = field(default_factory=list)
    pending: list[tuple[Path, bytes]] = field(default_factory=list)


class MsprobeSession:
    """State of one pytest run with a configuration.

    Attributes:
        settings: The configuration.
        update: Which goldens are written, None for none.
        verdicts: All verdicts so far.
        written: Goldens written.
    """

    def __init__(
        self, settings: "Settings", update: "UpdateMode | None", config: pytest.Config
    ) -> None:
        self.settings = settings
        self.update = update
        self.verdicts: list[Verdict] = []
        self.written: list[Path] = []
        self._config = config
        self._states: dict[str, TestState] = {}
        self._engines: dict[str, Any] = {}
        self._unmatched: dict[str, Rule] = {}
        self._matched: set[str] = set()
        self._row_names: list[str] = []
        stamp = time.strftime("%Y%m%d-%H%M%S")
        self.run_folder = self._runs_root() / f"{stamp}-{os.getpid()}"

    def _runs_root(self) -> Path:
        path = self.settings.capture.dump_path
        if path is not None:
            return Path(path)
        return self.settings.root / ".msprobe" / "runs"

    # Tests ---------------------------------------------------------------------

    def state_of(self, item: pytest.Item) -> TestState:
        """State of a running test."""
        return self._states.setdefault(item.nodeid, TestState())

    def options_of(self, item: pytest.Item) -> TestOptions:
        """Settings of a test.

        Raises:
            ConfigError: Its marker has an unknown key or a wrong value.
        """
        from dataclasses import replace

        from pytest_msprobe.config.debugger_config import LEVELS

        config = self.settings.capture
        steps = self.settings.golden.decode_steps
        engine = dict(self.settings.engine.arguments)
        rules = list(self.settings.rules)
        for marker in reversed(list(item.iter_markers(MARKER))):
            where = f"{item.nodeid}: @pytest.mark.msprobe"
            if marker.args:
                message = f"{where}: expected keyword arguments"
                raise ConfigError(message, slug="marker")
            for key, value in marker.kwargs.items():
                if key not in _MARKER_KEYS:
                    known = ", ".join(_MARKER_KEYS)
                    message = f"{where}: {key}: unknown key; known: {known}"
                    raise ConfigError(message, slug="marker")
                if key == "level":
                    if value not in LEVELS:
                        message = f"{where}: level {value!r}: expected one of {LEVELS}"
                        raise ConfigError(message, slug="marker")
                    config = replace(config, level=value)
                elif key == "decode_steps":
                    steps = _check_steps(value, where)
                elif key == "engine":
                    engine.update(_check_mapping(value, f"{where}: engine"))
                else:
                    rules.append(_marker_rule(item, value, where))
        return TestOptions(config, steps, engine, tuple(rules))

    def new_capture(self, item: pytest.Item, llm: Any, name: str | None) -> Capture:
        """A capture for a test; the second and later ones of a test need names."""
        captures = self.state_of(item).captures
        if name is None:
            name = "" if not captures else f"capture{len(captures) + 1}"
        if any(capture.name == name for capture in captures):
            message = f"{item.nodeid}: capture {name!r}: this name is taken"
            raise CaptureError(message, slug="capture-name")
        folder = self.run_folder.joinpath(*self._place(item, name))
        capture = Capture(self, item, llm, name, folder)
        captures.append(capture)
        return capture

    def _place(self, item: pytest.Item, name: str) -> list[str]:
        """Test file and test name, as folder names below a root."""
        from pytest_msprobe.golden.variants import safe_name

        path = Path(os.path.relpath(item.path, self.settings.root))
        test = item.nodeid.partition("::")[2].replace("::", ".")
        test = f"{test}@{name}" if name else test
        return [*(p for p in path.parts if p not in ("..", "/")), safe_name(test)]

    def finish_call(self, item: pytest.Item) -> None:
        """After the test's own code has passed: judges what it did not judge itself."""
        for capture in self.state_of(item).captures:
            capture.close()
            if not capture.is_checked:
                self.check(capture)

    def abandon(self, item: pytest.Item) -> None:
        """Ends captures that a failed test left open."""
        import contextlib

        state = self._states.pop(item.nodeid, None)
        for capture in state.captures if state else ():
            with contextlib.suppress(Exception):
                capture.close()

    def commit(self, item: pytest.Item) -> None:
        """Writes the goldens of a test that has passed."""
        from pytest_msprobe.golden.store import write_bytes

        state = self.state_of(item)
        for path, content in state.pending:
            write_bytes(path, content, self.settings.root / ".msprobe" / "locks")
            self.written.append(path)
        state.pending.clear()

    # Engines -------------------------------------------------------------------

    def engine_key(self, item: pytest.Item) -> str:
        """Which engine a test needs: its arguments as text."""
        engine = self.options_of(item).engine
        return json.dumps(engine, sort_keys=True, default=str)

    def engine(self, item: pytest.Item) -> Any:
        """The engine of a test; another one that is live is ended first."""
        from pytest_msprobe.engine.launch import engine_arguments, start_engine

        key = self.engine_key(item)
        if key not in self._engines:
            where = f"{self.settings.path}: engine"
            arguments = engine_arguments(self.options_of(item).engine, where)
            self.stop_engines()
            self._engines[key] = start_engine(arguments)
        return self._engines[key]

    def stop_engines(self) -> None:
        """Ends all engines."""
        from pytest_msprobe.engine.launch import stop_engine

        while self._engines:
            _, llm = self._engines.popitem()
            stop_engine(llm)

    # Verdicts ------------------------------------------------------------------

    def check(self, capture: Capture) -> None:
        """Judges a capture; in an update run also decides whether to write a golden.

        Raises:
            Failed: pytest's failure, with the verdict as its message.
        """
        from pytest_msprobe.dump.capture import read_capture
        from pytest_msprobe.golden.guard import is_written
        from pytest_msprobe.report.record import write_verdict
        from pytest_msprobe.report.terminal import render_failure

        if capture.is_open:
            message = f"{capture.item.nodeid}: check() inside its capture block"
            raise CaptureError(
                message, slug="open-capture", hint="check after the block"
            )
        if not capture.files:
            message = f"{capture.item.nodeid}: the capture has no files to judge"
            raise CaptureError(message, slug="empty-capture")
        capture.is_checked = True
        failures = []
        for path in capture.files:
            recorded = read_capture(path)
            verdict = self._judge(capture, recorded)
            self.verdicts.append(verdict)
            suffix = f".rank{verdict.rank}" if verdict.rank else ""
            write_verdict(verdict, capture.folder / f"verdict{suffix}.json")
            if self.update is not None and is_written(self.update, verdict.status):
                self._prepare_golden(capture, recorded)
            elif not verdict.is_green:
                failures.append(verdict)
        if failures:
            command = self.update_command(capture.item, failures[0])
            text = render_failure(failures[0], update_command=command)
            pytest.fail(text, pytrace=False)

    def _judge(self, capture: Capture, recorded: "CaptureFile") -> "Verdict":
        from pytest_msprobe.compare.judge import judge
        from pytest_msprobe.dump.capture import read_capture
        from pytest_msprobe.golden.variants import choose, file_name
        from pytest_msprobe.model.verdict import Verdict

        header = recorded.header
        folder = self._golden_folder(capture)
        choice = choose(folder, header.key, header.rank)
        if choice.path is None:
            return Verdict(
                test=capture.item.nodeid,
                status="missing",
                golden=str(folder / file_name(header.key, header.rank)),
                capture=str(recorded.path),
                key=header.key,
                rank=header.rank,
            )
        rules = self.options_of(capture.item).rules
        judgement = judge(read_capture(choice.path), recorded, rules)
        self._note_rules(rules, judgement.unmatched, judgement.names)
        return judgement.verdict

    def _golden_folder(self, capture: Capture) -> Path:
        place = self._place(capture.item, capture.name)
        return self.settings.golden.directory.joinpath(*place)

    def _prepare_golden(self, capture: Capture, recorded: "CaptureFile") -> None:
        from pytest_msprobe.golden.store import golden_bytes
        from pytest_msprobe.golden.variants import file_name

        header = recorded.header
        path = self._golden_folder(capture) / file_name(header.key, header.rank)
        content = golden_bytes(recorded, capture.item.nodeid, header.key)
        self.state_of(capture.item).pending.append((path, content))

    def update_command(self, item: pytest.Item, verdict: "Verdict") -> str:
        """The exact command that writes a test's golden."""
        mode = "new" if verdict.status == "missing" else "failing"
        path = os.path.relpath(self.settings.path, self._config.invocation_params.dir)
        node = item.nodeid
        parts = ["pytest", "--msprobe-config", path, f"--msprobe-update={mode}", node]
        return shlex.join(parts)

    def _note_rules(
        self, rules: tuple["Rule", ...], unmatched: list["Rule"], names: list[str]
    ) -> None:
        missing = {rule.origin for rule in unmatched}
        self._matched.update(
            rule.origin for rule in rules if rule.origin not in missing
        )
        self._unmatched.update({rule.origin: rule for rule in unmatched})
        self._row_names = names or self._row_names

    def unmatched_rules(self) -> list[str]:
        """One line for each rule whose glob matched no row of any test."""
        from pytest_msprobe.compare.tolerance import unmatched_error

        return [
            str(unmatched_error(rule, self._row_names))
            for origin, rule in self._unmatched.items()
            if origin not in self._matched
        ]


def _check_steps(value: Any, where: str) -> int:
    if value == "all":
        return -1
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        message = f"{where}: decode_steps {value!r}: expected a number >= 0 or 'all'"
        raise ConfigError(message, slug="marker")
    return value


def _check_mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        message = f"{where}: expected a dict, found {value!r}"
        raise ConfigError(message, slug="marker")
    return value


def _marker_rule(item: pytest.Item, value: Any, where: str) -> "Rule":
    from pytest_msprobe.model.limits import LIMIT_NAMES, Rule

    limits = _check_mapping(value, f"{where}: tolerances")
    for name, limit in limits.items():
        if name not in LIMIT_NAMES:
            known = ", ".join(LIMIT_NAMES)
            message = f"{where}: tolerances: {name}: unknown metric; known: {known}"
            raise ConfigError(message, slug="marker")
        if isinstance(limit, bool) or not isinstance(limit, int | float) or limit < 0:
            message = f"{where}: tolerances: {name}: expected a number >= 0"
            raise ConfigError(message, slug="marker")
    line = item.location[1]
    origin = f"{Path(item.location[0]).name}:{(line or 0) + 1}"
    return Rule(origin, limits={name: float(limit) for name, limit in limits.items()})
