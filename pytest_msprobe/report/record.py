# SPDX-License-Identifier: Apache-2.0
"""A verdict as a file: `verdict.json`, with a versioned schema."""

from pathlib import Path

import msgspec

from pytest_msprobe.errors import DumpFormatError
from pytest_msprobe.model.verdict import SCHEMA, Verdict

FILE_NAME = "verdict.json"


def write_verdict(verdict: Verdict, path: Path) -> None:
    """Writes a verdict, indented for people."""
    text = msgspec.json.format(msgspec.json.encode(verdict), indent=1)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(text + b"\n")
    temporary.replace(path)


def read_verdict(path: Path) -> Verdict:
    """Reads a verdict.

    Raises:
        DumpFormatError: It cannot be read or has another schema.
    """
    try:
        verdict = msgspec.json.decode(path.read_bytes(), type=Verdict)
    except (OSError, msgspec.MsgspecError) as error:
        message = f"{path}: not a verdict ({error})"
        raise DumpFormatError(message, slug="verdict-format") from error
    if verdict.schema != SCHEMA:
        message = f"{path}: schema {verdict.schema}; this version reads {SCHEMA}"
        raise DumpFormatError(message, slug="verdict-schema")
    return verdict
