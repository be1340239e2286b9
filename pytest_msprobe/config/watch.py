# SPDX-License-Identifier: Apache-2.0
"""Reads a configuration file again when it changes: msProbe's `dump_enable`.

Only a configuration that holds `dump_enable` when it is first read is watched.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from pytest_msprobe.config.debugger_config import DebuggerConfig, parse_debugger_config
from pytest_msprobe.config.source import Source, read_source
from pytest_msprobe.errors import ConfigError

_LOG = logging.getLogger("pytest_msprobe")
# Seconds between two looks at the file, while recording is on and while it is off.
ON_INTERVAL = 0.5
OFF_INTERVAL = 3.0


class ConfigWatch:
    """The configuration of a running process, and whether recording is on.

    Attributes:
        config: As last read.
    """

    def __init__(
        self,
        source: Source,
        overrides: dict[str, Any] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Reads a source.

        Args:
            source: Where the configuration comes from.
            overrides: Values given in code, which win over the file's.
            clock: Seconds that only grow.

        Raises:
            ConfigError: A value is wrong.
        """
        self._overrides = overrides
        self._path = source.path
        self._clock = clock
        self.config = parse_debugger_config(source, overrides=overrides)
        self._is_watched = self.config.dump_enable is not None and bool(self._path)
        self._next_look = 0.0
        self._state = self._stat()

    @property
    def path(self) -> Path | None:
        """The file, None for a configuration that comes from none."""
        return self._path

    @property
    def is_on(self) -> bool:
        """Whether recording is switched on."""
        return self.config.dump_enable is not False

    def look(self) -> bool:
        """Looks whether the file has changed; returns whether `config` did.

        A file that cannot be read or is wrong is reported once and switches recording
        off until it changes again.
        """
        if not self._is_watched:
            return False
        now = self._clock()
        if now < self._next_look:
            return False
        self._next_look = now + (ON_INTERVAL if self.is_on else OFF_INTERVAL)
        state = self._stat()
        if state == self._state:
            return False
        self._state = state
        before = self.config
        self.config = self._read()
        return self.config != before

    def _read(self) -> DebuggerConfig:
        assert self._path is not None
        try:
            config = parse_debugger_config(
                read_source(self._path), overrides=self._overrides
            )
        except ConfigError as error:
            _LOG.warning("msprobe: %s; recording is off until it changes", error)
            return replace(self.config, dump_enable=False)
        if config.dump_enable is None:  # the key was taken out: its value stays
            config = replace(config, dump_enable=self.config.dump_enable)
        return config

    def _stat(self) -> tuple[int, int] | None:
        if self._path is None:
            return None
        try:
            state = self._path.stat()
        except OSError:
            return None
        return state.st_mtime_ns, state.st_size
