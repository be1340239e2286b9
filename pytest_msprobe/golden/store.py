# SPDX-License-Identifier: Apache-2.0
"""Writes goldens: a temporary file in the same folder, fsync, rename, under a lock."""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock
from msgspec import structs

from pytest_msprobe.dump.capture import (
    FORCED,
    FORMAT,
    CallLine,
    CaptureFile,
    Line,
    StepLine,
    encode,
)
from pytest_msprobe.errors import GoldenError

_LOCK_TIMEOUT_S = 60


@contextlib.contextmanager
def locked(path: Path, lock_folder: Path) -> Iterator[None]:
    """Holds the lock of one file; lock files lie outside the golden tree."""
    lock_folder.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(str(path).encode()).hexdigest()[:16]
    with FileLock(lock_folder / f"{name}.lock", timeout=_LOCK_TIMEOUT_S):
        yield


def write_bytes(path: Path, content: bytes, lock_folder: Path) -> None:
    """Writes a file so that a crash leaves either the old content or the new one.

    Args:
        path: The file; its folder is made.
        content: All of it.
        lock_folder: Where lock files lie.

    Raises:
        GoldenError: It cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path, lock_folder):
            _replace(path, content)
    except OSError as error:
        message = f"{path}: cannot be written ({error.strerror or error})"
        raise GoldenError(message, slug="golden-write") from error


def remove(path: Path, lock_folder: Path) -> None:
    """Removes a golden, if it is still there.

    Args:
        path: The file.
        lock_folder: Where lock files lie.

    Raises:
        GoldenError: It cannot be removed.
    """
    try:
        with locked(path, lock_folder):
            path.unlink(missing_ok=True)
    except OSError as error:
        message = f"{path}: cannot be removed ({error.strerror or error})"
        raise GoldenError(message, slug="golden-remove") from error


def _replace(path: Path, content: bytes) -> None:
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def golden_bytes(capture: CaptureFile, test: str, variant: str) -> bytes:
    """The golden that a capture becomes.

    What judging does not need is left out: plain values of module arguments, names of
    calls in dump.json, roles of slots that are not judged, ids of the prompts.

    Args:
        capture: The capture.
        test: Node id of the test.
        variant: Name of the variant.

    Raises:
        GoldenError: Another capture's tokens were fed to it.
    """
    header = capture.header
    if header.provenance.get(FORCED):
        message = f"{test}: {FORCED}: this capture was fed the golden's tokens"
        hint = "run the test with --msprobe-update, which records its own"
        raise GoldenError(message, slug="teacher-forcing", hint=hint)
    fields = {name: getattr(header, name) for name in header.__struct_fields__}
    requests = [structs.replace(item, prompt=[]) for item in header.requests]
    fields.update(msprobe=FORMAT, kind="golden", test=test, variant=variant)
    fields["requests"] = requests
    keeps_values = header.signature.get("level") != "L0"
    lines = _lines(
        capture,
        lambda call: CallLine(
            call.c, call.l, call.i, call.o, call.x if keeps_values else {}
        ),
    )
    return encode(type(header)(**fields), lines)


def calibrated_bytes(
    golden: CaptureFile, noise: Mapping[int, list[float]], about: dict[str, Any]
) -> bytes:
    """A golden with the noise of its rows.

    Args:
        golden: The golden; its lines get the noise.
        noise: The metrics' noise of each tensor that has some, by id.
        about: What the header says of it: `runs` and `logprob`.
    """
    for number, line in golden.tensors.items():
        line.n = noise.get(number, [])
    golden.header.msprobe = FORMAT
    golden.header.noise = about
    return capture_bytes(golden)


def capture_bytes(capture: CaptureFile) -> bytes:
    """A capture in memory as the bytes of its file."""
    return encode(capture.header, _lines(capture, lambda call: call))


def _lines(
    capture: CaptureFile, shorten: Callable[[CallLine], CallLine]
) -> Iterator[Line]:
    """Lines in order, each tensor before the first call that refers to it."""
    written: set[int] = set()
    for entry in capture.entries:
        if isinstance(entry, StepLine):
            yield entry
            continue
        for ids in (*entry.i.values(), *entry.o.values()):
            for number in ids:
                if number not in written:
                    written.add(number)
                    yield capture.tensors[number]
        yield shorten(entry)
