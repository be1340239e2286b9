# SPDX-License-Identifier: Apache-2.0
"""Dumps every request of a running engine, as its `additional_config` asks.

The engine's workers are told by additional_config, so stock vLLM is enough. A wrong
configuration is found where the engine's arguments are checked, and again in every
worker, before the model is loaded.
"""

import argparse
import json
import logging
import sys
from multiprocessing import util
from pathlib import Path
from typing import Any

from pytest_msprobe.config.debugger_config import refuse_own_program
from pytest_msprobe.config.source import Source, read_source
from pytest_msprobe.config.watch import ConfigWatch
from pytest_msprobe.errors import ConfigError, MsprobeError

_LOG = logging.getLogger("pytest_msprobe")
KEYS = ("dump_config_path", "dump_config")
DEFAULT_DUMP_PATH = "./dump_path"
_CONFIG_COPY = "dump_config.json"


def asks_for_dump(additional: Any) -> bool:
    """Whether an engine's additional_config asks for a dump."""
    return isinstance(additional, dict) and any(key in additional for key in KEYS)


def read_dump_config(additional: dict[str, Any]) -> ConfigWatch:
    """Reads the configuration that additional_config names or holds.

    An inline configuration with `dump_enable` is copied into the dump's folder, where
    it can be changed while the engine runs.

    Raises:
        ConfigError: Both keys are given, or a value is wrong.
    """
    path, inline = (additional.get(key) for key in KEYS)
    if path is not None and inline is not None:
        message = "additional_config: dump_config_path and dump_config exclude another"
        raise ConfigError(message, slug="dump-config")
    if path is not None:
        if not isinstance(path, str):
            message = f"additional_config: dump_config_path {path!r}: expected a path"
            raise ConfigError(message, slug="dump-config")
        source = read_source(Path(path))
        watch = ConfigWatch(source)
        refuse_own_program(source, (), watch.config)
        return watch
    if not isinstance(inline, dict):
        message = f"additional_config: dump_config {inline!r}: expected an object"
        raise ConfigError(message, slug="dump-config")
    watch = ConfigWatch(Source(None, inline))
    refuse_own_program(Source(None, inline), (), watch.config)
    if watch.config.dump_enable is None:
        return watch
    folder = Path(watch.config.dump_path or DEFAULT_DUMP_PATH)
    copy = folder / _CONFIG_COPY
    try:
        folder.mkdir(parents=True, exist_ok=True)
        copy.write_text(json.dumps(inline, indent=1), encoding="utf-8")
    except OSError as error:
        message = f"{folder}: cannot be written ({error.strerror})"
        raise ConfigError(message, slug="dump-unwritable") from error
    return ConfigWatch(read_source(copy))


def check_command(arguments: list[str]) -> None:
    """Checks the command line of a server that is to dump, before anything is started.

    Args:
        arguments: Of the command.

    Raises:
        ConfigError: The configuration is wrong, or the engine would not be eager.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--additional-config", "--additional_config")
    parser.add_argument("--enforce-eager", "--enforce_eager", action="store_true")
    parser.add_argument("--config")
    known, _ = parser.parse_known_args(arguments)
    try:
        additional = json.loads(known.additional_config or "null")
    except ValueError:
        return  # vLLM says so
    if not asks_for_dump(additional):
        return
    read_dump_config(additional)
    if not known.enforce_eager and known.config is None:
        message = (
            "additional_config asks for a dump and the engine would run compiled code "
            "and graphs, in which modules and operators cannot be seen"
        )
        raise ConfigError(message, slug="not-eager", hint="add --enforce-eager")


class ContinuousDump:
    """Records every step of a worker's model runner until the process ends."""

    def __init__(self, worker: Any, watch: ConfigWatch) -> None:
        """Prepares; recording starts with the first step of a user's request.

        Args:
            worker: vLLM's worker, its device initialised.
            watch: The configuration.

        Raises:
            MsprobeError: The engine cannot be captured, or another process writes
                this rank's dump.
        """
        from pytest_msprobe.dump.layout import rank_name
        from pytest_msprobe.dump.lock import DumpLock
        from pytest_msprobe.engine.environment import global_rank
        from pytest_msprobe.engine.preflight import check_engine, check_folder

        check_engine(worker.vllm_config)
        self._runner = worker.model_runner
        self._watch = watch
        self._rank = global_rank(worker.vllm_config)
        self._attachment: Any = None
        self._steps = 0
        self._has_failed = False
        config = watch.config
        if config.rank and self._rank not in config.rank:
            _LOG.warning(
                "msprobe: rank %d is not dumped: rank is %s",
                self._rank,
                list(config.rank),
            )
            return
        folder = Path(config.dump_path or DEFAULT_DUMP_PATH)
        check_folder(folder)
        self._lock = DumpLock(folder, rank_name(self._rank, 0))
        self._original = self._runner.execute_model
        self._execute = self._original
        self._runner.execute_model = self._step
        # Runs when the process ends, of whatever kind it is; before daemon threads die.
        util.Finalize(self, self.finish, exitpriority=100)

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        """Stands for execute_model."""
        self._follow(args, kwargs)
        return self._execute(*args, **kwargs)

    def _follow(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Switches recording on or off as the configuration says by now."""
        from pytest_msprobe.engine.requests import is_real_step

        scheduled = args[0] if args else kwargs.get("scheduler_output")
        if self._has_failed or not is_real_step(scheduled, kwargs):
            return
        if self._watch.look():
            self.finish()
            state = "on" if self._watch.is_on else "off"
            _LOG.warning("msprobe: %s: recording is %s", self._watch.path, state)
        if self._watch.is_on and self._attachment is None:
            self._attach()

    def _attach(self) -> None:
        from pytest_msprobe.debugger.recorder import Recorder
        from pytest_msprobe.engine.runners import attachment_for

        config = self._watch.config
        folder = Path(config.dump_path or DEFAULT_DUMP_PATH)
        recorder = Recorder(
            config, folder, rank=self._rank, is_kept=False, has_gradients=False
        )
        attachment = attachment_for(self._runner, recorder, first_step=self._steps)
        attachment.on_step = self._note_step
        try:
            attachment.install(has_execute=False)
        except MsprobeError as error:
            attachment.remove()
            recorder.abandon()
            self._fail(error)
        else:
            self._attachment = attachment
            self._execute = attachment.around_execute(self._original)

    def _note_step(self) -> None:
        """After each step: says what a step takes, once, and what went wrong, once."""
        attachment = self._attachment
        recorder = attachment.recorder
        if recorder.collector.error is not None:
            self.finish()
            return
        if attachment.recorded_steps == 1 and recorder.estimate is not None:
            text = recorder.estimate.text
            _LOG.warning(
                "msprobe: rank %d is dumped to %s: %s",
                self._rank,
                recorder.folder,
                text,
            )

    def _fail(self, error: Exception) -> None:
        self._has_failed = True
        _LOG.error("msprobe: rank %d: recording stopped: %s", self._rank, error)

    def finish(self) -> None:
        """Takes the hooks off and waits for the files."""
        attachment, self._attachment = self._attachment, None
        if attachment is None:
            return
        attachment.remove()
        self._execute = self._original
        self._steps = attachment.next_step
        try:
            attachment.recorder.close()
        except MsprobeError as error:
            self._fail(error)


def log_to_stderr() -> None:
    """Sees to it that what is logged reaches the server's log.

    vLLM's logging configuration has no place for other packages, and may have
    switched their loggers off.
    """
    _LOG.disabled = False
    if not _LOG.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
        _LOG.addHandler(handler)
        _LOG.propagate = False
    if not _LOG.isEnabledFor(logging.WARNING):
        _LOG.setLevel(logging.WARNING)


def start_dump(wrapper: Any, additional: dict[str, Any]) -> None:
    """Lets a worker dump everything.

    Args:
        wrapper: vLLM's WorkerWrapperBase, its device initialised.
        additional: The engine's additional_config.

    Raises:
        MsprobeError: The configuration is wrong, or the engine cannot be captured.
    """
    log_to_stderr()
    worker = wrapper.worker
    worker.__dict__["msprobe_dump"] = ContinuousDump(
        worker, read_dump_config(additional)
    )
