# SPDX-License-Identifier: Apache-2.0
"""`PrecisionDebugger` with msProbe's constructor and methods, for code that has it."""

import atexit
import logging
import sys
import threading
from pathlib import Path
from typing import Any, ClassVar, Self

from pytest_msprobe.config.source import Source, read_source
from pytest_msprobe.config.watch import ConfigWatch
from pytest_msprobe.debugger.ranks import current_rank
from pytest_msprobe.debugger.recorder import Models, Recorder
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

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Returns the object of this process, made by the first call."""
        del args, kwargs
        with cls._lock:
            if cls._instance is None:
                cls._instance = super().__new__(cls)
            return cls._instance  # type: ignore[return-value]

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
            task: statistics, tensor or structure.
            dump_path: Folder of the dump.
            level: L0, L1 or mix.
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
        self._step = 0
        self._rank: int | None = None
        self._is_rank_known = False
        self._has_open_step = False
        self._is_ready = True
        atexit.register(self._flush)

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
            token_range: Not supported by this version.
            rank_id: Rank of this process, taken from torch.distributed if not given.
                The first one known is kept.
            scheduled_tokens: Accepted for vLLM-Ascend's call; not used.

        Raises:
            CaptureError: No object was constructed, or the level needs a model.
            ConfigError: An argument is wrong or not supported.
        """
        del scheduled_tokens
        with cls._lock:
            self = cls._get()
            if token_range is not None:
                message = f"token_range {token_range!r}: not supported by this version"
                raise ConfigError(message, slug="token-range", hint="leave it out")
            self._settle_rank(rank_id)
            self._look()
            if self._is_recording or not self._is_wanted():
                return
            recorder = self._get_recorder()
            recorder.attach(model)
            frame = sys._getframe(1)  # noqa: SLF001 - stacks end at the caller
            recorder.begin_step(self._step, frame=frame.f_back)
            self._has_open_step = True
            self._is_recording = True
            recorder.recording.__enter__()

    @classmethod
    def stop(cls) -> None:
        """Stops recording; harmless when nothing was started."""
        with cls._lock:
            self = cls._get()
            self._pause()
            self._look()

    @classmethod
    def step(cls) -> None:
        """Writes the step and begins the next one.

        Recording that was not stopped goes on in the next step.
        """
        with cls._lock:
            self = cls._get()
            self._write_step()
            self._step += 1
            self._look()
            if not self._is_recording:
                return
            self._pause()
            if self._is_wanted():
                recorder = self._get_recorder()
                recorder.begin_step(self._step)
                self._has_open_step = True
                self._is_recording = True
                recorder.recording.__enter__()

    @classmethod
    def set_init_step(cls, step: int) -> None:
        """Gives the current step a number.

        Raises:
            ConfigError: It is not a whole number >= 0.
        """
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            message = f"step {step!r}: expected a whole number >= 0"
            raise ConfigError(message, slug="init-step")
        with cls._lock:
            cls._get()._step = step  # noqa: SLF001 - the object is of this class

    @classmethod
    def reset(cls) -> None:
        """Writes what is open, takes all wrappers off and forgets the object."""
        with cls._lock:
            self = cls._instance
            if self is None:
                return
            self._flush()
            if self._recorder is not None:
                self._recorder.detach()
            atexit.unregister(self._flush)
            cls._instance = None

    def _pause(self) -> None:
        if self._is_recording:
            assert self._recorder is not None
            self._is_recording = False
            self._recorder.recording.__exit__(None, None, None)

    def _look(self) -> None:
        """Takes over a configuration file that has changed (`dump_enable`)."""
        if self._is_recording or not self._watch.look():
            return
        if self._recorder is not None:
            self._flush()
            self._recorder = None
        self.config = self._watch.config

    def _is_wanted(self) -> bool:
        if not self._watch.is_on:
            return False
        if self.config.rank and self._rank not in self.config.rank:
            return False
        return not self.config.step or self._step in self.config.step

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

    def _get_recorder(self) -> Recorder:
        if self._recorder is None:
            path = Path(self.config.dump_path or _DEFAULT_DUMP_PATH)
            self._recorder = Recorder(self.config, path, rank=self._rank, is_kept=False)
        return self._recorder

    def _write_step(self) -> None:
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
            if self._recorder is None:
                return
            self._write_step()
            try:
                self._recorder.close()
            except CaptureError:
                self._note_error()


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
    if config_path is not None and watch.config.dump_path is None:
        message = f"{config_path}: dump_path: expected the folder of the dump"
        raise ConfigError(message, slug="dump-path")
    return watch
