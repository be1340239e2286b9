# SPDX-License-Identifier: Apache-2.0
"""The state of one pytest run: settings, engines, captures, verdicts.

Importing this module is cheap; what is heavy is imported where it is used.
"""

import contextlib
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import pytest

from pytest_msprobe.compat import CAPTURE_VARIABLE
from pytest_msprobe.errors import CaptureError, ConfigError

if TYPE_CHECKING:
    from pytest_msprobe.config.settings import Settings
    from pytest_msprobe.dump.capture import CaptureFile
    from pytest_msprobe.engine.client import Conversation
    from pytest_msprobe.engine.faults import EngineWatch
    from pytest_msprobe.golden.guard import UpdateMode
    from pytest_msprobe.model.limits import KeyMode, Rule
    from pytest_msprobe.model.verdict import Verdict

SESSION = pytest.StashKey["MsprobeSession | None"]()
MARKER = "msprobe"
# How what is added to an error of a dead engine begins.
NOTE = "msprobe: "
# Set by the command pytest-msprobe calibrate.
CALIBRATION = "MSPROBE_CALIBRATION"
_PACKAGE = "pytest_msprobe."
_MARKER_KEYS = ("level", "decode_steps", "engine", "tolerances", "teacher_forcing")


def read_calibration() -> dict[str, Any] | None:
    """What `pytest-msprobe calibrate` has this run change: engine, env, reverse."""
    text = os.environ.get(CALIBRATION)
    return json.loads(text) if text else None


@dataclass(slots=True)
class Capture:
    """What one `with msprobe.capture(llm)` block records.

    Attributes:
        name: Empty for a test's first capture, else its name.
        folder: Where its files lie.
        files: Capture files by rank, once it has ended.
        is_checked: Whether it has been judged.
        is_automatic: Whether `msprobe_engine` started it, not the test.
        model: The engine's model, as it was named.
        watch: Looks after the engine while recording.
        follow: The capture whose tokens are fed back, None for the golden's if the
            settings ask for them.
    """

    session: "MsprobeSession"
    item: pytest.Item
    llm: Any
    name: str
    folder: Path
    files: list[Path] = field(default_factory=list)
    is_checked: bool = False
    is_open: bool = False
    is_automatic: bool = False
    model: str = ""
    watch: "EngineWatch | None" = None
    follow: "Capture | None" = None

    def __enter__(self) -> Self:
        """Starts recording."""
        from pytest_msprobe.engine.client import converse
        from pytest_msprobe.engine.faults import EngineWatch

        self._refuse_to_replace()
        converse(self.llm, self._start())
        self.is_open = True
        self.watch = EngineWatch(self.llm)
        return self

    async def __aenter__(self) -> Self:
        """Starts recording on an asynchronous engine (`AsyncLLM`)."""
        from pytest_msprobe.engine.client import converse_async

        self._refuse_to_replace()
        await converse_async(self.llm, self._start())
        self.is_open = True
        return self

    def _refuse_to_replace(self) -> None:
        """A block that is entered again is judged again.

        Raises:
            CaptureError: What it recorded before has not been judged.
        """
        if self.files and not self.is_checked:
            message = f"{self.item.nodeid}: a capture is entered again before its check"
            hint = "check it first, or give each block a capture of its own"
            raise CaptureError(message, slug="capture-again", hint=hint)
        self.files, self.is_checked = [], False

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Ends recording; an error of the block is not hidden by one of ours."""
        with self._not_hiding(error):
            self.close()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Ends recording on an asynchronous engine."""
        from pytest_msprobe.engine.client import converse_async, stop_capture

        self.is_open = False
        with self._not_hiding(error):
            self._take(await converse_async(self.llm, stop_capture(self.item.nodeid)))

    @contextlib.contextmanager
    def _not_hiding(self, error: BaseException | None) -> Iterator[None]:
        """Around the end of a block: its error gets our notes and wins over ours."""
        from pytest_msprobe.engine.faults import is_core_dead

        if error is not None:
            self._note_ranks(error)
        try:
            yield
        except Exception as own:
            if error is None:
                if is_core_dead(self.llm):
                    self._note_ranks(own)
                raise

    def close(self) -> None:
        """Ends recording and notes the files."""
        from pytest_msprobe.engine.client import converse, stop_capture

        if not self.is_open:
            return
        with self._last_watched():
            self._take(converse(self.llm, stop_capture(self.item.nodeid)))

    @contextlib.contextmanager
    def _last_watched(self) -> Iterator[None]:
        """Around the last call to the engine, which may be dying."""
        self.is_open = False
        try:
            yield
        finally:
            if self.watch is not None:
                self.watch.stop()

    def _start(self) -> "Conversation":
        from pytest_msprobe.engine.client import (
            ask_workers,
            check_attached,
            start_capture,
        )

        options = self.session.options_of(self.item)
        follow = self.followed_tokens()
        if self.session.is_forced(self):
            yield from check_attached()
            replies = yield from ask_workers("status")
            follow = self.session.golden_tokens(self, str(replies[0]["key"]))
        yield from start_capture(
            options.config,
            self.folder,
            decode_steps=options.decode_steps,
            follow=follow,
        )

    def followed_tokens(self) -> list[tuple[str, list[int]]]:
        """Prompt hash and tokens of each request of the capture that is followed.

        Raises:
            CaptureError: It has not been recorded.
        """
        if self.follow is None:
            return []
        if self.follow.is_open or not self.follow.files:
            message = f"{self.item.nodeid}: follow: a capture that has not ended"
            hint = "record the capture that is followed first"
            raise CaptureError(message, slug="follow", hint=hint)
        return _tokens_of(self.follow.files[0])

    def _take(self, replies: list[dict[str, Any]]) -> None:
        self.files = [Path(reply["file"]) for reply in replies]

    def _note_ranks(self, error: BaseException) -> None:
        """Adds to an error where each rank of an engine in other processes stood."""
        from pytest_msprobe.engine.faults import (
            clear_progress,
            describe_ranks,
            is_core_dead,
        )

        lines = describe_ranks(self.folder)
        if is_core_dead(self.llm):
            # A core ends with the first of its workers; alone it is rank 0 itself.
            place = len(lines) if len(lines) > 1 else 0
            lines.insert(place, "the core process of the engine died")
        for line in lines:
            error.add_note(f"{NOTE}{line}")
        if is_core_dead(self.llm) or any(" died " in line for line in lines):
            clear_progress(self.folder)

    def discard(self) -> None:
        """Ends recording and forgets what was recorded."""
        from pytest_msprobe.engine.client import ask_workers, converse

        if self.is_open:
            folder = str(self.folder.resolve())
            with self._last_watched():
                converse(self.llm, ask_workers("abandon", folder=folder))
        shutil.rmtree(self.folder, ignore_errors=True)

    def check(
        self, *, against: "Capture | None" = None, tolerances: Any = None
    ) -> None:
        """Judges the capture against its golden, or against another capture.

        Args:
            against: Another capture of this test, with the same prompts. It stands
                where a golden would and is not judged itself; no golden is needed.
            tolerances: Limits or rules on top of the marker's, as there.

        Raises:
            Failed: pytest's failure, with the verdict as its message.
        """
        rules = code_rules(tolerances, self.item)
        if against is None:
            self.session.check(self, rules)
        else:
            self.session.check_against(self, against, rules)

    def check_against_transformers(self, model: str | None = None) -> None:
        """Judges the capture by what transformers computes; no golden, no tolerance.

        Transformers runs on the CPU over the same tokens, once in an exact type (of
        float32 for an engine in bfloat16), once in the engine's. A row whose error to
        the exact one is far above that of transformers in the engine's type fails.

        Args:
            model: Folder or name of the checkpoint; the engine's if not given.

        Raises:
            CaptureError: Transformers cannot run the model, or none of its modules
                has a counterpart in vLLM's.
            Failed: pytest's failure, with the verdict as its message.
        """
        self.session.check_three_ways(self, model or self.model)


@dataclass(frozen=True, slots=True)
class TestOptions:
    """Settings of one test: the configuration with its marker on top."""

    __test__ = False

    config: Any
    decode_steps: int
    engine: dict[str, Any]
    rules: tuple["Rule", ...]
    is_teacher_forced: bool = False


@dataclass(slots=True)
class TestState:
    """What one running test has done so far; it has one if it asked for a fixture.

    Attributes:
        captures: In the order in which they were made.
        pending: Goldens to write once the test has passed; None removes one.
        is_ended: Whether the test's own code has ended.
        has_failed_parts: Whether a subtest of it has failed.
    """

    __test__ = False

    captures: list[Capture] = field(default_factory=list)
    pending: list[tuple[Path, bytes | None]] = field(default_factory=list)
    is_ended: bool = False
    has_failed_parts: bool = False


class MsprobeSession:
    """State of one pytest run with a configuration.

    Attributes:
        settings: The configuration.
        update: Which goldens are written, None for none.
        verdicts: All verdicts so far.
        written: Goldens written.
        removed: Goldens removed.
        users: Node ids of the collected tests that ask for our fixtures.
        is_selection: Whether tests were left out when they were collected.
        calibration: What this run changes to measure noise, None for any other run.
        decalibrated: Goldens that had noise and were written anew without it.
    """

    def __init__(
        self, settings: "Settings", update: "UpdateMode | None", config: pytest.Config
    ) -> None:
        self.settings = settings
        self.update = update
        self.verdicts: list[Verdict] = []
        self.written: list[Path] = []
        self.removed: list[Path] = []
        self.users: set[str] = set()
        self.is_selection = False
        self.calibration = read_calibration()
        self.decalibrated: list[Path] = []
        self._config = config
        self._states: dict[str, TestState] = {}
        self._engines: dict[str, Any] = {}
        self._matched: set[int] = set()
        self._row_names: Sequence[str] = []
        self._judged_tests: set[str] = set()
        self._judged_folders: set[Path] = set()
        stamp = time.strftime("%Y%m%d-%H%M%S")
        self.run_folder = self._runs_root() / f"{stamp}-{os.getpid()}"

    def _runs_root(self) -> Path:
        path = self.settings.capture.dump_path
        if path is not None:
            return Path(path)
        return self.settings.root / ".msprobe" / "runs"

    # Tests ---------------------------------------------------------------------

    def state_of(self, item: pytest.Item) -> TestState:
        """State of a running test that asks for one of our fixtures."""
        return self._states.setdefault(item.nodeid, TestState())

    def is_used_by(self, item: pytest.Item) -> bool:
        """Whether a running test has asked for one of our fixtures, in any way."""
        return item.nodeid in self._states

    def validate(self, item: pytest.Item, *, needs_engine: bool) -> None:
        """Checks the settings of a test before any test runs.

        Raises:
            MsprobeError: They are wrong, or `msprobe_engine` has no model.
        """
        from pytest_msprobe.engine.launch import engine_arguments

        options = self.options_of(item)
        if needs_engine:
            engine_arguments(options.engine, f"{self.settings.path}: engine")

    def options_of(self, item: pytest.Item) -> TestOptions:
        """Settings of a test.

        Raises:
            ConfigError: Its marker has an unknown key or a wrong value.
        """
        from dataclasses import asdict, replace

        from pytest_msprobe.config.debugger_config import LEVELS, config_from_json

        config = self.settings.capture
        steps = self.settings.golden.decode_steps
        is_forced = self.settings.golden.is_teacher_forced
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
                elif key == "teacher_forcing":
                    is_forced = _check_flag(value, f"{where}: {key}")
                elif key == "engine":
                    engine.update(_check_engine(value, f"{where}: engine"))
                else:
                    rules += _marker_rules(item, value, where)
        if self.calibration is not None:
            engine |= self.calibration["engine"]
        changes = os.environ.get(CAPTURE_VARIABLE)
        if changes:
            config = config_from_json({**asdict(config), **json.loads(changes)})
        return TestOptions(config, steps, engine, tuple(rules), is_forced)

    def is_forced(self, capture: Capture) -> bool:
        """Whether a capture is fed its golden's tokens; never where goldens are made.

        What a test records for another one to follow is not.
        """
        if capture.follow is not None or self.update is not None:
            return False
        return self.options_of(capture.item).is_teacher_forced

    def golden_tokens(self, capture: Capture, key: str) -> list[tuple[str, list[int]]]:
        """Prompt hash and tokens of each request of a capture's golden, if it has one.

        Args:
            capture: The capture.
            key: Numerics key of the engine.
        """
        from pytest_msprobe.golden.variants import choose

        choice = choose(self._golden_folder(capture), key, 0)
        return [] if choice.path is None else _tokens_of(choice.path)

    def new_capture(
        self,
        item: pytest.Item,
        llm: Any,
        name: str | None,
        *,
        follow: Capture | None = None,
    ) -> Capture:
        """A capture for a test; the second and later ones of a test need names.

        The first one discards what is being recorded automatically: a test that
        captures decides itself what is judged.

        Raises:
            CaptureError: The name is taken, or the test has been judged already.
        """
        state = self.state_of(item)
        captures = state.captures
        if state.is_ended:
            message = f"{item.nodeid}: capture after the test has been judged"
            hint = "capture in the test, or in a fixture before it yields"
            raise CaptureError(message, slug="late-capture", hint=hint)
        if captures and captures[0].is_automatic and captures[0].is_open:
            captures.pop(0).discard()
        if name is None:
            name = "" if not captures else f"capture{len(captures) + 1}"
        if any(capture.name == name for capture in captures):
            message = f"{item.nodeid}: capture {name!r}: this name is taken"
            raise CaptureError(message, slug="capture-name")
        folder = self.run_folder.joinpath(*self._place(item, name))
        capture = Capture(
            self, item, llm, name, folder, model=_model_of(llm), follow=follow
        )
        captures.append(capture)
        return capture

    def record(
        self,
        item: pytest.Item,
        prompts: Any,
        sampling: Any,
        *,
        engine: dict[str, Any] | None = None,
        env: dict[str, str] | None = None,
        python: str | None = None,
        name: str | None = None,
        follow: Capture | None = None,
    ) -> Capture:
        """Records a generation by an engine in a process of its own.

        Raises:
            ConfigError: The engine's arguments are wrong.
            EngineError: The process failed.
        """
        from dataclasses import asdict

        from pytest_msprobe.engine.child import Job, plain_sampling, record_in_child
        from pytest_msprobe.engine.launch import engine_arguments

        where = f"{item.nodeid}: msprobe.record: engine"
        options = self.options_of(item)
        arguments = engine_arguments(
            {**options.engine, **_check_engine(engine or {}, where)}, where
        )
        capture = self.new_capture(item, None, name, follow=follow)
        job = Job(
            arguments,
            prompts if isinstance(prompts, list) else [prompts],
            plain_sampling(sampling),
            asdict(options.config),
            str(capture.folder.resolve()),
            options.decode_steps,
            item.nodeid,
            tuple(capture.followed_tokens()),
        )
        variables = {key: str(value) for key, value in (env or {}).items()}
        capture.model = arguments["model"]
        capture.files = record_in_child(job, python=python, environment=variables)
        return capture

    def record_automatically(self, item: pytest.Item, llm: Any) -> None:
        """Records an engine from now until the test's code has ended.

        Args:
            item: A test; nothing is done if it has captured already.
            llm: The engine.
        """
        if self.state_of(item).captures:
            return
        capture = self.new_capture(item, llm, None)
        capture.is_automatic = True
        capture.__enter__()

    def _place(self, item: pytest.Item, name: str) -> list[str]:
        """Test file and test name, as folder names below a root."""
        from pytest_msprobe.golden.variants import safe_name

        path = Path(os.path.relpath(item.path, self.settings.root))
        test = item.nodeid.partition("::")[2].replace("::", ".")
        test = f"{test}@{name}" if name else test
        return [*(p for p in path.parts if p not in ("..", "/")), safe_name(test)]

    def finish_call(self, item: pytest.Item) -> None:
        """After the test's own code has passed: judges what it did not judge itself.

        Raises:
            CaptureError: The test asked for `msprobe` and recorded nothing.
        """
        if not self.is_used_by(item):
            return
        captures = self.state_of(item).captures
        if not captures:
            message = f"{item.nodeid}: asks for msprobe and captured nothing"
            hint = "record with msprobe.capture(llm), or leave the fixture out"
            raise CaptureError(message, slug="no-capture", hint=hint)
        for capture in captures:
            capture.close()
            if not capture.is_checked:
                self.check(capture)
        self._check_left_goldens(item)

    def _check_left_goldens(self, item: pytest.Item) -> None:
        """Goldens of captures that the test no longer makes.

        Raises:
            Failed: There are some; an update that rewrites failing goldens removes
                them instead.
        """
        from pytest_msprobe.golden.guard import is_written
        from pytest_msprobe.golden.variants import captures_of

        captures = self.state_of(item).captures
        judged = {self._golden_folder(capture) for capture in captures}
        first = self.settings.golden.directory.joinpath(*self._place(item, ""))
        left = [path for path in captures_of(first, item.nodeid)
                if path.parent not in judged]  # fmt: skip
        if not left:
            return
        if self.update is not None and is_written(self.update, "fail"):
            self.state_of(item).pending += [(path, None) for path in left]
            return
        names = ", ".join(sorted({path.parent.name for path in left}))
        text = (
            f"{item.nodeid}: not captured although there are goldens: {names}\n"
            "if this is meant, remove them: --msprobe-update=failing"
        )
        pytest.fail(text, pytrace=False)

    def end_call(self, item: pytest.Item) -> None:
        """After the test's own code has ended, well or not: no capture goes on."""
        if self.is_used_by(item):
            self.state_of(item).is_ended = True
            self._end_captures(item)

    def forget(self, item: pytest.Item) -> None:
        """After a test's teardown; if its set-up failed, captures may be open yet."""
        if self.is_used_by(item):
            self._end_captures(item)
            del self._states[item.nodeid]

    def _end_captures(self, item: pytest.Item) -> None:
        for capture in self.state_of(item).captures:
            with contextlib.suppress(Exception):
                capture.close()

    def commit(self, item: pytest.Item) -> None:
        """Writes the goldens of a test that has passed."""
        from pytest_msprobe.golden.store import remove, write_bytes

        locks = self.settings.root / ".msprobe" / "locks"
        state = self.state_of(item)
        for path, content in state.pending:
            if content is None:
                remove(path, locks)
                self.removed.append(path)
            else:
                write_bytes(path, content, locks)
                self.written.append(path)
        state.pending.clear()

    # Engines -------------------------------------------------------------------

    def engine_key(self, item: pytest.Item) -> str:
        """Which engine a test needs: its arguments as text."""
        engine = self.options_of(item).engine
        return json.dumps(engine, sort_keys=True, default=str)

    def engine(self, item: pytest.Item) -> Any:
        """The engine of a test; another one that is live is ended first.

        One that an earlier test has left unusable is started afresh.
        """
        from pytest_msprobe.engine.faults import is_usable
        from pytest_msprobe.engine.launch import engine_arguments, start_engine

        key = self.engine_key(item)
        if key not in self._engines or not is_usable(self._engines[key]):
            where = f"{self.settings.path}: engine"
            arguments = engine_arguments(self.options_of(item).engine, where)
            self.stop_engines()
            self._engines[key] = start_engine(arguments)
        return self._engines[key]

    def end_run(self) -> None:
        """Ends what an interrupted test has left open, and all engines."""
        for state in self._states.values():
            for capture in state.captures:
                with contextlib.suppress(Exception):
                    capture.close()
        self.stop_engines()

    def stop_engines(self) -> None:
        """Ends all engines."""
        from pytest_msprobe.engine.launch import stop_engine

        while self._engines:
            _, llm = self._engines.popitem()
            stop_engine(llm)

    # Verdicts ------------------------------------------------------------------

    def check(self, capture: Capture, rules: Sequence["Rule"] = ()) -> None:
        """Judges a capture; in an update run also decides whether to write a golden.

        Args:
            capture: The capture.
            rules: Of the call, on top of the marker's.

        Raises:
            Failed: pytest's failure, with the verdict as its message.
        """
        from pytest_msprobe.compare.ranks import find_disagreement, first_failure
        from pytest_msprobe.golden.guard import is_written
        from pytest_msprobe.report.terminal import render_failure

        captures = _read_recorded(capture)
        disagreement = find_disagreement(captures)
        is_disagreeing = disagreement is not None
        if self.settings.golden.is_tp_invariant:
            captures = [self._combine(capture, captures)]
        absent = self._absent_ranks(capture, captures)
        failures = []
        for recorded in captures:
            verdict = self._judge(capture, recorded, rules)
            verdict.command = self.update_command(capture.item, verdict)
            if absent:
                _fail_for_ranks(verdict, sorted(absent))
                absent = {}
            if disagreement is not None:
                verdict.status = "fail"
                verdict.reasons.insert(0, disagreement.text)
            self.verdicts.append(verdict)
            self._write_verdict(verdict, capture)
            # Ranks that disagree make no golden.
            update = self.update if disagreement is None else None
            disagreement = None
            if update is not None and is_written(update, verdict.status):
                self._prepare_golden(capture, recorded)
            elif not verdict.is_green and self.calibration is None:
                failures.append(verdict)
        self._judged_tests.add(capture.item.nodeid)
        self._judged_folders.add(self._golden_folder(capture))
        if failures:
            first = failures[0]
            if not is_disagreeing:
                first = first_failure(failures, captures)
            command = self.update_command(capture.item, first)
            text = render_failure(first, update_command=command)
            pytest.fail(text, pytrace=False)

    def check_against(
        self, capture: Capture, reference: Capture, more: Sequence["Rule"] = ()
    ) -> None:
        """Judges a capture against another one; no golden is read or written.

        Args:
            capture: The capture.
            reference: What stands where a golden would.
            more: Rules of the call, on top of the marker's.

        Raises:
            CaptureError: One of them is open or empty, or their ranks cannot be held
                against each other.
            Failed: pytest's failure, with the verdict as its message.
        """
        from pytest_msprobe.compare.against import judge_against
        from pytest_msprobe.compare.match import row_names
        from pytest_msprobe.compare.ranks import without_sharded
        from pytest_msprobe.compare.tolerance import unmatched_rules

        if reference is capture:
            message = f"{capture.item.nodeid}: a capture checked against itself"
            raise CaptureError(message, slug="against-itself")
        theirs, ours = _read_recorded(reference), _read_recorded(capture)
        rules = [*self.options_of(capture.item).rules, *more]
        names = row_names(*theirs, *ours)
        self._note_rules(unmatched_rules(rules, names), names)
        if len(theirs) != len(ours):
            where = "check(against=...) of captures with unequal numbers of ranks"
            old, new = without_sharded(
                self._combine(reference, theirs, where),
                self._combine(capture, ours, where),
            )
            theirs, ours = [old], [new]
        verdicts = [
            judge_against(*sides, rules) for sides in zip(theirs, ours, strict=True)
        ]
        for verdict in verdicts:
            self.verdicts.append(verdict)
            self._write_verdict(verdict, capture)
        self._judged_tests.add(capture.item.nodeid)
        _fail_if_red(verdicts, ours)

    def check_three_ways(self, capture: Capture, model: str) -> None:
        """Judges a capture between two references of transformers.

        Raises:
            CaptureError: It is open or empty, or transformers cannot run the model.
            Failed: pytest's failure, with the verdict as its message.
        """
        from pytest_msprobe.compare.three_way import (
            EXACT_NAME,
            HONEST_NAME,
            judge_three_ways,
        )
        from pytest_msprobe.engine.reference_captures import reference_captures
        from pytest_msprobe.golden.store import capture_bytes

        files = _read_recorded(capture)
        recorded = files[0]
        if len(files) > 1:
            recorded = self._combine(capture, files, "check_against_transformers")
        references = reference_captures(recorded, model)
        names = EXACT_NAME, HONEST_NAME
        for name, reference in zip(names, references, strict=True):
            reference.path = capture.folder / name
            reference.path.write_bytes(capture_bytes(reference))
        verdict = judge_three_ways(*references, recorded)
        self.verdicts.append(verdict)
        self._write_verdict(verdict, capture, ".transformers")
        self._judged_tests.add(capture.item.nodeid)
        _fail_if_red([verdict], [recorded])

    def _combine(
        self,
        capture: Capture,
        captures: list["CaptureFile"],
        why: str = "golden.tp_invariant",
    ) -> "CaptureFile":
        """All ranks as one capture, written beside theirs.

        Args:
            capture: The capture.
            captures: Its files.
            why: What asks for it.

        Raises:
            CaptureError: What was recorded cannot be combined.
        """
        from pytest_msprobe.compare.ranks import combine_ranks
        from pytest_msprobe.golden.store import capture_bytes

        header = captures[0].header
        where = f"{capture.item.nodeid}: {why}"
        if header.signature.get("level") != "L0":
            message = f"{where}: level {header.signature.get('level')}"
            hint = "operators depend on the number of ranks; record at level L0"
            raise CaptureError(message, slug="tp-invariant", hint=hint)
        ranks = header.signature["model"].get("tensor_parallel", 1)
        if len(captures) != ranks or header.world != ranks:
            message = (
                f"{where}: {len(captures)} of {header.world} ranks recorded, "
                f"{ranks} of them tensor-parallel"
            )
            hint = "record all ranks, without pipeline parallelism"
            raise CaptureError(message, slug="tp-invariant", hint=hint)
        combined = combine_ranks(captures)
        combined.path = capture.folder / "capture.combined.jsonl"
        combined.path.write_bytes(capture_bytes(combined))
        return combined

    def _absent_ranks(
        self, capture: Capture, captures: list["CaptureFile"]
    ) -> dict[int, Path]:
        """Goldens of ranks that were not recorded although they should have been.

        An update that rewrites failing goldens removes them instead.
        """
        from pytest_msprobe.golden.guard import is_written
        from pytest_msprobe.golden.variants import choose, ranks_of

        folder = self._golden_folder(capture)
        headers = [recorded.header for recorded in captures]
        choices = [choose(folder, header.key, header.rank) for header in headers]
        absent: dict[int, Path] = {}
        for variant in {choice.variant for choice in choices if choice.path}:
            absent.update(ranks_of(folder, variant))
        selected = self.options_of(capture.item).config.rank
        recorded = {header.rank for header in headers}
        for rank in list(absent):
            if rank in recorded or (selected and rank not in selected):
                del absent[rank]
        if self.update is not None and is_written(self.update, "fail"):
            pending = self.state_of(capture.item).pending
            pending += [(path, None) for path in absent.values()]
            return {}
        return absent

    def _write_verdict(
        self, verdict: "Verdict", capture: Capture, kind: str = ""
    ) -> None:
        from pytest_msprobe.report.record import write_verdict

        suffix = f".rank{verdict.rank}" if verdict.rank else ""
        path = capture.folder / f"verdict{kind}{suffix}.json"
        try:
            write_verdict(verdict, path)
        except OSError as error:
            message = f"{path}: cannot be written ({error.strerror or error})"
            hint = "free space or make it writable, or change dump_path"
            raise CaptureError(message, slug="verdict-write", hint=hint) from error

    def _judge(
        self, capture: Capture, recorded: "CaptureFile", more: Sequence["Rule"]
    ) -> "Verdict":
        from pytest_msprobe.compare.judge import judge
        from pytest_msprobe.compare.match import row_names
        from pytest_msprobe.compare.ranks import without_sharded
        from pytest_msprobe.compare.tolerance import unmatched_rules
        from pytest_msprobe.dump.capture import read_capture
        from pytest_msprobe.golden.variants import choose, file_name
        from pytest_msprobe.model.verdict import Verdict

        header = recorded.header
        folder = self._golden_folder(capture)
        choice = choose(folder, header.key, header.rank)
        rules = [*self.options_of(capture.item).rules, *more]
        if choice.path is None:
            names = row_names(recorded)
            self._note_rules(unmatched_rules(rules, names), names)
            return Verdict(
                test=capture.item.nodeid,
                status="missing",
                golden=str(folder / file_name(header.key, header.rank)),
                capture=str(recorded.path),
                key=header.key,
                rank=header.rank,
            )
        golden = read_capture(choice.path)
        mode: KeyMode | None = None
        if self.settings.golden.is_tp_invariant:
            golden, recorded = without_sharded(golden, recorded)
            sizes = [c.header.provenance.get("ranks") for c in (golden, recorded)]
            mode = "cross" if len(set(sizes)) > 1 else None
        judgement = judge(golden, recorded, rules, mode=mode)
        self._note_rules(judgement.unmatched, judgement.names)
        if judgement.verdict.is_green and self.calibration is None:
            self._refuse_unmatched(judgement.unmatched, judgement.names)
        return judgement.verdict

    def _golden_folder(self, capture: Capture) -> Path:
        place = self._place(capture.item, capture.name)
        return self.settings.golden.directory.joinpath(*place)

    def _prepare_golden(self, capture: Capture, recorded: "CaptureFile") -> None:
        from pytest_msprobe.dump.capture import read_header
        from pytest_msprobe.golden.store import golden_bytes
        from pytest_msprobe.golden.variants import file_name

        header = recorded.header
        path = self._golden_folder(capture) / file_name(header.key, header.rank)
        if path.is_file() and read_header(path).noise:
            self.decalibrated.append(path)
        content = golden_bytes(recorded, capture.item.nodeid, header.key)
        self.state_of(capture.item).pending.append((path, content))

    def update_command(self, item: pytest.Item, verdict: "Verdict") -> str:
        """The exact command that writes a test's golden."""
        mode = "new" if verdict.status == "missing" else "failing"
        here = self._config.invocation_params.dir
        path = os.path.relpath(self.settings.path, here)
        _, colons, name = item.nodeid.partition("::")
        node = f"{os.path.relpath(item.path, here)}{colons}{name}"
        parts = ["pytest", "--msprobe-config", path, f"--msprobe-update={mode}", node]
        return shlex.join(parts)

    # Rules ---------------------------------------------------------------------

    def _note_rules(self, unmatched: Sequence["Rule"], names: Sequence[str]) -> None:
        """Notes which rules of the configuration name a row of some test."""
        without = {id(rule) for rule in unmatched}
        rules = enumerate(self.settings.rules)
        self._matched |= {index for index, rule in rules if id(rule) not in without}
        self._row_names = names or self._row_names

    def _refuse_unmatched(
        self, unmatched: Sequence["Rule"], names: Sequence[str]
    ) -> None:
        """Rules of a marker or call are for one test: there they must name a row.

        Raises:
            ConfigError: One does not.
        """
        from pytest_msprobe.compare.tolerance import unmatched_error

        common = {id(rule) for rule in self.settings.rules}
        for rule in unmatched:
            if id(rule) not in common:
                raise unmatched_error(rule, names)

    def unmatched_rules(self) -> list[str]:
        """One line for each rule whose glob matched no row of any test."""
        from pytest_msprobe.compare.tolerance import unmatched_error

        if not self._judged_tests:
            return []
        return [
            str(unmatched_error(rule, self._row_names))
            for index, rule in enumerate(self.settings.rules)
            if index not in self._matched
        ]

    def is_complete(self) -> bool:
        """Whether all tests were judged, so that a rule without rows is a mistake.

        Not where tests were selected, where a test that asks for our fixtures was not
        judged, or where a golden lies for which no test of this run was judged.
        """
        goldens = self.settings.golden.directory.rglob("*.jsonl")
        return (
            not self.is_selection
            and self.users <= self._judged_tests
            and {path.parent for path in goldens} <= self._judged_folders
        )


def _read_recorded(capture: Capture) -> list["CaptureFile"]:
    """The files of a capture that has ended, by rank; it counts as checked.

    Raises:
        CaptureError: It is open yet, or recorded nothing.
    """
    from pytest_msprobe.dump.capture import read_capture

    if capture.is_open:
        message = f"{capture.item.nodeid}: check() inside its capture block"
        raise CaptureError(message, slug="open-capture", hint="check after the block")
    if not capture.files:
        message = f"{capture.item.nodeid}: the capture has no files to judge"
        raise CaptureError(message, slug="empty-capture")
    capture.is_checked = True
    return [read_capture(path) for path in capture.files]


def _tokens_of(path: Path) -> list[tuple[str, list[int]]]:
    """Prompt hash and tokens of each request of a capture or golden, by label."""
    from pytest_msprobe.dump.capture import read_header

    requests = read_header(path).requests
    return [(request.prompt_sha256, list(request.tokens)) for request in requests]


def _model_of(llm: Any) -> str:
    """Name or folder of an engine's model; empty where it is not known."""
    engine = getattr(llm, "llm_engine", llm)
    config = getattr(engine, "model_config", None)
    return str(getattr(config, "model", ""))


def _fail_if_red(verdicts: list["Verdict"], captures: list["CaptureFile"]) -> None:
    """Fails the test with the verdict of the rank that diverged first.

    Raises:
        Failed: One of them is not green.
    """
    from pytest_msprobe.compare.ranks import first_failure
    from pytest_msprobe.report.terminal import render_failure

    failures = [verdict for verdict in verdicts if not verdict.is_green]
    if failures:
        first = first_failure(failures, captures)
        pytest.fail(render_failure(first, update_command=None), pytrace=False)


def _fail_for_ranks(verdict: "Verdict", ranks: list[int]) -> None:
    """Makes a verdict one that fails because ranks of its golden are missing."""
    if verdict.is_green:
        verdict.status = "fail"
    for rank in ranks:
        verdict.reasons.append(f"rank {rank} has a golden and was not recorded")


def _check_steps(value: Any, where: str) -> int:
    if value == "all":
        return -1
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        message = f"{where}: decode_steps {value!r}: expected a number >= 0 or 'all'"
        raise ConfigError(message, slug="marker")
    return value


def _check_flag(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        message = f"{where} {value!r}: expected True or False"
        raise ConfigError(message, slug="marker")
    return value


def _check_mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        message = f"{where}: expected a dict with texts as keys, found {value!r}"
        raise ConfigError(message, slug="marker")
    return value


def _check_engine(value: Any, where: str) -> dict[str, Any]:
    from pytest_msprobe.config.settings import check_eager

    arguments = _check_mapping(value, where)
    check_eager(arguments, f"{where}.enforce_eager")
    return arguments


def _marker_rules(item: pytest.Item, value: Any, where: str) -> tuple["Rule", ...]:
    from pytest_msprobe.config.code_rules import read_code_rules

    line = item.location[1]
    origin = f"{Path(item.location[0]).name}:{(line or 0) + 1}"
    return read_code_rules(value, where, origin)


def code_rules(value: Any, item: pytest.Item) -> tuple["Rule", ...]:
    """Rules that a test gives to `check`; their origin is the line of the call.

    Raises:
        ConfigError: Something in them is wrong.
    """
    from pytest_msprobe.config.code_rules import read_code_rules

    if value is None:
        return ()
    frame = sys._getframe(1)  # noqa: SLF001 - the way to find a caller
    while frame.f_back is not None and frame.f_globals["__name__"].startswith(_PACKAGE):
        frame = frame.f_back
    origin = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
    return read_code_rules(value, f"{item.nodeid}: check()", origin)
