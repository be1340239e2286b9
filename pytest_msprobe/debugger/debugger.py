# SPDX-License-Identifier: Apache-2.0
"""`PrecisionDebugger` with msProbe's constructor and methods, for code that has it."""

import atexit
import logging
import os
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, Self

import torch

from pytest_msprobe.config.source import Source, read_source
from pytest_msprobe.config.watch import ConfigWatch
from pytest_msprobe.debugger.custom import CustomApis
from pytest_msprobe.debugger.ranks import current_rank
from pytest_msprobe.debugger.recorder import Models, Recorder
from pytest_msprobe.debugger.saved import SavedVariables, is_savable
from pytest_msprobe.debugger.slices import cut_of_request
from pytest_msprobe.dump.layout import rank_folder, rank_name
from pytest_msprobe.dump.lock import DumpLock
from pytest_msprobe.errors import CaptureError, ConfigError

_LOG = logging.getLogger("pytest_msprobe")
_DEFAULT_DUMP_PATH = "./dump_path"


class PrecisionDebugger:
    """Records what a model computes between `start` and `stop`.

    One object a process: a later construction returns the first one and ignores its
    arguments, as msProbe does. Every method can be called on the class as well. What
    goes wrong while recording is logged as an error and kept in `error`; it never
    breaks the model.

    Attributes:
        config: What to record.
        error: First error met while recording, or None.

    Source: constructor and methods of msProbe 26.2's PrecisionDebugger.
    """

    _instance: ClassVar["PrecisionDebugger | None"] = None
    _lock: ClassVar[threading.RLock] = threading.RLock()
    _is_ready: bool = False
    _is_foreign: bool = False

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Returns the object of this process, made by the first call."""
        del args, kwargs
        with cls._lock:
            if cls._instance is None or cls._instance._is_foreign:  # noqa: SLF001
                cls._instance = super().__new__(cls)
            return cls._instance  # type: ignore[return-value]

    @classmethod
    def _after_fork(cls) -> None:
        """In a forked process: nothing is recorded, the files are the parent's.

        An object constructed here is another one.
        """
        cls._lock = threading.RLock()
        self = cls._instance
        if self is None:
            return
        self._is_foreign = True
        self._is_started = self._is_recording = self._has_open_step = False
        if self._recorder is not None:
            self._recorder.collector.is_recording = False
        self._recorder = self._saved = self._claimed = None
        atexit.unregister(self._end)

    def __init__(
        self,
        config_path: str | None = None,
        task: str | None = None,
        dump_path: str | None = None,
        level: str | None = None,
        step: list[int | str] | None = None,
    ) -> None:
        """Reads the configuration; arguments given here win over the file's keys.

        Args:
            config_path: An msProbe config.json, None for the defaults.
            task: statistics, tensor, structure, nan_check or diff_check.
            dump_path: Folder of the dump.
            level: L0, L1, mix or debug.
            step: Steps to record, whole numbers and ranges `"a-b"`.

        Raises:
            ConfigError: An argument or a value in the file is wrong.
        """
        if self._is_ready:
            return
        try:
            self._watch = _read_config(config_path, task, dump_path, level, step)
        except ConfigError:
            type(self)._instance = None  # noqa: SLF001 - the class is this one
            raise
        self.config = self._watch.config
        self.error: BaseException | None = None
        self._recorder: Recorder | None = None
        self._is_recording = False
        # Between start and stop, though the step or the file may keep it off.
        self._is_started = False
        self._model: Models | None = None
        self._step = 0
        self._rank: int | None = None
        self._is_rank_known = False
        self._has_open_step = False
        self._saved: SavedVariables | None = None
        self._claimed: DumpLock | None = None
        self._customs = CustomApis(lambda: self._recorder)
        self._warned: set[str] = set()
        self._is_ready = True
        atexit.register(self._end)

    @classmethod
    def _get(cls) -> "PrecisionDebugger":
        if cls._instance is None:
            message = "PrecisionDebugger was not constructed in this process"
            hint = "construct it before start, stop or step"
            raise CaptureError(message, slug="no-debugger", hint=hint)
        return cls._instance

    @classmethod
    def start(
        cls,
        model: Models | None = None,
        token_range: list[int] | None = None,
        rank_id: int | None = None,
        scheduled_tokens: dict[str, int] | None = None,
    ) -> None:
        """Starts recording; a second start in a step goes on with it.

        Args:
            model: A module, or a list or tuple of modules; needed at L0 and mix.
            token_range: First and last forward of the model that are recorded,
                counted from 0 at this start; None for all.
            rank_id: Rank of this process, taken from torch.distributed if not given.
                The first one known is kept.
            scheduled_tokens: Tokens of each request in this batch, in its order; with
                the key `request_id` only that request's rows are recorded.

        Raises:
            CaptureError: No object was constructed, the level needs a model, or another
                process writes this rank's dump.
            ConfigError: An argument is wrong.
        """
        with cls._lock:
            self = cls._get()
            bounds = _check_token_range(token_range, model)
            self._settle_rank(rank_id)
            self._look()
            if self._may_record():
                self._claim()
            if self.config.level == "debug":
                return
            self._is_started = True
            self._model = model if model is not None else self._model
            if not self._is_wanted():
                return
            recorder = self._get_recorder()
            recorder.attach(model)
            if self._is_recording or recorder.is_finished:
                return
            try:
                cut = cut_of_request(self.config.request_id, scheduled_tokens)
            except KeyError as missing:
                self._warn(f"request {missing} is not in this step: nothing recorded")
                self._is_started = False
                return
            recorder.collector.set_request(cut)
            frame = sys._getframe(1)  # noqa: SLF001 - stacks end at the caller
            self._resume(frame.f_back)
            recorder.collector.set_forward_range(bounds)

    def _resume(self, frame: FrameType | None = None) -> None:
        """Records from here on, in the running step."""
        recorder = self._get_recorder()
        recorder.begin_step(self._step, frame=frame)
        self._has_open_step = True
        self._is_recording = True
        recorder.recording.__enter__()

    @classmethod
    def stop(cls) -> None:
        """Stops recording; harmless when nothing was started."""
        with cls._lock:
            self = cls._get()
            self._is_started = False
            self._pause()
            self._look()

    @classmethod
    def step(cls) -> None:
        """Writes the step and begins the next one.

        Recording that was not stopped goes on in the next step.

        Raises:
            CaptureError: `dump_path` was changed to one that another process writes.
        """
        with cls._lock:
            self = cls._get()
            self._turn_to(self._step + 1)

    def _turn_to(self, step: int) -> None:
        """Writes the open step; what comes belongs to another one."""
        self._pause()
        self._write_step()
        self._step = step
        self._look()
        if not self._is_started or not self._is_wanted():
            return
        recorder = self._get_recorder()
        recorder.attach(self._model)
        if recorder.is_finished:
            return
        recorder.collector.set_request(None)
        self._resume()
        if recorder.collector.forward_range is not None:
            recorder.collector.pause()  # until the next forward that is chosen

    @classmethod
    def set_init_step(cls, step: int) -> None:
        """Gives the current step a number, from which `step` counts on.

        What was recorded in it before is written under the number that it had.

        Raises:
            ConfigError: It is not a whole number >= 0.
        """
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            message = f"step {step!r}: expected a whole number >= 0"
            raise ConfigError(message, slug="init-step")
        with cls._lock:
            self = cls._get()
            if step != self._step:
                self._turn_to(step)

    @classmethod
    def save(
        cls,
        variable: Any,
        name: str,
        save_backward: bool = True,  # noqa: FBT001, FBT002 - msProbe's signature
    ) -> None:
        """Writes a variable to debug.json, at level debug.

        What cannot be saved is reported once and breaks nothing.

        Args:
            variable: A tensor, number, text or None, or a list, tuple or dict of them.
            name: Of the entry; calls of one name are numbered within a step.
            save_backward: Whether the gradients of its tensors are saved as well.

        Raises:
            CaptureError: No object was constructed, or another process writes this
                rank's dump.
        """
        with cls._lock:
            self = cls._get()
            if self.config.level != "debug":
                self._warn(f"save({name!r}): nothing is saved at {self.config.level}")
                return
            given: object = name
            if not isinstance(given, str) or not is_savable(variable):
                kind = type(variable).__name__
                self._warn(f"save({name!r}): a {kind} cannot be saved")
                return
            self._settle_rank(None)
            if not self._is_wanted():
                return
            if self._saved is None:
                self._claim()
                folder = rank_folder(self._dump_path, self._step, self._rank_name)
                self._saved = SavedVariables(self.config, folder)
            self._saved.save(variable, name, with_gradient=bool(save_backward))

    @classmethod
    def register_custom_api(
        cls, module: Any, api: str, prefix: str | None = None
    ) -> None:
        """Records the calls of a function as `<prefix>.<api>.<n>.forward`.

        Args:
            module: Module or class that holds the function.
            api: Its name there.
            prefix: In place of the module's name.

        Raises:
            CaptureError: No object was constructed.
            ConfigError: There is no such function, or the prefix is no text.
        """
        with cls._lock:
            cls._get()._customs.register(module, api, prefix)  # noqa: SLF001 - own class

    @classmethod
    def restore_custom_api(cls, module: Any, api: str) -> None:
        """Puts a registered function back; harmless where it is none."""
        with cls._lock:
            cls._get()._customs.restore(module, api)  # noqa: SLF001 - own class

    @classmethod
    def begin_module(cls, module: torch.nn.Module, name: str) -> None:
        """Records only this module, as `Module.<name>.<Class>`, until `end_module`.

        Raises:
            CaptureError: No object was constructed, or nothing is being recorded.
            ConfigError: An argument has the wrong type.
        """
        given: tuple[object, object] = (module, name)
        if not isinstance(given[0], torch.nn.Module) or not isinstance(given[1], str):
            message = f"module_dump({type(module).__name__}, {name!r}): expected a "
            raise ConfigError(message + "module and a name", slug="module-dump")
        with cls._lock:
            self = cls._get()
            if not self._is_recording:
                message = f"module_dump({name!r}): nothing is being recorded"
                raise CaptureError(message, slug="module-dump", hint="call start first")
            if not self._get_recorder().begin_module(module, name):
                self._warn(f"module_dump({name!r}): start has hooked this module")

    @classmethod
    def end_module(cls) -> None:
        """Ends `begin_module`; harmless where there was none."""
        with cls._lock:
            self = cls._get()
            if self._recorder is not None:
                self._recorder.end_module()

    @classmethod
    def reset(cls) -> None:
        """Writes what is open, takes all wrappers off and forgets the object."""
        with cls._lock:
            self = cls._instance
            if self is None:
                return
            self._end()
            self._customs.restore_all()
            if self._recorder is not None:
                self._recorder.detach()
            atexit.unregister(self._end)
            cls._instance = None

    def _pause(self) -> None:
        if self._is_recording:
            assert self._recorder is not None
            self._is_recording = False
            self._recorder.recording.__exit__(None, None, None)

    def _look(self) -> None:
        """Takes over a configuration file that has changed (`dump_enable`).

        Recording is switched at once; other keys hold once the open step is written.
        """
        if self._is_recording:
            return
        self._watch.look()
        new = self._watch.config
        if new == self.config:
            return
        if replace(self.config, dump_enable=new.dump_enable) == new:
            if self._recorder is not None and not self._watch.is_on:
                self._recorder.detach()
            self.config = new
        elif not self._has_open_step:
            self._flush()
            self._recorder = None
            self.config = new

    def _may_record(self) -> bool:
        """Whether this process records, in whatever step."""
        if self._is_foreign:
            self._warn("a forked process records nothing; construct the debugger in it")
            return False
        if not self._watch.is_on:
            return False
        return not self.config.rank or self._rank in self.config.rank

    def _is_wanted(self) -> bool:
        """Whether this process records in this step."""
        is_chosen = not self.config.step or self._step in self.config.step
        return self._may_record() and is_chosen

    def _settle_rank(self, rank_id: int | None) -> None:
        if self._is_rank_known:
            return
        if rank_id is not None and (
            isinstance(rank_id, bool) or not isinstance(rank_id, int) or rank_id < 0
        ):
            message = f"rank_id {rank_id!r}: expected a whole number >= 0"
            raise ConfigError(message, slug="rank-id")
        self._rank = rank_id if rank_id is not None else current_rank()
        self._is_rank_known = True
        if self.config.rank and self._rank not in self.config.rank:
            _LOG.warning(
                "nothing is recorded in this process: rank %s is not among %s",
                self._rank,
                list(self.config.rank),
            )

    @property
    def _dump_path(self) -> Path:
        return Path(self.config.dump_path or _DEFAULT_DUMP_PATH)

    @property
    def _rank_name(self) -> str:
        return rank_name(self._rank, os.getpid())

    def _claim(self) -> None:
        """Sees to it that no other process writes this rank's dump.

        Processes that know no rank have folders of their own, as those of one job may;
        if they belong to several programs the dump is a mixture, which is said. Where
        the folder cannot be written, writing the step will say so.

        Raises:
            CaptureError: Another process writes it.
        """
        claimed = self._claimed
        if claimed is not None and claimed.is_for(self._dump_path, self._rank_name):
            return
        self._release()
        if self.config.load is not None and not self.config.load.dumps:
            return
        try:
            self._claimed = DumpLock(self._dump_path, self._rank_name)
        except CaptureError as error:
            if error.slug == "dump-locked":
                raise
            return
        others = self._claimed.others()
        if self._rank is None and others:
            self._warn(
                f"{self._dump_path}: {', '.join(others)} writes there as well; "
                "unless it is one job, give every program a dump_path of its own"
            )

    def _release(self) -> None:
        claimed, self._claimed = self._claimed, None
        if claimed is not None:
            claimed.release()

    def _get_recorder(self) -> Recorder:
        if self._recorder is None:
            self._claim()
            self._recorder = Recorder(
                self.config, self._dump_path, rank=self._rank, is_kept=False
            )
        return self._recorder

    def _warn(self, text: str) -> None:
        """Says something, once."""
        if text not in self._warned:
            self._warned.add(text)
            _LOG.warning("msprobe: %s", text)

    def _write_step(self) -> None:
        saved, self._saved = self._saved, None
        if saved is not None:
            try:
                saved.write()
            except OSError as error:
                self.error = self.error or error
                _LOG.error("msprobe: variables could not be written: %s", error)
        if self._recorder is None or not self._has_open_step:
            return
        self._recorder.end_step()
        self._has_open_step = False
        self._note_error()

    def _note_error(self) -> None:
        assert self._recorder is not None
        error = self._recorder.collector.error
        if error is not None and self.error is None:
            self.error = error
            _LOG.error("recording stopped: %s: %s", type(error).__name__, error)

    def _flush(self) -> None:
        """Writes an open step and waits for the files."""
        with self._lock:
            self._pause()
            self._write_step()
            if self._recorder is None:
                return
            try:
                self._recorder.close()
            except CaptureError:
                self._note_error()

    def _end(self) -> None:
        """Writes what is open and lets others write the dump."""
        with self._lock:
            self._flush()
            self._release()


os.register_at_fork(after_in_child=PrecisionDebugger._after_fork)  # noqa: SLF001


def _check_token_range(bounds: Any, model: Models | None) -> tuple[int, int] | None:
    if bounds is None:
        return None
    is_pair = isinstance(bounds, list | tuple) and len(bounds) == 2  # noqa: PLR2004
    if not is_pair or any(
        isinstance(b, bool) or not isinstance(b, int) for b in bounds
    ):
        message = f"token_range {bounds!r}: expected two whole numbers"
        raise ConfigError(message, slug="token-range")
    first, last = bounds
    if not 0 <= first <= last:
        message = f"token_range {bounds!r}: expected 0 <= first <= last"
        raise ConfigError(message, slug="token-range")
    if model is None:
        message = f"token_range {bounds!r}: it counts forwards of a model"
        hint = "use start(model=...)"
        raise CaptureError(message, slug="no-model", hint=hint)
    return first, last


def _read_config(
    config_path: str | None,
    task: str | None,
    dump_path: str | None,
    level: str | None,
    step: list[int | str] | None,
) -> ConfigWatch:
    source = Source(None, {})
    if config_path is not None:
        given: object = config_path
        if not isinstance(given, str):
            message = f"config_path {given!r}: expected text"
            raise ConfigError(message, slug="config-path")
        source = read_source(Path(config_path))
    overrides: dict[str, Any] = {
        "task": task,
        "dump_path": dump_path,
        "level": level,
        "step": step,
    }
    watch = ConfigWatch(source, overrides)
    writes = watch.config.load is None or watch.config.load.dumps
    if config_path is not None and watch.config.dump_path is None and writes:
        message = f"{config_path}: dump_path: expected the folder of the dump"
        raise ConfigError(message, slug="dump-path")
    return watch


def module_dump(module: torch.nn.Module, name: str) -> None:
    """See `PrecisionDebugger.begin_module`."""
    PrecisionDebugger.begin_module(module, name)


def module_dump_end() -> None:
    """See `PrecisionDebugger.end_module`."""
    PrecisionDebugger.end_module()
