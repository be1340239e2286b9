# SPDX-License-Identifier: Apache-2.0
"""Functions of the user's own that are recorded: `register_custom_api`."""

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch

from pytest_msprobe.debugger.functions import Action, Entry, record_call
from pytest_msprobe.debugger.recorder import Recorder
from pytest_msprobe.errors import ConfigError


class CustomApis:
    """Functions replaced by recording ones, until they are restored."""

    def __init__(self, recorder: Callable[[], Recorder | None]) -> None:
        """Begins without any.

        Args:
            recorder: The recorder of the moment, None while there is none.
        """
        self._recorder = recorder
        self._originals: dict[tuple[int, str], tuple[Any, Any]] = {}

    def register(self, module: Any, api: Any, prefix: Any) -> None:
        """Replaces `module.api`; a second registration changes nothing.

        Raises:
            ConfigError: There is no such function, or the prefix is no text.
        """
        if prefix is not None and not isinstance(prefix, str):
            message = f"prefix {prefix!r}: expected text"
            raise ConfigError(message, slug="custom-api")
        original = getattr(module, api, None) if isinstance(api, str) else None
        if not callable(original):
            message = f"{module!r:.60} has no function {api!r}"
            raise ConfigError(message, slug="custom-api")
        key = (id(module), api)
        if key in self._originals:
            return
        name = prefix if prefix is not None else getattr(module, "__name__", "Custom")
        self._originals[key] = (module, original)
        setattr(module, api, self._wrap(original, name, api))

    def restore(self, module: Any, api: str) -> None:
        """Puts a function back; harmless where it was not registered."""
        found = self._originals.pop((id(module), api), None)
        if found is not None:
            setattr(module, api, found[1])

    def restore_all(self) -> None:
        """Puts every function back."""
        for (_, api), (module, original) in self._originals.items():
            setattr(module, api, original)
        self._originals.clear()

    def _wrap(
        self, original: Callable[..., Any], prefix: str, api: str
    ) -> Callable[..., Any]:
        entry = Entry(Action.RECORD, is_python=True)

        @functools.wraps(original)
        def function(*args: Any, **kwargs: Any) -> Any:
            recorder = self._recorder()
            if (
                recorder is None
                or not recorder.collector.is_recording
                or not recorder.config.has_functions
                or not recorder.collector.selection.takes_api(api, prefix)
            ):
                return original(*args, **kwargs)
            collector = recorder.collector
            site = collector.function_site(f"{prefix}.{api}.")
            frame = sys._getframe(1)  # noqa: SLF001 - stacks start at the caller
            with torch._C.DisableTorchFunction():  # noqa: SLF001 - the outermost call only
                return record_call(
                    collector, entry, site, original, args, kwargs, frame
                )

        return function
