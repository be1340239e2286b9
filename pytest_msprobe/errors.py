# SPDX-License-Identifier: Apache-2.0
"""Errors that a user can act on, one class per place of the remedy.

Every message follows one grammar: what happened, the value, where, what to do next.
"""


class MsprobeError(Exception):
    """Base of all errors raised by this package.

    Attributes:
        slug: Stable identifier of the kind of error, for documentation and filters.
        hint: What to do next, or None.
    """

    def __init__(
        self, message: str, *, slug: str = "error", hint: str | None = None
    ) -> None:
        self.message = message
        self.slug = slug
        self.hint = hint
        super().__init__(message)

    def __str__(self) -> str:
        """The message, and what to do next."""
        return f"{self.message}; {self.hint}" if self.hint else self.message


class ConfigError(MsprobeError, ValueError):
    """A setting is wrong; the message names the file and the line or key."""


class GoldenError(MsprobeError):
    """A golden is missing, unreadable or may not be written here."""


class DumpFormatError(MsprobeError, ValueError):
    """A dump or capture file does not have the documented format."""


class CaptureError(MsprobeError, RuntimeError):
    """Recording failed or recorded nothing."""


class EngineError(MsprobeError, RuntimeError):
    """An engine could not be started, reached or used."""


class MissingDependencyError(MsprobeError, ImportError):
    """torch or vLLM is not installed in this environment."""
