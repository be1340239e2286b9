# SPDX-License-Identifier: Apache-2.0
"""Which calls are recorded: msProbe's `scope`, `list` and `risk_level`."""

from pytest_msprobe.config.debugger_config import DebuggerConfig
from pytest_msprobe.debugger.risk import is_recorded


class Selection:
    """The state of the selection within one step.

    `scope` opens when its first name starts and closes after its last name has ended;
    both ends are recorded whole. `list` takes every name that contains an entry; at
    level mix everything inside a module call so named is taken as well.
    """

    def __init__(self, config: DebuggerConfig) -> None:
        self._scope = config.scope
        self._names = config.names
        self._expands = config.level == "mix"
        self._risk = config.risk_level
        self._is_open = not config.scope
        self._listed_modules = 0
        self.is_trivial = not config.scope and not config.names

    def takes_api(self, api: str, prefix: str) -> bool:
        """Whether calls of an API can be recorded at all (`risk_level`)."""
        return not self.is_trivial or is_recorded(api, prefix, self._risk)

    def reset(self) -> None:
        """Starts a new step."""
        self._is_open = not self._scope
        self._listed_modules = 0

    def enter(self, name: str, *, is_module: bool) -> bool:
        """Whether a call that starts now is recorded."""
        if self.is_trivial:
            return True
        if self._scope and name == self._scope[0]:
            self._is_open = True
        is_listed = any(entry in name for entry in self._names)
        inside = self._listed_modules > 0
        if is_module and is_listed and self._expands:
            self._listed_modules += 1
        return self._is_open and (not self._names or is_listed or inside)

    def leave(self, name: str, *, is_module: bool) -> None:
        """Notes that a call has ended."""
        if self.is_trivial:
            return
        if self._scope and name == self._scope[1]:
            self._is_open = False
        if is_module and self._expands and any(entry in name for entry in self._names):
            self._listed_modules -= 1
