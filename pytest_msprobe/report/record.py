# SPDX-License-Identifier: Apache-2.0
"""A verdict as a file: `verdict.json`, with a versioned schema.

Paths in the file are relative to its folder, so that a run can be moved.
"""

import os
from pathlib import Path

import msgspec

from pytest_msprobe.errors import DumpFormatError
from pytest_msprobe.model.verdict import OLDEST_READABLE, SCHEMA, Verdict

FILE_NAME = "verdict.json"


def write_verdict(verdict: Verdict, path: Path) -> None:
    """Writes a verdict, indented for people."""
    folder = os.path.abspath(path.parent)  # noqa: PTH100 - keeps symbolic links
    stored = msgspec.structs.replace(
        verdict,
        golden=verdict.golden and os.path.relpath(verdict.golden, folder),
        capture=verdict.capture and os.path.relpath(verdict.capture, folder),
    )
    text = msgspec.json.format(msgspec.json.encode(stored), indent=1)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(text + b"\n")
    temporary.replace(path)


def read_verdict(path: Path) -> Verdict:
    """Reads a verdict; its paths are absolute.

    Raises:
        DumpFormatError: It cannot be read or has another schema.
    """
    try:
        content = path.read_bytes()
        version = msgspec.json.decode(content, type=_Version).schema
        if OLDEST_READABLE <= version <= SCHEMA:
            verdict = msgspec.json.decode(content, type=Verdict)
        else:
            readable = f"this version reads {OLDEST_READABLE} to {SCHEMA}"
            message = f"{path}: schema {version}; {readable}"
            raise DumpFormatError(message, slug="verdict-schema")
    except (OSError, msgspec.MsgspecError) as error:
        message = f"{path}: not a verdict ({error})"
        raise DumpFormatError(message, slug="verdict-format") from error
    verdict.golden = _found(path, verdict.golden)
    verdict.capture = _found(path, verdict.capture)
    return verdict


class _Version(msgspec.Struct):
    """The part of a verdict file that tells how to read the rest."""

    schema: int


def _found(path: Path, stored: str) -> str:
    """Where a path of a verdict file leads to."""
    if not stored:
        return ""
    joined = os.path.join(path.parent, stored)  # noqa: PTH118 - text in, text out
    return os.path.abspath(joined)  # noqa: PTH100 - keeps symbolic links
